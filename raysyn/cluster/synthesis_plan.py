"""`plan_only=true`: what a synthesis would take, from a probe of three batches on the machine that would draw it."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from typing import Any

from raysyn.cluster.sampler_actor import SynthesisSpec
from raysyn.config import SynthesizeJob
from raysyn.types import Outcome, UserError

NUM_BATCHES = 3


def print_plan(config: SynthesizeJob, spec: SynthesisSpec) -> Outcome:
    """Print images, evaluations, GFLOPs, seconds, disk and money; nothing is written."""
    import ray

    workers = config.workers
    task = ray.remote(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker, max_calls=1)(probe)
    found = ray.get(task.remote(spec))
    plan = estimate(config, spec, found)
    print(
        f"synthesize plan: {plan['num_images']} images in {plan['num_shards']} shards, {plan['num_evaluations']} network "
        f"evaluations, {plan['gflops']:.3g} GFLOPs; {plan['seconds']:.3g} s with {workers.num_workers} worker(s) on "
        f"{found['device']} ({found['seconds_per_image']:.3g} s an image), {plan['disk_mb']:.3g} MB, {plan['usd']:.3g} USD "
        "at the prices in cost.*",
        flush=True,
    )
    return Outcome("synthesize", "", spec.metadata["raysyn_fingerprint"], {"plan": plan}, skipped=True)


def estimate(config: SynthesizeJob, spec: SynthesisSpec, found: dict[str, Any]) -> dict[str, Any]:
    """The plan's numbers from a probe's."""
    images, workers = spec.plan.num_requests(), config.workers
    seconds = images * found["seconds_per_image"] / workers.num_workers
    gpus = workers.num_workers * workers.gpus_per_worker
    cpus = workers.num_workers * workers.cpus_per_worker
    price = gpus * config.cost.usd_per_gpu_hour + cpus * config.cost.usd_per_cpu_hour
    return {
        "num_images": images,
        "num_shards": sum(1 for _ in spec.plan.shards()),
        "num_evaluations": images * spec.num_function_evals,
        "gflops": images * found["gflops_per_image"],
        "seconds": seconds,
        "disk_mb": images * found["bytes_per_image"] / 2**20,
        "usd": seconds / 3600 * price,
        **found,
    }


def probe(spec: SynthesisSpec) -> dict[str, Any]:
    """Runs on a worker: draws three batches after one for warming up, writes none of them. Raises UserError as it may."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from raysyn.cluster.sampler_actor import ShardWriter
    from raysyn.data.frames import frames_to_table, table_to_bytes

    with tempfile.TemporaryDirectory() as folder:  # a sampler may keep there what it found out of its GPU
        writer = ShardWriter(dataclasses.replace(spec, output=folder))
    if writer.refused:
        raise UserError(writer.refused)
    shard = next(s for s in spec.plan.shards())
    split = dataclasses.replace(shard, stop=spec.plan.num_requests(shard.split))
    of_split = spec.plan.batches(split, getattr(writer.sampler, "batch_size", 0))
    batches = list(itertools.islice(of_split, NUM_BATCHES + 1))
    batches = (batches * (NUM_BATCHES + 1))[: NUM_BATCHES + 1]
    with FlopCounterMode(display=False) as flops:
        writer.draw(shard.split, batches[0], *writer.conditions(shard.split, batches[0]))
    started, drawn, size = time.perf_counter(), 0, 0
    for batch in batches[1:]:
        frames, _, _ = writer.draw(shard.split, batch, *writer.conditions(shard.split, batch))
        size += len(table_to_bytes(frames_to_table(frames)))
        drawn += len(frames)
    return {
        "seconds_per_image": (time.perf_counter() - started) / drawn,
        "gflops_per_image": flops.get_total_flops() / len(batches[0]) / 1e9,
        "bytes_per_image": size / drawn,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
