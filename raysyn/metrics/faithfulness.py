"""Faithfulness: does an image show the map that it was drawn from? Read by a segmenter trained on real frames.

Alone it misleads: over-smoothed images read well. Look at the texture measures beside it.
"""

from __future__ import annotations

import numpy as np

from raysyn.labels import to_task_classes
from raysyn.metrics.overlap import dice_by_region


def mean_region_dice(predicted: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Mean Dice over the regions, float64 [N], of task classes read (uint8 [N, H, W]) and structures asked for.

    Regions absent from both are left out; an image where all are scores 0 (nothing was asked and nothing shown).
    """
    per_region = np.stack(list(dice_by_region(predicted, to_task_classes(label_map)).values()))
    known = np.isfinite(per_region)
    return np.where(known, per_region, 0).sum(0) / known.sum(0).clip(1)
