"""Where results lie: a folder, or a prefix in an object store (s3://…), behind one small interface over `pyarrow.fs`.

Files are whole or absent: a local file is written under a temporary name, synced and renamed; an object is one put, or
above 10 MiB, where pyarrow sends parts, one copy of what was sent under a temporary name.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import secrets
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raysyn.data.local_files import TEMPORARY, write_whole
from raysyn.data.object_store import open_s3, retried, unchanged
from raysyn.data.storage_faults import check_path, check_place, clear_errors
from raysyn.types import UserError

Names = list[str]  # inside the class `list` is the method
ONE_PUT = 10 << 20  # what pyarrow sends in one request


@dataclass(frozen=True)
class Storage:
    """A place for files. Pickles as its URI, so it travels to any worker; the file system is opened where it is used.

    `uri` is an absolute local path or `s3://bucket/prefix[?endpoint_override=host:port&scheme=http&region=…]`. Without
    `endpoint_override`, AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL count; credentials come the way AWS tools take them.
    """

    uri: str

    @staticmethod
    def at(uri: str | Path | Storage) -> Storage:
        """The storage at a local path (made absolute; `~` and file:// are understood) or an s3:// URI."""
        if isinstance(uri, Storage):
            return uri
        text = str(uri)
        if not text:
            raise UserError("storage: is empty; give a folder or s3://bucket/prefix")
        check_path(text)
        scheme, separator, rest = text.partition("://")
        if not separator:
            return Storage(os.path.abspath(os.path.expanduser(text)))
        if scheme == "file":
            return Storage(os.path.abspath(urllib.parse.unquote("/" + rest.lstrip("/"))))
        if scheme != "s3":
            raise UserError(f"storage: {text!r}: {scheme}:// is not supported; give a folder or s3://bucket/prefix")
        base, question, query = text.partition("?")
        if not base.removeprefix("s3://").strip("/"):
            raise UserError(f"storage: {text!r} names no bucket; the form is s3://bucket/prefix")
        return Storage(base.rstrip("/") + question + query)

    @property
    def is_local(self) -> bool:
        """True for a folder, False for an object store."""
        return not self.uri.startswith("s3://")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def path(self) -> str:
        """The path as `fs` takes it: an absolute path, or bucket/prefix."""
        return self.uri if self.is_local else self.uri.removeprefix("s3://").partition("?")[0]

    @property
    def fs(self) -> Any:
        """The `pyarrow.fs.FileSystem`, opened once a process; object stores retry 5xx and lost connections."""
        return _local_filesystem() if self.is_local else open_s3(self.uri.partition("?")[2])

    @property
    def parent(self) -> Storage:
        """The storage above this one; the query of a URI stays."""
        base, question, query = (self.uri, "", "") if self.is_local else self.uri.partition("?")
        return Storage(base.rpartition("/")[0] + question + query)

    def join(self, *parts: str) -> Storage:
        """The storage below this one; the query of a URI stays at its end."""
        base, question, query = (self.uri, "", "") if self.is_local else self.uri.partition("?")
        return Storage("/".join([base.rstrip("/"), *(p.strip("/") for p in parts if p)]) + question + query)

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def locate(self, name: str) -> str:
        """Path or URI of a file here, as messages show it."""
        return self._at(name) if self.is_local else f"s3://{self._at(name)}"

    def check_writable(self) -> None:
        """Raise UserError, before work whose result would be lost, where a folder cannot be made or written to.

        Of an object store that is only known from the first put.
        """
        if self.is_local:
            check_place(Path(self.path))

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder is there; a file under a temporary name never counts."""
        with clear_errors("reading", self.locate(name)):
            return bool(self.fs.get_file_info(self._at(name)).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        with clear_errors("reading", self.locate(name)):
            info = self.fs.get_file_info(self._at(name))
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, "no such file", self.locate(name))
        return int(info.size)

    def list(self, prefix: str = "", suffix: str = "") -> Names:
        """Names of all files in the folder `prefix` and below, relative to this storage, sorted; [] if it is not there.

        Files still being written (temporary names) are left out; `suffix` keeps names that end so.
        """
        return list(self.sizes(prefix, suffix))

    def sizes(self, prefix: str = "", suffix: str = "") -> dict[str, int]:
        """Bytes of the files that `list` names, by name."""
        return {n: s for n, s in self._list(prefix).items() if n.endswith(suffix) and not _is_temporary(n)}

    def _list(self, prefix: str) -> dict[str, int]:
        selector = pafs.FileSelector(self._at(prefix.strip("/")), recursive=True, allow_not_found=True)
        with clear_errors("reading", self.locate(prefix)):
            found = self.fs.get_file_info(selector)
        start = len(self.path.rstrip("/")) + 1
        return dict(sorted((info.path[start:], int(info.size)) for info in found if info.type == pafs.FileType.File))

    def open_input(self, name: str) -> Any:
        """A `pyarrow.NativeFile` with random access, for Parquet. Raises FileNotFoundError, UserError (permission).

        An object is fetched whole, in one request that can be repeated; shards are small.
        """
        if not self.is_local:
            return pa.BufferReader(self.read_bytes(name))
        with clear_errors("reading", self.locate(name)):
            return self.fs.open_input_file(self._at(name))

    def read_bytes(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError, UserError (permission, no such bucket)."""

        def read() -> bytes:
            with self.fs.open_input_file(self._at(name)) as file:
                return bytes(file.read())

        with clear_errors("reading", self.locate(name)):
            return read() if self.is_local else retried(lambda: unchanged(read, lambda: self.size(name)))

    def write_atomic(self, name: str, data: bytes) -> None:
        """Write a file so that readers see all of it or none, and the same name may be written again.

        Raises UserError when there is no space left or no permission; nothing of the file is left then.
        """
        with clear_errors("writing", self.locate(name)):
            if self.is_local:
                write_whole(Path(self._at(name)), data)
            elif len(data) <= ONE_PUT:
                self._put(name, data)
            else:
                self._put_and_copy(name, data)

    def _put_and_copy(self, name: str, data: bytes, attempts: int = 2) -> None:
        """An object of any size, whole or not at all."""
        folder, separator, last = name.rpartition("/")
        temporary = f"{folder}{separator}{TEMPORARY}{secrets.token_hex(4)}-{last}"
        try:
            self._put(temporary, data)
            try:
                self.fs.copy_file(self._at(temporary), self._at(name))
            except OSError:
                if attempts == 1 or self.exists(temporary):
                    raise
                self._put_and_copy(name, data, attempts - 1)  # another run, finishing, took it for a dead writer's
        finally:
            with contextlib.suppress(OSError):
                self.fs.delete_file(self._at(temporary))

    def _put(self, name: str, data: bytes) -> None:
        """An object of up to 10 MiB whole or not at all; of a larger one, after a fault, what was sent may stand there."""
        stream = self.fs.open_output_stream(self._at(name), buffer_size=None)
        try:
            stream.write(data)
            stream.close()
        except BaseException:
            with contextlib.suppress(OSError):
                stream.close()  # else it happens whenever the stream is collected
            raise

    def read_json(self, name: str) -> Any:
        """A JSON file. Raises FileNotFoundError, and UserError when it is not JSON (say, cut off by another tool)."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise UserError(f"{self.locate(name)}: not readable as JSON ({error}); remove it and run again") from None

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file, indented, keys in the order given, written atomically; null for a number that is not finite."""
        text = json.dumps(json_values(value), indent=1, ensure_ascii=False, allow_nan=False)
        self.write_atomic(name, f"{text}\n".encode(errors="backslashreplace"))  # what is not UTF-8 in a file's name

    def remove(self, name: str) -> None:
        """Remove one file; one that is not there is fine."""
        with clear_errors("removing", self.locate(name)), contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self._at(name))

    def remove_tree(self, name: str = "") -> None:
        """Remove the folder `name` (this storage itself by default) with all it holds; absent is fine."""
        with clear_errors("removing", self.locate(name)), contextlib.suppress(FileNotFoundError):
            if self.fs.get_file_info(self._at(name)).type == pafs.FileType.Directory:
                self.fs.delete_dir(self._at(name))

    def clean_temporaries(self, older_than_s: float = 3600.0) -> Names:
        """Remove what killed writers left behind, if untouched for `older_than_s`; returns the names removed."""
        removed = []
        for name in filter(_is_temporary, self._list("")):
            info = self.fs.get_file_info(self._at(name))  # its writer may just have renamed it
            if info.type == pafs.FileType.File and time.time() - info.mtime_ns / 1e9 >= older_than_s:
                self.remove(name)
                removed.append(name)
        return removed

    def upload_tree(self, folder: str | Path, name: str = "") -> None:
        """Copy a local folder's files to the folder `name` here, each written atomically, sorted by name."""
        folder = Path(folder)
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            relative = file.relative_to(folder).as_posix()
            self.write_atomic(f"{name}/{relative}" if name else relative, file.read_bytes())

    def download_tree(self, folder: str | Path, name: str = "") -> None:
        """Copy the files of the folder `name` here into a local folder."""
        target, start = Storage.at(folder), len(name.rstrip("/")) + 1 if name else 0
        for file in self.list(name):
            target.write_atomic(file[start:], self.read_bytes(file))


def json_values(value: Any, spelled: Callable[[float], Any] = lambda number: None) -> Any:
    """`value` with null, or as it is `spelled`, for infinity and NaN: JSON has neither, and most readers refuse them."""
    if isinstance(value, dict):
        return {key: json_values(each, spelled) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(each, spelled) for each in value]
    return spelled(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)


@functools.cache
def _local_filesystem() -> Any:
    return pafs.LocalFileSystem()
