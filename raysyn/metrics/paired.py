"""What one training set is worth against another, told by the same test patients: harder and easier ones cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raysyn.metrics.bootstrap import patient_interval_of
from raysyn.metrics.overlap import mean_of_means
from raysyn.types import FrameArrays

ByFrame = Mapping[str, Sequence[Any]]  # frame_id, patient_id, then a score of each frame under its name, None for NaN


def by_frame(frames: FrameArrays, scores: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Scores [N] of N frames beside the frames' ids and patients, as a task's manifest keeps them."""
    known = {name: values.astype(np.float64).tolist() for name, values in scores.items()}
    return {"frame_id": list(frames.frame_id), "patient_id": list(frames.patient_id), **known}


def paired_difference(ours: Sequence[ByFrame], theirs: Sequence[ByFrame]) -> tuple[float, float, float]:
    """(difference, low, high): the score of `ours` less that of `theirs`, its 95 % interval over patients.

    One entry a training of each; a score is the mean over its parts (regions) of each part's mean over frames, and over
    trainings. Every bootstrap draw takes the same patients for both sides. Another training is not in the interval.
    Both ends are NaN where nothing varies from patient to patient: resampling would give an interval of no width.
    Raises ValueError where the test frames are not the same.
    """
    first = ours[0]
    if any(list(one["frame_id"]) != list(first["frame_id"]) for one in (*ours, *theirs)):
        raise ValueError("a paired difference needs both sides tested on the same frames in the same order")
    sides = [[_scores(one) for one in side] for side in (ours, theirs)]

    def difference(index: np.ndarray) -> float:
        own, other = (float(np.mean([mean_of_means(s, index) for s in side])) for side in sides)
        return own - other

    low, high = patient_interval_of(difference, first["patient_id"], num_draws=2000)
    low, high = (low, high) if low < high else (float("nan"), float("nan"))
    return difference(np.arange(len(first["frame_id"]))), low, high


def _scores(by_frame: ByFrame) -> dict[str, np.ndarray]:
    names = [k for k in by_frame if k not in ("frame_id", "patient_id")]
    return {name: np.array(by_frame[name], dtype=np.float64) for name in names}
