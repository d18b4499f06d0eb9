"""One task run of the study: train on frame sets, test on held-out real (or phantom) frames. A stage of its own."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from raysyn.cluster.board import reporter
from raysyn.cluster.session import gpu_share
from raysyn.cluster.stage import StageDir, below_storage, open_stage, read_manifest
from raysyn.config import JobConfig, TaskConfig, fingerprint
from raysyn.data.frames import frame_files, read_arrays, read_light
from raysyn.data.storage import Storage
from raysyn.types import SPLITS, VIEWS, FrameArrays, Outcome, UserError

TASK_VERSION = "task 7"  # goes up when a manifest gains a number, so that older ones are made again
REALISM_VERSION = "realism 5"


def set_fingerprint(uri: str) -> str:
    """What a frame set's own manifest says of it; the URI itself for a set that is not ours."""
    storage = Storage.at(uri)
    return str(read_manifest(storage).get("fingerprint", uri)) if storage.exists("manifest.json") else uri


def refuse_leak(uri: str, frames: FrameArrays, test: FrameArrays) -> None:
    """Raises UserError, naming the set `uri`, when its frames hold a test patient or were made from a test frame's mask."""
    if seen := sorted(set(test.patient_id) & set(frames.patient_id)):
        raise UserError(f"{uri}: holds test patients ({_few(seen)}); refused")
    if used := sorted(set(test.frame_id) & {*frames.mask_frame_id, *frames.frame_id}):
        raise UserError(f"{uri}: holds test frames or was drawn from their masks ({_few(used)}); refused")


def _few(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (", …" if len(first) > 3 else "")


def patients_of(uri: str, splits: tuple[str, ...]) -> set[str]:
    """Patients of some splits of a frame set, from the columns without pictures."""
    tables = [read_light(storage, name) for storage, name in frame_files(uri)]
    pairs = [zip(t["split"].to_pylist(), t["patient_id"].to_pylist()) for t in tables]
    return {patient for rows in pairs for split, patient in rows if split in splits}


def refuse_lineage(train_sets: list[str], test: FrameArrays) -> None:
    """Raises UserError when what is behind synthetic sets was fitted on test patients: a model, its autoencoder, a judge.

    The judge is the segmenter that chose a set's images (synthesize.segmenter_dir), as far as it names its patients. The
    way back is by manifests: the set's names its model's folder and whom that was fitted on, which holds wherever the set
    is taken; that stage's names its frames and its autoencoder; a model folder names its patients itself. Where a set is
    not of our making the way ends, and its own patients are all there is. A model that is neither found nor known by its
    set's manifest is refused as well.
    """
    tested = set(test.patient_id)
    todo = [("", _with_manifest(Storage.at(uri))) for uri in train_sets]
    seen: set[str] = set()
    while todo:
        what, storage = todo.pop()
        if storage.uri in seen or not storage.exists("manifest.json"):
            continue
        seen.add(storage.uri)
        manifest = read_manifest(storage)
        known = not what and manifest.get("fitted_on")
        _refuse_fitted("model", storage.uri, tested & set(known or ()))
        _refuse_fitted("set's segmenter", storage.uri, tested & set(manifest.get("segmenter_fitted_on") or ()))
        for key, kind in (("model_dir", "model"), ("autoencoder", "autoencoder")):
            if not manifest.get(key) or (what and key == "model_dir"):
                continue
            model = Storage.at(manifest[key])
            patients = _fitted_on(model)
            if patients is None and not known:
                raise UserError(
                    f"{storage.uri}: whom its {kind} was fitted on cannot be told, {model.uri} is not there or says "
                    "nothing of it; put it back, there or below the same storage"
                )
            _refuse_fitted(kind, model.uri, tested & (patients or set()))
            todo.append((kind, model.parent))


def _fitted_on(model: Storage) -> set[str] | None:
    """Patients that a model folder and its stage's frames name; None where what would name them is not there."""
    found = set(model.read_json("model.json").get("patients", [])) if model.exists("model.json") else None
    if not model.parent.exists("manifest.json"):
        return found  # perhaps of somebody else's making, who names none
    frames = read_manifest(model.parent).get("frames")
    if frames and Storage.at(frames).exists():
        return (found or set()) | patients_of(frames, ("train", "validation"))
    return found or None


def _with_manifest(storage: Storage) -> Storage:
    """The folder of the set that `storage`, perhaps one split or one shard of it, belongs to."""
    while not storage.exists("manifest.json") and (storage.name.endswith(".parquet") or storage.name in SPLITS):
        storage = storage.parent
    return storage


def _refuse_fitted(what: str, uri: str, patients: set[str]) -> None:
    if patients:
        raise UserError(f"{uri}: this {what} was fitted on test patients ({_few(patients)}); refused")


def load_sets(
    train_sets: list[str],
    real: str,
    task: TaskConfig,
    *,
    min_faithfulness: float = 0.0,
    validation_sets: Sequence[str] = (),
) -> dict[str, FrameArrays]:
    """{train, validation, test} and, where the task mixes them in, {real}: patients checked against the test's.

    Training frames of a known faithfulness below `min_faithfulness` are left out; validation keeps all of its own, so that
    scores at several thresholds compare. It is on `real`, or on `validation_sets` (those of `train_sets` by default), as
    the task says. Raises UserError for an empty set, a leak, or images of several sizes.
    """
    test = read_arrays(real, "test")
    if len(test) == 0:
        raise UserError(f"{real}: no test frames; a task is tested on real frames of patients that no model saw")
    if task.kind == "classification" and len(set(test.view)) < len(VIEWS):
        raise UserError(f"{real}: test frames are all of one view; view classification needs at least 1 frame of each")

    def read(uris: Sequence[str], split: str, threshold: float = 0.0) -> FrameArrays:
        parts = [_faithful(uri, split, threshold) for uri in uris]
        for uri, part in zip(uris, parts):
            refuse_leak(uri, part, test)
        return FrameArrays.concatenate(parts)

    validated = [real] if task.validate_on == "real" else validation_sets or train_sets
    sets = {"train": read(train_sets, "train", min_faithfulness), "validation": read(validated, "validation")}
    if task.real_fraction > 0:
        sets["real"] = read([real], "train")
    refuse_lineage([*train_sets, *validation_sets], test)
    sizes = sorted({some.image_u8.shape[1:] for some in (*sets.values(), test)})
    if len(sizes) > 1:
        raise UserError(f"{train_sets[0]}: frames of sizes {sizes} beside those of {real}; prepare them at one size")
    return {**sets, "test": test}


def _faithful(uri: str, split: str, threshold: float) -> FrameArrays:
    frames = read_arrays(uri, split)
    if threshold <= 0:
        return frames
    known: dict[str, float | None] = {}
    for storage, name in frame_files(uri, split):
        light = read_light(storage, name)
        known.update(zip(light["frame_id"].to_pylist(), light["faithfulness"].to_pylist()))
    values = [known[name] for name in frames.frame_id]
    kept = [i for i, value in enumerate(values) if value is None or value >= threshold]
    if not kept:
        raise UserError(f"{uri}: no {split} frame has a faithfulness of {threshold:g} or more; lower the threshold")
    return frames.take(kept)


def run_task(
    job: JobConfig,
    task: TaskConfig,
    train_sets: list[str],
    real: str,
    *,
    min_faithfulness: float = 0.0,
    set_share: float = 1.0,
) -> Outcome:
    """Train `task` on frame sets and test it on `real`'s test split; skipped when it was done.

    `set_share` < 1 takes that share of the training frames, drawn by the task's seed. Manifest: `scores`, `by_frame`
    (`metrics.paired`), and `model_dir`, the trained network (what `synthesize.segmenter_dir` and `run_realism` take).
    """
    kept = (min_faithfulness, set_share) if (min_faithfulness, set_share) != (0.0, 1.0) else ()
    key = fingerprint(TASK_VERSION, task, [set_fingerprint(u) for u in train_sets], set_fingerprint(real), *kept)
    stage = open_stage(job.storage, "task", key)
    done = stage.outcome()
    if done is not None:
        return done
    from raysyn.metrics.cost import measured
    from raysyn.nets.precision import precision
    from raysyn.tasks.classification import evaluate_classification, train_classification
    from raysyn.tasks.segmentation import evaluate_segmentation, train_segmentation

    started = time.perf_counter()
    sets = load_sets(train_sets, real, task, min_faithfulness=min_faithfulness)
    if set_share < 1:
        order = np.random.default_rng(task.seed).permutation(len(sets["train"]))
        sets["train"] = sets["train"].take(np.sort(order[: max(1, round(set_share * len(order)))]))
    report = reporter(f"{task.kind} on {len(sets['train'])} frames")

    def progress(status: dict[str, Any]) -> None:
        rate = status["step"] / (time.perf_counter() - started)
        report({"done": status["step"], "total": status["steps"], "unit": "steps", "per_second": rate})

    train, evaluate = (
        (train_segmentation, evaluate_segmentation)
        if task.kind == "segmentation"
        else (train_classification, evaluate_classification)
    )
    with measured(gpu_share()) as cost:
        fitted = train(sets["train"], sets["validation"], task, real=sets.get("real"), report=progress)
        scores = evaluate(fitted, sets["test"])
    with tempfile.TemporaryDirectory() as scratch:
        fitted.save(scratch, [p for split, frames in sets.items() if split != "test" for p in frames.patient_id])
        stage.storage.upload_tree(scratch, "model")
    return stage.finish(
        {
            "task": task.kind,
            "arch": task.arch,
            "precision": precision(task.amp, next(fitted.net.parameters()).device),
            "by_frame": scores.pop("by_frame"),
            "scores": scores,
            "validation_score": fitted.best_score,
            "history": fitted.history,
            "num_train_frames": len(sets["train"]),
            "model_dir": stage.storage.join("model").uri,
            "cpu_seconds": round(cost.cpu_seconds, 3),
            "gpu_seconds": round(cost.gpu_seconds, 3),
            "cost": cost.columns(task.kind),
        }
    )


def run_realism(
    job: JobConfig, train_set: str, real: str, extractors: Sequence[str] = ("lite0",), *, segmenter_dir: str = ""
) -> Outcome:
    """Measure a set's training frames against `real`'s held-out test frames, whose patients no model saw.

    Manifest: `scores` (realism with the real-against-real baseline beside each; for a synthetic set memorisation, and
    with `segmenter_dir`, a task model trained on real frames, faithfulness), `worst_pairs`, and where pairs were found
    their picture `worst_pairs.png`. The first extractor finds the pairs; the others add their own distances.
    """
    segmenter = segmenter_dir and (below_storage(segmenter_dir) or segmenter_dir)  # the same after a move
    key = fingerprint(REALISM_VERSION, list(extractors), set_fingerprint(train_set), set_fingerprint(real), segmenter)
    stage = open_stage(job.storage, "realism", key)
    done = stage.outcome()
    if done is not None:
        return done
    from raysyn.metrics.memorisation import memorisation
    from raysyn.metrics.realism import (
        Measured,
        baseline_distances,
        check_enough,
        described,
        feature_distances,
        free_distances,
        open_extractor,
        realism,
    )

    frames, test = read_arrays(train_set, "train"), read_arrays(real, "test")
    refuse_leak(train_set, frames, test)
    refuse_lineage([train_set], test)
    train = frames if train_set == real else read_arrays(real, "train")
    check_enough(frames=frames, reference_frames=test, baseline_frames=train)
    found = open_extractor(extractors[0])
    b, c = (Measured(f, found.features(f.image_u8)) for f in (test, train))
    a = c if train_set == real else Measured(frames, found.features(frames.image_u8))
    scores: dict[str, Any] = {**feature_distances(a, b, found.name), **free_distances(frames, test)}
    pairs: list[dict[str, Any]] = []
    if train_set != real:
        scores |= baseline_distances(a, c, b, found.name)
        copied = memorisation(frames, train, test, (a.features, c.features, b.features))
        pairs = copied.pop("worst_pairs")
        scores |= {f"memorisation_{k}": v for k, v in copied.items()}
        _picture_pairs(stage, frames, train, pairs)
        if segmenter_dir:
            scores |= faithfulness_scores(frames, segmenter_dir)
    scores |= described(found, a, b)
    for other in map(open_extractor, extractors[1:]):
        own = realism(frames, test, other, real=None if train_set == real else train)
        scores |= {k: v for k, v in own.items() if f"_{other.name}" in k}
        scores |= {f"{other.name}_sha256": other.sha256, f"{other.name}_preprocessing": other.preprocessing}
    scores |= {"split": "train", "reference_split": "test"}
    return stage.finish({"scores": scores, "worst_pairs": pairs})


def faithfulness_scores(frames: FrameArrays, segmenter_dir: str) -> dict[str, float]:
    """Mean Dice of a real-trained segmenter's reading with the map asked for: `faithfulness` with a 95 % interval, `_sd`."""
    from raysyn.cluster.model_store import local_copy
    from raysyn.metrics.bootstrap import patient_interval
    from raysyn.metrics.faithfulness import mean_region_dice
    from raysyn.tasks.fitting import load_task
    from raysyn.tasks.segmentation import predict_label_maps

    segmenter = load_task(local_copy(segmenter_dir))
    values = mean_region_dice(predict_label_maps(segmenter, frames.image_u8), frames.label_map)
    low, high = patient_interval(values, frames.patient_id)
    mean, sd = float(values.mean()), float(values.std())
    return {"faithfulness": mean, "faithfulness_sd": sd, "faithfulness_low": low, "faithfulness_high": high}


def _picture_pairs(stage: StageDir, frames: FrameArrays, train: FrameArrays, pairs: list[dict[str, Any]]) -> None:
    from raysyn.report.grids import worst_pairs

    row_of, train_row = ({name: i for i, name in enumerate(f.frame_id)} for f in (frames, train))
    ours = np.stack([frames.image_u8[row_of[p["synthetic"]]] for p in pairs])
    theirs = np.stack([train.image_u8[train_row[p["nearest"]]] for p in pairs])
    picture = io.BytesIO()
    worst_pairs(ours, theirs, [p["pixel_correlation"] for p in pairs]).save(picture, format="PNG")
    stage.storage.write_atomic("worst_pairs.png", picture.getvalue())
