"""An MLflow server as it runs for real: PostgreSQL behind it, artifacts on S3, users with passwords; and it goes away."""

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysyn.config import TrackingConfig
from raysyn.report.table import row_name
from raysyn.tracking import Tracker, log_study
from raysyn.tracking.model import log_model
from raysyn.tracking.places import open_client
from raysyn.tracking.server import free_port, start_server, stop_server, wait_until_up
from raysyn.tracking.study import KIND_TAG, VIEW_TAG
from tests.s3 import KEYS, s3_server

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
AS_POSTGRES = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
BUCKET = "mlflow"
pytestmark = [
    pytest.mark.postgres,
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not BINARIES, reason="no PostgreSQL here (apt-get install postgresql)"),
    pytest.mark.skipif(bool(AS_POSTGRES) and shutil.which("runuser") is None, reason="no runuser: initdb refuses root"),
]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL of our own on loopback with password authentication; gives its URI."""
    folder = Path(tempfile.mkdtemp(prefix="raysyn-postgres-"))
    password, port = secrets.token_hex(16), free_port(5500)
    data, word = folder / "data", folder / "password"
    word.write_text(password)
    if AS_POSTGRES:
        for path in (folder, word):
            shutil.chown(path, "postgres")

    def run(*command: str) -> None:
        done = subprocess.run([*AS_POSTGRES, *command], capture_output=True, text=True, timeout=120, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr

    control = str(BINARIES[-1].with_name("pg_ctl"))
    run(str(BINARIES[-1]), "-D", str(data), "-U", "raysyn", "--auth=scram-sha-256", f"--pwfile={word}", "-E", "UTF8")
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
    try:
        run(control, "-D", str(data), "-l", str(folder / "log"), "-o", options, "-w", "start")
        yield f"postgresql+psycopg2://raysyn:{password}@127.0.0.1:{port}/postgres"
    finally:
        run(control, "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@dataclass
class Service:
    """The server, how to stop it and start it again, and what lies behind it."""

    uri: str
    database: str
    bucket: Any
    port: int
    environment: dict[str, str]
    process: subprocess.Popen | None = None
    log_file: Path | None = None

    def start(self) -> None:
        self.process = start_server(self.database, self.port, f"s3://{BUCKET}/artifacts", self.log_file, auth=True)
        wait_until_up(self.process, self.port)

    def stop(self) -> None:
        assert self.process is not None
        stop_server(self.process)

    def files(self) -> list[str]:
        return [item.key for item in self.bucket.objects.all()]


@pytest.fixture(scope="module")
def service(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    import boto3

    folder = tmp_path_factory.mktemp("server")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = {postgres}\n"  # users beside the runs, as infra/mlflow/serve.sh has it
        "auth_cache_ttl_seconds = 60\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    password = secrets.token_hex(12)
    environment = {
        **KEYS,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
    }
    with s3_server() as address, pytest.MonkeyPatch.context() as patch:
        environment["MLFLOW_S3_ENDPOINT_URL"] = endpoint = f"http://{address}"
        for key, value in environment.items():
            patch.setenv(key, value)
        bucket = boto3.resource("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        port = free_port(5600)
        made = Service(f"http://127.0.0.1:{port}", postgres, bucket, port, environment, log_file=folder / "server.log")
        made.start()
        yield made
        made.stop()


def rows() -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = [{"trained_on": "phantom", "mean_dice": 0.96}]
    for model, dice in (("edm", 0.931), ("edm_l128", 0.944), ("vp", 0.912)):
        sampler = {"solver": "heun", "num_steps": 8, "num_function_evals": 15, "seconds_per_image": 0.5}
        table.append({"trained_on": "synthetic", "model": model, **sampler, "fd_lite0": 80.0, "mean_dice": dice})
    return table


def test_a_study_is_logged_searched_and_compared(service: Service, tmp_path: Path) -> None:
    import psycopg2

    (tmp_path / "index.html").write_text("<h1>report</h1>")
    config = TrackingConfig(uri=service.uri, experiment="server study")
    for _ in range(2):
        assert log_study(config, "s3://anywhere/x", rows(), fingerprint="ff00", report_folder=tmp_path) == 0
    client = open_client(service.uri)
    experiment = client.get_experiment_by_name("server study")
    assert VIEW_TAG in experiment.tags
    assert experiment.artifact_location.startswith("mlflow-artifacts:"), "files go through the server"
    wanted = f"tags.`{KIND_TAG}` = 'row' and metrics.`task/mean_dice` > 0.92"
    found = client.search_runs([experiment.experiment_id], wanted, order_by=["metrics.`task/mean_dice` DESC"])
    assert [r.info.run_name for r in found] == ["phantom", "edm_l128 heun 8", "edm heun 8"]
    latent = found[1]
    assert latent.data.params["num_steps"] == "8"
    assert latent.data.metrics["cost/sample_seconds_per_image"] == 0.5
    with psycopg2.connect(service.database.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM runs WHERE experiment_id = %s", (int(experiment.experiment_id),))
        assert cursor.fetchone() == (1 + len(rows()),), "logged twice, still one run a row"
    study = client.search_runs([experiment.experiment_id], f"tags.`{KIND_TAG}` = 'study'")[0]
    assert any(key.endswith(f"{study.info.run_id}/artifacts/report/index.html") for key in service.files())
    assert Path(client.download_artifacts(study.info.run_id, "report/index.html")).read_text() == "<h1>report</h1>"
    assert row_name(rows()[2]) == "edm_l128 heun 8"


def test_a_model_is_registered_and_loaded_back_through_the_server(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    (tmp_path / "shift_loader.py").write_text(
        "import pathlib\n"
        "class Shift:\n"
        "    def __init__(self, path): self.by = int((pathlib.Path(path) / 'by.txt').read_text())\n"
        "    def predict(self, maps, params=None): return (maps + self.by).astype('uint8')\n"
        "def _load_pyfunc(path): return Shift(path)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "by.txt").write_text("5")
    (folder / "README.md").write_text("# Card")
    example = np.ones((1, 8, 8), np.uint8)
    with Tracker.start(TrackingConfig(uri=service.uri), "unused", "fit") as logged:
        run_id = logged.wait_run_id()
        assert run_id is not None
        log_model(
            service.uri,
            run_id,
            folder,
            example=example,
            registered_name="echo-shift",
            loader_module="shift_loader",
            with_code=False,  # its many small files take a minute through this S3
        )
    client = open_client(service.uri)
    version = client.get_model_version("echo-shift", "1")
    assert (version.run_id, version.description) == (run_id, "# Card")
    assert any(key.endswith("/by.txt") for key in service.files())
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(service.uri)
    try:
        model = mlflow.pyfunc.load_model("models:/echo-shift/1")
    finally:
        mlflow.set_tracking_uri(before)
    assert (model.predict(example) == 6).all()


def test_a_run_outlives_its_server(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    logged = Tracker.start(TrackingConfig(uri=service.uri), "unused", "long fit")
    assert logged.wait_run_id() is not None
    for step in range(100):
        logged.log_metrics({"loss": 1 / (step + 1)}, step)
    service.stop()
    begun = time.monotonic()
    for step in range(100, 1500):
        logged.log_metrics({"loss": 1 / (step + 1)}, step)
    logged.log_image("grid", np.zeros((8, 8), np.uint8), step=1500)
    assert time.monotonic() - begun < 1, "training does not wait"
    while "is away" not in caplog.text:
        assert time.monotonic() - begun < 60
        time.sleep(0.1)
    service.start()
    assert logged.finish(timeout_s=120) == 0
    client = open_client(service.uri)
    history = client.get_metric_history(logged.run_id, "loss")
    assert [m.step for m in history] == list(range(1500))
    assert [a.path for a in client.list_artifacts(logged.run_id)] == ["images"]


def test_a_wrong_password_is_told_once_and_costs_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    begun = time.monotonic()
    logged = Tracker.start(TrackingConfig(uri=service.uri), "unused", "stranger")
    logged.log_metrics({"x": 1.0})
    assert logged.finish() == 2
    assert time.monotonic() - begun < 30
    assert caplog.text.count("refuses run stranger") == 1
