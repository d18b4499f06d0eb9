"""A fit over two hosts that loses one, cut off or killed: it goes on with the other from its checkpoint, and no image is
seen twice."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ray_overhead import bare_fit
from raysyn.cluster.fit import fit_fingerprint
from raysyn.cluster.inputs import prepare_fingerprint
from raysyn.compose import load_job
from raysyn.config import FitJob
from raysyn.data.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
OVERRIDES = [
    "scale=demo",
    "model=edm",
    "data.num_train_patients=3",
    "data.num_validation_patients=1",
    "data.num_test_patients=1",
    "workers.cpus_per_worker=1",
    "workers.num_workers=2",
    "workers.min_workers=1",
    f"model.fit.num_images={4 * STEPS}",
    "model.fit.global_batch=4",
    "model.fit.micro_batch=2",
    "model.fit.amp=none",
    "model.fit.num_validation_images=4",
    "model.fit.checkpoint_every_steps=6",
    "model.fit.keep_checkpoints=50",
    "model.fit.validate_every_steps=10",
    "tracking.enabled=false",
]
pytestmark = [pytest.mark.cluster, pytest.mark.s3, pytest.mark.slow]


def newest(stage: Storage) -> tuple[int, int]:
    """Step of the newest checkpoint and the number of ranks that made it; one CPU a host means one rank a host."""
    marks = sorted(n for n in stage.list("checkpoints") if n.endswith("checkpoint.json"))
    mark = stage.read_json(marks[-1]) if marks else {"step": 0, "num_workers": 0}
    return mark["step"], mark["num_workers"]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("fate", ["cut", "killed"])
def test_a_fit_that_loses_a_host(fate: str, hosts: Any, tmp_path: Path) -> None:
    config: FitJob = load_job("fit", [*OVERRIDES, f"storage={hosts.storage}"])
    key = fit_fingerprint(config, prepare_fingerprint(config))
    stage = Storage.at(hosts.storage).join("fit", key)
    arguments = [str(ROOT / "jobs" / "fit.py"), *OVERRIDES, f"storage={hosts.storage}"]
    driver = hosts.run("head", sys.executable, *arguments, RAY_ADDRESS=hosts.address)
    hosts.wait_until(lambda: newest(stage)[0] >= 6 or driver.poll() is not None, "a checkpoint")
    assert driver.poll() is None, hosts.said()
    if fate == "cut":
        hosts.link("down")
    else:
        hosts.kill("worker")
    lost, (reached, ranks) = time.monotonic(), newest(stage)
    assert reached < STEPS
    assert ranks == 2, f"the host that was lost had no rank at step {reached}\n{hosts.said()}"
    prepared = Storage.at(hosts.storage).join("prepare", prepare_fingerprint(config)).uri
    expected = bare_fit(config, prepared, tmp_path).losses  # meanwhile nobody computes
    driver.wait(timeout=900)
    print(f"{fate} at step {reached} of {STEPS}, done {time.monotonic() - lost:.0f} s later")
    assert driver.returncode == 0, hosts.said()
    assert newest(stage) == (STEPS, 1)
    first = stage.read_json(f"checkpoints/step-{6:09d}/checkpoint.json")
    assert first["num_workers"] == 2, "it went on from what both had made, and did not begin anew"
    losses = stage.read_json("history.json")["loss"]
    assert len(losses) == len(expected) == STEPS
    assert np.allclose(losses, expected, rtol=0, atol=1e-6)
    if fate == "cut":
        hosts.link("up")
