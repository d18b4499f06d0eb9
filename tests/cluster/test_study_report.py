"""What a set's drawing cost, told apart by stage from its manifest and from a worker: each second, joule and FLOP once."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from raysyn.cluster.sampler_actor import ShardWriter
from raysyn.cluster.study_report import sampling_costs
from raysyn.config import SynthesizeConfig
from raysyn.metrics.cost import Cost, cost_columns, measured

MADE = {
    **{"cpu_seconds": 10.0, "decode_cpu_seconds": 2.0, "rejected_cpu_seconds": 3.0, "seconds": 12.0},
    **{"gpu_seconds": 8.0, "decode_gpu_seconds": 1.0, "rejected_gpu_seconds": 2.0, "energy_joules": 400.0},
    **{"num_attempts": 12, "num_rejected": 2, "num_function_evals": 5, "peak_memory_mb": 99, "peak_gpu_memory_mb": 9},
}
NET = {"gflops_per_evaluation": 3.0, "gflops_modulations": 1.0, "gflops_decode": 7.0}


def test_the_parts_of_a_drawing_add_up() -> None:
    stages = {"fit": Cost(cpu_seconds=1, gpu_seconds=1, energy_joules=50.0), **sampling_costs(MADE, NET)}
    columns = cost_columns(stages, 0.0, 3600.0)
    assert columns["cost/total_cpu_seconds"] == 11
    assert columns["cost/total_gpu_seconds"] == columns["cost/usd"] == 9
    assert columns["cost/total_energy_joules"] == pytest.approx(450)
    assert columns["cost/rejected_energy_joules"] == pytest.approx(100)
    assert columns["cost/total_num_function_evals"] == 60
    assert columns["cost/sample_num_function_evals"] == 50
    assert columns["cost/total_flops"] == pytest.approx(12 * (5 * 2e9 + 1e9 + 7e9)), "modulations once an image"
    plain = sampling_costs(MADE, NET, cached=False)
    assert plain["sample"].flops == pytest.approx(10 * 5 * 3e9)
    assert columns["cost/total_wall_seconds"] == 12
    assert "cost/decode_wall_seconds" not in columns, "no one measured it"
    pixel = sampling_costs({**MADE, "energy_joules": None}, {**NET, "gflops_decode": 0.0})
    assert set(pixel) == {"sample", "rejected"}
    assert pixel["sample"].energy_joules is None


def test_what_decoding_a_rejected_image_took_is_not_counted_twice() -> None:
    class Slow:
        decoding = Cost()

        def __call__(self, maps: np.ndarray, view: np.ndarray, seeds: list[int]) -> np.ndarray:
            with measured() as cost:
                time.sleep(0.02)
            self.decoding = self.decoding + cost
            return np.zeros(maps.shape, np.uint8)

    writer = object.__new__(ShardWriter)
    writer.spec = SimpleNamespace(config=SynthesizeConfig(min_faithfulness=0.5, max_attempts=3))
    writer.sampler, writer.faithfulness = Slow(), lambda images, maps: np.zeros(len(images))
    writer.rejected, writer.rejected_decoding = Cost(), Cost()
    writer._frame = lambda *given: None
    batch = [SimpleNamespace(noise_seed=i, retry=lambda attempt: attempt) for i in range(2)]
    _, drawn, below = writer.draw("train", batch, np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8))
    assert (drawn, below) == (6, 2)
    assert 0.04 <= writer.rejected_decoding.wall_seconds <= writer.rejected.wall_seconds
    assert writer.sampler.decoding.wall_seconds - writer.rejected_decoding.wall_seconds >= 0.02
