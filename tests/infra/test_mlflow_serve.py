"""infra/mlflow/serve.sh for real: it migrates, asks for a password, and a new server knows the users of the old one."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from raysyn.tracking.server import free_port, wait_until_up

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "mlflow" / "serve.sh"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def status(port: int, path: str, user: str = "", body: bytes | None = None) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/2.0/mlflow/{path}", data=body)
    request.add_header("Content-Type", "application/json")
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_users_outlive_the_server(tmp_path: Path) -> None:
    password, port = "admin-of-a-test", free_port(5800)
    own = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32, "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    read = "experiments/get?experiment_id=0"
    for life in ("first", "second"):
        config = tmp_path / f"{life}.ini"
        env: dict[str, Any] = {**os.environ, **own, "MLFLOW_AUTH_CONFIG_PATH": str(config)}
        subprocess.run(["sh", str(SCRIPT), "migrate"], env=env, cwd=tmp_path, check=True, timeout=300)
        assert config.stat().st_mode & 0o077 == 0, "the database's address is a secret"
        command = ["sh", str(SCRIPT), "serve", "--host=127.0.0.1", f"--port={port}", "--workers=2"]
        server = subprocess.Popen(command, env=env, cwd=tmp_path, start_new_session=True)
        try:
            wait_until_up(server, port)
            time.sleep(0.5)
            assert status(port, read) == 401
            assert status(port, read, f"admin:{password}") == 200
            if life == "first":
                body = b'{"username": "reader", "password": "reader-of-a-test"}'
                assert status(port, "users/create", f"admin:{password}", body) == 200
            assert status(port, read, "reader:reader-of-a-test") == 200
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=30)
    assert not (tmp_path / "basic_auth.db").exists()
