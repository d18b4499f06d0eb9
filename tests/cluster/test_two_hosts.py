"""A synthesis and a fit over two hosts that lose one, cut off or killed: shards are drawn once, and the fit goes on with
the other host from its checkpoint, no image seen twice. In one file, for the hosts' sake: they start once a module."""

from __future__ import annotations

import hashlib
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.ray_overhead import bare_fit
from raysyn.cluster.fit import fit_fingerprint
from raysyn.cluster.inputs import prepare_fingerprint
from raysyn.cluster.sampler_actor import ShardWriter, SynthesisSpec, settings_of
from raysyn.compose import load_job
from raysyn.config import FitJob, SamplerConfig, SynthesizeConfig
from raysyn.data.frames import read_arrays, write_frames
from raysyn.data.phantom import phantom_patient
from raysyn.data.requests import RequestPlan
from raysyn.data.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0
STEPS = 20
FIT = [
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
MOCK = '''
"""Draws an image that depends on map and seed alone, slowly, and notes where and what."""
import os, time
import numpy as np

def make(spec):
    def draw(label_map, view, seeds):
        time.sleep(float(os.environ["MOCK_SECONDS"]))
        with open(os.environ["MOCK_LOG"], "a") as file:
            file.write("".join(f"{os.environ['HOST']} {s}\\n" for s in seeds))
        noise = np.stack([np.random.default_rng(s).integers(0, 256, label_map.shape[1:]) for s in seeds])
        return ((noise + view[:, None, None]) % 256 * (label_map > 0)).astype(np.uint8)
    return draw
'''
DRIVER = """
import pickle, sys
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import open_stage
from raysyn.cluster.synthesize import claim, draw_missing, finish
from raysyn.config import SynthesizeJob, WorkersConfig
spec, storage = pickle.load(open(sys.argv[1], "rb")), sys.argv[2]
job = SynthesizeJob(storage=storage, workers=WorkersConfig(num_workers=2, cpus_per_worker=1))
stage = open_stage(storage, "synthesize", "hosts")
with ray_session(job.ray):
    spec = claim(stage, spec)
    draw_missing(job, stage, spec)
    finish(job, stage, spec)
print("finished", flush=True)
"""


def make_spec(frames: str, storage: str) -> SynthesisSpec:
    config = SynthesizeConfig(num_warps=10, batch_size=4, shard_size=8)
    masks = {s: read_arrays(frames, s).frame_id for s in config.mask_splits}
    about = {"raysyn_fingerprint": "hosts", "raysyn_threads": "1"}
    return SynthesisSpec(
        plan=RequestPlan.of(config, masks), config=config,
        settings=settings_of("c" * 64, SamplerConfig(), config), metadata=about,
        frames=frames, output=Storage.at(storage).join("synthesize", "hosts").uri, model_dir="", model="mock",
        solver="heun", num_steps=2, num_function_evals=3, threads=1, key="synthesize mock", sampler="mock_sampler:make",
    )  # fmt: skip


def sha256s(out: Storage) -> dict[str, str]:
    return {n: hashlib.sha256(out.read_bytes(n)).hexdigest() for n in out.list(suffix=".parquet")}


def undisturbed(frames: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The shards' sha256 of the same plan drawn by one writer in one process."""
    for key, value in {"HOST": "none", "MOCK_SECONDS": "0", "MOCK_LOG": str(folder / "undisturbed")}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.syspath_prepend(folder)
    spec = make_spec(frames, str(folder / "undisturbed-runs"))
    writer = ShardWriter(spec)
    for shard in spec.plan.shards():
        writer.write(shard)
    return sha256s(Storage.at(spec.output))


def drawn(hosts: Any) -> list[tuple[str, int]]:
    lines = (hosts.folder / "drawn.log").read_text().split("\n") if (hosts.folder / "drawn.log").exists() else []
    return [(host, int(seed)) for host, seed in (line.split() for line in lines if len(line.split()) == 2)]


@pytest.mark.parametrize("fate", ["cut", "killed"])
def test_a_synthesis_that_loses_a_host(fate: str, hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the undisturbed run's bytes; what was whole before is drawn once; a host that comes back does no harm."""
    (hosts.folder / "mock_sampler.py").write_text(MOCK)
    storage = hosts.storage
    for split, patients in (("train", range(3)), ("validation", range(3, 4))):
        made = [f for p in patients for f in phantom_patient(0, p, 64, split)]
        write_frames(Storage.at(storage).join("frames"), f"{split}/shard-00000.parquet", made)
    spec = make_spec(Storage.at(storage).join("frames").uri, storage)
    expected, out = undisturbed(spec.frames, hosts.folder, monkeypatch), Storage.at(spec.output)
    (hosts.folder / "spec.pkl").write_bytes(pickle.dumps(spec))
    (hosts.folder / "driver.py").write_text(DRIVER)
    arguments = [str(hosts.folder / name) for name in ("driver.py", "spec.pkl")]
    driver = hosts.run("head", sys.executable, *arguments, storage, RAY_ADDRESS=hosts.address)
    both = {"head", "worker"}
    hosts.wait_until(lambda: {h for h, _ in drawn(hosts)} == both and len(out.list(suffix=".parquet")) > 1, "shards")
    if fate == "cut":
        hosts.link("down")
    else:
        hosts.kill("worker")
    lost, whole = time.monotonic(), out.list(suffix=".parquet")
    assert len(whole) < len(expected), "the run was over before the host was lost"
    driver.wait(timeout=PATIENCE)
    print(f"{fate}: {len(whole)} of {len(expected)} shards were whole, done {time.monotonic() - lost:.0f} s later")
    assert driver.returncode == 0, hosts.said()
    assert sha256s(out) == expected
    records = out.read_json("manifest.json")["shards"]
    assert {r["name"]: r["sha256"] for r in records} == expected
    seeds = [seed for _, seed in drawn(hosts)]
    before = [r.noise_seed for s in spec.plan.shards() if s.name in whole for b in spec.plan.batches(s) for r in b]
    assert all(seeds.count(seed) == 1 for seed in before)
    if fate == "cut":
        hosts.link("up")
        time.sleep(5)
        assert sha256s(out) == expected


def newest(stage: Storage) -> tuple[int, int]:
    """Step of the newest checkpoint and the number of ranks that made it; one CPU a host means one rank a host."""
    marks = sorted(n for n in stage.list("checkpoints") if n.endswith("checkpoint.json"))
    mark = stage.read_json(marks[-1]) if marks else {"step": 0, "num_workers": 0}
    return mark["step"], mark["num_workers"]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("fate", ["cut", "killed"])
def test_a_fit_that_loses_a_host(fate: str, hosts: Any, tmp_path: Path) -> None:
    config: FitJob = load_job("fit", [*FIT, f"storage={hosts.storage}"])
    key = fit_fingerprint(config, prepare_fingerprint(config))
    stage = Storage.at(hosts.storage).join("fit", key)
    arguments = [str(ROOT / "jobs" / "fit.py"), *FIT, f"storage={hosts.storage}"]
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
