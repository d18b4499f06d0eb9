"""Synthesis on a real Ray with a slow mock sampler: the same bytes whoever draws, and exactly once whatever dies."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raysyn.cluster.session import ray_session
from raysyn.config import RayConfig
from raysyn.data.frames import read_frames
from raysyn.data.storage import Storage
from tests.cluster.test_synthesize import MOCK, make_spec, masks_in
from tests.processes import kill_driver

ROOT = Path(__file__).resolve().parents[2]
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
    return masks_in(tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Iterator[None]:
    """A Ray of this process for what is not disturbed, whose workers find the mock sampler."""
    place = tmp_path_factory.mktemp("sampler")
    (place / "mock_sampler.py").write_text(MOCK)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"PYTHONPATH": f"{ROOT}:{place}", "MOCK_SECONDS": "0"}.items():
            patch.setenv(key, value)
        with ray_session(RayConfig(num_cpus=2, object_store_mb=100)):
            yield


class Drill:
    """A synthesis in a folder of its own: by a driver and a Ray of its own, which may be killed, or in this process."""

    def __init__(self, folder: Path, frames: str, workers: int = 2, cpus: float = 0.5, **options) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder, folder / "drawn.log"
        (folder / "mock_sampler.py").write_text(MOCK)
        self.spec = make_spec(frames, folder / "runs", **options)
        (folder / "spec.pkl").write_bytes(pickle.dumps(self.spec))
        places = {"folder": str(folder), "spec": str(folder / "spec.pkl"), "storage": str(folder / "runs")}
        (folder / "drill_stage.py").write_text(STAGE.format(workers=workers, cpus=cpus, **places))
        (folder / "driver.py").write_text(DRIVER)
        self.out = Storage.at(self.spec.output)

    def start(self, seconds: float = 0.3, address: str = "", **settings: str) -> subprocess.Popen:
        """A driver of its own, with a Ray of its own unless it is to join one."""
        own = {"MOCK_SECONDS": str(seconds), "PYTHONPATH": f"{ROOT}:{self.folder}", **settings}
        kept = {k: v for k, v in os.environ.items() if address or not k.startswith("RAY_AUTH")}
        env = kept | own | ({"RAY_ADDRESS": address} if address else {})
        return subprocess.Popen(
            [sys.executable, str(self.folder / "driver.py")], cwd=self.folder, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self) -> None:
        """The same stage in this process's Ray, to its end."""
        runpy.run_path(str(self.folder / "drill_stage.py"))["draw"](None)

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

    def check_resumed(self, undisturbed: Drill, before: list[str]) -> None:
        """All is there as if nothing had happened, and what was whole `before` was drawn once."""
        self.check_whole(undisturbed.shards())
        drawn = [s for _, s in self.drawn()]
        assert all(drawn.count(s) == 1 for s in self.seeds_of(before))

    def seeds_of(self, names: list[str]) -> list[int]:
        return [
            r.noise_seed
            for s in self.spec.plan.shards()
            if s.name in names
            for b in self.spec.plan.batches(s)
            for r in b
        ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, frames, session) -> Drill:
    drill = Drill(tmp_path_factory.mktemp("undisturbed") / "one", frames, workers=1)
    drill.run()
    return drill


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
    process = drill.start()
    try:
        drill.wait_for_shards(random.Random(moment).randint(1, 5))
        before = drill.out.list(suffix=".parquet")
        os.kill(drill.drawn()[-1][0], signal.SIGKILL)
        said, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-3000:]
    drill.check_resumed(undisturbed, before)


@pytest.mark.cluster
@pytest.mark.parametrize("moment", [3, 4])
def test_kill_9_of_the_driver_and_the_same_command_again(moment: int, undisturbed, frames, tmp_path) -> None:
    drill = Drill(tmp_path / "driver", frames)
    process = drill.start()
    drill.wait_for_shards(random.Random(moment).randint(1, 7))
    kill_driver(process)
    before = drill.out.list(suffix=".parquet")
    assert not drill.out.exists("manifest.json")
    again = drill.start(0.0)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said[-3000:]
    drill.check_resumed(undisturbed, before)


@pytest.mark.cluster
@pytest.mark.parametrize("killed", [False, True])
def test_two_runs_at_once_write_the_same_bytes(killed: bool, undisturbed, frames, tmp_path) -> None:
    """Neither waits for the other: what both draw is the same, and put whole; one that finishes removes temporaries."""
    drill = Drill(tmp_path / "twice", frames, workers=1)
    both = [drill.start(0.1), drill.start(0.1)]
    if killed:
        drill.wait_for_shards(3)
        both[0].kill()
    said = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [-9 if killed else 0, 0], said
    drill.check_whole(undisturbed.shards())


@pytest.mark.cluster
@pytest.mark.parametrize("moment", [7, 8])
def test_kill_9_of_the_head_ends_in_a_resumable_state(moment: int, undisturbed, frames, tmp_path) -> None:
    drill = Drill(tmp_path / "head", frames)
    # Ray gives a head time to come back, then ends its driver: sooner than after a minute.
    process = drill.start(RAY_gcs_rpc_server_reconnect_timeout_s="5")
    drill.wait_for_shards(random.Random(moment).randint(1, 7))
    victims = [one for one in psutil.Process(process.pid).children() if one.name() in ("gcs_server", "raylet")]
    assert victims
    for victim in victims:
        victim.kill()
    before = drill.out.list(suffix=".parquet")
    try:
        process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    drill.run()
    drill.check_resumed(undisturbed, before)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("moment", [5, 6])
def test_kill_9_of_a_raylet(moment: int, undisturbed, frames, tmp_path, monkeypatch) -> None:
    """A node of two dies with its actor: the run goes on with the other node's, in one go."""
    from ray.cluster_utils import Cluster

    drill = Drill(tmp_path / "raylet", frames, cpus=1.0)
    monkeypatch.setenv("MOCK_SECONDS", "0.3")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{drill.folder}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    process = None
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        process = drill.start(address=cluster.address)
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
    drill.check_resumed(undisturbed, before)


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
