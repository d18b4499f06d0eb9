"""The net at fixed shapes: same bits as the plain one, and a reason where something cannot be had."""

import pytest
import torch

from raysyn.nets.fixed_shape import FixedShapeNet, store_weights
from raysyn.nets.spade import Table, one_hot_from_index
from raysyn.nets.unet import SemanticUNet


@pytest.fixture
def net() -> SemanticUNet:
    torch.manual_seed(0)
    options = dict(
        base_channels=8, channel_multipliers=(1, 2), num_blocks=1, attention_resolutions=(8,), spade_hidden=8
    )
    made = SemanticUNet(16, **options).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.fixture
def inputs() -> tuple:
    index = torch.arange(16)[:, None].add(torch.arange(16)).div(8, rounding_mode="floor").expand(2, 16, 16)
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0.9]), index


@torch.inference_mode()
def test_weights_kept_in_bf16_are_those_that_autocast_makes(net, inputs) -> None:
    x, c, index = inputs
    maps = one_hot_from_index(index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = net(x, c, maps, net.modulations(maps))
        assert store_weights(net, torch.bfloat16) is net
        after = net(x, c, maps, net.modulations(maps))
    assert torch.equal(before, after)
    kept = {p.dim() > 1: set() for p in net.parameters()}
    for name, p in net.named_parameters():
        kept[p.dim() > 1].add(p.dtype)
        assert p.dtype == torch.float32 or not name.split(".")[-2].startswith("norm")
    assert kept[True] == {torch.bfloat16}


@torch.inference_mode()
def test_traced_whole_it_gives_the_same_bits_and_says_why_there_is_no_graph(net, inputs) -> None:
    x, c, index = inputs
    maps = one_hot_from_index(index)
    fixed = FixedShapeNet(net, backend="eager")
    for modulations in (None, net.modulations(maps)):
        assert torch.equal(fixed(x, c, maps, modulations), net(x, c, maps, modulations))
    assert torch.equal(fixed(x, c), net(x, c))
    assert fixed.fallbacks == ["no CUDA graphs on cpu"]
    assert all(torch.equal(a, b) for a, b in zip(fixed.modulations(maps)[0], net.modulations(maps)[0], strict=True))
    torch._dynamo.reset()


@torch.inference_mode()
def test_what_cannot_be_compiled_runs_plainly_with_the_reason(net, inputs) -> None:
    x, c, _ = inputs

    def broken(graph, example):
        raise RuntimeError("no compiler here")

    fixed = FixedShapeNet(net, graphs=False, backend=broken)
    for _ in range(2):
        assert torch.equal(fixed(x, c), net(x, c))
    (reason,) = fixed.fallbacks
    assert reason.startswith("torch.compile failed")
    torch._dynamo.reset()


@torch.inference_mode()
def test_tables_have_no_fixed_shape(net, inputs) -> None:
    x, c, index = inputs
    maps = one_hot_from_index(index)
    whole = net.modulations(maps)
    size = sum(t.numel() * t.element_size() for layer in whole for t in layer)
    kept = net.modulations(maps, size // 2)
    assert any(isinstance(k, Table) for k in kept)
    fixed = FixedShapeNet(net, compile=False)
    assert torch.equal(fixed(x, c, maps, kept), net(x, c, maps, whole))
    assert "tables" in fixed.fallbacks[0]
