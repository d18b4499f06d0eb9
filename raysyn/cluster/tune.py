"""The tune stage: search a task's set-up with Ray Tune and Optuna, then refit the best with several seeds.

Ray Tune places and prunes trials; Optuna proposes them and keeps the study in a database. Killed and started again, the
search is restored by Ray Tune: finished trials stay, unfinished ones run again, and Optuna's study still knows all.
Each finished trial also leaves a record of its own, by its parameters, since Ray Tune's state is a little behind.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from raysyn.cluster.board import watch
from raysyn.cluster.session import ray_session
from raysyn.cluster.stage import StageDir, open_stage
from raysyn.cluster.stage_lock import alone
from raysyn.cluster.task_runs import load_sets, patients_of, set_fingerprint
from raysyn.cluster.tune_space import check_nets, check_search
from raysyn.config import JobConfig, PrepareJob, TuneJob, fingerprint
from raysyn.data.storage import Storage
from raysyn.types import SPLITS, Outcome, UserError


def tune(config: TuneJob) -> Outcome:
    """Search `config.task` over `config.search.space` on `config.train_sets`; the validation score decides.

    Manifest: `best_task` (the keys searched), `best_score`, `refits`, `trials`, and with two objectives the `pareto`
    front. Raises UserError, before Ray starts, for a space, a net or a set that cannot be; then for test patients in one.
    """
    from raysyn.cluster.inputs import prepare_fingerprint

    if config.plan_only:
        raise UserError("plan_only: a search has no plan; jobs/fit.py and jobs/synthesize.py have one")
    config = dataclasses.replace(config, storage=Storage.at(config.storage).uri)
    space = check_search(config)
    of_real = (
        SPLITS if not config.train_sets else ("validation", "test") if config.task.validate_on == "real" else ("test",)
    )
    frames = prepare_fingerprint(config, of_real)
    real = Storage.at(config.storage).join("prepare", frames).uri
    sets = [Storage.at(uri).uri for uri in config.train_sets] or [real]
    check_sets([uri for uri in sets if uri != real])
    trained = [frames if uri == real else set_fingerprint(uri) for uri in sets]
    key = fingerprint("tune 2", config.task, config.search, space, trained, frames)
    stage = open_stage(config.storage, "tune", key)
    if not config.overwrite and (done := stage.outcome()) is not None:
        return done
    check_nets(space, config)
    with alone(stage):
        if not config.overwrite and (done := stage.outcome()) is not None:
            return done
        return _tune_alone(config, stage, space, sets, real)


def _tune_alone(config: TuneJob, stage: StageDir, space: dict[str, Any], sets: list[str], real: str) -> Outcome:
    from raysyn.cluster.inputs import prepare
    from raysyn.cluster.tune_search import search

    with ray_session(config.ray, config.workers):
        shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(JobConfig)}
        prepare(PrepareJob(**{**shared, "overwrite": False, "plan_only": False}))
        for uri in sets:  # a leak is refused before any trial
            load_sets([uri], real, config.task)
        if config.overwrite:
            stage.clear()
        with watch(lambda: f"tune {config.task.kind}"):
            return stage.finish(search(config, stage, space, sets, real))


def check_sets(train_sets: list[str]) -> None:
    """Raise UserError for one of `train_sets` that is not there, is no frame set or has no training frames."""
    for uri in train_sets:
        try:
            if patients_of(uri, ("train",)):
                continue
        except UserError as error:
            raise UserError(f"train_sets: {error}") from None
        raise UserError(f"train_sets: {uri}: holds no train frames; give a set that has some")
