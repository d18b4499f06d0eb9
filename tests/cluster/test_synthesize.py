"""Synthesis on a real Ray with a slow mock sampler: the same bytes whoever draws, and exactly once whatever dies."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from raysyn.cluster.sampler_actor import ShardWriter, SynthesisSpec, faithfulness_of, read_record, settings_of
from raysyn.cluster.stage import lost_shards, open_stage
from raysyn.cluster.synthesis_folder import refuse_foreign
from raysyn.cluster.synthesize import claim, finish, segmenter_patients
from raysyn.config import SamplerConfig, SynthesizeConfig, SynthesizeJob, TaskConfig
from raysyn.data.frames import read_arrays, read_frames, write_frames
from raysyn.data.phantom import phantom_patient
from raysyn.data.requests import RequestPlan
from raysyn.data.storage import Storage
from raysyn.types import UserError

ROOT = Path(__file__).resolve().parents[2]
MOCK = '''
"""Draws an image that depends on map and seed alone, slowly, and notes who drew what."""
import os, time
import numpy as np

def make(spec):
    log = os.environ["MOCK_LOG"]
    def draw(label_map, view, seeds):
        time.sleep(float(os.environ.get("MOCK_SECONDS", "0.05")))
        with open(log, "a") as file:
            file.write("".join(f"{os.getpid()} {s}\\n" for s in seeds))
        noise = np.stack([np.random.default_rng(s).integers(0, 256, label_map.shape[1:]) for s in seeds])
        return ((noise + view[:, None, None]) % 256 * (label_map > 0)).astype(np.uint8)
    return draw
'''
STAGE = """
import pickle
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import open_stage
from raysyn.cluster.synthesize import claim, draw_missing, finish
from raysyn.config import RayConfig, SynthesizeJob, WorkersConfig

def draw(config):
    spec = pickle.load(open({spec!r}, "rb"))
    job = SynthesizeJob(storage={storage!r}, ray=RayConfig(num_cpus=2, object_store_mb=100),
                        workers=WorkersConfig(num_workers={workers}, cpus_per_worker={cpus}))
    stage = open_stage({storage!r}, "synthesize", "drill")
    with ray_session(job.ray):
        spec = claim(stage, spec)
        draw_missing(job, stage, spec)
        return finish(job, stage, spec)
"""
DRIVER = """
import sys
from raysyn.cluster.job import run_job
sys.exit(run_job("synthesize", "drill_stage:draw", ["scale=tiny"]))
"""


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("frames")
    for split, patients in (("train", range(3)), ("validation", range(3, 4))):
        made = [f for p in patients for f in phantom_patient(0, p, 64, split)]
        write_frames(Storage.at(folder), f"{split}/shard-00000.parquet", made)
    return str(folder)


def make_spec(frames: str, storage: Path, **options) -> SynthesisSpec:
    config = SynthesizeConfig(**{"num_warps": 6, "batch_size": 4, "shard_size": 8, **options})
    masks = {s: read_arrays(frames, s).frame_id for s in config.mask_splits}
    return SynthesisSpec(
        plan=RequestPlan.of(config, masks), config=config,
        settings=settings_of("c" * 64, SamplerConfig(), config), metadata={"raysyn_fingerprint": "drill"},
        frames=frames, output=Storage.at(storage).join("synthesize", "drill").uri, model_dir="", model="mock",
        solver="heun", num_steps=2, num_function_evals=3, threads=1, key="synthesize mock", sampler="mock_sampler:make",
    )  # fmt: skip


class Drill:
    """A synthesis in a process of its own, in a folder of its own."""

    def __init__(self, folder: Path, frames: str, workers: int = 2, cpus: float = 0.5, **options) -> None:
        import pickle

        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder, folder / "drawn.log"
        (folder / "mock_sampler.py").write_text(MOCK)
        self.spec = make_spec(frames, folder / "runs", **options)
        (folder / "spec.pkl").write_bytes(pickle.dumps(self.spec))
        places = {"folder": str(folder), "spec": str(folder / "spec.pkl"), "storage": str(folder / "runs")}
        (folder / "drill_stage.py").write_text(STAGE.format(workers=workers, cpus=cpus, **places))
        (folder / "driver.py").write_text(DRIVER)
        self.out = Storage.at(self.spec.output)

    def start(self, seconds: float = 0.05, address: str = "") -> subprocess.Popen:
        own = {"MOCK_LOG": str(self.log), "MOCK_SECONDS": str(seconds), "PYTHONPATH": f"{ROOT}:{self.folder}"}
        own["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # a dead head is given up sooner than in a minute
        kept = {k: v for k, v in os.environ.items() if address or not k.startswith("RAY_AUTH")}
        env = kept | own | ({"RAY_ADDRESS": address} if address else {})
        return subprocess.Popen(
            [sys.executable, str(self.folder / "driver.py")], cwd=self.folder, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self) -> str:
        process = self.start(0.0)
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
        return said

    def shards(self) -> dict[str, str]:
        return {n: hashlib.sha256(self.out.read_bytes(n)).hexdigest() for n in self.out.list(suffix=".parquet")}

    def drawn(self) -> list[tuple[int, int]]:
        lines = self.log.read_text().split("\n") if self.log.exists() else []
        return [(int(p), int(s)) for p, s in (line.split() for line in lines if len(line.split()) == 2)]

    def wait_for_shards(self, count: int) -> None:
        deadline = time.time() + 200
        while len(self.out.list(suffix=".parquet")) < count:
            assert time.time() < deadline, "no shard came"
            time.sleep(0.02)

    def check_whole(self, expected: dict[str, str]) -> None:
        assert self.shards() == expected
        manifest = self.out.read_json("manifest.json")
        assert {s["name"]: s["sha256"] for s in manifest["shards"]} == expected
        found = list(read_frames(self.spec.output))
        assert len(found) == len({f.frame_id for f in found}) == self.spec.plan.num_requests() == manifest["num_frames"]
        left = [
            p
            for p in Path(self.out.path).rglob("*")
            if p.is_file() and p.suffix not in (".parquet", ".json", ".md", ".png")
        ]
        assert left == []

    def seeds_of(self, names: list[str]) -> list[int]:
        return [
            r.noise_seed
            for s in self.spec.plan.shards()
            if s.name in names
            for b in self.spec.plan.batches(s)
            for r in b
        ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, frames) -> Drill:
    drill = Drill(tmp_path_factory.mktemp("undisturbed") / "one", frames, workers=1)
    drill.run()
    return drill


def test_a_shard_is_a_pure_function_of_the_plan(frames, tmp_path, monkeypatch) -> None:
    """Without Ray: two writers, in other orders, make the same bytes; provenance and splits are the masks'."""
    (tmp_path / "mock_sampler.py").write_text(MOCK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOCK_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MOCK_SECONDS", "0")
    found = []
    for name, order in (("a", 1), ("b", -1)):
        spec = make_spec(frames, tmp_path / name)
        writer = ShardWriter(spec)
        for shard in list(spec.plan.shards())[::order]:
            writer.write(shard)
        out = Storage.at(spec.output)
        found.append({n: out.read_bytes(n) for n in out.list(suffix=".parquet")})
    assert found[0] == found[1]
    masks = {f.frame_id: f for split in ("train", "validation") for f in read_frames(frames, split)}
    for frame in read_frames(spec.output):
        mask = masks[frame.provenance.mask_frame_id]
        assert (frame.patient_id, frame.split, frame.view, frame.phase) == (
            mask.patient_id,
            mask.split,
            mask.view,
            mask.phase,
        )
        assert frame.source == "synthetic"
        assert frame.provenance.cpu_seconds is None
        assert not np.array_equal(frame.label_map, mask.label_map)
        assert (frame.image[frame.label_map == 0] == 0).all()


def test_the_quality_gate_retries_under_new_seeds_and_counts_them(frames, tmp_path, monkeypatch) -> None:
    (tmp_path / "mock_sampler.py").write_text(MOCK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOCK_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MOCK_SECONDS", "0")
    spec = make_spec(frames, tmp_path / "runs", min_faithfulness=0.5, max_attempts=3)
    writer = ShardWriter(spec)
    writer.faithfulness = lambda images, maps: (images.mean((1, 2)) % 1 + 0.2).clip(0, 1)
    shard = next(spec.plan.shards())
    record = writer.write(shard)
    found = list(read_frames(spec.output))
    assert record["attempts"] > 8
    assert record["below_min_faithfulness"] == sum(f.provenance.faithfulness < 0.5 for f in found)
    first = {r.noise_seed for b in spec.plan.batches(shard) for r in b}
    assert any(f.provenance.noise_seed not in first for f in found)
    for other in spec.plan.shards():
        writer.write(other)
    judged = dataclasses.replace(spec, segmenter_fitted_on=("p1",))
    manifest = finish(SynthesizeJob(), open_stage(str(tmp_path / "runs"), "synthesize", "drill"), judged).manifest
    assert (manifest["fitted_on"], manifest["segmenter_fitted_on"]) == ([], ["p1"])


@pytest.mark.cluster
def test_one_and_two_actors_write_the_same_bytes(undisturbed, frames, tmp_path) -> None:
    two = Drill(tmp_path / "two", frames, workers=2)
    two.run()
    two.check_whole(undisturbed.shards())
    assert len({pid for pid, _ in two.drawn()}) == 2
    assert len(two.shards()) == 12
    two.run()  # nothing is left to draw
    assert len(two.drawn()) == two.spec.plan.num_requests()


@pytest.mark.cluster
@pytest.mark.parametrize("moment", [1, 2])
def test_kill_9_of_an_actor(moment: int, undisturbed, frames, tmp_path) -> None:
    drill = Drill(tmp_path / "actor", frames)
    process = drill.start(0.3)
    try:
        drill.wait_for_shards(random.Random(moment).randint(1, 5))
        before = drill.out.list(suffix=".parquet")
        os.kill(drill.drawn()[-1][0], signal.SIGKILL)
        said, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-3000:]
    drill.check_whole(undisturbed.shards())
    drawn = [s for _, s in drill.drawn()]
    assert all(drawn.count(s) == 1 for s in drill.seeds_of(before))


@pytest.mark.cluster
@pytest.mark.parametrize("moment", [3, 4])
def test_kill_9_of_the_driver_and_the_same_command_again(moment: int, undisturbed, frames, tmp_path) -> None:
    drill = Drill(tmp_path / "driver", frames)
    process = drill.start(0.3)
    drill.wait_for_shards(random.Random(moment).randint(1, 7))
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    before = drill.out.list(suffix=".parquet")
    assert not drill.out.exists("manifest.json")
    time.sleep(3)  # Ray's own processes notice that their driver is gone
    drill.run()
    drill.check_whole(undisturbed.shards())
    drawn = [s for _, s in drill.drawn()]
    assert all(drawn.count(s) == 1 for s in drill.seeds_of(before))


@pytest.mark.cluster
@pytest.mark.parametrize("moment", [7, 8])
def test_kill_9_of_the_head_ends_in_a_resumable_state(moment: int, undisturbed, frames, tmp_path) -> None:
    drill = Drill(tmp_path / "head", frames)
    process = drill.start(0.3)
    drill.wait_for_shards(random.Random(moment).randint(1, 7))
    victims = [one for one in psutil.Process(process.pid).children() if one.name() in ("gcs_server", "raylet")]
    assert victims
    for victim in victims:
        victim.kill()
    before = drill.out.list(suffix=".parquet")
    try:
        process.communicate(timeout=150)  # Ray gives a head time to come back, then ends its driver
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    drill.run()
    drill.check_whole(undisturbed.shards())
    drawn = [s for _, s in drill.drawn()]
    assert all(drawn.count(s) == 1 for s in drill.seeds_of(before))


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("moment", [5, 6])
def test_kill_9_of_a_raylet(moment: int, undisturbed, frames, tmp_path, monkeypatch) -> None:
    """A node of two dies with its actor: the run goes on with the other node's, in one go."""
    from ray.cluster_utils import Cluster

    drill = Drill(tmp_path / "raylet", frames, cpus=1.0)
    for key, value in {"MOCK_LOG": str(drill.log), "MOCK_SECONDS": "0.3"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{drill.folder}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    process = None
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        process = drill.start(0.3, address=cluster.address)
        drill.wait_for_shards(random.Random(moment).randint(2, 6))
        before = drill.out.list(suffix=".parquet")
        raylet = node.all_processes["raylet"][0].process
        os.kill(raylet.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=240)
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        cluster.shutdown()
    assert process.returncode == 0, said[-3000:]
    drill.check_whole(undisturbed.shards())
    drawn = [s for _, s in drill.drawn()]
    assert all(drawn.count(s) == 1 for s in drill.seeds_of(before))


@pytest.mark.cluster
@pytest.mark.parametrize("size", ["120k", "180k"])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(size: str, undisturbed, frames, tmp_path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    drill = Drill(tmp_path / "disk", frames)
    (drill.folder / "runs").symlink_to(place)
    try:
        process = drill.start(0.0)
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 2, said[-3000:]
        assert "no space left" in said.strip().splitlines()[-1]
        assert not drill.out.exists("manifest.json")
        whole = drill.shards()
        assert all(undisturbed.shards()[name] == sha for name, sha in whole.items())
        subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)
        drill.run()
        drill.check_whole(undisturbed.shards())
    finally:
        subprocess.run(["umount", str(place)], check=False)


def test_another_data_sets_folder_is_refused(frames, tmp_path) -> None:
    spec = make_spec(frames, tmp_path)
    assert claim(open_stage(str(tmp_path / "new"), "synthesize", "drill"), spec).threads == 1
    later = claim(open_stage(str(tmp_path / "new"), "synthesize", "drill"), dataclasses.replace(spec, threads=2))
    assert later.threads == 1, "finished with the threads it was begun with"
    assert later.metadata["raysyn_threads"] == "1"
    stage = open_stage(str(tmp_path), "synthesize", "drill")
    stage.storage.write_json("plan.json", {"fingerprint": "other", "num_requests": 1, "settings": {}})
    with pytest.raises(UserError, match="holds another data set"):
        claim(stage, spec)
    for damaged in ({}, [], "x"):
        stage.storage.write_json("plan.json", damaged)
        with pytest.raises(UserError, match=r"plan\.json names none"):
            claim(stage, spec)
    stage.storage.remove("plan.json")
    stage.storage.write_atomic("train/shard-00000.parquet", b"x")
    with pytest.raises(UserError, match="not this data set's"):
        claim(stage, spec)


def test_what_a_killed_overwrite_leaves_is_not_whole(tmp_path, monkeypatch) -> None:
    stage = open_stage(str(tmp_path), "synthesize", "key")
    stage.storage.write_atomic("train/a.parquet", b"x")
    stage.finish({"shards": [{"name": "train/a.parquet"}]})

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "remove_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        open_stage(str(tmp_path), "synthesize", "key", overwrite=True)
    assert open_stage(str(tmp_path), "synthesize", "key").outcome() is None
    assert stage.storage.exists("train/a.parquet")


def test_a_finished_set_that_lost_a_shard_is_unfinished(tmp_path, capsys) -> None:
    stage = open_stage(str(tmp_path), "synthesize", "key")
    sha256 = hashlib.sha256(b"x").hexdigest()
    manifest = {"shards": [{"name": f"train/{name}.parquet", "bytes": 1, "sha256": sha256} for name in "ab"]}
    write = stage.storage.write_atomic
    for damage in (stage.storage.remove, lambda name: write(name, b""), lambda name: write(name, b"y")):
        for name in "ab":
            stage.storage.write_atomic(f"train/{name}.parquet", b"x")
        stage.finish(manifest)
        assert not lost_shards(stage, manifest)
        damage("train/b.parquet")
        assert lost_shards(stage, manifest)
        assert stage.outcome() is None
        assert "1 shards of" in capsys.readouterr().out
    for altered in ({}, [], {"shards": 3}, {"shards": [{"name": "train/a.parquet"}]}):
        with pytest.raises(UserError, match=r"manifest\.json: tells of no shards"):
            lost_shards(stage, altered)


def test_a_lost_plan_is_told_by_the_shards(frames, tmp_path) -> None:
    spec = make_spec(frames, tmp_path)
    stage = open_stage(str(tmp_path), "synthesize", "drill")
    told = {"raysyn_fingerprint": "drill", "raysyn_threads": "3", "raysyn_packages": "torch 1"}
    name = list(spec.plan.shards())[1].name
    stage.storage.write_atomic(next(spec.plan.shards()).name, b"cut off")
    write_frames(stage.storage, name, list(read_frames(frames, limit=1)), told)
    assert claim(stage, spec).threads == 3
    assert stage.storage.read_json("plan.json")["packages"] == "torch 1"
    stage.storage.remove("plan.json")
    write_frames(stage.storage, name, list(read_frames(frames, limit=1)), {**told, "raysyn_fingerprint": "other"})
    with pytest.raises(UserError, match="not this data set's"):
        claim(stage, spec)


def test_a_file_that_readers_would_take_for_a_shard_is_refused(frames, tmp_path) -> None:
    spec = make_spec(frames, tmp_path)
    stage = open_stage(str(tmp_path), "synthesize", "drill")
    claim(stage, spec)
    stage.storage.write_atomic(next(spec.plan.shards()).name, b"x")
    stage.storage.write_atomic("notes.txt", b"x")
    claim(stage, spec)
    stage.storage.write_atomic("train/shard-00000 (copy).parquet", b"x")
    for check in (lambda: claim(stage, spec), lambda: refuse_foreign(stage, spec.plan)):
        with pytest.raises(UserError, match=r"\(copy\)\.parquet: not a shard of this data set"):
            check()


def test_what_is_written_of_a_synthesis_is_json_to_every_reader(frames, tmp_path) -> None:
    spec = make_spec(frames, tmp_path)
    stage = open_stage(str(tmp_path), "synthesize", "drill")
    claim(stage, spec)
    assert b"Infinity" not in stage.storage.read_bytes("plan.json")
    assert stage.storage.read_json("plan.json")["settings"]["sampler"]["guidance_sigma_max"] is None


def test_what_a_worker_cannot_load_is_refused_and_no_fault(frames, tmp_path, monkeypatch) -> None:
    """An actor whose constructor raises would be started again and again."""
    (tmp_path / "mock_sampler.py").write_text(MOCK)
    (tmp_path / "segmenter").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOCK_LOG", str(tmp_path / "log"))
    spec = make_spec(frames, tmp_path / "runs", segmenter_dir=str(tmp_path / "segmenter"))
    with pytest.raises(UserError, match="segmenter: not a task model"):
        faithfulness_of(spec.config)
    with monkeypatch.context() as patched:
        patched.setattr("raysyn.tasks.fitting.load_task", lambda _: SimpleNamespace(task=TaskConfig("classification")))
        with pytest.raises(UserError, match="segmenter holds a classification network"):
            faithfulness_of(spec.config)
    writer = ShardWriter(spec)
    shard = next(spec.plan.shards())
    rows = {key: np.array([getattr(shard, key)]) for key in ("split", "number", "start", "stop")}
    assert "segmenter: not a task model" in writer(rows)["refused"][0]
    Storage.at(tmp_path / "segmenter").write_json("task.json", {"patients": ["p1", "p2"]})
    assert segmenter_patients(spec.config) == ("p1", "p2")
    assert segmenter_patients(SynthesizeConfig()) == ()
    record = Storage.at(spec.output)
    record.write_atomic(shard.name, b"x")
    for altered in ({}, [], {"bytes": 1}):
        record.write_json(shard.record, altered)
        assert read_record(record, shard) is None


@pytest.mark.cluster
def test_the_data_set_opens_without_our_code(undisturbed) -> None:
    import datasets
    import duckdb
    import polars
    import pyarrow.parquet as pq

    folder = undisturbed.out.path
    files = sorted(str(p) for p in Path(folder, "train").glob("*.parquet"))
    loaded = datasets.load_dataset("parquet", data_files={"train": files}, split="train", cache_dir=f"{folder}-cache")
    assert loaded[0]["image"].size == (64, 64)
    assert len(loaded) == undisturbed.spec.plan.num_requests("train")
    assert duckdb.sql(f"select count(distinct frame_id) from '{folder}/train/*.parquet'").fetchall() == [(len(loaded),)]
    assert polars.read_parquet(files)["source"].unique().to_list() == ["synthetic"]
    assert json.loads(pq.read_schema(files[0]).metadata[b"huggingface"])
    card = Path(folder, "README.md").read_text()
    assert "samples.png" in card
    assert Path(folder, "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_a_fit_is_found_where_its_storage_was_moved_to(tmp_path) -> None:
    from raysyn.cluster.fit import fit_fingerprint
    from raysyn.cluster.inputs import prepare_fingerprint
    from raysyn.cluster.synthesize import find_model
    from raysyn.compose import load_job

    jobs = [load_job(job, ["scale=tiny", "model=edm", f"storage={tmp_path}"]) for job in ("fit", "synthesize")]
    stage = open_stage(str(tmp_path), "fit", fit_fingerprint(jobs[0], prepare_fingerprint(jobs[0])))
    stage.finish({"model_dir": "/where/it/was/fitted/model"})
    assert find_model(jobs[1]) == f"{stage.path}/model"


def test_a_quality_gate_without_a_judge_is_refused(tmp_path) -> None:
    from raysyn.cluster.synthesize import synthesize
    from raysyn.compose import load_job

    base = ["scale=tiny", f"storage={tmp_path}", "synthesize.min_faithfulness=0.9"]
    with pytest.raises(UserError, match=r"needs synthesize\.segmenter_dir"):
        synthesize(load_job("synthesize", base))
    with pytest.raises(UserError, match="no such folder"):
        synthesize(load_job("synthesize", [*base, f"synthesize.segmenter_dir={tmp_path}/none"]))
    with pytest.raises(UserError, match="is not fitted under"):
        synthesize(load_job("synthesize", base[:2]))


@pytest.mark.cluster
def test_a_foreign_model_folder_ends_with_2_and_nothing_written(tmp_path, capsys) -> None:
    from raysyn.cluster.job import run_job

    stage, storage = "raysyn.cluster.synthesize:synthesize", tmp_path / "runs"
    base = ["scale=tiny", f"storage={storage}", "tracking.enabled=false"]
    foreign = tmp_path / "foreign"
    for content, says in (
        (None, "no model.json there"),
        ("{}", "not a model of this version"),
        ("{", "cannot be read"),
    ):
        if content is not None:
            foreign.mkdir(exist_ok=True)
            (foreign / "model.json").write_text(content)
        assert run_job("synthesize", stage, [*base, f"model_dir={foreign}"]) == 2
        assert says in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (storage / "synthesize").exists()
