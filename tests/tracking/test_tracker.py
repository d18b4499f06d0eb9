"""Runs logged in the background: what arrives, and in which form."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raysyn.config import CompareJob, TrackingConfig, to_dict
from raysyn.tracking import Tracker, flatten, git_commit, log_study, places
from raysyn.tracking.entries import MAX_KEY, MAX_VALUE, is_final
from raysyn.tracking.places import open_client
from tests.tracking.runs import ON, run_of


def test_params_are_flat_and_within_mlflows_limits() -> None:
    config = to_dict(CompareJob())
    config["models"] = [{"name": "edm", "net": {"width": 3}}, {"name": "vp", "net": {"width": 4}}]
    flat = flatten(config)
    assert flat["data.image_size"] == "256"
    assert flat["steps"] == "[5, 10, 25, 50, 100, 200]"
    assert flat["models.vp.net.width"] == "4"
    assert flat["synthesize.warp.elastic_px"] == "30.0"
    long = flatten({"k" * 300: "v" * 900, "k" * 299 + "x": None, "a?b": {}})
    assert all(len(k) <= MAX_KEY and len(v) <= MAX_VALUE for k, v in long.items())
    assert len(long) == 3
    assert long["a_b"] == "{}"


def test_the_commit_is_the_checkouts_or_what_an_image_was_built_from(tmp_path: Path, monkeypatch) -> None:
    def git(*command: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        return subprocess.run(["git", *identity, *command], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    assert (places.ROOT / "raysyn" / "tracking" / "places.py").is_file()
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setenv("RAYSYN_GIT_COMMIT", "of the submitter")
    assert git_commit() == "of the submitter"
    (tmp_path / "commit").write_text("of the image\n")
    assert git_commit() == "of the image"
    git("init")
    git("commit", "--allow-empty", "-m", "x")
    assert git_commit() == git("rev-parse", "HEAD") != ""


def test_everything_logged_arrives(storage: str, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("card")
    with Tracker.start(ON, storage, "row", {"model": {"name": "edm"}}, {"fingerprint": "ab"}) as logged:
        for step in range(2500):
            logged.log_metrics({"loss/low_sigma": 1 / (step + 1)}, step)
        logged.log_metrics({"cost/x": 2.0, "task/absent": None, "odd?name": 1.0})
        logged.log_image("grid", np.zeros((8, 8), np.uint8), step=3)
        logged.log_image("report/hero", np.zeros((8, 8, 3), np.uint8))
        logged.log_artifact(tmp_path / "card.md", "cards")
    assert logged.dropped == 0
    run, client = run_of(logged), open_client(logged.uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "row"
    assert run.data.params == {"model.name": "edm"}
    assert run.data.metrics == {"loss/low_sigma": 1 / 2500, "cost/x": 2.0, "odd_name": 1.0}
    assert [m.step for m in client.get_metric_history(logged.run_id, "loss/low_sigma")] == list(range(2500))
    assert run.data.tags["fingerprint"] == "ab"
    assert run.data.tags.get("mlflow.source.git.commit", "") == git_commit()
    names = {
        a.path for folder in ("", "pictures/report", "cards") for a in client.list_artifacts(run.info.run_id, folder)
    }
    assert {"config.json", "images", "cards/card.md", "pictures/report/hero.png"} <= names
    assert run.info.artifact_uri.startswith((Path(storage) / "mlartifacts").as_uri())


def test_after_its_end_a_run_takes_nothing_as_one_that_is_disabled(storage: str, tmp_path: Path) -> None:
    ended = Tracker.start(ON, storage, "fit")
    assert ended.finish() == 0
    for closed in (ended, Tracker.disabled(), Tracker.start(TrackingConfig(enabled=False), storage, "fit", {"lr": 1})):
        closed.log_metrics({"late": 1.0}, 1)
        closed.log_params({"late": 1})
        closed.log_image("late", np.zeros((8, 8), np.uint8))
        closed.log_artifact(tmp_path / "absent")
        with closed:
            closed.close()
        assert (closed.finish("FAILED"), closed.dropped, closed._queued()) == (0, 0, 0)
    assert Tracker.disabled().wait_run_id() is None
    run = run_of(ended)
    assert (run.info.status, run.data.metrics, run.data.params) == ("FINISHED", {}, {})


def test_the_same_run_goes_on_by_key_and_by_id(storage: str) -> None:
    first = Tracker.start(ON, storage, "fit", {"lr": 1}, key="fit-1")
    first.log_metrics({"loss": 3.0}, 1)
    first.finish("KILLED")
    assert run_of(first).info.status == "KILLED"
    second = Tracker.start(ON, storage, "fit", {"lr": 2, "new": 1}, {"fingerprint": "ab"}, key="fit-1")
    second.log_metrics({"loss": 2.0}, 2)
    assert second.finish() == 0
    third = Tracker.start(ON, storage, "fit", run_id=first.run_id)
    third.log_metrics({"loss": 1.0}, 3)
    assert third.finish() == 0
    assert first.run_id == second.run_id == third.run_id
    run = run_of(first)
    assert run.data.params == {"lr": "1", "new": "1"}, "a param keeps its first value"
    assert run.data.tags["fingerprint"] == "ab", "a tag takes its last"
    history = open_client(first.uri).get_metric_history(first.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert run.info.status == "FINISHED"


def test_children_hang_below_their_parent_and_an_error_marks_the_run(storage: str) -> None:
    parent = Tracker.start(ON, storage, "study")
    with pytest.raises(ZeroDivisionError), Tracker.start(ON, storage, "row", parent_run_id=parent.wait_run_id()) as row:
        _ = 1 / 0
    parent.finish()
    assert run_of(row).data.tags["mlflow.parentRunId"] == parent.run_id
    assert run_of(row).info.status == "FAILED"


def test_several_writers_share_one_sqlite_database(storage: str) -> None:
    writers = [Tracker.start(ON, storage, f"writer {i}") for i in range(4)]
    for step in range(1500):
        for i, writer in enumerate(writers):
            writer.log_metrics({"x": i + step}, step)
    assert [w.finish() for w in writers] == [0] * 4
    client = open_client(writers[0].uri)
    for i, writer in enumerate(writers):
        history = client.get_metric_history(writer.run_id, "x")
        assert [m.value for m in history] == [i + step for step in range(1500)]


def test_nothing_is_logged_when_tracking_is_off(tmp_path: Path) -> None:
    logged = Tracker.start(TrackingConfig(enabled=False), "s3://no/place", "row", {"a": 1})
    logged.log_metrics({"x": 1.0})
    logged.log_params({"b": 1})
    logged.log_image("grid", np.zeros((4, 4), np.uint8))
    assert logged.wait_run_id() is None
    assert logged.finish() == 0


def test_final_errors_are_told_from_passing_ones() -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE

    assert is_final(MlflowException("x", INVALID_PARAMETER_VALUE))
    assert is_final(MlflowException("x", PERMISSION_DENIED))
    assert not is_final(MlflowException("x", TEMPORARILY_UNAVAILABLE))
    assert not is_final(MlflowException("API request failed"))
    assert not is_final(ConnectionError())
    assert is_final(FileNotFoundError())


def test_importing_the_room_does_not_import_mlflow() -> None:
    code = "import sys, raysyn.tracking, raysyn.tracking.server, raysyn.report; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_study_of_many_rows_reaches_the_database(tmp_path: Path) -> None:
    rows = [
        {"trained_on": "synthetic", "model": f"m{i}", "solver": "heun", "num_steps": 5, "mean_dice": i / 40}
        for i in range(24)
    ]
    assert log_study(ON, str(tmp_path), rows, fingerprint="ab") == 0
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        found = database.execute("select value from metrics where key = 'task/mean_dice' order by value").fetchall()
    assert [value for (value,) in found] == [i / 40 for i in range(24)]
