"""Pictures: which frames they show, and under which names."""

from pathlib import Path

import numpy as np
from PIL import Image

from raysyn.labels import COLOURS
from raysyn.report import Samples
from raysyn.report.grids import (
    GAP,
    HEAD,
    MARGIN,
    hero_picture,
    sample_grid,
    spread,
    spread_over_views,
    tile_rows,
    view_names,
    worst_pairs,
)
from raysyn.report.write import write_pictures
from raysyn.types import FrameArrays
from tests.report.studies import frames


def test_a_grid_shows_the_label_map_above_its_frame() -> None:
    set_of = frames(3)
    grid = np.asarray(sample_grid(set_of, count=3, cell=16))
    left = grid.shape[1] - MARGIN - 3 * 16 - 2 * GAP
    top = MARGIN + HEAD
    tile = grid[top : top + 16, left : left + 16]
    assert np.array_equal(tile, COLOURS[set_of.label_map[0]])
    below = grid[top + 16 + GAP : top + 32 + GAP, left : left + 16]
    assert np.array_equal(below[..., 0], set_of.image_u8[0])


def test_frames_are_spread_over_the_set() -> None:
    assert spread(100, 4) == [12, 37, 62, 87]
    assert spread(2, 8) == [0, 1]
    assert spread(0, 3) == []


def test_pictures_show_every_view_and_phase_though_patients_lie_in_order() -> None:
    set_of = frames(64)
    set_of.view, set_of.phase = (np.array(kind * 16, np.uint8) for kind in ([0, 0, 1, 1], [0, 1, 0, 1]))
    shown = set_of.take(spread_over_views(set_of, 8))
    assert view_names(shown) == [kind for kind in ("2CH ED", "2CH ES", "4CH ED", "4CH ES") for _ in range(2)]
    assert len(set(shown.patient_id)) == 8


def test_the_controls_are_not_called_drawn_from_maps(tmp_path: Path) -> None:
    written = write_pictures(
        tmp_path, Samples(("phantom", frames(4)), {"control prior": frames(4), "edm heun 5": frames(4)})
    )
    captions = {path.name: caption for path, caption in written}
    assert "draws from its prior" in captions["control_prior.png"]
    assert "the maps asked for" in captions["edm_heun_5.png"]


def test_the_hero_shares_a_mask_only_where_it_is_the_same() -> None:
    source = frames(4)
    one, same = (frames(4, name, source.frame_id, shift=1) for name in ("a", "b"))
    other = frames(4, "c", source.frame_id, shift=2)
    cell = 20

    def tall(sets: dict[str, FrameArrays]) -> int:
        picture = hero_picture("phantom", source, sets, count=3, cell=cell)
        return (picture.height - HEAD - 2 * MARGIN + GAP) // (cell + GAP)

    assert tall({"a": one, "b": same}) == 4, "frame, mask, a, b"
    assert tall({"a": one, "c": other}) == 5, "c has masks of its own"
    orphan = frames(4, "a", ["elsewhere"] * 4)
    assert tall({"a": orphan}) == 2, "no frame is shown that did not give the mask"


def test_the_hero_has_one_set_a_model_and_no_controls(tmp_path: Path) -> None:
    source = frames(4)
    made = frames(4, "s", source.frame_id, shift=1)
    names = ("edm heun 5", "edm heun 8", "vp heun 8", "control prior")
    (path, _), *_ = write_pictures(tmp_path, Samples(("phantom", source), dict.fromkeys(names, made)))
    assert path.name == "hero.png"
    assert (Image.open(path).height - HEAD - 2 * MARGIN + GAP) // (144 + GAP) == 4, "frame, mask, edm, vp"


def test_worst_pairs_come_first() -> None:
    shade = np.arange(4, dtype=np.uint8)[:, None, None] * 50 + np.zeros((4, 8, 8), np.uint8)
    picture = np.asarray(worst_pairs(shade, shade + 10, [0.1, 0.9, 0.5, 0.2], cell=8, count=3).convert("L"))
    left = MARGIN + 76
    firsts = [int(picture[MARGIN + 4, left + k * (8 + GAP) + 4]) for k in range(3)]
    assert firsts == [50, 100, 150]
    assert int(picture[MARGIN + 8 + GAP + 4, left + 4]) == 60


def test_an_empty_row_list_makes_a_small_blank_picture() -> None:
    assert isinstance(tile_rows([]), Image.Image)
