"""Figures: fronts, correlations, labels and axes that can be read."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysyn.report import write_report
from raysyn.report.axes import model_colours
from raysyn.report.figures import (
    cost_bars,
    cost_figure,
    curve_figure,
    realism_figure,
    save_figure,
    trials_figure,
)
from raysyn.report.table import frechet_keys
from raysyn.report.write import study_figures
from tests.report.studies import study


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


@pytest.mark.parametrize("costs", [(94.5, 103, 131, 139), (0.02, 0.03, 0.06, 0.08), (1, 5, 9, 20), (1, 20, 90, 500)])
def test_a_cost_axis_has_numbers_on_it(costs: tuple[float, ...]) -> None:
    rows = [r | {"cost": cost} for r, cost in zip(study()[1:], costs)]
    made = cost_figure(rows, "cost", "Whole cost (s)", "c")
    assert made is not None
    (axes,) = made.figure.axes
    low, high = axes.get_xlim()
    shown = [v for v in axes.get_xticks() if low <= v <= high]
    assert len(shown) >= 2, shown


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
