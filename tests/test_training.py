"""The loop: gradient of the global batch, resume without a trace, divergence, rollback, checkpoints whole or absent."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raysyn.config import AugmentConfig, FitConfig
from raysyn.data.storage import Storage
from raysyn.diffusion.ema import EMA
from raysyn.training import Diverged, Parallel, SampleLosses, StepReport, build_optimizer, learning_rate, train
from raysyn.training_batches import NOISE, Batch, frames_at, normal_noise, uniform
from raysyn.training_run import Hooks, _Energy, averaged, run, validation_loss
from raysyn.training_state import CheckpointStore, Progress, TrainState, folder_of
from raysyn.types import UserError

CONFIG = FitConfig(
    num_images=240,
    global_batch=12,
    micro_batch=12,
    lr=1e-2,
    ema_half_life_images=60,
    checkpoint_every_steps=5,
    validate_every_steps=5,
    num_validation_images=8,
    log_every_steps=4,
    sample_every_steps=10,
)
FRAMES = 30


class Regression(nn.Module):
    """Per-sample squared error of a small net on noise that belongs to the position."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.poison: dict[int, float] = {}

    def forward(self, batch: Batch) -> SampleLosses:
        assert batch.noise is not None
        assert batch.uniform is not None
        target = batch.noise.flatten(1)[:, :1].sin()
        losses = (self.net(batch.noise.flatten(1)) - target).square().mean(1)
        factor = torch.tensor([self.poison.get(int(p), 1.0) for p in batch.positions])
        losses = losses * factor
        return SampleLosses(losses.sum(), losses.detach(), {"error": losses.detach()}, 10 * batch.uniform)


class Objective:
    """A fit small enough to compare runs to the last bit; notes every position that it was asked for."""

    part_names: tuple[str, ...] = ("error",)
    num_validation = 8

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
        self.module = Regression(self.model)
        self.asked: list[int] = []

    def batch(self, positions: np.ndarray, salt: int) -> Batch:
        self.asked += positions.tolist()
        return self._batch(positions, salt)

    def validation_batch(self, positions: np.ndarray) -> Batch:
        return self._batch(positions, 77)

    def _batch(self, positions: np.ndarray, seed: int) -> Batch:
        frame, _ = frames_at(positions, FRAMES, 0)
        noise = normal_noise(seed, NOISE, frame, (1, 2, 2))
        u = torch.from_numpy(uniform(seed, NOISE, positions))
        return Batch(torch.from_numpy(positions), torch.zeros(len(positions), 2, 2), noise=noise, uniform=u)


def make(config: FitConfig = CONFIG) -> tuple[TrainState, Objective]:
    objective = Objective()
    ema = EMA(objective.model, config.ema_half_life_images)
    return TrainState(objective.model, build_optimizer(objective.model, config), ema), objective


def store_at(path: Path, keep: int = 2, key: str = "k") -> CheckpointStore:
    return CheckpointStore(Storage.at(path), key, keep)


def fitted(config: FitConfig, path: Path) -> TrainState:
    state, objective = make(config)
    assert run(state, objective, config, store_at(path))
    return state


def test_micro_batches_give_the_gradient_of_the_global_batch() -> None:
    curves = []
    for micro in (12, 5, 1):
        config = dataclasses.replace(CONFIG, micro_batch=micro)
        state, objective = make(config)
        curves.append([r.loss for r in train(state, objective, config)])
    assert len(curves[0]) == CONFIG.num_steps == 20
    assert np.allclose(curves[0], curves[1], rtol=1e-5)
    assert np.allclose(curves[0], curves[2], rtol=1e-5)


def test_one_step_is_plain_sgd_on_the_mean_loss() -> None:
    config = dataclasses.replace(CONFIG, optimizer="sgd", momentum=0.0, lr=0.1, micro_batch=4)
    state, objective = make(config)
    by_hand = Objective()
    next(iter(train(state, objective, config)))
    loss = by_hand.module(by_hand.batch(np.arange(12), 0)).total / 12
    loss.backward()
    for p, q in zip(by_hand.model.parameters(), objective.model.parameters()):
        assert p.grad is not None
        assert torch.allclose(p - 0.1 * p.grad, q, atol=1e-6)


def test_ranks_together_see_the_batch_once_and_make_its_gradient() -> None:
    """Two ranks one after the other in this process: what DDP would average is the gradient of one rank alone."""
    alone, whole = Objective(), make()[1]
    alone.module(alone.batch(np.arange(12), 0)).total.div(12).backward()
    gradients = []
    for rank in (0, 1):
        state, objective = make()
        parallel = Parallel(rank, 2, all_reduce=lambda v: v)
        steps = train(state, objective, dataclasses.replace(CONFIG, grad_clip=1e9), parallel)
        next(steps)
        gradients.append([p.grad.clone() for p in objective.model.parameters() if p.grad is not None])
        whole.asked += objective.asked[:6]
        steps.close()
    for p, a, b in zip(alone.model.parameters(), *gradients):
        assert p.grad is not None
        assert torch.allclose(p.grad, (a + b) / 2, atol=1e-6)
    assert whole.asked == list(range(12))


def test_reports_say_what_happened() -> None:
    state, objective = make()
    reports: list[StepReport] = list(train(state, objective, CONFIG))
    assert [r.step for r in reports] == list(range(1, 21))
    assert reports[-1].images_seen == 240
    assert reports[-1].loss < 0.5 * reports[0].loss
    for r in reports:
        assert r.parts["error"] == pytest.approx(r.loss)
        assert r.grad_norm > 0
        assert len(r.sigma_losses) == 5
    assert objective.asked == list(range(240))


def test_losses_by_noise_level_are_means_of_their_buckets() -> None:
    state, objective = make()
    batch = objective.batch(np.arange(12), 0)
    losses = objective.module(batch)
    assert losses.sigma is not None
    report = next(iter(train(state, objective, CONFIG)))
    edges = [0, 0.05, 0.2, 0.8, 3.0, math.inf]
    for low, high, mean in zip(edges, edges[1:], report.sigma_losses):
        inside = (losses.sigma > low) & (losses.sigma <= high)
        if inside.any():
            assert mean == pytest.approx(float(losses.loss[inside].mean()), rel=1e-5)
        else:
            assert math.isnan(mean)


def test_learning_rate_warms_up_and_decays() -> None:
    config = FitConfig(num_images=1000, global_batch=10, lr=1.0, warmup_images=100, lr_decay="cosine")
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 40) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.04)))
    assert learning_rate(config, 500) == pytest.approx(0.5)
    assert learning_rate(config, 1000) == pytest.approx(0.0)
    assert learning_rate(FitConfig(lr=0.3), 12345) == 0.3


def test_clipping_bounds_the_step_and_the_report_has_the_norm_before_it() -> None:
    config = dataclasses.replace(CONFIG, optimizer="sgd", momentum=0.0, lr=1.0, grad_clip=1e-3)
    state, objective = make(config)
    before = [p.detach().clone() for p in objective.model.parameters()]
    report = next(iter(train(state, objective, config)))
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(objective.model.parameters(), before)]).norm()
    assert report.grad_norm > 1e-2
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_stopped_fit_goes_on_as_if_it_had_never_stopped(tmp_path: Path, optimizer: str) -> None:
    config = dataclasses.replace(CONFIG, optimizer=optimizer, lr_decay="cosine")
    undisturbed = fitted(config, tmp_path / "a")
    asked: list[int] = []
    for stop_at in (3, 11, 99):
        state, objective = make(config)
        first = state.progress
        hooks = Hooks(should_stop=lambda: state.progress.step + 1 == stop_at)  # noqa: B023
        done = run(state, objective, config, store_at(tmp_path / "b"), hooks=hooks)
        assert done == (stop_at == 99)
        assert state.progress is not first or stop_at == 3
        asked += [p for p in objective.asked if p < state.progress.images_seen]
    assert asked == list(range(240)), "no image twice, none missed"
    assert state.progress.losses == undisturbed.progress.losses
    assert state.progress.validations == undisturbed.progress.validations
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name])
        assert torch.equal(undisturbed.ema.average[name], state.ema.average[name])


def test_what_is_loaded_lies_in_memory_as_the_weights_do() -> None:
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState(net, torch.optim.AdamW(net.parameters()), EMA(net, 1.0))
    net(torch.ones(1, 3, 4, 4)).sum().backward()
    state.optimizer.step()
    state.load(state.tensors(), dataclasses.asdict(state.progress))
    for p, entry in state.optimizer.state.items():
        assert {v.stride() for v in entry.values() if v.shape == p.shape} == {p.stride()}
    assert torch.equal(state.optimizer.state[net.weight]["exp_avg"], 0.1 * net.weight.grad)


def test_last_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    state, _ = make()
    store = store_at(tmp_path, keep=1)
    for step, best in ((5, 5), (10, 10), (15, 10), (20, 10)):
        state.progress.step, state.progress.best_step = step, best
        store.save(step, state.tensors(), {"progress": dataclasses.asdict(state.progress)})
    store.flush()
    assert store.steps() == [10, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder_of(10), folder_of(20)]


def test_the_best_validation_gets_a_checkpoint_whatever_the_periods(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_every_steps=9, validate_every_steps=7, keep_checkpoints=1)
    state, objective = make(config)
    assert run(state, objective, config, store_at(tmp_path, keep=1))
    best = min(state.progress.validations, key=lambda entry: entry[1])
    assert (state.progress.best_step, state.progress.best_validation) == best
    assert [s for s, _ in state.progress.validations] == [7, 14, 20]
    assert best[0] in store_at(tmp_path).steps()


def test_what_a_killed_writer_left_unfinished_is_cleared_away(tmp_path: Path) -> None:
    torn = tmp_path / folder_of(7) / "model.safetensors"
    torn.parent.mkdir()
    torn.write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("not a checkpoint")
    fitted(CONFIG, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", folder_of(15), folder_of(20)]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no_mark", "cut_mark", "empty_mark", "other_mark"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    undisturbed = fitted(CONFIG, tmp_path)
    assert store_at(tmp_path).steps() == [15, 20]
    file = tmp_path / folder_of(20) / "model.safetensors"
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-10])
    elif damage == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    elif damage.endswith("_mark") and damage != "no_mark":
        mark = tmp_path / folder_of(20) / "checkpoint.json"
        mark.write_bytes({"cut": mark.read_bytes()[:-30], "empty": b"", "other": b"{}"}[damage.removesuffix("_mark")])
    else:
        (tmp_path / folder_of(20) / "checkpoint.json").unlink()
    newest = store_at(tmp_path).newest()
    assert newest is not None
    assert newest.step == 15
    again = fitted(CONFIG, tmp_path)
    assert again.progress.losses == undisturbed.progress.losses


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    fitted(CONFIG, tmp_path)
    state, objective = make()
    with pytest.raises(UserError, match="belongs to another config"):
        run(state, objective, CONFIG, store_at(tmp_path, key="other"))


def test_no_space_for_a_checkpoint_is_said_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Storage, name: str, data: bytes) -> None:
        raise UserError(f"{name}: no space left on that device")

    monkeypatch.setattr(Storage, "write_atomic", full)
    state, objective = make()
    with pytest.raises(UserError, match="no space left"):
        run(state, objective, CONFIG, store_at(tmp_path))
    assert store_at(tmp_path).steps() == []


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


def test_dropout_is_drawn_by_step_so_that_a_resume_repeats_it(tmp_path: Path) -> None:
    def with_dropout() -> tuple[TrainState, Objective]:
        objective = Objective()
        objective.model.insert(1, nn.Dropout(0.5))  # type: ignore[attr-defined]
        return TrainState(
            objective.model, build_optimizer(objective.model, CONFIG), EMA(objective.model, 60)
        ), objective

    state, objective = with_dropout()
    assert run(state, objective, CONFIG, store_at(tmp_path / "a"))
    first, objective_b = with_dropout()
    torch.rand(7)  # another history of the global generator
    assert not run(first, objective_b, CONFIG, store_at(tmp_path / "b"), hooks=Hooks(should_stop=lambda: True))
    second, objective_c = with_dropout()
    assert run(second, objective_c, CONFIG, store_at(tmp_path / "b"))
    assert second.progress.losses == state.progress.losses


def test_augmentation_of_nothing_is_known() -> None:
    from raysyn.training_batches import is_identity

    assert is_identity(AugmentConfig(False, 0, 0, 1, 1))
    assert not is_identity(AugmentConfig(True, 0, 0, 1, 1))
