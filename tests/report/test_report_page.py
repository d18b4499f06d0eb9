"""Figures, pictures and the page, on rows made up for it."""

import base64
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysyn.labels import COLOURS
from raysyn.report import Samples, publish, write_report
from raysyn.report.axes import model_colours
from raysyn.report.figures import (
    cost_bars,
    cost_figure,
    curve_figure,
    realism_figure,
    save_figure,
    trials_figure,
)
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
from raysyn.report.table import frechet_keys
from raysyn.report.write import study_figures, write_pictures
from raysyn.types import FrameArrays


def study(models: tuple[str, ...] = ("edm", "edm_l128"), steps: tuple[int, ...] = (5, 8)) -> list[dict]:
    rows = [
        {"trained_on": "phantom", "fd_lite0": 12.0, "mean_dice": 0.96, "mean_dice_low": 0.95, "mean_dice_high": 0.97}
    ]
    for m, model in enumerate(models):
        for num_steps in steps:
            dice = 0.93 + 0.001 * num_steps + 0.004 * m
            rows.append(
                {"trained_on": "synthetic", "model": model, "space": "latent" if m else "pixel", "solver": "heun"}
                | {
                    "num_steps": num_steps,
                    "num_function_evals": 2 * num_steps - 1,
                    "seconds_per_image": num_steps / (m + 1),
                }
                | {"fd_lite0": 100.0 - num_steps - m, "fd_lite0_low": 80.0, "fd_lite0_high": 120.0}
                | {"mean_dice": dice, "mean_dice_low": dice - 0.01, "mean_dice_high": dice + 0.01}
                | {"cost/fit_cpu_seconds": 100.0, "cost/sample_cpu_seconds": 10.0 * num_steps}
                | {"cost/total_cpu_seconds": 100.0 + 10 * num_steps}
            )
    return rows


def frames(count: int, source: str = "phantom", masks: list[str] | None = None, shift: int = 0) -> FrameArrays:
    label_map = np.zeros((count, 16, 16), np.uint8)
    label_map[:, 4:, 2:14] = 2
    for i in range(count):
        label_map[i, 6:10, 3 + (i + shift) % 5 :][:, :4] = 1
    return FrameArrays(
        image_u8=np.random.default_rng(count).integers(0, 255, (count, 16, 16), dtype=np.uint8),
        label_map=label_map,
        view=np.zeros(count, np.uint8),
        phase=np.zeros(count, np.uint8),
        spacing_mm=np.ones((count, 2), np.float32),
        frame_id=[f"{source}-{i}" for i in range(count)],
        patient_id=[f"p{i}" for i in range(count)],
        mask_frame_id=masks or [""] * count,
        source=[source] * count,
    )


class Page(HTMLParser):
    """What a page refers to outside itself, and its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.images = 0
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        for key, value in attrs:
            if key in ("src", "href", "action", "data") and not (value or "").startswith("data:"):
                self.outside.append(value)
        self.images += tag == "img"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_whole_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    source = frames(9)
    synthetic = frames(9, "synthetic", source.frame_id, shift=1)
    pairs = io.BytesIO()
    worst_pairs(synthetic.image_u8, source.image_u8, np.linspace(0, 1, 9)).save(pairs, format="PNG")
    trials = [{"score": 0.1 * i, "cost": 5.0 - i, "complete": i != 2, "params": {"lr": 0.1}} for i in range(4)]
    written = write_report(
        tmp_path / "report",
        study(),
        curves={"learning": [{"series": "edm", "x": i, "y": 1 / (i + 1)} for i in range(9)], "num_synthetic": []},
        samples=Samples(("phantom", source), {"edm_l128 heun 5": synthetic}, {"edm_l128 heun 5": pairs.getvalue()}),
        trials=trials,
        failures={"fit vp": "loss <is> not finite"},
        info={"fingerprints": {"compare": "ab12"}, "data": "phantom"},
    )
    assert all(path.is_file() for path in written)
    assert written[0].name == "index.html"
    text = written[0].read_text()
    page = Page(text)
    assert page.outside == []
    assert page.open == []
    assert not re.search(r"https?://|@import|url\(", text)
    names = {path.name for path in written}
    expected = {
        f"{n}.{e}"
        for n in ("cost_dice", "realism_dice", "total_cost_dice", "cost_bars", "learning", "trials")
        for e in ("png", "csv")
    }
    expected |= {
        "table.csv",
        "table_full.csv",
        "hero.png",
        "phantom.png",
        "edm_l128_heun_5.png",
        "edm_l128_heun_5_nearest.png",
    }
    assert expected | {"index.html", "colours.png"} == names
    assert page.images == sum(name.endswith(".png") for name in names)
    assert "loss &lt;is&gt; not finite" in text
    assert "ab12" in text
    assert "cores" in text
    assert "Compare a curve with itself" in text
    assert "intervals over the test patients (what another training would give is not in them)" in text
    first = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", text)[1])
    assert first == (tmp_path / "report" / "figures" / "cost_dice.png").read_bytes()


def test_a_study_without_generated_rows_still_has_its_page(tmp_path: Path) -> None:
    written = write_report(tmp_path, study()[:1])
    assert {path.name for path in written} == {"index.html", "table.csv", "table_full.csv"}
    assert "None: every stage of the study finished." in written[0].read_text()


def test_a_report_is_published_to_storage(tmp_path: Path) -> None:
    write_report(tmp_path / "here", study())
    publish(tmp_path / "here", str(tmp_path / "there"))
    assert {p.relative_to(tmp_path / "here") for p in (tmp_path / "here").rglob("*.*")} == {
        p.relative_to(tmp_path / "there") for p in (tmp_path / "there").rglob("*.*")
    }


def test_the_cost_figure_marks_the_front(tmp_path: Path) -> None:
    made = cost_figure(study(), "seconds_per_image", "Sampling cost (seconds an image)", "cost_dice")
    assert made is not None
    _, numbers = save_figure(made, tmp_path)
    rows = {r["row"]: r for r in csv.DictReader(numbers.open())}
    assert {name for name, r in rows.items() if r["on_front"] == "True"} == {"edm_l128 heun 5", "edm_l128 heun 8"}
    assert rows["edm heun 5"]["seconds_per_image"] == "5"
    axes = made.figure.axes[0]
    assert (axes.get_xscale(), axes.get_title(loc="left")) == ("log", "Sampling cost against Dice")
    assert {t.get_text() for t in axes.texts} > {"5", "8"}, "each point says its steps"
    texts = {t.get_text() for t in axes.get_legend().get_texts()}
    assert {"edm", "edm_l128", "heun", "Pareto front", "trained on phantom"} <= texts


def test_a_cost_figure_gives_its_rank_correlation_too() -> None:
    made = cost_figure(study(steps=(5, 8, 12)), "seconds_per_image", "Sampling cost (seconds an image)", "cost_dice")
    assert made is not None
    assert made.caption.startswith("Spearman ρ = ")
    assert any("Kendall τ" in text.get_text() for text in made.figure.axes[0].texts)


def test_the_realism_figure_gives_the_correlation_and_its_rows() -> None:
    made = realism_figure(study(models=("a", "b", "c", "d", "e"), steps=(5, 10, 20)))
    assert made is not None
    assert "(15 rows of 5 models)" in made.caption
    assert "Spearman ρ" in made.caption
    assert "The paper's claim on 15 rows of 5 models" in made.caption
    assert all(p["fd_lite0_low"] == 80.0 for p in made.data)
    few = realism_figure(study(steps=(5,)))
    assert few is not None
    assert "cannot be tested on 2 rows of 2 models" in few.caption


def test_each_extractor_has_its_realism_figure() -> None:
    rows = [
        {
            **row,
            "realism/fd_inception": 50.0 + i,
            "realism/fd_inception_baseline": 20.0,
            "realism/fd_resnet18.a1": 3.0 * i,
        }
        for i, row in enumerate(study(models=("a", "b", "c", "d", "e"), steps=(5, 8)))
    ]
    assert frechet_keys(rows) == ["fd_lite0", "realism/fd_inception", "realism/fd_resnet18.a1"]
    made = {figure.name: figure for figure in study_figures(rows, {})}
    assert {"realism_dice", "realism_dice_inception", "realism_dice_resnet18.a1"} <= set(made)
    assert "One of 3 measures tested" in made["realism_dice"].caption
    (axes,) = made["realism_dice_inception"].figure.axes
    assert axes.get_xlabel() == "Fréchet distance fd_inception to held-out frames (lower is more realistic)"


def test_labels_of_points_do_not_overlap() -> None:
    made = cost_figure(study(models=("a", "b", "c", "d"), steps=(5, 6, 7, 8)), "seconds_per_image", "Cost (s)", "c")
    assert made is not None
    renderer = made.figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in made.figure.axes[0].texts]
    assert len(boxes) >= 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_figures_without_numbers_are_not_drawn() -> None:
    assert cost_figure(study()[:2], "seconds_per_image", "x", "x") is None
    assert realism_figure(study()[:1]) is None
    assert cost_bars(study(), {"cost/nothing": "nothing"}, "s") is None
    assert curve_figure("a", "b", "c", "d", [{"series": "x", "x": 1, "y": None}]) is None


def test_bars_stack_to_the_whole_cost() -> None:
    made = cost_bars(study(), {"cost/fit_cpu_seconds": "fit", "cost/sample_cpu_seconds": "sampling"}, "CPU-seconds")
    assert made is not None
    assert [t.get_text().strip() for t in made.figure.axes[0].texts] == ["150", "180", "150", "180"]


def test_a_model_has_one_colour_in_every_figure() -> None:
    assert list(model_colours(study()).values()) == ["#0072B2", "#D55E00"]


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


@pytest.mark.parametrize("costs", [(94.5, 103, 131, 139), (0.02, 0.03, 0.06, 0.08), (1, 5, 9, 20), (1, 20, 90, 500)])
def test_a_cost_axis_has_numbers_on_it(costs: tuple[float, ...]) -> None:
    rows = [r | {"cost": cost} for r, cost in zip(study()[1:], costs)]
    made = cost_figure(rows, "cost", "Whole cost (s)", "c")
    assert made is not None
    (axes,) = made.figure.axes
    low, high = axes.get_xlim()
    shown = [v for v in axes.get_xticks() if low <= v <= high]
    assert len(shown) >= 2, shown


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


def test_the_search_figure_has_the_front_of_whole_trials_only() -> None:
    trials = [
        {"score": 0.9, "cost": 1.0, "complete": False, "params": {"lr": 1}},
        {"score": 0.7, "cost": 2.0, "complete": True, "params": {"lr": 2}},
    ]
    assert trials_figure(trials) is None, "one whole trial makes no front"
    made = trials_figure([*trials, {"score": 0.8, "cost": 3.0, "complete": True, "params": {"lr": 3}}])
    assert made is not None
    assert [row["lr"] for row in made.data] == [1, 2, 3]
    front = next(line for line in made.figure.axes[0].lines if line.get_label() == "Pareto front")
    assert list(front.get_xdata()) == [2.0, 3.0]


def test_worst_pairs_come_first() -> None:
    shade = np.arange(4, dtype=np.uint8)[:, None, None] * 50 + np.zeros((4, 8, 8), np.uint8)
    picture = np.asarray(worst_pairs(shade, shade + 10, [0.1, 0.9, 0.5, 0.2], cell=8, count=3).convert("L"))
    left = MARGIN + 76
    firsts = [int(picture[MARGIN + 4, left + k * (8 + GAP) + 4]) for k in range(3)]
    assert firsts == [50, 100, 150]
    assert int(picture[MARGIN + 8 + GAP + 4, left + 4]) == 60


def test_an_empty_row_list_makes_a_small_blank_picture() -> None:
    assert isinstance(tile_rows([]), Image.Image)


@pytest.mark.parametrize("name", ["figures/cost_dice.png", "figures/realism_dice.png", "figures/cost_bars.png"])
def test_figures_have_ink_and_margins(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "ink"
    if not folder.exists():
        write_report(folder, study())
    picture = np.asarray(Image.open(folder / name).convert("L"))
    assert picture.shape[1] == 1140
    assert (picture < 128).mean() > 0.003
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge > 250).all(), "nothing is cut off at the edge"
