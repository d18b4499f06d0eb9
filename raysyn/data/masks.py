"""A frame set's label maps, and warped ones: new anatomies to condition the generators on (REFERENCE §3, mask warping)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysyn.config import WarpConfig
from raysyn.data.frames import decode_png, frame_files, open_shard, read_light
from raysyn.labels import LEFT_ATRIUM, LV_CAVITY, MYOCARDIUM, OUTSIDE, TISSUE, check_label_map
from raysyn.types import VIEWS, UserError

REFERENCE_SIZE = 256  # `elastic_px` counts pixels of a picture of this size
NUM_MODES = 3  # the elastic field's shortest wave is two thirds of the picture
MIN_STRETCH = 0.3  # the elastic field shrinks no direction by more than this factor: nothing folds
_IS_STRUCTURE = np.isin(np.arange(5), (LV_CAVITY, MYOCARDIUM, LEFT_ATRIUM))


@dataclass(frozen=True)
class MaskFrames:
    """The masks of a split, still as PNGs, with what a synthetic frame inherits: a few KB a mask, no images."""

    png: list[bytes]
    view: np.ndarray
    phase: list[str]
    patient_id: list[str]
    spacing_mm: list[tuple[float, float] | None]

    @staticmethod
    def read(uri: str, split: str) -> MaskFrames:
        """The masks of a split of a frame set, in its order. Raises UserError when there are none."""
        files = frame_files(uri, split)
        light = pa.concat_tables([read_light(storage, name) for storage, name in files])
        png: list[bytes] = []
        for storage, name in files:
            with open_shard(storage, name) as file:
                for group in range(file.num_row_groups):
                    png += [row["bytes"] for row in file.read_row_group(group, ["label_map"])["label_map"].to_pylist()]
        view = np.array([VIEWS.index(v) for v in light["view"].to_pylist()], dtype=np.uint8)
        spacing = [None if v is None else (float(v[0]), float(v[1])) for v in light["spacing_mm"].to_pylist()]
        return MaskFrames(png, view, light["phase"].to_pylist(), light["patient_id"].to_pylist(), spacing)

    def label_map(self, index: int) -> np.ndarray:
        """Label map `index`, uint8 [H, W]."""
        return decode_png(self.png[index], f"label map {index}")


def warp_label_map(label_map: np.ndarray, warp: WarpConfig, seed: int) -> np.ndarray:
    """Move the heart in `label_map` (uint8 [H, W], values 0 to 4) by a random affine and elastic warp; same shape out.

    Rotation, shear (both axes) and translation (of the picture's size) are uniform within their bounds on either side,
    scale is uniform in its range, all about the picture's centre; the elastic displacement is smooth with a peak drawn
    uniformly up to `elastic_px` (at 256 px). Labels are looked up at the nearest pixel. The sector stays where it is:
    structures that leave it are dropped, and what they leave behind becomes tissue. Deterministic by `seed`.
    Raises UserError for a map that is not one, and for a negative seed.
    """
    check_label_map(label_map)
    if seed < 0:
        raise UserError(f"warp seed {seed} is negative; seeds count from 0")
    rng = np.random.Generator(np.random.PCG64(seed))
    height, width = label_map.shape
    inverse, shift = _affine(rng, warp, (height, width))
    elastic = _elastic(rng, warp.elastic_px * max(height, width) / REFERENCE_SIZE, (height, width))
    row = (np.arange(height) - 0.5 * (height - 1) - shift[0])[:, None]
    column = (np.arange(width) - 0.5 * (width - 1) - shift[1])[None]
    source_row = inverse[0, 0] * row + inverse[0, 1] * column + elastic[0] + 0.5 * (height - 1)
    source_column = inverse[1, 0] * row + inverse[1, 1] * column + elastic[1] + 0.5 * (width - 1)
    i = np.floor(source_row + 0.5).astype(np.int32)
    j = np.floor(source_column + 0.5).astype(np.int32)
    known = (i >= 0) & (i < height) & (j >= 0) & (j < width)
    moved = label_map[np.clip(i, 0, height - 1), np.clip(j, 0, width - 1)]
    moved = np.where(known & _IS_STRUCTURE[moved], moved, TISSUE)
    return np.where(label_map == OUTSIDE, OUTSIDE, moved).astype(np.uint8)


def _affine(rng: np.random.Generator, warp: WarpConfig, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Inverse matrix [2, 2] (target to source, in rows and columns) and translation [2] in pixels."""
    turn = np.deg2rad(rng.uniform(-warp.rotation_deg, warp.rotation_deg))
    shear = np.tan(np.deg2rad(rng.uniform(-warp.shear_deg, warp.shear_deg, 2)))
    scale = rng.uniform(warp.scale_min, warp.scale_max)
    shift = rng.uniform(-warp.translation, warp.translation, 2) * shape
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    forward = scale * rotation @ np.array([[1.0, shear[0]], [shear[1], 1.0]])
    return np.linalg.inv(forward), shift


def _elastic(rng: np.random.Generator, peak_px: float, shape: tuple[int, int]) -> np.ndarray:
    """A smooth displacement [2, H, W] in pixels: low cosine waves, scaled to its peak and then until nothing folds."""
    wave = np.arange(NUM_MODES)
    weights = rng.standard_normal((2, NUM_MODES, NUM_MODES)) / (1 + wave[:, None] ** 2 + wave[None] ** 2)
    weights[:, 0, 0] = 0.0  # a constant is a translation, which has its own bound
    peak = rng.uniform(0, peak_px)
    if peak == 0:
        return np.zeros((2, *shape))
    down, across = (np.cos(np.pi * (np.arange(n)[:, None] + 0.5) / n * wave) for n in shape)
    field = down @ weights @ across.T
    field *= peak / np.sqrt((field**2).sum(0).max())
    return field * _unfolding(field)


def _unfolding(field: np.ndarray) -> float:
    """The largest factor <= 1 with which identity + field shrinks no direction below MIN_STRETCH of its length.

    The symmetric part of its Jacobian then stays positive definite, and on a rectangle that makes the map one to one.
    """
    step = max(1, min(field.shape[1:]) // 32)
    coarse = field[:, ::step, ::step]
    if min(coarse.shape[1:]) < 2:
        return 1.0
    (rr, rc), (cr, cc) = ([g / step for g in np.gradient(part)] for part in coarse)
    smallest = 0.5 * (rr + cc) - np.hypot(0.5 * (rr - cc), 0.5 * (rc + cr))
    return float(min(1.0, (1 - MIN_STRETCH) / max(-smallest.min(), 1e-9)))
