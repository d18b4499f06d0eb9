"""From the stages' manifests to the study's rows, its report folder and its runs in MLflow."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from raysyn.cluster.curves import curves_of
from raysyn.cluster.graph import GraphResult
from raysyn.config import CompareJob, to_dict
from raysyn.data.frames import read_arrays
from raysyn.data.storage import Storage
from raysyn.metrics.cost import Cost, cost_columns
from raysyn.metrics.paired import paired_difference
from raysyn.report.table import COLUMNS, print_table, table_csv
from raysyn.types import FrameArrays, Outcome

__all__ = ["print_table", "study_table", "write_study"]

NUM_PICTURED = 64
PAGE = "index.html"


def study_table(config: CompareJob, rows: list[Any], result: GraphResult) -> list[dict[str, Any]]:
    """A dict a row: the table's columns, then `cost/*`, `realism/*` and `task/*` numbers; failed rows are left out."""
    table = []
    for row in rows:
        scores = [_task_scores(config, row.key, task, result) for task in ("segmentation", "classification")]
        realism: Outcome | None = result.results.get(f"realism {row.key}")
        if any(s is None for s in scores) or realism is None:
            continue
        measured: dict[str, Any] = {**(scores[0] or {}), **(scores[1] or {}), **_less_ceiling(config, row, result)}
        table.append({**_identity(config, row), **_cost(config, row, result), **_named(measured, realism)})
    return table


def _identity(config: CompareJob, row: Any) -> dict[str, Any]:
    source = "phantom" if config.data.name == "phantom" else "real"
    if row.kind == "ceiling":
        return {"trained_on": source, "model": "", "space": "", "solver": "", "num_steps": None}
    own = {"model": row.model.label, "space": row.model.space}
    if row.kind == "control":
        return {
            "trained_on": "control",
            **own,
            "model": f"{row.model.label} {row.key.removeprefix('control ')}",
            "solver": "",
            "num_steps": None,
        }
    sampler = row.model.sampler
    return {"trained_on": "synthetic", **own, "solver": sampler.solver, "num_steps": sampler.num_steps}


def _task_scores(config: CompareJob, key: str, task: str, result: GraphResult) -> dict[str, Any] | None:
    """Scores of a row's task, their mean over seeds; None when a run is missing, and for a score that one has not.

    Of several seeds the table's own scores have their sd too, as `<score>_seed_sd`; a mean's interval is that of the mean
    bounds, over patients: the seeds' sd is not in it.
    """
    runs = [result.results.get(f"{task} {key} seed {seed}") for seed in range(config.num_task_seeds)]
    if any(run is None for run in runs):
        return None
    all_scores = [run.manifest["scores"] for run in runs if run is not None]
    of = {k: [s[k] for s in all_scores] for k in all_scores[0]}
    means = {k: None if None in values else sum(values) / len(values) for k, values in of.items()}
    spread = {f"{k}_seed_sd": _sd(values) for k, values in of.items() if k in COLUMNS and len(values) > 1}
    seconds = sum(run.manifest["cpu_seconds"] for run in runs if run is not None)
    return {**means, **spread, f"cost/{task}_cpu_seconds": seconds}


def _less_ceiling(config: CompareJob, row: Any, result: GraphResult) -> dict[str, float]:
    """`<score>_less_ceiling` with its interval: the row's score less the ceiling's, by the same test patients."""
    found: dict[str, float] = {}
    for task, score in (("segmentation", "mean_dice"), ("classification", "view_accuracy")):
        runs = [
            [result.results.get(f"{task} {key} seed {seed}") for seed in range(config.num_task_seeds)]
            for key in (row.key, "ceiling")
        ]
        own, theirs = ([run.manifest["by_frame"] for run in side if run is not None] for side in runs)
        if row.kind == "ceiling" or len(own) < config.num_task_seeds or len(theirs) < config.num_task_seeds:
            continue
        values = paired_difference(own, theirs)
        found |= {f"{score}_less_ceiling{end}": value for end, value in zip(("", "_low", "_high"), values)}
    return found


def _sd(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.std(known, ddof=1)) if len(known) == len(values) else None


def _named(scores: dict[str, Any], realism: Outcome) -> dict[str, Any]:
    """The table's own columns by their short names, everything else under its family."""
    found: dict[str, Any] = {}
    for key, value in scores.items():
        base = key.removesuffix("_low").removesuffix("_high")
        found[key if base in COLUMNS or key.startswith("cost/") else f"task/{key}"] = value
    for key, value in realism.manifest["scores"].items():
        found[key if key in COLUMNS else f"realism/{key}"] = value
    return found


def _cost(config: CompareJob, row: Any, result: GraphResult) -> dict[str, Any]:
    """Seconds of every stage that the row's data set needed, and money at the configured rates."""
    if row.kind != "synthetic":
        return {}
    drawn: Outcome = result.results[f"set {row.key}"]
    fitted: Outcome = result.results[f"fit {row.model.label}"]
    autoencoder: Outcome | None = next(
        (r for k, r in result.results.items() if isinstance(r, Outcome) and _is_autoencoder_of(r, fitted, k)), None
    )
    from raysyn.models import describe

    made, net = drawn.manifest, describe(row.model, config.data.image_size)
    stages = {"fit": _fit_cost(fitted, net["gflops_per_evaluation"])}
    if autoencoder is not None:
        stages["autoencoder"] = _fit_cost(autoencoder, net["gflops_encode"] + net["gflops_decode"])
    stages |= sampling_costs(made, net, cached=config.synthesize.modulation_cache_bytes != 0)
    return {
        "num_function_evals": made["num_function_evals"],
        "seconds_per_image": made["seconds_per_image"],
        "cost/num_attempts": made["num_attempts"],
        "cost/num_rejected": made["num_rejected"],
        "cost/parameters": fitted.manifest["parameters"],
        **cost_columns(stages, config.cost.usd_per_cpu_hour, config.cost.usd_per_gpu_hour),
    }


def sampling_costs(made: dict[str, Any], net: dict[str, float], *, cached: bool = True) -> dict[str, Cost]:
    """What a set's drawing cost by its manifest: `sample`, `decode` (latent models), `rejected` attempts; each amount once.

    Wall time and peaks stand under `sample` for all three. The GPU's energy is shared out by the seconds it was held.
    FLOPs are counted as the sampler computes: with its cache (`cached`) SPADE's modulations once an image.
    """
    whole, decode, rejected = (_seconds(made, part) for part in ("", "decode_", "rejected_"))
    spared = (made["num_function_evals"] - 1) * net["gflops_modulations"] if cached else 0.0
    gflops = made["num_function_evals"] * net["gflops_per_evaluation"] - spared
    flops = (gflops * 1e9, net["gflops_decode"] * 1e9)
    kept, thrown = made["num_attempts"] - made["num_rejected"], made["num_rejected"]
    evaluations, energy = made["num_function_evals"], made["energy_joules"]
    found = {
        "sample": dataclasses.replace(
            whole - decode - rejected,
            wall_seconds=made["seconds"],
            num_function_evals=evaluations * kept,
            flops=flops[0] * kept,
            peak_memory_mb=made["peak_memory_mb"],
            peak_gpu_memory_mb=made["peak_gpu_memory_mb"],
        ),
        "decode": dataclasses.replace(decode, flops=flops[1] * kept),
        "rejected": dataclasses.replace(rejected, num_function_evals=evaluations * thrown, flops=sum(flops) * thrown),
    }
    for cost in found.values():
        cost.energy_joules = None if energy is None else energy * cost.gpu_seconds / max(whole.gpu_seconds, 1e-9)
    return found if net["gflops_decode"] else {k: v for k, v in found.items() if k != "decode"}


def _seconds(manifest: dict[str, Any], part: str = "") -> Cost:
    return Cost(cpu_seconds=manifest[f"{part}cpu_seconds"], gpu_seconds=manifest[f"{part}gpu_seconds"])


def _fit_cost(fitted: Outcome, gflops: float) -> Cost:
    """Of a fit; its FLOPs as three evaluations an image (forward, and backward twice that)."""
    found = _seconds(fitted.manifest, "train_")
    return dataclasses.replace(
        found,
        wall_seconds=fitted.manifest["train_wall_seconds"],
        flops=3e9 * gflops * fitted.manifest["images_seen"],
        peak_memory_mb=fitted.manifest["peak_memory_mb"],
        peak_gpu_memory_mb=fitted.manifest["peak_gpu_memory_mb"],
        energy_joules=fitted.manifest["energy_joules"],
    )


def _is_autoencoder_of(outcome: Outcome, fitted: Outcome, key: str) -> bool:
    wanted = fitted.manifest.get("autoencoder")
    return key.startswith("fit autoencoder") and bool(wanted) and outcome.manifest.get("model_dir") == wanted


def write_study(config: CompareJob, rows: list[Any], result: GraphResult, fingerprint: str) -> dict[str, Any]:
    """Write the study's report (page, tables, figures, pictures), show it, log every row to MLflow; returns the manifest."""
    from raysyn.report import write_report
    from raysyn.report.write import publish
    from raysyn.tracking import log_study

    table = study_table(config, rows, result)
    storage = Storage.at(config.storage)
    kept = storage.join("compare", fingerprint, "report")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(kept.path) if kept.is_local else Path(scratch) / "report"
        info = {"study": fingerprint, "data": config.data.name, "image size": config.data.image_size}
        info |= how_measured(config, rows, table, result)
        write_report(
            folder,
            table,
            curves=curves_of(config, rows, result.results),
            trials=_trials(result),
            samples=_samples(config, rows, result),
            failures=result.failures,
            info=info,
        )
        main = [r for r in table if r["trained_on"] != "control"]
        (folder / "table.csv").write_text(table_csv(main))
        (folder / "controls.csv").write_text(table_csv([r for r in table if r["trained_on"] == "control"]))
        if not kept.is_local:
            publish(folder, kept.uri)
        show_report(storage, fingerprint)
        lost = log_study(
            config.tracking, storage.uri, table, fingerprint=fingerprint, params=to_dict(config), report_folder=folder
        )
    return {"rows": table, "failures": result.failures, "report": storage.join("report").uri, "not_logged": lost}


def show_report(storage: Storage, fingerprint: str) -> None:
    """Make `<storage>/report/` a copy of the report of this study, the page last; nothing to do where it is one.

    Studies of one storage have that folder in common: it shows the one that was asked for last.
    """
    kept, shown = storage.join("compare", fingerprint, "report"), storage.join("report")
    page = kept.read_bytes(PAGE) if kept.exists(PAGE) else b""
    if not page or (shown.exists(PAGE) and shown.read_bytes(PAGE) == page):
        return
    for name in sorted(kept.list(), key=lambda name: name == PAGE):
        shown.write_atomic(name, kept.read_bytes(name))


def how_measured(
    config: CompareJob, rows: list[Any], table: list[dict[str, Any]], result: GraphResult
) -> dict[str, str]:
    """What a reader must know to compare rows fairly, for the page's last section."""
    found = {"seconds": "were taken while other stages ran beside; evaluations and FLOPs do not depend on that"}
    if (tuned := result.results.get("tune segmentation")) is not None:
        first = next((r.key for r in rows if r.kind == "synthetic"), "the real set")
        best = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in _best(tuned).items())
        found["segmentation's set-up"] = (
            f"{best}: the best of {tuned.manifest['num_trials']} trials on {first}, by validation frames; every row "
            "and curve has it, and what they are trained on alone tells them apart"
        )
    if (n := config.num_task_seeds) > 1:
        found["trainings"] = f"a score is the mean of {n}; their sd is its _seed_sd, beside and not in the interval"
    counts = {(row["trained_on"], row.get("realism/num_frames")): None for row in table}
    if len({n for _, n in counts}) > 1:
        sizes = ", ".join(f"{source} {n}" for source, n in counts)
        found["Fréchet distances"] = f"fall with the number of frames, so compare equal ones ({sizes}) or the baselines"
    return found


def _best(tuned: Outcome) -> dict[str, Any]:
    threshold = tuned.manifest["best_min_faithfulness"]
    return tuned.manifest["best_task"] | ({"min_faithfulness": threshold} if threshold else {})


def _trials(result: GraphResult) -> list[dict[str, Any]]:
    """The search's trials, in its order."""
    tuned: Outcome | None = result.results.get("tune segmentation")
    return [] if tuned is None else tuned.manifest["trials"]


def _samples(config: CompareJob, rows: list[Any], result: GraphResult) -> Any:
    from raysyn.report.write import Samples

    prepared: Outcome | None = result.results.get("prepare")
    if prepared is None:
        return Samples()
    source = read_arrays(prepared.manifest["frames"], "train", limit=NUM_PICTURED)
    sets: dict[str, FrameArrays] = {}
    pairs = {}
    for row in rows:
        drawn: Outcome | None = result.results.get(f"set {row.key}")
        if drawn is not None:
            sets[row.key] = read_arrays(drawn.manifest["frames"], "train", limit=NUM_PICTURED)
        measured: Outcome | None = result.results.get(f"realism {row.key}")
        if measured is not None and row.kind == "synthetic" and measured.manifest["worst_pairs"]:
            pairs[row.key] = Storage.at(measured.path).read_bytes("worst_pairs.png")
    return Samples((config.data.name, source), sets, pairs)
