"""The U-Nets at published size (counted on the meta device) and what holds for all of them at any size."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from raysyn.compose import load_model
from raysyn.diffusion.precondition import EDM, Denoiser
from raysyn.models import MODELS, build_denoiser
from raysyn.nets.blocks import Block, attend
from raysyn.nets.spade import Conditioning, Spade, num_groups, one_hot_from_index
from raysyn.nets.unet import SemanticUNet
from raysyn.types import UserError

PUBLISHED = {"edm_l64": (64, 381.7), "edm_l128": (128, 373.9), "edm": (256, 359.3)}


def conv(i: int, o: int, k: int = 3) -> int:
    return i * o * k * k + o


def spade(c: int) -> int:
    return 2 * c + conv(10, 128) + 2 * conv(128, c)


def song_parameters(noise: int, pyramid: bool) -> int:
    """DDPM++ or NCSN++ at 256 px counted from REFERENCE's table, without any code of the nets."""
    base, widths, blocks, emb = 128, [256, 256, 256], 4, 512

    def block(i, o, decoder, attention=False, resamples=False):
        norms = [i, o] + ([o] if attention else [])
        n = sum(spade(c) if decoder else 2 * c for c in norms)
        n += conv(i, o) + conv(o, o) + emb * o + o
        n += conv(i, o, 1) if i != o or resamples else 0
        return n + (conv(o, 3 * o, 1) + conv(o, o, 1) if attention else 0)

    total = noise * emb + emb + emb * emb + emb + conv(1, base)
    channels, skips, image = base, [base], 1
    for level, width in enumerate(widths):
        if level:
            total += block(channels, channels, False, resamples=True)
            if pyramid:
                total += conv(image, channels)
                image = channels
            skips.append(channels)
        for _ in range(blocks):
            total += block(channels, width, False)
            channels = width
            skips.append(channels)
    total += block(channels, channels, True, attention=True) + block(channels, channels, True)
    for level, width in reversed(list(enumerate(widths))):
        if level < len(widths) - 1:
            total += block(channels, channels, True, resamples=True)
        for _ in range(blocks + 1):
            total += block(channels + skips.pop(), width, True)
            channels = width
    return total + 2 * channels + conv(channels, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_adm_sizes(name: str) -> None:
    size, millions = PUBLISHED[name]
    with torch.device("meta"):
        net = build_denoiser(load_model(name), 256).net
    count = sum(p.numel() for p in net.parameters())
    of_spade = sum(p.numel() for m in net.modules() if isinstance(m, Spade) for p in m.parameters())
    assert net.config.resolution == size
    assert round(count / 1e6, 1) == millions
    assert 77e6 < of_spade < 88e6


@pytest.mark.parametrize(("name", "noise", "pyramid"), [("vp", 128, False), ("ve", 256, True)])
def test_published_song_sizes_by_closed_form(name: str, noise: int, pyramid: bool) -> None:
    with torch.device("meta"):
        net = build_denoiser(load_model(name), 256).net
    assert sum(p.numel() for p in net.parameters()) == song_parameters(noise, pyramid)


@pytest.mark.parametrize("name", MODELS)
def test_activations_at_published_size_have_the_shapes_of_the_table(name: str) -> None:
    config = load_model(name)
    size = 256 // config.latent_downscale
    with torch.device("meta"):
        net = build_denoiser(config, 256).net.eval()
        shapes: dict[str, tuple[int, ...]] = {}
        for key, module in net.named_modules():
            if isinstance(module, Block):
                module.register_forward_hook(lambda m, i, o, key=key: shapes.__setitem__(key, tuple(o.shape)))
        out = net(torch.zeros(2, 1, size, size), torch.zeros(2), torch.zeros(2, 10, 256, 256))
    assert out.shape == (2, 2 if name == "sdm" else 1, size, size)
    widths = [config.net.base_channels * m for m in config.net.channel_multipliers]
    for level, width in enumerate(widths):
        side = size >> level
        for i in range(config.net.num_blocks):
            assert shapes[f"enc.{side}x{side}_block{i}"] == (2, width, side, side)
        for i in range(config.net.num_blocks + 1):
            assert shapes[f"dec.{side}x{side}_block{i}"] == (2, width, side, side)
    attended = {
        int(k.split(".")[1].split("x")[0]) for k, m in net.named_modules() if isinstance(m, Block) and m.num_heads
    }
    sides = {size >> level for level in range(len(widths))}
    assert attended == (sides & set(config.net.attention_resolutions)) | {min(sides)}


@pytest.mark.parametrize(
    ("name", "gflop", "cache_mb"), [("edm_l64", 326, 91), ("edm_l128", 1209, 340), ("edm", 4666, 1324)]
)
def test_operations_of_the_published_adm_and_what_its_modulations_hold(name: str, gflop: int, cache_mb: int) -> None:
    with torch.device("meta"):
        net = build_denoiser(load_model(name), 256).net.eval()
        size = net.config.resolution
        x, c, m = torch.zeros(1, 1, size, size), torch.zeros(1), torch.zeros(1, 10, 256, 256)
        with FlopCounterMode(display=False) as whole:
            net(x, c, m)
        kept = net.modulations(m)
        with FlopCounterMode(display=False) as rest:
            net(x, c, m, modulations=kept)
    of_spade = sum(layer.cost(side * side) for layer, side in net.spade_sizes())
    assert whole.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.003)
    assert whole.get_total_flops() - rest.get_total_flops() == of_spade
    assert of_spade / whole.get_total_flops() == pytest.approx(0.33, abs=0.005)
    assert sum(t.numel() * 2 for layer in kept for t in layer) / 1e6 == pytest.approx(cache_mb, rel=0.01)


def small(arch: str = "adm", **options) -> SemanticUNet:
    torch.manual_seed(0)
    net = SemanticUNet(
        16,
        arch=arch,
        base_channels=16,
        channel_multipliers=(1, 2),
        num_blocks=1,
        attention_resolutions=(8,),
        spade_hidden=8,
        dropout=0.0,
        **options,
    )
    return net.eval()


def awake(net: SemanticUNet) -> SemanticUNet:
    """The net with its zero layers moved, so that everything in it acts."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def maps(batch: int = 2, size: int = 16) -> torch.Tensor:
    return one_hot_from_index(torch.randint(0, 10, (batch, size, size), dtype=torch.uint8))


@pytest.mark.parametrize("arch", ["adm", "ddpmpp", "ncsnpp"])
def test_a_fresh_net_says_almost_nothing_and_learns_everywhere(arch: str) -> None:
    net = small(arch)
    out = net(torch.randn(2, 1, 16, 16), torch.rand(2), maps())
    assert out.abs().max() < 1e-3
    awake(net)
    net(torch.randn(2, 1, 16, 16), torch.rand(2), maps()).square().sum().backward()
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_maps_act_through_the_decoder_only() -> None:
    net = small()
    assert not [k for k in net.state_dict() if k.startswith(("enc.", "out_norm")) and "mlp_" in k]
    decoder_norms = [k for k in net.state_dict() if k.startswith("dec.") and ".norm" in k]
    assert decoder_norms
    assert all(".norm.weight" in k or ".norm.bias" in k or "mlp_" in k for k in decoder_norms)


def test_a_larger_map_is_resized_and_no_map_is_the_null_mask() -> None:
    net = awake(small())
    x, c, m = torch.randn(2, 1, 16, 16), torch.rand(2), maps()
    with torch.no_grad():
        assert torch.equal(net(x, c, m), net(x, c, m.repeat_interleave(4, 2).repeat_interleave(4, 3)))
        assert torch.equal(net(x, c), net(x, c, torch.zeros_like(m)))
        assert not torch.equal(net(x, c, m), net(x, c))


@pytest.mark.parametrize("options", [{}, {"spade_kernel": 1}, {"patch_size": 2}, {"learned_variance": True}])
def test_modulations_computed_beforehand_change_no_bit(options: dict) -> None:
    net = awake(small(**options))
    x, c, m = torch.randn(2, 1, 16, 16), torch.rand(2), maps()
    with torch.no_grad():
        plain, cached = net(x, c, m), net(x, c, m, modulations=net.modulations(m))
    assert torch.equal(plain, cached)
    assert plain.shape == (2, 2 if options.get("learned_variance") else 1, 16, 16)


def test_saved_and_loaded_it_is_the_same_net(tmp_path) -> None:
    net = small("ncsnpp")
    net.save_pretrained(tmp_path)
    again = SemanticUNet.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    x, c, m = torch.randn(2, 1, 16, 16), torch.rand(2), maps()
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    with torch.no_grad():
        assert torch.equal(net(x, c, m), again(x, c, m))


def test_a_size_that_the_net_cannot_halve_is_refused() -> None:
    with pytest.raises(UserError, match="resolution: 18 is not a multiple"):
        SemanticUNet(18, base_channels=16, channel_multipliers=(1, 2, 2))
    net = small()
    assert net(torch.zeros(1, 1, 8, 24), torch.rand(1), maps(1)).shape == (1, 1, 8, 24)
    with pytest.raises(UserError, match="x: 16x15 is not a multiple of the net's stride 2"):
        net(torch.zeros(1, 1, 16, 15), torch.rand(1), maps(1))


def test_groups_are_the_published_ones_and_always_divide() -> None:
    assert [num_groups(c) for c in (128, 192, 256, 768)] == [32, 32, 32, 32]
    assert all(c % num_groups(c) == 0 for c in range(1, 300))


def test_attention_of_few_places_in_bf16_is_as_near_as_torchs_own() -> None:
    q, k, v = (2 * torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(i)) for i in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    fused = (F.scaled_dot_product_attention(q, k, v).float() - exact).norm() / exact.norm()
    with torch.inference_mode():
        own = attend(q, k, v)
    assert own.dtype == torch.bfloat16
    assert (own.float() - exact).norm() / exact.norm() < 3 * fused + 1e-3


def test_one_level_for_all_images_is_embedded_once() -> None:
    net = awake(small())
    sizes = []
    net.map_layer0.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    one_hot, x = maps(3), torch.randn(3, 1, 16, 16)
    denoiser = Denoiser(net, EDM())
    with torch.no_grad():
        one, each = denoiser(x, 0.7, one_hot), denoiser(x, torch.full((3,), 0.7), one_hot)
    assert sizes == [1, 3]
    torch.testing.assert_close(one, each)


@pytest.mark.parametrize(("arch", "passes"), [("adm", 0), ("ddpmpp", 2)])
def test_a_skip_scale_of_1_is_no_pass_over_the_maps(arch: str, passes: int) -> None:
    block = next(m for m in awake(small(arch)).modules() if isinstance(m, Block) and m.num_heads)
    channels = block.conv0.in_channels
    x, emb = torch.randn(2, channels, 8, 8), torch.randn(2, block.affine.in_features)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        block(x, emb, Conditioning(torch.zeros(2, 10, 8, 8)))
    assert sum(e.name == "aten::mul" for e in profile.events()) == passes
