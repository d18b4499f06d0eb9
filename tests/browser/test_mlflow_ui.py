"""MLflow's own pages in a real browser: the rows' metrics stand in the runs table, the charts and the compare page."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from benchmarks.mlflow_screenshot import browser_page, mlflow_pages, open_study
from raysyn.config import TrackingConfig
from raysyn.tracking import log_study
from raysyn.tracking.places import open_client
from raysyn.tracking.study import studies

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here (apt-get install chromium)"),
]

SCORES = {("edm", 5): 0.931, ("edm", 8): 0.942, ("edm_l128", 5): 0.939, ("edm_l128", 8): 0.941}


def rows() -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = [
        {"trained_on": "phantom", "fd_lite0": 12.5, "mean_dice": 0.961, "view_accuracy": 0.99}
    ]
    for (model, num_steps), dice in SCORES.items():
        table.append(
            {"trained_on": "synthetic", "model": model, "space": "latent" if "_l" in model else "pixel"}
            | {"solver": "dpmpp_2m", "num_steps": num_steps, "num_function_evals": num_steps}
            | {"seconds_per_image": num_steps / (30 if "_l" in model else 10), "fd_lite0": 130.0 - 6 * num_steps}
            | {"lv_endo_dice": dice + 0.01, "lv_epi_dice": dice, "la_dice": dice - 0.01, "mean_dice": dice}
            | {"view_accuracy": 0.93}
        )
    table.append({"trained_on": "synthetic", "model": "prior", "space": "latent", "fd_lite0": 260.0, "mean_dice": 0.65})
    return table


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, list[str], Path]]:
    folder = tmp_path_factory.mktemp("study")
    config = TrackingConfig(experiment="demo")
    assert log_study(config, str(folder), rows(), fingerprint="0123", params={"scale": "demo"}) == 0
    assert log_study(config, str(folder), rows(), fingerprint="0123", params={"scale": "demo"}) == 0
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    found = studies(uri)
    assert len(found) == 1
    experiment, runs = next(iter(found.items()))
    assert len(runs) == 5, "logging a study again goes on in its runs"
    kinds = [r.data.tags["raysyn.kind"] for r in open_client(uri).search_runs([experiment])]
    assert sorted(kinds) == ["control", "row", "row", "row", "row", "row", "study"]
    with mlflow_pages(folder / "mlflow.db", folder / "server.log") as address:
        yield address, experiment, runs, folder


def test_runs_table_shows_the_measures_of_each_row(study: tuple[str, str, list[str], Path]) -> None:
    address, experiment, _, folder = study
    with browser_page() as page:
        open_study(page, address, experiment, charts=False)
        for name in ("phantom", "edm dpmpp_2m 5", "edm_l128 dpmpp_2m 8"):
            page.get_by_text(name, exact=True).first.wait_for(timeout=60_000)
        for metric in (
            "cost/num_function_evals",
            "cost/sample_seconds_per_image",
            "realism/fd_lite0",
            "task/mean_dice",
        ):
            assert page.get_by_text(metric).count() >= 1, metric
        for dice in SCORES.values():
            assert page.get_by_text(re.compile(f"^{dice}$")).count() >= 1, dice
        assert page.get_by_text("prior", exact=True).count() == 0, "controls are not among the rows"
        page.screenshot(path=folder / "table.png")
    assert (folder / "table.png").stat().st_size > 20_000


def test_charts_plot_cost_and_realism_against_dice(study: tuple[str, str, list[str], Path]) -> None:
    address, experiment, _, folder = study
    with browser_page() as page:
        open_study(page, address, experiment)
        for title in ("task/mean_dice vs. cost/sample_seconds_per_image", "task/mean_dice vs. realism/fd_lite0"):
            page.get_by_text(title).first.wait_for(timeout=60_000)
        points = page.locator(".js-plotly-plot").filter(has_text="cost/sample_seconds_per_image").first
        assert points.locator(".scatterlayer .point").count() == 4, "one point a row that has both measures"
        page.screenshot(path=folder / "charts.png")


def test_compare_page_sets_the_rows_side_by_side(study: tuple[str, str, list[str], Path]) -> None:
    address, experiment, runs, folder = study
    with browser_page() as page:
        chosen = f"runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([experiment]))}"
        page.goto(f"{address}/#/compare-runs?{chosen}")
        page.get_by_text("Comparing 5 Runs from 1 Experiment").wait_for(timeout=120_000)
        page.get_by_text("Run details").wait_for(timeout=60_000)
        for metric in ("cost/sample_seconds_per_image", "realism/fd_lite0", "task/mean_dice", "task/view_accuracy"):
            page.get_by_text(metric).first.wait_for(timeout=60_000)
        for dice in SCORES.values():
            assert page.get_by_text(str(dice)).count() >= 1, dice
        page.get_by_text("Scatter Plot").click()
        for axis, metric in (("x", "cost/sample_seconds_per_image"), ("y", "task/mean_dice")):
            page.locator(f"#{axis}-axis-selector").click()
            page.get_by_role("option", name=metric, exact=True).click()
            page.locator(f".js-plotly-plot .{axis}title").filter(has_text=metric).wait_for(timeout=60_000)
        page.screenshot(path=folder / "compare.png")
