"""Memorisation: is a synthetic frame nearer to a training frame than frames of unseen patients are?

Nearest training frames are sought in an extractor's features (cosine) and in the pixels (correlation). Held-out real frames
set the baseline. A synthetic frame shares its warped mask with a training frame, which raises its correlation without
any copying: a copy is what stands out in pixels and in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raysyn.types import FrameArrays, UserError

MIN_FRAMES = 8
THUMBNAIL = 64  # px: fine enough for speckle at the demo's size, coarse enough for thousands of frames


@dataclass(frozen=True)
class Nearest:
    """Of N frames the most similar of M others: its number int64 [N] and the similarity float64 [N] in [-1, 1]."""

    index: np.ndarray
    similarity: np.ndarray


def nearest_by_cosine(rows: np.ndarray, others: np.ndarray, block: int = 1024) -> Nearest:
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


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _centred(image_u8: np.ndarray) -> np.ndarray:
    """Thumbnails by area mean, float32 [N, P], each with its mean taken off."""
    n, height, width = image_u8.shape
    factor = max(1, min(height, width) // THUMBNAIL)
    cut = image_u8[:, : height // factor * factor, : width // factor * factor]
    small = cut.reshape(n, height // factor, factor, width // factor, factor).mean((2, 4), dtype=np.float32)
    flat = small.reshape(n, -1)
    return flat - flat.mean(1, keepdims=True)


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
    99 % quantile in pixels and in features at once (about 0.01 or less without copying). `nearest_pixel_correlation`
    and `nearest_cosine` are means, `_baseline` the test frames' own. `worst_pairs`: the `num_pairs` synthetic frames of
    highest pixel correlation with the training frame each is like. Raises UserError below 8 frames in a set.
    """
    for name, some in (("synthetic frames", synthetic), ("training frames", train), ("test frames", test)):
        if len(some) < MIN_FRAMES:
            raise UserError(f"{name}: {len(some)} are too few for a measure of memorisation, which needs {MIN_FRAMES}")
    of_synthetic, of_train, of_test = features
    pixels, pixels_base = nearest_by_pixels(synthetic, train), nearest_by_pixels(test, train)
    cosine, cosine_base = nearest_by_cosine(of_synthetic, of_train), nearest_by_cosine(of_test, of_train)
    above_pixels = pixels.similarity > np.quantile(pixels_base.similarity, quantile)
    above_cosine = cosine.similarity > np.quantile(cosine_base.similarity, quantile)
    worst = np.argsort(-pixels.similarity, kind="stable")[:num_pairs]
    return {
        "copy_rate": float((above_pixels & above_cosine).mean()),
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
