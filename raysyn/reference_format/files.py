"""Reading the reference's pickled networks without running anything that they name.

The file is walked by an unpickler of allowed opcodes. A global is never looked up: it becomes a token, and only the few
tokens of `objects` can be called, each by a function of ours that builds tensors and plain containers. Modules become
records of their state; the source text in the file is ignored. Work and memory are bounded by the file's length: a
pickle can name the same large object again and again at a byte or two each, which no writer of the format does.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import torch

from raysyn.reference_format.objects import CALLABLE, STORAGES, Refused, Token
from raysyn.reference_format.unpickler import Reader
from raysyn.types import UserError

PLAIN_NUMBER, PLAIN_VERSION = 0x1950A86A20F9469CFC6C, 1001  # how torch.save's plain format begins
PLAIN_START = pickle.dumps(PLAIN_NUMBER, 2)


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
        parts = [Reader(stream, 2 * len(data) + 1000, self).load() for _ in range(5)]
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
    return Reader(io.BytesIO(archive.pickle()), 2 * len(data) + 1000, archive).load()


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


# Inside of a torch.save a storage in bytes may not be named: each in the next would be held in memory again.
OF_A_FILE = {**CALLABLE, ("torch.storage", "_load_from_bytes"): _storage}


def read_pickle(data: bytes, name: str) -> Any:
    """The plain containers, tensors and records of a pickle, or of a torch.save of either format.

    Raises UserError for anything else, by name.
    """
    try:
        if data.startswith((b"PK", PLAIN_START)):
            return _saved(data)
        return Reader(io.BytesIO(data), 2 * len(data) + 1000, functions=OF_A_FILE).load()
    except Refused as error:
        raise UserError(f"{name}: refused: {error}; only the reference's checkpoint format is read") from None
    except RecursionError:
        raise UserError(f"{name}: refused: nested too deep; only the reference's checkpoint format is read") from None
    except Exception as error:  # whatever a damaged file provokes in pickle, numpy or torch is one clear line
        line = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{name}: cannot be read as a checkpoint ({type(error).__name__}: {line})") from None
