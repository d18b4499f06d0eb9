"""The lines of the progress display: what is at work, how far, how long still; and no more of what has ended."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import pytest
import ray

from raysyn.cluster import board
from raysyn.cluster.board import _shown, relay_warnings, reporter, watch
from raysyn.cluster.session import ray_session
from raysyn.config import RayConfig


def status(age_s: float = 0.0, **entries: object) -> dict:
    return {"time": time.time() - age_s, **entries}


def test_what_is_at_work_is_shown_with_its_end() -> None:
    said = {"fit edm": status(done=50, total=100, unit="steps", per_second=5.0)}
    assert _shown(said) == ["fit edm  50/100 steps  5.0/s  10 s left"]


def test_what_is_complete_goes_and_takes_its_workers_along_but_not_its_namesakes() -> None:
    said = {
        "synthesize edm 3": status(done=8, total=8, unit="images"),
        "synthesize edm 3 worker 17": status(per_second=4.0),
        "synthesize edm 3 kl": status(done=0, total=8, unit="images"),
        "synthesize edm 3 kl worker 18": status(per_second=4.0),
    }
    assert _shown(said) == ["synthesize edm 3 kl  0/8 images", "synthesize edm 3 kl worker 18  4.0/s"]


def test_who_is_silent_is_left_out_sooner_where_no_end_is_known() -> None:
    said = {"whole": status(120, done=1, total=9), "open": status(120, note="running"), "gone": status(4000, total=9)}
    assert _shown(said) == ["whole  1/9"]


def test_where_no_ray_runs_none_is_started_to_report() -> None:
    reporter("prepare")({"done": 3, "total": 4})
    relay_warnings("fit edm")
    assert not ray.is_initialized()


@contextlib.contextmanager
def watched_by_another_job() -> Iterator[None]:
    """As where two drivers share a cluster, and the other one was first."""
    with contextlib.ExitStack() as other:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(board, "_name", lambda: f"{board.BOARD}-ffffffff")
            other.enter_context(watch(lambda: "the other's", every_seconds=1000.0))
        yield


@pytest.mark.cluster
def test_a_log_gets_lines_from_whoever_reports(capsys: pytest.CaptureFixture) -> None:
    own = RayConfig(num_cpus=1, object_store_mb=100)
    with ray_session(own), watched_by_another_job(), watch(lambda: "1/2 stages", every_seconds=0.2):
        report = reporter("prepare")
        deadline = time.monotonic() + 60
        said = ""
        while "1/2 stages | prepare  3/4 patients" not in said:
            assert time.monotonic() < deadline, said
            report({"done": 3, "total": 4, "unit": "patients"})
            time.sleep(0.3)
            said += capsys.readouterr().out
        relay_warnings("fit edm")
        logging.getLogger("raysyn.tracking").warning("the server is away")
        time.sleep(0.3)
    logging.getLogger("raysyn").handlers.clear()
    assert capsys.readouterr().err.count("warning: fit edm: the server is away\n") == 1
