"""Exponential moving average of weights with its half-life given in images seen, so that batch size does not matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Averages of a net's parameters, fp32, kept beside them. A half-life of 0 copies the raw weights."""

    def __init__(self, net: nn.Module, half_life_images: float) -> None:
        self.half_life_images = half_life_images
        self.average = {name: p.detach().clone().float() for name, p in net.named_parameters()}

    def decay(self, images: int) -> float:
        """Weight of the past after `images` more images: ½^(images / half-life)."""
        return 0.5 ** (images / self.half_life_images) if self.half_life_images > 0 else 0.0

    @torch.no_grad()
    def update(self, net: nn.Module, images: int) -> None:
        """Move the averages towards the net's weights after a step that saw `images` images."""
        weight = 1 - self.decay(images)
        parameters = dict(net.named_parameters())
        targets = [parameters[name].float() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), targets, weight)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        """Put the averages into a net of the same parameters."""
        for name, p in net.named_parameters():
            p.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        """Averages and half-life."""
        return {"half_life_images": self.half_life_images, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises KeyError for another net's."""
        average: dict[str, Tensor] = state["average"]
        for name, value in self.average.items():
            value.copy_(average[name])
        self.half_life_images = state["half_life_images"]
