"""The metrics that a synthesis leaves on its node's Prometheus port, and that counting is nothing where no Ray is."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from raysyn.cluster.metrics_export import COUNTERS, count, count_if_replaced, count_shard
from raysyn.data.frames import write_frames
from raysyn.data.storage import Storage
from raysyn.types import Frame

ROOT = Path(__file__).resolve().parents[2]
# A synthesis with a mock sampler; an actor dies once a shard is whole. What the port says is a line of its own.
SESSION = """
import json, os, sys, time, urllib.request
from raysyn.cluster.sampler_actor import SynthesisSpec, settings_of
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import open_stage
from raysyn.cluster.synthesize import claim, draw_missing, finish, mask_ids
from raysyn.config import RayConfig, SamplerConfig, SynthesizeConfig, SynthesizeJob
from raysyn.data.requests import RequestPlan

frames, storage = sys.argv[1:]
config = SynthesizeConfig(num_warps=10, batch_size=4, shard_size=8, mask_splits=["train"])
job = SynthesizeJob(storage=storage, ray=RayConfig(num_cpus=2, object_store_mb=100))
stage = open_stage(storage, "synthesize", "metrics")
spec = SynthesisSpec(
    plan=RequestPlan.of(config, mask_ids(frames, ["train"])), config=config,
    settings=settings_of("c" * 64, SamplerConfig(), config), metadata={}, frames=frames, output=stage.path,
    model_dir="", model="mock", solver="heun", num_steps=2, num_function_evals=3, threads=1, key="synthesize mock",
    sampler="dying_sampler:make",
)

def scrape():
    import ray
    port = ray.nodes()[0]["MetricsExportPort"]
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    except OSError:
        return []
    return [line for line in text.splitlines() if "raysyn" in line and not line.startswith("#")]

with ray_session(job.ray):
    spec = claim(stage, spec)
    draw_missing(job, stage, spec)
    def total(name):
        return sum(float(l.split()[-1]) for l in found if l.startswith("ray_raysyn_" + name))

    found, deadline = [], time.time() + float(os.environ["WAIT"])
    while time.time() < deadline:
        found, enough = scrape(), 10 - int(open(os.environ["DIED"]).read())
        if total("images_total") >= 8 * enough and total("shard_seconds_count") >= enough and total("failures_total"):
            break
        time.sleep(0.3)
    finish(job, stage, spec)
    print("FOUND", json.dumps(found))
"""
# Dies once, and notes the shards that this process had made whole by then: a shard is two batches, one after the other.
SAMPLER = """
import os, signal
def make(spec):
    batches = 0
    def draw(label_map, view, seeds):
        nonlocal batches
        if not os.path.exists(os.environ["DIED"]) and os.path.exists(spec.output + "/train/shard-00000.parquet"):
            with open(os.environ["DIED"], "x") as file:
                file.write(str(batches // 2))
            os.kill(os.getpid(), signal.SIGKILL)
        batches += 1
        return label_map * 50
    return draw
"""


Session = Callable[[], list[str]]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Session]]]:
    """Two sessions side by side, one where metrics are on and one where they are off: each gives what its port said."""
    folder = tmp_path_factory.mktemp("sessions")
    settings = {
        "on": {"WAIT": "60", "RAY_metrics_report_interval_ms": "500"},
        "off": {"WAIT": "0", "RAY_enable_metrics_collection": "0"},
    }
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(start_session(folder / name, own)) for name, own in settings.items()}

        def result(name: str) -> list[str]:
            out, err = running[name].communicate(timeout=300)
            assert running[name].returncode == 0, err[-3000:]
            (line,) = [line for line in out.splitlines() if line.startswith("FOUND")]  # Ray prints what it likes
            found: list[str] = json.loads(line.removeprefix("FOUND"))
            return found

        yield folder, {name: functools.partial(result, name) for name in settings}


@contextlib.contextmanager
def start_session(folder: Path, settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    label_map = np.ones((8, 8), np.uint8)
    made = [Frame(f"m{i}", label_map, label_map, "2CH", "ED", f"p{i}", "train", "phantom") for i in range(8)]
    write_frames(Storage.at(folder / "frames"), "train/shard-00000.parquet", made)
    (folder / "dying_sampler.py").write_text(SAMPLER)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    env |= {"PYTHONPATH": f"{ROOT}:{folder}", "DIED": str(folder / "died"), **settings}
    process = subprocess.Popen(
        [sys.executable, "-c", SESSION, str(folder / "frames"), str(folder / "runs")],
        cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def total(lines: list[str], start: str) -> float:
    return sum(float(line.split()[-1]) for line in lines if line.startswith(start))


@pytest.mark.cluster
@pytest.mark.slow
def test_images_failures_and_seconds_are_on_the_nodes_metrics_port(sessions: tuple[Path, dict[str, Session]]) -> None:
    folder, results = sessions
    lines = results["on"]()
    print("\n".join(lines))
    # What the killed process had not reported yet is lost: at most the shards that it had made. All others are there.
    told = 10 - int((folder / "on" / "died").read_text())
    assert told >= 1
    assert 8 * told <= total(lines, "ray_raysyn_images_total") <= 80
    assert told <= total(lines, "ray_raysyn_shard_seconds_count") <= 10
    replaced = [line for line in lines if line.startswith("ray_raysyn_failures_total")]
    assert total(replaced, "") == 1
    assert 'kind="worker"' in replaced[0]
    assert 'work="synthesize mock"' in replaced[0]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_synthesis_does_not_mind_metrics_being_off(sessions: tuple[Path, dict[str, Session]]) -> None:
    folder, results = sessions
    assert results["off"]() == []
    assert (folder / "off" / "runs" / "synthesize" / "metrics" / "manifest.json").exists()


def test_without_ray_counting_does_nothing() -> None:
    import ray

    assert not ray.is_initialized()
    for name in COUNTERS:
        count(name, "nobody")
    count_shard("nobody", {"rows": 1, "attempts": 2, "seconds": 1.0})
    count_if_replaced("nobody")
