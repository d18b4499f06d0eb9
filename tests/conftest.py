"""One thread a process, no telemetry, and Ray's token authentication on before anything imports Ray.

`make test` runs two processes: tests that start servers go one after another in one of them, which mostly waits. The
other yields to it; it takes the rest and, when that is done, the whole jobs from the command line, which may take their
time.
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
PIECES = {"jobs": ("e2e",), "servers": ("cluster", "browser", "s3", "postgres")}  # by a mark of a test in the file
ORDER = ("servers", "", "jobs")
NICENESS = 15  # Ray's own workers have it: with less, the other tests went before them
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def _piece(file: str) -> str:
    """The piece of work that this file belongs to; "" if its tests go one by one."""
    text = (ROOT / file).read_text()
    return next((piece for piece, marks in PIECES.items() if any(f"mark.{name}" in text for name in marks)), "")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(_piece(_file(item.nodeid))))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class InPieces(LoadScopeScheduling):
        """All files that start servers are one piece of work, whole jobs another, every other test is one of its own."""

        def _split_scope(self, nodeid: str) -> str:
            return _piece(_file(nodeid)) or nodeid

    config.option.loadscopereorder = False  # they stand in their order
    return InPieces(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and not _piece(_file(item.nodeid)) and os.nice(0) == 0:
        os.nice(NICENESS)


@pytest.fixture
def open_tmp_path(tmp_path: Path) -> Path:
    """`tmp_path`, which every user may reach and read; what pytest makes is its owner's alone."""
    folder = tmp_path
    while folder != Path(tempfile.gettempdir()).resolve() and folder != folder.parent:
        folder.chmod(0o755)
        folder = folder.parent
    return tmp_path
