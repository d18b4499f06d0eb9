"""What a user can mend of a storage: faults of its file system, and places where nothing can be written, in words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from raysyn.data.object_store import explain_fault
from raysyn.types import UserError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def check_path(text: str) -> None:
    """Raise UserError for a place that neither a manifest nor Parquet could name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"storage: {text!r} is not UTF-8; choose another place") from None
    if "\0" in text:
        raise UserError(f"storage: {text!r} holds a zero byte; choose another place")


def check_place(folder: Path) -> None:
    """Raise UserError unless `folder`, or what of it is there already, is a folder that may be written to."""
    with clear_errors("writing", str(folder)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)  # a name that is too long is told here; `lexists` says of it only that it is not there
        there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission", str(there))


@contextlib.contextmanager
def clear_errors(doing: str, where: str) -> Iterator[None]:
    """Turn faults that the user can mend into UserError: no space, no permission, a file where a folder should be."""
    try:
        yield
    except OSError as error:
        problem = _explain(error)
        if problem is None:
            raise
        raise UserError(f"{where}: {problem} (while {doing} it)") from error


def _explain(error: OSError) -> str | None:
    text = str(error)
    if error.errno in _NO_SPACE or "[errno 28]" in text or "[errno 122]" in text:
        return "no space left on that device; free some or choose another storage="
    if error.errno in _REFUSED or isinstance(error, PermissionError):
        return "no permission; change its mode or choose another place"
    if error.errno == errno.ENOTDIR or isinstance(error, NotADirectoryError | FileExistsError):
        return "a file stands where a folder should be; remove it or choose another storage="
    if error.errno == errno.EISDIR or text.endswith("is a directory"):  # pyarrow's own words, without a number
        return "a folder stands where a file should be; move it elsewhere"
    if error.errno == errno.ENAMETOOLONG or "[errno 36]" in text:
        return "a name in it is too long; choose a shorter place"
    if error.errno is None and "AWS Error" in text:
        return explain_fault(text)
    return None
