"""A whole fit around the loop: resume, checkpoints, validation of the EMA, rollback after a spike, stop on request."""

from __future__ import annotations

import contextlib
import itertools
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from raysyn.config import FitConfig
from raysyn.metrics.cost import gpu_energy_joules
from raysyn.nets.precision import autocast
from raysyn.training import SIGMA_EDGES, Diverged, Objective, Parallel, Spike, StepReport, train
from raysyn.training_state import CheckpointStore, Progress, TrainState, folder_of, progress_to_json


@dataclass
class Hooks:
    """What the outside world is told. Each is called on every rank; the caller decides which rank acts.

    log(metrics, step); sample(step): draw a grid with the averaged weights, which are in the model during the call;
    step(report); should_stop(): asked after each step; leaving(): asked with each log, on all ranks alike, whether a
    machine is about to be taken away, so that a checkpoint is due now.
    """

    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None
    sample: Callable[[int], None] = lambda step: None
    step: Callable[[StepReport], None] = lambda report: None
    should_stop: Callable[[], bool] = lambda: False
    leaving: Callable[[], bool] = lambda: False


def run(
    state: TrainState,
    objective: Objective,
    config: FitConfig,
    store: CheckpointStore,
    parallel: Parallel | None = None,
    hooks: Hooks | None = None,
    spent: tuple[float, float] = (0.0, 0.0),
) -> bool:
    """Fit from the newest whole checkpoint to the end. True when done, False when stopped on request (resumable).

    `spent`: wall and CPU seconds that this rank took before (reading, encoding), counted as the fit's cost.
    Raises Diverged, naming the step, the noise level and the last good checkpoint.
    """
    parallel, hooks = parallel or Parallel(), hooks or Hooks()
    _resume(state, store)
    state.progress.spend(*spent, parallel.world_size, parallel.num_gpus)
    if config.spike_factor > 0 and not store.steps():
        _save(state, store, parallel)
    while True:
        try:
            return _run_once(state, objective, config, store, parallel, hooks)
        except Diverged as error:
            raise Diverged(f"{error}; {_last_good(store, parallel)}") from None
        except Spike as spike:
            rollbacks = [*state.progress.rollbacks, (spike.step, spike.loss)]
            where = _last_good(store, parallel)
            if len(rollbacks) > config.max_rollbacks:
                raise Diverged(f"fit diverged: {spike}, after {config.max_rollbacks} rollbacks; {where}") from None
            lost = state.progress
            _resume(state, store)
            state.progress.rollbacks = rollbacks
            for cost in ("wall_seconds", "cpu_seconds", "gpu_seconds", "energy_joules"):  # steps undone were paid for
                setattr(state.progress, cost, getattr(lost, cost))
            hooks.log({"train/rollbacks": float(len(rollbacks))}, spike.step)


def _run_once(
    state: TrainState, objective: Objective, config: FitConfig, store: CheckpointStore, parallel: Parallel, hooks: Hooks
) -> bool:
    window, energy = _Window(config.global_batch), _Energy(parallel)
    for report in train(state, objective, config, parallel, hooks.should_stop):
        window.add(report)
        hooks.step(report)
        step, last = report.step, report.step == config.num_steps
        due = last or report.stop or step % config.checkpoint_every_steps == 0
        logged = last or step % config.log_every_steps == 0
        due = (logged and hooks.leaving()) or due
        if due or logged:
            energy.add_to(state.progress)
        if logged:
            hooks.log(window.summary() | _costs(state), step)
            window = _Window(config.global_batch)
        if (last or step % config.validate_every_steps == 0) and objective.num_validation:
            hooks.log({"validation/loss": _validated(state, objective, config, parallel)}, step)
            due = due or state.progress.best_step == step  # the best is a checkpoint to keep
        if due:
            _save(state, store, parallel)
        if (last or step % config.sample_every_steps == 0) and not report.stop:
            with averaged(state), torch.no_grad():
                objective.module.eval()
                hooks.sample(step)
                objective.module.train()
        if report.stop and not last:
            store.flush()
            return False
    store.flush()
    return True


def _resume(state: TrainState, store: CheckpointStore) -> None:
    checkpoint = store.newest()
    if checkpoint is not None:
        state.load(checkpoint.tensors, checkpoint.meta["progress"])


def _save(state: TrainState, store: CheckpointStore, parallel: Parallel) -> None:
    if parallel.rank == 0:
        meta = {"progress": progress_to_json(state.progress), "num_workers": parallel.world_size}
        store.save(state.progress.step, state.tensors(), meta)


def _last_good(store: CheckpointStore, parallel: Parallel) -> str:
    """Wait until rank 0's checkpoints are in the storage; says which is the newest."""
    store.flush()
    parallel.all_reduce(torch.zeros(1, device=parallel.device))
    steps = store.steps()
    return f"last good checkpoint: {store.storage.join(folder_of(steps[-1])).uri}" if steps else "no checkpoint yet"


@contextlib.contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """The EMA's weights in the model for the block."""
    raw = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    state.ema.copy_to(state.model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in state.model.named_parameters():
                p.copy_(raw[name])


@torch.no_grad()
def validation_loss(state: TrainState, objective: Objective, config: FitConfig, parallel: Parallel) -> float:
    """Mean loss of the averaged weights over the validation images, with the same noise each time."""
    total = torch.zeros(1, dtype=torch.float64, device=parallel.device)
    mine = np.arange(parallel.rank, objective.num_validation, parallel.world_size)
    with averaged(state):
        objective.module.eval()
        for start in range(0, len(mine), config.micro_batch):
            batch = objective.validation_batch(mine[start : start + config.micro_batch]).to(parallel.device)
            with autocast(config.amp, parallel.device):
                total += objective.module(batch).loss.double().sum()
        objective.module.train()
    return float(parallel.all_reduce(total)) / objective.num_validation


def _validated(state: TrainState, objective: Objective, config: FitConfig, parallel: Parallel) -> float:
    loss, progress = validation_loss(state, objective, config, parallel), state.progress
    progress.validations.append((progress.step, loss))
    if progress.best_validation is None or loss < progress.best_validation:
        progress.best_validation, progress.best_step = loss, progress.step
    return loss


def _costs(state: TrainState) -> dict[str, float]:
    progress = state.progress
    costs = {"cost/cpu_seconds": progress.cpu_seconds, "cost/gpu_seconds": progress.gpu_seconds}
    if progress.energy_joules is not None:
        costs["cost/energy_joules"] = progress.energy_joules
    costs["system/memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        costs["system/gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return costs


class _Energy:
    """What the ranks' GPUs used since it was asked last."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel, self.before = parallel, self._read(parallel)

    @staticmethod
    def _read(parallel: Parallel) -> float | None:
        return gpu_energy_joules(parallel.device.index or 0) if parallel.num_gpus else None

    def add_to(self, progress: Progress) -> None:
        """Add it to the progress, the same on all ranks; called by all of them. Unknown once is unknown for good."""
        now, before = self._read(self.parallel), self.before
        self.before = now
        used = [0.0, 1.0] if now is None or before is None else [(now - before) * self.parallel.gpu_share, 0.0]
        if self.parallel.num_gpus:
            used = self.parallel.all_reduce(torch.tensor(used, device=self.parallel.device)).tolist()
        joules, unknown = used
        if progress.energy_joules is not None:
            progress.energy_joules = None if unknown else progress.energy_joules + joules


@dataclass
class _Window:
    """Means over the steps since the last log line."""

    global_batch: int
    reports: list[StepReport] = field(default_factory=list)

    def add(self, report: StepReport) -> None:
        self.reports.append(report)

    def summary(self) -> dict[str, float]:
        """Metrics by name; a bucket of the noise level that no sample fell into is left out."""
        n, last = len(self.reports), self.reports[-1]
        seconds = sum(r.seconds for r in self.reports)
        metrics: dict[str, float] = {
            "train/loss": sum(r.loss for r in self.reports) / n,
            "train/lr": last.lr,
            "train/grad_norm": sum(r.grad_norm for r in self.reports) / n,
            "train/images_seen": last.images_seen,
            "train/images_per_second": n * self.global_batch / seconds,
            "train/stalled_fraction": sum(r.stalled_seconds for r in self.reports) / seconds,
        }
        for name in last.parts:
            metrics[f"train/{name}"] = sum(r.parts[name] for r in self.reports) / n
        for i, name in enumerate(sigma_bucket_names()):
            seen = [r.sigma_losses[i] for r in self.reports if not math.isnan(r.sigma_losses[i])]
            if seen:
                metrics[f"train/loss_by_sigma/{name}"] = sum(seen) / len(seen)
        return metrics


def sigma_bucket_names() -> list[str]:
    """Names of the noise-level buckets, from low to high."""
    edges = ["0", *(f"{e:g}" for e in SIGMA_EDGES), "inf"]
    return [f"{i}_{a}_to_{b}" for i, (a, b) in enumerate(itertools.pairwise(edges))]
