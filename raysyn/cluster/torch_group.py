"""Ray Train's process group for torch, set up without importing torch in the driver or in Ray Train's controller.

`ray.train.torch` does the same with torch imported in both, one after the other before a worker starts: eight seconds
of a short fit on a small machine (benchmarks/README.md). What runs on the workers is the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig


@dataclass
class TorchGroup(BackendConfig):
    """gloo on CPUs, NCCL on GPUs. A collective that takes longer than `timeout_s` fails the worker."""

    use_gpu: bool = False
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[Backend]:
        return _TorchBackend


class _TorchBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchGroup)
        size = len(worker_group)
        if size == 1:
            return  # nothing to exchange
        address, port = worker_group.execute_single(0, _free_address)
        backend = "nccl" if backend_config.use_gpu else "gloo"
        arguments = {"backend": backend, "size": size, "address": address, "port": port}
        import ray

        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join_group, world_rank=rank, timeout_s=backend_config.timeout_s, **arguments
                )
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if len(worker_group) > 1:
            import ray

            # Bounded: a worker that hangs in a collective must not hold up the restart of the others.
            ray.wait(worker_group.execute_async(_leave_group), num_returns=len(worker_group), timeout=10)


def _free_address() -> tuple[str, int]:
    import socket

    import ray

    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]


def _join_group(backend: str, world_rank: int, size: int, address: str, port: int, timeout_s: int) -> None:
    import datetime

    import torch.distributed as dist

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    dist.init_process_group(backend, rank=world_rank, world_size=size, timeout=datetime.timedelta(seconds=timeout_s))


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
