"""SPADE (Park 2019, arXiv:1903.07291): normalisation whose scale and shift are drawn from a label map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.labels import NUM_CHANNELS


def num_groups(channels: int) -> int:
    """min(32, C/4) groups, or the next smaller number that divides the channels."""
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return groups


def one_hot_from_index(index: Tensor) -> Tensor:
    """Conditioning from `raysyn.labels.semantic_index`: uint8 [B, H, W] with values 0 to 9 -> float32 [B, 10, H, W]."""
    channels = torch.arange(NUM_CHANNELS, device=index.device, dtype=index.dtype)
    return (index[:, None] == channels[None, :, None, None]).float()


Modulation = tuple[Tensor, Tensor]


class Conditioning:
    """The label maps of one batch: resized once a resolution, with the modulations computed beforehand, if any."""

    def __init__(self, one_hot: Tensor, modulations: list[Modulation | None] | None = None) -> None:
        self.one_hot, self.modulations = one_hot, modulations
        self._resized: dict[tuple[int, ...], Tensor] = {}

    def at(self, size: tuple[int, ...]) -> Tensor:
        """The label maps at `size` (H, W), nearest neighbour."""
        if tuple(self.one_hot.shape[2:]) == tuple(size):
            return self.one_hot
        if size not in self._resized:
            self._resized[size] = F.interpolate(self.one_hot, size=size, mode="nearest")
        return self._resized[size]


class Spade(nn.Module):
    """GroupNorm(x)·(1+γ(m))+β(m): m the label map, conv3x3 to `hidden`, ReLU, one convolution each for γ and β.

    γ and β depend on the mask alone, not on x or the noise level, so `modulation` may be computed once for all steps.
    """

    def __init__(self, channels: int, label_channels: int, hidden: int, kernel: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.GroupNorm(num_groups(channels), channels, eps=1e-5)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_channels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, kernel, padding=kernel // 2)
        self.mlp_beta = nn.Conv2d(hidden, channels, kernel, padding=kernel // 2)

    def modulation(self, label: Tensor) -> Modulation:
        """(1+γ, β), each [B, C, H, W], for label maps [B, L, H, W] at this layer's size."""
        hidden = self.mlp_shared(label)
        return 1 + self.mlp_gamma(hidden), self.mlp_beta(hidden)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        known = conditioning.modulations[self.index] if conditioning.modulations is not None else None
        scale, shift = known if known is not None else self.modulation(conditioning.at(tuple(x.shape[2:])))
        return torch.addcmul(shift.to(x.dtype), self.norm(x), scale.to(x.dtype))
