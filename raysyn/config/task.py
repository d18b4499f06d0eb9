"""A downstream task, and the search of its set-up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raysyn.config.checks import INF, MAX_SEED, one_of, within
from raysyn.types import UserError


@dataclass
class TaskConfig:
    """A downstream task: `arch` is dynunet, unet:<timm encoder> or (classification) any timm model.

    `augmentation` affine moves image and map alike and varies the grey levels; randaugment (classification, as
    published) draws two operations a frame (arXiv:1909.13719). `augment_strength` 0 turns either off.
    `amp` bf16 is fp32 on devices without bf16 arithmetic.
    """

    kind: str = "segmentation"
    arch: str = "dynunet"
    width: int = 32
    weights: str = ""
    num_epochs: int = 250
    num_steps: int = 0
    batch_size: int = 128
    lr: float = 1e-4
    weight_decay: float = 0.01
    lr_decay: str = "none"
    loss: str = "cross_entropy"
    normalise: str = "range"
    augmentation: str = "affine"
    augment_strength: float = 1.0
    amp: str = "none"
    channels_last: bool = False
    real_fraction: float = 0.0
    mixing: str = "together"
    validate_on: str = "synthetic"
    validate_every_epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self, kind=("segmentation", "classification"), loss=("cross_entropy", "dice_cross_entropy"))
        one_of(self, mixing=("together", "synthetic_then_real"), validate_on=("synthetic", "real"))
        one_of(self, amp=("none", "bf16"), lr_decay=("none", "cosine"), augmentation=("affine", "randaugment"))
        one_of(self, normalise=("range", "zscore"))
        within(self, batch_size=(1, 65536), lr=(1e-12, 10), real_fraction=(0, 1), augment_strength=(0, 10))
        if self.kind == "segmentation" and self.augmentation == "randaugment":
            raise UserError("augmentation: randaugment moves images without their maps; segmentation takes affine")
        within(self, num_epochs=(1, INF), num_steps=(0, INF), width=(1, 4096), weight_decay=(0, 1e3))
        within(self, validate_every_epochs=(1, INF), seed=(0, MAX_SEED))


@dataclass
class SearchConfig:
    """Search of a task set-up. `space` maps a key of the task to low/high/log, choices, or values of other sets."""

    num_trials: int = 20
    max_concurrent: int = 2
    objectives: list[str] = field(default_factory=lambda: ["score"])
    scheduler: str = "none"
    pruning_grace_epochs: int = 5
    optuna_url: str = ""
    num_refits: int = 3
    space: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self, scheduler=("none", "asha", "median"))
        within(self, num_trials=(1, 1e6), max_concurrent=(1, 1e5), num_refits=(0, 1000))
        within(self, pruning_grace_epochs=(1, 1e6), seed=(0, MAX_SEED))
        if self.objectives not in (["score"], ["score", "cost"]):
            raise UserError(f"objectives: {self.objectives} is neither [score] nor [score, cost]")
