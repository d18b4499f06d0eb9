"""Reading the reference's pickled networks without running anything that they name.

The file is walked by an unpickler of allowed opcodes. A global is never looked up: it becomes a token, and only the few
tokens below can be called, each by a function of ours that builds tensors and plain containers. Modules become records
of their state; the source text in the file is ignored.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from raysyn.types import UserError

MAX_DEPTH, MAX_NODES = 64, 200_000


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


def _storage(data: Any) -> torch.Tensor:
    """Bytes of a torch.save of one storage → the flat tensor of it."""
    if not isinstance(data, bytes) or data[:2] == b"PK":
        raise Refused("a storage that is not bytes in torch's plain format")
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.UntypedStorage):
        return torch.frombuffer(bytearray(bytes(loaded)), dtype=torch.uint8)
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise Refused("a storage whose bytes hold something else")
    raw = loaded._untyped_storage
    return torch.tensor([], dtype=loaded.dtype).set_(raw, 0, (raw.nbytes() // loaded.dtype.itemsize,))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    sizes = (*size, *stride, offset) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, torch.Tensor) or not all(type(v) is int and v >= 0 for v in sizes):
        raise Refused("a tensor of impossible shape")
    if len(size) != len(stride) or len(size) > 8 or math.prod(size) > storage.numel():
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
class _Dtype:
    kind: str


def _dtype(kind: Any, *rest: Any) -> _Dtype:
    if kind not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        raise Refused(f"numpy dtype {kind!r}")
    return _Dtype(kind)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != np.dtype(dtype.kind).itemsize:
        raise Refused("a numpy scalar of another kind")
    return np.frombuffer(data, dtype="<" + dtype.kind)[0].item()


def _container(pairs: Any = ()) -> OrderedDict:
    if not isinstance(pairs, (list, tuple)):
        raise Refused("an ordered dict of something else than pairs")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or type(pair[0]) not in (str, int):
            raise Refused("an ordered dict of something else than pairs")
    return OrderedDict((k, v) for k, v in pairs)


CALLABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("collections", "OrderedDict"): _container,
    ("dnnlib.util", "EasyDict"): _container,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("numpy", "dtype"): _dtype,
}
MODULES = {
    ("torch.nn.modules.container", "ModuleDict"),
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.activation", "ReLU"),
}
ALLOWED_OPCODES = {
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.BINBYTES8, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.EMPTY_SET, pickle.ADDITEMS),  # torch's modules keep an (empty) set of names
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD),
}


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]  # the one in Python, whose opcodes can be replaced
    dispatch: ClassVar[dict[int, Any]] = {}
    stack: Any
    append: Any
    pop_mark: Any

    def find_class(self, module: str, name: str) -> Token:
        if (module, name) not in CALLABLE and (module, name) not in MODULES:
            raise Refused(f"it names {str(module)[:80]}.{str(name)[:80]}")
        return Token(module, name)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, Token) or not isinstance(args, tuple):
            raise Refused("a call of something that is no function of the format")
        if (function.module, function.name) not in CALLABLE:
            raise Refused(f"a call of {function}")
        try:
            self.stack[-1] = CALLABLE[function.module, function.name](*args)
        except TypeError as error:
            raise Refused(f"{function} with other arguments than the format's") from error

    def load_newobj(self) -> None:
        args = self.stack.pop()
        cls = self.stack[-1]
        if not isinstance(cls, Token) or args != ():
            raise Refused("an object of something that is no class of the format")
        if (cls.module, cls.name) in MODULES:
            self.stack[-1] = Record(cls.name)
        elif cls.name in ("OrderedDict", "EasyDict"):
            self.stack[-1] = OrderedDict()
        else:
            raise Refused(f"an object of {cls}")

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record) and isinstance(state, dict):
            target.state = state
        elif isinstance(target, OrderedDict) and (state is None or isinstance(state, dict)):
            pass  # attributes of a dict: EasyDict has none of interest
        elif not isinstance(target, _Dtype):
            raise Refused("a state for something that takes none")

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise Refused("items for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # a nested tuple as a key could take forever to hash
                raise Refused("a dict key that is no text and no number")
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        target: dict[Any, Any] = {}
        self._set(target, items)
        self.append(target)

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("elements for something that is no list")
        self.stack[-1].extend(items)

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set or not all(type(i) in (str, int) for i in items):
            raise Refused("a set of something else than names")
        self.stack[-1].update(items)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(items)


def _refuse(reader: Any) -> None:
    raise Refused("it uses a pickle instruction that the format does not have")


_OWN = {
    pickle.REDUCE: _Reader.load_reduce,
    pickle.NEWOBJ: _Reader.load_newobj,
    pickle.BUILD: _Reader.load_build,
    pickle.SETITEM: _Reader.load_setitem,
    pickle.SETITEMS: _Reader.load_setitems,
    pickle.DICT: _Reader.load_dict,
    pickle.APPEND: _Reader.load_append,
    pickle.APPENDS: _Reader.load_appends,
    pickle.ADDITEMS: _Reader.load_additems,
}
_Reader.dispatch = {
    code: (base if bytes([code]) in ALLOWED_OPCODES else _refuse)
    for code, base in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
} | {op[0]: method for op, method in _OWN.items()}


def read_pickle(data: bytes, name: str) -> Any:
    """The plain containers, tensors and records of a pickle. Raises UserError for anything else, by name."""
    try:
        return _Reader(io.BytesIO(data)).load()
    except Refused as error:
        raise UserError(f"{name}: refused: {error}; only the reference's checkpoint format is read") from None
    except RecursionError:
        raise UserError(f"{name}: refused: nested too deep; only the reference's checkpoint format is read") from None
    except Exception as error:  # whatever a damaged file provokes in pickle, numpy or torch is one clear line
        line = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{name}: cannot be read as a checkpoint ({type(error).__name__}: {line})") from None


def flatten(record: Record, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Record]]:
    """(tensors by dotted name, modules by dotted name) of a module record. Raises UserError when it is no tree."""
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, Record] = {}

    def walk(node: Record, prefix: str, depth: int) -> None:
        if depth > MAX_DEPTH or len(modules) > MAX_NODES:
            raise UserError(f"{name}: refused: its modules are nested without end")
        modules[prefix.rstrip(".")] = node
        for kind in ("_parameters", "_buffers"):
            for key, value in _items(node.state.get(kind)):
                if isinstance(value, torch.Tensor):
                    tensors[f"{prefix}{key}"] = value
        for key, value in _items(node.state.get("_modules")):
            if isinstance(value, Record):
                walk(value, f"{prefix}{key}.", depth + 1)

    walk(record, "", 0)
    return tensors, modules


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []
