"""What a set's drawing cost, told apart by stage from its manifest and from a worker: each second, joule and FLOP once."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from raysyn.cluster.compare import compare, compare_fingerprint, study_rows
from raysyn.cluster.graph import GraphResult
from raysyn.cluster.sampler_actor import ShardWriter
from raysyn.cluster.stage import open_stage
from raysyn.cluster.study_report import _less_ceiling, _task_scores, how_measured, sampling_costs, show_report
from raysyn.compose import load_job
from raysyn.config import SynthesizeConfig
from raysyn.data.storage import Storage
from raysyn.metrics.cost import Cost, cost_columns, measured
from raysyn.types import Outcome

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


def test_the_page_says_what_makes_rows_unlike() -> None:
    config = load_job("compare", ["scale=tiny", "model=[edm]", "num_task_seeds=2"])
    tuned = {"best_task": {"lr": 0.00123, "loss": "cross_entropy"}, "best_min_faithfulness": 0.0, "num_trials": 3}
    result = GraphResult({"tune segmentation": Outcome("tune", "", "", tuned)})
    rows = study_rows(config)
    table = [{"trained_on": "phantom", "realism/num_frames": 8}, {"trained_on": "synthetic", "realism/num_frames": 24}]
    found = how_measured(config, rows, table, result)
    assert found["segmentation's set-up"].startswith(
        f"lr 0.00123, loss cross_entropy: the best of 3 trials on {rows[1].key}"
    )
    assert "every row and curve has it" in found["segmentation's set-up"]
    assert "other stages ran beside" in found["seconds"]
    assert "mean of 2" in found["trainings"]
    assert "(phantom 8, synthetic 24)" in found["Fréchet distances"]
    equal = [{**row, "realism/num_frames": 8} for row in table]
    assert "Fréchet distances" not in how_measured(config, rows, equal, result)


def test_two_studies_of_one_storage_each_show_their_own_report(tmp_path, capsys) -> None:
    studies = []
    for steps in (2, 3):
        job = load_job("compare", ["scale=tiny", f"storage={tmp_path}", f"steps=[{steps}]"])
        stage = open_stage(str(tmp_path), "compare", compare_fingerprint(job))
        for name in ("index.html", "pictures/hero.png"):
            stage.storage.write_atomic(f"report/{name}", f"{name} of {steps} steps".encode())
        show_report(Storage.at(tmp_path), stage.fingerprint)
        stage.finish({"rows": []})
        studies.append(job)
    assert (tmp_path / "report" / "index.html").read_text() == "index.html of 3 steps"
    assert compare(studies[0]).skipped
    for name in ("index.html", "pictures/hero.png"):
        assert (tmp_path / "report" / name).read_text() == f"{name} of 2 steps"


def test_several_trainings_of_a_row_have_their_sd_beside_the_interval() -> None:
    config = load_job("compare", ["scale=tiny", "num_task_seeds=2"])
    runs = [
        {"mean_dice": d, "mean_dice_low": d - 0.1, "la_dice": la, "lv_endo_dice": endo}
        for d, la, endo in ((0.8, None, np.nan), (0.9, 0.5, 0.5))
    ]
    manifests = [{"scores": scores, "cpu_seconds": 2.0} for scores in runs]
    result = GraphResult({f"segmentation x seed {i}": Outcome("task", "", "", m) for i, m in enumerate(manifests)})
    found = _task_scores(config, "x", "segmentation", result)
    assert found is not None
    assert found["mean_dice"] == pytest.approx(0.85)
    assert found["mean_dice_low"] == pytest.approx(0.75)
    assert found["mean_dice_seed_sd"] == pytest.approx(0.1 / 2**0.5)
    assert found["la_dice"] is found["la_dice_seed_sd"] is None
    assert np.isnan(found["lv_endo_dice_seed_sd"])
    assert "mean_dice_low_seed_sd" not in found
    assert found["cost/segmentation_cpu_seconds"] == 4


def test_a_row_stands_against_the_ceiling_once_both_have_all_their_trainings() -> None:
    config = load_job("compare", ["scale=tiny", "model=[edm]", "num_task_seeds=2"])
    ceiling, synthetic = study_rows(config)[:2]

    def run(*dice: float) -> Outcome:
        frames = {"frame_id": ["a", "b", "c"], "patient_id": ["p", "q", "r"], "la_dice": list(dice)}
        return Outcome("task", "", "", {"by_frame": frames})

    runs = {f"segmentation {ceiling.key} seed {i}": run(0.9, 0.7, 0.5) for i in range(2)}
    runs |= {f"segmentation {synthetic.key} seed 0": run(0.8, 0.6, 0.4)}
    assert _less_ceiling(config, synthetic, GraphResult(runs)) == {}
    runs |= {f"segmentation {synthetic.key} seed 1": run(0.8, 0.7, 0.4)}
    found = _less_ceiling(config, synthetic, GraphResult(runs))
    assert list(found.values()) == pytest.approx([-0.25 / 3, -0.1, -0.05])
    assert list(found) == [f"mean_dice_less_ceiling{end}" for end in ("", "_low", "_high")]
    assert _less_ceiling(config, ceiling, GraphResult(runs)) == {}
