"""Where runs are logged: the database or server, its client, its experiment, and the commit that made a run."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

from raysyn.config import TrackingConfig
from raysyn.types import UserError

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # The thread below has its own patience; MLflow's default is seven tries of two minutes each.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
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
    return f"sqlite:///{folder / 'mlflow.db'}"


def artifact_location(uri: str, storage: str) -> str | None:
    """Where a new experiment keeps its files: under storage; None lets an MLflow server choose its own place."""
    if uri.startswith(("http://", "https://")):
        return None
    folder = _local_folder(storage)
    return f"{storage.rstrip('/')}/mlartifacts" if folder is None else (folder / "mlartifacts").as_uri()


def ensure_database(uri: str) -> None:
    """Create the schema of a database `uri` once, before several processes log to it. Servers look after their own.

    Safe to call from many processes: MLflow holds a file lock meanwhile. Costs nothing when the sqlite schema is there.
    """
    if uri.startswith(("http://", "https://")) or has_schema(uri):
        return
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    open_client(uri).search_experiments(max_results=1)


def has_schema(uri: str) -> bool:
    """A sqlite file with MLflow's tables is at `uri`."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.is_file():
        return False
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {"alembic_version", "runs", "metrics"} <= tables


def _local_folder(storage: str) -> Path | None:
    if storage.startswith("file://"):
        storage = storage.removeprefix("file://")
    return None if "://" in storage else Path(storage).expanduser().resolve()


def open_client(uri: str) -> Any:
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking.client import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def git_commit() -> str:
    """The commit of this source tree, RAYSYN_GIT_COMMIT where it has no .git (an image, a job's upload), or ""."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("RAYSYN_GIT_COMMIT", "")
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def experiment_id(client: Any, name: str, artifacts: str | None) -> str:
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
