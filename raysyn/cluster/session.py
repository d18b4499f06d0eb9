"""Joining or starting Ray. One we start has token authentication, a loopback dashboard and no usage statistics.

Ray's head listens on every interface whatever address it is given, and without a token anyone who reaches it runs code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from raysyn.config import RayConfig, WorkersConfig
from raysyn.metrics.cost import on_gpu
from raysyn.types import Resumable, UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "PYTHONWARNINGS": "ignore",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_worker_maximum_startup_concurrency": "5",  # Ray warns at four times that many processes; a study has 20
}
OWN = "raysyn_own"  # a resource that marks a Ray of our own: one node, to which none is added


def _unless_stopped(record: logging.LogRecord) -> bool:
    """Not of a stop that was asked for, which Ray Data takes for a fault of its own and logs with its trace."""
    return not isinstance(sys.exc_info()[1], Resumable)


def _quiet() -> None:
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    for name in ("ray.data", "ray.train", "ray.tune", "ray"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data.exceptions").addFilter(_unless_stopped)


def _joined(address: str) -> str:
    """The cluster to join, `address` or RAY_ADDRESS; "" where neither names one ("local": a Ray of our own)."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def secure(address: str = "") -> None:
    """Turn token authentication on for a Ray of our own. Ray reads this when it is imported, so it comes before that.

    Where a cluster is joined (`address` or RAY_ADDRESS) the caller's environment says how. Raises UserError when Ray
    was imported without it.
    """
    if _joined(address) or os.environ.get("RAY_AUTH_MODE") == "token":
        return
    if "ray" in sys.modules:
        raise UserError("RAY_AUTH_MODE: set it to token (or import raysyn.cluster.session) before ray is imported")
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _start_local(config: RayConfig) -> None:
    import ray

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ray Train computes in a thread, and a thread's own arena hands what it frees back to the system at each step.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    with _in_background():
        ray.init(
            address="local",  # without it Ray joins whatever a `ray start` on this machine left in /tmp/ray, dead or not
            num_cpus=config.num_cpus,
            resources={OWN: 1},
            object_store_memory=config.object_store_mb << 20,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level="error",
        )


def _schedule(policy: str) -> None:
    """Set the scheduling policy of this thread, and so of what it starts, where the system has such (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))


@contextlib.contextmanager
def _in_background() -> Iterator[None]:
    """Processes started in the block wait their turn when they wake up, and interrupt none that computes.

    Ray's own processes wake up hundreds of times a second each; on a few cores that shows in every step of a fit.
    """
    _schedule("SCHED_BATCH")
    try:
        yield
    finally:
        in_foreground()


def in_foreground() -> None:
    """Let this thread, and those it starts, be scheduled as usual again, though a Ray of our own started it."""
    _schedule("SCHED_OTHER")


def is_own() -> bool:
    """This Ray was started by us on this machine; asked from any process of it. Others may gain and lose nodes."""
    import ray

    return OWN in ray.cluster_resources()


def _join(address: str) -> None:
    import ray

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():  # ray.init itself takes minutes to give up
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(f"ray.address: cannot reach {address} ({error}); is its head up?") from None
    try:
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError) as error:  # of no head, of an address that is none
        raise UserError(
            f"ray.address: cannot join {address} ({str(error).splitlines()[0]}); "
            "is its head up, and are RAY_AUTH_MODE=token and its token set here?"
        ) from None


@contextlib.contextmanager
def _sigterm_waits() -> Iterator[None]:
    """SIGTERM in the block comes at its end, to this process's own handler, which stays in place.

    While Ray starts or is joined it sets handlers of its own, which exit with this code or that, or abort, as the moment
    has it; and what a handler raises amid a start leaves a Ray that is neither there nor gone.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    from ray._private import utils

    came: list[int] = []
    rays = utils.set_sigterm_handler
    signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = rays
        signal.signal(signal.SIGTERM, handler)
        if came:
            signal.raise_signal(signal.SIGTERM)


def _check_placeable(workers: WorkersConfig, at_once: int) -> None:
    """Raise UserError where `at_once` workers do not fit: a Ray of our own never grows, so they would wait for ever."""
    import ray

    has = ray.cluster_resources()
    for what, each in (("CPU", workers.cpus_per_worker), ("GPU", workers.gpus_per_worker)):
        if at_once * each > has.get(what, 0.0) + 1e-6:
            raise UserError(
                f"workers.{what.lower()}s_per_worker: {at_once} worker(s) of {each:g} {what} do not fit this machine's "
                f"{has.get(what, 0.0):g}; ask for less, or join a cluster by ray.address="
            )


@contextlib.contextmanager
def ray_session(config: RayConfig, workers: WorkersConfig | None = None, at_once: int = 1) -> Iterator[None]:
    """Ray for the block: the one already joined, else `config.address` or RAY_ADDRESS, else a local one of our own.

    A session that this call started or joined is left at the end; one that was there stays. Raises UserError where
    `at_once` of `workers` never fit; of a cluster that was joined, which may grow, that is not known.
    """
    _quiet()
    secure(config.address)
    import ray

    address, started = _joined(config.address), not ray.is_initialized()
    try:
        if started:
            with _sigterm_waits():
                _join(address) if address else _start_local(config)
        if workers is not None and started and not address:
            _check_placeable(workers, at_once)
        yield
    finally:
        if started:
            ray.shutdown()


def gpu_share() -> float:
    """What this process holds of the GPU that it computes on: 0 without one; less than 1 where Ray lets several share it."""
    if not on_gpu():
        return 0.0
    import ray

    held = ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0) if ray.is_initialized() else 1.0
    return min(1.0, float(held))
