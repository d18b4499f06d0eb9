"""What Prometheus sees of the work. Ray serves it on the metrics port of each node, `ray_` before each name.

Counters end in `_total` there. Where no Ray runs, or its metrics are off, counting does nothing and costs nothing.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

COUNTERS = {
    "raysyn_images": "Synthetic images in shards that were written whole.",
    "raysyn_rejected_images": "Images drawn that were not kept: below synthesize.min_faithfulness.",
    "raysyn_failures": "By kind. error: a stage's code raised. worker: a process was replaced. retry: Ray gave work up "
    "and it was asked for again.",
    "raysyn_fit_steps": "Optimizer steps.",
    "raysyn_fit_images": "Training images seen.",
}
SHARD_SECONDS = "raysyn_shard_seconds"
BOUNDARIES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]


def count(name: str, work: str, value: float = 1, kind: str = "") -> None:
    """Add `value` to the counter `name` of COUNTERS. `work` says whose it is, as the progress display does."""
    if value > 0 and _ray_runs():
        _counter(name).inc(value, tags={"work": work, "kind": kind})


def count_shard(work: str, record: dict[str, Any]) -> None:
    """Count a shard that is whole: its images, those rejected on the way, and its seconds. `record` is the shard's."""
    count("raysyn_images", work, record["rows"])
    count("raysyn_rejected_images", work, record["attempts"] - record["rows"])
    if _ray_runs():
        _shard_seconds().observe(record["seconds"], tags={"work": work})


def count_if_replaced(work: str) -> None:
    """Called by an actor as it starts: counts a failure of kind `worker` when it stands in for one that died."""
    if _ray_runs():
        import ray

        context = ray.get_runtime_context()
        if context.get_actor_id() is not None and context.was_current_actor_reconstructed:
            count("raysyn_failures", work, kind="worker")


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@functools.cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    return Counter(name, COUNTERS[name], tag_keys=("work", "kind"))


@functools.cache
def _shard_seconds() -> Any:
    from ray.util.metrics import Histogram

    return Histogram(SHARD_SECONDS, "Seconds that one shard took.", boundaries=BOUNDARIES, tag_keys=("work",))
