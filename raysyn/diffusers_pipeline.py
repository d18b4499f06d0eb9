"""The model folder as a diffusers `DiffusionPipeline`."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from raysyn.compose import build
from raysyn.config import ModelConfig
from raysyn.labels import NUM_CHANNELS, STRUCTURES, check_label_map, view_index
from raysyn.nets.gamma_vae import GammaVAE
from raysyn.nets.precision import AMP_DTYPES
from raysyn.nets.unet import SemanticUNet
from raysyn.pipeline import assemble, check_model_dir, guidance_doubt, save_model, synthesize_images
from raysyn.types import VIEWS, UserError


class SemanticDiffusionPipeline(DiffusionPipeline):
    """Label maps to echocardiogram frames. `from_pretrained(folder)` reads what `jobs/fit.py` wrote.

    Load it through this class. Plain `diffusers.DiffusionPipeline.from_pretrained` looks for pipeline classes inside
    diffusers only (or in code shipped with the weights, which a model folder of ours never has) and ends in an
    AttributeError that names this class.
    """

    _optional_components = ["vae"]

    def __init__(self, unet: SemanticUNet, vae: GammaVAE | None = None, settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        if not settings:
            raise UserError("settings: missing; load a folder written by jobs/fit.py or save_pretrained")
        self.register_modules(unet=unet, vae=vae)
        self.register_to_config(settings=settings)
        config = build(ModelConfig, settings["config"])
        self.model = assemble(unet, vae, config, settings["image_size"], "", "pipeline")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Read a model folder (any of diffusers' options may be given but another dtype: `amp` is for that).

        Raises UserError for a folder that is missing, altered or another model's.
        """
        _refuse_dtype(*(options.pop(key, None) for key in ("dtype", "torch_dtype")))
        check_model_dir(Path(folder))  # refuses what must not be drawn from: diffusers itself checks nothing
        return super().from_pretrained(str(folder), **{"low_cpu_mem_usage": False, **options})

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move it to a device. Raises UserError for another dtype: `amp` is for that."""
        _refuse_dtype(*(a for a in args if isinstance(a, torch.dtype)), kwargs.get("dtype"))
        return super().to(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **facts: Any) -> None:
        """Write a model folder, `facts` in its card; the weights at hand stand for the averaged and the raw ones.

        Always safetensors, whole and local: raises UserError for diffusers' options that ask for anything else.
        """
        refused = sorted(set(facts) & {"variant", "push_to_hub", "max_shard_size"})
        if refused or not safe_serialization:
            what = ", ".join(refused) or "safe_serialization=False"
            raise UserError(f"save_pretrained: {what} is not offered; a model folder is local and holds safetensors")
        model = self.model
        save_model(save_directory, self.unet, self.unet, model.codec, model.config, model.image_size, facts)

    def __call__(
        self,
        label_maps: np.ndarray,
        views: Sequence[str] | str | None = None,
        seeds: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        guidance_scale: float | None = None,
        output_type: str = "np",
        amp: str = "none",
    ) -> Any:
        """label_maps uint8 [B, H, W] with values 0 to 4, one of 2CH and 4CH each -> uint8 [B, H, W], or PIL images.

        Without `views` the maps say the view: 0 to 4 is 2CH, 5 to 9 the same structures in 4CH (the conditioning's
        channels, `raysyn.labels.semantic_index`). `seeds` one a map (0, 1, … unless given); `output_type` np or pil.
        `amp` none, bf16 or fp16 is what the network works in (fp32 on devices without arithmetic in it).
        The same seed and map give the same image in any batch on the same kind of device. Raises UserError for label
        values outside the set or a map of the wrong size.
        """
        if output_type not in ("np", "pil"):
            raise UserError(f"output_type: {output_type!r} is not one of np, pil")
        maps, view = check_maps(label_maps, views, self.model.image_size)
        if amp not in ("none", *AMP_DTYPES):
            raise UserError(f"amp: {amp!r} is not one of none, {', '.join(AMP_DTYPES)}")
        try:
            seeds = range(len(maps)) if seeds is None else [operator.index(seed) for seed in seeds]
            num_inference_steps = None if num_inference_steps is None else operator.index(num_inference_steps)
        except TypeError:
            raise UserError("seeds: give a whole number a map; num_inference_steps: give one whole number") from None
        changes = {"num_steps": num_inference_steps, "solver": solver, "guidance_scale": guidance_scale}
        wanted: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
        sampler = dataclasses.replace(self.model.config.sampler, **wanted)
        if doubt := guidance_doubt(self.model.config, sampler):
            warnings.warn(doubt, stacklevel=2)
        images = synthesize_images(self.model, maps, view, list(seeds), sampler, amp=amp)
        if output_type == "pil":
            from PIL import Image

            return [Image.fromarray(image) for image in images]
        return images


def _refuse_dtype(*dtypes: Any) -> None:
    if any(dtype not in (None, torch.float32) for dtype in dtypes):
        raise UserError("dtype: weights are kept in fp32; pass amp='bf16' when drawing")


def split_views(maps: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(label maps 0 to 4, a view each) of maps uint8 [B, H, W] that say their own view: values 5 to 9 mean 4CH.

    Outside the sector may be 0 in both views. Raises UserError for values above 9 and a map of both views.
    """
    found = []
    for i, each in enumerate(maps):
        if each.dtype != np.uint8 or each.ndim != 2:
            check_label_map(each, f"label map {i}")
        values = np.unique(each)
        if values.max(initial=0) >= NUM_CHANNELS:
            extra = [int(v) for v in values if v >= NUM_CHANNELS]
            raise UserError(f"label map {i}: label values {extra} are outside the set 0 to {NUM_CHANNELS - 1}")
        views = {int(v) // len(STRUCTURES) for v in values if v != 0} or {0}
        if len(views) > 1:
            raise UserError(f"label map {i}: has values of both views (1 to 4 and 5 to 9); a map has one view")
        found.append(VIEWS[views.pop()])
    return maps % len(STRUCTURES), found


def check_maps(
    label_maps: np.ndarray, views: Sequence[str] | str | None, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(label maps uint8 [B, H, W], view indices uint8 [B]). Raises UserError for a wrong value, size or view.

    `views` is one a map, one name for all, or None where the maps say it themselves (`split_views`).
    """
    try:
        label_maps = np.asarray(label_maps)
    except ValueError:
        raise UserError("label_maps: are of different sizes; this model draws one size") from None
    if label_maps.ndim == 2:
        label_maps = label_maps[None]
    if label_maps.ndim != 3 or len(label_maps) == 0:
        raise UserError(f"label_maps: give [B, H, W] with at least one map, got the shape {label_maps.shape}")
    if views is None:
        label_maps, views = split_views(label_maps)
    elif isinstance(views, str):
        views = [views] * len(label_maps)
    for i, label_map in enumerate(label_maps):
        check_label_map(label_map, f"label map {i}")
        if label_map.shape != (image_size, image_size):
            size = "x".join(map(str, label_map.shape))
            raise UserError(f"label map {i}: is {size}, but this model draws {image_size}x{image_size}; resize it")
    if len(views) != len(label_maps):
        raise UserError(f"views: {len(views)} for {len(label_maps)} label maps; give one a map")
    return label_maps, np.array([view_index(v) for v in views], dtype=np.uint8)
