"""The picture of MLflow's page in the README: `python -m benchmarks.mlflow_screenshot runs/demo`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raysyn.tracking.server import find_database, free_port, start_server, stop_server, wait_until_up
from raysyn.tracking.study import studies, view_path

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# The assistant's pane would take a third of the page.
CLOSE_ASSISTANT = """
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
"""


@contextmanager
def mlflow_pages(database: Path, log_file: Path | None = None) -> Iterator[str]:
    """MLflow's server over a sqlite database, on a free port of loopback; gives its address."""
    port = free_port(5100)
    process = start_server(f"sqlite:///{database.resolve()}", port, log_file=log_file)
    try:
        wait_until_up(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_server(process)


@contextmanager
def browser_page(width: int = 1600, height: int = 1090) -> Iterator[Any]:
    """A page of headless Chromium (Debian's)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context(viewport={"width": width, "height": height})
        context.add_init_script(CLOSE_ASSISTANT)
        try:
            yield context.new_page()
        finally:
            browser.close()


def open_study(page: Any, address: str, experiment: str, *, charts: bool = True) -> None:
    """Go to the study's view and wait until its charts (or its table) are drawn."""
    page.goto(address + view_path(experiment, charts=charts))
    if charts:
        page.get_by_text("The study").first.wait_for(timeout=120_000)
        page.locator(".js-plotly-plot .scatterlayer .point").first.wait_for(timeout=120_000)
        page.locator(".js-plotly-plot .barlayer .point").first.wait_for(timeout=120_000)
    else:
        page.get_by_text("task/mean_dice").first.wait_for(timeout=120_000)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("storage", nargs="?", default="runs/demo")
    parser.add_argument("--out", default="benchmarks/pictures/mlflow.png")
    chosen = parser.parse_args(arguments)
    database = find_database(chosen.storage)
    experiment = max(studies(f"sqlite:///{database.resolve()}"), key=int)
    with mlflow_pages(database) as address, browser_page() as page:
        open_study(page, address, experiment)
        Path(chosen.out).parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=chosen.out)
    print(chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
