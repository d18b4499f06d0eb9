"""The six models by name (REFERENCE §2), and the nets that a config asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raysyn.config import ModelConfig
from raysyn.diffusion.generate import num_network_evals
from raysyn.diffusion.precondition import PRECONDITIONINGS, Denoiser
from raysyn.labels import NUM_CHANNELS
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
        self.check(config)
        return build_denoiser(config, image_size)

    def check(self, config: ModelConfig) -> None:
        """Raise UserError where the config is another model's."""
        wrong = {
            "space": (config.space, self.space),
            "net.arch": (config.net.arch, self.arch),
            "precondition": (config.precondition, self.precondition),
        }
        for key, (given, own) in wrong.items():
            if given != own:
                raise UserError(f"model.{key}: {given!r} is not {self.name}'s, which has {own!r}")


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


# What of a net's config tells one model's from another's; heads and embeddings of an imported net may be its own.
TELLING = {
    *("arch", "resolution", "in_channels", "base_channels", "channel_multipliers", "num_blocks", "patch_size"),
    *("spade_hidden", "spade_kernel", "learned_variance", "kind", "channels", "latent_channels", "stem_patch"),
}


def check_nets(config: ModelConfig, image_size: int, unet: SemanticUNet, vae: GammaVAE | None) -> None:
    """Raise UserError where nets read from somewhere are not those that the config describes."""
    if config.name in MODELS:
        MODELS[config.name].check(config)
    with torch.device("meta"):
        pairs: list[tuple[str, Any, Any]] = [("unet", unet, build_denoiser(config, image_size).net)]
        if config.space == "latent":
            pairs.append(("vae", vae, build_vae(config)))
    for name, found, wanted in pairs:
        if found is None:
            raise UserError(f"{name}: missing, and {config.name} works on latents")
        for key in sorted(TELLING & wanted.config.keys()):
            own, value = ((tuple(v) if isinstance(v, list) else v) for v in (found.config.get(key), wanted.config[key]))
            if own != value:
                raise UserError(f"{name}: is another model's ({key} {own!r}, where {config.name} has {value!r})")


def describe(config: ModelConfig, image_size: int) -> dict[str, float]:
    """What an untrained model costs, counted on the meta device without memory or arithmetic.

    `parameters` of the diffusion net; `gflops_per_evaluation` of one network evaluation of one image, `gflops_modulations`
    the part of it that depends on the map alone (paid once an image with a cache); `network_evaluations` an image by the
    config's own sampler; `vae_parameters`, `gflops_encode`, `gflops_decode` (0 for pixel models). A multiply-add is two
    operations.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def gflops(work: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        return float(counter.get_total_flops()) / 1e9

    size, sampler = model_size(config, image_size), config.sampler
    evaluations = num_network_evals(sampler, PRECONDITIONINGS[config.precondition]())
    with torch.device("meta"):
        net = build_denoiser(config, image_size).net.eval()
        channels = config.vae.latent_channels if config.space == "latent" else 1
        x, c_noise = torch.zeros(1, channels, size, size), torch.zeros(1)
        maps, sector = torch.zeros(1, NUM_CHANNELS, image_size, image_size), torch.zeros(1, 1, image_size, image_size)
        vae = build_vae(config).eval() if config.space == "latent" else None
        return {
            "parameters": float(sum(p.numel() for p in net.parameters())),
            "gflops_per_evaluation": gflops(lambda: net(x, c_noise, maps)),
            "gflops_modulations": gflops(lambda: net.modulations(maps)),  # type: ignore[operator]
            "network_evaluations": float(evaluations),
            "vae_parameters": float(sum(p.numel() for p in vae.parameters())) if vae is not None else 0.0,
            "gflops_encode": gflops(lambda: vae.encode(sector, sector)) if vae is not None else 0.0,
            "gflops_decode": gflops(lambda: vae.decode(x, sector)) if vae is not None else 0.0,
        }


def build_vae(config: ModelConfig) -> GammaVAE:
    """The untrained autoencoder of a latent model's config."""
    if config.space != "latent":
        raise UserError(f"model: {config.name} works on pixels and has no autoencoder")
    return GammaVAE.from_vae_config(config.vae)
