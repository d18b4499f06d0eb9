"""A fit is resumed without a trace; checkpoints are whole or absent, damaged ones passed over."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from raysyn.data.storage import Storage
from raysyn.diffusion.ema import EMA
from raysyn.training import build_optimizer
from raysyn.training_run import Hooks, run
from raysyn.training_state import TrainState, folder_of, progress_to_json
from raysyn.types import UserError
from tests.regression import CONFIG, Objective, fitted, make, store_at


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


def test_pruning_leaves_what_a_run_that_is_ahead_has_written(tmp_path: Path) -> None:
    """On an object store two runs on two machines are not kept apart; the later one resumes from what is newest."""
    behind, ahead = store_at(tmp_path, keep=1), store_at(tmp_path, keep=1)
    state, _ = make()
    for store, step in ((ahead, 8), (behind, 2), (behind, 4)):
        store.save(step, state.tensors(), {"progress": progress_to_json(state.progress)})
        store.flush()
    assert ahead.steps() == [4, 8]
    ahead.save(10, state.tensors(), {"progress": progress_to_json(state.progress)})
    ahead.flush()
    assert ahead.steps() == [10]


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
