"""Pictures of a running fit: label maps above what the model makes of them."""

from __future__ import annotations

import io
import logging

import numpy as np
import torch
from PIL import Image

from raysyn.config import ModelConfig
from raysyn.diffusion.precondition import Denoiser
from raysyn.nets.codecs import Codec, LatentCodec
from raysyn.pipeline import FittedModel, synthesize_images, to_u8
from raysyn.report.grids import colour_map, spread_over_views
from raysyn.types import FrameArrays, UserError

NUM_PICTURES = 8


def sample_grid(denoiser: Denoiser, codec: Codec, model: ModelConfig, frames: FrameArrays) -> np.ndarray:
    """RGB uint8 [2H, nW, 3]: label maps of held-out frames, below them an image drawn for each, always of one seed.

    Black, with a warning, where the images are no finite numbers: a fit does not end for a picture.
    """
    chosen = frames.take(spread_over_views(frames, NUM_PICTURES))
    # Not `.to(device)`: that lays the weights out for sampling, and steps from another layout round otherwise.
    fitted = FittedModel(denoiser, codec, model, chosen.image_u8.shape[1], "")
    seeds = list(range(len(chosen)))
    try:
        images = synthesize_images(fitted, chosen.label_map, chosen.view, seeds, amp=model.fit.amp)
    except UserError as error:
        logging.getLogger("raysyn.fit").warning("no picture of the fit as it is now: %s", error)
        images = np.zeros_like(chosen.label_map)
    return stacked([colour_map(chosen.label_map), images])


def reconstruction_grid(codec: Codec, frames: FrameArrays, device: torch.device) -> np.ndarray:
    """RGB uint8 [2H, nW, 3]: held-out frames, below them what the autoencoder makes of their posterior means."""
    assert isinstance(codec, LatentCodec)
    chosen = frames.take(spread_over_views(frames, NUM_PICTURES))
    sector = torch.from_numpy(chosen.label_map != 0)[:, None].float().to(device)
    image_01 = torch.from_numpy(chosen.image_u8)[:, None].float().to(device) / 255 * sector
    with torch.no_grad():
        decoded = codec.vae.decode(codec.vae.encode(image_01, sector).mean, sector).clamp(0, 1)
    return stacked([chosen.image_u8 * (chosen.label_map != 0), to_u8(decoded * 2 - 1)])


def stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of images, each [n, H, W] or [n, H, W, 3], as one RGB picture."""
    rgb = [r if r.ndim == 4 else np.repeat(r[..., None], 3, axis=-1) for r in rows]
    return np.concatenate([np.concatenate(list(r), axis=1) for r in rgb], axis=0)


def png(rgb: np.ndarray) -> bytes:
    """PNG of an RGB picture uint8 [H, W, 3]."""
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, format="PNG")
    return sink.getvalue()
