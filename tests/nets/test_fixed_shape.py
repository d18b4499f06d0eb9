"""The net at fixed shapes: same bits as the plain one, and a reason where something cannot be had."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from raysyn.nets import fixed_shape
from raysyn.nets.fixed_shape import FixedShapeNet, _Graph, store_weights
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
def test_what_cannot_be_compiled_runs_plainly_with_the_reason(net, inputs, caplog) -> None:
    x, c, _ = inputs

    def broken(graph, example):
        raise RuntimeError("no compiler here")

    fixed = FixedShapeNet(net, graphs=False, backend=broken)
    for _ in range(2):
        assert torch.equal(fixed(x, c), net(x, c))
    (reason,) = fixed.fallbacks
    assert reason.startswith("torch.compile failed")
    assert caplog.text.count("slower than it could be: torch.compile failed") == 1
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
    own = fixed.modulations(maps, size // 2)
    assert {type(k) for k in own} == {tuple, type(None)}
    assert sum(t.numel() * t.element_size() for layer in own if layer for t in layer) <= size // 2
    assert torch.equal(fixed(x, c, maps, own), net(x, c, maps, whole))


@pytest.fixture
def device(monkeypatch):
    """Stands in for a GPU's streams and captures; `captures` has the pool of each capture begun, `stream` what is current."""
    now = SimpleNamespace(stream="ours", capturing=False, captures=[], error=None)

    @contextmanager
    def stream(wanted):
        before, now.stream = now.stream, wanted
        try:
            yield
        finally:
            now.stream = before

    @contextmanager
    def graph(graph, pool, *, capture_error_mode):
        assert (now.stream, capture_error_mode) == ("ours", "thread_local")
        now.captures.append(pool)
        now.stream, now.capturing = "capture", True
        yield
        now.capturing = False
        if now.error is not None:  # as torch's own, which then leaves its stream the current one
            raise now.error
        now.stream = "ours"

    class CurrentStream(str):
        def wait_stream(self, other) -> None: ...

    def made():
        return SimpleNamespace(pool=lambda: "pool", replay=lambda: None)

    monkeypatch.setattr(fixed_shape, "WITH_GRAPHS", ("cpu",))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: CurrentStream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: CurrentStream(now.stream))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return now


@torch.inference_mode()
def test_nothing_is_compiled_during_a_capture(net, inputs, device) -> None:
    x, c, index = inputs
    maps = one_hot_from_index(index)
    compiled = []

    def backend(graph, example):
        compiled.append(device.capturing)
        return graph.forward

    fixed = FixedShapeNet(net, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fixed(x, c, maps), net(x, c, maps))
    assert set(compiled) == {False}
    assert (fixed.fallbacks, device.captures) == ([], [None])
    torch._dynamo.reset()


@torch.inference_mode()
def test_a_graph_takes_in_what_changes_and_its_outputs_stay(net, inputs, device) -> None:
    x, c, index = inputs
    batches = []
    for maps in (one_hot_from_index(index), one_hot_from_index(9 - index)):
        batches.append((maps, net.modulations(maps)))
    graph = _Graph(FixedShapeNet(net, compile=False), (x, c, *batches[0]), None)
    graph.graph.replay = lambda: graph.output.copy_(net(*graph.held))
    outputs = []
    for maps, modulations in (batches[0], batches[0], batches[1]):
        for shift in (0.0, 1.0):
            outputs.append(
                (graph(x + shift, c + shift, maps, modulations), net(x + shift, c + shift, maps, modulations))
            )
    assert all(torch.equal(a, b) for a, b in outputs)


@torch.inference_mode()
def test_graphs_share_a_pool_and_beyond_the_first_shapes_the_plain_net_runs(net, inputs, device, monkeypatch) -> None:
    monkeypatch.setattr(fixed_shape, "MAX_SHAPES", 2)
    x, c, _ = inputs
    compiled = []
    fixed = FixedShapeNet(net, backend=lambda graph, example: compiled.append(0) or graph.forward)
    for count in (2, 1, 2, 3, 4):
        given = x[:1].repeat(count, 1, 1, 1), c[:1]
        assert torch.allclose(fixed(*given), net(*given), atol=1e-6)
    assert device.captures == [None, "pool"]
    assert len(compiled) == 2
    assert fixed.fallbacks == ["more than 2 shapes: only the first are made ready"]
    torch._dynamo.reset()


@torch.inference_mode()
def test_a_failed_capture_gives_the_stream_back(net, inputs, device) -> None:
    x, c, _ = inputs
    fixed, device.error = FixedShapeNet(net, compile=False), RuntimeError("operation not permitted")
    for _ in range(2):
        assert torch.equal(fixed(x, c), net(x, c))
    assert (device.stream, len(device.captures)) == ("ours", 1)
    assert fixed.fallbacks == ["not captured: RuntimeError: operation not permitted"]


@torch.inference_mode()
def test_a_batch_too_large_for_a_graph_is_not_tried_again(net, inputs, device) -> None:
    x, c, _ = inputs
    fixed, device.error = FixedShapeNet(net, compile=False), RuntimeError("CUDA error: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        fixed(x, c)
    device.error = None
    with pytest.raises(torch.OutOfMemoryError, match="did not fit"):
        fixed(x, c)
    assert torch.equal(fixed(x[:1], c[:1]), net(x[:1], c[:1]))
    assert (device.stream, fixed.fallbacks, len(device.captures)) == ("ours", [], 2)
