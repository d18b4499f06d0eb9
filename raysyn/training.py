"""The training loop: single-device code that yields what happened; it knows no framework.

An objective turns positions into a batch and a batch into per-sample losses. Parallelism enters as a `Parallel`: a
rank, a way to wrap the loss module (DDP) and a sum over ranks. The gradient of a step is that of the mean over the
global batch, for any number of ranks and any micro-batch.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raysyn.config import FitConfig
from raysyn.nets.precision import autocast
from raysyn.training_batches import (
    Batch,
    Prefetcher,
    micro_slices,
    num_micro_batches,
    rank_slice,
    torch_seed,
)
from raysyn.training_state import Progress, TrainState

SIGMA_EDGES = (0.05, 0.2, 0.8, 3.0)  # buckets of the noise level in which the loss is told
SPIKE_WINDOW, SPIKE_MINIMUM = 100, 20


class Diverged(RuntimeError):
    """The loss or a gradient is not finite, or spiked once more than may be rolled back."""


class Spike(RuntimeError):
    """The loss jumped: go back to the last good checkpoint. `loss` is what was seen at `step`."""

    def __init__(self, step: int, loss: float, message: str) -> None:
        super().__init__(message)
        self.step, self.loss = step, loss


@dataclass
class SampleLosses:
    """What a loss module's forward returns. `total` is the sum over samples, with its gradient.

    `loss` [B], named `parts` [B] each and, where there is noise, `sigma` [B] are detached, for the log.
    """

    total: Tensor
    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    sigma: Tensor | None = None


class Objective(Protocol):
    """What is fitted. `module` holds `model`; its forward takes a `Batch` and returns per-sample losses.

    `batch` and `validation_batch` run on the CPU, in a thread, and depend on (seed, position) alone; `salt` counts
    rollbacks, so that a step that diverged is drawn anew.
    """

    model: nn.Module
    module: nn.Module
    part_names: tuple[str, ...]
    num_validation: int

    def batch(self, positions: np.ndarray, salt: int) -> Batch: ...

    def validation_batch(self, positions: np.ndarray) -> Batch: ...


@dataclass
class Parallel:
    """One process's place among the ranks. `wrap` makes the loss module exchange gradients; `all_reduce` sums.

    `gpu_share` is what each rank holds of its GPU, below 1 where others compute on it too.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    all_reduce: Callable[[Tensor], Tensor] = lambda value: value
    gpu_share: float = 1.0

    @property
    def num_gpus(self) -> float:
        """GPUs held by all ranks."""
        return self.world_size * self.gpu_share if self.device.type == "cuda" else 0


@dataclass
class StepReport:
    """One optimizer step, over all ranks. `sigma_losses` has a mean a bucket of `SIGMA_EDGES`, NaN where none fell."""

    step: int
    images_seen: int
    loss: float
    parts: dict[str, float]
    sigma_losses: list[float]
    lr: float
    grad_norm: float
    seconds: float
    stalled_seconds: float
    stop: bool = False


def build_optimizer(module: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW (one fused kernel on a GPU), or SGD with Nesterov momentum, over the parameters that are trained."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(
            parameters, config.lr, config.momentum, nesterov=nesterov, weight_decay=config.weight_decay
        )
    betas, fused = (config.beta1, config.beta2), all(p.is_cuda for p in parameters) or None
    return torch.optim.AdamW(parameters, config.lr, betas, weight_decay=config.weight_decay, fused=fused)


def learning_rate(config: FitConfig, images_seen: int) -> float:
    """Linear warm-up over `warmup_images`, then constant or a half cosine to 0 at `num_images`."""
    lr = config.lr
    if config.warmup_images > 0:
        lr *= min(1.0, (images_seen + config.global_batch) / config.warmup_images)
    if config.lr_decay == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * min(images_seen / config.num_images, 1.0)))
    return lr


def train(
    state: TrainState,
    objective: Objective,
    config: FitConfig,
    parallel: Parallel | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Train from the state's step to `config.num_steps`; a report a step, yielded when `state` holds its result.

    `should_stop` is asked on each rank after each step; if any says yes, all end after the same step (`report.stop`).
    Raises Diverged (loss or gradient not finite) and Spike; `state` is then that before the step.
    """
    parallel = parallel or Parallel()
    module = parallel.wrap(objective.module)
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    salt = len(state.progress.rollbacks)
    num_parts = num_micro_batches(config.global_batch, parallel.world_size, config.micro_batch)
    objective.module.train()

    def make(job: list[np.ndarray]) -> list[Batch]:
        return [objective.batch(positions, salt) for positions in job]

    jobs = _jobs(state.progress.step, config, parallel, num_parts)
    with Prefetcher(make, jobs) as batches:
        start, stalled = time.perf_counter(), 0.0
        counted = start, time.process_time()  # cost takes in what the consumer does between steps: validation, samples
        for micro_batches in batches:
            step = state.progress.step
            torch.manual_seed(torch_seed(config.seed, parallel.rank, step))  # for what draws without a seed of its own
            lr = learning_rate(config, state.progress.images_seen)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            state.optimizer.zero_grad(set_to_none=True)
            sums = _Sums(objective.part_names, parallel.device)
            for i, batch in enumerate(micro_batches):
                last = i == len(micro_batches) - 1
                _backward(module, batch.to(parallel.device), config, parallel, sums, sync=last)
            grad_norm = float(nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf))
            totals = sums.reduce(parallel, should_stop())
            loss = totals.loss / config.global_batch
            _check(state, step, loss, grad_norm, totals, config)
            state.optimizer.step()
            state.ema.update(objective.model, config.global_batch)
            now = time.perf_counter(), time.process_time()
            seconds = now[0] - start
            _advance(state.progress, config, loss)
            spent = now[0] - counted[0], now[1] - counted[1]
            state.progress.spend(*spent, parallel.world_size, parallel.num_gpus)
            counted = now
            yield StepReport(
                step=state.progress.step,
                images_seen=state.progress.images_seen,
                loss=loss,
                parts={k: v / config.global_batch for k, v in totals.parts.items()},
                sigma_losses=totals.sigma_losses,
                lr=lr,
                grad_norm=grad_norm,
                seconds=seconds,
                stalled_seconds=batches.stalled_seconds - stalled,
                stop=totals.stop,
            )
            if totals.stop:
                return
            # Taken up again: what the consumer did in between is not the step's.
            start, stalled = time.perf_counter(), batches.stalled_seconds


def _jobs(first: int, config: FitConfig, parallel: Parallel, num_parts: int) -> Iterator[list[np.ndarray]]:
    """The positions of this rank's micro-batches, a list a step."""
    start, stop = rank_slice(config.global_batch, parallel.rank, parallel.world_size)
    parts = micro_slices(start, stop, config.micro_batch, num_parts)
    for step in range(first, config.num_steps):
        base = step * config.global_batch
        yield [np.arange(base + a, base + b) for a, b in parts if b > a]


def _backward(
    module: nn.Module, batch: Batch, config: FitConfig, parallel: Parallel, sums: _Sums, *, sync: bool
) -> None:
    no_sync = getattr(module, "no_sync", None)
    with contextlib.nullcontext() if sync or no_sync is None else no_sync():
        with autocast(config.amp, parallel.device):
            losses: SampleLosses = module(batch)
        # DDP takes the mean over ranks; this makes it the mean over the global batch however it is shared.
        (losses.total * (parallel.world_size / config.global_batch)).backward()
    sums.add(losses)


def _advance(progress: Progress, config: FitConfig, loss: float) -> None:
    progress.step += 1
    progress.images_seen += config.global_batch
    progress.losses.append(loss)


def _check(state: TrainState, step: int, loss: float, grad_norm: float, totals: _Totals, config: FitConfig) -> None:
    """Raise Diverged or Spike when this step must not be taken."""
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    recent = state.progress.losses[-SPIKE_WINDOW:]
    usual = statistics.median(recent) if len(recent) >= SPIKE_MINIMUM else math.inf
    if finite and not (config.spike_factor > 0 and loss > config.spike_factor * usual):
        return
    what = f"loss {loss:g}, gradient norm {grad_norm:g} at step {step + 1}"
    if totals.bad_sigma is not None:
        what += f", at noise level sigma {totals.bad_sigma:.4g}"
    if not finite and config.spike_factor <= 0:
        raise Diverged(f"fit diverged: {what}")
    raise Spike(step, loss, what)


@dataclass
class _Totals:
    loss: float
    parts: dict[str, float]
    sigma_losses: list[float]
    stop: bool
    bad_sigma: float | None


class _Sums:
    """Sums over a step's samples on this rank, kept on the device and exchanged once a step."""

    def __init__(self, part_names: tuple[str, ...], device: torch.device) -> None:
        self.part_names = part_names
        self.edges = torch.tensor(SIGMA_EDGES, dtype=torch.float64, device=device)
        buckets = len(SIGMA_EDGES) + 1
        self.values = torch.zeros(1 + len(part_names) + 2 * buckets + 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, losses: SampleLosses) -> None:
        """Take in one micro-batch."""
        loss = losses.loss.double()
        first = 1 + len(self.part_names)
        buckets = len(SIGMA_EDGES) + 1
        self.values[0] += loss.sum()
        for i, name in enumerate(self.part_names):
            self.values[1 + i] += losses.parts[name].double().sum()
        if losses.sigma is None:
            return
        sigma = losses.sigma.double().flatten()
        bucket = torch.bucketize(sigma, self.edges)
        self.values[first : first + buckets].index_add_(0, bucket, loss)
        self.values[first + buckets : first + 2 * buckets].index_add_(0, bucket, torch.ones_like(loss))
        bad = ~torch.isfinite(loss)
        self.values[-3] += torch.where(bad, sigma, 0.0).sum()
        self.values[-2] += bad.sum()

    def reduce(self, parallel: Parallel, stop: bool) -> _Totals:
        """The sums over all ranks."""
        self.values[-1] = float(stop)
        values = parallel.all_reduce(self.values).tolist()
        first, buckets = 1 + len(self.part_names), len(SIGMA_EDGES) + 1
        sums, counts = values[first : first + buckets], values[first + buckets : first + 2 * buckets]
        return _Totals(
            loss=values[0],
            parts=dict(zip(self.part_names, values[1:first])),
            sigma_losses=[s / n if n else math.nan for s, n in zip(sums, counts)],
            stop=values[-1] > 0,
            bad_sigma=values[-3] / values[-2] if values[-2] else None,
        )
