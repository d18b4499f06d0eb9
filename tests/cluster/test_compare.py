"""The study's graph: what each stage waits for, and which set-up a row's task is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raysyn.cluster import task_runs
from raysyn.cluster.compare import SEGMENTER, _run_task, study_nodes, study_rows
from raysyn.compose import load_job
from raysyn.config import JobConfig, TaskConfig
from raysyn.types import Outcome

STUDY = ["scale=tiny", "model=[edm,edm_l128]", "num_task_seeds=2", "curves=true"]


def test_stages_come_after_what_they_need_and_none_is_named_twice() -> None:
    config = load_job("compare", STUDY)
    before: set[str] = set()
    for node in study_nodes(config, study_rows(config)):
        assert set(node.needs) <= before, node.key
        assert node.key not in before
        before.add(node.key)


def test_every_row_has_the_searched_set_up_and_the_judge_waits_for_no_search() -> None:
    config = load_job("compare", STUDY)
    rows = study_rows(config)
    needs = {node.key: node.needs for node in study_nodes(config, rows)}
    assert {row.kind for row in rows} == {"ceiling", "synthetic", "control"}
    for row in rows:
        for seed in range(2):
            assert "tune segmentation" in needs[f"segmentation {row.key} seed {seed}"]
            assert "tune segmentation" not in needs[f"classification {row.key} seed {seed}"]
        assert (SEGMENTER in needs[f"realism {row.key}"]) == (row.kind != "ceiling")
    assert needs[SEGMENTER] == ("prepare",)


@pytest.mark.parametrize(("kind", "trained_on", "threshold"), [("ceiling", "real", 0.0), ("synthetic", "set", 0.6)])
def test_a_row_s_task_has_the_best_trial_s_set_up(
    monkeypatch: pytest.MonkeyPatch, kind: str, trained_on: str, threshold: float
) -> None:
    given: dict[str, Any] = {}

    def run_task(job: JobConfig, task: TaskConfig, sets: list[str], real: str, **more: Any) -> Outcome:
        given.update(task=task, sets=sets, real=real, **more)
        return Outcome("task", "", "", {})

    monkeypatch.setattr(task_runs, "run_task", run_task)
    prepared, drawn = (Outcome("", "", "", {"frames": name}) for name in ("real", "set"))
    searched = Outcome("tune", "", "", {"best_task": {"lr": 0.007}, "best_min_faithfulness": 0.6})
    inputs = (prepared, searched) if kind == "ceiling" else (prepared, drawn, searched)
    _run_task(JobConfig(), TaskConfig(lr=0.001), kind, True, 1.0, *inputs)
    assert given["task"] == replace(TaskConfig(), lr=0.007)
    assert (given["sets"], given["real"], given["min_faithfulness"]) == ([trained_on], "real", threshold)
