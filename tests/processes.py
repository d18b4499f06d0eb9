"""Ending drivers for real: with a local Ray below them, which notices by itself."""

from __future__ import annotations

import signal
import subprocess

import psutil


def kill_driver(driver: subprocess.Popen, patience: float = 120.0) -> None:
    """kill -9 of `driver`; returns when the Ray that it started has ended too, so that none works beside what follows."""
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait(patience)
    _, alive = psutil.wait_procs(below, patience)
    assert not alive, f"they outlive their driver: {alive}"
