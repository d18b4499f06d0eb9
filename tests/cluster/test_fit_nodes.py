from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from raysyn.cluster.fit_nodes import CountNodes

pytestmark = [pytest.mark.cluster]
TWO = [{"CPU": 1}, {"CPU": 1}]


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head of one CPU, to which nodes can be added."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def alive() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def test_a_node_that_has_just_joined_or_gone_is_counted(nodes: Any) -> None:
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()

    def places() -> int:
        """What Ray Train's elastic policy is told when it sizes a group."""
        return len(ray.get(coordinator.get_reserved_resources.remote("a fit")))

    ray.get(coordinator.request_resources.remote(requester_id="a fit", resources=TWO, expire_after_s=600))
    counts = CountNodes()
    counts.after_controller_start(None)
    assert places() == 1
    joined = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    assert alive() == 2
    counts.before_controller_execute_failure_decision(None)
    assert places() == 2
    nodes.remove_node(joined, allow_graceful=False)
    deadline = time.monotonic() + 120
    while alive() == 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    counts.before_controller_execute_failure_decision(None)
    assert places() == 1
