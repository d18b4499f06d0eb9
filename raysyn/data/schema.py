"""The one Parquet schema of all frames, with Hugging Face feature metadata, and what is checked of a foreign file."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raysyn.types import PHASES, SOURCES, SPLITS, VIEWS, UserError

SCHEMA_VERSION = "1"
VERSION_KEY = b"raysyn_schema_version"

STRING, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS: dict[str, pa.DataType] = {
    "frame_id": STRING,
    "image": _IMAGE,
    "label_map": _IMAGE,
    "view": STRING,
    "phase": STRING,
    "patient_id": STRING,
    "split": STRING,
    "spacing_mm": pa.list_(_FLOAT),
    "source": STRING,
    "model": STRING,
    "checkpoint_sha256": STRING,
    "mask_frame_id": STRING,
    "warp_seed": _INT,
    "noise_seed": _INT,
    "solver": STRING,
    "num_steps": _INT,
    "num_function_evals": _INT,
    "faithfulness": _FLOAT,
    "gpu_seconds": _FLOAT,
    "cpu_seconds": _FLOAT,
}
ALLOWED = {"view": VIEWS, "phase": PHASES, "split": SPLITS, "source": SOURCES}
_NEVER_NULL = ("frame_id", "image", "label_map", "view", "phase", "patient_id", "split", "source")
LIGHT_COLUMNS = tuple(c for c in COLUMNS if c not in ("image", "label_map"))


def _hugging_face_features() -> dict[str, Any]:
    def feature(kind: pa.DataType) -> dict[str, Any]:
        if kind == _IMAGE:
            return {"_type": "Image"}
        if pa.types.is_list(kind):
            return {"_type": "Sequence", "feature": feature(kind.value_type)}
        return {"_type": "Value", "dtype": {STRING: "string", _INT: "int64", _FLOAT: "float64"}[kind]}

    return {"info": {"features": {name: feature(kind) for name, kind in COLUMNS.items()}}}


SCHEMA = pa.schema(
    [pa.field(name, kind) for name, kind in COLUMNS.items()],
    metadata={b"huggingface": json.dumps(_hugging_face_features()).encode(), VERSION_KEY: SCHEMA_VERSION.encode()},
)


def check_schema(found: pa.Schema, name: str) -> None:
    """Raise UserError unless a file's schema is that of frames, in this version; other writers' types may be wider."""
    missing = [c for c in COLUMNS if c not in found.names]
    if missing:
        raise UserError(f"{name}: column {missing[0]} is missing; frames need {', '.join(COLUMNS)}")
    version = (found.metadata or {}).get(VERSION_KEY, SCHEMA_VERSION.encode()).decode()
    if version != SCHEMA_VERSION:
        raise UserError(f"{name}: frame schema version {version}, this is version {SCHEMA_VERSION}; prepare it again")
    for key, kind in COLUMNS.items():
        type_ = found.field(key).type
        if not (type_.equals(kind) or _same_kind(type_, kind)):
            raise UserError(f"{name}: column {key} is {type_}, frames need {kind}")


def _same_kind(found: pa.DataType, kind: pa.DataType) -> bool:
    """Whether another writer's type (large strings, float32, lists of fixed size, all null) reads as ours."""
    if pa.types.is_null(found):
        return True
    if kind == STRING:
        return bool(pa.types.is_large_string(found) or pa.types.is_string_view(found) or pa.types.is_dictionary(found))
    if kind == _INT:
        return bool(pa.types.is_integer(found))
    if kind == _FLOAT:
        return bool(pa.types.is_floating(found))
    if kind == _IMAGE:
        return bool(pa.types.is_struct(found) and found.get_field_index("bytes") >= 0)
    return bool(pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found))


def check_table(table: pa.Table, name: str) -> None:
    """Raise UserError unless the columns present hold what the schema says: no nulls, known views, phases, splits."""
    for key in (k for k in _NEVER_NULL if k in table.column_names):
        if table[key].null_count:
            raise UserError(f"{name}: column {key} has {table[key].null_count} empty values; every frame needs one")
    for key in (k for k in ALLOWED if k in table.column_names):
        unknown = sorted(set(pc.unique(table[key]).to_pylist()) - set(ALLOWED[key]))
        if unknown:
            raise UserError(f"{name}: column {key} holds {unknown[0]!r}, which is not one of {', '.join(ALLOWED[key])}")
    if "spacing_mm" in table.column_names and not pa.types.is_null(table["spacing_mm"].type):
        lengths = set(pc.unique(pc.list_value_length(table["spacing_mm"])).to_pylist()) - {None, 2}
        if lengths:
            raise UserError(f"{name}: column spacing_mm must hold (row, column), got {sorted(lengths)[0]} values")
