"""The study's figures: each returns a picture and the numbers in it. Colours are Okabe and Ito's, told apart by all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raysyn.report.ranks import claim_text, pareto_front, rank_correlation
from raysyn.report.table import Row, is_generated, number, row_kind, row_name, table_csv

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


@dataclass
class FigureOf:
    """A figure: `name` for its files, a caption for the page, its matplotlib figure and its numbers as rows."""

    name: str
    title: str
    caption: str
    figure: Any
    data: list[dict[str, Any]] = field(default_factory=list)


def _figure(title: str, width: float = 7.6, height: float = 4.8) -> tuple[Any, Any]:
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


def _scatter(axes: Any, rows: Sequence[Row], all_rows: Sequence[Row], x: str, y: str) -> None:
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


def _legend(axes: Any, rows: Sequence[Row], *, steps: bool, extra: Sequence[Any] = ()) -> None:
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


def _ceiling(axes: Any, rows: Sequence[Row], key: str) -> list[Any]:
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


def _measured(rows: Sequence[Row], *keys: str) -> list[Row]:
    return [r for r in rows if is_generated(r) and all(number(r, k) is not None for k in keys)]


def _points(rows: Sequence[Row], *keys: str) -> list[dict[str, Any]]:
    wanted = [k for key in keys for k in (key, f"{key}_low", f"{key}_high")]
    return [{"row": row_name(r), **{k: number(r, k) for k in wanted if k in r}} for r in rows]


def cost_figure(rows: Sequence[Row], cost: str, label: str, name: str, score: str = "mean_dice") -> FigureOf | None:
    """Cost (log) against mean Dice with the Pareto front and their rank correlation; None below two rows with both."""
    used = [r for r in _measured(rows, cost, score) if number(r, cost) > 0]  # type: ignore[operator]
    if len(used) < 2:
        return None
    figure, axes = _figure(f"{label.split(' (')[0]} against Dice")
    axes.set_xscale("log")
    axes.set_xlabel(f"{label}, log scale")
    axes.set_ylabel("mean Dice on held-out frames, 95 % interval")
    extra = _ceiling(axes, rows, score)
    costs, scores = [[float(number(r, k) or 0) for r in used] for k in (cost, score)]
    front = pareto_front(costs, scores)
    (line,) = axes.step(
        [costs[i] for i in front], [scores[i] for i in front], where="post", color=INK, linewidth=1.1, alpha=0.55
    )
    line.set_label("Pareto front")
    _plain_log_ticks(axes, costs)
    _scatter(axes, used, rows, cost, score)
    _legend(axes, rows, steps=len(used) <= 16, extra=[line, *extra])
    data = [{**p, "on_front": i in front} for i, p in enumerate(_points(used, cost, score))]
    correlation = rank_correlation(costs, scores, [str(r["model"]) for r in used]).text()
    _below(axes, correlation)
    best = ", ".join(row_name(used[i]) for i in front)
    caption = f"{correlation}. On the front by the values alone, whatever their intervals, cheapest first: {best}."
    return FigureOf(name, axes.get_title(loc="left"), caption, figure, data)


def _below(axes: Any, text: str) -> None:
    axes.annotate(text, (0, -0.17), xycoords="axes fraction", fontsize=9, color=INK, annotation_clip=False)


def _plain_log_ticks(axes: Any, values: Sequence[float]) -> None:
    """Numbers as people write them; within a factor of five equal steps, as powers of ten would leave one or none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    ratio = max(values) / max(min(values), 1e-12)
    if ratio < 5:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 30 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def realism_figure(
    rows: Sequence[Row], realism: str = "fd_lite0", score: str = "mean_dice", num_measures: int = 1
) -> FigureOf | None:
    """Realism against mean Dice with its interval, and their rank correlation; None below two rows.

    `num_measures`: how many measures of realism the report tests the claim with.
    """
    used = _measured(rows, realism, score)
    if len(used) < 2:
        return None
    values = [[float(number(r, k) or 0) for r in used] for k in (realism, score)]
    correlation = rank_correlation(values[0], values[1], [str(r["model"]) for r in used])
    figure, axes = _figure("Realism against Dice")
    named = realism.removeprefix("realism/")
    axes.set_xlabel(f"Fréchet distance {named} to held-out frames (lower is more realistic)")
    axes.set_ylabel("mean Dice on held-out frames, 95 % interval")
    extra = _ceiling(axes, rows, score)
    _scatter(axes, used, rows, realism, score)
    _legend(axes, rows, steps=len(used) <= 16, extra=extra)
    _below(axes, correlation.text())
    caption = f"{correlation.text()}. {claim_text(correlation, num_measures)}"
    name = "realism_dice" if realism == "fd_lite0" else f"realism_dice_{named.removeprefix('fd_')}"
    return FigureOf(name, "Realism against Dice", caption, figure, _points(used, realism, score))


def cost_bars(rows: Sequence[Row], parts: Mapping[str, str], unit: str, name: str = "cost_bars") -> FigureOf | None:
    """What each set cost, stacked by `parts` (row key → what it is called); None when no row has any part."""
    used = [r for r in rows if is_generated(r) and any(number(r, k) for k in parts)]
    if not used:
        return None
    figure, axes = _figure("What a training set cost", height=1.6 + 0.34 * len(used))
    left = np.zeros(len(used))
    for i, (key, label) in enumerate(parts.items()):
        width = np.array([number(r, key) or 0.0 for r in used])
        if width.any():
            axes.barh(range(len(used)), width, left=left, color=PALETTE[i % len(PALETTE)], label=label, height=0.72)
            left += width
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:,.0f}" if total >= 10 else f" {total:.2g}", va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(used)), [row_name(r) for r in used])
    axes.set_ylim(len(used) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, left.max() * 1.12)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel(unit)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **LEGEND)
    caption = "A fit that several sets share is counted in full for each: it is what that set alone would cost."
    return FigureOf(name, "What a training set cost", caption, figure, _points(used, *parts))


def curve_figure(
    name: str, title: str, xlabel: str, ylabel: str, points: Sequence[Mapping[str, Any]], log_x: bool = False
) -> FigureOf | None:
    """Curves from points {series, x, y, low?, high?}; None when there are none."""
    points = [p for p in points if number(p, "x") is not None and number(p, "y") is not None]
    if not points:
        return None
    figure, axes = _figure(title)
    for i, series in enumerate(dict.fromkeys(str(p.get("series", "")) for p in points)):
        own = sorted((p for p in points if str(p.get("series", "")) == series), key=lambda p: p["x"])
        x, y = ([number(p, k) for p in own] for k in ("x", "y"))
        marker = MARKERS[i % len(MARKERS)] if len(own) <= 30 else ""
        colour = PALETTE[i % len(PALETTE)]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.6, label=series or None)
        if all(number(p, "low") is not None and number(p, "high") is not None for p in own):
            axes.fill_between(x, [p["low"] for p in own], [p["high"] for p in own], color=colour, alpha=0.15, lw=0)
    if log_x:
        axes.set_xscale("log")
        _plain_log_ticks(axes, [p["x"] for p in points])
    places = sorted({p["x"] for p in points})
    if len(places) <= 8:
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **LEGEND)
    return FigureOf(name, title, "", figure, [dict(p) for p in points])


def trials_figure(trials: Sequence[Mapping[str, Any]]) -> FigureOf | None:
    """A search's trials {score, cost, complete}: score against cost with the front of the whole ones; None below two."""
    whole = [t for t in trials if t["complete"]]
    if len(whole) < 2:
        return None
    costs, scores = [[float(t[k]) for t in whole] for k in ("cost", "score")]
    front = pareto_front(costs, scores)
    figure, axes = _figure("Search: score against cost of a trial")
    axes.set_xlabel("CPU-seconds of the trial")
    axes.set_ylabel("validation score")
    pruned = [t for t in trials if not t["complete"]]
    if pruned:
        axes.plot([t["cost"] for t in pruned], [t["score"] for t in pruned], "x", color=GREY, label="pruned")
    axes.plot(costs, scores, "o", color=PALETTE[0], markersize=7, label="ran to its end")
    steps = [[values[i] for i in front] for values in (costs, scores)]
    axes.step(*steps, where="post", color=INK, linewidth=1.1, alpha=0.55, label="Pareto front")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **LEGEND)
    keys = [str(k) for k in trials[0].get("params", {})]
    data = [{"score": t["score"], "cost": t["cost"], **{k: t["params"].get(k) for k in keys}} for t in trials]
    caption = "Each point is a set-up of the task that was tried; on the front nothing was both cheaper and better."
    return FigureOf("trials", "Search: score against cost of a trial", caption, figure, data)


def save_figure(made: FigureOf, folder: str | Path, dpi: int = 150) -> tuple[Path, Path]:
    """Write `<name>.png` and `<name>.csv` into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture, numbers = folder / f"{made.name}.png", folder / f"{made.name}.csv"
    made.figure.savefig(picture, dpi=dpi, facecolor="white")
    columns = list(dict.fromkeys(k for row in made.data for k in row))
    numbers.write_text(table_csv(made.data, columns), encoding="utf-8")
    return picture, numbers
