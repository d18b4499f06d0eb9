import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysyn.cluster.job import run_job
from raysyn.types import Outcome, Resumable, UserError

ROOT = Path(__file__).resolve().parents[2]


def done(config: object) -> Outcome:
    return Outcome("fit", "here", "f")


def refuses(config: object) -> Outcome:
    raise UserError("mask.png: too small")


def refuses_within_ray(config: object) -> Outcome:
    wrapped = RuntimeError("task failed")
    wrapped.cause = UserError("mask.png: too small")  # as ray.exceptions.RayTaskError carries it
    raise wrapped


def breaks(config: object) -> Outcome:
    raise OSError("the disk is on fire")


def stops(config: object) -> Outcome:
    raise Resumable("stopped by SIGTERM")


def stops_while_ray_starts(config: object) -> Outcome:
    raise SystemExit(signal.SIGTERM)  # by the handler that Ray sets while it starts


@pytest.mark.parametrize(
    ("stage", "code", "says"),
    [
        (done, 0, "fit: done: here"),
        (refuses, 2, "raysyn fit: mask.png: too small"),
        (refuses_within_ray, 2, "raysyn fit: mask.png: too small"),
        (breaks, 1, "the same command resumes"),
        (stops, 0, "resumable"),
        (stops_while_ray_starts, 0, "resumable"),
    ],
)
def test_exit_codes(stage, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    sys.modules.setdefault(__name__, sys.modules[stage.__module__])
    try:
        assert run_job("fit", f"{stage.__module__}:{stage.__name__}", []) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert says in out + err


@pytest.mark.parametrize("job", ["prepare", "fit", "synthesize", "tune", "compare"])
def test_help_and_bad_keys_are_quick_and_clear(job: str) -> None:
    started = time.monotonic()
    shown = subprocess.run([sys.executable, f"jobs/{job}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert f"jobs/{job}.py" in shown.stdout
    bad = subprocess.run([sys.executable, f"jobs/{job}.py", "no.such=1"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "no" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert time.monotonic() - started < 60
    heavy = "import sys, raysyn.cluster.job; assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
