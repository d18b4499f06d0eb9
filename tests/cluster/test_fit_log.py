"""A model that MLflow did not take at its fit's end is logged later, once, and only where that costs nothing."""

import socket
from pathlib import Path

import pytest

from raysyn.cluster import fit_log
from raysyn.cluster.fit_log import LOGGED, log_missing
from raysyn.cluster.stage import open_stage
from raysyn.compose import load_job
from raysyn.data.frames import write_frames
from raysyn.data.phantom import phantom_patient
from raysyn.data.storage import Storage
from raysyn.tracking import Tracker


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Folders of the models that MLflow was given."""
    given: list[str] = []
    tracker = Tracker.disabled()
    monkeypatch.setattr(tracker, "uri", "http://x", raising=False)
    monkeypatch.setattr(tracker, "wait_run_id", lambda: "run")
    monkeypatch.setattr(fit_log.Tracker, "start", lambda *_, **__: tracker)
    monkeypatch.setattr("raysyn.tracking.model.log_model", lambda uri, run, folder, example: given.append(str(folder)))
    return given


def test_a_model_that_mlflow_did_not_take_is_logged_when_its_stage_is_asked_for(tmp_path: Path, taken) -> None:
    write_frames(Storage.at(tmp_path / "frames"), "train/shard-00000.parquet", phantom_patient(0, 0, 32, "train"))
    stage = open_stage(str(tmp_path), "fit", "0" * 16)
    entries = {"frames": str(tmp_path / "frames"), "model_dir": f"{stage.path}/model"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        here, nobody = (f"tracking.uri=http://127.0.0.1:{port}" for port in (server.getsockname()[1], 9))
        for logged, override, count in (
            (True, here, 0),
            (None, here, 0),  # of a fit that logged nothing
            (False, "tracking.enabled=false", 0),
            (False, nobody, 0),
            (False, here, 1),
        ):
            stage.finish({**entries, **({} if logged is None else {LOGGED: logged})})
            job = load_job("fit", ["scale=tiny", "model=edm", f"storage={tmp_path}", override])
            log_missing(job, stage.outcome())
            assert len(taken) == count, override
        assert taken == [f"{stage.path}/model"]
        log_missing(job, stage.outcome())
        assert len(taken) == 1, "once"
