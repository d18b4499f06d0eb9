"""Published checkpoints, written here byte for byte as the reference pickles them, read back and compared with a naive
functional network that is written from REFERENCE's text alone."""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import pickletools
import resource
import struct
import sys
import time
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from raysyn.checkpoint import import_reference
from raysyn.nets.blocks import Block
from raysyn.nets.unet import SemanticUNet
from raysyn.types import UserError

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


# --- a writer of the format --------------------------------------------------------------------------------------


class Persistent:
    """Pickles as the reference's classes do: a call of _reconstruct_persistent_obj on a dict."""

    def __init__(self, class_name: str, state: dict) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = dict(
            type="class", version=6, module_src="raise SystemExit('ran the source')", class_name=self.class_name
        )
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({**meta, "state": self.state},)


@pytest.fixture(autouse=True)
def reference_modules(monkeypatch: pytest.MonkeyPatch):
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
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)


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


# --- a naive network from the text ---------------------------------------------------------------------------------


class Naive:
    """REFERENCE, "The U-Net to the letter", over a state dict; no module of ours."""

    def __init__(self, w: dict[str, torch.Tensor], arch: str, heads) -> None:
        self.w, self.arch, self.heads = w, arch, heads
        self.adm = arch == "adm"
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if arch == "ncsnpp" else [1.0, 1.0])
        self.filter = (taps.outer(taps) / taps.sum() ** 2)[None, None]
        self.pad = (len(taps) - 1) // 2
        self.scale = 1.0 if self.adm else math.sqrt(0.5)

    def resample(self, x, up=False, down=False, pad=None):
        c = x.shape[1]
        pad = self.pad if pad is None else pad
        if up:
            return F.conv_transpose2d(x, (4 * self.filter).repeat(c, 1, 1, 1), groups=c, stride=2, padding=pad)
        return F.conv2d(x, self.filter.repeat(c, 1, 1, 1), groups=c, stride=2, padding=pad) if down else x

    def conv(self, name, x, up=False, down=False):
        weight = self.w.get(f"{name}.weight")
        x = self.resample(x, up, down)
        return x if weight is None else F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, name, x, m):
        groups = min(32, x.shape[1] // 4)
        if f"{name}.mlp_gamma.weight" not in self.w:
            return F.group_norm(x, groups, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5 if self.adm else 1e-6)
        n = F.group_norm(x, groups, self.w[f"{name}.norm.weight"], self.w[f"{name}.norm.bias"], 1e-5)
        small = F.interpolate(m, size=x.shape[2:], mode="nearest")
        h = torch.relu(self.conv(f"{name}.mlp_shared.0", small))
        return n * (1 + self.conv(f"{name}.mlp_gamma", h)) + self.conv(f"{name}.mlp_beta", h)

    def block(self, name, x, emb, m, up=False, down=False):
        h = self.conv(f"{name}.conv0", F.silu(self.norm(f"{name}.norm0", x, m)), up, down)
        p = F.linear(emb, self.w[f"{name}.affine.weight"], self.w[f"{name}.affine.bias"])[:, :, None, None]
        if self.adm:
            scale, shift = p.chunk(2, dim=1)
            h = F.silu(shift + self.norm(f"{name}.norm1", h, m) * (1 + scale))
        else:
            h = F.silu(self.norm(f"{name}.norm1", h + p, m))
        h = (self.conv(f"{name}.conv1", h) + self.conv(f"{name}.skip", x, up, down)) * self.scale
        if f"{name}.qkv.weight" not in self.w:
            return h
        b, c = h.shape[:2]
        n = self.heads(c)
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", h, m)).reshape(b * n, c // n, 3, -1)
        q, k, v = qkv.unbind(2)
        a = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(c // n), dim=2)
        a = torch.einsum("nqk,nck->ncq", a, v).reshape(h.shape)
        return (self.conv(f"{name}.proj", a) + h) * self.scale

    def embed(self, c_noise, width):
        half = width // 2
        if self.arch == "ncsnpp":
            angle = c_noise[:, None] * 2 * math.pi * self.w["map_noise.freqs"]
        else:
            i = torch.arange(half)
            angle = c_noise[:, None] * (1 / 10000) ** (i / (half if self.adm else half - 1))
        e = torch.cat([angle.cos(), angle.sin()], 1)
        e = e if self.adm else torch.cat([e[:, half:], e[:, :half]], 1)
        for layer in ("map_layer0", "map_layer1"):
            e = F.silu(F.linear(e, self.w[f"{layer}.weight"], self.w[f"{layer}.bias"]))
        return e

    def __call__(self, x, c_noise, m, blocks):
        emb = self.embed(c_noise, self.w["map_layer0.weight"].shape[1])
        pyramid, skips = x, []
        x = self.conv("enc.16x16_conv", x)
        skips.append(x)
        for i in range(blocks):
            x = self.block(f"enc.16x16_block{i}", x, emb, m)
            skips.append(x)
        x = self.block("enc.8x8_down", x, emb, m, down=True)
        if self.arch == "ncsnpp":
            weight, bias = self.w["enc.8x8_aux_residual.weight"], self.w["enc.8x8_aux_residual.bias"]
            pyramid = self.resample(F.conv2d(pyramid, weight, bias, padding=1 + self.pad), down=True, pad=0)
            x = (x + pyramid) / math.sqrt(2)
        skips.append(x)
        for i in range(blocks):
            x = self.block(f"enc.8x8_block{i}", x, emb, m)
            skips.append(x)
        x = self.block("dec.8x8_in1", self.block("dec.8x8_in0", x, emb, m), emb, m)
        for i in range(blocks + 1):
            x = self.block(f"dec.8x8_block{i}", torch.cat([x, skips.pop()], 1), emb, m)
        x = self.block("dec.16x16_up", x, emb, m, up=True)
        for i in range(blocks + 1):
            x = self.block(f"dec.16x16_block{i}", torch.cat([x, skips.pop()], 1), emb, m)
        norm, conv = ("out_norm", "out_conv") if self.adm else ("dec.16x16_aux_norm", "dec.16x16_aux_conv")
        return self.conv(conv, F.silu(self.norm(norm, x, m)))


def inputs():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 16, 16, generator=g)
    m = F.one_hot(torch.randint(0, 10, (2, 32, 32), generator=g), 10).permute(0, 3, 1, 2).float()
    return x, torch.tensor([0.7, 3.1]), m


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("protocol", [3, 4])
def test_an_imported_network_equals_the_text(arch: str, protocol: int, tmp_path: Path) -> None:
    net = small_net(arch)
    write_checkpoint(tmp_path / "network.pkl", net, protocol)
    denoiser = import_reference(tmp_path / "network.pkl")
    x, sigma, m = inputs()
    c_skip, c_out, c_in, c_noise = denoiser.precondition.coefficients(sigma)
    heads = (lambda c: c // 32) if arch == "adm" else (lambda c: 1)  # the file says 2 heads of 64 channels
    naive = Naive(net.state_dict(), arch, heads)
    with torch.no_grad():
        f = naive(c_in.reshape(-1, 1, 1, 1) * x, c_noise, m, SMALL[arch]["num_blocks"])
        expected = c_skip.reshape(-1, 1, 1, 1) * x + c_out.reshape(-1, 1, 1, 1) * f
        found = denoiser(x, sigma, m)
    assert type(denoiser.precondition).__name__ == CLASSES[arch][0].removesuffix("Precond")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_bare_state_dict_is_accepted(tmp_path: Path) -> None:
    net = small_net("adm", channels_per_head=64, learned_variance=True)
    torch.save({f"model.{k}": v for k, v in net.state_dict().items()}, tmp_path / "weights.pt")
    denoiser = import_reference(tmp_path / "weights.pt")
    x, sigma, m = inputs()
    assert denoiser.net.config.learned_variance
    assert type(denoiser.precondition).__name__ == "IDDPM"
    with torch.no_grad():
        assert torch.equal(denoiser.net(x, sigma, m), net(x, sigma, m))


@pytest.mark.parametrize("arch", SMALL)
def test_every_way_of_saving_gives_the_same_network(arch: str, tmp_path: Path, monkeypatch) -> None:
    net, path = small_net(arch), tmp_path / "x"
    x, sigma, m = inputs()
    write_checkpoint(path, net)
    with torch.no_grad():
        expected = import_reference(path)(x, sigma, m)

    def zipped(self):
        buffer = io.BytesIO()
        torch.save(self, buffer)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)

    def save(how: str) -> None:
        if how == "old torch.save":
            torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
            return
        with monkeypatch.context() as patch:
            if how == "zipped storages":
                patch.setattr(torch.storage.TypedStorage, "__reduce__", zipped)
            write_checkpoint(path, net, 4 if how == "zipped storages" else 2)

    hows = ["zipped storages", "protocol 2", "old torch.save"]
    for how in hows if arch != "adm" else hows[:2]:  # a state dict does not say the number of heads
        save(how)
        with torch.no_grad():
            assert torch.equal(import_reference(path)(x, sigma, m), expected), how


def test_a_state_dict_with_noise_levels_is_iddpm(tmp_path: Path) -> None:
    u = torch.cat([torch.linspace(80, 0.01, 40), torch.zeros(1)])
    torch.save({"u": u, **{f"model.{k}": v for k, v in small_net("adm").state_dict().items()}}, tmp_path / "x.pt")
    precondition = import_reference(tmp_path / "x.pt").precondition
    assert type(precondition).__name__ == "IDDPM"
    assert precondition.num == 40


def shaped_like_the_file(net: SemanticUNet, heads: dict[str, int]) -> dict:
    """Every block's constants as the reference's blocks keep them."""
    song = net.config.arch != "adm"
    scale = np.float64(np.sqrt(0.5)) if song else 1
    found = {}
    for key, module in net.named_modules():
        if isinstance(module, Block):
            found[f"model.{key}."] = {"num_heads": heads.get(key, module.num_heads), "skip_scale": scale}
        elif isinstance(module, torch.nn.GroupNorm):
            found[f"model.{key}."] = {"num_groups": module.num_groups, "eps": module.eps}
    return found


def test_heads_are_each_blocks_own_and_a_small_block_may_have_no_attention(tmp_path: Path) -> None:
    # Of the published rule, one head for 64 channels, a block of 32 gets none, one of 160 gets two of 80.
    heads = {"enc.8x8_block0": 2, "dec.8x8_in0": 2, "dec.8x8_block0": 1, "dec.8x8_block1": 2}
    net = small_net("adm", channel_multipliers=(1, 5), num_blocks=1, block_heads=heads)
    assert not any("16x16" in k and "qkv" in k for k in net.state_dict())
    write_checkpoint(tmp_path / "x.pkl", net, settings=shaped_like_the_file(net, heads))
    denoiser = import_reference(tmp_path / "x.pkl")
    x, sigma, m = inputs()
    with torch.no_grad():
        assert torch.equal(denoiser.net(x, sigma, m), net(x, sigma, m))


def test_other_embedding_widths_are_read_off_the_weights(tmp_path: Path) -> None:
    net = small_net("ncsnpp", noise_channels=32, embedding_channels=48)
    write_checkpoint(tmp_path / "x.pkl", net, settings=shaped_like_the_file(net, {}))
    x, sigma, m = inputs()
    with torch.no_grad():
        assert torch.equal(import_reference(tmp_path / "x.pkl").net(x, sigma, m), net(x, sigma, m))


@pytest.mark.parametrize("arch", ["adm", "ddpmpp"])
def test_of_absent_class_labels_only_the_bias_acts(arch: str, tmp_path: Path) -> None:
    net, width = small_net(arch), 128 if arch == "adm" else 32
    bias, c_noise = torch.linspace(-1, 1, width), torch.tensor([0.3, 0.9])
    labels = {
        "map_label.weight": torch.randn(width, 7),
        "map_label.bias": bias,
        "map_augment.weight": torch.ones(32, 9),
    }
    write_checkpoint(tmp_path / "x.pkl", net, extra={f"model.{k}": v for k, v in labels.items()})
    w = net.state_dict()
    e = Naive(w, arch, None)
    i = torch.arange(16)
    angle = c_noise[:, None] * (1 / 10000) ** (i / (16 if arch == "adm" else 15))
    first = [angle.cos(), angle.sin()] if arch == "adm" else [angle.sin(), angle.cos()]
    emb = torch.cat(first, 1) + (0 if arch == "adm" else bias)
    hidden = F.silu(F.linear(emb, w["map_layer0.weight"], w["map_layer0.bias"]))
    out = F.silu(F.linear(hidden, w["map_layer1.weight"], w["map_layer1.bias"]) + (bias if arch == "adm" else 0))
    with torch.no_grad():
        found = import_reference(tmp_path / "x.pkl").net._embed(c_noise)
    assert torch.allclose(found, out, atol=1e-5)
    assert not torch.allclose(found, e.embed(c_noise, 32), atol=1e-2)


def test_the_noise_levels_are_the_files_own(tmp_path: Path) -> None:
    u = torch.cat([torch.linspace(80, 0.01, 40), torch.zeros(1)])
    net = small_net("adm", learned_variance=True)
    write_checkpoint(tmp_path / "x.pkl", net, precond="iDDPMPrecond", extra={"u": u}, M=40, C_1=0.001, C_2=0.008)
    precondition = import_reference(tmp_path / "x.pkl").precondition
    assert torch.equal(precondition.coefficients(u[:-1])[3], torch.arange(39, -1, -1).float())
    assert (precondition.sigma_min, precondition.sigma_max) == (float(u[-2]), 80.0)
    write_checkpoint(tmp_path / "x.pkl", net, precond="iDDPMPrecond", extra={"u": u.flip(0)}, M=40)
    with pytest.raises(UserError, match="u is no table"):
        import_reference(tmp_path / "x.pkl")


def test_the_preconditionings_own_numbers_are_used(tmp_path: Path) -> None:
    sigma = torch.tensor([0.3, 2.0])
    write_checkpoint(tmp_path / "x.pkl", small_net("adm"), sigma_data=np.float32(0.25))
    assert torch.allclose(
        import_reference(tmp_path / "x.pkl").precondition.coefficients(sigma)[2], (sigma**2 + 0.0625) ** -0.5
    )
    write_checkpoint(tmp_path / "x.pkl", small_net("ddpmpp"), beta_d=10.0, beta_min=0.2, M=500, epsilon_t=1e-4)
    write_checkpoint(tmp_path / "edm.pkl", small_net("adm"), sigma_min=0.002, sigma_max=80)
    edm = import_reference(tmp_path / "edm.pkl").precondition
    assert (edm.sigma_min, edm.sigma_max) == (0.002, 80)
    t = ((0.04 + 20 * torch.log1p(sigma**2)).sqrt() - 0.2) / 10
    assert torch.allclose(import_reference(tmp_path / "x.pkl").precondition.coefficients(sigma)[3], 499 * t)
    write_checkpoint(tmp_path / "x.pkl", small_net("ncsnpp"), sigma_min=0.05, sigma_max=50.0)
    found = import_reference(tmp_path / "x.pkl").precondition
    assert (found.sigma_min, found.sigma_max) == (0.05, 50.0)
    for wrong in (math.nan, math.inf, -1.0, 0.0, "half", None):
        write_checkpoint(tmp_path / "x.pkl", small_net("adm"), sigma_data=wrong)
        with pytest.raises(UserError, match="sigma_data is no number"):
            import_reference(tmp_path / "x.pkl")


def test_a_net_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    net = small_net("ddpmpp")
    for key, value in (("skip_scale", 1.0), ("adaptive_scale", True)):
        write_checkpoint(tmp_path / "x.pkl", net, settings={"model.dec.8x8_in1.": {key: value}})
        with pytest.raises(UserError, match=f"8x8_in1.{key} is 1, not the published"):
            import_reference(tmp_path / "x.pkl")
    write_checkpoint(tmp_path / "x.pkl", net, settings={"model.dec.8x8_in1.norm0.norm.": {"eps": 1e-3}})
    with pytest.raises(UserError, match=r"eps is 0\.001, not the published 1e-05"):
        import_reference(tmp_path / "x.pkl")
    write_checkpoint(tmp_path / "x.pkl", net, settings={"model.dec.8x8_in1.norm0.norm.": {"num_groups": 1}})
    with pytest.raises(UserError, match=r"norm0\.norm\.num_groups is 1, not the published"):
        import_reference(tmp_path / "x.pkl")
    write_checkpoint(
        tmp_path / "x.pkl", net, extra={"model.dec.16x16_up.conv0.resample_filter": torch.ones(1, 1, 4, 4)}
    )
    with pytest.raises(UserError, match="not the published resampling filter"):
        import_reference(tmp_path / "x.pkl")


def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path) -> None:
    good = small_net("adm").state_dict()
    for value in (torch.full((1,), math.nan), torch.zeros(1, dtype=torch.int64), torch.zeros(2)):
        torch.save({**good, "out_conv.bias": value}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"finite numbers|do not fit"):
            import_reference(tmp_path / "x.pt")


class Evil:
    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Evil(__import__("os").system, "touch pwned"), "posix.system"),
        (Evil(eval, "1+1"), "builtins.eval"),
        (Evil(getattr, {}, "get"), "builtins.getattr"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Evil(torch.load, "x"), "torch.serialization.load"),
        (Path("x"), "pathlib"),
        ({(1, 2): 3}, "dict key"),
        ({(1, 2)}, "a set of something else"),
        (frozenset({1}), "pickle instruction"),
        (bytearray(b"x"), "pickle instruction|bytearray"),
        ({"ema": 3}, "neither a network"),
        ([1, 2], "neither a network"),
    ],
)
def test_what_is_not_the_format_is_refused_by_name(value, says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"ema": value} if says != "neither a network" else value, 5))
    with pytest.raises(UserError, match=says) as caught:
        import_reference(tmp_path / "evil.pkl")
    assert "evil.pkl" in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_tensors_cannot_claim_more_than_their_storage(tmp_path: Path) -> None:
    class Claim:
        def __init__(self, size, stride, offset=0) -> None:
            self.args = (
                torch.storage.TypedStorage(
                    wrap_storage=torch.tensor([1.0, 2.0]).untyped_storage(), dtype=torch.float32, _internal=True
                ),
                offset,
                size,
                stride,
                False,
                OrderedDict(),
            )

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, self.args

    for size, stride, offset in (((10**6, 10**6), (0, 0), 0), ((2,), (5,), 0), ((2,), (1,), 7), ((-1,), (1,), 0)):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": Claim(size, stride, offset)}))
        with pytest.raises(UserError, match="refused: a tensor"):
            import_reference(tmp_path / "x.pkl")


def test_cycles_and_depth_end_in_an_error(tmp_path: Path) -> None:
    state: dict = dict(_parameters={}, _buffers={})
    loop = Persistent("EDMPrecond", state)
    state["_modules"] = {"model": Persistent("DhariwalUNet", dict(_modules={"enc": torch.nn.ReLU()}))}
    inner = torch.nn.Sequential()
    inner.__dict__["_modules"] = {"again": inner}
    state["_modules"]["loop"] = inner
    (tmp_path / "loop.pkl").write_bytes(pickle.dumps({"ema": loop}))
    with pytest.raises(UserError, match="nested without end"):
        import_reference(tmp_path / "loop.pkl")
    (tmp_path / "deep.pkl").write_bytes(b"\x80\x04" + b"(" * 100_000 + b".")
    with pytest.raises(UserError):
        import_reference(tmp_path / "deep.pkl")


def stored(numbers: int) -> bytes:
    """What torch's storages give as their pickled bytes."""
    raw = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(numbers).untyped_storage(), dtype=torch.float32, _internal=True
    )
    return raw.__reduce__()[1][0]


def named(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def packed_storage() -> bytes:
    """A deflated archive of a large storage whose first bytes also read as empty pickles."""
    data = io.BytesIO()
    key = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(zipfile.ZipInfo(f"a/{name}"), content)
        archive.writestr("a/data.pkl", b"\x80\x02" + key + struct.pack("<i", 10**7) + b"tQ.")
        archive.writestr("a/data/0", bytes(4 * 10**7), compresslevel=9)
    made = bytearray(data.getvalue())
    made[4:9] = b"\n...."
    return bytes(made)


def again_and_again() -> dict[str, bytes]:
    """Small files whose naive reading would take forever or fill the memory, and an instruction a byte to do so."""
    bytes_of = stored(100_000)
    storage = pickle.BINBYTES + struct.pack("<I", len(bytes_of)) + bytes_of + b"q\x000"
    pairs = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"K\x00\x86" for i in range(50_000)) + b"eq\x000"
    nest = b"]\x94" + b"".join(b"0]\x94(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)) + b"0"
    many = b"(" + b"K\x00" * 50_000 + b"tq\x000"
    claims = bytes_of.replace(struct.pack("<i", 100_000), struct.pack("<i", 2**31 - 1))
    ends = io.BytesIO(stored(1))
    for _ in range(4):
        list(pickletools.genops(ends))
    head = ends.getvalue()[: ends.tell()]
    array = (
        pickle.PROTO
        + b"\x02"
        + named("builtins", "bytearray")
        + b"\x8a\x05"
        + (2 * 10**9).to_bytes(5, "little")
        + b"\x85R."
    )
    alike = [b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") for k in range(1, 50_000)]

    def one(storage: bytes) -> bytes:
        length = struct.pack("<I", len(storage))
        return named("torch.storage", "_load_from_bytes") + pickle.BINBYTES + length + storage + b"\x85R."

    calls = stored(1).replace(b".", b"R.")
    return {
        "one storage, often": storage
        + b"]("
        + (named("torch.storage", "_load_from_bytes") + b"h\x00\x85R") * 2000
        + b"e.",
        "one list, often": pairs + b"](" + (named("collections", "OrderedDict") + b"h\x00\x85R") * 20_000 + b"e.",
        "many arguments, often": many + b"](" + (named("collections", "OrderedDict") + b"h\x00R") * 20_000 + b"e.",
        "a list of twice the list before": nest + named("numpy", "dtype") + b"h\x3c\x85R.",
        "a storage that claims more": pickle.BINBYTES
        + struct.pack("<I", len(claims))
        + claims
        + b"q\x000"
        + named("torch.storage", "_load_from_bytes")
        + b"h\x00\x85R.",
        "a storage that calls": one(calls),
        "a storage whose keys are a call": one(head + array),
        "a storage without a key": one(head + pickle.PROTO + b"\x02]." + bytes(5000)),
        "a storage that is an archive": one(packed_storage()),
        "numbers that hash alike": b"}(" + b"".join(key + b"N" for key in alike) + b"u.",
        "a set of numbers that hash alike": pickle.EMPTY_SET + b"(" + b"".join(alike) + b"\x90.",
        "a storage in a storage": one(b"\x80\x02" + one(stored(1)) + b"."),
        "a call of an object": named("torch.nn.modules.container", "Sequential") + b")\x81)R.",
    }


@pytest.mark.timeout(60)
@pytest.mark.parametrize("which", again_and_again())
def test_small_files_cannot_ask_for_endless_work_or_memory(which: str, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + again_and_again()[which])
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="refused"):
        import_reference(tmp_path / "x.pkl")
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "in KiB"


def test_few_names_cannot_describe_a_net_of_millions_of_layers(tmp_path: Path) -> None:
    one, sides = torch.zeros(1, 1, 1, 1), [2**i for i in range(280, 0, -1)]
    top, low = (f"{s}x{s}" for s in (sides[0], sides[-1]))
    weights = {f"enc.{s}x{s}_block0.conv0.weight": one for s in sides}
    weights |= {f"enc.{top}_block{k}.x": one for k in range(3000)}
    weights |= {f"enc.{top}_conv.weight": one, "map_layer0.weight": one[0, 0], "out_conv.weight": one}
    weights |= {f"dec.{low}_in0.norm0.{k}.weight": one for k in ("mlp_shared.0", "mlp_gamma")}
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(UserError, match="280 levels of 3000 blocks"):
        import_reference(tmp_path / "x.pt")


def test_modules_named_again_and_again_end_in_an_error(tmp_path: Path) -> None:
    module = torch.nn.Sequential()
    for _ in range(12):
        outer = torch.nn.Sequential()
        outer.__dict__["_modules"] = {str(i): module for i in range(10)}
        module = outer
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": module}))
    with pytest.raises(UserError, match="nested without end"):
        import_reference(tmp_path / "x.pkl")


def test_archives_hold_what_they_say_and_no_more(tmp_path: Path) -> None:
    def saved(content) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    packed = io.BytesIO()
    plain = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(10**6)})))
    with plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as to:
        for entry in plain.namelist():
            to.writestr(entry, plain.read(entry))
    shared = torch.zeros(10**6)
    old = io.BytesIO()
    torch.save({"a": shared}, old, _use_new_zipfile_serialization=False)
    more = old.getvalue().replace(struct.pack("<i", 10**6), struct.pack("<i", 2**31 - 1))
    for data, says in (
        (packed.getvalue(), "unpacks to more"),
        (saved({"a": torch.zeros(1).expand(10**9)}), "larger than its storage"),
        (saved({str(i): shared for i in range(100)}), "share their data"),
        (saved({"a": Evil(__import__("os").system, "touch pwned")}), "posix.system"),
        (more, "another size"),
        (old.getvalue()[:-8], "another size"),
    ):
        (tmp_path / "x.pt").write_bytes(data)
        with pytest.raises(UserError, match=says):
            import_reference(tmp_path / "x.pt")
    with pytest.raises(UserError, match="is no file"):
        import_reference(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        import_reference(tmp_path / "absent.pkl")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    path = tmp_path_factory.mktemp("reference") / "network.pkl"
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))

        def _reconstruct_persistent_obj(meta):
            raise AssertionError

        class EasyDict(dict):
            pass

        for value, home in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")):
            value.__module__, value.__qualname__ = home, value.__name__
            setattr(sys.modules[home], value.__name__, value)
        write_checkpoint(path, small_net("adm", num_blocks=1))
    return path.read_bytes()


def outcome(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with contextlib.suppress(UserError):  # anything else fails the test; an intact file may be read
        import_reference(path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_end_in_a_clear_error(data, whole_file: bytes, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "network.pkl"
    how = data.draw(st.sampled_from(["cut", "flip", "insert", "opcode"]))
    place = data.draw(st.integers(0, len(whole_file) - 1) | st.integers(0, 4000))
    if how == "cut":
        changed = whole_file[:place]
    elif how == "flip":
        changed = whole_file[:place] + bytes([data.draw(st.integers(0, 255))]) + whole_file[place + 1 :]
    elif how == "insert":
        changed = whole_file[:place] + data.draw(st.binary(min_size=1, max_size=12)) + whole_file[place:]
    else:
        codes = [getattr(pickle, k)[:1] for k in dir(pickle) if k.isupper() and isinstance(getattr(pickle, k), bytes)]
        changed = whole_file[:place] + data.draw(st.sampled_from([c for c in codes if c])) + whole_file[place:]
    outcome(changed, path)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300))
def test_noise_is_no_checkpoint(data: bytes, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError):
        import_reference(path)


def test_huge_lengths_do_not_allocate(tmp_path: Path) -> None:
    for code in (pickle.BINBYTES8, pickle.BINUNICODE8, pickle.FRAME, pickle.BYTEARRAY8):
        (tmp_path / "x.pkl").write_bytes(b"\x80\x05" + code + struct.pack("<Q", 1 << 40) + b"xx.")
        with pytest.raises(UserError):
            import_reference(tmp_path / "x.pkl")
