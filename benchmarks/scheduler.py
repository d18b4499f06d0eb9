"""`python -m benchmarks.scheduler`: how many shards a synthesis hands out and looks up, into results/scheduler.csv.

Everything but the sampler is the stage's own code. The mock sampler draws nothing and sleeps where a GPU would work, so
that what is measured is Ray Data handing out shards, the writer and the storage. One node with 64 logical CPUs and 64
worker processes, not 64 raylets: those fit neither the memory nor the two cores of the machine that this was made on.
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
from pathlib import Path
from typing import Any

import numpy as np

from raysyn.cluster.sampler_actor import ShardWriter, SynthesisSpec, read_record, settings_of, whole_shards
from raysyn.cluster.stage import open_stage
from raysyn.config import RayConfig, SamplerConfig, SynthesizeConfig, SynthesizeJob, WorkersConfig
from raysyn.data.frames import write_frames
from raysyn.data.requests import RequestPlan, Shard
from raysyn.data.storage import Storage
from raysyn.types import Frame

RESULTS = Path(__file__).parent / "results" / "scheduler.csv"
COLUMNS = ("name", "value", "unit", "how", "machine", "date")
WORKERS = int(os.environ.get("RAYSYN_BENCH_WORKERS", "64"))
NUM_MASKS = 100
TEN_MILLION = 10_000_000
SHARD_SIZE = 256  # the default of synthesize.shard_size
Row = tuple[str, float, str, str]


def mock_sampler(spec: SynthesisSpec) -> Any:
    """Black images, after the seconds a batch that `spec.metadata` names."""
    seconds = float(spec.metadata["sleep"])

    def draw(label_map: np.ndarray, view: np.ndarray, seeds: list[int]) -> np.ndarray:
        time.sleep(seconds)
        return np.zeros_like(label_map)

    return draw


def make_spec(folder: str, storage: str, num_images: int, shard_size: int, sleep: float = 0.0) -> SynthesisSpec:
    """A plan of `num_images` over 100 masks of 8x8 px; a shard is one batch and takes `sleep` seconds."""
    config = SynthesizeConfig(
        num_warps=num_images // NUM_MASKS, batch_size=shard_size, shard_size=shard_size, mask_splits=["train"]
    )
    return SynthesisSpec(
        plan=RequestPlan.of(config, {"train": [f"m{i}" for i in range(NUM_MASKS)]}), config=config,
        settings=settings_of("c" * 64, SamplerConfig(), config), metadata={"sleep": str(sleep)}, frames=folder,
        output=Storage.at(storage).join("synthesize", "bench").uri, model_dir="", model="mock", solver="heun",
        num_steps=2, num_function_evals=3, threads=1, key="synthesize mock",
        sampler="benchmarks.scheduler:mock_sampler",
    )  # fmt: skip


def make_masks(folder: str) -> None:
    """The frames that the plans draw from."""
    label_map = np.ones((8, 8), np.uint8)
    made = [Frame(f"m{i}", label_map, label_map, "2CH", "ED", f"p{i}", "train", "phantom") for i in range(NUM_MASKS)]
    write_frames(Storage.at(folder), "train/shard-00000.parquet", made)


def pace(folder: str, num_shards: int, sleep: float) -> dict[str, float]:
    """Draw `num_shards` with 64 workers; shards a second from the first shard's begin to the last's end, and how busy
    the workers were meanwhile."""
    import ray.data

    from raysyn.cluster.synthesize import claim, draw_missing

    ray.data.DataContext.get_current().wait_for_min_actors_s = 900  # all workers up before the first shard
    with tempfile.TemporaryDirectory() as storage:
        spec = make_spec(folder, storage, num_shards * 50, 50, sleep)
        job = SynthesizeJob(storage=storage, workers=WorkersConfig(num_workers=WORKERS))
        stage = open_stage(storage, "synthesize", "bench")
        draw_missing(job, stage, claim(stage, spec))
        records = [(s, read_record(stage.storage, s)) for s in spec.plan.shards()]
        ends = {s.name: os.stat(f"{stage.storage.path}/{s.name}").st_mtime for s, _ in records}
        spent = {r["name"]: r["seconds"] for _, r in records if r is not None}
    begin = min(ends[name] - spent[name] for name in ends)
    seconds = max(ends.values()) - begin
    return {"rate": num_shards / seconds, "busy": sum(spent.values()) / (WORKERS * seconds), "seconds": seconds}


def scheduling(folder: str) -> list[Row]:
    """The fastest that 64 workers are served, and how busy they are kept at a pace nearer to a GPU's."""
    from raysyn.cluster.session import ray_session

    with ray_session(RayConfig(num_cpus=WORKERS, object_store_mb=300)):
        fastest = pace(folder, 1500, 0.0)
        paced = pace(folder, 5 * WORKERS, 8.0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    how = f"{WORKERS} workers on one node, mock sampler"
    return [
        ("fastest", fastest["rate"], "shards/s", f"{how} without delay, shards of 50 images of 8x8 px, 1500 shards"),
        ("paced", paced["rate"], "shards/s", f"{how} of 8 s a shard: {WORKERS / 8:g} shards/s at most"),
        ("paced_busy", 100 * paced["busy"], "%", "of the workers' time between first and last shard spent on shards"),
        ("driver_peak", peak, "MiB", "resident, the driver's own process over all of it"),
    ]


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
