"""The study's table: a CSV with fixed columns, a fuller one, MLflow's metric names, and the terminal's view.

A row is a dict: the columns below, then any further numbers under MLflow's names (`cost/*`, `realism/*`, `task/*`).
The 95 % interval of a number `x` is `x_low`, `x_high` beside it. None and NaN mean "not measured" and are left empty.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "trained_on",
    "model",
    "space",
    "solver",
    "num_steps",
    "num_function_evals",
    "seconds_per_image",
    "fd_lite0",
    "lv_endo_dice",
    "lv_epi_dice",
    "la_dice",
    "mean_dice",
    "view_accuracy",
)
METRIC_NAMES = {
    "num_function_evals": "cost/num_function_evals",
    "seconds_per_image": "cost/sample_seconds_per_image",
    "fd_lite0": "realism/fd_lite0",
    "lv_endo_dice": "task/lv_endo_dice",
    "lv_epi_dice": "task/lv_epi_dice",
    "la_dice": "task/la_dice",
    "mean_dice": "task/mean_dice",
    "view_accuracy": "task/view_accuracy",
}
HIGHER_IS_BETTER = {"lv_endo_dice", "lv_epi_dice", "la_dice", "mean_dice", "view_accuracy"}
LOWER_IS_BETTER = {"seconds_per_image", "fd_lite0"}
HEADINGS = {
    "trained_on": "trained on",
    "num_steps": "steps",
    "num_function_evals": "evals",
    "seconds_per_image": "s/img",
    "fd_lite0": "FD lite0",
    "lv_endo_dice": "LV endo",
    "lv_epi_dice": "LV epi",
    "la_dice": "LA",
    "mean_dice": "mean Dice",
    "view_accuracy": "view",
}
Row = Mapping[str, Any]


def number(row: Row, key: str) -> float | None:
    """A row's finite number under `key`; None when it is absent, None, NaN or not a number."""
    found: Any = row.get(key)
    if isinstance(found, bool) or (not isinstance(found, (int, float)) and not hasattr(found, "item")):
        return None
    value = float(found)
    return value if math.isfinite(value) else None


def row_name(row: Row) -> str:
    """A short name for a row: `edm_l128 dpmpp_2m 5`; the set that it was trained on when there is no model."""
    parts = [row.get("model"), row.get("solver"), row.get("num_steps")]
    return " ".join(str(p) for p in parts if p not in (None, "")) or str(row.get("trained_on", ""))


def row_kind(row: Row) -> str:
    """ "ceiling" (trained on real or phantom frames), "generated" (images that a sampler drew) or "control"."""
    if row.get("trained_on") == "synthetic" and row.get("solver"):
        return "generated"
    return "control" if row.get("trained_on") in ("synthetic", "control", None) else "ceiling"


def is_generated(row: Row) -> bool:
    """The row is of images that a sampler drew: neither the ceiling nor a control."""
    return row_kind(row) == "generated"


def frechet_keys(rows: Sequence[Row]) -> list[str]:
    """The rows' keys of a Fréchet distance to held-out frames, one an extractor, the table's own first."""
    found = {key for row in rows for key in row if re.fullmatch(r"(realism/)?fd_[\w.]+", key)}
    return sorted(
        (k for k in found if not k.endswith(("_baseline", "_low", "_high", "_sd"))), key=lambda k: ("/" in k, k)
    )


def row_metrics(row: Row) -> dict[str, float]:
    """A row's numbers under the names that MLflow's charts group by: `cost/*`, `realism/*`, `task/*`."""
    named: dict[str, float] = {}
    for key in row:
        base, low_or_high = _split_interval(key)
        name = METRIC_NAMES.get(base, base)
        value = number(row, key)
        if value is not None and "/" in name:
            named[name + low_or_high] = value
    return named


def _split_interval(key: str) -> tuple[str, str]:
    for ending in ("_low", "_high", "_sd"):
        if key.endswith(ending):
            return key.removesuffix(ending), ending
    return key, ""


def table_csv(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as CSV text with just `columns`, numbers to six digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[csv_cell(row.get(c)) for c in columns] for row in rows])
    return out.getvalue()


def full_columns(rows: Sequence[Row]) -> list[str]:
    """Every key of the rows: the fixed columns first, then the rest in order of appearance."""
    seen = dict.fromkeys(key for row in rows for key in row)
    return [*COLUMNS, *(key for key in seen if key not in COLUMNS)]


def csv_cell(value: Any) -> str:
    """One CSV cell: six digits for floats, nothing for None and NaN."""
    if value is None:
        return ""
    if isinstance(value, float) or hasattr(value, "dtype"):
        return "" if not math.isfinite(float(value)) else f"{float(value):.6g}"
    return str(value)


def write_tables(folder: str | Path, rows: Sequence[Row]) -> list[Path]:
    """Write `table.csv` (the fixed columns) and `table_full.csv` (everything known) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    short, full = folder / "table.csv", folder / "table_full.csv"
    short.write_text(table_csv(rows), encoding="utf-8")
    full.write_text(table_csv(rows, full_columns(rows)), encoding="utf-8")
    return [short, full]


def display_cell(row: Row, key: str) -> str:
    """One cell as people read it: three decimals for scores, three digits for seconds and distances, – for nothing."""
    value = row.get(key)
    if value is None or value == "":
        return "–"
    if key in HIGHER_IS_BETTER or key in LOWER_IS_BETTER:
        found = number(row, key)
        if found is None:
            return "–"
        return f"{found:.3f}" if key in HIGHER_IS_BETTER else _three_digits(found)
    return str(value)


def _three_digits(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def best_rows(rows: Sequence[Row], key: str) -> set[int]:
    """Indices of the best generated rows in one column, ties as shown; none when there is nothing to choose between."""
    found = {i: v for i, row in enumerate(rows) if is_generated(row) and (v := number(row, key)) is not None}
    if len(found) < 2 or (key not in HIGHER_IS_BETTER and key not in LOWER_IS_BETTER):
        return set()
    top = (max if key in HIGHER_IS_BETTER else min)(found, key=lambda i: found[i])
    shown = display_cell(rows[top], key)
    return {i for i in found if display_cell(rows[i], key) == shown}


def interval_text(row: Row, key: str) -> str:
    """The 95 % interval of a score as `0.921–0.934`, or nothing."""
    low, high = number(row, f"{key}_low"), number(row, f"{key}_high")
    return "" if low is None or high is None else f"{low:.3f}–{high:.3f}"


def print_table(rows: Sequence[Row], title: str = "", width: int = 120) -> None:
    """Print the table for people: at most `width` columns, the best generated row of each column in bold."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        text = column in ("trained_on", "model", "space", "solver")
        table.add_column(HEADINGS.get(column, column), justify="left" if text else "right", no_wrap=column != "model")
    best = {column: best_rows(rows, column) for column in COLUMNS}
    for i, row in enumerate(rows):
        cells = [display_cell(row, column) for column in COLUMNS]
        bold = [f"[bold]{cell}[/bold]" if i in best[column] else cell for cell, column in zip(cells, COLUMNS)]
        last = i + 1 == len(rows) or row_kind(row) != row_kind(rows[i + 1])
        table.add_row(*bold, end_section=last)
    Console(width=width, highlight=False).print(table)
