"""Noise: grids of levels for sampling (Table 1 of arXiv:2206.00364) and seeded draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raysyn.config import SamplerConfig
from raysyn.diffusion.precondition import IDDPM, Preconditioning, iddpm_table, vp_sigma
from raysyn.types import UserError

EPSILON_S = 1e-3


def _fractions(num_steps: int) -> Tensor:
    if num_steps < 1:
        raise UserError(f"num_steps: {num_steps} is below 1")
    return torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def karras_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """EDM grid, float64 [num_steps+1], falling, last 0: σ_i = (σ_max^{1/ρ} + i/(N−1)(σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _with_zero((high + _fractions(num_steps) * (low - high)) ** rho)


def vp_betas(sigma_min: float, sigma_max: float, epsilon_s: float = EPSILON_S) -> tuple[float, float]:
    """(β_d, β_min) for which σ(ε_s) = σ_min and σ(1) = σ_max."""
    low = torch.log1p(torch.tensor(sigma_min, dtype=torch.float64) ** 2).item()
    high = torch.log1p(torch.tensor(sigma_max, dtype=torch.float64) ** 2).item()
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    return beta_d, high - 0.5 * beta_d


def vp_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """VP grid, float64 [num_steps+1], last 0: σ(t_i), t_i = 1 + i/(N−1)(ε_s − 1), β re-derived from the range."""
    t = 1 + _fractions(num_steps) * (EPSILON_S - 1)
    return _with_zero(vp_sigma(t, *vp_betas(sigma_min, sigma_max)))


def ve_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """VE grid, float64 [num_steps+1], last 0: σ_i² = σ_max²(σ_min²/σ_max²)^{i/(N−1)}."""
    return _with_zero(sigma_max * (sigma_min / sigma_max) ** _fractions(num_steps))


def iddpm_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, table: Tensor | None = None) -> Tensor:
    """iDDPM grid, float64 [num_steps+1], last 0: every k-th of the table's levels within the range."""
    table = iddpm_table() if table is None else table
    inside = table[(table >= sigma_min) & (table <= sigma_max)]
    if len(inside) < num_steps:
        raise UserError(f"num_steps: {num_steps} is more than the {len(inside)} noise levels in the range")
    return _with_zero(inside[(_fractions(num_steps) * (len(inside) - 1)).round().long()])


RANGES = {"edm": (0.002, 80.0), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}


def sigma_range(sampler: SamplerConfig, precondition: Preconditioning) -> tuple[float, float]:
    """(σ_min, σ_max): the sampler's own, else the discretisation's, clipped to what the network supports.

    DDPM's ancestral chain visits every level of the iDDPM table, so it starts at u_0 and not at Table 1's 81.
    """
    t = torch.tensor([EPSILON_S, 1.0], dtype=torch.float64)
    low, high = RANGES.get(sampler.discretization) or tuple(vp_sigma(t).tolist())
    if sampler.solver == "ddpm" and sampler.discretization == "iddpm":
        high = float(_levels(precondition)[0])
    low = low if sampler.sigma_min is None else sampler.sigma_min
    high = high if sampler.sigma_max is None else sampler.sigma_max
    low, high = max(low, precondition.sigma_min), min(high, precondition.sigma_max)
    if low >= high:
        raise UserError(f"sigma_min: {low:g} is not below sigma_max {high:g} within what the network supports")
    return low, high


def _levels(precondition: Preconditioning) -> Tensor:
    """The table of the iDDPM discretisation: the network's own where it was trained on one."""
    return precondition.table.cpu() if isinstance(precondition, IDDPM) else iddpm_table()


def sigma_grid(sampler: SamplerConfig, precondition: Preconditioning) -> Tensor:
    """The levels that a sampler visits, float64 [num_steps+1], last 0, rounded to what the network supports."""
    low, high = sigma_range(sampler, precondition)
    n, kind = sampler.num_steps, sampler.discretization
    if kind == "edm":
        sigmas = karras_sigmas(n, sigma_min=low, sigma_max=high, rho=sampler.rho)
    elif kind == "iddpm":
        sigmas = iddpm_sigmas(n, sigma_min=low, sigma_max=high, table=_levels(precondition))
    else:
        sigmas = {"vp": vp_sigmas, "ve": ve_sigmas}[kind](n, sigma_min=low, sigma_max=high)
    rounded = _with_zero(precondition.round_sigma(sigmas[:-1].to(torch.float64)).cpu())
    if (rounded.diff() >= 0).any():
        raise UserError(f"num_steps: {n} steps fall on the same noise levels of this model; use fewer")
    return rounded


def noise_stream(seed: int, number: int = 0) -> Callable[[Sequence[int]], Tensor]:
    """Stream `number` of a seed's noise: a function (shape) -> standard normal, float32 on the CPU, new at each call.

    All 64 bits of the seed count; torch's CPU generator reads the lower 32 alone, and among 100,000 seeds two would agree.
    """
    sequence = np.random.SeedSequence(int(seed) % 2**64, spawn_key=(number,))
    generator = np.random.Generator(np.random.PCG64(sequence))
    return lambda shape: torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, float32 [B, *shape] on the CPU, each image's from its own seed."""
    return torch.stack([noise_stream(seed)(shape) for seed in seeds])
