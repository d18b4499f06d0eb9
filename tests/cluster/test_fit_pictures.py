"""Pictures of a running fit leave it as it was."""

import numpy as np
import pytest
import torch

from raysyn.cluster.fit_pictures import sample_grid
from raysyn.compose import load_job
from raysyn.models import build_denoiser, build_vae
from raysyn.nets.codecs import Codec, LatentCodec, PixelCodec
from raysyn.types import FrameArrays


def strides(*nets: torch.nn.Module) -> list[tuple[int, ...]]:
    return [p.stride() for net in nets for p in net.parameters()]


@pytest.mark.parametrize("name", ["edm", "edm_l128"])
def test_a_grid_drawn_in_the_middle_leaves_the_layout_of_the_weights(name: str, caplog) -> None:
    """Steps from another layout round otherwise: a fit resumed after a grid would part from one that was not killed."""
    model = load_job("fit", ["scale=tiny", f"model={name}"]).model
    denoiser, vae = build_denoiser(model, 64), build_vae(model) if model.space == "latent" else None
    codec: Codec = LatentCodec(vae) if vae is not None else PixelCodec()
    nets = [denoiser] + ([vae] if vae is not None else [])
    before = strides(*nets)
    maps, nan = np.full((2, 64, 64), 2, np.uint8), np.full((2, 2), np.nan, np.float32)
    zeros, names = np.zeros(2, np.uint8), ["a", "b"]
    frames = FrameArrays(maps, maps, zeros, zeros, nan, names, names, names, names)
    assert sample_grid(denoiser, codec, model, frames).shape == (128, 128, 3)
    assert strides(*nets) == before
    with torch.no_grad():
        next(denoiser.parameters()).fill_(torch.nan)
    with caplog.at_level("WARNING", "raysyn.fit"):
        assert not sample_grid(denoiser, codec, model, frames)[64:].any()
    assert "not finite numbers" in caplog.text
