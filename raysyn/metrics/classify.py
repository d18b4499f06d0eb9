"""Measures of a two-class score."""

from __future__ import annotations

import numpy as np
from scipy import stats

from raysyn.types import UserError


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve from scores [N] (not from their argmax): P(score of a positive > of a negative), ties ½."""
    truth = np.asarray(truth, dtype=bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if positives == 0 or negatives == 0:
        raise UserError("test frames: all are of one view; AUROC needs at least 1 frame of each")
    ranks = stats.rankdata(scores)
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(scores: np.ndarray, truth: np.ndarray, num_bins: int = 10) -> float:
    """Expected calibration error: mean over bins of confidence of |accuracy − confidence|, weighted by their share.

    Biased upwards where bins hold few frames, and more so in a bootstrap: even of honest scores its interval leaves 0 out.
    """
    predicted = scores > 0.5
    confidence = np.where(predicted, scores, 1 - scores)
    right = predicted == np.asarray(truth, dtype=bool)
    bins = np.clip(((confidence - 0.5) * 2 * num_bins).astype(int), 0, num_bins - 1)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(np.sum(gaps))
