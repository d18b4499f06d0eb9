"""Live progress across processes: stages report to one small actor, the driver shows it."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

BOARD = "raysyn-progress"


class _Board:
    """What each stage last said of itself, by its name."""

    def __init__(self) -> None:
        self.said: dict[str, dict[str, Any]] = {}
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def warnings(self, start: int) -> list[str]:
        return self.warned[start:]

    def update(self, key: str, status: dict[str, Any]) -> None:
        self.said[key] = {**self.said.get(key, {}), **status, "time": time.time()}

    def snapshot(self) -> dict[str, dict[str, Any]]:
        return self.said


def _name() -> str:
    """Of this driver's board and of all that works for it: two jobs on one cluster do not see each other's."""
    import ray

    return f"{BOARD}-{ray.get_runtime_context().get_job_id()}"


def _board() -> Any:
    """The board's actor; None when nobody watches in this session."""
    import ray

    if not ray.is_initialized():  # to look for the board would start a Ray of its own
        return None
    try:
        return ray.get_actor(_name(), namespace="raysyn")
    except ValueError:
        return None


class _Relay(logging.Handler):
    def __init__(self, board: Any, key: str) -> None:
        super().__init__(logging.WARNING)
        self.board, self.key = board, key

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a warning must not stop what it warns of
            self.board.warn.remote(f"{self.key}: {record.getMessage()}")


def relay_warnings(key: str) -> None:
    """Have the driver print this process's warnings, as those of `key`: a worker's own log is not seen."""
    logger, board = logging.getLogger("raysyn"), _board()
    for earlier in [h for h in logger.handlers if isinstance(h, _Relay)]:
        logger.removeHandler(earlier)
    if board is not None:
        logger.addHandler(_Relay(board, key))


def reporter(key: str, every_seconds: float = 1.0) -> Callable[[dict[str, Any]], None]:
    """A function for a stage to call as often as it likes, from any process of the Ray session.

    Known entries: `done`, `total`, `unit`, `per_second`, `note`. Without a board in this session it does nothing.
    """
    board, last = _board(), 0.0

    def report(status: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        final = status.get("done") is not None and status.get("done") == status.get("total")
        if board is not None and (final or now - last >= every_seconds):
            last = now
            board.update.remote(key, status)

    return report


def _complete(status: dict[str, Any]) -> bool:
    return status.get("total") is not None and status.get("done") == status.get("total")


def _shown(said: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each that is at work; the workers (`<key> worker <pid>`) of what is complete have gone with it."""
    complete = {key for key, status in said.items() if _complete(status)}
    return [
        _describe(key, status)
        for key, status in said.items()
        if _active(status) and key.partition(" worker ")[0] not in complete
    ]


def _active(status: dict[str, Any]) -> bool:
    patience = 3600 if status.get("total") else 60  # who knows its end reports as parts are done, which may take long
    return not _complete(status) and time.time() - status["time"] < patience


def _describe(key: str, status: dict[str, Any]) -> str:
    done, total, rate = status.get("done"), status.get("total"), status.get("per_second")
    text = key
    if total:
        text += f"  {done}/{total} {status.get('unit', '')}".rstrip()
    if rate:
        text += f"  {rate:.1f}/s"
        if total and done is not None:
            text += f"  {max(total - done, 0) / rate:.0f} s left"
    return f"{text}  {status['note']}" if status.get("note") else text


@contextlib.contextmanager
def watch(header: Callable[[], str], every_seconds: float = 10.0) -> Iterator[None]:
    """Show the board while the block runs: one live view on a terminal, a line each `every_seconds` in a log.

    `header` says which stage of how many; below it stands what is not complete and
    reported within the last minute, or hour if it told its end.
    Warnings that were relayed go to stderr. Inside another `watch` of the same session it does nothing: the outer one
    shows all.
    """
    import ray

    if _board() is not None:
        yield
        return
    board: Any = ray.remote(num_cpus=0)(_Board).options(name=_name(), namespace="raysyn", get_if_exists=True).remote()
    stop, told = threading.Event(), 0

    def tell() -> None:
        nonlocal told
        for text in ray.get(board.warnings.remote(told), timeout=30):
            told += 1
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def lines() -> list[str]:
        tell()
        return _shown(ray.get(board.snapshot.remote(), timeout=30))

    def show_terminal() -> None:
        from rich.live import Live
        from rich.text import Text

        with Live(Text(""), refresh_per_second=2, transient=True) as live:
            while not stop.wait(0.5):
                live.update(Text("\n  ".join([header(), *lines()])))

    def show_log() -> None:
        while not stop.wait(every_seconds):
            print(" | ".join([header(), *lines()]), flush=True)

    def show() -> None:
        try:
            (show_terminal if sys.stdout.isatty() else show_log)()
        except ray.exceptions.RayError as error:
            print(f"progress display stopped: {type(error).__name__}", file=sys.stderr)

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)
        with contextlib.suppress(ray.exceptions.RayError):
            tell()
        ray.kill(board)
