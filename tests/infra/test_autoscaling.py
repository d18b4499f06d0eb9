"""What Ray's own autoscaler, either version of it, makes of the manifests: which pods it asks for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "infra" / "kuberay" / "raycluster.yaml"
GPU_WORK = {"CPU": 6.0, "GPU": 1.0}  # workers.cpus_per_worker and gpus_per_worker of the manifests' entrypoints
CPU_WORK = {"CPU": 1.0}  # a shard of frames, a row's realism


def autoscaling_config() -> dict[str, Any]:
    """As the autoscaler beside the head reads the RayCluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = yaml.safe_load(CLUSTER.read_text())
    cluster["metadata"]["namespace"] = "raysyn"
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    return config


def pods_by_v1(config: dict[str, Any], demand: list[dict[str, float]]) -> dict[str, int]:
    from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

    head, scorer = (
        config["head_node_type"],
        partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({})),
    )
    nodes, left = get_nodes_for(
        config["available_node_types"], {head: 1}, head, config["max_workers"], list(demand), scorer
    )
    assert left == []
    return dict(nodes)


def pods_by_v2(config: dict[str, Any], demand: list[dict[str, float]]) -> dict[str, int]:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    read = AutoscalingConfig(config, skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=read.get_node_type_configs(),
        max_num_nodes=read.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(d) for d in demand]),
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert reply.infeasible_resource_requests == []
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("pods_for", [pods_by_v1, pods_by_v2])
def test_work_without_a_gpu_starts_no_gpu_node(pods_for: Any) -> None:
    config = autoscaling_config()
    assert pods_for(config, [CPU_WORK] * 16) == {"cpu": 3}
    assert pods_for(config, [{"CPU": 0.5}]) == {"cpu": 1}
    assert pods_for(config, [GPU_WORK] * 8) == {"gpu": 8}
    assert pods_for(config, [GPU_WORK] * 2 + [CPU_WORK] * 6) in ({"gpu": 2, "cpu": 1}, {"gpu": 2}), "it fits beside"
    most = 7 * config["available_node_types"]["cpu"]["max_workers"]
    assert "gpu" not in pods_for(config, [CPU_WORK] * most)


def test_pods_without_a_gpu_stay_off_gpu_nodes_and_go_to_spot_nodes_too() -> None:
    groups = yaml.safe_load(CLUSTER.read_text())["spec"]["workerGroupSpecs"]
    gpu, cpu = (group["template"]["spec"] for group in groups)
    assert "nvidia.com/gpu" not in str(cpu)
    of_gpu_nodes = [t for t in gpu["tolerations"] if t["key"] == "nvidia.com/gpu"]
    assert cpu["tolerations"] == [t for t in gpu["tolerations"] if t not in of_gpu_nodes]
    assert of_gpu_nodes
    own = ("resources", "tolerations")
    assert {k: v for k, v in gpu["containers"][0].items() if k not in own} == {
        k: v for k, v in cpu["containers"][0].items() if k not in own
    }
