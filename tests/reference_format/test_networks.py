"""Published checkpoints, written here as the reference pickles them, read back and compared with a naive functional
network that is written from REFERENCE's text alone."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from raysyn.checkpoint import import_reference
from raysyn.nets.blocks import Block
from raysyn.nets.unet import SemanticUNet
from raysyn.types import UserError
from tests.reference_format.writer import CLASSES, SMALL, small_net, write_checkpoint

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
