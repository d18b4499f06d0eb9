"""Overlap and distance between label maps, by region (LV endo {1}, LV epi {1,2}, LA {3} of the task's classes)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from raysyn.labels import TASK_REGIONS


def dice(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """2|A∩B| / (|A|+|B|) of boolean masks [N, H, W], float64 [N]; NaN where both are empty, 0 where one is."""
    both = (predicted & truth).reshape(len(truth), -1).sum(1)
    total = predicted.reshape(len(truth), -1).sum(1) + truth.reshape(len(truth), -1).sum(1)
    return np.divide(2.0 * both, total, out=np.full(len(truth), np.nan), where=total > 0)


def dice_by_region(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Dice of each region [N] for task classes uint8 [N, H, W]."""
    return {name: dice(np.isin(predicted, classes), np.isin(truth, classes)) for name, classes in TASK_REGIONS.items()}


def mean_of_means(by_region: dict[str, np.ndarray], index: np.ndarray | None = None) -> float:
    """Mean over regions of each one's mean over frames, or over those of `index`; NaN, absent from both maps, is left out."""
    chosen = [values if index is None else values[index] for values in by_region.values()]
    means = [float(np.nanmean(values)) for values in chosen if np.isfinite(values).any()]
    return float(np.mean(means)) if means else float("nan")


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def hausdorff(
    predicted: np.ndarray, truth: np.ndarray, region: str, spacing: np.ndarray, percentile: float = 95.0
) -> tuple[np.ndarray, np.ndarray]:
    """(Hausdorff distance, its 95th percentile) of a region's outlines, each float64 [N], in the unit of spacing [N, 2].

    NaN where the region is absent from both maps; where it is absent from one only, the image's diagonal: as wrong as
    can be, and finite.
    """
    classes = TASK_REGIONS[region]
    full, most = np.full(len(truth), np.nan), np.full(len(truth), np.nan)
    for i in range(len(truth)):
        a, b = np.isin(predicted[i], classes), np.isin(truth[i], classes)
        if not a.any() and not b.any():
            continue
        if not a.any() or not b.any():
            full[i] = most[i] = float(np.linalg.norm(np.array(a.shape) * spacing[i]))
            continue
        edge_a, edge_b = _surface(a), _surface(b)
        to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing[i])[edge_a]
        to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing[i])[edge_b]
        full[i] = max(to_a.max(), to_b.max())
        most[i] = max(np.percentile(to_a, percentile), np.percentile(to_b, percentile))
    return full, most
