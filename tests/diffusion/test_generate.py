"""Evaluations are counted exactly; the cache, guidance and fresh noise leave each image its own."""

import math

import pytest
import torch

from raysyn.compose import load_model
from raysyn.config import SOLVERS, SamplerConfig
from raysyn.diffusion.generate import _guided, _guides, generate, num_network_evals
from raysyn.diffusion.noise import sigma_grid, vp_betas
from raysyn.diffusion.precondition import IDDPM, PRECONDITIONINGS, Denoiser
from raysyn.diffusion.solvers import solve_generalised
from raysyn.models import MODELS, build_denoiser
from raysyn.nets.unet import SemanticUNet
from raysyn.types import UserError

SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def net() -> SemanticUNet:
    torch.manual_seed(0)
    return SemanticUNet(
        16, base_channels=8, channel_multipliers=(1, 2), num_blocks=1, attention_resolutions=(), spade_hidden=8
    ).eval()


def calls(net: SemanticUNet, sampler: SamplerConfig, formulation: str) -> int:
    """How often a real run calls the network for one image."""
    count = 0

    def counting(*_) -> None:
        nonlocal count
        count += 1

    hook = net.register_forward_hook(counting)
    generate(Denoiser(net, PRECONDITIONINGS[formulation]()), torch.zeros(1, 10, 16, 16), [3], sampler, shape=SHAPE)
    hook.remove()
    return count


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("guidance", "formulation"),
    [
        ({}, "edm"),
        ({"guidance_scale": 2.0}, "edm"),
        ({"guidance_scale": 2.0, "guidance_sigma_min": 0.3, "guidance_sigma_max": 5.0}, "edm"),
        ({"guidance_scale": 2.0, "guidance_sigma_min": 0.3, "guidance_sigma_max": 5.0, "s_churn": 20.0}, "iddpm"),
    ],
)
def test_evaluations_are_those_that_a_run_makes(net, solver: str, guidance: dict, formulation: str) -> None:
    sampler = SamplerConfig(solver=solver, num_steps=6, sigma_min=0.02, sigma_max=20.0, **guidance)
    assert num_network_evals(sampler, PRECONDITIONINGS[formulation]()) == calls(net, sampler, formulation)


def test_guidance_everywhere_reads_no_noise_level() -> None:
    unreadable = torch.empty((), device="meta")  # on a GPU reading it would wait for all that was launched
    assert _guides(SamplerConfig(guidance_scale=1.5), unreadable)
    assert not _guides(SamplerConfig(), unreadable)


def test_guidance_in_a_narrow_interval_costs_less_than_everywhere() -> None:
    precondition = PRECONDITIONINGS["edm"]()
    grid = {"solver": "euler", "num_steps": 10, "sigma_min": 0.002, "sigma_max": 80.0}
    plain, everywhere = (num_network_evals(SamplerConfig(guidance_scale=w, **grid), precondition) for w in (1.0, 3.0))
    narrow = SamplerConfig(guidance_scale=3.0, guidance_sigma_min=0.2, guidance_sigma_max=5.0, **grid)
    assert (plain, everywhere) == (10, 20)
    assert plain < num_network_evals(narrow, precondition) < everywhere


def drawn(net: SemanticUNet, solver: str, **settings) -> torch.Tensor:
    sampler = SamplerConfig(solver=solver, num_steps=4, sigma_min=0.02, sigma_max=20.0, **settings)
    denoiser = Denoiser(net, PRECONDITIONINGS["edm"]())
    return generate(denoiser, torch.zeros(1, 10, 16, 16), [3], sampler, shape=SHAPE)


def test_euler_and_heun_take_the_schedule_and_the_scaling(net) -> None:
    vp = {"discretization": "vp", "schedule": "vp", "scaling": "vp"}
    assert torch.equal(drawn(net, "heun", **vp), drawn(net, "generalised", **vp))
    for solver in ("heun", "euler"):
        assert not torch.allclose(drawn(net, solver, **vp), drawn(net, solver, discretization="vp"), atol=1e-3)
    assert not torch.allclose(drawn(net, "euler", **vp), drawn(net, "heun", **vp), atol=1e-3)
    precondition = PRECONDITIONINGS["edm"]()
    counts = [num_network_evals(SamplerConfig(solver=s, num_steps=4, **vp), precondition) for s in ("euler", "heun")]
    assert counts == [4, 7]


def test_stochastic_heun_is_stochastic_unless_told_otherwise(net) -> None:
    assert torch.equal(drawn(net, "stochastic_heun", s_churn=0.0), drawn(net, "heun"))
    assert torch.equal(drawn(net, "stochastic_heun"), drawn(net, "stochastic_heun", s_churn=40.0))
    assert not torch.allclose(drawn(net, "stochastic_heun"), drawn(net, "heun"), atol=1e-2)


def test_the_vp_schedule_of_a_single_step_is_that_of_the_range() -> None:
    """One Euler step of D = 0 from σ_max = σ(1): x·s(1)·(1 − σ'/σ − s'/s) over t = 1, closed form."""
    low, high = 0.002, 80.0
    sampler = SamplerConfig(solver="euler", num_steps=1, schedule="vp", scaling="vp", discretization="vp")
    beta_d, beta_min = vp_betas(low, high)
    x = torch.full((1, 1, 1, 1), high, dtype=torch.float64)
    end = solve_generalised(
        lambda x, sigma: torch.zeros_like(x),
        x,
        torch.tensor([high, 0.0], dtype=torch.float64),
        schedule=sampler.schedule,
        scaling=sampler.scaling,
        sigma_range=(low, high),
    )
    s = 1 / math.sqrt(1 + high**2)
    slope = 0.5 * (beta_min + beta_d) * (high + 1 / high)  # σ'(1)
    expected = high * s * (1 - slope / high + high * slope * s * s)
    assert float(end) == pytest.approx(expected, rel=1e-6)


def test_the_levels_are_those_of_the_networks_own_table() -> None:
    own = IDDPM(4000)
    sampler = SamplerConfig(solver="ddpm", num_steps=4000, discretization="iddpm", sigma_min=1e-6)
    grid = sigma_grid(sampler, own)
    assert torch.equal(grid[:-1], own.table[:-1])
    few = sigma_grid(SamplerConfig(num_steps=7, discretization="iddpm"), own)
    assert all(float((own.table - level).abs().min()) == 0 for level in few)


@pytest.fixture(scope="module")
def demo():
    torch.manual_seed(0)
    config = load_model("edm", "demo")
    denoiser = build_denoiser(config, 32).eval()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    index = torch.randint(0, 10, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    return config, denoiser, torch.nn.functional.one_hot(index, 10).permute(0, 3, 1, 2).float()


def test_cached_modulations_change_no_bit_and_any_budget_is_kept(demo) -> None:
    config, denoiser, one_hot = demo
    plain = generate(denoiser, one_hot, [1, 2, 3], config.sampler, shape=(1, 32, 32))
    for budget in (1, 200_000, 1 << 30):
        cached = generate(
            denoiser, one_hot, [1, 2, 3], config.sampler, shape=(1, 32, 32), modulation_cache_bytes=budget
        )
        assert torch.equal(plain, cached)
    kept = denoiser.modulations(one_hot, 200_000)
    used = sum(t.numel() * t.element_size() for pair in kept if pair is not None for t in pair)
    assert 0 < used <= 200_000
    assert None in kept


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_maps_may_be_of_any_type(dtype: torch.dtype, demo) -> None:
    _, denoiser, one_hot = demo
    x, maps = torch.randn(3, 1, 32, 32), one_hot.to(dtype)
    with torch.no_grad():
        expected = denoiser(x, 1.0, one_hot)
        assert torch.equal(denoiser(x, 1.0, maps), expected)
        assert torch.equal(denoiser(x, 1.0, maps, denoiser.modulations(maps)), expected)


def test_guidance_of_one_is_no_guidance_and_its_interval_bounds_it(demo) -> None:
    _, denoiser, one_hot = demo

    def draw(**options):
        return generate(denoiser, one_hot, [1, 2, 3], SamplerConfig(num_steps=4, **options), shape=(1, 32, 32))

    plain = draw()
    assert torch.equal(plain, draw(guidance_scale=2.0, guidance_sigma_min=1e6))
    assert not torch.equal(plain, draw(guidance_scale=2.0))


@pytest.mark.parametrize("options", [{"solver": "stochastic_heun", "s_churn": 20.0}, {"solver": "ddpm"}])
def test_fresh_noise_belongs_to_the_image_and_not_to_its_batch(options: dict, demo) -> None:
    _, denoiser, one_hot = demo
    sampler = SamplerConfig(num_steps=4, sigma_max=10.0, s_noise=1.0, **options)
    together = generate(denoiser, one_hot, [1, 2, 3], sampler, shape=(1, 32, 32))
    alone = generate(denoiser, one_hot[2:], [3], sampler, shape=(1, 32, 32))
    assert torch.allclose(together[2:], alone, atol=1e-4)
    other = generate(denoiser, one_hot[2:], [4], sampler, shape=(1, 32, 32))
    assert not torch.allclose(other, alone, atol=1e-2)


def test_guidance_mixes_with_the_null_mask_and_keeps_the_budget(demo) -> None:
    _, denoiser, one_hot = demo
    x, sigma = torch.randn(3, 1, 32, 32), torch.tensor(1.0)
    with torch.no_grad():
        mapped, null = denoiser(x, sigma, one_hot), denoiser(x, sigma, None)
        for budget in (0, 150_000, 1 << 30):
            guided = _guided(denoiser, one_hot, SamplerConfig(guidance_scale=1.5), budget)(x, sigma)
            assert torch.allclose(guided, null + 1.5 * (mapped - null), atol=1e-5)
    spent: list[float] = []
    original = denoiser.modulations
    denoiser.modulations = lambda maps, budget: spent.append(budget) or original(maps, budget)
    try:
        _guided(denoiser, one_hot, SamplerConfig(guidance_scale=1.5), 1e6)
    finally:
        del denoiser.modulations
    assert math.isclose(sum(spent), 1e6)


def test_seeds_and_maps_must_match(demo) -> None:
    config, denoiser, one_hot = demo
    with pytest.raises(UserError, match="seeds: 2 for 3"):
        generate(denoiser, one_hot, [1, 2], config.sampler, shape=(1, 32, 32))


@pytest.mark.parametrize("name", MODELS)
def test_each_model_runs_its_sampler_of_record(name: str, demo) -> None:
    config = load_model(name, "demo")
    record = load_model(name).sampler
    record.num_steps = 3
    denoiser = build_denoiser(config, 32).eval()
    size = 32 // config.latent_downscale
    x = generate(denoiser, demo[2], [1, 2, 3], record, shape=(config.vae.latent_channels, size, size))
    assert x.shape == (3, config.vae.latent_channels, size, size)
    assert torch.isfinite(x).all()
