"""Importing published checkpoints of the reference: its weights in our nets, none of its code."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysyn.diffusion.precondition import EDM, IDDPM, VE, VP, Denoiser, Preconditioning
from raysyn.nets.unet import SemanticUNet
from raysyn.reference_format import Record, flatten, read_pickle
from raysyn.types import UserError

PRECONDS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
UNETS = ("DhariwalUNet", "SongUNet")
# The published nets also hold these; without class labels or augmentation given they add nothing.
IGNORED = re.compile(r"(^|\.)(resample_filter|map_label\.\w+|map_augment\.\w+|u)$")


def import_reference(file: str | Path) -> Denoiser:
    """The denoiser of a published checkpoint: a pickle with `ema`, or a bare state dict of the same names.

    Nothing that the file names is run, written or compiled. Raises UserError, naming what, for anything else than the
    format, a net that is not one of the three architectures with SPADE, or weights that do not fit it.
    """
    name = str(file)
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    content = _read_zip(data, name) if data[:2] == b"PK" else read_pickle(data, name)
    if isinstance(content, dict) and isinstance(content.get("ema"), Record):
        content = content["ema"]
    if isinstance(content, Record):
        tensors, modules = flatten(content, name)
        root, inner = modules[""], modules.get("model")
        if root.class_name not in PRECONDS or inner is None or inner.class_name not in UNETS:
            found = f"{root.class_name} over {inner.class_name if inner else 'nothing'}"
            raise UserError(f"{name}: holds {found[:120]}; expected {' or '.join(PRECONDS)} over {' or '.join(UNETS)}")
        settings = root.state
    elif isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values()):
        tensors, modules, settings = {str(k): v for k, v in content.items()}, {}, {}
        root = None
    else:
        raise UserError(f"{name}: holds neither a network under 'ema' nor a state dict")
    prefix = "model." if any(k.startswith("model.") for k in tensors) else ""
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix) and not IGNORED.search(k)}
    net = _build(weights, modules, prefix, name)
    return Denoiser(net, _precondition(root.class_name if root else "", settings, net, name)).eval()


def _read_zip(data: bytes, name: str) -> Any:
    """torch.save's own format: tensors and plain containers only, by torch's restricted reader."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign archive, in whatever way torch says so
        line = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{name}: refused: {line}; only tensors and plain containers are read") from None


def _build(weights: dict[str, Tensor], modules: dict[str, Record], prefix: str, name: str) -> SemanticUNet:
    try:
        settings = _architecture(weights, modules, prefix)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{name}: is not one of the published nets with SPADE ({type(error).__name__}: {error})"
        ) from None
    if _too_large(settings, weights):
        raise UserError(f"{name}: the net that its layers describe is larger than its weights; the file is damaged")
    net = SemanticUNet(**settings)
    own = net.state_dict()
    wrong = sorted(set(own) ^ set(weights)) or sorted(k for k in own if own[k].shape != weights[k].shape)
    if wrong:
        raise UserError(f"{name}: {len(wrong)} weights do not fit the net that the others describe, first {wrong[0]}")
    net.load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})
    return net


def _architecture(weights: dict[str, Tensor], modules: dict[str, Record], prefix: str) -> dict[str, Any]:
    """The constructor's values of `SemanticUNet`, read off names and shapes, and the number of heads off a block."""
    sides = sorted({int(m[1]) for k in weights if (m := re.match(r"enc\.(\d+)x\1_block0\.", k))}, reverse=True)
    top = sides[0]
    adm = "out_conv.weight" in weights
    fourier = "map_noise.freqs" in weights
    pyramid = any("_aux_residual" in k for k in weights)
    if pyramid != fourier or (adm and fourier):
        raise ValueError("a mixture of DDPM++ and NCSN++")
    stem = weights[f"enc.{top}x{top}_conv.weight"]
    noise = weights["map_layer0.weight"].shape[1]
    base = noise // 2 if fourier else noise
    widths = [weights[f"enc.{s}x{s}_block0.conv0.weight"].shape[0] for s in sides]
    head = weights["out_conv.weight" if adm else f"dec.{top}x{top}_aux_conv.weight"]
    spade = f"dec.{sides[-1]}x{sides[-1]}_in0.norm0"
    shared, gamma = weights[f"{spade}.mlp_shared.0.weight"], weights[f"{spade}.mlp_gamma.weight"]
    num_blocks = len({m[1] for k in weights if (m := re.match(rf"enc\.{top}x{top}_block(\d+)\.", k))})
    return {
        "resolution": top,
        "in_channels": stem.shape[1],
        "out_channels": stem.shape[1],
        "label_channels": shared.shape[1],
        "arch": "adm" if adm else "ncsnpp" if fourier else "ddpmpp",
        "base_channels": base,
        "channel_multipliers": tuple(w // base for w in widths),
        "num_blocks": num_blocks,
        "attention_resolutions": tuple(s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in weights),
        "channels_per_head": _channels_per_head(modules, prefix, f"dec.{sides[-1]}x{sides[-1]}_in0", widths[-1]),
        "spade_hidden": shared.shape[0],
        "spade_kernel": gamma.shape[2],
        "learned_variance": head.shape[0] == 2 * stem.shape[1],
    }


def _too_large(settings: dict[str, Any], weights: dict[str, Tensor]) -> bool:
    """Whether the described net has far more weights than the file: then building it could exhaust the memory."""
    with torch.device("meta"):
        described = sum(p.numel() for p in SemanticUNet(**settings).parameters())
    return described > 2 * sum(v.numel() for v in weights.values()) + 1000


def _channels_per_head(modules: dict[str, Record], prefix: str, block: str, channels: int) -> int:
    record = modules.get(f"{prefix}{block}")
    heads = record.state.get("num_heads") if record else None
    return channels // heads if type(heads) is int and heads > 0 else 64


def _precondition(class_name: str, settings: dict[str, Any], net: SemanticUNet, name: str) -> Preconditioning:
    """The formulation that the file names; for a bare state dict the one its architecture was published with."""

    def value(key: str, default: float) -> float:
        found = settings.get(key, default)
        found = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
        if not isinstance(found, (int, float)):
            raise UserError(f"{name}: {key} is no number")
        return found

    if not class_name:
        arch = net.config.arch  # type: ignore[attr-defined]
        learned = net.config.learned_variance  # type: ignore[attr-defined]
        by_arch = {"adm": "EDMPrecond", "ddpmpp": "VPPrecond", "ncsnpp": "VEPrecond"}
        class_name = "iDDPMPrecond" if learned else by_arch[arch]
    if class_name == "EDMPrecond":
        return EDM(sigma_data=value("sigma_data", 0.5))
    if class_name == "VPPrecond":
        number = (value("beta_d", 19.9), value("beta_min", 0.1), int(value("M", 1000)), value("epsilon_t", 1e-5))
        return VP(*number)
    if class_name == "VEPrecond":
        return VE(value("sigma_min", 0.02), value("sigma_max", 100.0))
    levels = int(value("M", 1000))
    if not 1 <= levels <= 100_000:
        raise UserError(f"{name}: M is {levels}; the number of noise levels lies between 1 and 100000")
    return IDDPM(levels, value("C_1", 0.001), value("C_2", 0.008))
