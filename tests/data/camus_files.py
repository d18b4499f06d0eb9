"""CAMUS in both of its releases with small pictures, written for tests."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from raysyn.config import DataConfig
from raysyn.data.camus import CamusReader
from raysyn.data.readers import open_reader
from raysyn.types import PHASES, VIEWS

ROWS, COLUMNS = 60, 40  # of the picture; the arrays in the files are (x, y) = (40, 60)
SPACING_X, SPACING_Y = 0.3, 0.15


def picture() -> np.ndarray:
    """A cone from the top, with a black cavity in it: uint8 [rows, columns]."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    image = np.where(np.abs(x - COLUMNS / 2) <= y / 3 + 1, 120, 0).astype(np.uint8)
    image[20:30, 17:23] = 0
    return image


def annotation() -> np.ndarray:
    """LV cavity high, myocardium around it, left atrium low in the picture."""
    labels = np.zeros((ROWS, COLUMNS), dtype=np.uint8)
    labels[16:34, 15:26] = 2
    labels[20:30, 17:23] = 1
    labels[40:50, 14:20] = 3
    return labels


def write_nifti(file: Path, values: np.ndarray) -> None:
    image = nibabel.Nifti1Image(values.T, np.diag([-SPACING_X, -SPACING_Y, 1, 1]))
    image.header.set_zooms((SPACING_X, SPACING_Y, 1.0)[: values.ndim])
    nibabel.save(image, file)


def write_mhd(file: Path, values: np.ndarray) -> None:
    image = sitk.GetImageFromArray(values[None])
    image.SetSpacing((SPACING_X, SPACING_Y, 1.0))
    sitk.WriteImage(image, str(file))


def write_patient(folder: Path, suffix: str, write) -> None:
    folder.mkdir(parents=True)
    for view in VIEWS:
        for phase in PHASES:
            stem = f"{folder.name}_{view}_{phase}"
            write(folder / f"{stem}.{suffix}", picture())
            write(folder / f"{stem}_gt.{suffix}", annotation())
        (folder / f"Info_{view}.cfg").write_text(f"ED: 1\nES: 18\nImageQuality: Good{view}\nEF: 56.5\nFrameRate: 50\n")


def touch_patient(folder: Path) -> None:
    """A patient of the older release whose files are empty."""
    folder.mkdir(parents=True)
    for stem in (f"{folder.name}_{view}_{phase}" for view in VIEWS for phase in PHASES):
        for name in (f"{stem}.mhd", f"{stem}_gt.mhd"):
            (folder / name).touch()


def write_splits(root: Path, **splits: list[str]) -> None:
    (root / "database_split").mkdir(exist_ok=True)
    for name, patients in splits.items():
        (root / "database_split" / f"subgroup_{name}.txt").write_text("\n".join(patients) + "\n")


def read_all(root: Path, policy: str = "raise", size: int = 30):
    reader = open_reader(DataConfig(name="camus", root=str(root), image_size=max(size, 32), on_bad_frame=policy))
    reader = CamusReader(reader.root, size, policy)
    index = reader.index()
    frames, skipped = [], list(index.skipped)
    for patient in index.patients:
        found, left_out = reader.read(patient)
        frames += found
        skipped += left_out
    return index, frames, skipped


BAD = "patient0002_4CH_ES"


def file_of(root: Path, name: str) -> Path:
    return root / "database_nifti" / "patient0002" / name


def with_header(root: Path, name: str, at: int, values: bytes) -> None:
    raw = bytearray(gzip.decompress(file_of(root, name).read_bytes()))
    raw[at : at + len(values)] = values
    file_of(root, name).write_bytes(gzip.compress(bytes(raw)))
