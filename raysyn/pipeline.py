"""A fitted model on disk and in a diffusers user's hands.

Layout of a model folder: `unet/` (averaged weights), `unet_raw/` (as trained), `vae/` for latent models (each
safetensors + config.json), `model.json` (the model's config), `model_index.json` (diffusers), `README.md` (card).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysyn.compose import build
from raysyn.config import ModelConfig, SamplerConfig, to_dict
from raysyn.data.storage import json_values
from raysyn.diffusion.generate import generate
from raysyn.diffusion.precondition import PRECONDITIONINGS, Denoiser
from raysyn.labels import semantic_index
from raysyn.models import check_nets
from raysyn.nets.codecs import Codec, LatentCodec, PixelCodec
from raysyn.nets.fixed_shape import FixedShapeNet, store_weights
from raysyn.nets.gamma_vae import GammaVAE
from raysyn.nets.precision import amp_dtype
from raysyn.nets.spade import one_hot_from_index
from raysyn.nets.unet import SemanticUNet
from raysyn.types import UserError

FORMAT = 1


@dataclass
class FittedModel:
    """A denoiser with its codec, config, the image size it was fitted at, and the sha256 of its weights."""

    denoiser: Denoiser
    codec: Codec
    config: ModelConfig
    image_size: int
    checkpoint_sha256: str

    def to(self, device: str | torch.device) -> FittedModel:
        """Move the nets, channels last, in which sampling is fastest on CPUs and GPUs alike; returns self."""
        self.denoiser.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(self.codec, LatentCodec):
            self.codec.vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def fix_shapes(self, amp: str = "none") -> FixedShapeNet:
        """Make the net ready for many batches of one shape: compiled, CUDA graphs, weights kept in `amp`.

        Returns the net, whose `fallbacks` tell what could not be had. The model is for sampling alone afterwards.
        """
        net = self.denoiser.net
        if (dtype := amp_dtype(amp, next(net.parameters()).device)) is not None:
            store_weights(net, dtype)
        self.denoiser.net = fixed = FixedShapeNet(net)
        return fixed


def synthesize_images(
    model: FittedModel,
    label_map: np.ndarray,
    view: np.ndarray,
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    *,
    amp: str = "none",
    modulation_cache_bytes: float = 1 << 30,
) -> np.ndarray:
    """Images uint8 [B, H, W] for label_map uint8 [B, H, W] (0 to 4), view uint8 [B] (index into VIEWS), a seed each."""
    x = sample_latents(model, label_map, view, seeds, sampler, amp=amp, modulation_cache_bytes=modulation_cache_bytes)
    return decode_images(model, x, label_map)


def sample_latents(
    model: FittedModel,
    label_map: np.ndarray,
    view: np.ndarray,
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    *,
    amp: str = "none",
    modulation_cache_bytes: float = 1 << 30,
) -> Tensor:
    """The first half of `synthesize_images`: x [B, C, h, w] in the model's own space (pixels or latents)."""
    device = next(model.denoiser.parameters()).device
    index = torch.from_numpy(semantic_index(label_map, view)).to(device)
    return generate(
        model.denoiser,
        one_hot_from_index(index),
        seeds,
        sampler or model.config.sampler,
        shape=model.codec.shape(label_map.shape[1]),
        amp=amp,
        modulation_cache_bytes=modulation_cache_bytes,
    )


def decode_images(model: FittedModel, x: Tensor, label_map: np.ndarray) -> np.ndarray:
    """The second half: images uint8 [B, H, W] from x, 0 outside the sector of label_map uint8 [B, H, W].

    Raises UserError where x is not finite: the images would be black, and no one would know why.
    """
    if bad := int((~x.isfinite()).flatten(1).any(1).sum()):
        what = "in fp16 numbers may overflow, so use amp=bf16 or none; else its weights are not usable"
        raise UserError(f"{model.config.name}: {bad} of {len(x)} images are not finite numbers ({what})")
    sector = torch.from_numpy(label_map != 0)[:, None].float().to(x.device)
    return to_u8(model.codec.decode(x, sector))


def to_u8(image_pm1: Tensor) -> np.ndarray:
    """uint8 [B, H, W] from image_pm1 [B, 1, H, W]; rounds to the nearest grey level."""
    scaled = ((image_pm1[:, 0].float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).cpu().numpy()


def weights_sha256(folder: str | Path) -> str:
    """sha256 over the weight files that sampling uses, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*.safetensors") if "unet_raw" not in p.parts):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # in pieces: a published net has 1.4 GB
    return digest.hexdigest()


def save_model(
    folder: str | Path,
    unet: SemanticUNet,
    raw_unet: SemanticUNet,
    codec: Codec,
    config: ModelConfig,
    image_size: int,
    facts: Mapping[str, Any] | None = None,
    patients: Sequence[str] = (),
) -> str:
    """Write a model folder (local) with averaged and raw weights; returns its checkpoint sha256.

    `facts` fill the card; `patients`, those it was fitted and validated on, travel with it, so that a task can be
    refused to test on them.
    """
    folder = Path(folder)
    unet.save_pretrained(folder / "unet")
    raw_unet.save_pretrained(folder / "unet_raw")
    index: dict[str, Any] = {"_class_name": "SemanticDiffusionPipeline", "unet": ["raysyn", "SemanticUNet"]}
    index["vae"] = [None, None]
    if isinstance(codec, LatentCodec):
        codec.vae.save_pretrained(folder / "vae")
        index["vae"] = ["raysyn", "GammaVAE"]
    # `build` reads the text "inf" back; as a number JSON has none
    settings = {"format": FORMAT, "image_size": image_size, "config": json_values(to_dict(config), str)}
    (folder / "model_index.json").write_text(json.dumps({**index, "settings": settings}, indent=2))
    sha256 = weights_sha256(folder)
    (folder / "README.md").write_text(model_card(config, image_size, sha256, facts or {}))
    (folder / "model.json").write_text(
        json.dumps({**settings, "checkpoint_sha256": sha256, "patients": list(patients)}, indent=2)
    )
    return sha256


def _load_part(cls: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def load_model_dir(folder: str | Path) -> FittedModel:
    """Read a local model folder. Raises UserError for a missing, foreign, incomplete or altered one."""
    folder = Path(folder)
    config, image_size, sha256 = check_model_dir(folder)
    try:
        unet = _load_part(SemanticUNet, folder / "unet")
        vae = _load_part(GammaVAE, folder / "vae") if config.space == "latent" else None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: weights cannot be read ({str(error).splitlines()[0]})") from None
    return assemble(unet, vae, config, image_size, sha256, str(folder))


def check_model_dir(folder: Path) -> tuple[ModelConfig, int, str]:
    """(config, image size, sha256 of the weights) of a model folder. Raises UserError as `load_model_dir` does."""
    try:
        saved = json.loads((folder / "model.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no model.json there; give the folder that jobs/fit.py names as model_dir") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/model.json: cannot be read ({error})") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise UserError(f"{folder}/model.json: not a model of this version (format {FORMAT}); fit it again")
    for key, kind in (("config", dict), ("image_size", int), ("checkpoint_sha256", str)):
        if not isinstance(saved.get(key), kind):
            raise UserError(f"{folder}/model.json: has no {key}; the folder was altered or is damaged")
    try:
        config = build(ModelConfig, saved["config"])
    except UserError as error:
        raise UserError(f"{folder}/model.json: {error}") from None
    if weights_sha256(folder) != saved["checkpoint_sha256"]:
        raise UserError(
            f"{folder}: weights do not match the sha256 in model.json; the folder was altered or is damaged"
        )
    return config, saved["image_size"], saved["checkpoint_sha256"]


def check_saved_nets(folder: Path, config: ModelConfig, image_size: int) -> None:
    """Raise UserError unless the nets in a model folder, by their own configs, are the model's; no weight is read."""
    parts: list[Any] = [(SemanticUNet, "unet"), *([(GammaVAE, "vae")] if config.space == "latent" else [])]
    try:
        with torch.device("meta"):
            nets = [cls.from_config(cls.load_config(folder / name)) for cls, name in parts]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: its nets cannot be made ({str(error).splitlines()[0]})") from None
    assemble(nets[0], nets[1] if len(nets) > 1 else None, config, image_size, "", str(folder))


def assemble(
    unet: SemanticUNet, vae: GammaVAE | None, config: ModelConfig, image_size: int, sha256: str, where: str
) -> FittedModel:
    """The model of these nets. Raises UserError, naming `where`, for nets that are not the config's."""
    try:
        check_nets(config, image_size, unet, vae)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    codec: Codec = LatentCodec(vae) if vae is not None else PixelCodec()
    denoiser = Denoiser(unet, PRECONDITIONINGS[config.precondition]()).eval()
    return FittedModel(denoiser, codec, config, image_size, sha256)


def model_card(config: ModelConfig, image_size: int, sha256: str, facts: Mapping[str, Any]) -> str:
    """README.md of a model folder, in the hub's form."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    return f"""---
license: apache-2.0
library_name: diffusers
tags: [echocardiography, semantic-diffusion, synthetic-data]
---
# {config.name} at {image_size} px

A semantic diffusion model: it draws apical echocardiogram frames (2CH, 4CH) from label maps.
Space: {config.space}. Formulation: {config.precondition}. Network: {config.net.arch}. Weights sha256: `{sha256}`.

## Intended use
Synthetic training data for segmentation and view classification, research only. Not for diagnosis. What an image is
worth is measured on the task: realism does not tell.

## Data, cost and metrics
{chr(10).join(lines) or "- not recorded"}

## How to use
```python
from raysyn.pipeline import SemanticDiffusionPipeline
pipeline = SemanticDiffusionPipeline.from_pretrained("this folder")
images = pipeline(label_maps, views, seeds=[0, 1], num_inference_steps={config.sampler.num_steps})
```
It needs the raysyn package: the folder holds weights and settings, no code, so diffusers' own
`DiffusionPipeline.from_pretrained` cannot open it.
"""


def guidance_doubt(config: ModelConfig, sampler: SamplerConfig) -> str:
    """What speaks against the sampler's guidance with this model; "" for nothing."""
    if sampler.guidance_scale == 1.0 or config.label_dropout > 0:
        return ""
    scale = f"guidance_scale {sampler.guidance_scale:g}"
    return f"{scale}: {config.name} was fitted without label_dropout, so that its null map says nothing"


def __getattr__(name: str) -> Any:
    """`SemanticDiffusionPipeline`, defined when asked for: diffusers' pipelines cost seconds that samplers do not need."""
    if name == "SemanticDiffusionPipeline":
        from raysyn.diffusers_pipeline import SemanticDiffusionPipeline

        return SemanticDiffusionPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
