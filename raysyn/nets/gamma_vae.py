"""The autoencoder of the latent models: a Gamma posterior at each latent site (REFERENCE §2, Γ-VAE), or a Gaussian one.

Prior Gamma(shape 3.75, rate 10.8): its mean 0.347 and form follow the grey levels of echo pixels inside the sector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.config import VAEConfig
from raysyn.nets.spade import num_groups

FLOOR = 1e-7
SHARPNESS = 10.0
INVERSE_SOFTPLUS_1 = math.log(math.e - 1)  # softplus of this is 1


def gamma_kl(shape: Tensor, rate: Tensor, prior_shape: float, prior_rate: float) -> Tensor:
    """KL(Gamma(shape, rate) ‖ Gamma(prior_shape, prior_rate)) at each element, closed form, in nats, fp32 or wider."""
    k, r = shape.float() if shape.dtype.itemsize < 4 else shape, rate.float() if rate.dtype.itemsize < 4 else rate
    p = torch.as_tensor(prior_shape, dtype=k.dtype, device=k.device)
    normalisers = torch.lgamma(p) - torch.lgamma(k) + p * (r.log() - math.log(prior_rate))
    return (k - p) * torch.digamma(k) + normalisers + k * (prior_rate - r) / r


@dataclass
class GammaPosterior:
    """q(z) = Gamma(shape, rate) at each site; shape and rate float [B, C, h, w]; `sector` [B, 1, h, w] masks it."""

    shape: Tensor
    rate: Tensor
    sector: Tensor
    prior_shape: float
    prior_rate: float

    @property
    def mean(self) -> Tensor:
        """shape / rate inside the sector, 0 outside."""
        return self.shape / self.rate * self.sector

    @property
    def variance(self) -> Tensor:
        """shape / rate² inside the sector, 0 outside."""
        return self.shape / self.rate**2 * self.sector

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A reparametrised draw (implicit gradients), 0 outside the sector."""
        standard = torch._standard_gamma(self.shape, generator=generator)
        return standard.clamp(min=1e-30) / self.rate * self.sector

    def kl(self) -> Tensor:
        """KL(q ‖ prior) of each image, mean over the sites inside its sector, float [B]."""
        return _sector_mean(gamma_kl(self.shape, self.rate, self.prior_shape, self.prior_rate), self.sector)


@dataclass
class GaussianPosterior:
    """q(z) = N(location, exp(log_variance)) at each site, the control; prior N(0, 1)."""

    location: Tensor
    log_variance: Tensor
    sector: Tensor

    @property
    def mean(self) -> Tensor:
        """The location inside the sector, 0 outside."""
        return self.location * self.sector

    @property
    def variance(self) -> Tensor:
        """The variance inside the sector, 0 outside."""
        return self.log_variance.exp() * self.sector

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A reparametrised draw, 0 outside the sector."""
        noise = torch.randn(self.location.shape, generator=generator).to(self.location)
        return (self.location + (0.5 * self.log_variance).exp() * noise) * self.sector

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, 1)) of each image, mean over the sites inside its sector, float [B]."""
        kl = 0.5 * (self.location.square() + self.log_variance.exp() - 1 - self.log_variance)
        return _sector_mean(kl, self.sector)


Posterior = GammaPosterior | GaussianPosterior


def _sector_mean(values: Tensor, sector: Tensor) -> Tensor:
    inside = (values * sector).flatten(1).sum(1)
    return inside / (sector.flatten(1).sum(1) * values.shape[1]).clamp(min=1)


def vae_groups(channels: int) -> int:
    """32 groups, as published for widths from 64 up; as the U-Net's below, where 32 would normalise single channels."""
    return 32 if channels >= 64 and channels % 32 == 0 else num_groups(channels)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), 3x3, with a 1x1 skip where channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm0 = nn.GroupNorm(vae_groups(in_channels), in_channels, eps=1e-6)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(vae_groups(out_channels), out_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        return self.skip(x) + self.conv1(F.silu(self.norm1(h)))


class SelfAttention(nn.Module):
    """One head over all pixels, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(vae_groups(channels), channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: else the fused kernels refuse, and a map of places x places is made (1 GiB an image at 128 px).
        q, k, v = (t.flatten(2).mT.contiguous()[:, None] for t in self.qkv(self.norm(x)).chunk(3, dim=1))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj(attended.reshape(x.shape))


def _level(in_channels: int, channels: int, num_blocks: int, attention: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(num_blocks):
        layers.append(ResBlock(in_channels if i == 0 else channels, channels))
        if attention:
            layers.append(SelfAttention(channels))
    return nn.Sequential(*layers)


def _middle(channels: int, attention: bool) -> nn.Sequential:
    inner = [SelfAttention(channels)] if attention else []
    return nn.Sequential(ResBlock(channels, channels), *inner, ResBlock(channels, channels))


class GammaVAE(ModelMixin, ConfigMixin):
    """image_01 [B, 1, H, W] in [0, 1] and sector [B, 1, H, W] in {0, 1} -> latents [B, C, H/f, W/f] and back.

    f = stem_patch · 2^(levels−1). `kind` is gamma or kl; `parametrisation` of the Gamma heads is shape_rate (as
    published: k = 3.75·softplus, θ = 10.8·softplus, sharpness 10, floor 1e-7) or mean_shape (same family, easier to train).
    """

    latent_mean: Tensor
    latent_std: Tensor

    @register_to_config
    def __init__(
        self,
        kind: str = "gamma",
        channels: tuple[int, ...] = (64, 128, 192),
        num_blocks: int = 2,
        latent_channels: int = 1,
        attention: bool = True,
        stem_patch: int = 1,
        parametrisation: str = "shape_rate",
        prior_shape: float = 3.75,
        prior_rate: float = 10.8,
    ) -> None:
        super().__init__()
        top, bottom, patch = channels[0], channels[-1], stem_patch**2
        last = len(channels) - 1
        self.stem = nn.Conv2d(patch, top, 3, padding=1)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for i, width in enumerate(channels):
            down.append(_level(channels[max(i - 1, 0)], width, num_blocks, attention and i == last))
            if i < last:
                down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        for i, width in reversed(list(enumerate(channels))):
            up.append(_level(channels[min(i + 1, last)], width, num_blocks, attention and i == last))
            if i:
                up += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)]
        self.encoder = nn.Sequential(*down, _middle(bottom, attention))
        self.encoder_norm = nn.GroupNorm(vae_groups(bottom), bottom, eps=1e-6)
        self.heads = nn.Conv2d(bottom, 2 * latent_channels, 3, padding=1)
        self.decoder_stem = nn.Conv2d(latent_channels, bottom, 3, padding=1)
        self.decoder = nn.Sequential(_middle(bottom, attention), *up)
        self.decoder_norm = nn.GroupNorm(vae_groups(top), top, eps=1e-6)
        self.out = nn.Conv2d(top, patch, 3, padding=1)
        self.register_buffer("latent_mean", torch.zeros(()))
        self.register_buffer("latent_std", torch.ones(()))

    @classmethod
    def from_vae_config(cls, vae: VAEConfig) -> GammaVAE:
        """The autoencoder of a model's config."""
        keys = ("kind", "num_blocks", "latent_channels", "attention", "stem_patch", "parametrisation")
        prior = {"prior_shape": vae.prior_shape, "prior_rate": vae.prior_rate}
        return cls(channels=tuple(vae.channels), **prior, **{key: getattr(vae, key) for key in keys})

    @property
    def downscale(self) -> int:
        """Image size over latent size."""
        settings: Any = self.config
        return settings.stem_patch * 2 ** (len(settings.channels) - 1)

    def latent_sector(self, sector: Tensor) -> Tensor:
        """The sector at the latent size: a site is inside where any of its pixels is."""
        return F.max_pool2d(sector, self.downscale) if self.downscale > 1 else sector

    def encode(self, image_01: Tensor, sector: Tensor) -> Posterior:
        """The posterior of each image, its parameters in fp32 (a KL in bf16 loses 2 dB)."""
        settings: Any = self.config
        x = F.pixel_unshuffle(image_01 * sector, settings.stem_patch)
        h = self.heads(F.silu(self.encoder_norm(self.encoder(self.stem(x))))).float()
        a, b = h.chunk(2, dim=1)
        inside = self.latent_sector(sector)
        if settings.kind == "kl":
            return GaussianPosterior(a, b.clamp(-20, 10), inside)
        if settings.parametrisation == "shape_rate":
            shape = settings.prior_shape * (F.softplus(a, beta=SHARPNESS) + FLOOR)
            rate = settings.prior_rate * (F.softplus(b, beta=SHARPNESS) + FLOOR)
        else:
            prior_mean = settings.prior_shape / settings.prior_rate
            mean = prior_mean * (F.softplus(a + INVERSE_SOFTPLUS_1) + 1e-4)
            shape = settings.prior_shape * (10 * F.softplus(b + INVERSE_SOFTPLUS_1) + 1e-2)
            rate = shape / mean
        return GammaPosterior(shape, rate, inside, settings.prior_shape, settings.prior_rate)

    def decode(self, z: Tensor, sector: Tensor) -> Tensor:
        """image_01 [B, 1, H, W] from latents (not standardised); 0 outside the sector; not clamped to [0, 1]."""
        settings: Any = self.config
        h = self.decoder(self.decoder_stem(z * self.latent_sector(sector)))
        out = self.out(F.silu(self.decoder_norm(h)))
        return F.pixel_shuffle(out, settings.stem_patch).float() * sector

    def draw_prior(self, count: int, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Latents [count, C, size, size] drawn from the prior (fault 2 of the reference; the study's control)."""
        settings: Any = self.config
        shape = (count, settings.latent_channels, size, size)
        if settings.kind == "kl":
            return torch.randn(shape, generator=generator)
        concentration = torch.full(shape, float(settings.prior_shape))
        return torch._standard_gamma(concentration, generator=generator) / settings.prior_rate

    def set_statistics(self, mean: float, std: float) -> None:
        """Store mean and standard deviation of the training latents inside the sector, for `LatentCodec`."""
        self.latent_mean.fill_(mean)
        self.latent_std.fill_(std)
