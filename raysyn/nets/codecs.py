"""Codecs: between images and the space that a diffusion model works in (σ_data 0.5, one channel)."""

from __future__ import annotations

import torch
from torch import Tensor

from raysyn.diffusion.precondition import SIGMA_DATA
from raysyn.nets.gamma_vae import GammaVAE


class PixelCodec:
    """Images themselves, image_pm1 [B, 1, H, W] in [−1, 1], −1 outside the sector."""

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """(channels, height, width) of the model's space for images of `image_size`."""
        return 1, image_size, image_size

    def encode(self, image_pm1: Tensor, sector: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The image, −1 outside the sector."""
        return torch.where(sector > 0, image_pm1, -torch.ones_like(image_pm1))

    def decode(self, x: Tensor, sector: Tensor) -> Tensor:
        """image_pm1 in [−1, 1], −1 outside the sector."""
        return torch.where(sector > 0, x.clamp(-1, 1), -torch.ones_like(x))


class LatentCodec:
    """Latents of an autoencoder, standardised to mean 0 and σ_data by the statistics stored with it."""

    def __init__(self, vae: GammaVAE) -> None:
        self.vae = vae

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """(channels, height, width) of the model's space for images of `image_size`."""
        side = image_size // self.vae.downscale
        return self.vae.config.latent_channels, side, side  # type: ignore[attr-defined]

    def standardise(self, z: Tensor) -> Tensor:
        """Latents to the diffusion's units."""
        return (z - self.vae.latent_mean) / self.vae.latent_std * SIGMA_DATA

    @torch.no_grad()
    def encode(self, image_pm1: Tensor, sector: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Standardised posterior mean, or with a generator a draw, of image_pm1 [B, 1, H, W]; sector in {0, 1}."""
        posterior = self.vae.encode((image_pm1 + 1) / 2, sector)
        return self.standardise(posterior.mean if generator is None else posterior.sample(generator))

    @torch.no_grad()
    def decode(self, x: Tensor, sector: Tensor) -> Tensor:
        """image_pm1 in [−1, 1], −1 outside the sector, from standardised latents."""
        z = x / SIGMA_DATA * self.vae.latent_std + self.vae.latent_mean
        if self.vae.config.kind == "gamma":  # type: ignore[attr-defined]
            z = z.clamp(min=0)
        return self.vae.decode(z, sector).clamp(0, 1) * 2 - 1


Codec = PixelCodec | LatentCodec
