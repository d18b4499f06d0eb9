"""One task run of the study: train on frame sets, test on held-out real (or phantom) frames. A stage of its own."""

from __future__ import annotations

import time
from typing import Any

from raysyn.cluster.board import reporter
from raysyn.cluster.stage import open_stage
from raysyn.config import JobConfig, TaskConfig, fingerprint
from raysyn.data.frames import read_arrays
from raysyn.data.storage import Storage
from raysyn.types import FrameArrays, Outcome, UserError


def set_fingerprint(uri: str) -> str:
    """What a frame set's own manifest says of it; the URI itself for a set that is not ours."""
    storage = Storage.at(uri)
    return storage.read_json("manifest.json")["fingerprint"] if storage.exists("manifest.json") else uri


def refuse_leak(sets: dict[str, FrameArrays], test: FrameArrays) -> None:
    """Raises UserError when a patient of the test frames is among those that a set was made from."""
    tested = set(test.patient_id)
    for name, frames in sets.items():
        seen = sorted(tested & set(frames.patient_id))
        if seen:
            raise UserError(
                f"{name}: holds test patients ({', '.join(seen[:3])}{', …' if len(seen) > 3 else ''}); refused"
            )


def load_sets(train_sets: list[str], real: str, task: TaskConfig) -> dict[str, FrameArrays]:
    """{train, validation, test} and, where the task mixes them in, {real}: patients checked against the test's."""
    sets = {
        "train": FrameArrays.concatenate([read_arrays(uri, "train") for uri in train_sets]),
        "validation": FrameArrays.concatenate(
            [read_arrays(uri, "validation") for uri in ([real] if task.validate_on == "real" else train_sets)]
        ),
    }
    if task.real_fraction > 0:
        sets["real"] = read_arrays(real, "train")
    test = read_arrays(real, "test")
    if len(test) == 0:
        raise UserError(f"{real}: no test frames; a task is tested on real frames of patients that no model saw")
    refuse_leak(sets, test)
    return {**sets, "test": test}


def run_task(job: JobConfig, task: TaskConfig, train_sets: list[str], real: str) -> Outcome:
    """Train `task` on frame sets and test it on `real`'s test split; skipped when it was done. Manifest: `scores`."""
    key = fingerprint(task, [set_fingerprint(u) for u in train_sets], set_fingerprint(real))
    stage = open_stage(job.storage, "task", key)
    done = stage.outcome()
    if done is not None:
        return done
    from raysyn.tasks.classification import evaluate_classification, train_classification
    from raysyn.tasks.segmentation import evaluate_segmentation, train_segmentation

    started, cpu = time.perf_counter(), time.process_time()
    sets = load_sets(train_sets, real, task)
    report = reporter(f"{task.kind} on {len(sets['train'])} frames")

    def progress(status: dict[str, Any]) -> None:
        rate = status["step"] / (time.perf_counter() - started)
        report({"done": status["step"], "total": status["steps"], "unit": "steps", "per_second": rate})

    train, evaluate = (
        (train_segmentation, evaluate_segmentation)
        if task.kind == "segmentation"
        else (train_classification, evaluate_classification)
    )
    fitted = train(sets["train"], sets["validation"], task, real=sets.get("real"), report=progress)
    scores = evaluate(fitted, sets["test"])
    return stage.finish(
        {
            "task": task.kind,
            "arch": task.arch,
            "scores": scores,
            "validation_score": fitted.best_score,
            "history": fitted.history,
            "num_train_frames": len(sets["train"]),
            "cpu_seconds": round(time.process_time() - cpu, 3),
        }
    )


def run_realism(job: JobConfig, train_set: str, real: str, extractor: str = "lite0") -> Outcome:
    """Realism of a set's training frames against `real`'s held-out test frames (unseen by any model). Manifest: `scores`."""
    stage = open_stage(
        job.storage, "realism", fingerprint(extractor, set_fingerprint(train_set), set_fingerprint(real))
    )
    done = stage.outcome()
    if done is not None:
        return done
    from raysyn.metrics.realism import realism

    scores = realism(read_arrays(train_set, "train"), read_arrays(real, "test"), extractor)
    return stage.finish({"scores": scores, "split": "train against test"})
