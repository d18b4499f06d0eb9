"""Volumes of ellipsoids, ejection fractions from pairs of phases, and their errors."""

import math

import numpy as np
import pytest

from raysyn.metrics.function import ejection_fraction_errors, ejection_fractions, volume
from raysyn.types import FrameArrays, UserError


def ellipse(long_px: float, short_px: float, size: int = 256, angle: float = 0.0) -> np.ndarray:
    """Task classes uint8 [size, size]: one ellipse of cavity, half-axes in px, its long axis turned by `angle`."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    along, across = y * math.cos(angle) + x * math.sin(angle), x * math.cos(angle) - y * math.sin(angle)
    return ((along / long_px) ** 2 + (across / short_px) ** 2 <= 1).astype(np.uint8)


def frames_of(phases: list[int], patients: list[str], views: list[int], spacing: float = 0.5) -> FrameArrays:
    n = len(phases)
    zeros = np.zeros((n, 8, 8), np.uint8)
    return FrameArrays(
        zeros,
        zeros,
        np.array(views, np.uint8),
        np.array(phases, np.uint8),
        np.full((n, 2), spacing, np.float32),
        [str(i) for i in range(n)],
        patients,
        [""] * n,
        ["real"] * n,
    )


@pytest.mark.parametrize("method", ["simpson", "area_length"])
@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_an_ellipsoid_has_its_volume(method: str, angle: float) -> None:
    found = volume(ellipse(90, 45, angle=angle), np.array([0.5, 0.5]), method)
    assert found == pytest.approx(4 / 3 * math.pi * 45 * 22.5**2 / 1000, rel=0.03)


@pytest.mark.parametrize("method", ["simpson", "area_length"])
def test_unequal_spacing_is_heeded(method: str) -> None:
    assert volume(ellipse(90, 45), np.array([0.5, 1.0]), method) == pytest.approx(
        4 * volume(ellipse(90, 45), np.array([0.5, 0.5]), method), rel=0.01
    )


def test_the_axis_starts_where_the_atrium_touches() -> None:
    classes = ellipse(90, 45)
    classes[200:, :][classes[200:, :] == 1] = 0  # cut at the mitral plane
    classes[200:240, 100:156] = 3
    below = volume(classes, np.ones(2), "simpson")
    cut = 4 / 3 * math.pi * 90 * 45**2 / 1000
    height = 90 - (200 - 127.5)  # the cap that was cut off
    cap = math.pi * 45**2 / 90**2 * height**2 * (3 * 90 - height) / 3 / 1000
    assert below == pytest.approx(cut - cap, rel=0.03)


def test_ejection_fraction_of_known_volumes_and_of_an_empty_cavity() -> None:
    frames = frames_of([0, 1, 0, 1, 0], ["a", "a", "b", "b", "c"], [1, 1, 0, 0, 0])
    empty = np.zeros((256, 256), np.uint8)
    classes = np.stack([ellipse(90, 45), ellipse(90, 45 / math.sqrt(2)), empty, ellipse(50, 30), ellipse(50, 30)])
    found = ejection_fractions(classes, frames)
    assert set(found) == {("a", "4CH"), ("b", "2CH")}  # c has no ES
    assert found[("a", "4CH")][2] == pytest.approx(50, abs=1.5)
    assert math.isnan(found[("b", "2CH")][2])
    emptied = np.stack([ellipse(90, 45), empty, ellipse(90, 45), ellipse(50, 30), empty])
    assert ejection_fractions(emptied, frames)[("a", "4CH")][2] == 100


def test_errors_are_against_the_labels_own_and_count_what_is_undefined() -> None:
    frames = frames_of([0, 1, 0, 1], ["a", "a", "b", "b"], [1, 1, 1, 1])
    truth = np.stack([ellipse(90, 45), ellipse(90, 45 / math.sqrt(2)), ellipse(90, 45), ellipse(90, 30)])
    same = ejection_fraction_errors(truth, truth, frames)
    assert (same["ef_mae"], same["ef_num_pairs"], same["ef_num_undefined"]) == (0, 2, 0)
    missed = truth.copy()
    missed[0] = 0
    found = ejection_fraction_errors(missed, truth, frames)
    assert (found["ef_num_pairs"], found["ef_num_undefined"], found["ef_mae"]) == (2, 1, 0)
    twice = np.concatenate([truth, truth, truth[:2]])
    more = frames_of([0, 1] * 5, [p for p in "abcde" for _ in range(2)], [1] * 10)
    off = twice.copy()
    off[1] = ellipse(90, 20)
    spread = ejection_fraction_errors(off, twice, more)
    for name in ("ef_mae", "ef_bias", "ef_sd"):
        assert spread[f"{name}_low"] < spread[name] < spread[f"{name}_high"]
        assert spread[f"{name}_protocol_mean"] == pytest.approx(spread[name], rel=0.3)
        assert spread[f"{name}_protocol_sd"] > 0
    assert -1 <= spread["ef_correlation_low"] <= spread["ef_correlation"] <= spread["ef_correlation_high"] <= 1
    assert ejection_fraction_errors(truth[:1], truth[:1], frames.take([0])) == {}
    nothing = ejection_fraction_errors(np.zeros_like(truth), truth, frames)
    assert math.isnan(nothing["ef_mae"])
    assert nothing["ef_num_undefined"] == 2


@pytest.mark.parametrize("method", ["simpson", "area_length"])
def test_a_stray_pixel_changes_nothing_and_a_lone_one_has_a_volume(method: str) -> None:
    stray = ellipse(60, 30)
    stray[3:5, 3:5] = 1
    assert volume(stray, np.ones(2), method) == volume(ellipse(60, 30), np.ones(2), method)
    lone = np.zeros((32, 32), np.uint8)
    lone[9, 9] = 1
    assert 0 < volume(lone, np.array([0.5, 0.25]), method) < 1e-3


def test_disks_hardly_thicker_than_a_pixel_do_not_inflate_a_volume() -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    for half_length in (12.0, 15.0):
        offsets = np.linspace(-0.5, 0.5, 9)
        cavities = [((((y - o) / half_length) ** 2 + (2 * (x - o) / half_length) ** 2) <= 1) for o in offsets]
        found = np.array([volume(c.astype(np.uint8), np.ones(2)) * 1000 for c in cavities]) / (
            math.pi / 3 * half_length**3
        )
        assert found.mean() == pytest.approx(1, abs=0.015)
        assert found.std() < 0.04


@pytest.mark.parametrize("method", ["simpson", "area_length"])
def test_a_stray_pixel_of_atrium_does_not_move_the_mitral_plane(method: str) -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    classes = ((y / 20) ** 2 + (x / 10) ** 2 <= 1).astype(np.uint8)
    classes[y > 12] = 0
    classes[(y > 12) & (y < 20) & (np.abs(x) < 8)] = 3
    stray = classes.copy()
    stray[14, 31] = 3  # within the cavity, near the apex
    assert volume(stray, np.ones(2), method) == pytest.approx(volume(classes, np.ones(2), method), rel=0.02)


def test_the_volume_of_a_coarse_cavity_has_no_bias_at_the_mitral_plane() -> None:
    ratios = []
    for angle in np.linspace(-0.4, 0.4, 9):
        y, x = np.mgrid[:64, :64] - 31.5
        along, across = y * math.cos(angle) + x * math.sin(angle), x * math.cos(angle) - y * math.sin(angle)
        classes = ((along / 20) ** 2 + (across / 10) ** 2 <= 1).astype(np.uint8)
        classes[along > 12] = 0
        classes[(along > 12) & (along < 20) & (np.abs(across) < 8)] = 3
        cap = math.pi * 100 / 400 * 8**2 * (60 - 8) / 3
        ratios.append(volume(classes, np.ones(2)) * 1000 / (4 / 3 * math.pi * 20 * 100 - cap))
    assert np.mean(ratios) == pytest.approx(1, abs=0.015)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UserError, match="biplane"):
        volume(ellipse(9, 5, 32), np.ones(2), "biplane")
