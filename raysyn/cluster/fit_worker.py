"""What each Ray Train worker runs: fit on its device and, on rank 0, tell the outside world and save the model."""

from __future__ import annotations

import copy
import dataclasses
import logging
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysyn.cluster.board import relay_warnings, reporter
from raysyn.cluster.fit import BAD_INPUT, STOP
from raysyn.cluster.fit_build import Built, WorkerJob, build, compile_net
from raysyn.cluster.fit_log import LOGGED, log_fitted
from raysyn.cluster.fit_pictures import png, reconstruction_grid, sample_grid
from raysyn.cluster.metrics_export import count
from raysyn.cluster.session import gpu_share, in_foreground
from raysyn.config import to_dict
from raysyn.data.storage import Storage
from raysyn.diffusion.batching import keep_freed_memory
from raysyn.diffusion.ema import EMA
from raysyn.metrics.cost import Cost, measured
from raysyn.nets.precision import precision
from raysyn.pipeline import save_model, weights_sha256
from raysyn.tracking import Tracker
from raysyn.training import Diverged, Parallel, StepReport, build_optimizer
from raysyn.training_batches import FrameSource
from raysyn.training_objectives import latent_statistics
from raysyn.training_run import Hooks, run
from raysyn.training_state import CheckpointStore, TrainState
from raysyn.types import UserError

log = logging.getLogger("raysyn.fit")


def fit_worker(job: WorkerJob) -> dict[str, Any]:
    """One rank of a fit. Returns {"status": done | stopped | diverged | bad_input, …}; rank 0's is what counts.

    Bad input and divergence are returned, not raised: Ray would start the worker again to meet the same. One rank of
    several writes its bad input down and raises, as the others may be waiting for it: all find it when started again.
    """
    import ray.train

    in_foreground()
    torch.set_num_threads(job.config.workers.threads_per_worker)
    parallel, storage = _parallel(ray.train.get_context()), Storage.at(job.stage)
    if parallel.rank == 0:
        relay_warnings(job.title)
    if storage.exists(BAD_INPUT):
        return {"status": "bad_input", "message": storage.read_bytes(BAD_INPUT).decode()}
    try:
        return _fit(job, parallel)
    except UserError as error:
        if parallel.world_size > 1:
            storage.write_atomic(BAD_INPUT, str(error).encode())
            raise
        return {"status": "bad_input", "message": str(error)}
    except Diverged as error:
        part = "model.vae.fit" if job.what == "autoencoder" else "model.fit"
        advice = f"try a lower {part}.lr, {part}.grad_clip=1 or {part}.spike_factor=10 (goes back and draws anew)"
        return {"status": "diverged", "message": f"{error}; {advice}"}


def _parallel(context: Any) -> Parallel:
    """The adapter from Ray Train's worker group to the loop's `Parallel`."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        device = get_device()  # the CPU where workers.gpus_per_worker is 0, GPU or not
        if device.type == "cuda":
            torch.cuda.set_device(device)
    parallel = parallel_of(context.get_world_rank(), context.get_world_size(), device)
    return dataclasses.replace(parallel, gpu_share=gpu_share() or 1.0)


def parallel_of(rank: int, size: int, device: torch.device) -> Parallel:
    """One rank of `size` that exchanges gradients by DDP over torch's process group, which is there if size > 1."""
    if size == 1:
        return Parallel(device=device)
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def wrap(module: nn.Module) -> nn.Module:
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(module, ids, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def all_reduce(value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    return Parallel(rank, size, device, wrap, all_reduce)


def _fit(job: WorkerJob, parallel: Parallel) -> dict[str, Any]:
    storage, config = Storage.at(job.stage), job.fit
    start = time.perf_counter(), time.process_time()
    keep_freed_memory()
    built = build(job, parallel)
    model = built.objective.model
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        compile_net(model)
    # An autoencoder is used as trained; averaging is for diffusion models.
    half_life = 0.0 if job.what == "autoencoder" else config.ema_half_life_images
    state = TrainState(model, build_optimizer(model, config), EMA(model, half_life))
    store = CheckpointStore(storage.join("checkpoints"), job.key, config.keep_checkpoints)
    outside = _Outside(job, built, parallel, storage)
    try:
        with measured(parallel.gpu_share if parallel.num_gpus else 0) as cost:
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            finished = run(state, built.objective, config, store, parallel, outside.hooks(), spent)
        if not finished:
            outside.close("KILLED")
            return {"status": "stopped", "step": state.progress.step}
        report = _save(job, state, built, storage, outside, cost) if parallel.rank == 0 else {}
        outside.close("FINISHED")
        return {"status": "done", **report}
    except BaseException:
        outside.close("FAILED")
        raise


class _Leaving:
    """True once for each news of a node that is about to be taken away (spot reclaim, drain); the same on all ranks."""

    def __init__(self) -> None:
        self.known: frozenset[str] = frozenset()

    def __call__(self) -> bool:
        import ray.train

        news = ray.train.get_preemption_info()
        nodes = frozenset(news.preempted_node_ids) if news is not None else frozenset()
        new, self.known = not nodes <= self.known, self.known | nodes
        return new


class _Outside:
    """Progress display, MLflow and the stop file, seen from one rank; only rank 0 acts."""

    def __init__(self, job: WorkerJob, built: Built, parallel: Parallel, storage: Storage) -> None:
        self.job, self.built, self.parallel, self.storage = job, built, parallel, storage
        self.tracker = Tracker.disabled()
        self.report, self.recent = reporter(job.title), [0.0]
        self._stop, self._closed = threading.Event(), threading.Event()
        if parallel.rank == 0:
            self.tracker = Tracker.start(
                job.config.tracking,
                job.config.storage,
                job.title,
                params={
                    "model": to_dict(job.config.model),
                    "data": to_dict(job.config.data),
                    **_perceptual(built),
                },
                tags={"stage": f"fit_{job.what}", "fingerprint": job.key},
                key=job.key,
            )
            threading.Thread(target=self._watch_stop, name="stop", daemon=True).start()

    def hooks(self) -> Hooks:
        """What `run` calls."""
        leaving = _Leaving() if self.job.watch_preemption else lambda: False
        if self.parallel.rank != 0:
            return Hooks(leaving=leaving)
        return Hooks(self.tracker.log_metrics, self._sample, self._step, self._stop.is_set, leaving)

    def close(self, status: str) -> None:
        """End the MLflow run; waits for what is queued, a shorter while when there is a grace period to keep."""
        self._closed.set()
        self.tracker.finish(status, timeout_s=60 if status == "FINISHED" else 20)

    def _watch_stop(self) -> None:
        pause = 1.0 if self.storage.is_local else 5.0
        while not self._closed.wait(pause):
            if self.storage.exists(STOP):
                self._stop.set()
                return

    def _step(self, report: StepReport) -> None:
        self.recent = [*self.recent[-20:], time.monotonic()]
        rate = (len(self.recent) - 1) / max(self.recent[-1] - self.recent[0], 1e-9) if self.recent[0] else 0.0
        total = self.job.fit.num_steps
        self.report({"done": report.step, "total": total, "unit": "steps", "per_second": rate})
        count("raysyn_fit_steps", self.job.title)
        count("raysyn_fit_images", self.job.title, self.job.fit.global_batch)

    def _sample(self, step: int) -> None:
        frames = self.built.validation or self.built.train
        if self.job.what == "autoencoder":
            picture = reconstruction_grid(self.built.codec, frames, self.parallel.device)
        else:
            picture = sample_grid(self.built.denoiser, self.built.codec, self.job.config.model, frames)
        self.storage.write_atomic(f"samples/step-{step:09d}.png", png(picture))
        self.tracker.log_image("samples", picture, step)


def _perceptual(built: Built) -> dict[str, str]:
    """What became of an autoencoder's perceptual term: its net and weights, or why it is off."""
    status = getattr(built.objective, "perceptual_status", "")
    return {"perceptual_term": status} if status else {}


def _save(
    job: WorkerJob, state: TrainState, built: Built, storage: Storage, outside: _Outside, cost: Cost
) -> dict[str, Any]:
    """Write the model folder and the loss curves; returns the stage's manifest entries.

    Peaks are `cost`'s, since the worker's last start; the rest counts all ranks and survives restarts.
    """
    progress = state.progress
    facts: dict[str, Any] = {
        "images_seen": progress.images_seen,
        "num_steps": progress.step,
        "loss": statistics.fmean(progress.losses[-50:]),
        "validation_loss": progress.validations[-1][1] if progress.validations else None,
        "best_validation_loss": progress.best_validation,
        "rollbacks": len(progress.rollbacks),
        "precision": precision(job.fit.amp, next(state.model.parameters()).device),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "num_train_frames": len(built.train),
        "train_cpu_seconds": round(progress.cpu_seconds, 3),
        "train_gpu_seconds": round(progress.gpu_seconds, 3),
        "train_wall_seconds": round(progress.wall_seconds, 3),
        "peak_memory_mb": round(cost.peak_memory_mb),
        "peak_gpu_memory_mb": round(cost.peak_gpu_memory_mb),
        "energy_joules": progress.energy_joules,
    }
    facts |= _perceptual(built)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        facts["checkpoint_sha256"] = _write_model(folder, job, state, built, facts)
        storage.upload_tree(folder, "model")
        if job.what == "diffusion" and job.config.tracking.enabled:
            facts[LOGGED] = log_fitted(outside.tracker, job.title, folder, built.validation or built.train)
    curves = {"loss": progress.losses, "validation": progress.validations, "rollbacks": progress.rollbacks}
    storage.write_json("history.json", curves)
    return {
        "model_dir": storage.join("model").uri,
        **facts,
        "mlflow_run_id": outside.tracker.run_id,
        "losses": progress.losses[:: max(1, len(progress.losses) // 200)],
    }


def _write_model(folder: Path, job: WorkerJob, state: TrainState, built: Built, facts: dict[str, Any]) -> str:
    config, device = job.fit, next(state.model.parameters()).device
    if job.what == "autoencoder":
        vae: Any = state.model
        vae.eval()
        source = FrameSource.of(built.train, config.seed)
        vae.set_statistics(*latent_statistics(vae, source, device, config.micro_batch))
        vae.save_pretrained(folder)
        return weights_sha256(folder)
    averaged: Any = copy.deepcopy(state.model)
    state.ema.copy_to(averaged)
    size = built.train.image_u8.shape[1]
    data = {"data": job.config.data.name, **facts}
    model: Any = state.model
    seen = [frames.patient_id for frames in (built.train, built.validation) if frames is not None]
    patients = sorted({str(patient) for part in seen for patient in part})
    return save_model(folder, averaged, model, built.codec, job.config.model, size, data, patients)
