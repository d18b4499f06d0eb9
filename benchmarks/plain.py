"""What others are measured against, and how: the published procedure to the letter, and ratios of alternating rounds.

Only torch is needed, so that it runs where little else does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from raysyn.diffusion.noise import karras_sigmas, seeded_noise
from raysyn.diffusion.precondition import Denoiser
from raysyn.nets.blocks import Block, ResampleConv
from raysyn.nets.norm import GroupNorm
from raysyn.nets.spade import Conditioning, Spade

PLAIN_BATCH = 2


def _plain_norm(layer: GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """GroupNorm(x), modulated by the noise level."""
    y = F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
    return y if scale is None or shift is None else y * scale + shift


def _plain_spade(layer: Spade, x: Tensor, conditioning: Conditioning, *noise: Tensor) -> Tensor:
    """GroupNorm(x)·(1+γ(m))+β(m), modulated by the noise level."""
    hidden = layer.mlp_shared(conditioning.at(tuple(x.shape[2:])))
    y = layer.norm(x) * (1 + layer.mlp_gamma(hidden)) + layer.mlp_beta(hidden)
    return y * noise[0] + noise[1] if noise else y


def _plain_filter(layer: ResampleConv, x: Tensor, *, up: bool, pad: int) -> Tensor:
    """The depthwise filter with stride 2; up: transposed, with gain 4."""
    taps = layer.resample_filter.tile([x.shape[1], 1, 1, 1])
    if up:
        return F.conv_transpose2d(x, taps * 4, groups=x.shape[1], stride=2, padding=pad)
    return F.conv2d(x, taps, groups=x.shape[1], stride=2, padding=pad)


def _plain_attention(block: Block, h: Tensor, conditioning: Conditioning) -> Tensor:
    """softmax(qk/√C_head) v, then the projection and the residual."""
    batch, channels, height, width = h.shape
    qkv = block.qkv(block.norm2(h, conditioning))
    q, k, v = qkv.reshape(batch * block.num_heads, channels // block.num_heads, 3, height * width).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5).softmax(2)
    attended = torch.einsum("nqk,nck->ncq", weights, v).reshape(h.shape)
    return (block.proj(attended) + h) * block.skip_scale


@contextmanager
def plain_layers() -> Iterator[None]:
    """Within it, layers compute as REFERENCE writes them, without what our own do to be faster."""
    changes = [
        (GroupNorm, "forward", _plain_norm),
        (Spade, "forward", _plain_spade),
        (ResampleConv, "_filter", _plain_filter),
        (Block, "_attend", _plain_attention),
    ]
    own = [(cls, name, getattr(cls, name)) for cls, name, _ in changes]
    for cls, name, function in changes:
        setattr(cls, name, function)
    try:
        yield
    finally:
        for cls, name, function in own:
            setattr(cls, name, function)


def _at(x: Tensor, sigma: float) -> Tensor:
    """σ on x's device: copied from the CPU the device would be waited for, which the published procedure does not do."""
    return torch.full((), sigma, dtype=torch.float32, device=x.device)


@torch.inference_mode()
@plain_layers()
def plain_heun(
    denoiser: Denoiser,
    one_hot: Tensor,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    num_steps: int,
    low: float,
    high: float,
) -> Tensor:
    """The published procedure, from REFERENCE: batches of 2, plain layers, SPADE at every evaluation, fp64 state."""
    parts = []
    sigmas = karras_sigmas(num_steps, sigma_min=low, sigma_max=high).tolist()
    for start in range(0, len(seeds), PLAIN_BATCH):
        maps = one_hot[start : start + PLAIN_BATCH]
        x = seeded_noise(seeds[start : start + PLAIN_BATCH], shape).double().to(maps.device) * sigmas[0]
        for sigma, lower in pairwise(sigmas):
            slope = (x - denoiser(x.float(), _at(x, sigma), maps).double()) / sigma
            euler = x + (lower - sigma) * slope
            if lower > 0:
                slope = 0.5 * (slope + (euler - denoiser(euler.float(), _at(x, lower), maps).double()) / lower)
            x = x + (lower - sigma) * slope
        parts.append(x)
    return torch.cat(parts).float()


def ratio(
    ours: Callable[[], object],
    other: Callable[[], object],
    rounds: int = 5,
    finish: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], float, float]:
    """(ratios other/ours of alternating rounds, median seconds of ours, of the other's), after one warm-up each.

    `finish` waits for the device, so that what was begun is counted; a `clock` of CPU time leaves out what other
    processes take of a machine.
    """
    ours(), other(), finish()
    times = []
    for _ in range(rounds):
        pair = []
        for procedure in (ours, other):
            started = clock()
            procedure(), finish()
            pair.append(clock() - started)
        times.append(pair)
    seconds = [statistics.median(t[i] for t in times) for i in (0, 1)]
    return [t[1] / t[0] for t in times], seconds[0], seconds[1]
