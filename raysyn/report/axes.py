"""What the study's figures are drawn with: axes, colours and markers, points with intervals, legends, ticks.

Colours are Okabe and Ito's, told apart by all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raysyn.report.table import Row, is_generated, number, row_kind

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
INK, GREY = "#222222", "#8a8a8a"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": INK,
    "ytick.color": INK,
}
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9}


def new_axes(title: str, width: float = 7.6, height: float = 4.8) -> tuple[Any, Any]:
    """(matplotlib figure, its only axes) in the report's style; sizes in inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_axisbelow(True)
    return figure, axes


def model_colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each model, the same in every figure of a report."""
    models = dict.fromkeys(str(r.get("model")) for r in rows if is_generated(r))
    return {model: PALETTE[i % len(PALETTE)] for i, model in enumerate(models)}


def solver_markers(rows: Sequence[Row]) -> dict[str, str]:
    """A marker for each solver."""
    solvers = dict.fromkeys(str(r.get("solver")) for r in rows if is_generated(r))
    return {solver: MARKERS[i % len(MARKERS)] for i, solver in enumerate(solvers)}


def _interval(row: Row, key: str) -> tuple[float, float]:
    value, low, high = (number(row, k) for k in (key, f"{key}_low", f"{key}_high"))
    if value is None or low is None or high is None:
        return 0.0, 0.0
    return max(value - low, 0.0), max(high - value, 0.0)


def scatter(axes: Any, rows: Sequence[Row], all_rows: Sequence[Row], x: str, y: str) -> None:
    """A point a row at its numbers `x` and `y` with their intervals; up to 16 rows say their steps beside it.

    Colours and markers are those that models and solvers have among `all_rows`.
    """
    colours, markers = model_colours(all_rows), solver_markers(all_rows)
    for row in rows:
        colour = colours[str(row["model"])]
        axes.errorbar(
            number(row, x),
            number(row, y),
            xerr=np.array([_interval(row, x)]).T if any(_interval(row, x)) else None,
            yerr=np.array([_interval(row, y)]).T if any(_interval(row, y)) else None,
            fmt=markers[str(row["solver"])],
            color=colour,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.1,
            ecolor=(*_rgb(colour), 0.45),
            zorder=3,
        )
    if len(rows) <= 16:
        _label_points(axes, [(number(r, x), number(r, y), str(r.get("num_steps", ""))) for r in rows])


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def _label_points(axes: Any, points: Sequence[tuple[Any, Any, str]]) -> None:
    """Write a short text by each point, at the first free one of eight places around it; none where all are taken."""
    canvas = axes.figure.canvas
    axes.figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    spots = [axes.transData.transform((x, y)) for x, y, _ in points]
    boxes: list[Any] = []
    for (x, y, text), _ in zip(points, spots):
        for dx, dy in ((7, 6), (7, -12), (-12, 6), (-12, -12), (0, 10), (0, -16), (13, -3), (-19, -3)):
            label = axes.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8.5, color=INK, zorder=4
            )
            box = label.get_window_extent(renderer)
            if not any(box.overlaps(b) for b in boxes) and not any(
                box.x0 - 3 < sx < box.x1 + 3 and box.y0 - 3 < sy < box.y1 + 3 for sx, sy in spots
            ):
                boxes.append(box)
                break
            label.remove()


def legend(axes: Any, rows: Sequence[Row], *, steps: bool, extra: Sequence[Any] = ()) -> None:
    """Models, solvers and `extra` lines, right of the axes; with `steps` what the numbers beside points are."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], marker="o", linestyle="", color=c, label=m, markersize=7) for m, c in model_colours(rows).items()
    ]
    markers = solver_markers(rows)
    entries += [Line2D([], [], marker=m, linestyle="", color=GREY, label=s, markersize=7) for s, m in markers.items()]
    if steps:
        entries.append(Line2D([], [], linestyle="", label="beside a point: its steps"))
    axes.legend(
        handles=[*entries, *extra],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        handletextpad=0.6,
        **LEGEND,
    )


def ceiling(axes: Any, rows: Sequence[Row], key: str) -> list[Any]:
    """A dashed line at the ceiling's score (trained on real or phantom frames), its interval as a band."""
    ceiling = next((r for r in rows if row_kind(r) == "ceiling" and number(r, key) is not None), None)
    if ceiling is None:
        return []
    value = number(ceiling, key)
    low, high = number(ceiling, f"{key}_low"), number(ceiling, f"{key}_high")
    if low is not None and high is not None:
        axes.axhspan(low, high, color=GREY, alpha=0.12, linewidth=0, zorder=1)
    line = axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, zorder=2)
    line.set_label(f"trained on {ceiling['trained_on']}")
    return [line]
