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


def step_log_variances(table: Tensor) -> tuple[Tensor, Tensor]:
    """(ln β̃_j, ln β_j) of the steps from u_j to u_{j+1}, [M] each, in units of x (not scaled by √ᾱ).

    β̃ of the last step is 0; the one before stands in for it (arXiv:2102.09672).
    """
    square = table.square()
    s, lower = square[:-1], square[1:]
    gap = s - lower
    small = (lower * gap / s)[:-1].log()
    return torch.cat([small, small[-1:]]), (gap * (1 + lower) / (1 + s)).log()


def vlb_term(precondition: IDDPM, x0: Tensor, x: Tensor, denoised: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """L_vlb of each sample [B] in bits a dimension: M times the step's term, so its mean over σ is the sum over steps.

    The term is the KL of two Gaussians whose means mix x with x0 and with D by σ'²/σ², the variance of the second
    interpolated by v; at the last step it is the negative log likelihood of the grey level.
    """
    index = precondition.index(sigma)
    table = precondition.table.to(sigma.device)
    per_step = (*step_log_variances(table), (table[1:] / table[:-1]).square())
    small, large, ratio = (t[index].to(x.dtype).reshape(-1, 1, 1, 1) for t in per_step)
    log_variance = small + (v + 1) / 2 * (large - small)
    mean_true, mean_model = ratio * x + (1 - ratio) * x0, ratio * x + (1 - ratio) * denoised
    squared = (mean_true - mean_model).square()
    kl = 0.5 * (log_variance - small + (small - log_variance).exp() + squared * (-log_variance).exp() - 1)
    likelihood = -_discretised_log_likelihood(x0, mean_model, 0.5 * log_variance)
    last = (index == precondition.num - 1).reshape(-1, 1, 1, 1)
    bits = torch.where(last, likelihood, kl) / math.log(2)
    return bits.flatten(1).mean(1) * precondition.num


def _discretised_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log P of the grey level nearest to x0 in [−1, 1] (256 levels) under N(mean, std²), open at both ends."""
    half, inverse = 1 / 255, (-log_std).exp()
    upper = torch.special.ndtr((x0 + half - mean) * inverse)
    lower = torch.special.ndtr((x0 - half - mean) * inverse)
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()
