"""CAMUS in both published releases (REFERENCE §3).

- NIfTI: `database_nifti/patientNNNN/…nii.gz` with the official `database_split/subgroup_*.txt`, used as they are.
- Older MetaImage: `training/patientNNNN/*.mhd`, the first 50 patients being validation and the rest training, as
  published. Its `testing/` patients were released without ground truth: they cannot score anything and are left out, so
  that release alone has no test split. Where their ground truth was added (`*_gt.mhd`) they are the test split; they
  are other people than the training patients of the same number, hence `testing_patientNNNN`.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysyn.data.pictures import NUM_CAMUS_LABELS, BadPicture, as_grey, as_labels, check_readable, sector_mask
from raysyn.data.readers import (
    PATIENT,
    Digest,
    FolderReader,
    FrameFiles,
    Index,
    Patient,
    Problems,
    folder_names,
    is_folder,
    make_frame,
    split_once,
)
from raysyn.labels import from_camus
from raysyn.types import PHASES, VIEWS, Frame, UserError

SPLIT_FILES = {
    "train": "subgroup_training.txt",
    "validation": "subgroup_validation.txt",
    "test": "subgroup_testing.txt",
}
NUM_OLD_VALIDATION_PATIENTS = 50
NO_TEST = (
    "the older release's testing/ has no ground truth, so there is no test split: "
    "fitting and synthesis work, scores on real test frames need the NIfTI release"
)


@dataclass(frozen=True)
class CamusReader(FolderReader):
    """CAMUS below `root`: 2CH and 4CH at ED and ES of each patient, squashed, as published; the spacing follows each axis."""

    name: str = "camus"

    def index(self) -> Index:
        """Patients in the order of their names. Raises UserError when `root` is neither release, or a file is bad."""
        root = Path(self.root)
        if is_folder(root / "database_nifti"):
            return _index_nifti(root, self.on_bad_frame)
        if is_folder(root / "training"):
            return _index_old(root, self.on_bad_frame)
        raise UserError(
            f"data.root: {root} holds neither database_nifti/ nor training/; give the folder that holds one"
        )

    def frame(self, files: FrameFiles, patient: Patient) -> Frame:
        """One frame. Raises BadPicture."""
        return read_frame(files, patient, self.image_size)

    def facts(self, patient: Patient) -> dict[str, Any]:
        """`ejection_fraction` (percent) and, by view, `image_quality` from Info_*.cfg, as far as they are there."""
        folder = Path(patient.files[0].image).parent if patient.files else None
        return read_info(folder) if folder is not None else {}


def read_frame(files: FrameFiles, patient: Patient, image_size: int) -> Frame:
    """One frame. Raises BadPicture: missing, unreadable or truncated file, unequal sizes, unknown labels, no sector."""
    image, spacing = read_picture(files.image)
    labels, _ = read_picture(files.annotation)
    grey = as_grey(image, files.image)
    annotation = as_labels(labels, files.annotation, NUM_CAMUS_LABELS)
    if grey.shape != annotation.shape:
        sizes = f"{list(annotation.shape)}, its picture {list(grey.shape)}"
        raise BadPicture(files.annotation, f"sizes differ: the ground truth is {sizes} (rows, columns)")
    structures = from_camus(annotation, sector_mask(grey, files.image))
    return make_frame(files, patient, grey, structures, spacing, image_size)


def read_picture(file: str) -> tuple[np.ndarray, tuple[float, float] | None]:
    """A NIfTI or MetaImage file as [rows, columns] and its spacing (row, column) in mm. Raises BadPicture."""
    check_readable(file)
    values, spacing = _read_nifti(file) if file.endswith(".nii.gz") else _read_metaimage(file)
    known = all(np.isfinite(v) and v > 0 for v in spacing)
    return values, spacing if known else None


def _read_nifti(file: str) -> tuple[np.ndarray, tuple[float, float]]:
    import nibabel
    from nibabel.spatialimages import HeaderDataError

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it mends odd headers aloud
    try:
        raw = gzip.decompress(Path(file).read_bytes())  # whole: a cut or damaged end shows in its checksum alone
    except (OSError, EOFError, zlib.error) as error:
        raise BadPicture(file, f"cannot be read as NIfTI, it may be cut off ({_line(error)})") from None
    kinds = {raw[344:348]: nibabel.Nifti1Image, raw[4:8]: nibabel.Nifti2Image}
    kind = kinds.get(b"n+1\0") or kinds.get(b"n+2\0")
    if kind is None:
        raise BadPicture(file, "cannot be read as NIfTI: it has no such header")
    try:
        image = kind.from_bytes(raw)
        header = image.header
        needed = header.get_data_offset() + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        if len(raw) < needed:
            raise BadPicture(file, f"cannot be read as NIfTI, it is cut off: {len(raw)} of {needed} bytes")
        values = np.asanyarray(image.dataobj)
        # As it was written: nibabel's own header has 1 mm where the file says 0, that is, unknown.
        stored = kind.header_class(raw[: header.template_dtype.itemsize], check=False)["pixdim"]
        zooms = [abs(float(z)) for z in stored[1:3]]
    except (HeaderDataError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise BadPicture(file, f"cannot be read as NIfTI, its header is damaged ({_line(error)})") from None
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values[..., 0]
    # Array axes are (x, y): the picture is the transpose.
    return values.T, (zooms[1], zooms[0])


def _read_metaimage(file: str) -> tuple[np.ndarray, tuple[float, float]]:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image = sitk.ReadImage(file)
    except RuntimeError as error:
        raise BadPicture(
            file, f"cannot be read as MetaImage, it or its raw file may be cut off ({_line(error)})"
        ) from None
    values = sitk.GetArrayFromImage(image)  # [(z,) y, x]: the picture as it is
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    return values, (float(image.GetSpacing()[1]), float(image.GetSpacing()[0]))


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def read_info(folder: Path) -> dict[str, Any]:
    """Facts of a patient from its Info_2CH.cfg and Info_4CH.cfg (`key: value` lines); what is absent is left out."""
    facts: dict[str, Any] = {}
    for view in VIEWS:
        file = folder / f"Info_{view}.cfg"
        if not file.is_file():
            continue
        try:
            lines = file.read_text("utf-8-sig", errors="replace").splitlines()
        except OSError:
            continue
        pairs = (line.partition(":") for line in lines)
        info = {key.strip(): value.strip() for key, _, value in pairs}
        if info.get("ImageQuality"):
            facts.setdefault("image_quality", {})[view] = info["ImageQuality"]
        try:
            fraction = float(info["EF"])
        except (KeyError, ValueError):
            continue  # optional, and some releases leave it empty
        if math.isfinite(fraction):
            facts["ejection_fraction"] = fraction
    return facts


def _index_nifti(root: Path, policy: str) -> Index:
    problems, digest = Problems(policy), Digest()
    folder = root / "database_split"
    listed = {split: _read_split_file(folder / name, digest) for split, name in SPLIT_FILES.items()}
    origin = {split: str(folder / name) for split, name in SPLIT_FILES.items()}
    split_of = split_once(listed, origin, problems)
    found = set(_patient_folders(root / "database_nifti"))
    patients = []
    for patient_id in sorted(split_of):
        if patient_id not in found:
            where = origin[split_of[patient_id]]
            problems.add(root / "database_nifti" / patient_id, f"the folder is missing, though {where} lists it")
            continue
        patients.append(
            _index_patient(
                root / "database_nifti", patient_id, patient_id, split_of[patient_id], "nii.gz", problems, digest
            )
        )
    notes = [f"{origin[split]} lists no patient, so there is no {split} split" for split in listed if not listed[split]]
    if unlisted := sorted(found - {p for names in listed.values() for p in names}):
        shown = ", ".join(unlisted[:5]) + ("…" if len(unlisted) > 5 else "")
        notes.append(f"{len(unlisted)} patients are in no split file and were not read: {shown}")
    return Index(patients, problems.skipped, digest.hexdigest(), notes)


def _index_old(root: Path, policy: str) -> Index:
    problems, digest = Problems(policy), Digest()
    names = _patient_folders(root / "training")
    if len(names) <= NUM_OLD_VALIDATION_PATIENTS:
        raise UserError(
            f"{root / 'training'}: holds {len(names)} patients; the first {NUM_OLD_VALIDATION_PATIENTS} are "
            "validation, so none is left to train on"
        )
    patients = []
    for i, name in enumerate(names):
        split = "validation" if i < NUM_OLD_VALIDATION_PATIENTS else "train"
        patients.append(_index_patient(root / "training", name, name, split, "mhd", problems, digest))
    testing = root / "testing"
    tests = _files_of_patients(testing, problems) if is_folder(testing) else {}
    if not any(file.endswith("_gt.mhd") for files in tests.values() for file in files):
        return Index(patients, problems.skipped, digest.hexdigest(), [NO_TEST])
    for name in tests:
        patients.append(_index_patient(testing, name, f"testing_{name}", "test", "mhd", problems, digest))
    return Index(patients, problems.skipped, digest.hexdigest())


def _patient_folders(folder: Path) -> list[str]:
    try:
        return [name for name in folder_names(folder, "folder") if PATIENT.fullmatch(name)]
    except BadPicture as bad:
        raise UserError(f"{bad.file}: {bad.reason}") from None


def _files_of_patients(folder: Path, problems: Problems) -> dict[str, list[str]]:
    """patient → names in its folder; a folder that cannot be read is a problem and left out."""
    found = {}
    for name in _patient_folders(folder):
        try:
            found[name] = list(folder_names(folder / name))
        except BadPicture as bad:
            problems.add(bad.file, bad.reason)
    return found


def _index_patient(
    folder: Path, name: str, patient_id: str, split: str, suffix: str, problems: Problems, digest: Digest
) -> Patient:
    """The frames of one patient folder whose picture and ground truth are both there; the others are problems."""
    try:
        present = folder_names(folder / name)
    except BadPicture as bad:
        problems.add(bad.file, bad.reason)
        return Patient(patient_id, split)
    for file, stat in present.items():
        digest.add(f"{folder.name}/{name}/{file}", stat)
        if file.startswith("Info_") and not os.access(folder / name / file, os.R_OK):
            problems.add(folder / name / file, "no permission to read it")
    frames = []
    for view in VIEWS:
        for phase in PHASES:
            image, annotation = f"{name}_{view}_{phase}.{suffix}", f"{name}_{view}_{phase}_gt.{suffix}"
            missing = [f for f in (image, annotation) if f not in present]
            if missing:
                what = "ground truth" if missing[0] == annotation else "picture"
                problems.add(folder / name / missing[0], f"the {what} is missing")
                continue
            paths = [str(folder / name / f) for f in (image, annotation)]
            frames.append(FrameFiles(f"{patient_id}_{view}_{phase}", view, phase, *paths))
    return Patient(patient_id, split, tuple(frames))


def _read_split_file(file: Path, digest: Digest) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
        digest.add(f"database_split/{file.name}", file.stat())
    except FileNotFoundError:
        raise UserError(f"{file}: the split file is missing; the official splits are needed, restore it") from None
    except PermissionError:
        raise UserError(f"{file}: no permission to read it; change its mode") from None
    except (UnicodeDecodeError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{file}: is not a text file; restore the official one") from None
    for number, line in enumerate(lines, 1):
        if line and not PATIENT.fullmatch(line):
            raise UserError(f"{file}: line {number} {line[:40]!r} is not a patient name like patient0001")
    return [line for line in lines if line]
