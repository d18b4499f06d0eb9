"""SPADE against its formula, and modulations kept for all steps: whole, as tables of neighbourhoods, or left out."""

import pytest
import torch
from torch.nn import functional as F

from raysyn.nets.spade import Conditioning, Neighbourhoods, Spade, Table, keep_mask, one_hot_from_index
from raysyn.nets.unet import SemanticUNet


def blobs(batch: int = 2, size: int = 32) -> torch.Tensor:
    """Maps of a few smooth regions, with a null region (no channel set) as well: float32 [B, 10, size, size]."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    index = torch.stack([(row // 12 + (row + column > size) + i) % 10 for i in range(batch)])
    one_hot = one_hot_from_index(index)
    one_hot[:, :, size // 2 :, : size // 4] = 0
    return one_hot


def net(**options) -> SemanticUNet:
    torch.manual_seed(0)
    made = SemanticUNet(
        32,
        base_channels=16,
        channel_multipliers=(1, 2),
        num_blocks=1,
        attention_resolutions=(16,),
        spade_hidden=8,
        **options,
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.eval()


def bytes_of(kept) -> int:
    return sum(t.numel() * t.element_size() for layer in kept if layer is not None for t in layer)


@pytest.mark.parametrize("kernel", [1, 3])
def test_spade_is_its_formula(kernel: int) -> None:
    torch.manual_seed(0)
    layer = Spade(12, 10, 8, kernel, 0)
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.norm.bias)
    x, m = torch.randn(2, 12, 16, 16), blobs()
    small = m[:, :, ::2, ::2]  # nearest: the floor of the place
    hidden = F.conv2d(small, layer.mlp_shared[0].weight, layer.mlp_shared[0].bias, padding=1).relu()
    gamma, beta = (F.conv2d(hidden, c.weight, c.bias, padding=kernel // 2) for c in (layer.mlp_gamma, layer.mlp_beta))
    mean = x.reshape(2, 3, -1).mean(2)[:, :, None]
    var = x.reshape(2, 3, -1).var(2, unbiased=False)[:, :, None]
    normal = ((x.reshape(2, 3, -1) - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
    normal = normal * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    assert torch.allclose(layer(x, Conditioning(m)), normal * (1 + gamma) + beta, atol=1e-5)


def test_one_hot_has_the_channel_of_the_index_and_no_other() -> None:
    index = torch.arange(10, dtype=torch.uint8).reshape(1, 2, 5)
    assert torch.equal(one_hot_from_index(index)[0].flatten(1), torch.eye(10))


@pytest.mark.parametrize("radius", [1, 2])
def test_neighbourhoods_are_told_apart_exactly(radius: int) -> None:
    m = blobs(3, 20)
    label = (m * torch.arange(1, 11)[:, None, None]).sum(1).long()
    padded = F.pad(label, (radius,) * 4, value=99)
    windows = padded.unfold(1, 2 * radius + 1, 1).unfold(2, 2 * radius + 1, 1).flatten(3).flatten(0, 2)
    distinct, expected = torch.unique(windows, dim=0, return_inverse=True)
    places = Neighbourhoods(m, radius)
    found = places.index.flatten().long()
    assert len(places.first) == len(distinct)
    assert len({*zip(found.tolist(), expected.tolist(), strict=True)}) == len(distinct)  # the same classes of pixels
    assert torch.equal(found[places.first], torch.arange(len(distinct)))


def test_maps_that_are_not_one_hot_have_no_neighbourhoods() -> None:
    assert Neighbourhoods(blobs() * 0.5, 2).index is None
    assert Neighbourhoods(torch.ones(1, 10, 8, 8), 2).index is None
    assert Neighbourhoods(torch.zeros(1, 10, 8, 8), 2).index is not None


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_table_gives_back_every_bit_borders_and_null_pixels_included(kernel: int) -> None:
    torch.manual_seed(0)
    layer, m = Spade(12, 10, 8, kernel, 0), blobs()
    full = layer.modulation(m)
    table = layer.tabled(full, Neighbourhoods(m, 1 + kernel // 2))
    assert isinstance(table, Table)
    assert table.scale.shape[1] < m[:, 0].numel() / 4
    for a, b in zip(table.maps(), full, strict=True):
        assert torch.equal(a, b)
    noisy = full[0] + torch.randn_like(full[0]), full[1]  # what depends on the place is not kept as a table
    assert layer.tabled(noisy, Neighbourhoods(m, 1 + kernel // 2)) is None


@pytest.mark.parametrize("kernel", [1, 3])
def test_any_budget_is_kept_and_changes_no_bit(kernel: int) -> None:
    model, m = net(spade_kernel=kernel), blobs()
    x, c = torch.randn(2, 1, 32, 32), torch.tensor([0.1, 0.9])
    kinds = set()
    with torch.no_grad():
        plain, whole = model(x, c, m), bytes_of(model.modulations(m))
        for budget in (0, 2_000, 30_000, whole // 8, whole // 2, whole - 1, whole, None):
            kept = model.modulations(m, budget)
            kinds |= {type(layer) for layer in kept}
            assert bytes_of(kept) <= (whole if budget is None else budget)
            assert torch.equal(plain, model(x, c, m, modulations=kept))
    assert kinds == {tuple, Table, type(None)}
    assert all(type(layer) is tuple for layer in model.modulations(m, whole))


def test_what_is_left_of_the_budget_makes_maps_of_tables() -> None:
    model, m = net(), blobs()
    with torch.no_grad():
        whole = bytes_of(model.modulations(m))
        kept = [model.modulations(m, whole * part) for part in (0.4, 0.6, 0.99)]
    tables = [sum(type(layer) is Table for layer in layers) for layers in kept]
    assert tables[0] > tables[1] > tables[2]
    assert all(None not in layers for layers in kept)
    assert bytes_of(kept[1]) > 0.9 * 0.6 * whole


def test_maps_are_kept_where_no_table_gives_back_every_bit(monkeypatch) -> None:
    model, m = net(), blobs()
    monkeypatch.setattr(Spade, "tabled", lambda self, full, places: None)
    with torch.no_grad():
        whole = bytes_of(model.modulations(m))
        kept = model.modulations(m, whole // 2)
    assert all(type(layer) is not Table for layer in kept)
    assert 0.3 * whole < bytes_of(kept) <= whole // 2


def test_where_nothing_repeats_the_budget_goes_to_the_most_work_a_byte() -> None:
    model, m = net(), torch.rand(2, 10, 32, 32)
    with torch.no_grad():
        half = bytes_of(model.modulations(m)) / 2
        kept = model.modulations(m, half)
    worth = [layer.cost(2 * side**2) / (16 * layer.norm.num_channels * side**2) for layer, side in model.spade_sizes()]
    sides = [side for _, side in model.spade_sizes()]
    chosen = [w for w, k, s in zip(worth, kept, sides, strict=True) if k is not None and s == 32]
    left = [w for w, k, s in zip(worth, kept, sides, strict=True) if k is None and s == 32]
    assert left
    assert not chosen or max(left) <= max(chosen)
    assert bytes_of(kept) <= half


def test_in_low_precision_the_budget_counts_its_bytes() -> None:
    model, m = net(), blobs()
    with torch.no_grad():
        whole = bytes_of(model.modulations(m))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept = model.modulations(m, whole // 2)
    assert all(type(layer) is tuple and layer[0].dtype == torch.bfloat16 for layer in kept)
    assert bytes_of(kept) == whole // 2


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_keeps_its_share_and_knows_sample_layer_and_place(probability: float) -> None:
    seeds = torch.tensor([1, 2, 2**62 + 7])
    mask = keep_mask(seeds, 1, (8, 64, 64), probability)
    for share in (mask.float().mean((1, 2, 3)), mask.float().mean((0, 2, 3)), mask.float().mean((0, 1, 2))):
        assert torch.allclose(share, torch.tensor(1 - probability), atol=0.05)
    assert torch.equal(mask[1:2], keep_mask(seeds[1:2], 1, (8, 64, 64), probability))
    others = [mask[1], keep_mask(seeds, 2, (8, 64, 64), probability)[0], mask[0].roll(1, 2), mask[0].roll(1, 0)]
    expected = (1 - probability) ** 2 + probability**2  # two independent masks agree in so many places
    for other in others:
        assert (mask[0] == other).float().mean().item() == pytest.approx(expected, abs=0.02)


def test_dropouts_of_samples_layers_and_neighbours_are_independent() -> None:
    seeds = torch.randint(0, 2**62, (6,), generator=torch.Generator().manual_seed(0))
    masks = torch.cat([keep_mask(seeds, layer, (32, 64, 64), 0.1).flatten(1) for layer in (1, 2, 9)]).double()
    z = (masks - 0.9) / 0.3
    root = z.shape[1] ** 0.5
    together = z @ z.T / root  # off the diagonal standard normal, if independent
    assert together.fill_diagonal_(0).abs().max() < 5
    assert together.square().sum() / (18 * 17) < 1.5
    for lag in (1, 64, 4096):
        assert ((z * z.roll(lag, 1)).mean(1) * root).abs().max() < 5
    assert abs(float((z[0] * z[7] * z[14]).mean() * root)) < 5


def test_dropout_leaves_the_mean_and_without_seeds_is_torchs() -> None:
    one_hot, h = blobs(4), torch.ones(4, 8, 32, 32)
    dropped = Conditioning(one_hot, seeds=torch.arange(4)).dropout(h, 0.25)
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    torch.manual_seed(0)
    plain = Conditioning(one_hot).dropout(h, 0.25)
    torch.manual_seed(0)
    assert torch.equal(plain, F.dropout(h, 0.25))
