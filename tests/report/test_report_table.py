"""The table: fixed columns, names for MLflow, and what people see."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from raysyn.report.table import (
    COLUMNS,
    best_rows,
    display_cell,
    full_columns,
    interval_text,
    number,
    print_table,
    row_kind,
    row_metrics,
    row_name,
    write_tables,
)

CEILING = {"trained_on": "phantom", "mean_dice": 0.96, "view_accuracy": 0.99, "fd_lite0": 12.0}
LATENT = {
    "trained_on": "synthetic",
    "model": "edm_l128",
    "space": "latent",
    "solver": "dpmpp_2m",
    "num_steps": 5,
    "num_function_evals": 5,
    "seconds_per_image": 0.0412345678,
    "fd_lite0": 80.0,
    "lv_endo_dice": 0.95,
    "mean_dice": np.float64(0.94),
    "mean_dice_low": 0.93,
    "mean_dice_high": 0.95,
    "la_dice": math.nan,
    "realism/kd_lite0": 0.1,
    "cost/usd": None,
}
PIXEL = {**LATENT, "model": "edm", "space": "pixel", "seconds_per_image": 0.2, "mean_dice": 0.93996, "fd_lite0": 60.0}
CONTROL = {"trained_on": "synthetic", "model": "reconstruction", "space": "latent", "mean_dice": 0.999}
ROWS = [CEILING, LATENT, PIXEL, CONTROL]


def test_the_csv_has_the_published_columns_and_empty_cells_for_what_was_not_measured(tmp_path: Path) -> None:
    short, full = write_tables(tmp_path / "report", ROWS)
    rows = list(csv.DictReader(short.open()))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 4
    assert rows[1]["seconds_per_image"] == "0.0412346"
    assert rows[1]["la_dice"] == ""
    assert rows[0]["model"] == ""
    wide = list(csv.DictReader(full.open()))
    assert tuple(wide[0]) == tuple(full_columns(ROWS))
    assert tuple(wide[0])[: len(COLUMNS)] == COLUMNS
    assert wide[1]["realism/kd_lite0"] == "0.1"


def test_metrics_have_mlflows_sections_and_leave_out_what_is_absent() -> None:
    assert row_metrics(LATENT) == {
        "cost/num_function_evals": 5.0,
        "cost/sample_seconds_per_image": 0.0412345678,
        "realism/fd_lite0": 80.0,
        "realism/kd_lite0": 0.1,
        "task/lv_endo_dice": 0.95,
        "task/mean_dice": 0.94,
        "task/mean_dice_low": 0.93,
        "task/mean_dice_high": 0.95,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (0.5, 0.5),
        (np.float32(2), 2.0),
        (None, None),
        (math.nan, None),
        (math.inf, None),
        ("3", None),
        (True, None),
    ],
)
def test_numbers_are_finite_or_none(value: object, expected: float | None) -> None:
    assert number({"x": value}, "x") == expected


def test_the_best_generated_row_is_marked_and_ties_with_it() -> None:
    assert best_rows(ROWS, "mean_dice") == {1, 2}, "0.940 and 0.93996 read the same"
    assert best_rows(ROWS, "fd_lite0") == {2}
    assert best_rows(ROWS, "seconds_per_image") == {1}
    assert best_rows(ROWS, "model") == set()
    assert best_rows(ROWS[:2], "mean_dice") == set(), "one row has nothing to be compared with"


def test_kinds_of_rows() -> None:
    kinds = [row_kind(r) for r in [*ROWS, {**CONTROL, "trained_on": "control"}, {"trained_on": "real"}]]
    assert kinds == ["ceiling", "generated", "generated", "control", "control", "ceiling"]


def test_cells_read_well() -> None:
    assert display_cell(LATENT, "mean_dice") == "0.940"
    assert [display_cell({"fd_lite0": v}, "fd_lite0") for v in (123.456, 12.3456, 0.5, 0.00001, 0)] == [
        "123",
        "12.3",
        "0.500",
        "1.0e-05",
        "0",
    ]
    assert display_cell(LATENT, "la_dice") == "–"
    assert interval_text(LATENT, "mean_dice") == "0.930–0.950"
    assert (row_name(LATENT), row_name(CEILING)) == ("edm_l128 dpmpp_2m 5", "phantom")


def test_the_terminal_table_fits_120_columns(capsys: pytest.CaptureFixture[str]) -> None:
    wide = {**LATENT, "model": "edm_l128", "solver": "stochastic_heun", "num_steps": 200, "num_function_evals": 399}
    print_table([*ROWS, wide])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    shown = next(line for line in lines if "stochastic_heun" in line)
    assert " ".join(shown.split()) == (
        "synthetic edm_l128 latent stochastic_heun 200 399 0.0412 80.0 0.950 – – 0.940 –"
    )
