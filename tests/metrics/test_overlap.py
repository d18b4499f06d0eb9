"""Overlap, distances, bootstrap and classification measures against shapes and samples with known answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

from raysyn.metrics.bootstrap import patient_interval, patient_interval_of, subset_protocol, with_spread
from raysyn.metrics.classify import auroc, calibration_error
from raysyn.metrics.faithfulness import mean_region_dice
from raysyn.metrics.overlap import dice, dice_by_region, hausdorff
from raysyn.types import UserError


def box(top: int, left: int, height: int, width: int, size: int = 32) -> np.ndarray:
    mask = np.zeros((1, size, size), bool)
    mask[0, top : top + height, left : left + width] = True
    return mask


def test_dice_of_known_boxes() -> None:
    assert dice(box(0, 0, 4, 4), box(0, 2, 4, 4)) == pytest.approx([0.5])
    assert dice(box(0, 0, 4, 4), box(0, 0, 4, 4)) == pytest.approx([1.0])
    assert dice(box(0, 0, 4, 4), box(9, 9, 4, 4)) == pytest.approx([0.0])
    assert dice(box(0, 0, 0, 0), box(9, 9, 4, 4)) == pytest.approx([0.0])
    assert math.isnan(dice(box(0, 0, 0, 0), box(0, 0, 0, 0))[0])


@given(hnp.arrays(bool, (2, 6, 6)), hnp.arrays(bool, (2, 6, 6)))
def test_dice_is_symmetric_and_within_its_range(a: np.ndarray, b: np.ndarray) -> None:
    forward, back = dice(a, b), dice(b, a)
    assert np.array_equal(forward, back, equal_nan=True)
    assert ((forward >= 0) & (forward <= 1) | np.isnan(forward)).all()


def test_regions_of_the_task() -> None:
    truth = np.zeros((1, 8, 8), np.uint8)
    truth[0, 2:6, 2:6], truth[0, 3:5, 3:5] = 2, 1
    found = dice_by_region(np.where(truth == 2, 0, truth).astype(np.uint8), truth)
    assert found["lv_endo"] == pytest.approx([1.0])
    assert found["lv_epi"] == pytest.approx([2 * 4 / (4 + 16)])  # LV epi is cavity and wall together
    assert math.isnan(found["la"][0])


def test_hausdorff_of_shifted_boxes_in_millimetres() -> None:
    a, b = box(4, 4, 8, 8).astype(np.uint8), box(4, 7, 8, 8).astype(np.uint8)
    full, most = hausdorff(a, b, "lv_endo", np.array([[0.5, 2.0]]))
    assert full == pytest.approx([6.0])
    assert 0 < most[0] <= full[0]
    same, _ = hausdorff(a, a, "lv_endo", np.ones((1, 2)))
    assert same == pytest.approx([0.0])


def test_hausdorff_of_empty_maps_is_defined() -> None:
    a, empty = box(4, 4, 8, 8).astype(np.uint8), np.zeros((1, 32, 32), np.uint8)
    full, most = hausdorff(empty, a, "lv_endo", np.ones((1, 2)))
    assert full == pytest.approx([32 * math.sqrt(2)])
    assert most == pytest.approx(full)
    assert math.isnan(hausdorff(empty, empty, "lv_endo", np.ones((1, 2)))[0][0])


def test_faithfulness_of_a_perfect_and_an_empty_reading() -> None:
    label_map = np.full((2, 8, 8), 2, np.uint8)
    label_map[:, 2:4], label_map[:, 4:6] = 1, 3
    right = np.array([0, 1, 0, 2, 3], np.uint8)[label_map]
    assert mean_region_dice(right, label_map) == pytest.approx([1, 1])
    assert mean_region_dice(np.zeros_like(right), label_map) == pytest.approx([0, 0])


def test_the_bootstrap_covers_and_is_wider_where_patients_differ() -> None:
    rng = np.random.default_rng(0)
    hits, patients = 0, np.repeat([f"p{i}" for i in range(40)], 4)
    for trial in range(200):
        values = np.repeat(rng.normal(0, 1, 40), 4) + rng.normal(0, 0.1, 160)
        low, high = patient_interval(values, patients, num_draws=400, seed=trial)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.98
    frames_alone = patient_interval(values, [str(i) for i in range(160)])
    assert high - low > 1.5 * (frames_alone[1] - frames_alone[0])


def test_the_bootstrap_leaves_nan_out() -> None:
    values = np.array([1.0, np.nan, 1.0, np.nan])
    assert patient_interval(values, ["a", "a", "b", "c"]) == (1.0, 1.0)
    assert all(math.isnan(v) for v in patient_interval(np.array([np.nan]), ["a"]))


def test_one_patient_has_no_interval() -> None:
    values = np.array([0.2, 0.8, np.nan])
    for patients in (["a", "a", "a"], ["a", "a", "b"]):
        assert all(math.isnan(v) for v in patient_interval(values, patients))
    assert all(math.isnan(v) for v in patient_interval_of(lambda index: float(values[index].mean()), ["a"] * 2))


def test_the_general_bootstrap_is_the_quick_one_for_a_mean() -> None:
    rng = np.random.default_rng(0)
    values, patients = rng.normal(size=80), [f"p{i // 4}" for i in range(80)]
    quick = patient_interval(values, patients, num_draws=4000)
    general = patient_interval_of(lambda index: float(values[index].mean()), patients, num_draws=4000)
    assert general == pytest.approx(quick, abs=0.03)
    assert all(math.isnan(v) for v in patient_interval_of(lambda index: math.nan, patients, num_draws=5))


def test_the_protocol_leaves_nan_out() -> None:
    assert subset_protocol(np.array([1.0, np.nan, 1.0])) == (1.0, 0.0)
    assert all(math.isnan(v) for v in subset_protocol(np.array([np.nan])))


def test_the_published_protocol_has_the_sd_of_sampling_without_replacement() -> None:
    values = np.repeat([0.0, 1.0], 100)
    mean, sd = subset_protocol(values)
    expected = math.sqrt(0.25 / 160 * (200 - 160) / (200 - 1))
    assert mean == pytest.approx(0.5, abs=0.005)
    assert sd == pytest.approx(expected, rel=0.1)


@given(st.integers(0, 2**32 - 1))
def test_auroc_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, scores = rng.permutation([True] * 7 + [False] * 9), rng.integers(0, 5, 16) / 4
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))


def test_auroc_needs_both_views_and_is_not_read_off_the_argmax() -> None:
    with pytest.raises(UserError, match="at least 1 frame of each"):
        auroc(np.array([0.1, 0.2]), np.array([True, True]))
    assert auroc(np.array([0.6, 0.7, 0.8, 0.9]), np.array([False, False, True, True])) == 1.0


def test_calibration_error_of_honest_and_boastful_scores() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 1, 20_000)
    assert calibration_error(p, rng.uniform(0, 1, 20_000) < p) < 0.02
    assert calibration_error(np.full(1000, 0.999), np.arange(1000) % 2 == 0) == pytest.approx(0.499, abs=0.01)


def test_the_spread_of_a_mean_is_that_of_its_own_interval_and_protocol() -> None:
    rng = np.random.default_rng(0)
    values, patients = rng.normal(size=200), [str(i // 4) for i in range(200)]
    found = with_spread("x", lambda index: float(values[index].mean()), patients)
    assert found["x"] == values.mean()
    assert (found["x_low"], found["x_high"]) == pytest.approx(patient_interval(values, patients), abs=0.03)
    assert (found["x_protocol_mean"], found["x_protocol_sd"]) == pytest.approx(subset_protocol(values), abs=0.005)
    nothing = with_spread("y", lambda index: math.nan, patients)
    assert all(math.isnan(v) for v in nothing.values())
