"""MLflow's own pages over the database that the jobs wrote: what `make ui` opens."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

from raysyn.data.sqlite import sqlite_url
from raysyn.tracking.places import QUIET, has_schema
from raysyn.tracking.study import VIEW_TAG, view_path
from raysyn.types import Fault, UserError

# Without its job runner the server takes a quarter of the memory and a third of the time to start.
SERVER_ENVIRONMENT = {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def find_database(folder: str | Path) -> Path:
    """The MLflow database in or below `folder`: the demo's when it is there, else the one written last.

    Raises UserError when there is none.
    """
    folder = Path(folder)
    found = [p for p in sorted(folder.rglob("mlflow.db")) if has_schema(sqlite_url(p))] if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder}: no MLflow database (mlflow.db) in or below it; run `make demo` or a job first")
    demo = folder / "demo" / "mlflow.db"
    return demo if demo in found else max(found, key=lambda p: p.stat().st_mtime)


def free_port(first: int = 5000) -> int:
    """The first port from `first` on that nothing on loopback listens at."""
    if not 0 < first < 65536:
        raise UserError(f"--port: {first} is no port; give one of 1 to 65535")
    for port in range(first, min(first + 200, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(f"--port: nothing free from {first} to {first + 199}; give another")


def start_server(
    uri: str, port: int, artifacts: str = "", log_file: str | Path | None = None, *, auth: bool = False
) -> subprocess.Popen:
    """Start MLflow's server on 127.0.0.1:`port` over the database `uri`; end it with `stop_server`.

    `artifacts` (folder or s3:// address) makes it a proxy for the files of new experiments.
    With `auth` users need a password (MLFLOW_AUTH_ADMIN_PASSWORD, MLFLOW_FLASK_SERVER_SECRET_KEY, MLFLOW_AUTH_CONFIG_PATH).
    """
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--artifacts-destination", artifacts] if artifacts else []
    command += ["--app-name", "basic-auth"] if auth else []
    output = open(log_file, "wb") if log_file else subprocess.DEVNULL  # noqa: SIM115 - the child keeps it
    environment = {**SERVER_ENVIRONMENT, **os.environ}
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def wait_until_up(process: subprocess.Popen, port: int, timeout_s: float = 180.0) -> None:
    """Until the server answers. Raises Fault when it ends or stays silent."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Fault(f"the MLflow server ended at once with exit code {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise Fault(f"the MLflow server did not answer within {timeout_s:.0f} s")


def stop_server(process: subprocess.Popen) -> None:
    """End the server and the workers it started."""
    import signal

    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _studies(database: Path) -> list[str]:
    """Experiments with a study's view, by a look into the database: importing MLflow here would take as long again."""
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
        found = connection.execute("SELECT experiment_id FROM experiment_tags WHERE key = ?", (VIEW_TAG,))
        return [str(row[0]) for row in found]


def serve(folder: str, port: int = 5000) -> None:
    """Show the runs below `folder` until Ctrl-C."""
    database = find_database(folder)
    port = free_port(port)
    print(f"starting MLflow over {database} (about half a minute) ...", flush=True)
    process = start_server(sqlite_url(database.resolve()), port, str(database.resolve().parent / "mlartifacts"))
    try:
        wait_until_up(process, port)
        print(f'http://127.0.0.1:{port}   (choose "Model training"; Ctrl-C ends it)', flush=True)
        for experiment in _studies(database):
            print(f"the study's rows compared: http://127.0.0.1:{port}{view_path(experiment)}", flush=True)
        process.wait()
    except KeyboardInterrupt:
        print()
    finally:
        stop_server(process)
