"""The fit stage: an autoencoder (latent models) and a diffusion model, each on a Ray Train worker group.

The loop and its checkpoints are `raysyn.training_run`'s; Ray Train places the workers, sees them die and starts them
again; a fit goes on from its newest whole checkpoint wherever it was interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from typing import Any

from raysyn.cluster.board import watch
from raysyn.cluster.session import is_own, ray_session
from raysyn.cluster.stage import StageDir, open_stage
from raysyn.cluster.stage_lock import alone
from raysyn.config import FitConfig, FitJob, ModelConfig, PrepareJob, TrackingConfig, fingerprint
from raysyn.data.storage import Storage
from raysyn.types import Fault, Outcome, Resumable, UserError

log = logging.getLogger("raysyn.fit")

FIT_VERSION = 2  # of what decides a fitted model
# Files in the stage's folder by which driver and workers talk:
STOP = "stop"  # while it is there, workers write a checkpoint and end
BAD_INPUT = "bad_input"  # what is wrong, as one rank of several found it
GRACE_SECONDS = 25.0  # to write a checkpoint after SIGTERM; Kubernetes kills after 30
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # the end of a short fit is seen sooner
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # then it is asked for again, of the nodes there are then
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
# How often a fit is logged, checked and kept, and in which pieces it is computed, does not decide its result.
_NOT_IN_FINGERPRINT = (
    "micro_batch",
    "compile",
    "channels_last",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "validate_every_steps",
    "num_validation_images",
    "sample_every_steps",
    "log_every_steps",
)


def _decisive(fit: FitConfig) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(fit).items() if k not in _NOT_IN_FINGERPRINT}


def autoencoder_fingerprint(config: FitJob, frames: str) -> str:
    """Names an autoencoder fitted to the frame set `frames` (a fingerprint); latent models of equal set-up share it."""
    vae = {**dataclasses.asdict(config.model.vae), "fit": _decisive(config.model.vae.fit)}
    return fingerprint("fit_autoencoder", FIT_VERSION, frames, vae, config.model.latent_downscale)


def fit_fingerprint(config: FitJob, frames: str) -> str:
    """Names a diffusion model fitted to the frame set `frames` (a fingerprint); its sampler does not count."""
    model = config.model
    keys = ("name", "space", "precondition", "latent_downscale", "label_dropout")
    own = {key: getattr(model, key) for key in keys}
    autoencoder = autoencoder_fingerprint(config, frames) if model.space == "latent" else ""
    return fingerprint("fit", FIT_VERSION, frames, own, model.net, _decisive(model.fit), autoencoder)


def fit(config: FitJob) -> Outcome:
    """Fit `config.model` (for a latent model its autoencoder first), or find it fitted. `config.what` may end earlier.

    Prepares the frames if need be. Raises UserError for bad input, Resumable when stopped with a checkpoint written.
    """
    from raysyn.cluster.fit_log import log_missing
    from raysyn.cluster.inputs import prepare, prepare_fingerprint

    check(config)
    config = _absolute(config)
    if config.plan_only:
        from raysyn.cluster.fit_plan import plan

        return plan(config)
    validates = any(part.num_validation_images for _, part in _parts(config))
    frames = prepare_fingerprint(config, ("train", "validation") if validates else ("train",))
    if not config.overwrite and (done := _finished(config, frames)) is not None:
        log_missing(config, done)
        return done
    at_once = config.workers.min_workers or config.workers.num_workers
    with ray_session(config.ray, config.workers, at_once), watch(lambda: f"fit {config.model.name}"):
        shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(PrepareJob)}
        prepared = prepare(PrepareJob(**{**shared, "overwrite": False}))
        autoencoder = None
        if config.model.space == "latent":
            autoencoder = _fit_stage(config, "autoencoder", autoencoder_fingerprint(config, frames), prepared, "")
            if config.what == "autoencoder":
                return autoencoder
        model_dir = autoencoder.manifest["model_dir"] if autoencoder is not None else ""
        return _fit_stage(config, "diffusion", fit_fingerprint(config, frames), prepared, model_dir)


def check(config: FitJob) -> None:
    """Raise UserError for what is wrong in the config alone, before any work."""
    model = config.model
    if config.what == "autoencoder" and model.space != "latent":
        raise UserError(f"what: autoencoder: {model.name} works on pixels and has none")
    check_size(model, config.data.image_size)
    for name, fit_config in _parts(config):
        if config.workers.num_workers > fit_config.global_batch:
            raise UserError(
                f"workers.num_workers: {config.workers.num_workers} is more than {name}.global_batch "
                f"{fit_config.global_batch}; every worker needs an image of each batch"
            )
    if config.workers.min_workers > config.workers.num_workers:
        raise UserError(
            f"workers.min_workers: {config.workers.min_workers} is above num_workers {config.workers.num_workers}"
        )


def check_size(model: ModelConfig, image_size: int) -> None:
    """Raise UserError unless images of `image_size` go through the model's nets."""
    stride = model.net.patch_size * 2 ** (len(model.net.channel_multipliers) - 1) * model.latent_downscale
    if image_size < stride or image_size % stride:
        raise UserError(
            f"data.image_size: {image_size} is not a multiple of {stride}, the stride of {model.name} "
            f"(patch {model.net.patch_size} x {len(model.net.channel_multipliers)} levels x latent_downscale "
            f"{model.latent_downscale}); choose another size or fewer levels"
        )


def _parts(config: FitJob) -> list[tuple[str, FitConfig]]:
    parts = [("model.fit", config.model.fit)] if config.what == "all" else []
    return parts + ([("model.vae.fit", config.model.vae.fit)] if config.model.space == "latent" else [])


def _absolute(config: FitJob) -> FitJob:
    """Ray Train's workers run in a folder of their own: no path may be relative."""
    from raysyn.tracking import tracking_uri

    storage = Storage.at(config.storage).uri
    tracking = config.tracking
    if tracking.enabled:
        tracking = TrackingConfig(True, tracking_uri(tracking, storage), tracking.experiment)
    return dataclasses.replace(config, storage=storage, tracking=tracking)


def _finished(config: FitJob, frames: str) -> Outcome | None:
    """The outcome of an earlier run, without starting Ray."""
    if config.what == "autoencoder":
        return open_stage(config.storage, "fit_autoencoder", autoencoder_fingerprint(config, frames)).outcome()
    return open_stage(config.storage, "fit", fit_fingerprint(config, frames)).outcome()


def _fit_stage(config: FitJob, what: str, key: str, prepared: Outcome, autoencoder: str) -> Outcome:
    stage = open_stage(config.storage, "fit_autoencoder" if what == "autoencoder" else "fit", key)
    with alone(stage):
        if not config.overwrite and (done := stage.outcome()) is not None:
            return done
        return _fit_alone(config, what, stage, prepared, autoencoder)


def _fit_alone(config: FitJob, what: str, stage: StageDir, prepared: Outcome, autoencoder: str) -> Outcome:
    from raysyn.cluster.fit_data import check_resident, resident_bytes
    from raysyn.cluster.inputs import frames_uri

    frames = frames_uri(prepared)
    fit_config = config.model.vae.fit if what == "autoencoder" else config.model.fit
    splits = ("train", "validation") if fit_config.num_validation_images else ("train",)
    size = sum(resident_bytes(frames, split, config.data.image_size) for split in splits)
    check_resident(size, config.workers, "the frames")
    if config.overwrite:
        stage.clear()
    stage.storage.clean_temporaries()
    for mark in (STOP, BAD_INPUT):
        stage.storage.remove(mark)
    job = {
        "config": config,
        "what": what,
        "key": stage.fingerprint,
        "stage": stage.path,
        "frames": frames,
        "autoencoder": autoencoder,
        "watch_preemption": not is_own(),  # a node of our own is never reclaimed: no watcher process then
        "use_ray_data": size >= config.workers.ray_data_from_mb * 2**20,
    }
    report = _run_workers(config, stage, job, splits)
    if report["status"] == "stopped":
        raise Resumable(f"{stage.stage} stopped at step {report['step']}, checkpoint written")
    if report["status"] == "bad_input":
        raise UserError(report["message"])
    if report["status"] == "diverged":
        raise Fault(report["message"])
    entries = {k: v for k, v in report.items() if k != "status"}
    return stage.finish({**entries, "model": config.model.name, "frames": frames, "autoencoder": autoencoder})


def _run_workers(config: FitJob, stage: StageDir, job: dict[str, Any], splits: tuple[str, ...]) -> dict[str, Any]:
    """Run Ray Train to the end, in a thread so that a stop request finds this one free; restart a dead controller."""
    import ray

    outcome: dict[str, Any] = {}
    leaving = threading.Event()  # asked to stop: Ray goes, and must not be started again for another attempt
    ended = threading.Event()  # not Thread.join: an exception that a signal raises within it marks the thread as ended

    def attempt() -> None:
        for remaining in reversed(range(max(config.workers.max_failures, 0) + 1)):
            try:
                outcome["report"] = _trainer(config, stage, job, splits).fit().return_value
                return
            except ray.exceptions.ActorDiedError as error:  # Ray Train's controller itself; nobody restarts that
                if not remaining or leaving.is_set():
                    outcome["error"] = error
                    return
                why = str(error).splitlines()[0]
                log.warning("Ray Train's controller died (%s); starting again from the last checkpoint", why)
            except BaseException as error:
                outcome["error"] = error
                return

    def work() -> None:
        try:
            attempt()
        finally:
            ended.set()

    threading.Thread(target=work, name="ray-train", daemon=True).start()
    try:
        while not ended.wait(0.2):
            pass
    except (Resumable, KeyboardInterrupt):
        leaving.set()
        # Ask the workers for a checkpoint and give them the grace period to write it.
        stage.storage.write_atomic(STOP, b"")
        ended.wait(GRACE_SECONDS)
        raise
    if "error" in outcome:
        if stage.storage.exists(BAD_INPUT):
            raise UserError(stage.storage.read_bytes(BAD_INPUT).decode()) from outcome["error"]
        raise outcome["error"]
    report: dict[str, Any] = outcome["report"]
    return report


def _trainer(config: FitJob, stage: StageDir, job: dict[str, Any], splits: tuple[str, ...]) -> Any:
    for key, value in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1" if job["watch_preemption"] else "0"
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from raysyn.cluster.fit_data import frame_dataset
    from raysyn.cluster.fit_nodes import CountNodes
    from raysyn.cluster.torch_group import TorchGroup

    workers = config.workers
    resources = {"CPU": workers.cpus_per_worker}
    if workers.gpus_per_worker:
        resources["GPU"] = workers.gpus_per_worker
    number: Any = (workers.min_workers, workers.num_workers) if workers.min_workers else workers.num_workers
    datasets = {split: frame_dataset(job["frames"], split) for split in splits} if job["use_ray_data"] else {}
    trainer = DataParallelTrainer if datasets else _without_datasets(DataParallelTrainer)
    return trainer(
        run_worker,
        train_loop_config=job,
        backend_config=TorchGroup(use_gpu=workers.gpus_per_worker > 0),
        scaling_config=ScalingConfig(
            num_workers=number, use_gpu=workers.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=stage.storage.path,
            storage_filesystem=stage.storage.fs,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            callbacks=[CountNodes()] if workers.min_workers else None,
        ),
        datasets=datasets,
        dataset_config=DataConfig(datasets_to_split=[]),  # every worker holds all frames
    )


def _without_datasets(trainer: Any) -> Any:
    """Ray Train's trainer without the process that hands out data sets, where there are none."""
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

    class Trainer(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if not isinstance(c, DatasetsCallback)]

    return Trainer


def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry on a worker; torch is imported there and not here."""
    from raysyn.cluster.fit_build import WorkerJob
    from raysyn.cluster.fit_worker import fit_worker

    return fit_worker(WorkerJob(**job))
