"""Networks of the downstream tasks, by the `arch` of a TaskConfig: libraries' own, and two small ones for small images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysyn.config import TaskConfig
from raysyn.labels import TASK_CLASSES
from raysyn.metrics.extractors import lite0_weights, one_channel, read_state_dict
from raysyn.types import VIEWS, UserError


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    layers = [nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


class SmallUNet(nn.Module):
    """Four-level U-Net: image [B, 1, H, W] -> logits [B, classes, H, W]; H and W multiples of 8."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList()
        for i, w in enumerate(widths):
            before = 1 if i == 0 else widths[i - 1]
            self.down.append(nn.Sequential(_conv(before, w, 1 if i == 0 else 2), _conv(w, w)))
        self.up = nn.ModuleList(
            nn.Sequential(_conv(wide + narrow, narrow), _conv(narrow, narrow))
            for wide, narrow in zip(widths[:0:-1], widths[-2::-1])
        )
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        skips.pop()
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skips.pop()], dim=1))
        return self.out(x)


class SmallCNN(nn.Module):
    """Small classifier: image [B, 1, H, W] -> logits [B, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = [_conv(1, width)]
        for narrow, wide in pairwise(widths):
            layers += [_conv(narrow, wide, 2), _conv(wide, wide)]
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(2 * widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        return self.out(torch.cat([f.mean((2, 3)), f.amax((2, 3))], dim=1))


def _encoder_weights(task: TaskConfig) -> dict[str, Tensor] | None:
    if not task.weights:
        return None
    if task.weights == "embedded":
        return one_channel(lite0_weights()[0])
    path = Path(task.weights)
    if not path.is_file():
        raise UserError(f"task.weights: no file {path}; give a state dict, or embedded for EfficientNet-Lite0's")
    return one_channel(read_state_dict(path, "task.weights"))


def _load_encoder(net: nn.Module, task: TaskConfig, prefix: str) -> None:
    weights = _encoder_weights(task)
    if weights is None:
        return
    target = net.state_dict()
    fitting = {
        prefix + k: v for k, v in weights.items() if prefix + k in target and target[prefix + k].shape == v.shape
    }
    if len(fitting) < 0.5 * len(weights):
        raise UserError(
            f"task.weights: {task.weights} does not fit {task.arch} ({len(fitting)} of {len(weights)} tensors)"
        )
    net.load_state_dict({**target, **fitting})


def check_net(task: TaskConfig, image_size: int) -> None:
    """Raise UserError unless the task's net can be built, with its weights, and takes images of `image_size`."""
    net = build_segmenter(task, image_size) if task.kind == "segmentation" else build_classifier(task)
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 1, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"task.arch: {task.arch} takes no images of data.image_size {image_size} ({line})") from None


def build_segmenter(task: TaskConfig, image_size: int) -> nn.Module:
    """image [B, 1, H, W] -> logits [B, 4, H, W]: `dynunet` (MONAI), `unet:small`, or `unet:<timm encoder>`."""
    classes = len(TASK_CLASSES)
    _refuse_weights(task, "unet:small", "dynunet")
    if task.arch == "unet:small":
        return SmallUNet(task.width, classes)
    if task.arch == "dynunet":
        from monai.networks.nets import DynUNet

        depth = max(2, min(7, image_size.bit_length() - 3))
        kernels, strides = [3] * (depth + 1), [1] + [2] * depth
        filters = [min(task.width * 2**i, 512) for i in range(depth + 1)]
        return DynUNet(2, 1, classes, kernels, strides, strides[1:], filters=filters)
    kind, _, encoder = task.arch.partition(":")
    if kind != "unet" or not encoder:
        raise UserError(f"task.arch: {task.arch!r} is not dynunet, unet:small or unet:<timm encoder>")
    import segmentation_models_pytorch as smp

    net: Any = _known(lambda: smp.Unet(f"tu-{encoder}", encoder_weights=None, in_channels=1, classes=classes), task)
    _load_encoder(net.encoder, task, "model.")
    return net


def build_classifier(task: TaskConfig) -> nn.Module:
    """image [B, 1, H, W] -> logits [B, 2]: `cnn:small`, or any timm model by name."""
    _refuse_weights(task, "cnn:small")
    if task.arch == "cnn:small":
        return SmallCNN(task.width, len(VIEWS))
    import timm

    net: Any = _known(lambda: timm.create_model(task.arch, in_chans=1, num_classes=len(VIEWS)), task)
    _load_encoder(net, task, "")
    return net


def _refuse_weights(task: TaskConfig, *own: str) -> None:
    if task.weights and task.arch in own:
        raise UserError(f"task.weights: {task.arch} starts from none; set weights='' or take a timm encoder")


def _known(make: Any, task: TaskConfig) -> Any:
    try:
        return make()
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"task.arch: {task.arch!r} is not known ({str(error).splitlines()[0]})") from None
