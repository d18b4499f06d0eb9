"""Importing published checkpoints of the reference: its weights in our nets, none of its code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysyn.diffusion.precondition import EDM, IDDPM, VE, VP, Denoiser, Preconditioning
from raysyn.nets.spade import num_groups
from raysyn.nets.unet import SemanticUNet
from raysyn.reference_format.files import read_pickle
from raysyn.reference_format.objects import Record
from raysyn.types import UserError

PRECONDS = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
UNETS = ("DhariwalUNet", "SongUNet")
# The published nets also hold these. Augmentation labels are never given and add nothing; of absent class labels only a
# bias would act, which `_fold_label_bias` takes.
IGNORED = re.compile(r"(^|\.)(resample_filter|map_label\.\w+|map_augment\.\w+|u)$")
MAX_DEPTH, MAX_NODES, MAX_KEY, MAX_BLOCKS = 16, 100_000, 200, 256


def import_reference(file: str | Path) -> Denoiser:
    """The denoiser of a published checkpoint: a pickle with `ema`, or a bare state dict of the same names.

    Nothing that the file names is run, written or compiled. Raises UserError, naming what, for anything else than the
    format, a net that is not one of the three architectures with SPADE, or weights that do not fit it.
    """
    name = str(file)
    data = _read(Path(file))
    content = read_pickle(data, name)
    if isinstance(content, dict) and isinstance(content.get("ema"), dict | Record):
        content = content["ema"]
    if isinstance(content, Record):
        tensors, modules = _flatten(content, name)
        root, inner = modules[""], modules.get("model")
        if root.class_name not in PRECONDS or inner is None or inner.class_name not in UNETS:
            found = f"{root.class_name} over {inner.class_name if inner else 'nothing'}"
            raise UserError(f"{name}: holds {found[:120]}; expected {' or '.join(PRECONDS)} over {' or '.join(UNETS)}")
        settings = root.state
    elif isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values()):
        tensors, modules, settings = {str(k)[:MAX_KEY]: v for k, v in content.items()}, {}, {}
        root = None
    else:
        raise UserError(f"{name}: holds neither a network under 'ema' nor a state dict")
    if sum(v.numel() * v.element_size() for v in tensors.values()) > len(data):
        raise UserError(
            f"{name}: refused: its weights share their data; only the reference's checkpoint format is read"
        )
    prefix = "model." if any(k.startswith("model.") for k in tensors) else ""
    named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    _check_settings(named, {k.removeprefix(prefix): m for k, m in modules.items()}, name)
    net = _build(named, modules, prefix, name)
    kind = root.class_name if root else ""
    return Denoiser(net, _precondition(kind, settings, tensors.get("u"), net, name)).eval()


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _flatten(record: Record, name: str) -> tuple[dict[str, Tensor], dict[str, Record]]:
    """(tensors by dotted name, modules by dotted name) of a module record. Raises UserError when it is no tree."""
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Record] = {}
    seen = 0

    def items(node: Record, kind: str) -> Iterator[tuple[str, Any]]:
        nonlocal seen
        value = node.state.get(kind)
        for key, item in value.items() if isinstance(value, dict) else ():
            seen += 1
            if seen > MAX_NODES or len(str(key)) > MAX_KEY:
                raise UserError(f"{name}: refused: its modules are nested without end")
            yield str(key), item

    def walk(node: Record, prefix: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise UserError(f"{name}: refused: its modules are nested without end")
        modules[prefix.rstrip(".")] = node
        for kind in ("_parameters", "_buffers"):
            tensors.update((f"{prefix}{key}", value) for key, value in items(node, kind) if isinstance(value, Tensor))
        for key, value in items(node, "_modules"):
            if isinstance(value, Record):
                walk(value, f"{prefix}{key}.", depth + 1)

    walk(record, "", 0)
    return tensors, modules


def _check_settings(named: dict[str, Tensor], modules: dict[str, Record], name: str) -> None:
    """Refuse nets that would load by their names and shapes and yet compute something else than ours."""
    song = "out_conv.weight" not in named
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if "map_noise.freqs" in named else [1.0, 1.0])
    expected = taps.outer(taps) / taps.sum() ** 2
    for key, value in named.items():
        if key.endswith("resample_filter") and (
            value.shape[-2:] != expected.shape or not torch.allclose(value.float().reshape(expected.shape), expected)
        ):
            raise UserError(f"{name}: {key} is not the published resampling filter {[int(t) for t in taps]}")
    for key, module in modules.items():
        rules = {"skip_scale": math.sqrt(0.5) if song else 1.0, "adaptive_scale": not song}
        if not module.state.get("_modules"):  # a norm; those inside SPADE are called so
            rules["eps"] = 1e-6 if song and not key.endswith(".norm") else 1e-5
            weight = named.get(f"{key}.weight")
            if "num_groups" in module.state and weight is not None:
                rules["num_groups"] = num_groups(weight.shape[0])
        for setting, wanted in rules.items():
            found = module.state.get(setting, wanted)
            if isinstance(found, (int, float)) and not math.isclose(found, wanted, rel_tol=1e-4):
                raise UserError(f"{name}: {key}.{setting} is {found:g}, not the published {wanted:g}")


def _build(named: dict[str, Tensor], modules: dict[str, Record], prefix: str, name: str) -> SemanticUNet:
    """The net that the weights describe, with these weights. Raises UserError where they describe none."""
    weights = {k: v for k, v in named.items() if not IGNORED.search(k)}
    try:
        settings = _architecture(weights, modules, prefix)
        with torch.device("meta"):  # a damaged file may describe a net that is too large to build
            described = {k: v.shape for k, v in SemanticUNet(**settings).state_dict().items()}
    except Exception as error:  # whatever the constructor meets in sizes that are no net's
        line = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            f"{name}: is not one of the published nets with SPADE ({type(error).__name__}: {line})"
        ) from None
    wrong = sorted(described.keys() ^ weights.keys())
    wrong = wrong or sorted(k for k, shape in described.items() if shape != weights[k].shape)
    if wrong:
        raise UserError(f"{name}: {len(wrong)} weights do not fit the net that the others describe, first {wrong[0]}")
    bad = [k for k, v in weights.items() if not v.is_floating_point() or not v.isfinite().all()]
    if bad:
        raise UserError(f"{name}: {bad[0]} holds something else than finite numbers")
    net = SemanticUNet(**settings)
    net.load_state_dict({k: v.float() for k, v in weights.items()})
    _fold_label_bias(net, named, name)
    return net


@torch.no_grad()
def _fold_label_bias(net: SemanticUNet, named: dict[str, Tensor], name: str) -> None:
    """A net with class labels gets zeros for them, so its label layer adds its bias: taken into the next layer's."""
    bias = named.get("map_label.bias")
    if bias is None:
        return
    adm = net.config.arch == "adm"  # type: ignore[attr-defined]
    layer: nn.Linear = net.map_layer1 if adm else net.map_layer0
    if bias.shape != (layer.out_features if adm else layer.in_features,) or not bias.float().isfinite().all():
        raise UserError(f"{name}: map_label.bias does not fit the noise embedding")
    layer.bias.add_(bias.float() if adm else layer.weight @ bias.float())


def _architecture(weights: dict[str, Tensor], modules: dict[str, Record], prefix: str) -> dict[str, Any]:
    """The constructor's values of `SemanticUNet`, read off names and shapes; the numbers of heads off the blocks."""
    sides = sorted({int(m[1]) for k in weights if (m := re.match(r"enc\.(\d+)x\1_block0\.", k))}, reverse=True)
    top = sides[0]
    adm = "out_conv.weight" in weights
    fourier = "map_noise.freqs" in weights
    pyramid = any("_aux_residual" in k for k in weights)
    if pyramid != fourier or (adm and fourier):
        raise ValueError("a mixture of DDPM++ and NCSN++: of map_noise.freqs and …_aux_residual it has one")
    num_blocks = len({m[1] for k in weights if (m := re.match(rf"enc\.{top}x{top}_block(\d+)\.", k))})
    blocks = sum(k.endswith(".conv0.weight") for k in weights)
    if not len(sides) * num_blocks <= blocks <= MAX_BLOCKS:  # else few names describe a net of millions of layers
        raise ValueError(f"{len(sides)} levels of {num_blocks} blocks, and {blocks} blocks in all")
    stem, layer0 = weights[f"enc.{top}x{top}_conv.weight"], weights["map_layer0.weight"]
    base = layer0.shape[1] if adm else stem.shape[0]
    widths = [weights[f"enc.{s}x{s}_block0.conv0.weight"].shape[0] for s in sides]
    head = weights["out_conv.weight" if adm else f"dec.{top}x{top}_aux_conv.weight"]
    spade = f"dec.{sides[-1]}x{sides[-1]}_in0.norm0"
    shared, gamma = weights[f"{spade}.mlp_shared.0.weight"], weights[f"{spade}.mlp_gamma.weight"]
    if gamma.shape[2] not in (1, 3) or any(w % base for w in widths):
        raise ValueError("channels or kernels of another net")
    return {
        "resolution": top,
        "in_channels": stem.shape[1],
        "out_channels": stem.shape[1],
        "label_channels": shared.shape[1],
        "arch": "adm" if adm else "ncsnpp" if fourier else "ddpmpp",
        "base_channels": base,
        "channel_multipliers": tuple(w // base for w in widths),
        "num_blocks": num_blocks,
        "spade_hidden": shared.shape[0],
        "spade_kernel": gamma.shape[2],
        "learned_variance": head.shape[0] == 2 * stem.shape[1],
        "noise_channels": layer0.shape[1],
        "embedding_channels": layer0.shape[0],
        "block_heads": _block_heads(weights, modules, prefix, adm),
    }


def _block_heads(weights: dict[str, Tensor], modules: dict[str, Record], prefix: str, adm: bool) -> dict[str, int]:
    """Heads of every block with attention: as its record says; else of as many channels as another's, 64 in ADM."""
    channels = {k.removesuffix(".qkv.weight"): v.shape[1] for k, v in weights.items() if k.endswith(".qkv.weight")}
    records = {block: modules.get(f"{prefix}{block}") for block in channels}
    said = {
        block: record.state["num_heads"] for block, record in records.items() if record and "num_heads" in record.state
    }
    width = next((channels[block] // n for block, n in said.items() if type(n) is int and n > 0), 64)
    heads = {block: said.get(block, max(1, count // width) if adm else 1) for block, count in channels.items()}
    for block, found in heads.items():
        if type(found) is not int or found < 1 or channels[block] % found:
            raise ValueError(f"{block} has {channels[block]} channels and no number of heads that divides them")
    return heads


def _precondition(
    class_name: str, settings: dict[str, Any], table: Tensor | None, net: SemanticUNet, name: str
) -> Preconditioning:
    """The formulation that the file names; for a bare state dict the one its architecture was published with."""

    def value(key: str, default: float, low: float, high: float) -> float:
        found = settings.get(key, default)
        found = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
        if not isinstance(found, (int, float)) or not low <= found <= high:
            raise UserError(f"{name}: {key} is no number between {low:g} and {high:g}")
        return found

    if not class_name:
        arch = net.config.arch  # type: ignore[attr-defined]
        learned = net.config.learned_variance  # type: ignore[attr-defined]
        by_arch = {"adm": "EDMPrecond", "ddpmpp": "VPPrecond", "ncsnpp": "VEPrecond"}
        class_name = "iDDPMPrecond" if learned or table is not None else by_arch[arch]
    if class_name == "EDMPrecond":
        edm = EDM(sigma_data=value("sigma_data", 0.5, 1e-6, 1e6))
        edm.sigma_min = value("sigma_min", 0.0, 0.0, 1e6)
        edm.sigma_max = value("sigma_max", math.inf, edm.sigma_min, math.inf)
        return edm
    if class_name == "VPPrecond":
        beta = (value("beta_d", 19.9, 1e-3, 80), value("beta_min", 0.1, 1e-6, 80))
        return VP(*beta, int(value("M", 1000, 1, 1e6)), value("epsilon_t", 1e-5, 1e-9, 0.5))
    if class_name == "VEPrecond":
        low = value("sigma_min", 0.02, 1e-9, 1e6)
        return VE(low, value("sigma_max", 100.0, low, 1e9))
    default = 1000 if table is None else table.numel() - 1
    iddpm = IDDPM(int(value("M", default, 1, 1e5)), value("C_1", 0.001, 1e-9, 0.999), value("C_2", 0.008, 1e-9, 1))
    if table is not None:  # the file's own levels, to the last bit
        if table.shape != iddpm.table.shape or not bool((table.double().diff() < 0).all()):
            raise UserError(f"{name}: u is no table of M + 1 falling noise levels")
        iddpm.table = table.double()
        iddpm.sigma_min, iddpm.sigma_max = float(table[-2]), float(table[0])
    return iddpm
