"""Fits on a CUDA device by the project's own loop: edm_l64 at published size on phantom frames, for `gpu.py --fit`.

Latents are encoded beforehand (by an autoencoder of random weights), as a fit does; no Ray, no MLflow, nothing is stored.
Needs scipy (the phantom) and pyarrow (which checkpoints are imported with) beside what gpu.py needs.
"""

from __future__ import annotations

import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.gpu_bench import Bench, model_config
from raysyn.config import FitConfig, ModelConfig
from raysyn.data.phantom import phantom_patient
from raysyn.diffusion.batching import probe_batch
from raysyn.diffusion.ema import EMA
from raysyn.models import build_denoiser, build_vae, describe
from raysyn.nets.codecs import LatentCodec
from raysyn.nets.precision import precision
from raysyn.training import Parallel, StepReport, build_optimizer, train
from raysyn.training_batches import FrameSource
from raysyn.training_objectives import DiffusionObjective, Moments, encode_rows
from raysyn.training_state import TrainState
from raysyn.types import VIEWS, Frame

NAME = "edm_l64"
LARGEST_BATCH, NUM_PATIENTS, COPIES = 32, 16, 2
WARM_UP = 5  # steps that are not timed: compilation, captures, the first states of the optimizer


class Way(NamedTuple):
    """How a fit computes."""

    name: str
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False
    graphs: bool = False


WAYS = (  # in the order of their worth
    Way("bf16, compiled", "bf16", channels_last=True, compile=True),
    Way("bf16", "bf16", channels_last=True),
    Way("fp32"),
    Way("bf16, compiled, CUDA graphs", "bf16", channels_last=True, compile=True, graphs=True),
)


class Data(NamedTuple):
    """What all the fits learn from."""

    config: ModelConfig
    image_size: int
    source: FrameSource
    moments: Moments
    codec: LatentCodec


def phantom_frames(image_size: int, num_patients: int) -> list[Frame]:
    """Frames of the first patients, made on all cores."""
    draw = partial(phantom_patient, 0, image_size=image_size)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # a fork would share what CUDA has begun
        return [frame for frames in pool.map(draw, range(num_patients)) for frame in frames]


def data_of(bench: Bench) -> Data:
    """Phantom frames with their posteriors under an autoencoder of random weights, standardised."""
    size = 32 if bench.tiny else 256
    frames = phantom_frames(size, 2 if bench.tiny else NUM_PATIENTS)
    config = model_config(NAME, bench.tiny)
    fit = config.fit
    torch.manual_seed(0)
    with torch.device(bench.device):
        vae = build_vae(config).eval().requires_grad_(False)
    view = np.array([VIEWS.index(frame.view) for frame in frames], np.uint8)
    image, label_map = np.stack([frame.image for frame in frames]), np.stack([frame.label_map for frame in frames])
    source = FrameSource(image, label_map, view, fit.seed, fit.augment, COPIES)
    encode = partial(encode_rows, vae, source, frames=np.arange(len(frames)), device=bench.device, batch=8)
    moments = np.stack([encode(copy) for copy in range(COPIES)])
    latent = moments[:, :, 0] / moments[:, :, 1]
    vae.set_statistics(float(latent.mean()), float(latent.std()))
    return Data(config, size, source, Moments(moments, moments[:, :0]), LatentCodec(vae))


def fit_once(bench: Bench, data: Data, way: Way, num_steps: int, batch: int) -> list[StepReport]:
    """The reports of a fit's steps, as many as there is time for; weights, noise and order are the same each way."""
    config = FitConfig(num_images=num_steps * batch, global_batch=batch, micro_batch=batch, amp=way.amp, grad_clip=1.0)
    torch.manual_seed(1)
    denoiser = build_denoiser(data.config, data.image_size).to(bench.device)
    if way.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if way.compile:
        denoiser.net.compile(backend=bench.backend, mode="reduce-overhead" if way.graphs else None)
    shape = data.codec.shape(data.image_size)
    objective = DiffusionObjective(denoiser, data.source, None, shape, config, codec=data.codec, moments=data.moments)
    state = TrainState(denoiser.net, build_optimizer(denoiser.net, config), EMA(denoiser.net, 20_000))
    steps = train(state, objective, config, Parallel(device=bench.device), lambda: time.monotonic() > bench.stop)
    return list(steps)


def fit_row(bench: Bench, data: Data, way: Way, num_steps: int) -> None:
    """Steps a second of one way, how long the device waited for batches, and what became of the loss."""
    found: list[StepReport] = []
    began = time.monotonic()

    def attempt(batch: int) -> None:
        found[:] = fit_once(bench, data, way, num_steps, batch)

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    largest = 4 if bench.tiny else LARGEST_BATCH
    batch = probe_batch(attempt, start=largest, limit=largest)
    timed = found[WARM_UP:] or found[-1:]
    seconds = statistics.median(report.seconds for report in timed)
    stalled = sum(report.stalled_seconds for report in timed) / sum(report.seconds for report in timed)
    cost = 3 * describe(data.config, data.image_size)["gflops_per_evaluation"] / 1e3
    tenth = math.ceil(len(found) / 10)
    first, last = (statistics.fmean(r.loss for r in part) for part in (found[:tenth], found[-tenth:]))
    parts = [
        f"batch {batch}, {len(found)} steps, {batch / seconds:.3g} images/s",
        f"MFU {cost * batch / seconds / bench.ceiling:.1%}, waited for batches {stalled:.2%}",
        f"loss {first:.3f} to {last:.3f}, {time.monotonic() - began:.0f} s in all",
    ]
    if bench.device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(bench.device) / 2**30:.1f} GiB")
    unavailable = way.amp != "none" and precision(way.amp, bench.device) != way.amp
    parts += [f"{way.amp} is fp32 on this device"] if unavailable else []
    bench.add(f"fit, {way.name}", NAME, data.image_size, value=1 / seconds, unit="steps/s", note="; ".join(parts))


def fits(bench: Bench, num_steps: int) -> None:
    """A row for each way, of `num_steps` steps or as many as there is time for."""
    made: list[Data] = []
    bench.attempt("fit: data", lambda: made.append(data_of(bench)), 20)
    for way in WAYS if made else ():
        bench.attempt(f"fit, {way.name}", partial(fit_row, bench, made[0], way, num_steps), 30)
