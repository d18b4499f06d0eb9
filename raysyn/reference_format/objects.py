"""What the format may name, and the functions of ours that build each from plain values."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Functions = dict[tuple[str, str], Callable[..., Any]]  # by module and name


@dataclass(frozen=True)
class Token:
    """A global that the file names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Record:
    """A module of the file: its class's name and, once built, its state."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """The file names or does something that is not part of the format."""


def _persistent(meta: Any) -> Record:
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str) or meta.get("type") != "class":
        raise Refused("a persistent object without class_name and state")
    state = meta.get("state")
    return Record(meta["class_name"], state if isinstance(state, dict) else {})


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8):
        raise Refused("a tensor of impossible shape")
    if not isinstance(storage, torch.Tensor) or not all(type(v) is int and v >= 0 for v in (*size, *stride, offset)):
        raise Refused("a tensor of impossible shape")
    if math.prod(size) > storage.numel():
        raise Refused("a tensor larger than its storage")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if math.prod(size) else 0
    if last >= max(storage.numel(), 1):
        raise Refused("a tensor that reaches beyond its storage")
    return torch.as_strided(storage, size, stride, offset)


def _parameter(data: Any, *rest: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise Refused("a parameter without a tensor")
    return data


@dataclass
class Dtype:
    """A numpy dtype, by its name."""

    kind: str


def _dtype(kind: Any, *rest: Any) -> Dtype:
    if kind not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        raise Refused(f"numpy dtype {kind[:20]!r}" if isinstance(kind, str) else "a numpy dtype that is no name")
    return Dtype(kind)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes) or len(data) != np.dtype(dtype.kind).itemsize:
        raise Refused("a numpy scalar of another kind")
    return np.frombuffer(data, dtype="<" + dtype.kind)[0].item()


def _container(pairs: Any = ()) -> OrderedDict:
    if not isinstance(pairs, (list, tuple)):
        raise Refused("an ordered dict of something else than pairs")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not is_key(pair[0]):
            raise Refused("an ordered dict of something else than pairs")
    return OrderedDict((k, v) for k, v in pairs)


def is_key(value: Any) -> bool:
    """What a dict may have for a key: a nested tuple could take forever to hash, large numbers could all hash alike."""
    return type(value) is str or (type(value) is int and abs(value) < 2**32)


def _text(text: Any, encoding: Any = "") -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Refused("_codecs.encode of something else than bytes")
    return text.encode("latin1")


def _names(items: Any = ()) -> set:
    if not isinstance(items, list) or not all(is_key(i) for i in items):
        raise Refused("a set of something else than names")
    return set(items)


CALLABLE: Functions = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("collections", "OrderedDict"): _container,
    ("dnnlib.util", "EasyDict"): _container,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("numpy", "dtype"): _dtype,
    # How older pickles write the (empty) set that each of torch's modules keeps, and protocol 2 that and bytes.
    **{(builtins, "set"): _names for builtins in ("builtins", "__builtin__")},
    ("_codecs", "encode"): _text,
}
STORAGES = {  # the types that torch.save names, and what a record of each holds
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    **{"LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8},
    **{"ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
MODULES = {
    ("torch.nn.modules.container", "ModuleDict"),
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.activation", "ReLU"),
}
