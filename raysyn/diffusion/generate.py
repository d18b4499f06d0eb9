"""From label maps and seeds to clean images (or latents): noise, guidance, modulations, one solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raysyn.config import SamplerConfig
from raysyn.diffusion.noise import noise_stream, seeded_noise, sigma_grid, sigma_range
from raysyn.diffusion.precondition import Denoiser, Preconditioning
from raysyn.diffusion.solvers import S_CHURN, SOLVERS
from raysyn.nets.precision import autocast
from raysyn.types import UserError


def num_network_evals(sampler: SamplerConfig, precondition: Preconditioning) -> int:
    """Evaluations of the network that an image costs: two where guidance applies, else one, counted by a solver's run.

    The run is of the sampler's own solver on one number. Raises UserError for a range or a grid that cannot be.
    """
    count = 0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal count
        count += 2 if _guides(sampler, sigma) else 1
        return torch.zeros_like(x)

    shape = (1, 1, 1)
    _solver(sampler)(
        denoise,
        torch.zeros(1, *shape),
        sigma_grid(sampler, precondition),
        **_solver_options(precondition, sampler, [0], shape),
    )
    return count


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    one_hot: Tensor,
    seeds: Sequence[int],
    sampler: SamplerConfig,
    *,
    shape: tuple[int, int, int],
    amp: str = "none",
    modulation_cache_bytes: float = 0.0,
) -> Tensor:
    """Sample x [B, *shape] fp32 (shape: channels, height, width of the model's own space) for maps [B, 10, H, W].

    Every random number of image i comes from seeds[i] alone; the solver's state is fp32, only the network runs in
    `amp` (`raysyn.nets.precision`). The modulations of SPADE are computed once and shared by all evaluations as far as
    the cache reaches.
    Raises UserError where maps and seeds differ in number.
    """
    if len(seeds) != one_hot.shape[0]:
        raise UserError(f"seeds: {len(seeds)} for {one_hot.shape[0]} label maps; give one a map")
    device = one_hot.device
    sigmas = sigma_grid(sampler, denoiser.precondition)
    x = (seeded_noise(seeds, shape) * sigmas[0]).float().to(device)
    with autocast(amp, device):
        denoise = _guided(denoiser, one_hot, sampler, modulation_cache_bytes)
        return _solver(sampler)(denoise, x, sigmas, **_solver_options(denoiser.precondition, sampler, seeds, shape))


def _guides(sampler: SamplerConfig, sigma: Tensor) -> bool:
    """Whether guidance applies at this noise level (the interval: arXiv:2404.07724)."""
    low, high = sampler.guidance_sigma_min, sampler.guidance_sigma_max
    if sampler.guidance_scale == 1.0 or (low, high) == (0.0, math.inf):
        return sampler.guidance_scale != 1.0  # without reading σ, for which the CPU would wait for the GPU
    return low <= float(sigma) <= high


def _conditional(denoiser: Denoiser, one_hot: Tensor, cache_bytes: float) -> Callable[[Tensor, Tensor], Any]:
    modulations = denoiser.modulations(one_hot, cache_bytes) if cache_bytes > 0 else None

    def denoise(x: Tensor, sigma: Tensor) -> Any:
        out, v = denoiser.with_variance(x, sigma, one_hot, modulations)
        return out if v is None else (out, v)

    return denoise


def _guided(denoiser: Denoiser, one_hot: Tensor, sampler: SamplerConfig, cache_bytes: float) -> Callable:
    """D_null + w·(D − D_null) where σ lies in the guidance interval (arXiv:2207.12598).

    One null map serves the whole batch, and takes one share of batch + 1 of the cache.
    """
    wants_variance = sampler.solver == "ddpm"
    w, batch = sampler.guidance_scale, one_hot.shape[0]
    unconditional = None
    if w != 1.0:
        unconditional = _conditional(denoiser, torch.zeros_like(one_hot[:1]), cache_bytes / (batch + 1))
        cache_bytes *= batch / (batch + 1)
    conditional = _conditional(denoiser, one_hot, cache_bytes)

    def denoise(x: Tensor, sigma: Tensor) -> Any:
        out = conditional(x, sigma)
        d, v = out if isinstance(out, tuple) else (out, None)
        if unconditional is not None and _guides(sampler, sigma):
            null = unconditional(x, sigma)
            null = null[0] if isinstance(null, tuple) else null
            d = null + w * (d - null)
        return (d, v) if wants_variance and v is not None else d

    return denoise


def _solver(sampler: SamplerConfig) -> Callable[..., Tensor]:
    """The sampler's solver. Euler and Heun on a schedule or a scaling are the generalised family's."""
    if sampler.solver in ("euler", "heun") and _is_generalised(sampler):
        return partial(SOLVERS["generalised"], second_order=sampler.solver == "heun")
    return SOLVERS[sampler.solver]


def _is_generalised(sampler: SamplerConfig) -> bool:
    if sampler.solver in ("euler", "heun"):
        return (sampler.schedule, sampler.scaling) != ("linear", "none")
    return sampler.solver in ("generalised", "reference_heun")


def _solver_options(
    precondition: Preconditioning, sampler: SamplerConfig, seeds: Sequence[int], shape: tuple[int, int, int]
) -> dict[str, Any]:
    if _is_generalised(sampler):
        between = sigma_range(sampler, precondition)
        return {"schedule": sampler.schedule, "scaling": sampler.scaling, "sigma_range": between}
    if sampler.solver not in ("stochastic_heun", "ddpm"):
        return {}
    # A stream of its own, not the one that drew x: else the first fresh noise would equal the initial one.
    streams = [noise_stream(seed, 1) for seed in seeds]

    def noise(like: Tensor) -> Tensor:
        fresh = torch.stack([stream(shape) for stream in streams])
        return fresh.to(like.device, like.dtype)

    if sampler.solver == "ddpm":
        return {"noise": noise}
    s_churn = S_CHURN if sampler.s_churn is None else sampler.s_churn
    churn = {"s_churn": s_churn, "s_min": sampler.s_min, "s_max": sampler.s_max, "s_noise": sampler.s_noise}
    return {"noise": noise, "round_sigma": precondition.round_sigma, **churn}
