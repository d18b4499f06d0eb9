"""The driver of a fit that is asked to stop, without Ray."""

import signal
import threading

import pytest

from raysyn.cluster import fit as room
from raysyn.cluster.stage import open_stage
from raysyn.compose import load_job
from raysyn.types import Resumable


def test_a_controller_that_goes_with_ray_is_not_started_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grace period over, Ray is shut down; a new attempt would start another Ray in a process that is leaving."""
    import ray

    attempts: list[int] = []
    shut_down = threading.Event()

    class Trainer:
        def fit(self) -> None:
            attempts.append(1)
            shut_down.wait(10)
            raise ray.exceptions.ActorDiedError

    def ask(signum: int, frame: object) -> None:
        raise Resumable("stopped")

    monkeypatch.setattr(room, "_trainer", lambda *arguments: Trainer())
    monkeypatch.setattr(room, "GRACE_SECONDS", 0.1)
    stage, config = open_stage(str(tmp_path), "fit", "key"), load_job("fit", ["scale=tiny"])
    before = signal.signal(signal.SIGALRM, ask)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Resumable):
            room._run_workers(config, stage, {}, ("train",))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert stage.storage.exists(room.STOP)
    shut_down.set()
    for thread in threading.enumerate():
        if thread.name == "ray-train":
            thread.join(10)
    assert len(attempts) == 1
