"""`python -m benchmarks.scheduler`: how many shards a synthesis hands out and looks up, into results/scheduler.csv.

Everything but the sampler is the stage's own code. The mock sampler draws nothing and sleeps where a GPU would work, so
that what is measured is Ray Data handing out shards, the writer and the storage. The cluster is 64 logical nodes on one
machine, a raylet each with its agents, its object store and one CPU, and a head without CPUs; RAYSYN_BENCH_NODES asks for
another number. Rows of nodes begin with their number.
"""

from __future__ import annotations

import csv
import datetime
import json
import logging
import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.logical_nodes import footprint, idle_cores, logical_nodes, own_mib
from raysyn.cluster.sampler_actor import ShardWriter, SynthesisSpec, read_record, settings_of, whole_shards
from raysyn.cluster.stage import open_stage
from raysyn.config import SamplerConfig, SynthesizeConfig, SynthesizeJob, WorkersConfig
from raysyn.data.frames import read_light, write_frames
from raysyn.data.requests import RequestPlan, Shard
from raysyn.data.storage import Storage
from raysyn.types import Frame

RESULTS = Path(__file__).parent / "results" / "scheduler.csv"
COLUMNS = ("name", "value", "unit", "how", "machine", "date")
NODES = int(os.environ.get("RAYSYN_BENCH_NODES", "64"))
GPU_SECONDS = 7.1  # a shard of 256 images of `edm_l64` with 8 evaluations on an A100, as infra/CAPACITY.md reckons
NUM_MASKS = 100
TEN_MILLION = 10_000_000
SHARD_SIZE = 256  # the default of synthesize.shard_size
Row = tuple[str, float, str, str]


def mock_sampler(spec: SynthesisSpec) -> Any:
    """Black images, after the seconds a batch that `spec.metadata` names, and in the folder that it names a line a batch.

    The line is the first image's seed and this process's MiB, in a file named by node and process.
    """
    seconds, log = float(spec.metadata["sleep"]), None
    if folder := spec.metadata["drawn"]:
        import ray

        log = Path(folder, f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}")
        log.touch()

    def draw(label_map: np.ndarray, view: np.ndarray, seeds: list[int]) -> np.ndarray:
        time.sleep(seconds)
        if log is not None:
            with log.open("a") as file:
                file.write(f"{seeds[0]} {own_mib() if seconds else 0:.1f}\n")
        return np.zeros_like(label_map)

    return draw


def make_spec(
    folder: str, storage: str, num_images: int, shard_size: int, sleep: float = 0.0, drawn: str = ""
) -> SynthesisSpec:
    """A plan of `num_images` over 100 masks of 8x8 px; a shard is one batch and takes `sleep` seconds."""
    config = SynthesizeConfig(
        num_warps=num_images // NUM_MASKS, batch_size=shard_size, shard_size=shard_size, mask_splits=["train"]
    )
    return SynthesisSpec(
        plan=RequestPlan.of(config, {"train": [f"m{i}" for i in range(NUM_MASKS)]}), config=config,
        settings=settings_of("c" * 64, SamplerConfig(), config), metadata={"sleep": str(sleep), "drawn": drawn}, frames=folder,
        output=Storage.at(storage).join("synthesize", "bench").uri, model_dir="", model="mock", solver="heun",
        num_steps=2, num_function_evals=3, threads=1, key="synthesize mock",
        sampler="benchmarks.scheduler:mock_sampler",
    )  # fmt: skip


def make_masks(folder: str) -> None:
    """The frames that the plans draw from."""
    label_map = np.ones((8, 8), np.uint8)
    made = [Frame(f"m{i}", label_map, label_map, "2CH", "ED", f"p{i}", "train", "phantom") for i in range(NUM_MASKS)]
    write_frames(Storage.at(folder), "train/shard-00000.parquet", made)


@dataclass(frozen=True)
class Pace:
    """One run of the stage: `seconds` from the first shard's begin to the last's end, the sum over nodes of those `spent`
    on shards, the shards that each node drew, by (node, process), and the most MiB of the actors together."""

    shards: int
    sleep: float
    seconds: float
    spent: float
    drawn: dict[tuple[str, str], int]
    actors_mib: float

    @property
    def efficiency(self) -> float:
        """The time that the nodes would take if they did nothing but draw, over the time that they took."""
        return self.shards * self.sleep / (len(self.drawn) * self.seconds)


def pace(folder: str, nodes: int, num_shards: int, sleep: float) -> Pace:
    """Draw `num_shards` of 50 images with an actor on each of `nodes`. Raises RuntimeError unless each frame was drawn
    and stored once, and each node had one actor."""
    import ray.data

    from raysyn.cluster.synthesize import claim, draw_missing

    ray.data.DataContext.get_current().wait_for_min_actors_s = 1800  # all actors up before the first shard
    with tempfile.TemporaryDirectory() as storage, tempfile.TemporaryDirectory() as log:
        spec = make_spec(folder, storage, num_shards * 50, 50, sleep, log)
        stage = open_stage(storage, "synthesize", "bench")
        draw_missing(
            SynthesizeJob(storage=storage, workers=WorkersConfig(num_workers=nodes)), stage, claim(stage, spec)
        )
        records = [(s, read_record(stage.storage, s)) for s in spec.plan.shards()]
        ends = {s.name: os.stat(f"{stage.storage.path}/{s.name}").st_mtime for s, _ in records}
        spent = {r["name"]: r["seconds"] for _, r in records if r is not None}
        stored = [i for s, _ in records for i in read_light(stage.storage, s.name)["frame_id"].to_pylist()]
        lines = {}  # by (node, process)
        for place in Path(log).iterdir():
            node, process = place.name.split("-")
            lines[node, process] = [line.split() for line in place.read_text().splitlines()]
    seeds = [seed for drawn in lines.values() for seed, _ in drawn]
    mib = sum(max((float(m) for _, m in drawn), default=0.0) for drawn in lines.values())
    if not num_shards == len(seeds) == len(set(seeds)) or not num_shards * 50 == len(stored) == len(set(stored)):
        raise RuntimeError(f"{len(seeds)} batches drawn and {len(stored)} frames stored of {num_shards} shards of 50")
    if not nodes == len(lines) == len({node for node, _ in lines}):
        raise RuntimeError(f"{len(lines)} actors on {len({node for node, _ in lines})} of {nodes} nodes")
    seconds = max(ends.values()) - min(ends[name] - spent[name] for name in ends)
    return Pace(num_shards, sleep, seconds, sum(spent.values()), {k: len(v) for k, v in lines.items()}, mib)


def scheduling(folder: str, nodes: int = NODES, rounds: int = 10, sleep: float = GPU_SECONDS) -> list[Row]:
    """What `nodes` logical nodes cost, the fastest that they are served, and how they keep up at a GPU's pace."""
    started = time.perf_counter()
    with logical_nodes(nodes):
        up, bare, idle = time.perf_counter() - started, footprint(), idle_cores()
        print(f"{nodes} nodes without actors, MiB by process: {bare.by_kind}", flush=True)
        paced = pace(folder, nodes, rounds * nodes, sleep)
        load = os.getloadavg()[0]
        print(
            f"{nodes} nodes: {paced.shards} shards in {paced.seconds:.1f} s, efficiency {paced.efficiency}", flush=True
        )
        fastest = pace(folder, nodes, max(1500, rounds * nodes) if sleep else nodes, 0.0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    by_node = sorted(paced.drawn.values())
    how = f"{nodes} logical nodes of one CPU, an actor each, mock sampler"
    ask = f"{how} of {sleep:g} s a shard"
    rows = [
        ("paced", paced.shards / paced.seconds, "shards/s", f"{ask}: {nodes / sleep:.3g} shards/s at most"),
        (
            "efficiency",
            100 * paced.efficiency,
            "%",
            f"ideal time over actual, {rounds} shards a node, load average {load:.0f}",
        ),
        (
            "busy",
            100 * paced.spent / (nodes * paced.seconds),
            "%",
            "of the nodes' time spent on shards, their writing included",
        ),
        ("fewest", by_node[0], "shards", f"that a node drew, of {paced.shards}; each shard was drawn once"),
        ("most", by_node[-1], "shards", f"that a node drew, of {paced.shards}"),
        (
            "fastest",
            fastest.shards / fastest.seconds,
            "shards/s",
            f"{how} without delay, {fastest.shards} shards of 50",
        ),
        ("driver_peak", peak, "MiB", "resident, the driver's own process over all of it"),
        ("memory", bare.mib, "MiB", "PSS of the nodes without actors: raylets and their agents, head included"),
        ("memory_actors", paced.actors_mib, "MiB", "PSS of the actors at their most"),
        ("start", up, "s", "to start the nodes, four at a time"),
        ("start_cpu", bare.cpu_seconds / nodes, "CPU s", "of a node to start"),
        ("idle", idle, "cores", "that the cluster keeps busy with nothing to do"),
    ]
    return [(f"{nodes}_nodes_{name}", value, unit, note) for name, value, unit, note in rows]


def listing(folder: str) -> list[Row]:
    """10 million images in shards of 256: planning them, and finding all of them whole in a local folder."""
    with tempfile.TemporaryDirectory() as storage:
        spec = make_spec(folder, storage, TEN_MILLION, SHARD_SIZE)
        started = time.perf_counter()
        shards = list(spec.plan.shards())
        planned = time.perf_counter() - started
        write_empty(Storage.at(spec.output), shards)
        started = time.perf_counter()
        found = whole_shards(Storage.at(spec.output), shards)
        listed = time.perf_counter() - started
        assert len(found) == len(shards) == -(-TEN_MILLION // SHARD_SIZE)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        ("shards_10m", len(shards), "shards", "10 million images, 256 a shard"),
        ("plan_10m", planned, "s", "their plan, as the driver makes it at start and at the end"),
        ("list_10m", listed, "s", "all of them found whole in a local folder: one listing, a record read for each"),
        ("list_10m_peak", peak, "MiB", "resident, the process that listed them"),
    ]


def write_empty(storage: Storage, shards: list[Shard]) -> None:
    """One byte for each shard and the record that declares it whole."""
    for folder in {"shards", *(s.split for s in shards)}:
        Path(storage.path, folder).mkdir(parents=True, exist_ok=True)
    for shard in shards:
        Path(storage.path, shard.name).write_bytes(b"x")
        record = {"name": shard.name, "rows": shard.stop - shard.start, "bytes": 1, "sha256": "0" * 64, "seconds": 1.0}
        Path(storage.path, shard.record).write_text(json.dumps(record))


class _Requests(logging.Handler):
    """Counts the HTTP requests that the S3 server logs, by method."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())  # the server colours some of its lines
        self.seen[plain.partition('"')[2].partition(" ")[0]] += 1


def object_requests(folder: str, num_shards: int = 40) -> list[Row]:
    """Requests to an S3 server (moto, loopback): writing a shard, and looking one up that is whole."""
    import boto3
    from moto.server import ThreadedMotoServer

    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    counter, log = _Requests(), logging.getLogger("werkzeug")
    log.addHandler(counter)
    log.setLevel(logging.INFO)
    log.propagate = False
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="sets")
        spec = make_spec(folder, f"s3://sets/runs?scheme=http&endpoint_override={host}:{port}", num_shards * 50, 50)
        writer, shards = ShardWriter(spec), list(spec.plan.shards())
        counter.seen.clear()
        columns = {k: np.array([getattr(s, k) for s in shards]) for k in ("split", "number", "start", "stop")}
        writer(columns)
        written = counter.seen.copy()
        counter.seen.clear()
        assert len(whole_shards(Storage.at(spec.output), shards)) == num_shards
        looked = counter.seen.copy()
    finally:
        server.stop()
    return [
        (f"s3_{what}_{method.lower()}", count / num_shards, "requests a shard", f"{what} shards, counted by the server")
        for what, seen in (("written", written), ("looked_up", looked))
        for method, count in sorted(seen.items())
    ]


def save(rows: list[Row]) -> None:
    """Put `rows` into the table; rows of other parts, measured before, stay."""
    from raysyn.report.write import machine

    date, known = datetime.date.today().isoformat(), {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            known = {row[0]: row for row in list(csv.reader(file))[1:]}
    for name, value, unit, how in rows:
        known[name] = [name, f"{value:.4g}", unit, how, machine(), date]
        print(f"{name:28} {value:10.4g} {unit:18} {how}", flush=True)
    with RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *known.values()])


def main() -> None:
    """Run the parts named on the command line (listing, requests, scheduling), or all, each into the table."""
    parts = {"listing": listing, "requests": object_requests, "scheduling": scheduling}
    with tempfile.TemporaryDirectory() as folder:
        make_masks(folder)
        for name in sys.argv[1:] or parts:
            save(parts[name](folder))


if __name__ == "__main__":
    main()
