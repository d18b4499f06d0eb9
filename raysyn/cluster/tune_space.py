"""The space of a search: its keys and values checked, handed to Optuna, applied to a task."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, get_type_hints

from raysyn.compose import build
from raysyn.config import TaskConfig, TuneJob, to_dict
from raysyn.types import UserError

DEFAULT_SPACE: dict[str, Any] = {
    "lr": {"low": 1e-5, "high": 1e-2, "log": True},
    "weight_decay": {"low": 1e-4, "high": 1e-1, "log": True},
    "augment_strength": {"low": 0.0, "high": 2.0},
    "loss": {"choices": ["cross_entropy", "dice_cross_entropy"]},
}
TRAIN_SET = "train_set"  # which of train_sets
MIN_FAITHFULNESS = "min_faithfulness"  # synthetic frames that read worse are left out
NOT_OF_TASK = (TRAIN_SET, MIN_FAITHFULNESS)  # keys of a space that are the data's, not the task's
VALIDATIONS_BY_STEPS = 10  # where a task counts steps it validates five times, and rounding may add some


def check_search(config: TuneJob) -> dict[str, Any]:
    """The search's space, checked. Raises UserError for it, or for a study that cannot be opened, before any work."""
    if config.search.optuna_url:
        from raysyn.cluster.durable_search import study_storage

        study_storage(config.search.optuna_url)
    return check_space(config.search.space or DEFAULT_SPACE, config)


def check_space(space: dict[str, Any], config: TuneJob) -> dict[str, Any]:
    """The space, checked: each key a TaskConfig's, train_set or min_faithfulness, each value {low, high, log?} or {choices}.

    A range's ends come back in the key's own type, so that 0 to 1 of a real number is no choice of two; `choices` beside
    a range (say, of the scale's own space) take its place, and null takes a key out.
    """
    known = {f.name for f in dataclasses.fields(TaskConfig)} - {"kind"} | set(NOT_OF_TASK)
    checked: dict[str, Any] = {}
    for key, domain in space.items():
        if key not in known:
            raise UserError(f"search.space.{key}: not a key of the task; its keys are {', '.join(sorted(known))}")
        if domain is None:
            continue
        if key == "validate_on":
            raise UserError(f"search.space.{key}: trials scored on different frames do not compare; set task.{key}")
        _check_domain(key, domain)
        values = domain.get("choices") or [domain["low"], domain["high"]]
        for value in values:
            _check_value(key, value, config)
        checked[key] = domain
        if not domain.get("choices"):
            low, high = _checked_range(key, *values, log=bool(domain.get("log")))
            checked[key] = {**domain, "low": low, "high": high}
    if not checked:
        raise UserError("search.space: names nothing to search")
    return checked


def _check_domain(key: str, domain: Any) -> None:
    form = f"search.space.{key}: give {{low, high, log}} or {{choices: [...]}}, got {domain!r}"
    if not isinstance(domain, dict) or not ({"low", "high"} <= set(domain) or domain.get("choices")):
        raise UserError(form)
    if set(domain) - {"low", "high", "log", "choices"} or not isinstance(domain.get("log", False), bool):
        raise UserError(form)
    if not isinstance(domain.get("choices", []), list):
        raise UserError(form)


def check_nets(space: dict[str, Any], config: TuneJob) -> None:
    """Raise UserError for a net of the space that cannot be built or takes no images of this size, before any trial."""
    from raysyn.tasks.nets import check_net

    keys = [key for key in ("arch", "weights") if key in space]
    for values in itertools.product(*(space[key]["choices"] for key in keys)):
        check_net(dataclasses.replace(config.task, **dict(zip(keys, values))), config.data.image_size)


def _check_value(key: str, value: Any, config: TuneJob) -> None:
    if key not in NOT_OF_TASK:
        build(TaskConfig, {**to_dict(config.task), key: value}, "search.space.")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"search.space.{key}: {value!r} is not a number")
    if key == MIN_FAITHFULNESS and not 0 <= value <= 1:
        raise UserError(f"search.space.min_faithfulness: {value} is outside [0, 1]")
    if key == TRAIN_SET and value not in range(max(1, len(config.train_sets))):
        raise UserError(f"search.space.train_set: {value} is no index of the {len(config.train_sets)} train_sets")


def _checked_range(key: str, low: Any, high: Any, *, log: bool) -> tuple[Any, Any]:
    kind = {TRAIN_SET: int, MIN_FAITHFULNESS: float}.get(key) or get_type_hints(TaskConfig)[key]
    if kind not in (int, float) or not all(isinstance(v, (int, float)) for v in (low, high)):
        raise UserError(f"search.space.{key}: {low!r} to {high!r} is no range of it; give choices")
    if low > high:
        raise UserError(f"search.space.{key}: low {low} is above high {high}")
    if log and low <= 0:
        raise UserError(f"search.space.{key}: a logarithmic range begins above 0, not at {low}")
    return kind(low), kind(high)


def suggest(space: dict[str, Any], trial: Any) -> None:
    """The space as Optuna's define-by-run function (Ray Tune pickles it); integers stay integers."""
    for key, domain in space.items():
        if domain.get("choices"):
            trial.suggest_categorical(key, domain["choices"])
        elif isinstance(domain["low"], int) and isinstance(domain["high"], int):
            trial.suggest_int(key, domain["low"], domain["high"], log=bool(domain.get("log")))
        else:
            trial.suggest_float(key, float(domain["low"]), float(domain["high"]), log=bool(domain.get("log")))


def trial_task(task: TaskConfig, params: dict[str, Any]) -> TaskConfig:
    """The set-up of one trial."""
    return dataclasses.replace(task, **{k: v for k, v in params.items() if k not in NOT_OF_TASK})


def max_iterations(task: TaskConfig, space: dict[str, Any]) -> int:
    """The most validations that a trial of the space can come to; ASHA ends a trial at its `max_t`."""

    def largest(key: str) -> int:
        domain = space.get(key, {})
        return max([int(v) for v in domain.get("choices") or [domain.get("high", 0)]] + [int(getattr(task, key))])

    every = max(1, min([int(v) for v in space.get("validate_every_epochs", {}).get("choices") or []] or [1]))
    return max(VALIDATIONS_BY_STEPS, -(-largest("num_epochs") // every))
