from __future__ import annotations

import numpy as np
import pytest

from raysyn.metrics.bootstrap import patient_interval
from raysyn.metrics.paired import paired_difference


def frames(*scores: float | None, name: str = "la_dice", per_patient: int = 2) -> dict:
    ids = [f"f{i}" for i in range(len(scores))]
    return {"frame_id": ids, "patient_id": [f"p{i // per_patient}" for i in range(len(scores))], name: list(scores)}


def test_what_patients_share_is_not_in_the_interval() -> None:
    """Scores that differ much from patient to patient, a set that is 0.01 better for each: the difference is sure."""
    rng = np.random.default_rng(0)
    other = np.repeat(rng.uniform(0.3, 0.9, 30), 2)
    own = other + 0.01 + rng.normal(0, 0.001, 60)
    value, low, high = paired_difference([frames(*own)], [frames(*other)])
    assert value == pytest.approx((own - other).mean())
    assert 0.009 < low < value < high < 0.011
    alone = patient_interval(own, frames(*own)["patient_id"])
    assert alone[1] - alone[0] > 0.05
    back = paired_difference([frames(*other)], [frames(*own)])
    assert back == pytest.approx((-value, -high, -low))
    assert paired_difference([frames(*own)], [frames(*own)]) == pytest.approx((0, np.nan, np.nan), nan_ok=True)


def test_the_interval_is_that_of_the_differences_mean() -> None:
    rng = np.random.default_rng(1)
    own, other = rng.uniform(size=40), rng.uniform(size=40)
    _, low, high = paired_difference([frames(*own)], [frames(*other)])
    assert (low, high) == pytest.approx(patient_interval(own - other, frames(*own)["patient_id"]), abs=0.03)


def test_regions_absent_from_a_frame_and_several_trainings() -> None:
    own = frames(0.5, None, 0.7, 0.9) | {"lv_endo_dice": [1.0, 0.0, None, None]}
    again = frames(0.5, None, 0.7, 0.9) | {"lv_endo_dice": [1.0, 1.0, None, None]}
    other = frames(0.5, 0.5, 0.5, 0.5) | {"lv_endo_dice": [0.5, 0.5, None, None]}
    value, _, _ = paired_difference([own, again], [other])
    assert value == pytest.approx(((0.7 + 0.5) / 2 + (0.7 + 1.0) / 2) / 2 - 0.5)


def test_other_frames_are_refused_and_one_patient_has_no_interval() -> None:
    with pytest.raises(ValueError, match="same frames"):
        paired_difference([frames(0.5, 0.6)], [frames(0.5, 0.6) | {"frame_id": ["f0", "g1"]}])
    value, low, high = paired_difference([frames(0.5, 0.6)], [frames(0.5, 0.5)])
    assert value == pytest.approx(0.05)
    assert np.isnan([low, high]).all()
