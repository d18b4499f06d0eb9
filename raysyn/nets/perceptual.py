"""The perceptual term of the autoencoder's loss: distance in the features of a timm backbone, where weights are given."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.types import UserError


class PerceptualNet(nn.Module):
    """Features at every level of a timm backbone for image_01 [B, 1, H, W]: grey repeated to RGB, its own mean and sd."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone
        for key in ("mean", "std"):
            value = torch.tensor(backbone.pretrained_cfg[key]).reshape(1, -1, 1, 1)  # type: ignore[index]
            self.register_buffer(key, value, persistent=False)

    def forward(self, image_01: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.backbone.forward_intermediates(
            (image_01 - self.mean) / self.std, intermediates_only=True
        )
        return features


def build_perceptual(backbone: str, weights: str) -> tuple[nn.Module | None, str]:
    """(feature net, status): any timm backbone with weights from a local file; without them (None, why it is off).

    The file holds timm's own names (.safetensors, or a torch file read with weights_only). Raises UserError for a
    backbone that timm does not have, and for a file that is missing or another net's.
    """
    if not backbone or not weights:
        return None, "off: no weights given (vae.perceptual_backbone, vae.perceptual_weights)"
    if not Path(weights).is_file():
        raise UserError(f"vae.perceptual_weights: {weights} is no file; give {backbone}'s weights, or none for no term")
    import timm

    if not timm.is_model(backbone):
        raise UserError(f"vae.perceptual_backbone: timm has no {backbone!r}")
    net = timm.create_model(backbone, pretrained=False)
    if not hasattr(net, "forward_intermediates"):
        raise UserError(f"vae.perceptual_backbone: timm's {backbone} does not give its intermediate features")
    try:
        net.load_state_dict(_read_state(weights))
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{weights}: not weights of timm's {backbone} ({str(error).splitlines()[0]})") from None
    return PerceptualNet(net).eval().requires_grad_(False), f"{backbone} from {weights}"


def _read_state(file: str) -> dict[str, Tensor]:
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def perceptual_distance(net: nn.Module, image_a: Tensor, image_b: Tensor) -> Tensor:
    """Mean squared distance of unit-norm features over all levels, of each image [B]."""
    total = image_a.new_zeros(image_a.shape[0])
    for a, b in zip(net(image_a), net(image_b)):
        total = total + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().flatten(1).mean(1)
    return total
