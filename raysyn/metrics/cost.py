"""What a result cost: seconds of processors, network evaluations, FLOPs, peak memory, energy, money; stage by stage."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

SECONDS_PER_HOUR = 3600.0


@dataclass
class Cost:
    """Of one stage, or of several by `+`: amounts add, peaks take the larger.

    `gpu_seconds` are seconds during which a GPU was held, one held by a share counts by it. `energy_joules` is the GPU's
    as NVML tells it, by the share too, None where it does not; a sum with an unknown part is unknown.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    num_function_evals: int = 0
    flops: float = 0.0
    peak_memory_mb: float = 0.0
    peak_gpu_memory_mb: float = 0.0
    energy_joules: float | None = None

    def __add__(self, other: Cost) -> Cost:
        parts: dict[str, Any] = {}
        for key in (f.name for f in fields(Cost)):
            a, b = getattr(self, key), getattr(other, key)
            parts[key] = max(a, b) if key.startswith("peak_") else None if a is None or b is None else a + b
        return Cost(**parts)

    def __sub__(self, part: Cost) -> Cost:
        """What is left without `part`: amounts subtract, peaks stay, unknown energy stays unknown."""
        left: dict[str, Any] = {}
        for key in (f.name for f in fields(Cost)):
            a, b = getattr(self, key), getattr(part, key)
            left[key] = a if key.startswith("peak_") else None if a is None or b is None else a - b
        return Cost(**left)

    def usd(self, usd_per_cpu_hour: float, usd_per_gpu_hour: float) -> float:
        """Money at the configured rates."""
        return (self.cpu_seconds * usd_per_cpu_hour + self.gpu_seconds * usd_per_gpu_hour) / SECONDS_PER_HOUR

    def columns(self, stage: str) -> dict[str, float]:
        """`cost/<stage>_<amount>`; unknown energy and amounts of 0 that no one measured (all but processors' seconds) left
        out."""
        optional = {f.name for f in fields(Cost)} - {"cpu_seconds", "gpu_seconds", "energy_joules"}
        amounts = {f.name: getattr(self, f.name) for f in fields(Cost)}
        return {
            f"cost/{stage}_{key}": float(value)
            for key, value in amounts.items()
            if value is not None and (value or key not in optional)
        }


def cost_columns(stages: Mapping[str, Cost], usd_per_cpu_hour: float, usd_per_gpu_hour: float) -> dict[str, float]:
    """Columns of every stage, of their sum as `cost/total_*`, and `cost/usd`. Raises ValueError for no stage at all."""
    if not stages:
        raise ValueError("cost: no stage to account for")
    first, *rest = stages.values()
    total = sum(rest, first)
    columns = {key: value for name, cost in stages.items() for key, value in cost.columns(name).items()}
    return {**columns, **total.columns("total"), "cost/usd": total.usd(usd_per_cpu_hour, usd_per_gpu_hour)}


@contextlib.contextmanager
def measured(on_gpu: float = 0) -> Iterator[Cost]:
    """Measure the block: this process's CPU time, its peak memory so far, and with `on_gpu` GPU time, memory, energy.

    `on_gpu` is the share of a GPU that is held: of two processes on one each has half of its time and energy. The Cost
    that it gives is filled when the block ends, also by an exception. CUDA work is waited for at the end.
    """
    cost = Cost()
    if on_gpu:
        _wait_for_gpu()  # earlier work is not this block's
    wall, cpu = time.perf_counter(), time.process_time()
    energy = gpu_energy_joules() if on_gpu else None
    try:
        yield cost
    finally:
        if on_gpu:
            cost.peak_gpu_memory_mb = _wait_for_gpu()
        cost.wall_seconds, cost.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        cost.gpu_seconds = cost.wall_seconds * on_gpu
        cost.peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        now = gpu_energy_joules() if energy is not None else None
        cost.energy_joules = (now - energy) * on_gpu if now is not None and energy is not None else None


def on_gpu() -> bool:
    """Whether this process computes on a GPU: one is visible, and torch is loaded."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())


def _wait_for_gpu() -> float:
    """Let queued CUDA work end; the peak of allocated memory so far in MiB, 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated()) / 2**20


def gpu_energy_joules(index: int | None = None) -> float | None:
    """Energy that the visible GPUs, or that number `index` of them, used since their driver was loaded.

    None where NVML does not tell.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        visible = _visible_gpus(pynvml.nvmlDeviceGetCount())
        chosen = visible if index is None else visible[index : index + 1]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in chosen]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in handles) / 1000 if handles else None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _visible_gpus(count: int) -> list[int]:
    """NVML ignores CUDA_VISIBLE_DEVICES: the numbers in it, or all where it is unset or holds names."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not all(part.strip().isdigit() for part in named.split(",") if part.strip()):
        return list(range(count))
    return [int(part) for part in named.split(",") if part.strip() and int(part) < count]
