"""Where frames come from, and which of them are synthesized."""

from __future__ import annotations

from dataclasses import dataclass, field

from raysyn.config.checks import INF, MAX_SEED, not_empty, one_of, rising, within
from raysyn.types import UserError


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
        one_of(self, name=("phantom", "camus", "png_folder"), on_bad_frame=("raise", "skip"))
        one_of(self, source=("real", "synthetic"))
        if self.source == "synthetic" and self.name != "png_folder":
            raise UserError(f"data.source: synthetic is for PNG folders; {self.name} is what it is")
        within(self, image_size=(32, 1024), num_train_patients=(1, 1e6), num_validation_patients=(1, 1e6))
        within(self, num_test_patients=(1, 1e6), seed=(0, MAX_SEED))


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
        within(self, rotation_deg=(0, 180), translation=(0, 1), scale_min=(0.1, 10), scale_max=(0.1, 10))
        within(self, shear_deg=(0, 45), elastic_px=(0, 256))
        rising(self, "scale_min", "scale_max")


@dataclass
class SynthesizeConfig:
    """Which images are synthesized: masks x warps x noise seeds, in shards and batches of fixed composition.

    `batch_size` 0 is as many as the device holds, which each worker finds out by a probe (32 on a CPU). `compile` makes
    each worker compile the net for the batch's shape first: minutes on a GPU, then less time an image.
    `modulation_cache_bytes` null is 1 GiB on a CPU and a quarter of a GPU's memory. `amp` bf16 or fp16 is fp32 on
    devices without arithmetic in it.
    """

    mask_splits: list[str] = field(default_factory=lambda: ["train", "validation"])
    num_warps: int = 5
    num_noise_seeds: int = 1
    seed: int = 0
    batch_size: int = 16
    shard_size: int = 256
    amp: str = "none"
    compile: bool = False
    modulation_cache_bytes: int | None = None
    min_faithfulness: float = 0.0
    max_attempts: int = 3
    segmenter_dir: str = ""
    plan_only: bool = False
    warp: WarpConfig = field(default_factory=WarpConfig)

    def __post_init__(self) -> None:
        one_of(self, amp=("none", "bf16", "fp16"))
        within(self, num_warps=(1, 1e6), num_noise_seeds=(1, 1e6), batch_size=(0, 65536), shard_size=(1, 1e6))
        within(self, min_faithfulness=(0, 1), max_attempts=(1, 100), modulation_cache_bytes=(0, INF))
        within(self, seed=(0, MAX_SEED))
        not_empty(self, "mask_splits")
        if self.batch_size and self.shard_size % self.batch_size:
            raise UserError(f"shard_size: {self.shard_size} is not a multiple of batch_size {self.batch_size}")
        unknown = sorted(set(self.mask_splits) - {"train", "validation"})
        if unknown:
            raise UserError(f"mask_splits: {unknown} may not be used; conditions come from train and validation only")
