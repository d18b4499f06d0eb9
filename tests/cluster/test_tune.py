"""The search on a real Ray: finished trials survive kill -9, the front, the space, leaks."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysyn.cluster.compare import compare
from raysyn.cluster.tune_search import _refit, pareto_front
from raysyn.compose import load_job
from raysyn.config import TaskConfig
from raysyn.data.frames import write_frames
from raysyn.data.phantom import phantom_patient
from raysyn.data.storage import Storage
from raysyn.types import UserError
from tests.processes import kill_driver

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("kind", "arch"), [("segmentation", "unet:small"), ("classification", "cnn:small")])
def test_a_refit_is_scored_on_the_test_frames(tmp_path, kind: str, arch: str) -> None:
    storage = Storage.at(tmp_path)
    for patient, split in enumerate(("train", "validation", "test")):
        write_frames(storage, f"{split}/shard-00000.parquet", phantom_patient(0, patient, 32, split))
    task = TaskConfig(kind=kind, arch=arch, width=2, num_steps=2, batch_size=4)
    scores = _refit(task, {"sets": [storage.uri], "real": storage.uri}, {})
    assert all(-1 <= score <= 1 for score in scores)
    again = _refit(task, {"sets": [storage.uri], "real": storage.uri}, {})
    assert scores == again


def test_a_study_of_rows_that_cannot_work_is_refused_before_any_work(tmp_path) -> None:
    for override, says in (
        ("data.image_size=66", r"data\.image_size: 66 is not a multiple"),
        ("search.space.lr.low=a", r"search\.space\.lr: Value 'a'"),
        ("search.optuna_url=nonsense", r"search\.optuna_url: cannot open"),
        ("extractors=[resnet18=a.pt,resnet18=b.pt]", "extractors: two are resnet18"),
        ("segmentation.arch=unet:nothing", r"task\.arch: 'unet:nothing' is not known"),
        ("search.space.arch={choices: [unet:small, unet:none]}", r"task\.arch: 'unet:none' is not known"),
        ("classification.weights=/no/such.pt", r"task\.weights: no file"),
    ):
        more = ["classification.arch=tf_efficientnet_lite0"] if "weights" in override else []
        with pytest.raises(UserError, match=says):
            compare(load_job("compare", ["scale=tiny", f"storage={tmp_path}", override, *more]))
        assert not list(tmp_path.rglob("*.json")), "nothing was begun"


def test_the_front_holds_what_nothing_beats_at_full_budget() -> None:
    def trial(name: str, score: float, cost: float, iterations: int = 5) -> dict:
        return {"trial": name, "score": score, "cost": cost, "iterations": iterations}

    trials = [trial("cheap", 0.8, 1), trial("good", 0.9, 5), trial("beaten", 0.85, 6), trial("stopped", 0.95, 0.1, 1)]
    assert [t["trial"] for t in pareto_front(trials)] == ["cheap", "good"]


@pytest.mark.cluster
def test_killed_and_started_again_finished_trials_are_not_repeated(tmp_path) -> None:
    overrides = ["task=segmentation", "search.num_trials=4", "search.max_concurrent=1", "task.num_steps=150"]
    command = [
        sys.executable,
        "jobs/tune.py",
        "scale=tiny",
        f"storage={tmp_path}",
        "tracking.enabled=false",
        *overrides,
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    options = dict(
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )

    def finished() -> list[float]:
        """Learning rates of the trials that Optuna's study holds as complete (read only: the job makes the tables)."""
        files = list(tmp_path.glob("tune/*/optuna.db"))
        query = (
            "select p.param_value from trials t join trial_params p using (trial_id) "
            "where t.state = 'COMPLETE' and p.param_name = 'lr'"
        )
        try:
            with contextlib.closing(sqlite3.connect(f"file:{files[0]}?mode=ro", uri=True)) as study:
                return [value for (value,) in study.execute(query)]
        except (IndexError, sqlite3.OperationalError):  # not made yet
            return []

    first = subprocess.Popen(command, **options)
    deadline = time.time() + 300
    while not finished():
        assert time.time() < deadline, "no trial finished"
        assert first.poll() is None, first.stdout.read()[-3000:]
        time.sleep(0.2)
    deadline = time.time() + 11  # Ray Tune writes its own state every ten seconds
    while time.time() < deadline and len(finished()) < 3:
        time.sleep(0.1)
    kill_driver(first)
    before = finished()
    assert len(before) < 4, "the search ended before it could be killed"
    second = subprocess.Popen(command, **options)
    said, _ = second.communicate(timeout=500)
    assert second.returncode == 0, said[-3000:]
    manifest = json.loads(next(tmp_path.glob("tune/*/manifest.json")).read_text())
    assert manifest["num_trials"] == 4
    assert manifest["best_score"] == max(t["score"] for t in manifest["trials"])
    assert len(manifest["refits"]) == len(manifest["refit_tests"]) == 1
    assert 0 <= manifest["refit_test_mean"] <= 1
    tried = [t["params"]["lr"] for t in manifest["trials"]]
    assert before[0] in tried
    assert finished().count(before[0]) == 1
