"""One thread a process, no telemetry, and Ray's token authentication on before anything imports Ray.

`make test` runs two processes: tests that start servers go one after another in one of them, which mostly waits, and
the rest in the other, which yields to it.
"""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("RAY_ADDRESS", None)

from raysyn.cluster.session import QUIET, secure

for _key, _value in QUIET.items():
    if _key != "PYTHONWARNINGS":
        os.environ.setdefault(_key, _value)
secure()
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
STARTS_SERVERS = ("cluster", "e2e", "browser", "s3", "postgres")
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def _starts_servers(file: str) -> bool:
    """Whether some test of this file has such a mark."""
    text = (ROOT / file).read_text()
    return any(f"mark.{name}" in text for name in STARTS_SERVERS)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class OneForServers(LoadScopeScheduling):
        """All files that start servers are one piece of work, every other test is one of its own."""

        def _split_scope(self, nodeid: str) -> str:
            return "servers" if _starts_servers(nodeid.partition("::")[0]) else nodeid

    return OneForServers(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and not _starts_servers(item.nodeid.partition("::")[0]) and os.nice(0) == 0:
        os.nice(10)


@pytest.fixture
def open_tmp_path(tmp_path: Path) -> Path:
    """`tmp_path`, which every user may reach and read; what pytest makes is its owner's alone."""
    folder = tmp_path
    while folder != Path(tempfile.gettempdir()).resolve() and folder != folder.parent:
        folder.chmod(0o755)
        folder = folder.parent
    return tmp_path
