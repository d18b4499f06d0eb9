"""The six models by name (REFERENCE §2), and the nets that a config asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raysyn.config import ModelConfig
from raysyn.diffusion.precondition import PRECONDITIONINGS, Denoiser
from raysyn.nets.gamma_vae import GammaVAE
from raysyn.nets.unet import SemanticUNet
from raysyn.types import UserError


@dataclass(frozen=True)
class ModelSpec:
    """What a name stands for: the space it works in, its architecture, formulation and sampler of record."""

    name: str
    space: str
    arch: str
    precondition: str
    solver: str
    latent_downscale: int = 1

    def build(self, config: ModelConfig, image_size: int) -> Denoiser:
        """An untrained denoiser of this model. Raises UserError where the config is another model's."""
        wrong = {
            "space": (config.space, self.space),
            "net.arch": (config.net.arch, self.arch),
            "precondition": (config.precondition, self.precondition),
        }
        for key, (given, own) in wrong.items():
            if given != own:
                raise UserError(f"model.{key}: {given!r} is not {self.name}'s, which has {own!r}")
        return build_denoiser(config, image_size)


_TABLE = [
    #         name        space     arch      precondition solver         downscale
    ModelSpec("sdm", "pixel", "adm", "iddpm", "ddpm"),
    ModelSpec("vp", "pixel", "ddpmpp", "vp", "generalised"),
    ModelSpec("ve", "pixel", "ncsnpp", "ve", "generalised"),
    ModelSpec("edm", "pixel", "adm", "edm", "heun"),
    ModelSpec("edm_l128", "latent", "adm", "edm", "heun", 2),
    ModelSpec("edm_l64", "latent", "adm", "edm", "heun", 4),
]
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _TABLE}


def model_size(config: ModelConfig, image_size: int) -> int:
    """Height and width of the model's own space. Raises UserError where the image does not divide."""
    if image_size % config.latent_downscale:
        raise UserError(
            f"data.image_size: {image_size} is not a multiple of {config.latent_downscale} (latent_downscale)"
        )
    return image_size // config.latent_downscale


def build_denoiser(config: ModelConfig, image_size: int) -> Denoiser:
    """The untrained denoiser of a config for images of `image_size`: network with preconditioning."""
    net = SemanticUNet.from_net_config(
        config.net,
        model_size(config, image_size),
        channels=config.vae.latent_channels if config.space == "latent" else 1,
    )
    with torch.device("cpu"):  # its few numbers are wanted even where the net is only counted, on the meta device
        precondition = PRECONDITIONINGS[config.precondition]()
    return Denoiser(net, precondition)


def build_vae(config: ModelConfig) -> GammaVAE:
    """The untrained autoencoder of a latent model's config."""
    if config.space != "latent":
        raise UserError(f"model: {config.name} works on pixels and has no autoencoder")
    return GammaVAE.from_vae_config(config.vae)
