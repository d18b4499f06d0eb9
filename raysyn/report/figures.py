"""The study's figures: each returns a picture and the numbers in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raysyn.report.axes import GREY, INK, LEGEND, MARKERS, PALETTE, ceiling, legend, new_axes, scatter
from raysyn.report.ranks import claim_text, pareto_front, rank_correlation
from raysyn.report.table import Row, is_generated, number, row_name, table_csv


@dataclass
class FigureOf:
    """A figure: `name` for its files, a caption for the page, its matplotlib figure and its numbers as rows."""

    name: str
    title: str
    caption: str
    figure: Any
    data: list[dict[str, Any]] = field(default_factory=list)


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
    figure, axes = new_axes(f"{label.split(' (')[0]} against Dice")
    axes.set_xscale("log")
    axes.set_xlabel(f"{label}, log scale")
    axes.set_ylabel("mean Dice on held-out frames, 95 % interval")
    extra = ceiling(axes, rows, score)
    costs, scores = [[float(number(r, k) or 0) for r in used] for k in (cost, score)]
    front = pareto_front(costs, scores)
    (line,) = axes.step(
        [costs[i] for i in front], [scores[i] for i in front], where="post", color=INK, linewidth=1.1, alpha=0.55
    )
    line.set_label("Pareto front")
    _plain_log_ticks(axes, costs)
    scatter(axes, used, rows, cost, score)
    legend(axes, rows, steps=len(used) <= 16, extra=[line, *extra])
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
    figure, axes = new_axes("Realism against Dice")
    named = realism.removeprefix("realism/")
    axes.set_xlabel(f"Fréchet distance {named} to held-out frames (lower is more realistic)")
    axes.set_ylabel("mean Dice on held-out frames, 95 % interval")
    extra = ceiling(axes, rows, score)
    scatter(axes, used, rows, realism, score)
    legend(axes, rows, steps=len(used) <= 16, extra=extra)
    _below(axes, correlation.text())
    caption = f"{correlation.text()}. {claim_text(correlation, num_measures)}"
    name = "realism_dice" if realism == "fd_lite0" else f"realism_dice_{named.removeprefix('fd_')}"
    return FigureOf(name, "Realism against Dice", caption, figure, _points(used, realism, score))


def cost_bars(rows: Sequence[Row], parts: Mapping[str, str], unit: str, name: str = "cost_bars") -> FigureOf | None:
    """What each set cost, stacked by `parts` (row key → what it is called); None when no row has any part."""
    used = [r for r in rows if is_generated(r) and any(number(r, k) for k in parts)]
    if not used:
        return None
    figure, axes = new_axes("What a training set cost", height=1.6 + 0.34 * len(used))
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
    figure, axes = new_axes(title)
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
    figure, axes = new_axes("Search: score against cost of a trial")
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
