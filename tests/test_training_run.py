"""The loop around the steps: divergence, rollback, validation, hooks, energy."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysyn.training import Diverged, Parallel, StepReport, train
from raysyn.training_batches import NOISE, uniform
from raysyn.training_run import Hooks, _Energy, averaged, run, validation_loss
from raysyn.training_state import Progress, folder_of
from tests.regression import CONFIG, fitted, make, store_at


def test_divergence_names_step_noise_level_and_checkpoint(tmp_path: Path) -> None:
    state, objective = make()
    objective.module.poison = {12 * 7 + 3: math.nan}
    before: list[Any] = []

    def keep(report: StepReport) -> None:
        before.append([p.detach().clone() for p in objective.model.parameters()])

    sigma = 10 * float(uniform(0, NOISE, np.array([87]))[0])
    with pytest.raises(Diverged) as stopped:
        run(state, objective, CONFIG, store_at(tmp_path), hooks=Hooks(step=keep))
    message = str(stopped.value)
    assert "loss nan" in message
    assert "at step 8" in message
    assert f"sigma {sigma:.4g}" in message
    assert message.endswith(f"last good checkpoint: {tmp_path}/{folder_of(5)}")
    assert state.progress.step == 7
    for p, q in zip(objective.model.parameters(), before[-1]):
        assert torch.equal(p, q), "the bad step was not taken"


def test_a_spike_goes_back_and_draws_anew(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_images=12 * 40, spike_factor=50.0, max_rollbacks=2)
    state, objective = make(config)
    poisoned = 12 * 27

    class Once(dict):
        """A spike that comes with the first draw only."""

        def get(self, key: int, default: float = 1.0) -> float:  # type: ignore[override]
            return 1e4 if key == poisoned and not state.progress.rollbacks else default

    objective.module.poison = Once()
    seconds: list[float] = []
    hooks = Hooks(step=lambda report: seconds.append(report.seconds))
    assert run(state, objective, config, store_at(tmp_path), hooks=hooks, spent=(100.0, 50.0))
    assert len(seconds) == 42, "steps 26 and, the bad one not told, 27 came twice"
    assert state.progress.wall_seconds >= 100 + sum(seconds), "what was undone was paid for, as was the time before"
    assert 50 < state.progress.cpu_seconds < 100
    assert [step for step, _ in state.progress.rollbacks] == [27]
    assert len(state.progress.losses) == 40
    assert max(state.progress.losses) < 1e3
    assert sorted(set(objective.asked)) == list(range(480))


@pytest.mark.parametrize("value", [1e6, math.nan])
def test_rollbacks_are_bounded(tmp_path: Path, value: float) -> None:
    config = dataclasses.replace(CONFIG, num_images=12 * 40, spike_factor=50.0, max_rollbacks=2)
    state, objective = make(config)
    objective.module.poison = {12 * 27: value}
    with pytest.raises(Diverged, match=r"after 2 rollbacks; last good checkpoint: .*step-000000025"):
        run(state, objective, config, store_at(tmp_path))


def test_validation_uses_the_average_and_leaves_the_weights(tmp_path: Path) -> None:
    state, objective = make()
    for _ in train(state, objective, CONFIG):
        pass
    raw = {k: v.clone() for k, v in state.model.state_dict().items()}
    loss = validation_loss(state, objective, CONFIG, Parallel())
    assert all(torch.equal(v, state.model.state_dict()[k]) for k, v in raw.items())
    with averaged(state), torch.no_grad():
        by_hand = objective.module(objective.validation_batch(np.arange(8))).loss.mean()
        assert all(torch.equal(v, state.ema.average[k]) for k, v in state.model.state_dict().items())
    assert loss == pytest.approx(float(by_hand), rel=1e-6)
    halves = [validation_loss(state, objective, CONFIG, Parallel(rank, 2)) for rank in (0, 1)]
    assert sum(halves) == pytest.approx(loss, rel=1e-6)


def test_hooks_hear_at_their_steps(tmp_path: Path) -> None:
    state, objective = make()
    logged: list[tuple[int, dict[str, float]]] = []
    sampled: list[int] = []
    hooks = Hooks(log=lambda metrics, step: logged.append((step, metrics)), sample=sampled.append)
    assert run(state, objective, CONFIG, store_at(tmp_path), hooks=hooks)
    assert sampled == [10, 20]
    assert [s for s, m in logged if "train/loss" in m] == [4, 8, 12, 16, 20]
    assert [s for s, m in logged if "validation/loss" in m] == [5, 10, 15, 20]
    last = next(m for s, m in reversed(logged) if "train/loss" in m)
    wanted = {"train/lr", "train/grad_norm", "train/images_per_second", "cost/cpu_seconds", "system/memory_mb"}
    assert wanted <= set(last)
    assert any(k.startswith("train/loss_by_sigma/") for k in last)


def test_a_machine_about_to_leave_gets_a_checkpoint_and_the_fit_goes_on(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_every_steps=1000, keep_checkpoints=5)
    state, objective = make(config)
    store = store_at(tmp_path, keep=5)
    objective.num_validation = 0  # or the best would be kept too
    assert run(state, objective, config, store, hooks=Hooks(leaving=lambda: state.progress.step == 8))
    assert store.steps() == [8, 20]


class OneGPU(Parallel):
    """A CPU that passes for a GPU where energy is counted."""

    num_gpus = 1


def test_energy_is_that_of_all_starts_and_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(float(10 * i * i) for i in range(100))  # 10 (2 i + 1) joules between the i-th and the next
    monkeypatch.setattr("raysyn.training_run.gpu_energy_joules", lambda index: next(readings))
    parallel = OneGPU(all_reduce=lambda value: 2 * value)  # two ranks alike
    state, objective = make()
    stop = Hooks(should_stop=lambda: state.progress.step == 7)
    assert not run(state, objective, CONFIG, store_at(tmp_path), parallel, stop)
    first = state.progress.energy_joules
    assert first is not None
    assert first > 0
    again, objective = make()
    said: list[float] = []
    hooks = Hooks(
        log=lambda metrics, step: said.extend([metrics["cost/energy_joules"]] if "train/loss" in metrics else [])
    )
    assert run(again, objective, CONFIG, store_at(tmp_path), parallel, hooks)
    assert next(readings) > 0
    last = again.progress.energy_joules
    assert last == said[-1]
    assert said == sorted(said)
    assert said[0] > first


def test_a_shared_gpu_counts_by_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Parallel(world_size=2, device=torch.device("cuda"), gpu_share=0.25).num_gpus == 0.5
    readings = iter([0.0, 8.0])
    monkeypatch.setattr("raysyn.training_run.gpu_energy_joules", lambda index: next(readings))
    progress = Progress()
    _Energy(OneGPU(gpu_share=0.25)).add_to(progress)
    assert progress.energy_joules == 2


@pytest.mark.parametrize("reading", [None, 5.0])
def test_energy_that_nobody_tells_is_unknown(
    reading: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([5.0, reading, *[7.0] * 50])
    monkeypatch.setattr("raysyn.training_run.gpu_energy_joules", lambda index: next(readings))
    state, objective = make()
    assert run(state, objective, CONFIG, store_at(tmp_path), OneGPU())
    assert state.progress.energy_joules == (None if reading is None else 2.0)
    assert fitted(CONFIG, tmp_path / "cpu").progress.energy_joules is None
