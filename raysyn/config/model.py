"""A model of images: its nets, how they are fitted, how images are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from raysyn.config.checks import INF, MAX_SEED, each_within, not_empty, one_of, rising, within
from raysyn.types import UserError

SOLVERS = ("euler", "heun", "stochastic_heun", "generalised", "ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "reference_heun")


@dataclass
class NetConfig:
    """The semantic U-Net. `attention_resolutions` are feature-map heights at this model's own size."""

    arch: str = "adm"
    base_channels: int = 192
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    num_blocks: int = 3
    attention_resolutions: list[int] = field(default_factory=lambda: [32, 16, 8])
    channels_per_head: int = 64
    dropout: float = 0.1
    spade_hidden: int = 128
    spade_kernel: int = 3
    patch_size: int = 1
    learned_variance: bool = False

    def __post_init__(self) -> None:
        one_of(self, arch=("adm", "ddpmpp", "ncsnpp"))
        within(self, base_channels=(4, 2048), num_blocks=(1, 16), dropout=(0, 1), spade_hidden=(1, 4096))
        within(self, patch_size=(1, 16), channels_per_head=(1, 4096))
        not_empty(self, "channel_multipliers")
        each_within(self, channel_multipliers=(1, 64), attention_resolutions=(1, 4096))
        if self.spade_kernel not in (1, 3):
            raise UserError(f"spade_kernel: {self.spade_kernel} is not 1 or 3")


@dataclass
class AugmentConfig:
    """Random geometric augmentation of training pairs, image and map alike (REFERENCE §2, diffusion training)."""

    flip: bool = True
    rotation_deg: float = 10.0
    translation: float = 0.1
    scale_min: float = 0.8
    scale_max: float = 1.2

    def __post_init__(self) -> None:
        within(self, rotation_deg=(0, 180), translation=(0, 1), scale_min=(0.1, 10), scale_max=(0.1, 10))
        rising(self, "scale_min", "scale_max")


@dataclass
class FitConfig:
    """How a net is fitted. `num_images` counts images seen; `global_batch` holds for any number of workers.

    `latents` precomputed: a latent model's images are encoded once, as they are and in `latent_copies`-1 fixed warps;
    on_the_fly: each image is warped and encoded anew each time. `amp` bf16 is fp32 on devices without bf16 arithmetic.
    """

    num_images: int = 500_000
    global_batch: int = 48
    micro_batch: int = 8
    optimizer: str = "adamw"
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_images: int = 0
    lr_decay: str = "none"
    grad_clip: float = 0.0
    ema_half_life_images: float = 50_000
    amp: str = "none"
    compile: bool = False
    channels_last: bool = False
    seed: int = 0
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 2
    validate_every_steps: int = 500
    num_validation_images: int = 256
    sample_every_steps: int = 2500
    log_every_steps: int = 50
    latents: str = "precomputed"
    latent_copies: int = 4
    spike_factor: float = 0.0
    max_rollbacks: int = 2
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        one_of(self, optimizer=("adamw", "sgd"), lr_decay=("none", "cosine"), amp=("none", "bf16"))
        one_of(self, latents=("precomputed", "on_the_fly"))
        within(self, num_images=(1, INF), global_batch=(1, 1e6), micro_batch=(1, 1e6), lr=(1e-12, 10))
        within(self, grad_clip=(0, INF), momentum=(0, 1), weight_decay=(0, 1e3), warmup_images=(0, INF))
        within(self, num_validation_images=(0, INF), max_rollbacks=(0, 1e6), seed=(0, MAX_SEED))
        within(self, ema_half_life_images=(0, INF), checkpoint_every_steps=(1, INF), keep_checkpoints=(1, 1000))
        within(self, validate_every_steps=(1, INF), log_every_steps=(1, INF), beta1=(0, 1), beta2=(0, 1))
        within(self, sample_every_steps=(1, INF), latent_copies=(1, 1000), spike_factor=(0, INF))

    @property
    def num_steps(self) -> int:
        """Optimizer steps: images seen over the global batch, rounded up."""
        return -(-self.num_images // self.global_batch)


@dataclass
class VAEConfig:
    """The autoencoder of the latent models: `kind` gamma (the paper's) or kl (Gaussian control with the same nets)."""

    kind: str = "gamma"
    channels: list[int] = field(default_factory=lambda: [64, 128, 192])
    num_blocks: int = 2
    latent_channels: int = 1
    attention: bool = True
    stem_patch: int = 1
    parametrisation: str = "shape_rate"
    prior_shape: float = 3.75
    prior_rate: float = 10.8
    weight_image: float = 10.0
    weight_perceptual: float = 1e-3
    weight_kl: float = 1e-3
    weight_latent: float = 1e-2
    late_terms_from_epoch: int = 5
    perceptual_backbone: str = ""
    perceptual_weights: str = ""
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            num_images=400_000, global_batch=6, micro_batch=6, optimizer="sgd", lr=1e-4, grad_clip=1.0
        )
    )

    def __post_init__(self) -> None:
        one_of(self, kind=("gamma", "kl"), parametrisation=("shape_rate", "mean_shape"))
        within(self, prior_shape=(1e-3, 1e3), prior_rate=(1e-3, 1e3), weight_kl=(0, INF), stem_patch=(1, 8))
        within(self, num_blocks=(1, 16), latent_channels=(1, 64), late_terms_from_epoch=(0, INF))
        within(self, weight_image=(0, INF), weight_perceptual=(0, INF), weight_latent=(0, INF))
        not_empty(self, "channels")
        each_within(self, channels=(1, 4096))


@dataclass
class SamplerConfig:
    """How images are drawn (REFERENCE §2, sampler family). None for a σ bound means the preconditioning's own.

    `schedule` and `scaling` act in euler, heun, generalised and reference_heun; `s_*` in stochastic_heun alone, where
    None for `s_churn` means the published 40.
    """

    solver: str = "heun"
    num_steps: int = 25
    discretization: str = "edm"
    schedule: str = "linear"
    scaling: str = "none"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    s_churn: float | None = None
    s_min: float = 0.02
    s_max: float = 100.0
    s_noise: float = 1.003
    guidance_scale: float = 1.0
    guidance_sigma_min: float = 0.0
    guidance_sigma_max: float = INF

    def __post_init__(self) -> None:
        one_of(self, solver=SOLVERS, discretization=("edm", "vp", "ve", "iddpm"), schedule=("linear", "vp", "ve"))
        one_of(self, scaling=("none", "vp"))
        within(self, num_steps=(1, 10_000), sigma_min=(1e-6, INF), sigma_max=(1e-3, INF), rho=(0.1, 100))
        within(self, s_churn=(0, INF), s_min=(0, INF), s_max=(0, INF), s_noise=(0, 100), guidance_scale=(0, 100))
        within(self, guidance_sigma_min=(0, INF), guidance_sigma_max=(0, INF))
        for name in ("sigma", "s", "guidance_sigma"):
            rising(self, f"{name}_min", f"{name}_max")


@dataclass
class ModelConfig:
    """One of the six models by name. `latent_downscale` is image size over latent size (1 for pixel models)."""

    name: str = "edm_l64"
    space: str = "latent"
    precondition: str = "edm"
    latent_downscale: int = 4
    label_dropout: float = 0.0
    net: NetConfig = field(default_factory=NetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        one_of(self, space=("pixel", "latent"), precondition=("edm", "vp", "ve", "iddpm"))
        within(self, label_dropout=(0, 1), latent_downscale=(1, 16))
        if self.space == "pixel" and self.latent_downscale != 1:
            raise UserError(f"latent_downscale: must be 1 for a pixel model, got {self.latent_downscale}")
        levels = 2 ** (len(self.vae.channels) - 1) * self.vae.stem_patch
        if self.space == "latent" and levels != self.latent_downscale:
            raise UserError(
                f"latent_downscale: {self.latent_downscale} does not match the autoencoder's {levels} "
                f"(vae.stem_patch x 2^(levels-1) with vae.channels {self.vae.channels})"
            )

    @property
    def label(self) -> str:
        """The name in tables: a latent model on the Gaussian control autoencoder is `<name>_kl`."""
        return f"{self.name}_kl" if self.space == "latent" and self.vae.kind == "kl" else self.name
