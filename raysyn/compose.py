"""From `configs/` and command-line overrides to one checked job config.

Order, later wins: dataclass defaults, the named preset (`configs/model/<name>.yaml`, `configs/task/<name>.yaml`), the
scale's presets for it (`presets` in `configs/scale/<scale>.yaml`), the command line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysyn.config import CompareJob, FitJob, ModelConfig, PrepareJob, SynthesizeJob, TuneJob
from raysyn.types import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
JOBS = {
    "prepare": PrepareJob,
    "fit": FitJob,
    "synthesize": SynthesizeJob,
    "tune": TuneJob,
    "compare": CompareJob,
}
VAE = "vae"  # vae=kl: the Gaussian control for the autoencoder of latent models
PRESET = "preset_name"  # where model=<name> waits beside model.<key>=<value>
GROUPS = ("data", "scale")  # chosen by name and composed by Hydra
MODEL_NAMES = ("sdm", "vp", "ve", "edm", "edm_l128", "edm_l64")

# What a job's machine may say where the command line does not: manifests set them for every pod.
ENVIRONMENT = {"storage": "RAYSYN_STORAGE", "tracking.uri": "MLFLOW_TRACKING_URI"}

T = TypeVar("T")


def environment_overrides(overrides: list[str]) -> list[str]:
    """Overrides from the variables of `ENVIRONMENT`, for keys that `overrides` leave out."""
    given = {text.partition("=")[0] for text in overrides}
    found = {key: os.environ.get(variable) for key, variable in ENVIRONMENT.items()}
    return [f"{key}={value}" for key, value in found.items() if value and key not in given]


def job_keys(job: str) -> list[str]:
    """The first parts of the keys that a job's command line takes."""
    names = [f.name for f in dataclasses.fields(JOBS[job])]
    if job == "compare":
        names.insert(names.index("models"), "model")
    return names + ([VAE] if "model" in names else [])


def preset_names(group: str) -> list[str]:
    """The names that a group of presets (`configs/<group>/`) is chosen by."""
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


def load_job(job: str, overrides: list[str]) -> Any:
    """The checked config of `job` ("fit", …). Raises UserError that names the key for anything wrong."""
    cls = JOBS[job]
    groups, values = _split_overrides(cls, overrides)
    raw = _compose(job, groups)
    names = job_keys(job)
    for key in values:
        if key not in names:
            raise UserError(f"{key}: not a key of jobs/{job}.py; its keys are {', '.join(sorted(names))}")
    kinds = values.pop(VAE, [])
    if isinstance(kinds, dict):
        key = next(iter(kinds))
        raise UserError(f"vae.{key}: of one model it is model.vae.{key}; a study of several has it from configs/model/")
    presets = raw.get("presets") or {}
    late = OmegaConf.create(values)
    plain = {k: v for k, v in OmegaConf.to_container(raw, resolve=True).items() if k in names}  # type: ignore[union-attr]
    if job == "compare":
        _resolve_compare(plain, late, presets)
        plain["models"] = [of_kind for model in plain["models"] for of_kind in _of_kinds(model, kinds)]
    if "model" in plain:
        plain["model"] = _named("model", plain["model"], late, presets)
        if kinds:
            (plain["model"],) = _of_kinds(plain["model"], _one_kind(plain["model"], kinds))
    if "task" in plain:
        plain["task"] = _named("task", plain["task"], late, presets)
    try:
        merged = OmegaConf.merge(OmegaConf.create(plain), late)
    except OmegaConfBaseException as error:  # a list where there is a dict
        raise UserError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}; see --config for the keys") from None
    return build(cls, merged)


def load_model(name: str, scale: str = "paper") -> ModelConfig:
    """The config of one of the six models at a scale, as the command line would give it."""
    config: ModelConfig = load_job("fit", [f"model={name}", f"scale={scale}"]).model
    return config


def build(cls: type[T], values: Any, prefix: str = "") -> T:
    """A dataclass from containers, types and ranges checked. Raises UserError with the full dotted key."""
    if OmegaConf.is_config(values):
        try:
            values = OmegaConf.to_container(values, resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {}
    for key, value in (values or {}).items():
        where = f"{prefix}{key}"
        if key not in known:
            raise UserError(
                f"{where}: unknown key; {prefix.rstrip('.') or cls.__name__} has {', '.join(sorted(known))}"
            )
        hint = hints[key]
        item = typing.get_args(hint)[0] if typing.get_origin(hint) is list else None
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            kwargs[key] = build(hint, value, f"{where}.")  # type: ignore[arg-type]
        elif item is not None and dataclasses.is_dataclass(item):
            if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
                raise UserError(f"{where}: {value!r} is not a list of its parts")
            kwargs[key] = [build(item, v, f"{where}[{i}].") for i, v in enumerate(value)]  # type: ignore[arg-type]
        else:
            kwargs[key] = _typed(cls, key, value, where)
    try:
        return cls(**kwargs)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def _typed(cls: type, key: str, value: Any, where: str) -> Any:
    hint = typing.get_type_hints(cls)[key]
    if typing.get_origin(hint) is list and not isinstance(value, list):
        raise UserError(f"{where}: {value!r} is no list; write {where}=[{value}]")
    if value == "???" and hint is not str:  # OmegaConf's own word for a value that is to come, let through unchecked
        raise UserError(f"{where}: {value!r} is no value; give one")
    holder = dataclasses.make_dataclass("Holder", [(key, hint, dataclasses.field(default="???"))])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(holder), {key: value})
        return OmegaConf.to_container(merged)[key]  # type: ignore[index,call-overload]
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None


def _is_text(cls: type, key: str) -> bool:
    """Whether the dotted `key` of a job's dataclass holds a string."""
    first, _, rest = key.partition(".")
    hint = typing.get_type_hints(cls).get(first)
    return _is_text(hint, rest) if rest and dataclasses.is_dataclass(hint) else hint is str and not rest  # type: ignore[arg-type]


def _quoted(text: str) -> str:
    """Text as YAML reads it back unchanged: in a path, # and : mean nothing. Quotes around all of it are the user's."""
    has_quotes = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text if has_quotes else json.dumps(text, ensure_ascii=False)


def _split_overrides(cls: type, overrides: list[str]) -> tuple[list[str], dict[str, Any]]:
    groups, values = [], []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r}: overrides have the form key=value, e.g. model=edm_l64 or data.image_size=128")
        if key in GROUPS:
            _known_preset(key, value)
            groups.append(text)
        elif key in ("model", "task") and any(o.startswith(f"{key}.") for o in overrides):
            values.append(f"{key}.{PRESET}={value}")  # the name and keys below it would replace each other
        else:
            values.append(f"{key}={_quoted(value) if _is_text(cls, key) else value}")
    try:
        container = OmegaConf.to_container(OmegaConf.from_dotlist(values))
    except Exception as error:  # whatever YAML and OmegaConf's grammar make of a user's text
        raise UserError(f"{' '.join(values)}: cannot be read as key=value ({str(error).splitlines()[0]})") from None
    return groups, container  # type: ignore[return-value]


def _compose(job: str, groups: list[str]) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base=None, config_dir=str(CONFIGS)):
        return compose(config_name=job, overrides=groups)


def _known_preset(group: str, name: str) -> Path:
    names = preset_names(group)
    if name not in names:
        raise UserError(f"{group}: {name!r} is not one of {', '.join(names)}")
    return CONFIGS / group / f"{name}.yaml"


def _named(group: str, name: Any, late: DictConfig, presets: Any) -> dict[str, Any]:
    value = late.get(group)
    if OmegaConf.is_dict(value):
        name = value.pop(PRESET, name)
    elif value is not None:
        name = late.pop(group)
    return _preset(group, str(name), presets)


def _preset(group: str, name: str, presets: Any) -> dict[str, Any]:
    node: Any = OmegaConf.load(_known_preset(group, name))
    of_group = (presets or {}).get(f"{group}s") or {}
    keys = ("all", node.get("space", ""), name) if group == "model" else ("all", name)
    for key in keys:
        if of_group.get(key) is not None:
            node = OmegaConf.merge(node, of_group[key])
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def _one_kind(model: dict[str, Any], kinds: Any) -> Any:
    if not isinstance(kinds, str) or model["space"] != "latent":
        why = "takes one kind here" if not isinstance(kinds, str) else f"{model['name']} works on pixels and has none"
        raise UserError(f"vae: {why}; gamma or kl, for a latent model")
    return kinds


def _of_kinds(model: dict[str, Any], kinds: Any) -> list[dict[str, Any]]:
    """A latent model once for each kind of autoencoder asked for (`vae=kl`, `vae=[gamma,kl]`), a pixel model once."""
    chosen = [kinds] if isinstance(kinds, str) else list(kinds)
    if not chosen or model["space"] != "latent":
        return [model]
    return [{**model, "vae": {**model.get("vae", {}), "kind": str(kind)}} for kind in chosen]


def _resolve_compare(plain: dict[str, Any], late: DictConfig, presets: Any) -> None:
    chosen: Any = plain.pop("model", [])
    if "model" in late:
        chosen = OmegaConf.to_container(late)["model"]  # type: ignore[index,call-overload]
        late.pop("model")
    if isinstance(chosen, dict):
        raise UserError("model: compare takes names, e.g. model=all or model=[edm,edm_l128]")
    if chosen == "all" and "storage" not in late:  # the six beside, not over, the scale's own pair
        plain["storage"] = f"{plain['storage']}_all"
    if not isinstance(chosen, str | list):
        raise UserError(f"model: {chosen!r} is no name; it takes all, a name or a list of names")
    names = list(MODEL_NAMES) if chosen == "all" else [chosen] if isinstance(chosen, str) else chosen
    plain["models"] = [_preset("model", str(n), presets) for n in names]
    for task in ("segmentation", "classification"):
        plain[task] = _preset("task", task, presets)
