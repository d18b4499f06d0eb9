"""A writer of published checkpoints: byte for byte as the reference pickles them, of small nets of ours."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from raysyn.nets.unet import SemanticUNet

SMALL = {
    "adm": dict(channel_multipliers=(1, 2), num_blocks=2, attention_resolutions=(8,), channels_per_head=16),
    "ddpmpp": dict(channel_multipliers=(2, 2), num_blocks=1, attention_resolutions=(16,)),
    "ncsnpp": dict(channel_multipliers=(2, 2), num_blocks=1, attention_resolutions=(16,)),
}
CLASSES = {
    "adm": ("EDMPrecond", "DhariwalUNet"),
    "ddpmpp": ("VPPrecond", "SongUNet"),
    "ncsnpp": ("VEPrecond", "SongUNet"),
}


def small_net(arch: str, **more) -> SemanticUNet:
    torch.manual_seed(0)
    net = SemanticUNet(16, arch=arch, base_channels=32, spade_hidden=8, dropout=0.1, **{**SMALL[arch], **more}).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else torch.randn_like(p) * 0.1 + 0.5)
    return net


class Persistent:
    """Pickles as the reference's classes do: a call of _reconstruct_persistent_obj on a dict."""

    def __init__(self, class_name: str, state: dict) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = dict(
            type="class", version=6, module_src="raise SystemExit('ran the source')", class_name=self.class_name
        )
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({**meta, "state": self.state},)


@contextmanager
def modules_of_the_reference() -> Iterator[None]:
    """Modules of the reference's names, for the writer only."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    made = {name: types.ModuleType(name) for name in names}

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the reader must not call this")

    class EasyDict(dict):
        pass

    for value, home in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")):
        value.__module__, value.__qualname__ = home, value.__name__
        setattr(made[home], value.__name__, value)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.items():
            patch.setitem(sys.modules, name, module)
        yield


def module_tree(tensors: dict[str, torch.Tensor], class_of, constants) -> Persistent:
    """Nested module states from dotted names, parameters and buffers where torch keeps them."""

    def node(prefix: str, names: list[str]):
        own = {n: tensors[prefix + n] for n in names if "." not in n}
        children = OrderedDict()
        for child in dict.fromkeys(n.split(".")[0] for n in names if "." in n):
            rest = [n.split(".", 1)[1] for n in names if n.startswith(child + ".")]
            children[child] = node(f"{prefix}{child}.", rest)
        buffers = {k: v for k, v in own.items() if k in ("freqs", "resample_filter", "u")}
        parameters = {k: torch.nn.Parameter(v) for k, v in own.items() if k not in buffers}
        state = dict(training=False, _parameters=OrderedDict(parameters), _buffers=OrderedDict(buffers))
        state |= dict(_modules=children, _forward_hooks=OrderedDict(), **constants(prefix))
        kind = class_of(prefix)
        if isinstance(kind, str):
            return Persistent(kind, state)
        shell = kind.__new__(kind)
        shell.__dict__.update(state)
        return shell

    return node("", list(tensors))


def write_checkpoint(
    path: Path, net: SemanticUNet, protocol: int = 4, *, extra=None, precond="", settings=None, **root
) -> None:
    """`extra`: more tensors by name; `precond`: another class of it; `settings`: constants by module name."""
    published, unet = CLASSES[net.config.arch]
    precond = precond or published

    def class_of(prefix: str):
        if prefix == "":
            return precond
        if prefix == "model.":
            return unet
        if prefix in ("model.enc.", "model.dec."):
            return torch.nn.ModuleDict
        if prefix.endswith("mlp_shared."):
            return torch.nn.Sequential
        return "UNetBlock" if "norm" not in prefix and "conv" not in prefix else "Conv2d"

    def constants(prefix: str) -> dict:
        if prefix == "":
            return {"img_resolution": 16, "img_channels": 1, "label_dim": 0, "sigma_data": np.float64(0.5), **root}
        if settings and prefix in settings:
            return settings[prefix]
        return dict(num_heads=2) if prefix.endswith("in0.") and net.config.arch == "adm" else dict(embedding=3)

    tensors = {f"model.{k}": v for k, v in net.state_dict().items()}
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if net.config.arch == "ncsnpp" else [1.0, 1.0])
    tensors["model.enc.8x8_down.conv0.resample_filter"] = (taps.outer(taps) / taps.sum() ** 2)[None, None]
    tensors |= extra or {}
    easy = sys.modules["dnnlib.util"].EasyDict(class_name="training.loss.EDMLoss")
    content = dict(ema=module_tree(tensors, class_of, constants), loss_fn=None, augment_pipe=None, dataset_kwargs=easy)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
