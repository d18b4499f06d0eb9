"""What is fitted: a diffusion model (on pixels or latents) or an autoencoder, each as batches and per-sample losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.config import FitConfig, VAEConfig
from raysyn.diffusion.loss import diffusion_loss
from raysyn.diffusion.precondition import SIGMA_DATA, Denoiser
from raysyn.labels import STRUCTURES
from raysyn.nets.codecs import LatentCodec
from raysyn.nets.gamma_vae import (
    GammaPosterior,
    GammaVAE,
    GaussianPosterior,
    Posterior,
)
from raysyn.nets.perceptual import build_perceptual, perceptual_distance
from raysyn.nets.spade import one_hot_from_index
from raysyn.training import SampleLosses
from raysyn.training_batches import (
    DROP,
    NOISE,
    POSTERIOR,
    SIGMA,
    Batch,
    FrameSource,
    frames_at,
    normal_noise,
    torch_seed,
    uniform,
)

VALIDATION_SEED = 0x5EED


def sector_of(index: Tensor) -> Tensor:
    """The sector mask float [B, 1, H, W] of a conditioning index uint8 [B, H, W]."""
    return (index % len(STRUCTURES) != 0)[:, None].float()


def draw_each(posterior: Posterior, seeds: Sequence[int]) -> Tensor:
    """A reparametrised draw with a generator of its own for each sample, whatever batch it is in."""
    gamma = isinstance(posterior, GammaPosterior)
    device = posterior.shape.device if isinstance(posterior, GammaPosterior) else torch.device("cpu")
    tensors = ("shape", "rate", "sector") if gamma else ("location", "log_variance", "sector")
    drawn = []
    for i, seed in enumerate(seeds):
        one = dataclasses.replace(posterior, **{key: getattr(posterior, key)[i : i + 1] for key in tensors})
        drawn.append(one.sample(torch.Generator(device).manual_seed(seed)))
    return torch.cat(drawn)


def moments_of(posterior: Posterior) -> Tensor:
    """A posterior's two parameters, float32 [B, 2, C, h, w]."""
    if isinstance(posterior, GammaPosterior):
        return torch.stack([posterior.shape, posterior.rate], dim=1).float()
    return torch.stack([posterior.location, posterior.log_variance], dim=1).float()


def posterior_of(vae: GammaVAE, moments: Tensor, sector: Tensor) -> Posterior:
    """The posterior with these moments [B, 2, C, h, w] in the sector [B, 1, H, W]."""
    settings: Any = vae.config
    inside, a, b = vae.latent_sector(sector), moments[:, 0], moments[:, 1]
    if settings.kind == "kl":
        return GaussianPosterior(a, b, inside)
    return GammaPosterior(a, b, inside, settings.prior_shape, settings.prior_rate)


# --- diffusion ----------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Latents encoded beforehand: moments float32 [K, N, 2, C, h, w] of K copies of N frames."""

    train: np.ndarray
    validation: np.ndarray


class DiffusionLoss(nn.Module):
    """Per-sample diffusion losses of a batch; encodes images on the way where the model works on latents."""

    def __init__(self, denoiser: Denoiser, codec: LatentCodec | None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.codec = codec  # no module: the autoencoder is not trained here

    def forward(self, batch: Batch) -> SampleLosses:
        assert batch.uniform is not None
        net: Any = self.denoiser.net
        net.dropout_seeds = torch.tensor(batch.seeds, device=batch.index.device) if net.training else None
        report = diffusion_loss(
            self.denoiser,
            self._clean(batch),
            one_hot_from_index(batch.index),
            sigma=self.denoiser.precondition.sigma_quantile(batch.uniform.clamp(1e-12, 1 - 1e-12)),
            noise=batch.noise,
            drop=batch.dropped,
        )
        return SampleLosses(report.loss * len(batch), report.per_sample, {}, report.sigma)

    @torch.no_grad()
    def _clean(self, batch: Batch) -> Tensor:
        if batch.latent is not None:
            return batch.latent
        assert batch.image_01 is not None
        sector = sector_of(batch.index)
        if self.codec is None:
            return torch.where(sector > 0, batch.image_01 * 2 - 1, -1.0)
        with torch.autocast(sector.device.type, enabled=False):
            return self.codec.standardise(draw_each(self.codec.vae.encode(batch.image_01, sector), batch.seeds))


class DiffusionObjective:
    """Fits a denoiser. With `codec` on its latents: those in `moments`, else encoded on the fly."""

    part_names: tuple[str, ...] = ()

    def __init__(
        self,
        denoiser: Denoiser,
        train: FrameSource,
        validation: FrameSource | None,
        shape: tuple[int, int, int],
        config: FitConfig,
        label_dropout: float = 0.0,
        codec: LatentCodec | None = None,
        moments: Moments | None = None,
    ) -> None:
        self.denoiser, self.train, self.validation, self.shape = denoiser, train, validation, shape
        self.config, self.label_dropout, self.codec, self.moments = config, label_dropout, codec, moments
        self.model = denoiser.net
        self.module: nn.Module = DiffusionLoss(denoiser, codec)
        self.statistics = (
            (float(codec.vae.latent_mean), float(codec.vae.latent_std)) if codec is not None else (0.0, 1.0)
        )
        self.num_validation = min(config.num_validation_images, len(validation)) if validation is not None else 0

    def batch(self, positions: np.ndarray, salt: int) -> Batch:
        """The images at `positions` with their warps, noise levels, noise and dropped labels."""
        seed = self.config.seed + salt * 1_000_003
        if self.moments is None:
            image_01, index, _ = self.train.pairs(positions, seed)
            return self._batch(positions, seed, index, image_01=image_01)
        frame, epoch = frames_at(positions, len(self.train), self.train.seed)
        copy = self.train.copy_of(frame, epoch)
        _, index = self.train.copied(frame, copy)
        latent = self._latents(self.moments.train[copy, frame], index, positions, seed)
        return self._batch(positions, seed, index, latent=latent)

    def validation_batch(self, positions: np.ndarray) -> Batch:
        """Validation frames `positions`, not warped, labels kept, always with the same noise."""
        assert self.validation is not None
        seed = VALIDATION_SEED
        image_01, index = self.validation.copied(positions, np.zeros_like(positions))
        if self.moments is None:
            return self._batch(positions, seed, index, image_01=image_01, drop=False)
        latent = self._latents(self.moments.validation[0, positions], index, positions, seed)
        return self._batch(positions, seed, index, latent=latent, drop=False)

    def _latents(self, moments: np.ndarray, index: Tensor, positions: np.ndarray, seed: int) -> Tensor:
        assert self.codec is not None
        posterior = posterior_of(self.codec.vae, torch.from_numpy(moments), sector_of(index))
        z = draw_each(posterior, [torch_seed(seed, POSTERIOR, int(p)) for p in positions])
        return (z - self.statistics[0]) / self.statistics[1] * SIGMA_DATA

    def _batch(self, positions: np.ndarray, seed: int, index: Tensor, *, drop: bool = True, **images: Any) -> Batch:
        dropped = None
        if drop and self.label_dropout > 0:
            dropped = torch.from_numpy(uniform(seed, DROP, positions) < self.label_dropout)
        return Batch(
            positions=torch.from_numpy(positions),
            index=index,
            uniform=torch.from_numpy(uniform(seed, SIGMA, positions)),
            noise=normal_noise(seed, NOISE, positions, self.shape),
            dropped=dropped,
            seeds=[torch_seed(seed, POSTERIOR, int(p)) for p in positions],
            **images,
        )


# --- autoencoder --------------------------------------------------------------------------------------------------


class AutoencoderLoss(nn.Module):
    """Per-sample losses of REFERENCE §2: image MSE, KL(q‖prior); from an epoch on latent MSE, perceptual distance."""

    def __init__(self, vae: GammaVAE, weights: VAEConfig, perceptual: nn.Module | None = None) -> None:
        super().__init__()
        self.vae, self.weights = vae, weights
        self.perceptual = [perceptual] if perceptual is not None else []  # a list: not to be trained, saved or moved

    def forward(self, batch: Batch) -> SampleLosses:
        assert batch.image_01 is not None
        assert batch.epoch is not None
        weights, sector = self.weights, sector_of(batch.index)
        image = batch.image_01 * sector
        posterior = self.vae.encode(image, sector)
        z = draw_each(posterior, batch.seeds)
        decoded = self.vae.decode(z, sector)
        parts = {"image": (decoded - image).square().flatten(1).mean(1), "kl": posterior.kl()}
        loss = weights.weight_image * parts["image"] + weights.weight_kl * parts["kl"]
        late = (batch.epoch >= weights.late_terms_from_epoch).to(loss.dtype)
        if weights.kind == "gamma":
            small = F.interpolate(image, size=z.shape[2:], mode="area")
            parts["latent"] = (z - small * posterior.sector).square().flatten(1).mean(1)
            loss = loss + late * weights.weight_latent * parts["latent"]
        for net in self.perceptual:
            parts["perceptual"] = torch.zeros_like(loss)
            if late.any():
                parts["perceptual"] = perceptual_distance(net, decoded, image)
            loss = loss + late * weights.weight_perceptual * parts["perceptual"]
        return SampleLosses(loss.sum(), loss.detach(), {k: v.detach() for k, v in parts.items()})


class AutoencoderObjective:
    """Fits an autoencoder to frames."""

    def __init__(
        self,
        vae: GammaVAE,
        weights: VAEConfig,
        train: FrameSource,
        validation: FrameSource | None,
        device: torch.device | None = None,
    ) -> None:
        perceptual, self.perceptual_status = build_perceptual(weights.perceptual_backbone, weights.perceptual_weights)
        if perceptual is not None and device is not None:
            perceptual = perceptual.to(device)
        self.train, self.validation, self.config = train, validation, weights.fit
        self.model = vae
        self.module: nn.Module = AutoencoderLoss(vae, weights, perceptual)
        self.part_names: tuple[str, ...] = ("image", "kl")
        self.part_names += ("latent",) if weights.kind == "gamma" else ()
        self.part_names += ("perceptual",) if perceptual is not None else ()
        self.num_validation = min(self.config.num_validation_images, len(validation)) if validation is not None else 0

    def batch(self, positions: np.ndarray, salt: int) -> Batch:
        """The images at `positions` with their warps and seeds of the posterior draws."""
        seed = self.config.seed + salt * 1_000_003
        return self._batch(positions, seed, *self.train.pairs(positions, seed))

    def validation_batch(self, positions: np.ndarray) -> Batch:
        """Validation frames `positions`, not warped, always with the same draws; the late terms count."""
        assert self.validation is not None
        image_01, index = self.validation.copied(positions, np.zeros_like(positions))
        late = np.full(len(positions), np.iinfo(np.int32).max)
        return self._batch(positions, VALIDATION_SEED, image_01, index, late)

    def _batch(self, positions: np.ndarray, seed: int, image_01: Tensor, index: Tensor, epoch: np.ndarray) -> Batch:
        return Batch(
            positions=torch.from_numpy(positions),
            index=index,
            image_01=image_01,
            epoch=torch.from_numpy(epoch.astype(np.float32)),
            seeds=[torch_seed(seed, POSTERIOR, int(p)) for p in positions],
        )


@torch.no_grad()
def encode_rows(
    vae: GammaVAE, source: FrameSource, copy: int, frames: np.ndarray, device: torch.device, batch: int
) -> np.ndarray:
    """Posterior moments float32 [n, 2, C, h, w] of copy `copy` of the frames numbered `frames`."""
    out = []
    for start in range(0, len(frames), batch):
        chosen = frames[start : start + batch]
        image_01, index = source.copied(chosen, np.full(len(chosen), copy))
        posterior = vae.encode(image_01.to(device), sector_of(index).to(device))
        out.append(moments_of(posterior).cpu().numpy())
    return np.concatenate(out)


@torch.no_grad()
def latent_statistics(vae: GammaVAE, source: FrameSource, device: torch.device, batch: int) -> tuple[float, float]:
    """Mean and standard deviation of posterior draws inside the sector over all frames of `source`, not warped.

    By the law of total variance from the posteriors' means and variances, so no draw is needed.
    """
    count, first, second = 0.0, 0.0, 0.0
    for start in range(0, len(source), batch):
        chosen = np.arange(start, min(start + batch, len(source)))
        image_01, index = source.copied(chosen, np.zeros_like(chosen))
        posterior = vae.encode(image_01.to(device), sector_of(index).to(device))
        mean, variance = posterior.mean.double(), posterior.variance.double()
        count += float(posterior.sector.sum()) * mean.shape[1]
        first += float(mean.sum())
        second += float((mean**2 + variance).sum())
    mean_all = first / count
    return mean_all, max(second / count - mean_all**2, 1e-12) ** 0.5
