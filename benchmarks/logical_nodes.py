"""A Ray cluster of many nodes on one machine, each a raylet of its own, and what such a node costs."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from raysyn.cluster.session import QUIET, ray_session, secure
from raysyn.config import RayConfig

OBJECT_STORE = 75 << 20  # the least that Ray takes
AT_ONCE = 4  # nodes that start beside each other
# Dozens of processes on few cores answer late, and a node that answers late is not a dead one.
PATIENT = {
    "health_check_initial_delay_ms": 120_000,
    "health_check_period_ms": 30_000,
    "health_check_timeout_ms": 120_000,
    "health_check_failure_threshold": 10,
    "agent_register_timeout_ms": 600_000,
    "worker_register_timeout_seconds": 900,
}


@dataclass(frozen=True)
class Footprint:
    """What the processes of a cluster take, all together: MiB (PSS: shared pages counted once) and CPU seconds so far."""

    mib: float = 0.0
    cpu_seconds: float = 0.0
    by_kind: dict[str, float] = field(default_factory=dict)  # MiB


@contextlib.contextmanager
def logical_nodes(count: int) -> Iterator[None]:
    """A head without CPUs and `count` nodes of one CPU each, joined by this process."""
    secure()
    for key, value in {**QUIET, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}.items():
        os.environ.setdefault(key, value)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE, "include_dashboard": False, "_system_config": PATIENT}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        with ray_session(RayConfig(address=cluster.address)):
            for start in range(0, count, AT_ONCE):
                for _ in range(start, min(start + AT_ONCE, count)):
                    cluster.add_node(wait=False, num_cpus=1, object_store_memory=OBJECT_STORE)
                cluster.wait_for_nodes(timeout=600)
            yield
    finally:
        cluster.shutdown()


def own_mib() -> float:
    """PSS of this process."""
    return _pss_mib("self")


def _pss_mib(pid: int | str) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    return int(rollup[rollup.index("Pss:") + 1]) / 1024


def footprint() -> Footprint:
    """Of every process that this one has started."""
    import psutil

    mib: dict[str, float] = defaultdict(float)
    cpu = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            name = process.cmdline()[0]
            mib[name if name.startswith("ray::") else process.name()] += _pss_mib(process.pid)
            times = process.cpu_times()
            cpu += times.user + times.system
    return Footprint(sum(mib.values()), cpu, dict(mib))


def idle_cores(seconds: float = 10.0) -> float:
    """Cores that the cluster keeps busy while it has nothing to do."""
    before, started = footprint().cpu_seconds, time.perf_counter()
    time.sleep(seconds)
    return (footprint().cpu_seconds - before) / (time.perf_counter() - started)
