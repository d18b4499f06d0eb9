"""The run of a search: trials on Ray Tune, proposed by Optuna, and refits of the best; what is known after a kill."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysyn.cluster.board import reporter
from raysyn.cluster.stage import StageDir
from raysyn.cluster.task_runs import load_sets
from raysyn.cluster.tune_space import MIN_FAITHFULNESS, NOT_OF_TASK, TRAIN_SET, max_iterations, suggest, trial_task
from raysyn.config import SearchConfig, TaskConfig, TuneJob, fingerprint, to_dict
from raysyn.data.sqlite import sqlite_url
from raysyn.data.storage import Storage
from raysyn.types import Fault, FrameArrays, UserError

if TYPE_CHECKING:
    from raysyn.tracking import Tracker

log = logging.getLogger("raysyn.tune")

NEW_DATABASE_S = 300.0  # MLflow's tables take seconds to make; trials of a run without an id are nobody's children
SNAPSHOT_SECONDS = "1"  # Ray Tune's own state is written this often: what a killed driver can lose


def trial_sets(job: dict[str, Any], task: TaskConfig, params: dict[str, Any]) -> dict[str, FrameArrays]:
    """The frames of one trial: its set, its threshold of faithfulness; validated on every set's frames, as all trials are.

    On a set's own frames alone the set that is easiest to read would win, whatever a network learns from it.
    """
    threshold, chosen = float(params.get(MIN_FAITHFULNESS, 0.0)), job["sets"][int(params.get(TRAIN_SET, 0))]
    return load_sets([chosen], job["real"], task, min_faithfulness=threshold, validation_sets=job["sets"])


def _trial(params: dict[str, Any], *, job: dict[str, Any]) -> None:
    """Runs on a worker: train on the chosen set, report each validation to Ray Tune and MLflow."""
    import time

    from ray import tune as ray_tune

    from raysyn.tasks.classification import train_classification
    from raysyn.tasks.segmentation import train_segmentation
    from raysyn.tracking import Tracker

    config: TuneJob = job["config"]
    task = trial_task(config.task, params)
    records = Storage.at(job["records"])
    record = f"{fingerprint(params)}.json"
    name = ray_tune.get_context().get_trial_id()
    tracker = Tracker.start(
        config.tracking,
        config.storage,
        f"trial {name}",
        params,
        {"raysyn.kind": "trial"},
        parent_run_id=job["parent"],
        key=f"{job['key']}/{name}",
    )
    if records.exists(record):  # finished before a kill that Ray Tune's state did not see, or proposed once more
        known = records.read_json(record)
        known["score"] = -np.inf if known["score"] is None else known["score"]
        tracker.log_metrics({"score": known["score"], "cpu_seconds": known["cost"]}, known["step"])
        tracker.finish()
        ray_tune.report(known)
        return
    started, best = 0.0, -np.inf

    def report(status: dict[str, Any]) -> None:
        nonlocal best
        best = max(best, status["score"])
        cost = time.process_time() - started
        tracker.log_metrics({"score": status["score"], "loss": status["loss"], "cpu_seconds": cost}, status["step"])
        complete = status["step"] == status["steps"]
        result = {"score": float(best), "cost": cost, "step": status["step"], "complete": complete}
        if complete:
            records.write_json(record, result)
        ray_tune.report(result)

    train = train_segmentation if task.kind == "segmentation" else train_classification
    try:
        sets = trial_sets(job, task, params)
        started = time.process_time()
        train(sets["train"], sets["validation"], task, real=sets.get("real"), report=report)
    except Exception:
        tracker.finish("FAILED")
        raise
    finally:  # also where Ray Tune stops a trial that it prunes
        tracker.finish()


def _optuna_search(search: SearchConfig, stage: StageDir, space: dict[str, Any]) -> Any:
    import optuna

    from raysyn.cluster.durable_search import STUDY, DurableOptunaSearch, StudyCopy, study_storage

    copy, url = None, search.optuna_url or sqlite_url(f"{stage.storage.path}/{STUDY}")
    if not search.optuna_url and not stage.storage.is_local:
        copy = StudyCopy(stage.storage.uri, stage.fingerprint)
        url = copy.fetch()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    both = len(search.objectives) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DurableOptunaSearch(
            copy=copy,
            space=partial(suggest, space),
            metric=list(search.objectives) if both else "score",
            mode=["max", "min"] if both else "max",
            sampler=optuna.samplers.TPESampler(seed=search.seed, multivariate=False),
            storage=study_storage(url),
            study_name=f"raysyn-{stage.fingerprint}",
        )


def _scheduler(search: SearchConfig, task: TaskConfig, space: dict[str, Any]) -> Any:
    """Pruning by the count of validations (`pruning_grace_epochs` of them come first)."""
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    settings = {"time_attr": "training_iteration", "metric": "score", "mode": "max"}
    if search.scheduler == "asha":
        most = max(max_iterations(task, space), search.pruning_grace_epochs)
        return ASHAScheduler(**settings, max_t=most, grace_period=search.pruning_grace_epochs)
    if search.scheduler == "median":
        return MedianStoppingRule(**settings, grace_period=search.pruning_grace_epochs)
    return None


def start_run(config: TuneJob, stage: StageDir) -> tuple[Tracker, dict[str, Any]]:
    """The search's MLflow run, and what its trials must know to log below it.

    The tracker's own thread makes a new database: one that cannot be opened is a warning, as in every other stage.
    """
    from raysyn.tracking import Tracker

    key, name = f"{stage.fingerprint}/tune", f"tune {config.task.kind}"
    tags = {"raysyn.kind": "search", "fingerprint": stage.fingerprint}
    parent = Tracker.start(config.tracking, config.storage, name, to_dict(config), tags, key=key)
    return parent, {"key": key, "parent": parent.wait_run_id(NEW_DATABASE_S)}


def search(config: TuneJob, stage: StageDir, space: dict[str, Any], sets: list[str], real: str) -> dict[str, Any]:
    """Run or go on with the search, refit the best; returns the manifest's entries."""
    from ray import tune as ray_tune
    from ray.tune import RunConfig, TuneConfig, Tuner

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    parent, run = start_run(config, stage)
    job = {"config": config, "sets": sets, "real": real, "records": stage.storage.join("trials").uri, **run}
    workers = config.workers
    resources = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    trainable = ray_tune.with_resources(ray_tune.with_parameters(_trial, job=job), resources)
    if stage.storage.is_local:
        Path(stage.storage.path).mkdir(parents=True, exist_ok=True)
    place = {"storage_filesystem": stage.storage.fs}
    path = f"{stage.storage.path}/ray_tune"
    searcher = _optuna_search(config.search, stage, space)
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", SNAPSHOT_SECONDS)
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    if Tuner.can_restore(path, **place):
        tuner = Tuner.restore(path, trainable=trainable, resume_unfinished=True, restart_errored=True, **place)
    else:
        both = len(config.search.objectives) > 1
        tuner = Tuner(
            trainable,
            tune_config=TuneConfig(
                metric=None if both or config.search.scheduler != "none" else "score",
                mode=None if both or config.search.scheduler != "none" else "max",
                num_samples=config.search.num_trials,
                max_concurrent_trials=config.search.max_concurrent,
                search_alg=searcher,
                scheduler=_scheduler(config.search, config.task, space),
                reuse_actors=True,  # a process of its own for each trial would import everything anew
            ),
            run_config=RunConfig(name="ray_tune", storage_path=stage.storage.path, verbose=0, **place),
        )
    status = "FAILED"
    try:
        trials, failed = _results(tuner.fit())
        found = {**summary(config, trials, sets, real), "failed_trials": failed}
        told = ("best_score", "refit_mean", "refit_sd", "refit_test_mean", "refit_test_sd")
        parent.log_metrics({key: found[key] for key in told})
        status = "FINISHED"
    finally:
        parent.finish(status)
    return found


def _results(grid: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """(a dict a trial that has a score, the last line of each that failed)."""
    found: list[dict[str, Any]] = []
    errors: list[str] = []
    for result in grid:
        if result.error is not None or not result.metrics or not np.isfinite(result.metrics.get("score", np.nan)):
            errors.append(str(result.error).strip().splitlines()[-1] if result.error else "no score")
            continue
        params = {k: v for k, v in result.config.items() if k != "job"}
        found.append(
            {
                "trial": result.metrics["trial_id"],
                "params": params,
                "score": float(result.metrics["score"]),
                "cost": float(result.metrics["cost"]),
                "iterations": int(result.metrics["training_iteration"]),
                "complete": bool(result.metrics["complete"]),
            }
        )
    for line in errors:
        log.warning("tune: a trial failed: %s", line)
    if not found:
        first = errors[0] if errors else "none ran"
        if "UserError: " in first:  # no trial can do better on the same input
            raise UserError(first.rpartition("UserError: ")[2])
        raise Fault(f"all {len(errors)} trials failed; the first: {first}")
    return found, errors


def pareto_front(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials that no other beats in score and in cost, of those that ran to their end, cheapest first.

    A trial that was pruned is cheap for another reason. Without `complete` in it the longest count as whole.
    """
    full = max(t["iterations"] for t in trials)
    whole = [t for t in trials if t.get("complete", t["iterations"] == full)]

    def beaten(t: dict[str, Any]) -> bool:
        return any(
            o["score"] >= t["score"] and o["cost"] <= t["cost"] and (o["score"], -o["cost"]) != (t["score"], -t["cost"])
            for o in whole
        )

    return sorted((t for t in whole if not beaten(t)), key=lambda t: t["cost"])


def _refit(task: TaskConfig, job: dict[str, Any], params: dict[str, Any]) -> tuple[float, float]:
    """Runs on a worker: the best set-up with another seed; its validation score, and mean Dice or accuracy on test frames."""
    from raysyn.labels import to_task_classes
    from raysyn.metrics.overlap import dice_by_region, mean_of_means
    from raysyn.tasks.classification import predict_view_scores, train_classification
    from raysyn.tasks.segmentation import predict_label_maps, train_segmentation

    sets = trial_sets(job, task, params)
    train = train_segmentation if task.kind == "segmentation" else train_classification
    fitted, test = train(sets["train"], sets["validation"], task, real=sets.get("real")), sets["test"]
    if task.kind == "segmentation":
        read = predict_label_maps(fitted, test.image_u8)
        return fitted.best_score, mean_of_means(dice_by_region(read, to_task_classes(test.label_map)))
    scores = predict_view_scores(fitted, test.image_u8)
    return fitted.best_score, float(((scores > 0.5) == (test.view == 1)).mean())


def summary(config: TuneJob, trials: list[dict[str, Any]], sets: list[str], real: str) -> dict[str, Any]:
    """The manifest: the best trial, refitted with several seeds (scored on validation and on test), all trials, the front."""
    import ray

    whole = [t for t in trials if t["complete"]] or trials
    best = max(whole, key=lambda t: t["score"])
    job = {"sets": sets, "real": real}
    train_set = sets[int(best["params"].get(TRAIN_SET, 0))]
    workers = config.workers
    refit = ray.remote(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker)(_refit)
    task = trial_task(config.task, best["params"])
    report = reporter(f"tune {config.task.kind}: refits")
    report({"done": 0, "total": config.search.num_refits})
    seeds = [task.seed + 1 + i for i in range(config.search.num_refits)]
    scored = ray.get([refit.remote(dataclasses.replace(task, seed=s), job, best["params"]) for s in seeds])
    refits, tests = [score for score, _ in scored], [score for _, score in scored]
    report({"done": len(refits), "total": config.search.num_refits})
    manifest: dict[str, Any] = {
        "task": config.task.kind,
        "best_task": {k: v for k, v in best["params"].items() if k not in NOT_OF_TASK},
        "best_min_faithfulness": float(best["params"].get(MIN_FAITHFULNESS, 0.0)),
        "best_set": train_set,
        "best_score": best["score"],
        "refits": refits,
        "refit_mean": float(np.mean(refits)) if refits else None,
        "refit_sd": float(np.std(refits, ddof=1)) if len(refits) > 1 else None,
        "refit_tests": tests,
        "refit_test_mean": float(np.mean(tests)) if tests else None,
        "refit_test_sd": float(np.std(tests, ddof=1)) if len(tests) > 1 else None,
        "trials": trials,
        "num_trials": len(trials),
        "cpu_seconds": sum(t["cost"] for t in trials),
    }
    if len(config.search.objectives) > 1:
        manifest["pareto"] = pareto_front(trials)
    return manifest
