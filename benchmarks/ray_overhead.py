"""What Ray adds: rows (d) and (e) of `make bench`; alone, `python -m benchmarks.ray_overhead [fit synthesis]` renews them.

(d) a step of a fit under Ray Train against the same loop in two bare processes, and an image drawn by one actor against
the same shard writer in a bare process; (e) two actors against one, all threads of an actor on one core. Demo sizes, one
thread a process, phantom frames. Both sides write the same files, so the clock is their modification times, from when
all processes are up until the first of them has nothing left.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from raysyn.cluster.fit import fit
from raysyn.cluster.inputs import prepare_fingerprint
from raysyn.cluster.session import ray_session
from raysyn.cluster.synthesis_model import model_facts
from raysyn.cluster.synthesize import make_spec, synthesize
from raysyn.compose import load_job
from raysyn.config import FitJob, SynthesizeJob
from raysyn.training_state import Progress

ROUNDS, IMAGES, PER_CHECKPOINT, SHARD_SIZE = 5, 2400, 240, 64
BATCHES = (8, 24)  # images a step of both ranks together: the demo's, and that of its first versions
COMMON = [
    "scale=demo",
    "model=edm",
    "data.num_train_patients=30",
    "data.num_validation_patients=2",
    "data.num_test_patients=2",
    "workers.threads_per_worker=1",
    "tracking.enabled=false",
]
FIT = [
    f"model.fit.num_images={IMAGES}",
    "model.fit.num_validation_images=0",
    "model.fit.keep_checkpoints=1000",
    "model.fit.sample_every_steps=100000",
]


def bare_fit(config: FitJob, frames: str, folder: Path, rank: int = 0, size: int = 1, port: int = 0) -> Progress:
    """The diffusion model's fit of `config` on the frame set `frames` without Ray, one rank of `size`; checkpoints go
    into `folder`. With several ranks they meet at `port`."""
    import torch
    import torch.distributed as dist

    from raysyn.cluster.fit_build import WorkerJob, build
    from raysyn.cluster.fit_worker import parallel_of
    from raysyn.data.storage import Storage
    from raysyn.diffusion.batching import keep_freed_memory
    from raysyn.diffusion.ema import EMA
    from raysyn.training import build_optimizer
    from raysyn.training_run import run
    from raysyn.training_state import CheckpointStore, TrainState

    torch.set_num_threads(config.workers.threads_per_worker)
    keep_freed_memory()
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    parallel = parallel_of(rank, size, torch.device("cpu"))
    job = WorkerJob(config, "diffusion", "key", str(folder), frames)
    built = build(job, parallel)
    model = built.objective.model
    state = TrainState(model, build_optimizer(model, job.fit), EMA(model, job.fit.ema_half_life_images))
    store = CheckpointStore(Storage.at(folder).join("checkpoints"), "key", job.fit.keep_checkpoints)
    assert run(state, built.objective, job.fit, store, parallel)
    if size > 1:
        dist.destroy_process_group()
    return state.progress


def _apart(function: Callable[..., Any], *arguments: tuple[Any, ...]) -> None:
    """Run `function` once for each of `arguments`, in fresh processes side by side."""
    processes = [multiprocessing.get_context("spawn").Process(target=function, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seconds_per_step(folder: Path) -> tuple[float, float]:
    """(by the clock, CPU seconds of all ranks) from a fit's checkpoints, the first two left out: the processes warm up."""
    marks = sorted((folder / "checkpoints").glob("step-*/checkpoint.json"))[2:]
    first, last = (json.loads(m.read_text()) for m in (marks[0], marks[-1]))
    steps = last["step"] - first["step"]
    wall = marks[-1].stat().st_mtime - marks[0].stat().st_mtime
    return wall / steps, (last["progress"]["cpu_seconds"] - first["progress"]["cpu_seconds"]) / steps


def seconds_per_image(folder: Path, actors: int) -> float:
    """From the times of a data set's shards: after every actor's first until one has no next."""
    times = sorted(p.stat().st_mtime for p in folder.rglob("*.parquet"))
    inner = times[actors - 1 : len(times) - actors + 1]
    return (inner[-1] - inner[0]) / ((len(inner) - 1) * SHARD_SIZE)


def step_of_a_fit(storage: Path, number: int, batch: int) -> tuple[float, float, float, float]:
    """(seconds a step under Ray Train, CPU seconds, the same two in bare processes) with two workers."""
    own = [f"model.fit.global_batch={batch}", f"model.fit.micro_batch={batch}"]
    own += [f"model.fit.checkpoint_every_steps={PER_CHECKPOINT // batch}", f"model.fit.seed={number}"]
    overrides = [*COMMON, *FIT, *own, "workers.num_workers=2", f"storage={storage}"]
    config: FitJob = load_job("fit", overrides)
    with ray_session(config.ray):
        by_ray = seconds_per_step(Path(fit(config).path))
    frames, folder, port = _frames(config), storage / f"bare-{batch}-{number}", _free_port()
    _apart(bare_fit, *[(config, frames, folder, rank, 2, port) for rank in (0, 1)])
    return *by_ray, *seconds_per_step(folder)


def _frames(config: FitJob | SynthesizeJob) -> str:
    return f"{config.storage}/prepare/{prepare_fingerprint(config)}"


def bare_writer(config: SynthesizeJob, model_dir: str, frames: str, folder: Path) -> None:
    """Draw the data set of `config` in this process: the actor's class, nobody who sends it shards."""
    import dataclasses

    import numpy as np

    from raysyn.cluster.sampler_actor import ShardWriter

    spec = make_spec(config, model_facts(config, model_dir), frames, prepare_fingerprint(config))
    writer = ShardWriter(dataclasses.replace(spec, output=str(folder)))
    for shard in spec.plan.shards():
        writer({key: np.array([value]) for key, value in dataclasses.asdict(shard).items()})


@contextlib.contextmanager
def a_core_each(actors: int) -> Iterator[None]:
    """Keep every thread of the first `actors` synthesis actors that come up in the block on a core of its own actor."""
    cores = sorted(os.sched_getaffinity(0))[:actors]
    done = threading.Event()

    def pin() -> None:
        passes = (
            8  # a second apart once all actors are there: their threads come with the first shards, and looking costs
        )
        while passes and not done.wait(1):
            workers = [p for p in psutil.Process().children(recursive=True) if "MapWorker" in _title(p)]
            passes -= len(workers) >= actors
            for core, worker in zip(cores, sorted(workers, key=lambda p: p.pid)):
                with contextlib.suppress(psutil.NoSuchProcess, OSError):
                    for thread in worker.threads():
                        os.sched_setaffinity(thread.id, {core})

    watcher = threading.Thread(target=pin, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def image_of_a_set(storage: Path, model_dir: str, number: int) -> tuple[float, float, float, float]:
    """(seconds an image by two actors on a core each, by one on a core, by one as it is, in a bare process)."""
    own = ["synthesize.mask_splits=[train]", "synthesize.num_warps=16", f"synthesize.shard_size={SHARD_SIZE}"]
    own += [f"synthesize.seed={number}", f"model_dir={model_dir}"]
    seconds = []
    for actors, pinned in ((2, True), (1, True), (1, False)):
        place = storage / f"actors-{actors}-{pinned}"
        config: SynthesizeJob = load_job(
            "synthesize", [*COMMON, *own, f"workers.num_workers={actors}", f"storage={place}"]
        )
        with a_core_each(actors) if pinned else contextlib.nullcontext(), ray_session(config.ray):
            seconds.append(seconds_per_image(Path(synthesize(config).path), actors))
    folder = storage / f"bare-set-{number}"
    _apart(bare_writer, (config, model_dir, _frames(config), folder))
    two, one, one_anywhere = seconds
    return two, one, one_anywhere, seconds_per_image(folder, 1)


def rows(what: tuple[str, ...] = ("fit", "synthesis")) -> list[list[Any]]:
    """Rows of cpu.csv: name, size, ratios, seconds of the first, seconds of the second."""
    made = []
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        storage = Path(temporary)
        for batch in BATCHES if "fit" in what else BATCHES[:1]:
            rounds = range(ROUNDS if "fit" in what else 1)
            wall, cpu, bare_wall, bare_cpu = zip(*[step_of_a_fit(storage, number, batch) for number in rounds])
            if "fit" in what:
                name = f"a step under Ray Train against the bare loop: edm, 2 workers, {batch} images a step"
                made += [_row(name, wall, bare_wall), _row(f"{name}, their CPU seconds", cpu, bare_cpu)]
        if "synthesis" in what:
            model_dir = str(next((storage / "fit").iterdir()) / "model")
            two, one, free, bare = zip(*[image_of_a_set(storage, model_dir, number) for number in range(ROUNDS)])
            made += [
                _row("an image by one actor against the bare loop: edm, dpmpp_2m 3", free, bare),
                _row("images by two actors against one, a core each: edm, dpmpp_2m 3", one, two),
                _row("images by two actors, a core each, against one that has both: edm, dpmpp_2m 3", free, two),
            ]
    return made


def _row(name: str, other: tuple[float, ...], ours: tuple[float, ...]) -> list[Any]:
    ratios = [a / b for a, b in zip(other, ours)]
    return [name, 64, ratios, statistics.median(ours), statistics.median(other)]


if __name__ == "__main__":
    from benchmarks.cpu import write_rows

    write_rows(rows(tuple(sys.argv[1:]) or ("fit", "synthesis")), renew=False)
