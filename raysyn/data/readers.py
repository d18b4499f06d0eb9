"""What every source of frames shares: an index of patients made from names alone, then one patient read at a time.

Phantom, CAMUS and PNG folders all come through `Reader`; `open_reader` chooses by `data.name`. An index is cheap (no
picture is opened), fixes each patient's split before anything else, and is refused when a patient is in two.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raysyn.config import DataConfig
from raysyn.data.pictures import BadPicture, resize_grey, resize_labels
from raysyn.labels import OUTSIDE
from raysyn.types import Frame, UserError

PATIENT = re.compile(r"patient\d{4,}")


@dataclass(frozen=True)
class FrameFiles:
    """Where one frame is read from. `annotation` holds CAMUS's labels 0-3, `sector` (if any) the structures 0-4."""

    frame_id: str
    view: str
    phase: str
    image: str
    annotation: str = ""
    sector: str = ""


@dataclass(frozen=True)
class Patient:
    """One patient with its split and the files of its frames (none for the phantom: it is computed)."""

    patient_id: str
    split: str
    files: tuple[FrameFiles, ...] = ()
    number: int = 0


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    file: str
    reason: str


@dataclass
class Problems:
    """What to do about bad input: `raise` stops at the first with one clear line, `skip` collects them."""

    policy: str
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, file: str | Path, reason: str) -> None:
        """Report one. Raises UserError under `raise`."""
        if self.policy != "skip":
            raise UserError(f"{file}: {reason}; correct it, or leave such frames out with data.on_bad_frame=skip")
        self.skipped.append(Skipped(str(file), reason))


@dataclass
class Index:
    """The patients of a source in a fixed order, what was left out, and a digest of names, sizes and times of files.

    `notes` are facts that the user should read (say, that there is no test split).
    """

    patients: list[Patient]
    skipped: list[Skipped]
    digest: str
    notes: list[str] = field(default_factory=list)


class Reader(Protocol):
    """A source of frames. Pickles, and reads the same frames wherever its root is visible."""

    @property
    def name(self) -> str:
        """The source's name, as in `data.name`."""

    @property
    def writes_before_checked(self) -> bool:
        """True where no input can be bad, or bad input is skipped: shards may be written as they are made."""

    def index(self) -> Index:
        """The patients, splits decided. Raises UserError for a folder that is not this source's."""

    def read(self, patient: Patient) -> tuple[list[Frame], list[Skipped]]:
        """The frames of one patient at `image_size`, and what was left out. Under `raise` a bad one is a UserError."""

    def facts(self, patient: Patient) -> dict[str, Any]:
        """What the source says about a patient, for the manifest."""


@dataclass(frozen=True)
class FolderReader(ABC):
    """What readers of files below `root` share; frames are `image_size` squared."""

    root: str
    image_size: int
    on_bad_frame: str = "raise"

    @property
    def writes_before_checked(self) -> bool:
        """Only where bad frames are skipped; under `raise` a bad one means that nothing is written."""
        return self.on_bad_frame == "skip"

    def read(self, patient: Patient) -> tuple[list[Frame], list[Skipped]]:
        """The frames of one patient, and what was left out."""
        problems, frames = Problems(self.on_bad_frame), []
        for files in patient.files:
            try:
                frames.append(self.frame(files, patient))
            except BadPicture as bad:
                problems.add(bad.file, bad.reason)
        return frames, problems.skipped

    @abstractmethod
    def frame(self, files: FrameFiles, patient: Patient) -> Frame:
        """One frame. Raises BadPicture."""


@dataclass(frozen=True)
class PhantomReader:
    """Procedural patients 0, 1, …: the training ones first, then validation, then test."""

    data: DataConfig
    name: str = "phantom"
    writes_before_checked: bool = True

    def index(self) -> Index:
        """All patients; the digest is empty, since no file is read."""
        counts = {
            "train": self.data.num_train_patients,
            "validation": self.data.num_validation_patients,
            "test": self.data.num_test_patients,
        }
        splits = (split for split, count in counts.items() for _ in range(count))
        prefix = f"phantom-s{self.data.seed}-p"
        return Index([Patient(f"{prefix}{i:05d}", split, number=i) for i, split in enumerate(splits)], [], "")

    def read(self, patient: Patient) -> tuple[list[Frame], list[Skipped]]:
        """The four frames of one phantom patient."""
        from raysyn.data.phantom import phantom_patient

        return phantom_patient(self.data.seed, patient.number, self.data.image_size, patient.split), []

    def facts(self, patient: Patient) -> dict[str, Any]:
        """Nothing beyond the split: a phantom has no clinical record."""
        return {}


def open_reader(data: DataConfig) -> Reader:
    """The reader of `data.name`. Raises UserError when a real source has no readable `data.root`."""
    if data.name == "phantom":
        return PhantomReader(data)
    if not data.root:
        raise UserError(f"data.root: is not set; data={data.name} needs the folder with the data")
    if "://" in data.root:
        raise UserError(f"data.root: {data.root} is a URI; give a folder that every worker can see")
    root = Path(data.root).expanduser().absolute()
    if not is_folder(root):
        raise UserError(f"data.root: {root} is not a folder; give the one that holds the data")
    if data.name == "camus":
        from raysyn.data.camus import CamusReader

        return CamusReader(str(root), data.image_size, data.on_bad_frame)
    from raysyn.data.png_folder import PngFolderReader

    return PngFolderReader(str(root), data.image_size, data.on_bad_frame, data.source)


def split_once(splits: Mapping[str, Iterable[str]], origin: Mapping[str, str], problems: Problems) -> dict[str, str]:
    """patient → split. A patient in two of `splits` is a problem; skipped, it is left out of both.

    `origin` names the file or folder of each split, for the message.
    """
    found: dict[str, str] = {}
    twice: set[str] = set()
    for split, patients in splits.items():
        for patient in dict.fromkeys(patients):
            if found.setdefault(patient, split) != split and patient not in twice:
                problems.add(
                    origin[split], f"{patient} is also in {origin[found[patient]]}; a patient belongs to one split only"
                )
                twice.add(patient)
    return {patient: split for patient, split in found.items() if patient not in twice}


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises UserError where that may not be known: no permission above it."""
    try:
        return path.is_dir()
    except OSError as error:
        reason = "no permission to read it" if isinstance(error, PermissionError) else error.strerror
        raise UserError(f"{path}: {reason}; change its mode or give another data.root") from None


def folder_names(folder: Path, kind: str = "file") -> dict[str, os.stat_result]:
    """Names in a folder with their stat, sorted. Raises BadPicture when it is missing or may not be read."""
    try:
        with os.scandir(folder) as entries:
            wanted = [e for e in entries if (e.is_file() if kind == "file" else e.is_dir())]
            return {e.name: e.stat() for e in sorted(wanted, key=lambda e: e.name)}
    except FileNotFoundError:
        raise BadPicture(str(folder), "no such folder") from None
    except PermissionError:
        raise BadPicture(str(folder), "no permission to read it") from None
    except NotADirectoryError:
        raise BadPicture(str(folder), "is not a folder") from None
    except OSError as error:
        raise BadPicture(str(error.filename or folder), f"cannot be read ({error.strerror})") from None


class Digest:
    """A cheap digest of input files: names, sizes and modification times, not their bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, stat: os.stat_result) -> None:
        """Count one file in."""
        self._hash.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())

    def hexdigest(self) -> str:
        """16 hex digits."""
        return self._hash.hexdigest()[:16]


def make_frame(
    files: FrameFiles,
    patient: Patient,
    image: np.ndarray,
    structures: np.ndarray,
    spacing_mm: tuple[float, float] | None,
    image_size: int,
) -> Frame:
    """A real frame at `image_size` from a picture and its structures (0-4) at their own size.

    spacing_mm (row, column) grows by what each axis shrinks. Outside the sector the image is 0.
    """
    rows, columns = image.shape
    label_map = resize_labels(structures, image_size)
    resized = np.where(label_map == OUTSIDE, 0, resize_grey(image, image_size)).astype(np.uint8)
    if spacing_mm is not None:
        spacing_mm = (spacing_mm[0] * rows / image_size, spacing_mm[1] * columns / image_size)
    return Frame(
        frame_id=files.frame_id,
        image=resized,
        label_map=label_map,
        view=files.view,
        phase=files.phase,
        patient_id=patient.patient_id,
        split=patient.split,
        source="real",
        spacing_mm=spacing_mm,
    )
