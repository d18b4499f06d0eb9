"""Fits that are killed for real: worker, controller, driver, SIGTERM. Each ends with the undisturbed run's loss curve."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.ray_overhead import bare_fit
from raysyn.cluster.fit import fit, fit_fingerprint
from raysyn.cluster.inputs import prepare, prepare_fingerprint
from raysyn.cluster.session import ray_session
from raysyn.compose import load_job
from raysyn.config import FitJob, PrepareJob, RayConfig
from raysyn.types import Outcome
from tests.processes import kill_driver

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
OVERRIDES = [
    "scale=demo",
    "model=edm",
    "data.num_train_patients=3",
    "data.num_validation_patients=1",
    "data.num_test_patients=1",
    "ray.num_cpus=2",
    "ray.object_store_mb=128",
    "workers.cpus_per_worker=0.5",
    f"model.fit.num_images={4 * STEPS}",
    "model.fit.global_batch=4",
    "model.fit.micro_batch=4",
    "model.fit.amp=none",
    "model.fit.num_validation_images=4",
    "model.fit.checkpoint_every_steps=6",
    "model.fit.validate_every_steps=20",
    "tracking.enabled=false",
]
PATIENCE = 400.0


def config_at(storage: Path) -> FitJob:
    config: FitJob = load_job("fit", [*OVERRIDES, f"storage={storage}"])
    return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A storage with prepared frames; Ray runs in this process."""
    path = tmp_path_factory.mktemp("prepared")
    with ray_session(RayConfig(num_cpus=2, object_store_mb=128)):
        config = config_at(path)
        prepare(PrepareJob(**{f.name: getattr(config, f.name) for f in dataclasses.fields(PrepareJob)}))
        yield path


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The loss curve of the same fit without Ray and without a disturbance."""
    config = config_at(prepared)
    frames = f"{prepared}/prepare/{prepare_fingerprint(config)}"
    progress = bare_fit(config, frames, tmp_path_factory.mktemp("undisturbed"))
    assert len(progress.losses) == STEPS
    return {"loss": progress.losses, "validation": progress.validations}


def own_storage(prepared: Path, path: Path) -> Path:
    """A storage of a drill's own with the frames already there."""
    shutil.copytree(prepared / "prepare", path / "prepare")
    return path


def stage_of(storage: Path) -> Path:
    config = config_at(storage)
    return storage / "fit" / fit_fingerprint(config, prepare_fingerprint(config))


def newest_step(stage: Path) -> int:
    marks = (stage / "checkpoints").glob("step-*/checkpoint.json")
    return max((int(m.parent.name.removeprefix("step-")) for m in marks), default=0)


def wait_until(condition: Callable[[], Any], what: str, alive: Callable[[], bool] = lambda: True) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert alive(), f"ended before: {what}"
        time.sleep(0.05)
    raise AssertionError(f"waited {PATIENCE:.0f} s for: {what}")


def running(driver: subprocess.Popen, log: Path) -> Callable[[], bool]:
    """For `wait_until`: fails with what the driver said if it ended."""

    def alive() -> bool:
        assert driver.poll() is None, f"exit code {driver.returncode}: {log.read_text()[-5000:]}"
        return True

    return alive


def check_curve(stage: Path, undisturbed: dict[str, Any]) -> None:
    """Every step's loss is there once and equals the undisturbed run's: no image twice, none missed."""
    history = json.loads((stage / "history.json").read_text())
    assert len(history["loss"]) == STEPS
    assert np.allclose(history["loss"], undisturbed["loss"], rtol=0, atol=1e-6)
    assert np.allclose(history["validation"], undisturbed["validation"], rtol=0, atol=1e-6)


def ray_process(name: str) -> int:
    """The one process of the Ray that this test started which Ray calls `name`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may just have ended
            if " ".join(process.cmdline()).startswith(name):
                found.append(process.pid)
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


@pytest.mark.cluster
@pytest.mark.slow
def test_kill_of_worker_and_of_controller(prepared: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    storage = own_storage(prepared, tmp_path)
    stage, outcome = stage_of(storage), {}

    def work() -> None:
        try:
            outcome["done"] = fit(config_at(storage))
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(lambda: newest_step(stage) >= 6, "first checkpoint", thread.is_alive)
    os.kill(ray_process("ray::RayTrainWorker"), signal.SIGKILL)
    at = newest_step(stage)
    wait_until(lambda: newest_step(stage) > at, "a checkpoint after the worker's death", thread.is_alive)
    os.kill(ray_process("ray::TrainController"), signal.SIGKILL)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    if "error" in outcome:
        raise outcome["error"]
    done: Outcome = outcome["done"]
    assert done.path == str(stage)
    check_curve(stage, undisturbed)
    assert done.manifest["images_seen"] == 4 * STEPS


@pytest.mark.cluster
@pytest.mark.slow
def test_a_node_that_is_reclaimed_leaves_a_checkpoint_first(prepared: Path, tmp_path: Path) -> None:
    """A spot node of two is drained with notice: a checkpoint is written upon it, and the other node goes on."""
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    storage, log = own_storage(prepared, tmp_path), tmp_path / "log"
    steps, every = 150, 50
    own = [f"model.fit.num_images={4 * steps}", f"model.fit.checkpoint_every_steps={every}", "model.fit.lr=1e-4"]
    own += ["model.fit.keep_checkpoints=50", "model.fit.log_every_steps=7", "model.fit.num_validation_images=0"]
    own += ["workers.cpus_per_worker=1", "workers.num_workers=2", "workers.min_workers=1"]
    config: FitJob = load_job("fit", [*OVERRIDES, *own, f"storage={storage}"])
    frames = f"{storage}/prepare/{prepare_fingerprint(config)}"
    stage = storage / "fit" / fit_fingerprint(config, prepare_fingerprint(config))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    driver = None
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        settings = {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
        driver = start_job(storage, log, *own, **settings)
        wait_until(lambda: newest_step(stage) >= every, "a checkpoint", running(driver, log))
        deadline_ms = int(1000 * (time.time() + 20))
        drain = GcsClient(address=cluster.address).drain_node
        assert drain(node.node_id, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "reclaimed", deadline_ms)[0]
        # Logged each 7 steps, kept each 50: a step that is no multiple of 50 was kept upon the notice.
        wait_until(lambda: newest_step(stage) % every, "a checkpoint upon the notice", running(driver, log))
        kept = newest_step(stage)
        mark = json.loads((stage / "checkpoints" / f"step-{kept:09d}" / "checkpoint.json").read_text())
        assert mark["num_workers"] == 2
        cluster.remove_node(node, allow_graceful=False)  # its time is up
        assert driver.wait(PATIENCE) == 0, log.read_text()
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
        cluster.shutdown()
    history = json.loads((stage / "history.json").read_text())
    expected = bare_fit(config, frames, tmp_path / "undisturbed").losses
    assert len(history["loss"]) == steps
    assert np.allclose(history["loss"], expected, rtol=0, atol=1e-4)


def start_job(storage: Path, log: Path, *overrides: str, **settings: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k.startswith("RAY_TRAIN")}
    if "RAY_ADDRESS" in settings:  # a Ray of this process: its token is ours
        kept |= {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")}
    environment = kept | settings
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "jobs/fit.py", *OVERRIDES, *overrides, f"storage={storage}"],
            cwd=ROOT,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.cluster
@pytest.mark.slow
def test_sigterm_then_kill_of_the_driver(prepared: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    storage, log = own_storage(prepared, tmp_path), tmp_path / "log"
    stage = stage_of(storage)
    first = start_job(storage, log)
    wait_until(lambda: newest_step(stage) >= 6, "first checkpoint", running(first, log))
    first.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert first.wait(PATIENCE) == 0, log.read_text()
    assert "resumable" in log.read_text()
    assert time.monotonic() - asked < 60
    stopped_at = newest_step(stage)
    assert 6 < stopped_at < STEPS, "a checkpoint was written on request"
    assert not (stage / "manifest.json").exists()

    second = start_job(storage, log)
    wait_until(lambda: newest_step(stage) > stopped_at, "a checkpoint of the second run", running(second, log))
    kill_driver(second)
    assert newest_step(stage) < STEPS

    third = start_job(storage, log)
    assert third.wait(PATIENCE) == 0, log.read_text()
    check_curve(stage, undisturbed)
    assert fit(config_at(storage)).skipped


@pytest.mark.cluster
@pytest.mark.slow
def test_a_second_fit_waits_and_goes_on_where_the_first_is_killed(
    prepared: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Two at once would write and prune each other's checkpoints, and stop when one of them is asked to."""
    storage, logs = own_storage(prepared, tmp_path), [tmp_path / "one", tmp_path / "other"]
    stage, both = stage_of(storage), [start_job(storage, log) for log in logs]
    wait_until(lambda: any("waiting for it to end" in log.read_text() for log in logs), "one waiting")
    waits = 0 if "waiting for it to end" in logs[0].read_text() else 1
    works = both[1 - waits]
    assert f"fit: process {works.pid} on " in logs[waits].read_text()
    wait_until(lambda: newest_step(stage) >= 6, "a checkpoint", running(works, logs[1 - waits]))
    works.send_signal(signal.SIGKILL)
    works.wait(30)
    killed_at = newest_step(stage)
    assert both[waits].wait(PATIENCE) == 0, logs[waits].read_text()
    assert killed_at < STEPS
    check_curve(stage, undisturbed)
