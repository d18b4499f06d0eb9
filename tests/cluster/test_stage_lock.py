"""Stages that two runs would spoil for each other have one at a time: real processes, one of them killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from raysyn.cluster.stage import open_stage
from raysyn.cluster.stage_lock import alone, lock_file

ROOT = Path(__file__).resolve().parents[2]
HOLDS = """
import sys, time
from raysyn.cluster.stage import open_stage
from raysyn.cluster.stage_lock import alone
with alone(open_stage(sys.argv[1], "fit", "0" * 16)):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""
COUNTS = """
import pathlib, sys
from raysyn.cluster import stage_lock
from raysyn.cluster.stage import open_stage
stage_lock.POLL_SECONDS = 0.001
count = pathlib.Path(sys.argv[1], "count")
for _ in range(50):
    with stage_lock.alone(open_stage(sys.argv[1], "fit", "0" * 16)):
        count.write_text(str(int(count.read_text()) + 1))
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )


def test_another_run_waits_and_goes_on_after_kill_9(tmp_path: Path) -> None:
    first = start(HOLDS, str(tmp_path), "600")
    assert first.stdout.readline() == "in\n"
    second = start(HOLDS, str(tmp_path), "0")
    said = second.stdout.readline()
    assert said.startswith(f"fit: process {first.pid} on ")
    assert said.endswith(f" is at work on {tmp_path}/fit/{'0' * 16}; waiting for it to end\n")
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    assert second.stdout.readline() == "in\n"
    assert second.wait(60) == 0
    first.wait(60)
    assert os.listdir(tmp_path / "fit") == [], "no lock is left"


def test_there_is_never_more_than_one(tmp_path: Path) -> None:
    """Each gives the lock back, and so removes its file, fifty times under the others' hands."""
    (tmp_path / "count").write_text("0")
    several = [start(COUNTS, str(tmp_path)) for _ in range(3)]
    assert [one.wait(120) for one in several] == [0] * 3
    assert (tmp_path / "count").read_text() == "150"


def test_for_an_object_store_the_lock_is_this_machines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stage = open_stage("s3://bucket/runs?region=us-east-1", "tune", "1" * 16)
    with alone(stage):
        assert lock_file(stage).parent == tmp_path
        assert lock_file(stage).exists()
    assert os.listdir(tmp_path) == []
