"""The vocabulary: what a frame is, what a stage returns, and how bad input is told from a fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VIEWS = ("2CH", "4CH")
PHASES = ("ED", "ES")
SPLITS = ("train", "validation", "test")
SOURCES = ("real", "phantom", "synthetic")


class UserError(ValueError):
    """Bad input: one clear line that names the file or key and what to do. A job ends with exit code 2."""


class Fault(RuntimeError):
    """What went wrong in the work itself, told whole by its message: a job prints that line and ends with exit code 1."""


class Resumable(RuntimeError):
    """Work stopped early on request (SIGTERM, Ctrl-C) in a state from which the same command goes on."""


@dataclass(frozen=True)
class Provenance:
    """Where a synthetic frame came from; every field is a column of the frame schema."""

    model: str
    checkpoint_sha256: str
    mask_frame_id: str
    warp_seed: int
    noise_seed: int
    solver: str
    num_steps: int
    num_function_evals: int
    faithfulness: float | None = None
    gpu_seconds: float | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class Frame:
    """One echocardiogram frame: real, phantom and synthetic alike.

    `image` and `label_map` are uint8 [H, W]; `label_map` holds the values of `raysyn.labels.STRUCTURES`.
    `spacing_mm` is (row, column) at the stored size, None when unknown.
    """

    frame_id: str
    image: np.ndarray
    label_map: np.ndarray
    view: str
    phase: str
    patient_id: str
    split: str
    source: str
    spacing_mm: tuple[float, float] | None = None
    provenance: Provenance | None = None


@dataclass
class FrameArrays:
    """Many frames of one size as arrays: what training and metrics read.

    image_u8 [N, H, W] uint8; label_map [N, H, W] uint8; view [N] uint8, an index into `VIEWS`; phase [N] uint8,
    an index into `PHASES`; spacing_mm [N, 2] float32, NaN where unknown; frame_id, patient_id and mask_frame_id
    are lists of N strings (mask_frame_id is "" for frames that are not synthetic).
    """

    image_u8: np.ndarray
    label_map: np.ndarray
    view: np.ndarray
    phase: np.ndarray
    spacing_mm: np.ndarray
    frame_id: list[str]
    patient_id: list[str]
    mask_frame_id: list[str]
    source: list[str]

    def __len__(self) -> int:
        return len(self.frame_id)

    def take(self, index: Sequence[int] | np.ndarray) -> FrameArrays:
        """The frames at `index`, in that order."""
        index = np.asarray(index, dtype=np.int64)
        arrays: dict[str, Any] = {key: getattr(self, key)[index] for key in _ARRAYS}
        lists: dict[str, Any] = {key: [getattr(self, key)[i] for i in index] for key in _LISTS}
        return FrameArrays(**arrays, **lists)

    @staticmethod
    def concatenate(parts: Sequence[FrameArrays]) -> FrameArrays:
        """All parts one after another. Raises UserError when image sizes differ."""
        sizes = sorted({p.image_u8.shape[1:] for p in parts})
        if len(sizes) > 1:
            raise UserError(f"frame sets of different image sizes cannot be mixed: {sizes}; prepare them at one size")
        arrays: dict[str, Any] = {key: np.concatenate([getattr(p, key) for p in parts]) for key in _ARRAYS}
        lists: dict[str, Any] = {key: [v for p in parts for v in getattr(p, key)] for key in _LISTS}
        return FrameArrays(**arrays, **lists)


_ARRAYS = ("image_u8", "label_map", "view", "phase", "spacing_mm")
_LISTS = ("frame_id", "patient_id", "mask_frame_id", "source")


@dataclass(frozen=True)
class Outcome:
    """What a stage returns: where its output lies, its fingerprint, its manifest, and whether it was there already."""

    stage: str
    path: str
    fingerprint: str
    manifest: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False
