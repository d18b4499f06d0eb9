"""`plan_only=true`: what a fit would take, from a probe of a few steps on the machine that would run it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from raysyn.cluster.session import ray_session
from raysyn.config import FitConfig, FitJob, fingerprint
from raysyn.types import Outcome

WARM_UP, MEASURED, PROBE_FRAMES = 1, 3, 16


def plan(config: FitJob) -> Outcome:
    """Print parameters, GFLOPs and seconds a step, memory, hours and cost of each part of the fit; nothing is written."""
    parts = ["autoencoder"] if config.model.space == "latent" else []
    parts += ["diffusion"] if config.what == "all" else []
    plans: dict[str, Any] = {}
    with ray_session(config.ray, config.workers):
        import ray

        for what in parts:
            gpus = config.workers.gpus_per_worker
            task = ray.remote(num_cpus=config.workers.cpus_per_worker, num_gpus=gpus, max_calls=1)(probe)
            plans[what] = ray.get(task.remote(config, what))
            print(f"fit plan: {config.model.name} {what}: {describe(plans[what])}", flush=True)
    return Outcome("fit", "", fingerprint("fit plan", config.model), {"plan": plans}, skipped=True)


def describe(entry: dict[str, Any]) -> str:
    """One line of a plan."""
    return (
        f"{entry['parameters'] / 1e6:.2f} M parameters, {entry['gflops_per_step']:.1f} GFLOPs and "
        f"{entry['seconds_per_step']:.3g} s a step on {entry['device']}, {entry['num_steps']} steps: "
        f"{entry['hours']:.3g} h with {entry['num_workers']} worker(s), peak memory about "
        f"{entry['memory_gb']:.2g} GB a worker, {entry['usd']:.3g} USD at the prices in cost.*"
    )


def probe(config: FitJob, what: str) -> dict[str, Any]:
    """Runs on a worker: a few steps of one worker's share on made-up frames.

    Seconds a step leave out what workers lose by exchanging gradients; memory is that of weights, average, gradient and
    optimizer, plus the peak of a micro-batch (measured on a GPU, and on a CPU the growth of the process).
    """
    import torch

    torch.set_num_threads(config.workers.threads_per_worker)
    device = torch.device("cuda" if torch.cuda.is_available() and config.workers.gpus_per_worker else "cpu")
    fit, workers = (config.model.vae.fit if what == "autoencoder" else config.model.fit), config.workers.num_workers
    share = -(-fit.global_batch // workers)
    micro = min(fit.micro_batch, share)
    state, objective = _built(config, what, dataclasses.replace(fit, global_batch=micro, micro_batch=micro), device)
    before = _memory(device)
    gflops = _gflops(objective, micro, device)
    seconds = _seconds_per_step(state, objective, fit, micro, device)
    parameters = sum(p.numel() for p in objective.model.parameters())
    pieces = share / micro
    hours = seconds * pieces * fit.num_steps / 3600
    gpus = workers * config.workers.gpus_per_worker
    price = (
        gpus * config.cost.usd_per_gpu_hour + workers * config.workers.cpus_per_worker * config.cost.usd_per_cpu_hour
    )
    return {
        "parameters": parameters,
        "gflops_per_step": gflops * fit.global_batch / micro,
        "seconds_per_step": seconds * pieces,
        "num_steps": fit.num_steps,
        "hours": hours,
        "usd": hours * price,
        "num_workers": workers,
        # weights and their average; the gradient and Adam's two came with the steps, with what a micro-batch needs
        "memory_gb": (8 * parameters + max(_memory(device) - before, 12 * parameters)) / 2**30,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


def _built(config: FitJob, what: str, fit: FitConfig, device: Any) -> tuple[Any, Any]:
    """State and objective on made-up frames; a latent model's autoencoder is untrained."""
    import torch

    from raysyn.cluster.fit_build import compile_net
    from raysyn.diffusion.ema import EMA
    from raysyn.models import build_denoiser, build_vae
    from raysyn.nets.codecs import LatentCodec, PixelCodec
    from raysyn.training import build_optimizer
    from raysyn.training_batches import FrameSource
    from raysyn.training_objectives import AutoencoderObjective, DiffusionObjective, Moments, encode_rows
    from raysyn.training_state import TrainState

    size, rng, model = config.data.image_size, np.random.default_rng(0), config.model
    images = rng.integers(0, 256, (PROBE_FRAMES, size, size), dtype=np.uint8)
    labels = rng.integers(1, 5, (PROBE_FRAMES, size, size), dtype=np.uint8)
    precomputed = what == "diffusion" and model.space == "latent" and fit.latents == "precomputed"
    views = np.zeros(PROBE_FRAMES, np.uint8)
    source = FrameSource(images, labels, views, 0, fit.augment, copies=int(precomputed))
    objective: AutoencoderObjective | DiffusionObjective
    if what == "autoencoder":
        weights = dataclasses.replace(model.vae, fit=fit)
        objective = AutoencoderObjective(build_vae(model).to(device), weights, source, None, device)
    else:
        codec = LatentCodec(build_vae(model).to(device)) if model.space == "latent" else None
        moments = None
        if precomputed and codec is not None:
            rows = encode_rows(codec.vae, source, 0, np.arange(PROBE_FRAMES), device, 8)[None]
            moments = Moments(rows, rows)
        shape = (codec or PixelCodec()).shape(size)
        denoiser = build_denoiser(model, size).to(device)
        objective = DiffusionObjective(denoiser, source, None, shape, fit, model.label_dropout, codec, moments)
    if fit.channels_last:
        objective.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if fit.compile:
        compile_net(objective.model)
    return TrainState(objective.model, build_optimizer(objective.model, fit), EMA(objective.model, 1.0)), objective


def _gflops(objective: Any, micro: int, device: Any) -> float:
    """GFLOPs of forward and backward of one micro-batch, as `torch.utils.flop_counter` counts."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        objective.module(objective.batch(np.arange(micro), 0).to(device)).total.backward()
    objective.model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / 1e9


def _seconds_per_step(state: Any, objective: Any, fit: FitConfig, micro: int, device: Any) -> float:
    """Seconds of one micro-batch with its optimizer step, the mean after a warm-up."""
    import torch

    from raysyn.training import Parallel, train

    few = dataclasses.replace(
        fit, global_batch=micro, micro_batch=micro, num_images=micro * (WARM_UP + MEASURED), spike_factor=0.0
    )
    start = 0.0
    for report in train(state, objective, few, Parallel(device=device)):
        if report.step == WARM_UP:
            start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / MEASURED


def _memory(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
