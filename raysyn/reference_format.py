"""Reading the reference's pickled networks without running anything that they name.

The file is walked by an unpickler of allowed opcodes. A global is never looked up: it becomes a token, and only the few
tokens below can be called, each by a function of ours that builds tensors and plain containers. Modules become records
of their state; the source text in the file is ignored. Work and memory are bounded by the file's length: a pickle can name
the same large object again and again at a byte or two each, which no writer of the format does.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from raysyn.types import UserError

MAX_ARGUMENTS = 8
PLAIN_NUMBER, PLAIN_VERSION = 0x1950A86A20F9469CFC6C, 1001  # how torch.save's plain format begins
PLAIN_START = pickle.dumps(PLAIN_NUMBER, 2)


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
    """Bytes of a torch.save of one storage, as `torch.storage._load_from_bytes` takes them → the flat tensor of it."""
    if not isinstance(data, bytes):
        raise Refused("a storage that is not bytes")
    try:
        content = _saved(data)
    except (Refused, RecursionError):
        raise
    except Exception as error:  # whatever damaged bytes provoke in pickle
        raise Refused("a storage whose bytes hold something else") from error
    if not isinstance(content, torch.Tensor) or content.dim() != 1:
        raise Refused("a storage whose bytes hold something else")
    return content


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
class _Dtype:
    kind: str


def _dtype(kind: Any, *rest: Any) -> _Dtype:
    if kind not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        raise Refused(f"numpy dtype {kind[:20]!r}" if isinstance(kind, str) else "a numpy dtype that is no name")
    return _Dtype(kind)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != np.dtype(dtype.kind).itemsize:
        raise Refused("a numpy scalar of another kind")
    return np.frombuffer(data, dtype="<" + dtype.kind)[0].item()


def _container(pairs: Any = ()) -> OrderedDict:
    if not isinstance(pairs, (list, tuple)):
        raise Refused("an ordered dict of something else than pairs")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not _is_key(pair[0]):
            raise Refused("an ordered dict of something else than pairs")
    return OrderedDict((k, v) for k, v in pairs)


def _is_key(value: Any) -> bool:
    """What a dict may have for a key: a nested tuple could take forever to hash, large numbers could all hash alike."""
    return type(value) is str or (type(value) is int and abs(value) < 2**32)


def _text(text: Any, encoding: Any = "") -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Refused("_codecs.encode of something else than bytes")
    return text.encode("latin1")


def _names(items: Any = ()) -> set:
    if not isinstance(items, list) or not all(_is_key(i) for i in items):
        raise Refused("a set of something else than names")
    return set(items)


CALLABLE: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("collections", "OrderedDict"): _container,
    ("dnnlib.util", "EasyDict"): _container,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
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
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
}


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]  # the one in Python, whose opcodes can be replaced
    dispatch: ClassVar[dict[int, Any]] = {}
    stack: Any
    append: Any
    pop_mark: Any

    def __init__(self, data: io.BytesIO, allowance: int, archive: _Archive | _Plain | None = None) -> None:
        super().__init__(data)
        self.allowance, self.archive = allowance, archive

    def _spend(self, amount: int) -> None:
        self.allowance -= amount
        if self.allowance < 0:
            raise Refused("it uses the same data again and again")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        if self.archive is None:
            raise Refused("it names data outside the pickle")
        return self.archive.storage(pid)

    def find_class(self, module: str, name: str) -> Token:
        known = (module, name) in CALLABLE or (module, name) in MODULES
        if not known and not (self.archive is not None and module == "torch" and name in STORAGES):
            raise Refused(f"it names {str(module)[:80]}.{str(name)[:80]}")
        if self.archive is not None and name == "_load_from_bytes":  # each in the next would be held in memory again
            raise Refused(f"it names {module}.{name} inside of a torch.save")
        return Token(module, name)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, Token) or not isinstance(args, tuple):
            raise Refused("a call of something that is no function of the format")
        if (function.module, function.name) not in CALLABLE:
            raise Refused(f"a call of {function}")
        if len(args) > MAX_ARGUMENTS:
            raise Refused(f"{function} with other arguments than the format's")
        self._spend(1 + sum(len(a) for a in args if isinstance(a, (bytes, str, list, tuple, dict))))
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
        elif isinstance(state, tuple) and state[1:2] not in (("<",), ("|",), ("=",)):
            raise Refused("a numpy dtype of another byte order")

    def _set(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise Refused("items for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _is_key(key):
                raise Refused("a dict key that is no text and no small number")
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
        if type(self.stack[-1]) is not set or not all(_is_key(i) for i in items):
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


def _named(pid: Any, parts: int) -> tuple[torch.dtype, str, int]:
    """(dtype, key, count) of what torch.save names: ('storage', type, key, device, count[, None])."""
    fits = isinstance(pid, tuple) and len(pid) == parts and isinstance(pid[1], Token) and isinstance(pid[2], str)
    if not fits or pid[0] != "storage" or type(pid[4]) is not int or pid[4] < 0 or any(v is not None for v in pid[5:]):
        raise Refused("a storage in no form of torch's")
    if pid[1].name not in STORAGES:
        raise Refused(f"a storage of type {pid[1]}")
    return STORAGES[pid[1].name], pid[2], pid[4]


class _Plain:
    """torch.save's plain format, read here: torch's own reader would allocate whatever the bytes say.

    Five pickles (a number, the version, the system, the content, the storages' keys), then each one's count and bytes.
    """

    def __init__(self, data: bytes) -> None:
        self.left, self.known = len(data), OrderedDict[str, torch.Tensor]()
        stream = io.BytesIO(data)
        parts = [_Reader(stream, 2 * len(data) + 1000, self).load() for _ in range(5)]
        number, version, system, self.content, keys = parts
        little = isinstance(system, dict) and system.get("little_endian") is True
        if (number, version, little) != (PLAIN_NUMBER, PLAIN_VERSION, True) or not isinstance(keys, list):
            raise Refused("a torch.save that holds something else")
        if not all(type(key) is str for key in keys) or sorted(keys) != sorted(self.known):
            raise Refused("a torch.save without the storages that it names")
        for key in keys:
            storage = self.known[key]
            fits = int.from_bytes(stream.read(8), "little") == storage.numel()
            if not fits or stream.readinto(storage.view(torch.uint8).numpy()) != storage.nbytes:
                raise Refused("a storage of another size than its bytes")
        if stream.read(1):
            raise Refused("a storage of another size than its bytes")

    def storage(self, pid: Any) -> torch.Tensor:
        """The flat tensor of a pid, filled once the pickles are read; all of them are no larger than the file."""
        dtype, key, count = _named(pid, 6)
        if key not in self.known:
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise Refused("a storage of another size than its bytes")
            self.known[key] = torch.empty(count, dtype=dtype)
        return self.known[key]


class _Archive:
    """torch.save's archive: a pickle that names storages, and a record for each. Nothing in it may be compressed."""

    def __init__(self, data: bytes) -> None:
        self.zip = zipfile.ZipFile(io.BytesIO(data))
        entries = self.zip.infolist()
        if sum(e.file_size for e in entries) > len(data) or any(e.compress_type for e in entries):
            raise Refused("an archive that unpacks to more than its size")
        found = [e.filename for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise Refused("an archive without data.pkl")
        self.root = found[0].removesuffix("data.pkl")
        self.known: dict[str, torch.Tensor] = {}

    def pickle(self) -> bytes:
        return self.zip.read(f"{self.root}data.pkl")

    def storage(self, pid: Any) -> torch.Tensor:
        """The flat tensor that ('storage', type, key, device, length) names."""
        dtype, key, _ = _named(pid, 5)
        if key not in self.known:
            raw = bytearray(self.zip.read(f"{self.root}data/{key}"))
            self.known[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.known[key]


def _saved(data: bytes) -> Any:
    """What a torch.save of either format holds."""
    if not data.startswith(b"PK"):
        return _Plain(data).content
    archive = _Archive(data)
    return _Reader(io.BytesIO(archive.pickle()), 2 * len(data) + 1000, archive).load()


def read_pickle(data: bytes, name: str) -> Any:
    """The plain containers, tensors and records of a pickle, or of a torch.save of either format.

    Raises UserError for anything else, by name.
    """
    try:
        if data.startswith((b"PK", PLAIN_START)):
            return _saved(data)
        return _Reader(io.BytesIO(data), 2 * len(data) + 1000).load()
    except Refused as error:
        raise UserError(f"{name}: refused: {error}; only the reference's checkpoint format is read") from None
    except RecursionError:
        raise UserError(f"{name}: refused: nested too deep; only the reference's checkpoint format is read") from None
    except Exception as error:  # whatever a damaged file provokes in pickle, numpy or torch is one clear line
        line = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{name}: cannot be read as a checkpoint ({type(error).__name__}: {line})") from None
