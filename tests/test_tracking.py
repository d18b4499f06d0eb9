"""Runs logged in the background: what arrives, what survives an absent server, what is counted as lost."""

import logging
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from raysyn.config import CompareJob, TrackingConfig, to_dict
from raysyn.tracking import Tracker, ensure_database, flatten, git_commit, log_study, places, tracker, tracking_uri
from raysyn.tracking.__main__ import main
from raysyn.tracking.entries import MAX_KEY, MAX_VALUE, is_final
from raysyn.tracking.model import log_model
from raysyn.tracking.places import artifact_location, has_schema, open_client
from raysyn.tracking.server import find_database
from raysyn.types import UserError

ON = TrackingConfig()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("runs") / "study")
    ensure_database(tracking_uri(ON, folder))
    return folder


def run_of(logged: Tracker):
    return open_client(logged.uri).get_run(logged.run_id)


def test_where_runs_are_logged(tmp_path: Path) -> None:
    assert tracking_uri(TrackingConfig(uri="http://m:5000"), "s3://b/x") == "http://m:5000"
    assert tracking_uri(ON, str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(ON, tmp_path.as_uri()) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=r"tracking\.uri: storage is s3://bucket"):
        tracking_uri(ON, "s3://bucket/prefix")
    assert artifact_location("http://m:5000", str(tmp_path)) is None
    assert artifact_location("sqlite:///x.db", str(tmp_path)) == (tmp_path / "mlartifacts").as_uri()
    assert artifact_location("postgresql://x", "s3://bucket/prefix/") == "s3://bucket/prefix/mlartifacts"
    assert artifact_location("postgresql://x", "s3://b/p?region=eu") == "s3://b/p/mlartifacts"


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


def test_a_database_that_was_not_made_to_the_end_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between MLflow's tables and their migrations: what is left would never open again."""
    import mlflow.store.db.utils

    def killed(engine: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow.store.db.utils, "_upgrade_db", killed)
    with pytest.raises(KeyboardInterrupt):
        open_client(tracking_uri(ON, str(tmp_path)))
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_processes_that_make_the_database_at_once_agree(tmp_path: Path) -> None:
    uri = tracking_uri(ON, str(tmp_path / "50%20 ?"))  # a folder's name that a URL would change
    assert not has_schema(uri)
    code = f"from raysyn.tracking import ensure_database; ensure_database({uri!r})"
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate(timeout=200)[1] for p in started] == [b"", b""]
    assert has_schema(uri)
    assert (tmp_path / "50%20 ?" / "mlflow.db").is_file()


def test_nothing_is_logged_when_tracking_is_off(tmp_path: Path) -> None:
    logged = Tracker.start(TrackingConfig(enabled=False), "s3://no/place", "row", {"a": 1})
    logged.log_metrics({"x": 1.0})
    logged.log_params({"b": 1})
    logged.log_image("grid", np.zeros((4, 4), np.uint8))
    assert logged.wait_run_id() is None
    assert logged.finish() == 0


class Server:
    """A stand-in for MLflow's client that is away when told to be."""

    def __init__(self) -> None:
        self.away, self.slow_s, self.refused = False, 0.0, set()
        self.metrics, self.params, self.tags, self.calls = [], {}, {}, []

    def answer(self) -> None:
        time.sleep(self.slow_s)
        if self.away:
            raise ConnectionError("no route to server")

    def get_experiment_by_name(self, name: str):
        self.answer()
        return type("Experiment", (), {"experiment_id": "1"})

    def create_run(self, experiment, tags, run_name):
        self.tags |= tags
        return type("Run", (), {"info": type("Info", (), {"run_id": "r1"})})

    def log_batch(self, run_id, metrics=(), params=(), tags=()) -> None:
        self.answer()
        if any(m.key in self.refused for m in metrics):
            raise ValueError("bad name")
        self.metrics += [(m.key, m.value, m.step) for m in metrics]
        self.params |= {p.key: p.value for p in params}
        self.tags |= {t.key: t.value for t in tags}

    def log_text(self, run_id, text, name) -> None:
        self.answer()
        self.calls.append(name)

    def log_artifact(self, run_id, path, folder) -> None:
        open(path).close()

    def set_terminated(self, run_id, status) -> None:
        self.answer()
        self.calls.append(status)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    away = Server()
    monkeypatch.setattr(tracker, "open_client", lambda uri: away)
    return away


def start(capacity: int = 100_000) -> Tracker:
    return Tracker.start(TrackingConfig(uri="http://127.0.0.1:9"), "unused", "row", capacity=capacity)


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_an_absent_server_gets_everything_when_it_is_back(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.away = True
    logged = start()
    for step in range(3000):
        logged.log_metrics({"loss": float(step)}, step)
    logged.log_params({"a": 1})
    logged.on_server("note", lambda client, run_id: client.log_text(run_id, "text", "note.txt"))
    until(lambda: logged._failures >= 2)
    server.away = False
    until(lambda: len(server.metrics) >= 1000)
    server.away = True  # and goes once more, in the middle
    time.sleep(1.0)
    server.away = False
    assert logged.finish() == 0
    assert server.metrics == [("loss", float(step), step) for step in range(3000)]
    assert server.params == {"a": "1"}
    assert server.calls == ["note.txt", "FINISHED"]
    away = [r for r in caplog.records if "is away" in r.message]
    assert len(away) == 1, "one warning, not one a try"


def test_a_server_that_never_comes_costs_ten_seconds_and_is_told(server: Server, caplog) -> None:
    server.away = True
    logged = start()
    logged.log_metrics({"a": 1.0, "b": 2.0})
    until(lambda: logged._failures >= 1)
    begun = time.monotonic()
    assert logged.finish(timeout_s=60) == 3, "two metrics and the status"
    assert time.monotonic() - begun < 13
    assert logged.wait_run_id() is None, "known at once: nobody is asking the server any more"
    assert time.monotonic() - begun < 14
    assert "3 entries of run row did not reach http://127.0.0.1:9" in caplog.text


def test_logging_never_waits_for_a_slow_server(server: Server) -> None:
    server.slow_s = 0.5
    logged = start()
    begun = time.monotonic()
    for step in range(2000):
        logged.log_metrics({"x": 1.0}, step)
    assert time.monotonic() - begun < 0.5
    assert logged.finish() == 0
    assert len(server.metrics) == 2000


def test_the_buffer_is_bounded_and_keeps_the_newest(server: Server) -> None:
    server.away = True
    logged = start(capacity=50)
    for step in range(80):
        logged.log_metrics({"x": float(step)}, step)
    server.away = False
    assert logged.finish() == 30
    assert [step for _, _, step in server.metrics] == list(range(30, 80))


def test_what_can_never_be_taken_is_counted_and_the_rest_arrives(server: Server, tmp_path: Path, caplog) -> None:
    server.refused = {"bad"}
    logged = start()
    logged.log_metrics({"bad": 1.0})
    until(lambda: logged.dropped == 1)
    logged.log_metrics({"good": 1.0})
    logged.log_artifact(tmp_path / "gone.txt")
    assert logged.finish() == 2
    assert server.metrics == [("good", 1.0, 0)]
    assert server.calls == ["FINISHED"]
    assert "1 entries not taken: ValueError: bad name" in caplog.text


def test_final_errors_are_told_from_passing_ones() -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE

    assert is_final(MlflowException("x", INVALID_PARAMETER_VALUE))
    assert is_final(MlflowException("x", PERMISSION_DENIED))
    assert not is_final(MlflowException("x", TEMPORARILY_UNAVAILABLE))
    assert not is_final(MlflowException("API request failed"))
    assert not is_final(ConnectionError())
    assert is_final(FileNotFoundError())


def test_a_model_is_logged_registered_and_loaded_back(storage: str, tmp_path: Path, monkeypatch) -> None:
    import mlflow

    (tmp_path / "echo_loader.py").write_text(
        "import pathlib\n"
        "class Echo:\n"
        "    def __init__(self, path): self.add = int((pathlib.Path(path) / 'add.txt').read_text())\n"
        "    def predict(self, maps, params=None): return (maps + self.add + params['seed']).astype('uint8')\n"
        "def _load_pyfunc(path): return Echo(path)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "add.txt").write_text("7")
    (folder / "README.md").write_text("# A card")
    with Tracker.start(ON, storage, "fit") as logged:
        run_id = logged.wait_run_id()
        example = np.ones((1, 8, 8), np.uint8)
        for _ in range(2):
            uri = log_model(
                logged.uri, run_id, folder, example=example, registered_name="echo", loader_module="echo_loader"
            )
    client = open_client(logged.uri)
    versions = client.search_model_versions("name = 'echo'")
    assert {v.version for v in versions} == {1, 2}
    assert versions[0].description == "# A card"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(logged.uri)
    try:
        for name in (uri, "models:/echo/2"):
            model = mlflow.pyfunc.load_model(name)
            assert (model.predict(example, params={"seed": 1}) == 9).all()
            assert [p.name for p in model.metadata.signature.params] == ["seed", "num_steps"]
            assert (model.input_example == example).all()
    finally:
        mlflow.set_tracking_uri(before)


def test_the_pages_need_a_database(tmp_path: Path, capsys, storage: str) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"")
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path) in message
    assert find_database(Path(storage).parent) == Path(storage) / "mlflow.db"


def test_importing_the_room_does_not_import_mlflow() -> None:
    code = "import sys, raysyn.tracking, raysyn.tracking.server, raysyn.report; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="raysyn.tracking")


@pytest.mark.slow
def test_a_fitted_model_draws_images_through_mlflow(storage: str, tmp_path: Path) -> None:
    import mlflow
    import torch

    from raysyn.compose import load_model
    from raysyn.models import build_denoiser
    from raysyn.nets.codecs import PixelCodec
    from raysyn.pipeline import load_model_dir, save_model, synthesize_images

    config = load_model("edm", "demo")
    torch.manual_seed(0)
    unet = build_denoiser(config, 32).net
    save_model(tmp_path / "model", unet, unet, PixelCodec(), config, 32)
    semantic = np.full((2, 32, 32), 2, np.uint8)
    semantic[:, :8], semantic[1] = 0, np.where(semantic[1] == 0, 5, 7)
    semantic[1, :8] = 5
    with Tracker.start(ON, storage, "fit") as logged:
        for _ in range(2):  # the second time as a fit that was killed after the first
            log_model(logged.uri, logged.wait_run_id(), tmp_path / "model", example=semantic)
    client = open_client(logged.uri)
    experiment = client.get_run(logged.run_id).info.experiment_id
    (found,) = client.search_logged_models([experiment], f"source_run_id = '{logged.run_id}'")
    assert found.model_id in {output.model_id for output in client.get_run(logged.run_id).outputs.model_outputs}
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(logged.uri)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{found.model_id}")
    finally:
        mlflow.set_tracking_uri(before)
    drawn = model.predict(semantic, params={"seed": 3, "num_steps": 2})
    config.sampler.num_steps = 2
    label_map, view = semantic % 5, np.array([0, 1], np.uint8)
    wanted = synthesize_images(load_model_dir(tmp_path / "model"), label_map, view, [3, 4], config.sampler)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn, wanted)
    assert (drawn[:, :8] == 0).all(), "nothing outside the sector"
    assert drawn[:, 8:].std() > 1, "an unfitted net draws faint noise, not nothing"


def test_a_study_waits_for_an_absent_server_once_not_once_a_row(server: Server) -> None:
    server.away = True
    rows = [
        {"trained_on": "synthetic", "model": f"m{i}", "solver": "heun", "num_steps": 5, "mean_dice": 0.9}
        for i in range(6)
    ]
    begun = time.monotonic()
    dropped = log_study(TrackingConfig(uri="http://127.0.0.1:9"), "unused", rows, fingerprint="ab")
    assert dropped >= 6 * 3, "of each row its metric, params and status"
    assert time.monotonic() - begun < 30


def test_a_study_of_many_rows_reaches_the_database(tmp_path: Path) -> None:
    rows = [
        {"trained_on": "synthetic", "model": f"m{i}", "solver": "heun", "num_steps": 5, "mean_dice": i / 40}
        for i in range(24)
    ]
    assert log_study(ON, str(tmp_path), rows, fingerprint="ab") == 0
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        found = database.execute("select value from metrics where key = 'task/mean_dice' order by value").fetchall()
    assert [value for (value,) in found] == [i / 40 for i in range(24)]
