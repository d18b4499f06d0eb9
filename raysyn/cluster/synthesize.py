"""The synthesize stage: masks → frames, exactly once, the same bytes whatever the number of actors, order or deaths.

What is Ray Data's: placing the actors that hold the model, feeding them, replacing those that die, retrying what they
had in hand. What is ours: the unit of work is one shard, a row of the data set, drawn and written whole by its actor
under a name that the plan gives it. Ray Data's own writing names files by run and writes them in place, so neither their
bytes nor their wholeness could be relied on; its job-level checkpointing loads every id into memory to resume and has
lost rows in overwrite mode. A run here lists what is whole and asks for the rest.

Seconds are in the shard's record and the manifest, not in the rows: a clock in the data would make two runs differ.
"""

from __future__ import annotations

import dataclasses
import json
import time
from importlib.metadata import version
from typing import Any

from raysyn.cluster.board import reporter, watch
from raysyn.cluster.metrics_export import count
from raysyn.cluster.sampler_actor import SUMMED, ShardWriter, SynthesisSpec, settings_of, whole_shards
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import StageDir, lost_shards, open_stage, refuse_foreign
from raysyn.cluster.synthesis_card import write_card
from raysyn.cluster.synthesis_folder import claim
from raysyn.cluster.synthesis_model import ModelFacts, model_facts, segmenter_patients
from raysyn.config import FitJob, PrepareJob, SynthesizeConfig, SynthesizeJob, fingerprint
from raysyn.data.frames import frame_files, read_light
from raysyn.data.requests import RequestPlan
from raysyn.data.schema import SCHEMA_VERSION
from raysyn.data.storage import Storage, json_values
from raysyn.types import Outcome, UserError

PACKAGES = ("torch", "diffusers", "numpy", "pyarrow", "pillow")


def synthesize(config: SynthesizeJob) -> Outcome:
    """Draw the data set of `config`, or what of it is missing. Raises UserError for bad input."""
    from raysyn.cluster.inputs import frames_uri, prepare

    config = dataclasses.replace(config, storage=Storage.at(config.storage).uri)
    check_gate(config.synthesize)
    model = model_facts(config, find_model(config))
    with ray_session(config.ray, config.workers):
        prepared = prepare(_as(PrepareJob, config))
        spec = make_spec(config, model, frames_uri(prepared), prepared.fingerprint)
        if config.plan_only or config.synthesize.plan_only:
            from raysyn.cluster.synthesis_plan import print_plan

            return print_plan(config, spec)
        stage = open_stage(config.storage, "synthesize", spec.metadata["raysyn_fingerprint"])
        if config.overwrite:
            stage.clear()
        if (done := stage.outcome()) is not None and not lost_shards(stage, done.manifest):
            refuse_foreign(stage, (shard.name for shard in spec.plan.shards()))
            return done
        spec = claim(stage, spec)
        with watch(lambda: spec.key):
            draw_missing(config, stage, spec)
        return finish(config, stage, spec)


def _as(cls: type, config: SynthesizeJob, **values: Any) -> Any:
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(PrepareJob)}
    return cls(**{**shared, "plan_only": False, "overwrite": False, **values})


def find_model(config: SynthesizeJob) -> str:
    """The model folder: `model_dir`, else where the fit of `config.model` put it. Raises UserError when there is none."""
    if config.model_dir:
        place = Storage.at(config.model_dir)
        if not place.exists("model.json"):
            raise UserError(f"model_dir: {config.model_dir}: no model.json there; give a folder that jobs/fit.py wrote")
        return place.uri
    from raysyn.cluster.fit import fit_fingerprint
    from raysyn.cluster.inputs import prepare_fingerprint

    job = _as(FitJob, config, model=config.model)
    fitted = open_stage(config.storage, "fit", fit_fingerprint(job, prepare_fingerprint(config)))
    if fitted.outcome() is None:
        raise UserError(
            f"model: {config.model.name} is not fitted under {config.storage}; run python jobs/fit.py "
            f"model={config.model.name} scale={config.scale} with the same data first, or give model_dir="
        )
    return fitted.storage.join("model").uri  # not as the manifest has it: a storage may be moved


def mask_ids(frames: str, splits: list[str]) -> dict[str, list[str]]:
    """Frame ids of the masks of each split, in the set's order, without reading a picture."""
    found: dict[str, list[str]] = {}
    for split in splits:
        found[split] = []
        try:
            files = frame_files(frames, split)
        except UserError as error:
            raise UserError(f"synthesize.mask_splits: {split}: {error}") from None
        for storage, name in files:
            found[split] += read_light(storage, name)["frame_id"].to_pylist()
    return found


def check_gate(synthesis: SynthesizeConfig) -> None:
    """Raise UserError when images are to be judged and nobody is there to judge them."""
    if synthesis.min_faithfulness > 0 and not synthesis.segmenter_dir:
        raise UserError(
            "synthesize.min_faithfulness: needs synthesize.segmenter_dir, a segmenter trained on real frames"
        )
    if synthesis.segmenter_dir and not Storage.at(synthesis.segmenter_dir).exists():
        raise UserError(f"synthesize.segmenter_dir: {synthesis.segmenter_dir}: no such folder")


def make_spec(config: SynthesizeJob, model: ModelFacts, frames: str, frames_fingerprint: str) -> SynthesisSpec:
    """Everything that a worker needs."""
    synthesis, sampler = config.synthesize, config.model.sampler
    settings = settings_of(model.checkpoint_sha256, sampler, synthesis)
    placement = ("modulation_cache_bytes", "compile", "plan_only")  # a grey level at most, as the kind of device does
    decisive = {k: v for k, v in dataclasses.asdict(synthesis).items() if k not in placement}
    decisive["segmenter_dir"] = model.segmenter_sha256  # what it is, not where it lies
    key = fingerprint("synthesize 4", frames_fingerprint, settings, decisive)
    metadata = {
        "raysyn_fingerprint": key,
        "raysyn_schema_version": SCHEMA_VERSION,
        "raysyn_model": model.name,
        "raysyn_model_fingerprint": model.fingerprint,
        "raysyn_checkpoint_sha256": model.checkpoint_sha256,
        "raysyn_threads": str(config.workers.threads_per_worker),
        "raysyn_sampler": json.dumps(json_values(settings["sampler"]), sort_keys=True),
        "raysyn_warp": json.dumps(json_values(settings["warp"]), sort_keys=True),
        "raysyn_amp": synthesis.amp,
        "raysyn_packages": ", ".join(f"{p} {version(p)}" for p in PACKAGES),
    }
    if model.segmenter_sha256:
        metadata["raysyn_segmenter_sha256"] = model.segmenter_sha256
    return SynthesisSpec(
        plan=RequestPlan.of(synthesis, mask_ids(frames, synthesis.mask_splits)),
        config=synthesis,
        settings=settings,
        metadata=metadata,
        frames=frames,
        output=Storage.at(config.storage).join("synthesize", key).uri,
        model_dir=model.folder,
        model=model.name,
        solver=sampler.solver,
        num_steps=sampler.num_steps,
        num_function_evals=model.num_function_evals,
        threads=config.workers.threads_per_worker,
        key=f"synthesize {model.name} {sampler.solver} {sampler.num_steps}",
        fitted_on=model.fitted_on,
        segmenter_fitted_on=segmenter_patients(synthesis),
    )


def draw_missing(config: SynthesizeJob, stage: StageDir, spec: SynthesisSpec) -> None:
    """Draw every shard that is not whole.

    Ray Data replaces actors and retries what they had in hand. What it gives up on (a node lost with all its actors) is
    asked for again, `workers.max_failures` times at most (-1: without end). When the head dies Ray ends this process
    with exit code 1 after a minute; the same command goes on.
    """
    from ray.exceptions import RayError, RayTaskError

    left = config.workers.max_failures
    while True:
        try:
            return draw_once(config, stage, spec)
        except RayTaskError:
            count("raysyn_failures", spec.key, kind="error")
            raise  # our own code failed, and would again
        except RayError as error:
            if left == 0:
                raise
            left -= 1
            count("raysyn_failures", spec.key, kind="retry")
            print(f"{spec.key}: {type(error).__name__}; going on with the shards that are missing", flush=True)


def draw_once(config: SynthesizeJob, stage: StageDir, spec: SynthesisSpec) -> None:
    """One pass over the shards that are not whole."""
    shards = list(spec.plan.shards())
    whole = whole_shards(stage.storage, shards)
    rows = [dataclasses.asdict(s) for s in shards if s.name not in whole]
    if not rows:
        return
    report, started = reporter(spec.key), 0.0
    done = before = sum(r["rows"] for r in whole.values())
    total = spec.plan.num_requests()
    report({"done": done, "total": total, "unit": "images"})
    for batch in _dataset(config, spec, rows).iter_batches(batch_size=None, prefetch_batches=0):
        if refused := next(filter(None, batch["refused"]), None):
            raise UserError(str(refused))
        # Counted from when the first shard was begun: starting actors says nothing about the time left.
        started = started or time.perf_counter() - float(batch["seconds"][0])
        done += int(batch["rows"].sum())
        rate = (done - before) / max(time.perf_counter() - started, 1e-3)
        report({"done": done, "total": total, "unit": "images", "per_second": rate})


def _dataset(config: SynthesizeJob, spec: SynthesisSpec, rows: list[dict[str, Any]]) -> Any:
    import logging

    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    workers = config.workers
    count = min(workers.num_workers, len(rows))
    source = ray.data.from_items(rows, override_num_blocks=min(len(rows), max(count, 1000)))
    return source.map_batches(
        ShardWriter,
        fn_constructor_args=(spec,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=workers.cpus_per_worker,
        num_gpus=workers.gpus_per_worker or None,
    )


def finish(config: SynthesizeJob, stage: StageDir, spec: SynthesisSpec) -> Outcome:
    """Check that every shard is there, write the data card, then the manifest."""
    shards = list(spec.plan.shards())
    whole = whole_shards(stage.storage, shards)
    missing = [s.name for s in shards if s.name not in whole]
    if missing:
        raise RuntimeError(f"{len(missing)} shards are missing after the run, the first is {missing[0]}")
    records = [whole[s.name] for s in shards]
    totals = {key: round(sum(r[key] for r in records), 4) for key in ("seconds", *SUMMED)}
    peaks = {key: max(r[key] for r in records) for key in ("peak_memory_mb", "peak_gpu_memory_mb")}
    energies = [r["energy_joules"] for r in records]
    images = spec.plan.num_requests()
    attempts = sum(r["attempts"] for r in records)
    manifest = {
        "frames": stage.path,
        "model": spec.model,
        "model_dir": spec.model_dir,
        "fitted_on": list(spec.fitted_on),
        "segmenter_fitted_on": list(spec.segmenter_fitted_on),
        **spec.settings,
        "num_frames": images,
        "num_attempts": attempts,
        "num_rejected": attempts - images,
        "below_min_faithfulness": sum(r["below_min_faithfulness"] for r in records),
        "num_function_evals": spec.num_function_evals,
        "precision": ", ".join(sorted({r.get("precision", "unknown") for r in records})),
        **totals,
        **peaks,
        "energy_joules": None if None in energies else sum(energies),
        "seconds_per_image": totals["seconds"] / images,
        "threads_per_worker": spec.threads,
        "metadata": spec.metadata,
        "shards": records,
    }
    write_card(stage, spec, manifest, config.data.name)
    stage.storage.clean_temporaries(older_than_s=0)
    return stage.finish(manifest)
