"""A regression for the training loop, fitted in no time."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from raysyn.config import FitConfig
from raysyn.data.storage import Storage
from raysyn.diffusion.ema import EMA
from raysyn.training import SampleLosses, build_optimizer
from raysyn.training_batches import NOISE, Batch, frames_at, normal_noise, uniform
from raysyn.training_run import run
from raysyn.training_state import CheckpointStore, TrainState

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
