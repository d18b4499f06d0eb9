"""Training losses: λ(σ)·‖D(x0 + σn; σ) − x0‖², and SDM's hybrid with a learned variance (arXiv:2102.09672)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raysyn.diffusion.precondition import IDDPM, Denoiser

VLB_WEIGHT = 0.001


@dataclass
class LossReport:
    """`loss` is the batch mean (scalar); `per_sample` [B] and `sigma` [B] are detached, for the log."""

    loss: Tensor
    per_sample: Tensor
    sigma: Tensor


def diffusion_loss(
    denoiser: Denoiser,
    x0: Tensor,
    one_hot: Tensor,
    generator: torch.Generator | None = None,
    *,
    label_dropout: float = 0.0,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    drop: Tensor | None = None,
) -> LossReport:
    """Loss of one batch: x0 [B, 1, H, W] with standard deviation about 0.5, one_hot [B, 10, h, w].

    σ [B], noise like x0 and `drop` [B] bool (which maps become the null mask) are drawn from `generator` unless given.
    """
    batch, device = x0.shape[0], x0.device
    if sigma is None:
        sigma = denoiser.precondition.draw_sigma(batch, generator)
    if noise is None:
        noise = torch.randn(x0.shape, generator=generator)
    if drop is None and label_dropout > 0:
        drop = torch.rand(batch, generator=generator) < label_dropout
    sigma, noise = sigma.to(device, torch.float32), noise.to(device, torch.float32)
    if drop is not None:
        one_hot = one_hot * (~drop.to(device))[:, None, None, None].to(one_hot.dtype)
    column = sigma.reshape(-1, 1, 1, 1)
    x = x0 + column * noise
    denoised, v = denoiser.with_variance(x, sigma, one_hot)
    per_sample = denoiser.precondition.loss_weight(sigma) * (denoised - x0).square().flatten(1).mean(1)
    if v is not None:
        assert isinstance(denoiser.precondition, IDDPM), "a learned variance belongs to the iDDPM formulation"
        per_sample = per_sample + VLB_WEIGHT * vlb_term(denoiser.precondition, x0, x, denoised.detach(), v, sigma)
    return LossReport(per_sample.mean(), per_sample.detach(), sigma)


def vlb_term(precondition: IDDPM, x0: Tensor, x: Tensor, denoised: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """L_vlb of each sample [B] in bits a dimension, times M: KL of the step, or at the end the likelihood.

    Two Gaussians with means that mix x with x0 and with D by σ'²/σ², the variance of the second interpolated by v.
    """
    index = precondition.index(sigma)
    lower = precondition.table[index + 1].to(sigma.dtype)
    last = lower == 0
    # At the last step β̃ is 0: the variance head is read against the level before it, as in the paper's clipping.
    floor = precondition.table[precondition.num - 1].to(sigma.dtype) * 0.5
    low, s, lo = (t.reshape(-1, 1, 1, 1) for t in (lower.clamp(min=floor), sigma, lower))
    gap = (s**2 - low**2).clamp(min=1e-12)
    small, large = (low**2 * gap / s**2).log(), (gap * (1 + low**2) / (1 + s**2)).log()
    log_variance = small + (v + 1) / 2 * (large - small)
    ratio = (lo / s) ** 2
    mean_true, mean_model = ratio * x + (1 - ratio) * x0, ratio * x + (1 - ratio) * denoised
    squared = (mean_true - mean_model).square()
    kl = 0.5 * (log_variance - small + (small - log_variance).exp() + squared * (-log_variance).exp() - 1)
    likelihood = -_discretised_log_likelihood(x0, mean_model, 0.5 * log_variance)
    bits = torch.where(last.reshape(-1, 1, 1, 1), likelihood, kl) / math.log(2)
    return bits.flatten(1).mean(1) * precondition.num / 1000


def _discretised_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log P of the grey level nearest to x0 in [−1, 1] (256 levels) under N(mean, std²), open at both ends."""
    half, inverse = 1 / 255, (-log_std).exp()
    upper = torch.special.ndtr((x0 + half - mean) * inverse)
    lower = torch.special.ndtr((x0 - half - mean) * inverse)
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()
