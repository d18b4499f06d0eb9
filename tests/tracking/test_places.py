"""Where runs are logged, and that a database is made once and whole."""

import subprocess
import sys
from pathlib import Path

import pytest

from raysyn.config import TrackingConfig
from raysyn.tracking import tracking_uri
from raysyn.tracking.__main__ import main
from raysyn.tracking.places import artifact_location, has_schema, open_client
from raysyn.tracking.server import find_database
from raysyn.types import UserError
from tests.tracking.runs import ON


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
    code = f"from raysyn.tracking.places import open_client; open_client({uri!r})"
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate(timeout=200)[1] for p in started] == [b"", b""]
    assert has_schema(uri)
    assert (tmp_path / "50%20 ?" / "mlflow.db").is_file()


def test_the_pages_need_a_database(tmp_path: Path, capsys, storage: str) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"")
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path) in message
    assert find_database(Path(storage).parent) == Path(storage) / "mlflow.db"


def test_a_database_that_cannot_be_read_is_named(tmp_path: Path, capsys) -> None:
    damaged = tmp_path / "b" / "mlflow.db"
    damaged.parent.mkdir()
    damaged.write_bytes(bytes(range(256)) * 20)
    assert main([str(tmp_path)]) == 2
    assert f"{damaged}: cannot be read as an MLflow database" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "-5", "70000"])
def test_a_port_that_is_none(port: str, storage: str, capsys) -> None:
    assert main([storage, f"--port={port}"]) == 2
    assert capsys.readouterr().err == f"error: --port: {port} is no port; give one of 1 to 65535\n"


def test_a_server_that_cannot_start_is_one_line(storage: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/no/such")  # no Python starts with it
    assert main([storage]) == 1
    assert capsys.readouterr().err == "error: the MLflow server ended at once with exit code 1\n"
