"""One run at a time in a stage that two would spoil for each other: another waits, and then finds it done or goes on.

Frame sets need none of it: their shards are the same bytes whoever makes them, put whole. Two fits would write and prune
each other's checkpoints, two searches propose each other's trials, two studies log every row twice.

The lock is the kernel's, on a file beside the stage's folder: it goes with its process, kill -9 included. For an object
store, which has none, the file lies in this machine's temporary folder: runs on two machines do not see each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from raysyn.cluster.stage import StageDir
from raysyn.data.storage_faults import clear_errors

POLL_SECONDS = 0.5
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def lock_file(stage: StageDir) -> Path:
    """Where the lock of a stage lies while a run works there."""
    if stage.storage.is_local:
        return Path(stage.storage.parent.path) / f".{stage.fingerprint}.lock"
    return Path(tempfile.gettempdir()) / f"raysyn-{os.getuid()}-{stage.stage}-{stage.fingerprint}.lock"


@contextlib.contextmanager
def alone(stage: StageDir) -> Iterator[None]:
    """The block without another run in it; waits, and says so, while there is one.

    Raises UserError where nothing may be written. A file system without locks is told of, and not waited for.
    """
    path, told = lock_file(stage), False
    with clear_errors("writing", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    while (held := _acquired(path)) is None:
        if not told:
            print(f"{stage.stage}: {_holder(path)} is at work on {stage.path}; waiting for it to end", flush=True)
            told = True
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # before the lock goes: who opened the file meanwhile sees that it is no longer this one
        os.close(held)


def _acquired(path: Path) -> int | None:
    """The lock's open file; None while another has it."""
    with clear_errors("writing", str(path)):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), os.stat(path)):
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
    except (BlockingIOError, FileNotFoundError):  # held, or just given back
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            raise
        print(f"{path.parent}: that file system has no locks; see that only one run is at work there", flush=True)
        return file
    os.close(file)
    return None


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "another run"
    except FileNotFoundError:
        return "another run"
