"""Typed configuration. Defaults are the paper's; `configs/` holds presets. Values are checked before any work starts.

Each job has one dataclass. What decides a result is in `data`, `model`, `task`, `synthesize` and the like and enters
the fingerprints; where and how it runs (`storage`, `ray`, `workers`, `tracking`, `cost`) does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from raysyn.types import UserError

SOLVERS = ("euler", "heun", "stochastic_heun", "generalised", "ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "reference_heun")
CONTROLS = ("reconstruction", "prior")


def _one_of(owner: object, **allowed: tuple[str, ...]) -> None:
    for key, choices in allowed.items():
        value = getattr(owner, key)
        if value not in choices:
            raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}")


def _within(owner: object, **bounds: tuple[float, float]) -> None:
    for key, (low, high) in bounds.items():
        value = getattr(owner, key)
        if value is not None and not low <= value <= high:
            raise UserError(f"{key}: {value} is outside [{low:g}, {high:g}]")


INF = float("inf")
MAX_SEED = 2**31


def _each_within(owner: object, **bounds: tuple[float, float]) -> None:
    for key, (low, high) in bounds.items():
        for value in getattr(owner, key):
            if not low <= value <= high:
                raise UserError(f"{key}: {value} is outside [{low:g}, {high:g}]")


def _not_empty(owner: object, *keys: str) -> None:
    for key in keys:
        if not getattr(owner, key):
            raise UserError(f"{key}: is empty; name at least one")


def _rising(owner: object, low: str, high: str) -> None:
    least, most = getattr(owner, low), getattr(owner, high)
    if least is not None and most is not None and least > most:
        raise UserError(f"{low}: {least} is above {high} {most}")


@dataclass
class DataConfig:
    """Where frames come from. `num_*_patients` and `seed` are the phantom's; `root` is CAMUS's or the PNG folder's.

    `source` says what the pictures of a PNG folder are: real, or synthetic ones of somebody's model.
    """

    name: str = "phantom"
    root: str = ""
    source: str = "real"
    image_size: int = 256
    on_bad_frame: str = "raise"
    num_train_patients: int = 400
    num_validation_patients: int = 50
    num_test_patients: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of(self, name=("phantom", "camus", "png_folder"), on_bad_frame=("raise", "skip"))
        _one_of(self, source=("real", "synthetic"))
        if self.source == "synthetic" and self.name != "png_folder":
            raise UserError(f"data.source: synthetic is for PNG folders; {self.name} is what it is")
        _within(self, image_size=(32, 1024), num_train_patients=(1, 1e6), num_validation_patients=(1, 1e6))
        _within(self, num_test_patients=(1, 1e6), seed=(0, MAX_SEED))


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
        _one_of(self, arch=("adm", "ddpmpp", "ncsnpp"))
        _within(self, base_channels=(4, 2048), num_blocks=(1, 16), dropout=(0, 1), spade_hidden=(1, 4096))
        _within(self, patch_size=(1, 16), channels_per_head=(1, 4096))
        _not_empty(self, "channel_multipliers")
        _each_within(self, channel_multipliers=(1, 64), attention_resolutions=(1, 4096))
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
        _within(self, rotation_deg=(0, 180), translation=(0, 1), scale_min=(0.1, 10), scale_max=(0.1, 10))
        _rising(self, "scale_min", "scale_max")


@dataclass
class FitConfig:
    """How a net is fitted. `num_images` counts images seen; `global_batch` holds for any number of workers.

    `latents` precomputed: a latent model's images are encoded once, as they are and in `latent_copies`-1 fixed warps;
    on_the_fly: each image is warped and encoded anew each time.
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
        _one_of(self, optimizer=("adamw", "sgd"), lr_decay=("none", "cosine"), amp=("none", "bf16"))
        _one_of(self, latents=("precomputed", "on_the_fly"))
        _within(self, num_images=(1, INF), global_batch=(1, 1e6), micro_batch=(1, 1e6), lr=(1e-12, 10))
        _within(self, grad_clip=(0, INF), momentum=(0, 1), weight_decay=(0, 1e3), warmup_images=(0, INF))
        _within(self, num_validation_images=(0, INF), max_rollbacks=(0, 1e6), seed=(0, MAX_SEED))
        _within(self, ema_half_life_images=(0, INF), checkpoint_every_steps=(1, INF), keep_checkpoints=(1, 1000))
        _within(self, validate_every_steps=(1, INF), log_every_steps=(1, INF), beta1=(0, 1), beta2=(0, 1))
        _within(self, sample_every_steps=(1, INF), latent_copies=(1, 1000), spike_factor=(0, INF))

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
        _one_of(self, kind=("gamma", "kl"), parametrisation=("shape_rate", "mean_shape"))
        _within(self, prior_shape=(1e-3, 1e3), prior_rate=(1e-3, 1e3), weight_kl=(0, INF), stem_patch=(1, 8))
        _within(self, num_blocks=(1, 16), latent_channels=(1, 64), late_terms_from_epoch=(0, INF))
        _within(self, weight_image=(0, INF), weight_perceptual=(0, INF), weight_latent=(0, INF))
        _not_empty(self, "channels")
        _each_within(self, channels=(1, 4096))


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
        _one_of(self, solver=SOLVERS, discretization=("edm", "vp", "ve", "iddpm"), schedule=("linear", "vp", "ve"))
        _one_of(self, scaling=("none", "vp"))
        _within(self, num_steps=(1, 10_000), sigma_min=(1e-6, INF), sigma_max=(1e-3, INF), rho=(0.1, 100))
        _within(self, s_churn=(0, INF), s_min=(0, INF), s_max=(0, INF), s_noise=(0, 100), guidance_scale=(0, 100))
        _within(self, guidance_sigma_min=(0, INF), guidance_sigma_max=(0, INF))
        _rising(self, "sigma_min", "sigma_max")


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
        _one_of(self, space=("pixel", "latent"), precondition=("edm", "vp", "ve", "iddpm"))
        _within(self, label_dropout=(0, 1), latent_downscale=(1, 16))
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


@dataclass
class WarpConfig:
    """Warping of masks into new conditions (REFERENCE §3). `elastic_px` is at 256 px and scales with the image."""

    rotation_deg: float = 5.0
    translation: float = 0.05
    scale_min: float = 0.8
    scale_max: float = 1.05
    shear_deg: float = 5.0
    elastic_px: float = 30.0

    def __post_init__(self) -> None:
        _within(self, rotation_deg=(0, 180), translation=(0, 1), scale_min=(0.1, 10), scale_max=(0.1, 10))
        _within(self, shear_deg=(0, 45), elastic_px=(0, 256))
        _rising(self, "scale_min", "scale_max")


@dataclass
class SynthesizeConfig:
    """Which images are synthesized: masks x warps x noise seeds, in shards and batches of fixed composition.

    `batch_size` 0 is as many as the device holds, which each worker finds out by a probe (32 on a CPU). `compile` makes
    each worker compile the net for the batch's shape first: minutes on a GPU, then less time an image.
    """

    mask_splits: list[str] = field(default_factory=lambda: ["train", "validation"])
    num_warps: int = 5
    num_noise_seeds: int = 1
    seed: int = 0
    batch_size: int = 16
    shard_size: int = 256
    amp: str = "none"
    compile: bool = False
    modulation_cache_bytes: int = 1 << 30
    min_faithfulness: float = 0.0
    max_attempts: int = 3
    segmenter_dir: str = ""
    plan_only: bool = False
    warp: WarpConfig = field(default_factory=WarpConfig)

    def __post_init__(self) -> None:
        _one_of(self, amp=("none", "bf16", "fp16"))
        _within(self, num_warps=(1, 1e6), num_noise_seeds=(1, 1e6), batch_size=(0, 65536), shard_size=(1, 1e6))
        _within(self, min_faithfulness=(0, 1), max_attempts=(1, 100), modulation_cache_bytes=(0, INF))
        _within(self, seed=(0, MAX_SEED))
        _not_empty(self, "mask_splits")
        if self.batch_size and self.shard_size % self.batch_size:
            raise UserError(f"shard_size: {self.shard_size} is not a multiple of batch_size {self.batch_size}")
        unknown = sorted(set(self.mask_splits) - {"train", "validation"})
        if unknown:
            raise UserError(f"mask_splits: {unknown} may not be used; conditions come from train and validation only")


@dataclass
class TaskConfig:
    """A downstream task: `arch` is dynunet, unet:<timm encoder> or (classification) any timm model.

    `augmentation` affine moves image and map alike and varies the grey levels; randaugment (classification, as
    published) draws two operations a frame (arXiv:1909.13719). `augment_strength` 0 turns either off.
    """

    kind: str = "segmentation"
    arch: str = "dynunet"
    width: int = 32
    weights: str = ""
    num_epochs: int = 250
    num_steps: int = 0
    batch_size: int = 128
    lr: float = 1e-4
    weight_decay: float = 0.01
    lr_decay: str = "none"
    loss: str = "cross_entropy"
    normalise: str = "range"
    augmentation: str = "affine"
    augment_strength: float = 1.0
    amp: str = "none"
    channels_last: bool = False
    real_fraction: float = 0.0
    mixing: str = "together"
    validate_on: str = "synthetic"
    validate_every_epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of(self, kind=("segmentation", "classification"), loss=("cross_entropy", "dice_cross_entropy"))
        _one_of(self, mixing=("together", "synthetic_then_real"), validate_on=("synthetic", "real"))
        _one_of(self, amp=("none", "bf16"), lr_decay=("none", "cosine"), augmentation=("affine", "randaugment"))
        _one_of(self, normalise=("range", "zscore"))
        _within(self, batch_size=(1, 65536), lr=(1e-12, 10), real_fraction=(0, 1), augment_strength=(0, 10))
        if self.kind == "segmentation" and self.augmentation == "randaugment":
            raise UserError("augmentation: randaugment moves images without their maps; segmentation takes affine")
        _within(self, num_epochs=(1, INF), num_steps=(0, INF), width=(1, 4096), weight_decay=(0, 1e3))
        _within(self, validate_every_epochs=(1, INF), seed=(0, MAX_SEED))


@dataclass
class SearchConfig:
    """Search of a task set-up. `space` maps a key of the task to low/high/log, choices, or values of other sets."""

    num_trials: int = 20
    max_concurrent: int = 2
    objectives: list[str] = field(default_factory=lambda: ["score"])
    scheduler: str = "none"
    pruning_grace_epochs: int = 5
    optuna_url: str = ""
    num_refits: int = 3
    space: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of(self, scheduler=("none", "asha", "median"))
        _within(self, num_trials=(1, 1e6), max_concurrent=(1, 1e5), num_refits=(0, 1000))
        _within(self, pruning_grace_epochs=(1, 1e6), seed=(0, MAX_SEED))
        if self.objectives not in (["score"], ["score", "cost"]):
            raise UserError(f"objectives: {self.objectives} is neither [score] nor [score, cost]")


@dataclass
class RayConfig:
    """Where Ray runs. address "" joins RAY_ADDRESS or the job's cluster, else starts a local one with `num_cpus`."""

    address: str = ""
    num_cpus: int | None = None
    object_store_mb: int = 1024

    def __post_init__(self) -> None:
        _within(self, num_cpus=(1, 1e5), object_store_mb=(75, 1e9))  # Ray takes no less
        if self.address not in ("", "auto") and not self.address.rpartition(":")[2].isdigit():
            raise UserError(f"address: {self.address!r} is neither host:port, ray://host:port nor auto")


@dataclass
class WorkersConfig:
    """Placement. It never changes a result: only how many processes share the work, and what each may use.

    A fit holds its frames in memory, at most `max_resident_gb` a worker; sets of `ray_data_from_mb` (decoded) or more
    are read and decoded by Ray Data, smaller ones by the worker itself.
    """

    num_workers: int = 1
    min_workers: int = 0
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    threads_per_worker: int = 1
    max_failures: int = 3
    max_resident_gb: float = 16.0
    ray_data_from_mb: float = 32.0

    def __post_init__(self) -> None:
        _within(self, num_workers=(1, 1e5), min_workers=(0, 1e5), gpus_per_worker=(0, 64), cpus_per_worker=(0, 4096))
        _within(self, threads_per_worker=(1, 4096), max_failures=(-1, 1e6), max_resident_gb=(0, INF))
        _within(self, ray_data_from_mb=(0, INF))


@dataclass
class TrackingConfig:
    """MLflow. uri "" means a sqlite database under the storage folder."""

    enabled: bool = True
    uri: str = ""
    experiment: str = "raysyn"

    def __post_init__(self) -> None:
        known = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
        if self.uri and self.uri.partition("://")[0].partition("+")[0] not in known:
            raise UserError(
                f"uri: {self.uri!r} is no address of an MLflow server or database; "
                "give http://host:5000, sqlite:////folder/mlflow.db or postgresql://..."
            )


@dataclass
class CostConfig:
    """Prices, for the money columns. No default is a quotation: set your own."""

    usd_per_gpu_hour: float = 2.5
    usd_per_cpu_hour: float = 0.05

    def __post_init__(self) -> None:
        _within(self, usd_per_gpu_hour=(0, 1e6), usd_per_cpu_hour=(0, 1e6))


@dataclass
class JobConfig:
    """What every job has. `scale` names the preset; `storage` is a folder or a URI (s3://bucket/prefix)."""

    scale: str = "paper"
    storage: str = "runs/paper"
    plan_only: bool = False
    overwrite: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cost: CostConfig = field(default_factory=CostConfig)


@dataclass
class PrepareJob(JobConfig):
    """`jobs/prepare.py`: raw data to frames."""


@dataclass
class FitJob(JobConfig):
    """`jobs/fit.py`: the autoencoder (latent models) and the diffusion model. `what` limits it to the autoencoder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    what: str = "all"

    def __post_init__(self) -> None:
        _one_of(self, what=("all", "autoencoder"))


@dataclass
class SynthesizeJob(JobConfig):
    """`jobs/synthesize.py`: masks to frames. `model_dir` is a saved pipeline; "" takes the fit of `model`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    model_dir: str = ""
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)


@dataclass
class TuneJob(JobConfig):
    """`jobs/tune.py`: search one task on one or more frame sets (folders of frames; the first is the default set)."""

    task: TaskConfig = field(default_factory=TaskConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    train_sets: list[str] = field(default_factory=list)


@dataclass
class CompareJob(JobConfig):
    """`jobs/compare.py`: the study. One row a (model, solver, number of steps), the ceiling beside them.

    `extractors` name what realism is measured with: lite0 (embedded), inception=FILE, <timm model>=FILE.
    """

    models: list[ModelConfig] = field(default_factory=list)
    solvers: list[str] = field(default_factory=lambda: ["euler", "heun"])
    steps: list[int] = field(default_factory=lambda: [5, 10, 25, 50, 100, 200])
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    segmentation: TaskConfig = field(default_factory=TaskConfig)
    classification: TaskConfig = field(default_factory=lambda: TaskConfig(kind="classification"))
    search: SearchConfig = field(default_factory=SearchConfig)
    num_task_seeds: int = 1
    controls: list[str] = field(default_factory=lambda: ["reconstruction", "prior"])
    extractors: list[str] = field(default_factory=lambda: ["lite0"])
    curves: bool = False

    def __post_init__(self) -> None:
        for key, choices in (("solvers", SOLVERS), ("controls", CONTROLS)):
            for value in getattr(self, key):
                if value not in choices:
                    raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}")
        _not_empty(self, "solvers", "steps")
        labels = [model.label for model in self.models]
        lists: dict[str, list[Any]] = {"model": labels, "solvers": self.solvers, "steps": self.steps}
        lists |= {"controls": self.controls, "extractors": self.extractors}
        for key, values in lists.items():
            if twice := [v for v in values if values.count(v) > 1]:
                raise UserError(f"{key}: {twice[0]} comes twice; a row has one place in the table")
        _each_within(self, steps=(1, 10_000))
        _within(self, num_task_seeds=(1, 1000))
        for key in ("segmentation", "classification"):
            if (kind := getattr(self, key).kind) != key:
                raise UserError(f"{key}.kind: is {kind!r}; here it is always {key}")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass config as plain containers."""
    return dataclasses.asdict(config)


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name a result: sha256 of the canonical JSON of `parts` (dataclasses, containers, strings)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=to_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
