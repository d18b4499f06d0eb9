import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from raysyn.config import WarpConfig
from raysyn.data.masks import warp_label_map
from raysyn.data.phantom import phantom_frame
from raysyn.labels import LEFT_ATRIUM, LV_CAVITY, MYOCARDIUM, OUTSIDE, TISSUE
from raysyn.types import UserError

STILL = WarpConfig(rotation_deg=0, translation=0, scale_min=1, scale_max=1, shear_deg=0, elastic_px=0)
MAPS = [phantom_frame(0, p, view, "ED", 64).label_map for p, view in ((0, "2CH"), (1, "4CH"))]


def still_but(**change: float) -> WarpConfig:
    return dataclasses.replace(STILL, **change)


def block(size: int = 101, half: int = 10) -> np.ndarray:
    """Tissue everywhere, a square cavity in the middle."""
    square = np.full((size, size), TISSUE, np.uint8)
    middle = size // 2
    square[middle - half : middle + half + 1, middle - half : middle + half + 1] = LV_CAVITY
    return square


@pytest.mark.parametrize("label_map", MAPS)
def test_without_any_motion_the_map_stays_as_it_is(label_map: np.ndarray) -> None:
    assert np.array_equal(warp_label_map(label_map, STILL, 5), label_map)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 1))
def test_the_sector_stays_and_labels_are_the_known_ones(seed: int, which: int) -> None:
    before = MAPS[which]
    after = warp_label_map(before, WarpConfig(), seed)
    assert after.dtype == np.uint8
    assert after.shape == before.shape
    assert np.array_equal(after == OUTSIDE, before == OUTSIDE)
    assert set(np.unique(after)) <= set(range(5))
    assert np.array_equal(after, warp_label_map(before, WarpConfig(), seed))


def test_the_input_is_left_alone_and_seeds_differ() -> None:
    before = MAPS[0].copy()
    many = [warp_label_map(before, WarpConfig(), seed).tobytes() for seed in range(20)]
    assert np.array_equal(before, MAPS[0])
    assert len(set(many)) == 20


def test_default_warps_keep_the_anatomy_whole_and_distinct() -> None:
    moved = []
    for seed in range(60):
        before = MAPS[seed % 2]
        after = warp_label_map(before, WarpConfig(), seed)
        for structure in (LV_CAVITY, LEFT_ATRIUM):
            pieces, _ = label(after == structure)
            sizes = np.bincount(pieces.ravel())[1:]
            assert sizes.max() >= 0.97 * sizes.sum(), (seed, structure)
            assert 0.3 < (after == structure).sum() / (before == structure).sum() < 1.7, (seed, structure)
        assert (after == MYOCARDIUM).any()
        moved.append(np.mean(after != before))
    assert np.mean(moved) > 0.03


def test_scale_changes_the_area_by_its_square() -> None:
    before = block(half=20)
    after = warp_label_map(before, still_but(scale_min=0.5, scale_max=0.5), 0)
    assert (after == LV_CAVITY).sum() / (before == LV_CAVITY).sum() == pytest.approx(0.25, rel=0.06)
    rows, columns = np.nonzero(after == LV_CAVITY)
    assert (rows.mean(), columns.mean()) == pytest.approx((50, 50), abs=0.5)


def test_translation_moves_by_at_most_its_part_of_the_picture() -> None:
    moves = []
    for seed in range(30):
        rows, columns = np.nonzero(warp_label_map(block(), still_but(translation=0.1), seed) == LV_CAVITY)
        moves.append((rows.mean() - 50, columns.mean() - 50))
    assert 8 < np.abs(moves).max() <= 10.6
    assert np.min(moves) < -4 < 4 < np.max(moves)


def test_rotation_turns_about_the_centre_within_its_bound() -> None:
    bar = np.full((101, 101), TISSUE, np.uint8)
    bar[48:53, 10:91] = MYOCARDIUM
    angles = []
    for seed in range(30):
        rows, columns = np.nonzero(warp_label_map(bar, still_but(rotation_deg=20), seed) == MYOCARDIUM)
        angles.append(np.rad2deg(np.arctan(np.polyfit(columns, rows, 1)[0])))
        assert len(rows) == pytest.approx(5 * 81, rel=0.05)
    assert 14 < np.abs(angles).max() < 20.5
    assert np.min(angles) < 0 < np.max(angles)


def test_elastic_displacement_stays_within_its_bound_at_every_size() -> None:
    for size in (64, 256):
        ramp = block(size, half=size // 5)
        limit = 30 * size / 256
        for seed in range(20):
            after = warp_label_map(ramp, still_but(elastic_px=30), seed) == LV_CAVITY
            rows, columns = np.nonzero(after)
            reach = max(np.abs(rows - size // 2).max(), np.abs(columns - size // 2).max())
            assert reach <= size // 5 + limit + 1


def test_a_violent_elastic_warp_still_does_not_tear() -> None:
    before, whole = block(128, half=25), []
    for seed in range(30):
        after = warp_label_map(before, still_but(elastic_px=200), seed) == LV_CAVITY
        if not (after[[0, -1]].any() or after[:, [0, -1]].any()):  # else the picture's border cuts it
            whole.append(label(after, np.ones((3, 3)))[1])
    assert len(whole) > 5
    assert set(whole) == {1}


def test_structures_that_leave_the_sector_are_dropped_and_leave_tissue() -> None:
    before = block(101, half=10)
    before[:, 62:] = OUTSIDE
    right = next(s for s in range(99) if (warp_label_map(block(), still_but(translation=0.3), s)[50, 72:76] == 1).any())
    after = warp_label_map(before, still_but(translation=0.3), right)
    assert not after[:, 62:].any()
    assert (after == LV_CAVITY).sum() < (before == LV_CAVITY).sum()
    assert after[50, 41] == TISSUE


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4), np.int64), np.full((4, 4), 9, np.uint8), np.zeros((1, 4, 4), np.uint8)]
)
def test_what_is_no_label_map_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(UserError, match="label"):
        warp_label_map(bad, WarpConfig(), 0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="seed -3"):
        warp_label_map(MAPS[0], WarpConfig(), -3)


def test_what_lies_beyond_the_picture_is_tissue_and_not_its_edge_drawn_out() -> None:
    halved = WarpConfig(rotation_deg=0, translation=0, scale_min=0.5, scale_max=0.5, shear_deg=0, elastic_px=0)
    warped = warp_label_map(np.full((64, 64), LEFT_ATRIUM, np.uint8), halved, 0)
    expected = np.full((64, 64), TISSUE, np.uint8)
    expected[16:48, 16:48] = LEFT_ATRIUM
    assert (warped == expected).all()
