"""Memorisation: is a synthetic frame nearer to a training frame than frames of unseen patients are?

Nearest training frames are sought in an extractor's features (cosine) and in the pixels (correlation at the best of small
shifts). Held-out real frames set the baseline. A synthetic frame shares its warped mask with a training frame, which raises
its correlation without any copying: a copy is what stands out in pixels and in features, or what is all but equal in
pixels, however little noise or blur moves its features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raysyn.types import FrameArrays, UserError

MIN_FRAMES = 8
THUMBNAIL = 64  # px: fine enough for speckle at the demo's size, coarse enough for thousands of frames
BLOCK = 1024  # frames at a time
NUM_CANDIDATES = 4  # by what no shift moves; the nearest without a shift and by features are tried beside them
EQUAL_SHARE = 0.25  # of the baseline's distance from 1: nearer than that is a copy, whatever its features
SHIFT_SHARE = 16  # of a side: shifts up to 4 px of 64 are tried


@dataclass(frozen=True)
class Nearest:
    """Of N frames the most similar of M others: its number int64 [N] and the similarity float64 [N] in [-1, 1]."""

    index: np.ndarray
    similarity: np.ndarray


def nearest_by_cosine(rows: np.ndarray, others: np.ndarray, block: int = BLOCK) -> Nearest:
    """The row of `others` [M, D] with the highest cosine to each of `rows` [N, D]."""
    a, b = (_unit(x.astype(np.float32)) for x in (rows, others))
    index, similarity = [], []
    for start in range(0, len(a), block):
        table = a[start : start + block] @ b.T
        index.append(table.argmax(1))
        similarity.append(table.max(1))
    return Nearest(np.concatenate(index), np.concatenate(similarity).astype(np.float64))


def nearest_by_pixels(frames: FrameArrays, others: FrameArrays) -> Nearest:
    """The frame of `others` with the highest Pearson correlation of grey levels, at most 64 px a side."""
    return nearest_by_cosine(_centred(frames.image_u8), _centred(others.image_u8))


def nearest_by_shifted_pixels(frames: FrameArrays, others: FrameArrays, *candidates: np.ndarray) -> Nearest:
    """Like `nearest_by_pixels`, at the best of all shifts up to a sixteenth of a side, over what both frames show.

    Tried are the frames nearest in their spectra's magnitudes (which no shift moves), the one nearest without a shift, and
    `candidates`, a number int64 [N] each.
    """
    theirs = _thumbnails(others.image_u8)
    known = _unit(_moveless(theirs))
    plain = nearest_by_pixels(frames, others).index
    index, similarity = [], []
    for start in range(0, len(frames), BLOCK):
        part = slice(start, start + BLOCK)
        ours = _thumbnails(frames.image_u8[part])
        rough = _unit(_moveless(ours)) @ known.T
        tried = np.argsort(-rough, axis=1, kind="stable")[:, :NUM_CANDIDATES]
        tried = np.column_stack([tried, plain[part], *(c[part] for c in candidates)])
        found = np.stack([_best_shift(ours, theirs[number]) for number in tried.T], axis=1)
        best = found.argmax(1)[:, None]
        index.append(np.take_along_axis(tried, best, 1)[:, 0])
        similarity.append(np.take_along_axis(found, best, 1)[:, 0])
    return Nearest(np.concatenate(index), np.concatenate(similarity))


def _best_shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Highest Pearson correlation float64 [N] of the inside of a [N, H, W] with b [N, H, W] under it, over small shifts.

    All shifts at once: the inside with its mean taken off, zeros around it, correlated by Fourier transforms; the means
    and norms of what lies under it by sums over boxes.
    """
    height, width = a.shape[1:]
    s = max(1, min(height, width) // SHIFT_SHARE)
    inside = np.zeros(a.shape)
    core = a[:, s : height - s, s : width - s].astype(np.float64)
    inside[:, s : height - s, s : width - s] = core - core.mean((1, 2), keepdims=True)
    b = b - b.mean((1, 2), keepdims=True, dtype=np.float64)
    product = np.fft.irfft2(np.conj(np.fft.rfft2(inside)) * np.fft.rfft2(b), s=(height, width))
    shifts = np.arange(-s, s + 1)
    product = product[:, shifts][:, :, shifts]
    count = core.shape[1] * core.shape[2]
    spread = _box_sums(b * b, core.shape[1:]) - _box_sums(b, core.shape[1:]) ** 2 / count
    norm = np.sqrt((inside**2).sum((1, 2))[:, None, None] * spread.clip(min=0))
    return np.divide(product, norm, out=np.zeros_like(product), where=norm > 1e-6 * count).max((1, 2))


def _box_sums(x: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Sums over every box of `size` in x [N, H, W]."""
    total = np.pad(x, ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
    h, w = size
    return total[:, h:, w:] - total[:, :-h, w:] - total[:, h:, :-w] + total[:, :-h, :-w]


def _moveless(thumbnails: np.ndarray) -> np.ndarray:
    """What a shift leaves as it is, float32 [N, P]: roots of the spectrum's magnitudes, whose mean over P is taken off."""
    size = np.abs(np.fft.rfft2(thumbnails - thumbnails.mean((1, 2), keepdims=True))) ** 0.5
    flat = size.reshape(len(size), -1).astype(np.float32)
    return flat - flat.mean(1, keepdims=True)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _centred(image_u8: np.ndarray) -> np.ndarray:
    """Thumbnails as rows float32 [N, P], each with its mean taken off."""
    flat = _thumbnails(image_u8).reshape(len(image_u8), -1)
    return flat - flat.mean(1, keepdims=True)


def _thumbnails(image_u8: np.ndarray) -> np.ndarray:
    """By area mean, float32 [N, h, w]."""
    n, height, width = image_u8.shape
    factor = max(1, min(height, width) // THUMBNAIL)
    cut = image_u8[:, : height // factor * factor, : width // factor * factor]
    return cut.reshape(n, height // factor, factor, width // factor, factor).mean((2, 4), dtype=np.float32)


def memorisation(
    synthetic: FrameArrays,
    train: FrameArrays,
    test: FrameArrays,
    features: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    num_pairs: int = 16,
    quantile: float = 0.99,
) -> dict[str, Any]:
    """How near synthetic frames come to `train`, against how near `test` frames of unseen patients come.

    `features` are those of the three sets, [n, D] each. `copy_rate`: share of synthetic frames above the baseline's
    99 % quantile in pixels and in features at once (about 0.01 or less without copying), or all but equal in pixels
    (`equal_rate`): less than a quarter as far from a correlation of 1 as that quantile is. Pixel correlations are at the best
    of small shifts. `nearest_pixel_correlation` and `nearest_cosine` are means, `_baseline` the test frames' own.
    `worst_pairs`: the `num_pairs` synthetic frames of highest pixel correlation with the training frame each is like.
    Raises UserError below 8 frames in a set.
    """
    for name, some in (("synthetic frames", synthetic), ("training frames", train), ("test frames", test)):
        if len(some) < MIN_FRAMES:
            raise UserError(f"{name}: {len(some)} are too few for a measure of memorisation, which needs {MIN_FRAMES}")
    of_synthetic, of_train, of_test = features
    cosine, cosine_base = nearest_by_cosine(of_synthetic, of_train), nearest_by_cosine(of_test, of_train)
    pixels = nearest_by_shifted_pixels(synthetic, train, cosine.index)
    pixels_base = nearest_by_shifted_pixels(test, train, cosine_base.index)
    threshold = float(np.quantile(pixels_base.similarity, quantile))
    above_pixels = pixels.similarity > threshold
    equal = 1 - pixels.similarity < EQUAL_SHARE * (1 - threshold)
    above_cosine = cosine.similarity > np.quantile(cosine_base.similarity, quantile)
    worst = np.argsort(-pixels.similarity, kind="stable")[:num_pairs]
    return {
        "copy_rate": float((equal | (above_pixels & above_cosine)).mean()),
        "equal_rate": float(equal.mean()),
        "above_pixel_baseline": float(above_pixels.mean()),
        "above_cosine_baseline": float(above_cosine.mean()),
        "nearest_pixel_correlation": float(pixels.similarity.mean()),
        "nearest_pixel_correlation_baseline": float(pixels_base.similarity.mean()),
        "nearest_cosine": float(cosine.similarity.mean()),
        "nearest_cosine_baseline": float(cosine_base.similarity.mean()),
        "worst_pairs": [
            {
                "synthetic": synthetic.frame_id[i],
                "nearest": train.frame_id[pixels.index[i]],
                "pixel_correlation": float(pixels.similarity[i]),
                "cosine": float(cosine.similarity[i]),
                "same_mask": synthetic.mask_frame_id[i] == train.frame_id[pixels.index[i]],
            }
            for i in worst
        ],
    }
