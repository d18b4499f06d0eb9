"""A study in MLflow: a run for each row of its table, the report beside them, and a view that compares the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from raysyn.config import TrackingConfig
from raysyn.report.axes import PALETTE
from raysyn.report.table import COLUMNS, METRIC_NAMES, Row, frechet_keys, row_kind, row_metrics, row_name
from raysyn.tracking.places import open_client
from raysyn.tracking.tracker import Tracker

KIND_TAG, VIEW_KEY = "raysyn.kind", "study"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
ROWS_AT_ONCE = 4  # each run has a connection of its own, and MLflow's pool holds fifteen
ROW_PARAMS = ("trained_on", "model", "space", "solver", "num_steps")
SCORES, COST = ("task/mean_dice", "task/view_accuracy"), "cost/sample_seconds_per_image"


def log_study(
    config: TrackingConfig,
    storage: str,
    rows: Sequence[Row],
    *,
    fingerprint: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    report_folder: str | Path | None = None,
) -> int:
    """Log every row of a study as a run of its own, with `cost/*`, `realism/*` and `task/*` metrics; then the report.

    What a row says of realism in words (extractor, its hash, preprocessing, splits) are its params. The runs stand
    beside each other, not below the study's: MLflow's charts leave folded children out. Logged again, the same study
    goes on in the same runs. `params` is the resolved config. Returns how many entries were dropped.
    """
    if not config.enabled:
        return 0
    tags = {**(tags or {}), "fingerprint": fingerprint}
    dropped = 0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        runs = []
        for number, row in enumerate(rows[first : first + ROWS_AT_ONCE], first):
            words = [key for key, value in row.items() if key.startswith("realism/") and isinstance(value, str)]
            own = {key: row[key] for key in (*ROW_PARAMS, *words) if row.get(key) not in (None, "")}
            name = row_name(row)
            colour = PALETTE[number % len(PALETTE)]  # MLflow's own choice gives two runs one colour
            kind = {KIND_TAG: "control" if row_kind(row) == "control" else "row", "mlflow.runColor": colour}
            run = Tracker.start(config, storage, name, own, {**tags, **kind}, key=f"{fingerprint}/{name}")
            run.log_metrics(row_metrics(row))
            runs.append(run)
        dropped += _finish_all(runs, patient=not dropped)
    study = Tracker.start(config, storage, "study", params, {**tags, KIND_TAG: "study"}, key=f"{fingerprint}/study")
    if report_folder is not None:
        study.log_artifact(report_folder, "report")
    study.on_server("the study's view", partial(_save_view, [METRIC_NAMES.get(k, k) for k in frechet_keys(rows)]))
    return dropped + _finish_all([study], patient=not dropped)


def _finish_all(runs: Sequence[Tracker], *, patient: bool) -> int:
    """Finish side by side; once the server was found to be away, nothing more waits for it."""
    for run in runs:
        run.close()
    dropped = 0
    for run in runs:
        dropped += run.finish(timeout_s=60.0 if patient and not dropped else 1.0)
    return dropped


def view_state(realism: Sequence[str]) -> dict[str, Any]:
    """What MLflow's runs page shows under the view `study`: the table's columns, and cost and realism against Dice.

    `realism`: the metrics that measure it, one an extractor.
    """
    # Dice along the page: MLflow leaves the numbers at a chart's side too little room for its digits.
    scattered = [(SCORES[0], second) for second in (COST, *realism)]
    chosen = [f"params.`{p}`" for p in ROW_PARAMS] + [
        f"metrics.`{METRIC_NAMES[c]}`" for c in COLUMNS if c in METRIC_NAMES
    ]
    charts = []
    for i, (first, second) in enumerate([*scattered, *((name, "") for name in (COST, *realism, *SCORES))]):
        chart: dict[str, Any] = {
            "uuid": f"chart-{i}",
            "metricSectionId": "study",
            "deleted": False,
            "isGenerated": False,
        }
        if second:
            axes = {axis: {"key": key, "type": "METRIC"} for axis, key in (("xaxis", first), ("yaxis", second))}
            chart |= {"type": "SCATTER", "runsCountToCompare": 100, **axes}
        else:
            chart |= {"type": "BAR", "runsCountToCompare": 100, "metricKey": first, "displayName": first}
        charts.append(chart)
    section = {"uuid": "study", "name": "The study", "display": True, "isReordered": False, "deleted": False}
    section |= {"columns": 2, "cardHeight": 400}  # three beside each other cut the charts' names off
    return {
        "searchFilter": f"tags.`{KIND_TAG}` = 'row'",
        "orderByKey": "metrics.`task/mean_dice`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": chosen,
        "compareRunCharts": charts,
        "compareRunSections": [{**section, "isGenerated": False}],
        "isAccordionReordered": True,  # keeps this section first
        "hideEmptyCharts": True,
        "runsHiddenMode": "SHOWALL",
    }


def _save_view(realism: Sequence[str], client: Any, run_id: str) -> None:
    experiment = client.get_run(run_id).info.experiment_id
    client.set_experiment_tag(experiment, VIEW_TAG, json.dumps(view_state(realism)))


def view_path(experiment_id: str, *, charts: bool = True) -> str:
    """Path and query of the page that compares a study's rows, on any MLflow server that holds it."""
    mode = "CHART" if charts else "TABLE"
    query = f"workflowType=machine_learning&compareRunsMode={mode}&viewStateShareKey={VIEW_KEY}"
    return f"/#/experiments/{experiment_id}/runs?{query}"


def studies(uri: str) -> dict[str, list[str]]:
    """Experiments that hold a study → the ids of its row runs."""
    client = open_client(uri)
    found = {}
    for experiment in client.search_experiments():
        if VIEW_TAG in experiment.tags:
            runs = client.search_runs([experiment.experiment_id], f"tags.`{KIND_TAG}` = 'row'", max_results=1000)
            found[experiment.experiment_id] = [run.info.run_id for run in runs]
    return found
