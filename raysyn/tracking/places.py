"""Where runs are logged: the database or server, its client, its experiment, and the commit that made a run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from raysyn.config import TrackingConfig
from raysyn.data.sqlite import sqlite_file, sqlite_url
from raysyn.types import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, the image's app or a job's upload
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # A tracker's thread has its own patience; MLflow's default is seven tries of two minutes each.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(tracking: TrackingConfig, storage: str) -> str:
    """Where runs are logged: `tracking.uri`, else a sqlite database in the storage folder.

    Raises UserError when storage is an object store and no uri is given: sqlite needs a local file.
    """
    if tracking.uri:
        return tracking.uri
    folder = _local_folder(storage)
    if folder is None:
        raise UserError(
            f"tracking.uri: storage is {storage}, where no sqlite database can live; "
            "set tracking.uri=http://... (an MLflow server) or tracking.enabled=false"
        )
    return sqlite_url(folder / "mlflow.db")


def artifact_location(uri: str, storage: str) -> str | None:
    """Where a new experiment keeps its files: under storage; None lets an MLflow server choose its own place."""
    if uri.startswith(("http://", "https://")):
        return None
    folder = _local_folder(storage)
    bucket = storage.partition("?")[0].rstrip("/")
    return f"{bucket}/mlartifacts" if folder is None else (folder / "mlartifacts").as_uri()


def has_schema(uri: str) -> bool:
    """A sqlite file with MLflow's tables is at `uri`. Raises UserError for a file that cannot be read as a database."""
    path = sqlite_file(uri)
    if path is None or not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be read as an MLflow database ({error}); move it elsewhere") from None
    return {"alembic_version", "runs", "metrics"} <= tables


def _local_folder(storage: str) -> Path | None:
    from raysyn.data.storage import Storage

    place = Storage.at(storage)
    return Path(place.path).resolve() if place.is_local else None


def open_client(uri: str) -> Any:
    """MLflow's client for `uri`, a database's schema made when it is new."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking.client import MlflowClient

    if uri.startswith(("http://", "https://")):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - slow, so before the lock

    # MLflow's own lock lets a second process in between the tables and their migrations, where it fails.
    with _lock_file(uri).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_database(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(uri: str) -> None:
    """A new sqlite file appears with all of MLflow's tables: killed while it makes them, it cannot open what is left."""
    database = sqlite_file(uri)
    if database is None or database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = database.with_name(f".tmp-{database.name}")  # what a killed process left goes first: its lock is ours
    for leftover in database.parent.glob(f"{temporary.name}*"):
        leftover.unlink()
    SqlAlchemyStore(sqlite_url(temporary), "./mlruns").engine.dispose()
    os.replace(temporary, database)


def _lock_file(uri: str) -> Path:
    if (database := sqlite_file(uri)) is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
        return database.with_name(f"{database.name}.lock")
    return Path(tempfile.gettempdir()) / f"raysyn-{os.getuid()}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"


def git_commit() -> str:
    """The commit of this source tree; in an image what its build wrote beside the code; else RAYSYN_GIT_COMMIT, or ""."""
    if not (ROOT / ".git").exists():
        built = ROOT / "commit"
        return (built.read_text().strip() if built.is_file() else "") or os.environ.get("RAYSYN_GIT_COMMIT", "")
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def experiment_id(client: Any, name: str, artifacts: str | None) -> str:
    """The id of the experiment of that name, made when there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                raise
            found = client.get_experiment_by_name(name)
    return str(found.experiment_id)
