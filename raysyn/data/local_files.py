"""Local files for `Storage`: written under a temporary name, synced and renamed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp-"  # starts the name of a file that is still being written


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and the folders above it, so that it is there whole or not at all, a power cut included."""
    try:
        _replace(path, data)
    except FileNotFoundError:  # another run of the same work, finishing, took the temporary file for a dead writer's
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}"
    try:
        with open(temporary, "xb") as file:
            _write_and_sync(file, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)


def _write_and_sync(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
