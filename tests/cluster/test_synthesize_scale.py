"""A synthesis of any size takes the same memory; what it would take is told beforehand; S3 holds it as a folder does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from raysyn.cluster.sampler_actor import ShardWriter, SynthesisSpec, settings_of, whole_shards
from raysyn.cluster.stage import open_stage
from raysyn.cluster.synthesis_card import write_card
from raysyn.cluster.synthesize import claim, finish
from raysyn.config import CostConfig, SamplerConfig, SynthesizeConfig, SynthesizeJob, WorkersConfig
from raysyn.data.frames import read_frames, write_frames
from raysyn.data.requests import RequestPlan
from raysyn.data.storage import Storage
from raysyn.types import Frame
from tests.s3 import s3_storage

ROOT = Path(__file__).resolve().parents[2]
NUM_MASKS = 100
# The stage's own drawing on a Ray of its own with two actors; the driver's peak is printed, the actors tell theirs.
MEASURE = """
import os, pickle, sys
sys.path[:0] = [{root!r}, {folder!r}]
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import open_stage
from raysyn.cluster.synthesize import claim, draw_missing, finish
from raysyn.config import RayConfig, SynthesizeJob, WorkersConfig
os.environ["PYTHONPATH"] = {root!r} + ":" + {folder!r}
os.environ["SCALE_PEAKS"] = {peaks!r}
job = SynthesizeJob(storage={storage!r}, workers=WorkersConfig(num_workers=2, cpus_per_worker=0.5))
stage = open_stage({storage!r}, "synthesize", "scale")
with ray_session(RayConfig(num_cpus=2, object_store_mb=100)):
    spec = claim(stage, pickle.load(open({spec!r}, "rb")))
    draw_missing(job, stage, spec)
    finish(job, stage, spec)
from scale_sampler import peak
print(peak())
"""
MOCK = """
import os
import numpy as np

def peak():
    status = open("/proc/self/status").read().split()  # not ru_maxrss: that is inherited from what started us
    return int(status[status.index("VmHWM:") + 1])

def make(spec):
    place = os.environ.get("SCALE_PEAKS")

    def draw(label_map, view, seeds):
        if place:
            with open(f"{place}/{os.getpid()}", "w") as file:
                file.write(str(peak()))
        return label_map * (np.array(seeds, dtype=np.uint64) % 50).astype(np.uint8)[:, None, None]

    return draw
"""


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("frames")
    label_map = np.ones((8, 8), np.uint8)
    image = np.zeros_like(label_map)
    made = [Frame(f"m{i}", image, label_map, "2CH", "ED", f"patient{i}", "train", "phantom") for i in range(NUM_MASKS)]
    write_frames(Storage.at(folder), "train/shard-00000.parquet", made)
    (folder / "scale_sampler.py").write_text(MOCK)
    return str(folder)


def make_spec(frames: str, storage: str, num_requests: int, **options) -> SynthesisSpec:
    options = {"batch_size": 100, "shard_size": 2000, "mask_splits": ["train"], **options}
    config = SynthesizeConfig(num_warps=num_requests // NUM_MASKS, **options)
    return SynthesisSpec(
        plan=RequestPlan.of(config, {"train": [f"m{i}" for i in range(NUM_MASKS)]}), config=config,
        settings=settings_of("c" * 64, SamplerConfig(), config), metadata={"raysyn_fingerprint": "scale"},
        frames=frames, output=Storage.at(storage).join("synthesize", "scale").uri, model_dir="", model="mock",
        solver="heun", num_steps=2, num_function_evals=3, threads=1, key="synthesize mock", sampler="scale_sampler:make",
    )  # fmt: skip


@pytest.mark.cluster
@pytest.mark.slow
def test_ten_times_the_requests_take_the_same_memory(frames, tmp_path) -> None:
    """Driver and actors, the mock sampler on a real Ray."""
    import pickle

    peaks: dict[int, dict[str, int]] = {}
    for count in (10_000, 100_000):
        storage, told = tmp_path / f"{count}" / "runs", tmp_path / f"{count}" / "peaks"
        storage.mkdir(parents=True)
        told.mkdir()
        place = storage / "spec.pkl"
        place.write_bytes(pickle.dumps(make_spec(frames, str(storage), count)))
        said = {"root": str(ROOT), "folder": frames, "spec": str(place), "storage": str(storage), "peaks": str(told)}
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        done = subprocess.run([sys.executable, "-c", MEASURE.format(**said)], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        actors = [int(path.read_text()) for path in told.iterdir()]
        assert len(actors) == 2
        peaks[count] = {"driver": int(done.stdout.split()[-1]), "actor": max(actors)}
    print(peaks)
    for part in ("driver", "actor"):
        assert peaks[100_000][part] < 1.1 * peaks[10_000][part], peaks


def test_a_million_requests_are_listed_and_looked_up_in_seconds(frames, tmp_path) -> None:
    spec = make_spec(frames, str(tmp_path), 1_000_000, shard_size=200)
    started = time.process_time()
    spec = claim(open_stage(str(tmp_path), "synthesize", "scale"), spec)
    shards = list(spec.plan.shards())
    assert whole_shards(Storage.at(spec.output), shards) == {}
    assert time.process_time() - started < 10
    assert len(shards) == 5000


def test_the_plan_tells_images_evaluations_disk_and_money(frames, tmp_path, monkeypatch) -> None:
    from raysyn.cluster.synthesis_plan import estimate, probe

    monkeypatch.syspath_prepend(frames)
    spec = make_spec(frames, str(tmp_path), 1_000_000)
    started = time.process_time()
    probe(spec)
    assert time.process_time() - started < 5, "it asks for the requests that it draws, not for all"
    spec = make_spec(frames, str(tmp_path), 1000)
    found = probe(spec)
    assert not Path(spec.output).exists(), "a plan writes nothing"
    assert found["bytes_per_image"] > 0
    found["seconds_per_image"] = 3.6
    config = SynthesizeJob(
        workers=WorkersConfig(num_workers=2, gpus_per_worker=1.0, cpus_per_worker=0.0),
        cost=CostConfig(usd_per_gpu_hour=2.0),
    )
    plan = estimate(config, spec, found)
    assert (plan["num_images"], plan["num_evaluations"], plan["num_shards"]) == (1000, 3000, 1)
    assert plan["seconds"] == pytest.approx(1800)
    assert plan["usd"] == pytest.approx(2.0), "half an hour of two GPUs"


@pytest.mark.s3
def test_the_same_bytes_on_s3(frames, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(frames)
    written = []
    with s3_storage() as bucket:
        for storage in (str(tmp_path), bucket):
            spec = make_spec(frames, storage, 400, batch_size=50, shard_size=100)
            stage = open_stage(storage, "synthesize", "scale")
            spec = claim(stage, spec)
            writer = ShardWriter(spec)
            for shard in spec.plan.shards():
                writer.write(shard)
            outcome = finish(SynthesizeJob(), stage, spec)
            names = stage.storage.list(suffix=".parquet")
            written.append({n: hashlib.sha256(stage.storage.read_bytes(n)).hexdigest() for n in names})
            assert {s["name"]: s["sha256"] for s in outcome.manifest["shards"]} == written[-1]
            assert len({f.frame_id for f in read_frames(outcome.path)}) == 400
            assert json.loads(stage.storage.read_bytes("manifest.json"))["num_frames"] == 400
            card = stage.storage.read_bytes("README.md").decode()
            assert "license: apache-2.0" in card
            assert "Frames: 400 train." in card
            write_card(stage, spec, outcome.manifest, "camus")
            assert "license: other" in stage.storage.read_bytes("README.md").decode(), "not ours to license"
    assert written[0] == written[1]


def test_a_damaged_shard_is_not_whole(frames, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(frames)
    spec = make_spec(frames, str(tmp_path), 400, batch_size=50, shard_size=200)
    writer, shards = ShardWriter(spec), list(spec.plan.shards())
    for shard in shards:
        writer.write(shard)
    out = Storage.at(spec.output)
    first = Path(out.path, shards[0].name)
    data = first.read_bytes()
    first.write_bytes(data[:-100])
    assert list(whole_shards(out, shards)) == [shards[1].name]
    writer({"split": np.array(["train"]), "number": np.array([0]), "start": np.array([0]), "stop": np.array([200])})
    assert first.read_bytes() == data
