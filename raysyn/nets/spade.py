"""SPADE (Park 2019, arXiv:1903.07291): normalisation whose scale and shift are drawn from a label map."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.labels import NUM_CHANNELS
from raysyn.nets.norm import GroupNorm


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


class Table(NamedTuple):
    """A modulation kept once for each distinct neighbourhood of labels: (1+γ, β) [C, U], and which of the U a pixel has."""

    scale: Tensor
    shift: Tensor
    index: Tensor  # int32 [B, H, W]

    def maps(self) -> Modulation:
        """(1+γ, β), each [B, C, H, W]."""
        index = self.index.flatten()
        batch, *size = self.index.shape
        scale, shift = (t.index_select(1, index).unflatten(1, (batch, *size)) for t in (self.scale, self.shift))
        return scale.transpose(0, 1), shift.transpose(0, 1)


Kept = Modulation | Table | None


@dataclass
class Plan:
    """How the modulation of a layer may be kept: in `bytes`, as maps, or as a table of `places` where that is smaller."""

    layer: Spade
    side: int
    gain: float  # work saved
    maps: int  # bytes of it as maps
    bytes: int
    places: Neighbourhoods | None


def affordable(plans: list[Plan], budget_bytes: float) -> tuple[list[Plan], float]:
    """The plans that fit into the budget by most work saved a byte, and what of it is left.

    What is left makes maps of tables, which are slower to use, first where a table saves the least.
    """
    chosen = []
    for plan in sorted(plans, key=lambda plan: (-plan.gain / plan.bytes, plan.layer.index)):
        if plan.bytes <= budget_bytes:
            chosen.append(plan)
            budget_bytes -= plan.bytes
    for i in sorted(range(len(chosen)), key=lambda i: -chosen[i].bytes / chosen[i].maps):
        plan = chosen[i]
        if plan.places is not None and plan.maps - plan.bytes <= budget_bytes:
            budget_bytes -= plan.maps - plan.bytes
            chosen[i] = replace(plan, bytes=plan.maps, places=None)
    return chosen, budget_bytes


class Neighbourhoods:
    """The distinct (2r+1) x (2r+1) neighbourhoods in label maps [B, L, H, W]: all that r = 2 convolutions' outputs see.

    A pixel beyond the border is a label of its own, as SPADE's hidden maps are zero there and not computed.
    `index` int32 [B, H, W] in 0 to U-1; `first` int64 [U], the flat place of one pixel of each. None of both where the
    maps are not one-hot (or zero) in every pixel.
    """

    def __init__(self, one_hot: Tensor, radius: int) -> None:
        channels, height, width = one_hot.shape[1:]
        self.index: Tensor | None = None
        if one_hot.is_meta or not bool(((one_hot == 0) | (one_hot == 1)).all()) or one_hot.sum(1).max() > 1:
            return
        label = (one_hot * torch.arange(1, channels + 1, device=one_hot.device)[:, None, None]).sum(1).long()
        label = F.pad(label, (radius,) * 4, value=channels + 1)
        rows = self._code([label[:, :, j : j + width] for j in range(2 * radius + 1)])
        code = self._code([rows[:, i : i + height] for i in range(2 * radius + 1)])
        count = int(code.max()) + 1
        places = torch.arange(code.numel(), device=code.device)
        start = places.new_full((count,), code.numel())
        self.first = start.scatter_reduce(0, code.flatten(), places, "amin")
        self.index = code.int()

    @staticmethod
    def _code(parts: list[Tensor]) -> Tensor:
        """One number for each distinct tuple of the parts' values; renumbered at each step, so none can overflow."""
        code = parts[0]
        for part in parts[1:]:
            code = torch.unique(code * (int(part.max()) + 1) + part, return_inverse=True)[1]
        return code


class Conditioning:
    """What every layer is told of one batch: its label maps, resized once a resolution, with the modulations computed
    beforehand, if any, and in training the samples' seeds [B], from which their dropout is drawn."""

    def __init__(self, one_hot: Tensor, modulations: list[Kept] | None = None, seeds: Tensor | None = None) -> None:
        self.one_hot, self.modulations, self.seeds = one_hot, modulations, seeds
        self._resized: dict[tuple[int, ...], Tensor] = {}
        self._dropouts = 0

    def dropout(self, h: Tensor, probability: float) -> Tensor:
        """Dropout of h [B, …]; given seeds, a sample's mask is its own, the same in any batch and on any rank."""
        self._dropouts += 1
        if self.seeds is None or probability == 0:
            return F.dropout(h, probability)
        return torch.where(keep_mask(self.seeds, self._dropouts, h.shape[1:], probability), h / (1 - probability), 0.0)

    def at(self, size: tuple[int, ...]) -> Tensor:
        """The label maps at `size` (H, W), nearest neighbour."""
        if tuple(self.one_hot.shape[2:]) == tuple(size):
            return self.one_hot
        if size not in self._resized:
            self._resized[size] = F.interpolate(self.one_hot, size=size, mode="nearest")
        return self._resized[size]


def keep_mask(seeds: Tensor, layer: int, shape: tuple[int, ...], probability: float) -> Tensor:
    """True where a value is kept, bool [B, *shape]: a hash of each sample's seed, the layer and the place.

    Mixed well are the B and the places apart; of all B x places it takes an exclusive or and a product, whose upper bits
    count: a fifth of the time of mixing each.
    """
    places = _mix(torch.arange(math.prod(shape), device=seeds.device))
    hashed = (_mix(seeds + layer)[:, None] ^ places) * -0x61C8864680B583EB
    return hashed.reshape(-1, *shape) >= min(int(probability * 2**64) - 2**63, 2**63 - 1)


def _mix(z: Tensor) -> Tensor:
    """The mixing of splitmix64 (Steele 2014) on int64, whose products wrap round."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)


class Spade(nn.Module):
    """GroupNorm(x)·(1+γ(m))+β(m): m the label map, conv3x3 to `hidden`, ReLU, one convolution each for γ and β.

    γ and β depend on the mask alone, not on x or the noise level, so `modulation` may be computed once for all steps.
    """

    def __init__(self, channels: int, label_channels: int, hidden: int, kernel: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm = GroupNorm(num_groups(channels), channels, eps=1e-5)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_channels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, kernel, padding=kernel // 2)
        self.mlp_beta = nn.Conv2d(hidden, channels, kernel, padding=kernel // 2)

    def modulation(self, label: Tensor) -> Modulation:
        """(1+γ, β), each [B, C, H, W], for label maps [B, L, H, W] at this layer's size."""
        hidden = self.mlp_shared(label)
        return 1 + self.mlp_gamma(hidden), self.mlp_beta(hidden)

    def cost(self, pixels: int) -> int:
        """Floating-point operations of `modulation` over so many pixels, 2 a multiply-add."""
        shared = self.mlp_shared[0].weight.numel()
        return 2 * pixels * (shared + self.mlp_gamma.weight.numel() + self.mlp_beta.weight.numel())

    def tabled(self, full: Modulation, places: Neighbourhoods) -> Table | None:
        """`full` kept once a neighbourhood; None unless every bit of it comes back (some convolutions round by place)."""
        if places.index is None:
            return None
        scale, shift = (t.transpose(0, 1).flatten(1).index_select(1, places.first) for t in full)
        table = Table(scale, shift, places.index)
        return table if all(torch.equal(a, b) for a, b in zip(table.maps(), full, strict=True)) else None

    def forward(
        self, x: Tensor, conditioning: Conditioning, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """[B, C, H, W] -> the same; `scale` and `shift` [B, C, 1, 1], those of the noise level, are applied last."""
        known = conditioning.modulations[self.index] if conditioning.modulations is not None else None
        if isinstance(known, Table):
            known = known.maps()
        gamma, beta = known if known is not None else self.modulation(conditioning.at(tuple(x.shape[2:])))
        h = torch.addcmul(beta.to(x.dtype), self.norm(x), gamma.to(x.dtype))
        return h if scale is None or shift is None else torch.addcmul(shift, h, scale)
