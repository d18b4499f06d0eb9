"""The study: models x solvers x steps → cost, realism and task scores on held-out real frames, a row a combination."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from raysyn.cluster.curves import CurvePoint, curve_points
from raysyn.cluster.graph import GraphResult, Node, run_graph
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import StageDir, open_stage
from raysyn.cluster.stage_lock import alone
from raysyn.config import (
    CompareJob,
    FitJob,
    JobConfig,
    ModelConfig,
    PrepareJob,
    SynthesizeJob,
    TaskConfig,
    TuneJob,
    fingerprint,
)
from raysyn.data.storage import Storage
from raysyn.types import SPLITS, Outcome, UserError

TASKS = ("classification", "segmentation")
SEGMENTER = "segmenter"  # the key of its node
ROW_DECIDES = ("real_fraction", "mixing", "seed")  # of a task: what tells rows and points of a curve apart


@dataclass(frozen=True)
class Row:
    """One training set of the study: the real (or phantom) frames, synthetic ones of a model and sampler, a control."""

    key: str
    kind: str  # "ceiling", "synthetic" or "control"
    model: ModelConfig | None = None


def study_rows(config: CompareJob) -> list[Row]:
    """The ceiling, then every model x solver x number of steps, then the controls (of the first latent model)."""
    rows = [Row("ceiling", "ceiling")]
    for model in config.models:
        for solver in config.solvers:
            for num_steps in config.steps:
                sampler = dataclasses.replace(model.sampler, solver=solver, num_steps=num_steps)
                rows.append(
                    Row(f"{model.label} {solver} {num_steps}", "synthetic", dataclasses.replace(model, sampler=sampler))
                )
    latent = [m for m in config.models if m.space == "latent"]
    return rows + [Row(f"control {name}", "control", latent[0]) for name in config.controls if latent]


def _job(cls: type, config: JobConfig, **values: Any) -> Any:
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(JobConfig)}
    return cls(**{**shared, "plan_only": False, "overwrite": False, **values})


def _run_stage(module: str, function: str, job: Any, *inputs: Any) -> Outcome:
    """Runs in a Ray task: one stage by name, so that nothing heavy is imported where it is not used."""
    import importlib

    outcome: Outcome = getattr(importlib.import_module(module), function)(job)
    return outcome


def _stage(module: str, function: str, job: Any) -> Any:
    return partial(_run_stage, f"raysyn.cluster.{module}", function, job)


def study_nodes(config: CompareJob, rows: list[Row]) -> list[Node]:
    """The graph of the study in topological order, longest chains first."""
    nodes = [Node("prepare", _stage("inputs", "prepare", _job(PrepareJob, config)))]
    nodes += _fit_nodes(config)
    nodes += [_segmenter_node(config)]
    nodes += [_set_node(config, row) for row in rows[1:]]
    nodes.append(_tune_node(config, next(r for r in rows if r.kind == "synthetic")))
    for row in rows:
        nodes += [n for task in TASKS for n in _task_nodes(config, row, task)]
        nodes.append(_measure_node(config, row))
    return nodes + [_curve_node(config, point) for point in curve_points(config, rows)]


def _fit_nodes(config: CompareJob) -> list[Node]:
    """One autoencoder a distinct set-up, then the diffusion models; models that share an autoencoder share its fit."""
    nodes, autoencoders = [], {}
    for model in config.models:
        needs: tuple[str, ...] = ("prepare",)
        if model.space == "latent":
            key = fingerprint(model.vae, model.latent_downscale)
            if key not in autoencoders:
                autoencoders[key] = f"fit autoencoder of {model.label}"
                job = _job(FitJob, config, model=model, what="autoencoder")
                nodes.append(Node(autoencoders[key], _stage("fit", "fit", job), needs))
            needs = ("prepare", autoencoders[key])
        nodes.append(Node(f"fit {model.label}", _stage("fit", "fit", _job(FitJob, config, model=model)), needs))
    return nodes


def _set_node(config: CompareJob, row: Row) -> Node:
    assert row.model is not None
    if row.kind == "control":
        job = _job(FitJob, config, model=row.model, what="autoencoder")
        autoencoder = next(n.key for n in _fit_nodes(config) if n.key.startswith("fit autoencoder"))
        run = partial(_run_control, job, row.key.removeprefix("control "), config.synthesize.seed)
        return Node(f"set {row.key}", run, ("prepare", autoencoder), num_cpus=1)
    job = _job(SynthesizeJob, config, model=row.model, synthesize=config.synthesize)
    return Node(f"set {row.key}", _stage("synthesize", "synthesize", job), ("prepare", f"fit {row.model.label}"))


def _run_control(job: FitJob, name: str, seed: int, prepared: Outcome, autoencoder: Outcome) -> Outcome:
    from raysyn.cluster.controls import make_control

    return make_control(job, name, seed, prepared, autoencoder)


def _tune_node(config: CompareJob, row: Row) -> Node:
    job = _job(TuneJob, config, task=config.segmentation, search=config.search)
    return Node("tune segmentation", partial(_run_tune, job), ("prepare", f"set {row.key}"))


def _run_tune(job: TuneJob, prepared: Outcome, train_set: Outcome) -> Outcome:
    from raysyn.cluster.tune import tune

    return tune(dataclasses.replace(job, train_sets=[train_set.manifest["frames"]]))


def _segmenter_node(config: CompareJob) -> Node:
    """The judge of faithfulness: trained on the prepared frames before any set-up is searched."""
    run = partial(_run_task, _job(JobConfig, config), config.segmentation, "ceiling", False, 1.0)
    return Node(SEGMENTER, run, ("prepare",), num_cpus=1, num_gpus=config.workers.gpus_per_worker)


def _task_nodes(config: CompareJob, row: Row, kind: str) -> list[Node]:
    """A task's trainings on a row's frames. Every row has the set-up that was searched, the ceiling as well: they differ
    in what they are trained on alone."""
    nodes = []
    for seed in range(config.num_task_seeds):
        task: TaskConfig = dataclasses.replace(getattr(config, kind), seed=getattr(config, kind).seed + seed)
        needs: tuple[str, ...] = ("prepare",) if row.kind == "ceiling" else ("prepare", f"set {row.key}")
        use = kind == "segmentation"
        run = partial(_run_task, _job(JobConfig, config), task, row.kind, use, 1.0)
        gpus = config.workers.gpus_per_worker
        needs += ("tune segmentation",) if use else ()
        nodes.append(Node(f"{kind} {row.key} seed {seed}", run, needs, num_cpus=1, num_gpus=gpus))
    return nodes


def _curve_node(config: CompareJob, point: CurvePoint) -> Node:
    real = point.share if point.curve == "real_fraction" else 0.0
    part = point.share if point.curve == "num_synthetic" else 1.0
    task = dataclasses.replace(config.segmentation, real_fraction=real)
    run = partial(_run_task, _job(JobConfig, config), task, "synthetic", True, part)
    needs = ("prepare", f"set {point.row}", "tune segmentation")
    return Node(point.key, run, needs, num_cpus=1, num_gpus=config.workers.gpus_per_worker)


def _run_task(
    job: JobConfig, task: TaskConfig, kind: str, use_tuned: bool, set_share: float, *inputs: Outcome
) -> Outcome:
    """Train one task on one set (or a share of it) and test it on the prepared test frames."""
    from raysyn.cluster.task_runs import run_task

    prepared, threshold = inputs[0], 0.0
    train_set = prepared if kind == "ceiling" else inputs[1]
    if use_tuned:
        searched = inputs[-1].manifest
        task = dataclasses.replace(task, **searched["best_task"])
        threshold = 0.0 if kind == "ceiling" else searched["best_min_faithfulness"]
    sets, real = [train_set.manifest["frames"]], prepared.manifest["frames"]
    return run_task(job, task, sets, real, min_faithfulness=threshold, set_share=set_share)


def _measure_node(config: CompareJob, row: Row) -> Node:
    needs = ("prepare",) if row.kind == "ceiling" else ("prepare", f"set {row.key}", SEGMENTER)
    return Node(
        f"realism {row.key}", partial(_run_realism, _job(JobConfig, config), config.extractors), needs, num_cpus=1
    )


def _run_realism(job: JobConfig, extractors: list[str], prepared: Outcome, *inputs: Outcome) -> Outcome:
    """Realism of a training set against the held-out test frames, faithfulness by the study's segmenter.

    `inputs` are the set and the segmenter; without them the prepared set itself is measured, the baseline.
    """
    from raysyn.cluster.task_runs import run_realism

    real = prepared.manifest["frames"]
    if not inputs:
        return run_realism(job, real, real, extractors)
    train_set, segmenter = inputs
    return run_realism(
        job, train_set.manifest["frames"], real, extractors, segmenter_dir=segmenter.manifest["model_dir"]
    )


def compare_fingerprint(config: CompareJob) -> str:
    """Names the study: everything that decides a number in its table, real input files included."""
    from raysyn.cluster.inputs import prepare_fingerprint

    return fingerprint(
        prepare_fingerprint(config, SPLITS),
        config.models,
        config.solvers,
        config.steps,
        config.synthesize,
        config.segmentation,
        config.classification,
        config.search,
        config.num_task_seeds,
        config.controls,
        config.curves,
        config.extractors,
        config.cost,
    )


def check_extractors(extractors: list[str]) -> None:
    """Raise UserError for none at all, for two of one name, and for one that cannot be opened, before any work."""
    from raysyn.metrics.extractors import open_extractor

    if not extractors:
        raise UserError("extractors: name at least one, e.g. extractors=[lite0]")
    names = [spec.partition("=")[0] for spec in extractors]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"extractors: two are {twice[0]}; their measures would have one name")
    for spec in extractors:
        if spec != "lite0":
            open_extractor(spec)


def check_rows(config: CompareJob) -> None:
    """Raise UserError for a model, a task's net or a search that cannot work, before any work."""
    from raysyn.cluster.fit import check
    from raysyn.cluster.tune_space import check_nets, check_search
    from raysyn.tasks.nets import check_net

    for model in config.models:
        check(_job(FitJob, config, model=model))
    for kind in TASKS:
        check_net(getattr(config, kind), config.data.image_size)
    search = _job(TuneJob, config, task=config.segmentation, search=config.search)
    check_nets(check_search(search), search)


def stages_at_once(config: CompareJob) -> int:
    """How many stages of a study are begun; what they compute waits for the cluster's CPUs and GPUs."""
    return max(4, 2 * config.workers.num_workers)


def compare(config: CompareJob) -> Outcome:
    """Run the study, or show the finished one. Rows that failed are listed in the report and make the job exit 1."""
    from raysyn.cluster.study_report import print_table, show_report

    if not config.models:
        raise UserError("model: name at least one, e.g. model=edm_l64 or model=all")
    if config.plan_only:
        raise UserError("plan_only: a study has no plan; jobs/fit.py and jobs/synthesize.py have one, model by model")
    check_extractors(config.extractors)
    if own := sorted(set(config.search.space) & set(ROW_DECIDES)):
        raise UserError(f"search.space.{own[0]}: rows and curves set it themselves; search it with jobs/tune.py")
    stage: StageDir = open_stage(config.storage, "compare", compare_fingerprint(config))
    if (done := _finished(config, stage)) is None:
        check_rows(config)
        stage.storage.check_writable()
        with alone(stage):
            if (done := _finished(config, stage)) is None:
                return _compare_alone(dataclasses.replace(config, storage=Storage.at(config.storage).uri), stage)
    show_report(Storage.at(config.storage), stage.fingerprint)
    print_table(done.manifest["rows"])
    return done


def _finished(config: CompareJob, stage: StageDir) -> Outcome | None:
    return None if config.overwrite else stage.outcome()


def _compare_alone(config: CompareJob, stage: StageDir) -> Outcome:
    from raysyn.cluster.study_report import print_table, write_study

    rows = study_rows(config)
    at_once = config.workers.min_workers or config.workers.num_workers  # a fit's workers start together
    with ray_session(config.ray, config.workers, at_once):
        if config.overwrite:
            stage.clear()
        result: GraphResult = run_graph(study_nodes(config, rows), stages_at_once(config))
        manifest = write_study(config, rows, result, stage.fingerprint)
    print_table(manifest["rows"])
    if result.failures:
        for key, line in result.failures.items():
            print(f"failed: {key}: {line}", file=sys.stderr)
        raise next(iter(result.errors.values()))
    return stage.finish(manifest)
