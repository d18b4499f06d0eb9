"""The published PNG layout (REFERENCE §3), of real and of synthetic sets alike: `data.source` says which.

`images/{training,validation,testing}/*.png` with `annotations/…` (labels 0-3) and, if there, `sector_annotations/…`
(structures 0-4), each under the picture's name or that name with `_gt`. Split and patient come from the folder and from
the whole name, `[prefix_]patientNNNN_{2CH,4CH}_{ED,ES}[_suffix].png`, never from a part of the path.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raysyn.data.pictures import NUM_CAMUS_LABELS, BadPicture, as_grey, as_labels, check_readable, sector_mask
from raysyn.data.readers import (
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
from raysyn.labels import STRUCTURES, from_camus
from raysyn.types import Frame, UserError

BIT_DEPTH = 24  # where a PNG tells it
FOLDERS = {"train": "training", "validation": "validation", "test": "testing"}
NAME = re.compile(
    r"(?:(?P<prefix>[A-Za-z0-9.-]+(?:_[A-Za-z0-9.-]+)*)_)?"
    r"(?P<patient>patient\d{4,})_(?P<view>2CH|4CH)_(?P<phase>ED|ES)"
    r"(?:_(?P<suffix>[A-Za-z0-9.-]+(?:_[A-Za-z0-9.-]+)*))?\.png"
)


@dataclass(frozen=True)
class PngFolderReader(FolderReader):
    """PNG pictures and labels below `root`. Spacing is unknown in this layout."""

    source: str = "real"
    name: str = "png_folder"

    def index(self) -> Index:
        """Patients in the order of their names. Raises UserError when the layout is another, or a file is bad."""
        return _index(Path(self.root), self.on_bad_frame)

    def frame(self, files: FrameFiles, patient: Patient) -> Frame:
        """One frame. Raises BadPicture."""
        return replace(read_frame(files, patient, self.image_size), source=self.source)

    def facts(self, patient: Patient) -> dict[str, Any]:
        """Nothing: the layout carries no records."""
        return {}


def parse_name(name: str) -> tuple[str, str, str]:
    """(patient, view, phase) of a file name. Raises BadPicture unless the whole name fits, with one patient in it."""
    match = NAME.fullmatch(name)
    if match is None or len(re.findall(r"(?:^|_)patient\d", name)) != 1:
        raise BadPicture(name, "the name is not [prefix_]patientNNNN_{2CH,4CH}_{ED,ES}[_suffix].png")
    return match["patient"], match["view"], match["phase"]


def read_frame(files: FrameFiles, patient: Patient, image_size: int) -> Frame:
    """One frame. Raises BadPicture: unreadable file, unequal sizes, unknown labels, no sector."""
    grey = as_grey(_read_png(files.image, palette_is_grey=True), files.image)
    file = files.sector or files.annotation
    labels = as_labels(_read_png(file), file, len(STRUCTURES) if files.sector else NUM_CAMUS_LABELS)
    if grey.shape != labels.shape:
        sizes = f"{list(labels.shape)}, its picture {list(grey.shape)}"
        raise BadPicture(file, f"sizes differ: the ground truth is {sizes} (rows, columns)")
    if not files.sector:
        labels = from_camus(labels, sector_mask(grey, files.image))
    elif not labels.any():
        raise BadPicture(file, "every pixel is outside the sector")
    return make_frame(files, patient, grey, labels, None, image_size)


def _read_png(file: str, palette_is_grey: bool = False) -> np.ndarray:
    """[H, W] of an 8-bit grey or palette PNG, or of an RGB one whose channels are equal. Raises BadPicture.

    A palette's indices are taken as they are, as labels need; with `palette_is_grey` its colours are.
    """
    from PIL import Image

    check_readable(file)
    try:
        raw = Path(file).read_bytes()
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            picture = image.convert("RGB") if palette_is_grey and image.mode == "P" else image
            mode, values = picture.mode, np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0].replace(" <_io.BytesIO", "").partition(" object at ")[0]
        raise BadPicture(file, f"cannot be read as PNG, it may be cut off ({reason})") from None
    if b"IEND\xaeB`\x82" not in raw[-64:]:
        raise BadPicture(file, "cannot be read as PNG, its end is cut off")
    depth = raw[BIT_DEPTH]
    if depth > 8 or (depth < 8 and mode == "L" and not palette_is_grey):  # Pillow scales both: labels would change
        raise BadPicture(file, f"is not an 8-bit grey PNG ({depth} bits a sample)")
    if mode in ("L", "P"):
        return values
    if (
        mode in ("RGB", "RGBA")
        and (values[..., 0] == values[..., 1]).all()
        and (values[..., 0] == values[..., 2]).all()
    ):
        return values[..., 0]
    raise BadPicture(file, f"is not an 8-bit grey PNG (mode {mode})")


def _index(root: Path, policy: str) -> Index:
    problems, digest = Problems(policy), Digest()
    folders = {split: name for split, name in FOLDERS.items() if is_folder(root / "images" / name)}
    if "train" not in folders:
        raise UserError(
            f"data.root: {root} has no images/training/; give the folder that holds images/ and annotations/"
        )
    files: dict[str, dict[str, list[FrameFiles]]] = {}
    notes = [f"there is no images/{FOLDERS[s]}/, so there is no {s} split" for s in FOLDERS if s not in folders]
    for split, name in folders.items():
        files[split] = _index_split(root, name, problems, digest, notes)
    origin = {split: str(root / "images" / name) for split, name in folders.items()}
    split_of = split_once({split: sorted(found) for split, found in files.items()}, origin, problems)
    patients = [Patient(p, split_of[p], tuple(files[split_of[p]][p])) for p in sorted(split_of)]
    return Index(patients, problems.skipped, digest.hexdigest(), notes)


def _index_split(
    root: Path, name: str, problems: Problems, digest: Digest, notes: list[str]
) -> dict[str, list[FrameFiles]]:
    """patient → frames of one split folder, pictures without labels left to `problems`, labels without to `notes`."""
    kinds = ("images", "annotations", "sector_annotations")
    present = {kind: _names(root / kind / name) if is_folder(root / kind / name) else {} for kind in kinds}
    for kind in kinds:
        for file, stat in present[kind].items():
            digest.add(f"{kind}/{name}/{file}", stat)
    alone = [n for n in present["annotations"] if not {n, n.replace("_gt.png", ".png")} & set(present["images"])]
    if alone:
        shown = ", ".join(alone[:5]) + ("…" if len(alone) > 5 else "")
        notes.append(f"{len(alone)} label maps in annotations/{name}/ have no picture: {shown}")
    found: dict[str, list[FrameFiles]] = {}
    for file in (f for f in present["images"] if f.lower().endswith(".png")):
        path = root / "images" / name / file
        try:
            patient, view, phase = parse_name(file)
        except BadPicture as bad:
            problems.add(path, bad.reason)
            continue
        stem = file.removesuffix(".png")
        labels = {
            kind: next((str(root / kind / name / n) for n in (file, f"{stem}_gt.png") if n in present[kind]), "")
            for kind in kinds[1:]
        }
        if not any(labels.values()):
            problems.add(path, f"the ground truth is missing: no {file} or {stem}_gt.png in annotations/{name}/")
            continue
        frame = FrameFiles(stem, view, phase, str(path), labels["annotations"], labels["sector_annotations"])
        found.setdefault(patient, []).append(frame)
    return found


def _names(folder: Path) -> dict[str, Any]:
    try:
        return {name: stat for name, stat in folder_names(folder).items() if not name.startswith(".")}
    except BadPicture as bad:
        raise UserError(f"{bad.file}: {bad.reason}") from None
