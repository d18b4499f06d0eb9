"""Preconditioning identities, training noise distributions, losses with known minimisers, EMA, generation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from raysyn.compose import load_model
from raysyn.config import SamplerConfig
from raysyn.diffusion.ema import EMA
from raysyn.diffusion.generate import _guided, generate
from raysyn.diffusion.loss import diffusion_loss, step_log_variances
from raysyn.diffusion.noise import noise_stream, seeded_noise, sigma_grid, sigma_range
from raysyn.diffusion.precondition import (
    EDM,
    IDDPM,
    PRECONDITIONINGS,
    VE,
    VP,
    Denoiser,
    iddpm_table,
    vp_sigma,
    vp_sigma_inverse,
)
from raysyn.diffusion.solvers import ddpm_log_variances
from raysyn.models import MODELS, build_denoiser
from raysyn.types import UserError

SIGMAS = torch.tensor([0.03, 0.5, 2.0, 60.0], dtype=torch.float64)


def test_edm_keeps_unit_variance_at_the_nets_input_and_target() -> None:
    c_skip, c_out, c_in, c_noise = EDM().coefficients(SIGMAS)
    assert torch.allclose(c_in**2 * (SIGMAS**2 + 0.25), torch.ones(4, dtype=torch.float64))
    target = ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * SIGMAS**2) / c_out**2  # variance of (x0 − c_skip·x)/c_out
    assert torch.allclose(target, torch.ones(4, dtype=torch.float64))
    assert torch.allclose(EDM().loss_weight(SIGMAS) * c_out**2, torch.ones(4, dtype=torch.float64))
    assert torch.allclose(c_noise, SIGMAS.log() / 4)


@pytest.mark.parametrize("kind", [VP, IDDPM])
def test_variance_preserving_forms_subtract_the_predicted_noise(kind) -> None:
    precondition = kind()
    c_skip, c_out, c_in, _ = precondition.coefficients(SIGMAS)
    assert torch.equal(c_skip, torch.ones_like(SIGMAS))
    assert torch.equal(c_out, -SIGMAS)
    assert torch.allclose(c_in, (SIGMAS**2 + 1) ** -0.5)
    assert torch.allclose(precondition.loss_weight(SIGMAS), SIGMAS**-2)


def test_vp_schedule_and_its_inverse() -> None:
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    assert torch.allclose(vp_sigma_inverse(vp_sigma(t)), t, atol=1e-10)
    assert torch.allclose(VP().coefficients(vp_sigma(t))[3], 999 * t, atol=1e-7)
    assert math.isclose(VP().sigma_max, math.sqrt(math.exp(0.5 * 19.9 + 0.1) - 1), rel_tol=1e-6)


def test_iddpm_table_is_the_recursion_and_rounds_to_itself() -> None:
    u = iddpm_table()
    alpha = torch.sin(0.5 * math.pi * torch.arange(1001, dtype=torch.float64) / 1000 / 1.008) ** 2
    for j in (1000, 500, 3):
        ratio = max(float(alpha[j - 1] / alpha[j]), 0.001)
        assert math.isclose(float(u[j - 1]), math.sqrt((float(u[j]) ** 2 + 1) / ratio - 1), rel_tol=1e-12)
    p = IDDPM()
    assert torch.equal(p.round_sigma(u[[0, 10, 999]] * 1.0001), u[[0, 10, 999]])
    assert p.coefficients(u[[0, 999]])[3].tolist() == [999, 0]


@pytest.mark.parametrize(
    ("name", "cdf"),
    [
        ("edm", lambda s: stats.norm.cdf(np.log(s), -1.2, 1.2)),
        ("vp", lambda s: (vp_sigma_inverse(torch.tensor(s)).numpy() - 1e-5) / (1 - 1e-5)),
        ("ve", lambda s: np.log(s / 0.02) / np.log(100 / 0.02)),
    ],
)
def test_training_noise_follows_its_distribution(name: str, cdf) -> None:
    drawn = PRECONDITIONINGS[name]().draw_sigma(4000, torch.Generator().manual_seed(0)).double().numpy()
    assert stats.kstest(drawn, cdf).pvalue > 0.01


def test_iddpm_draws_each_of_its_levels_alike() -> None:
    p = IDDPM()
    index = p.index(p.draw_sigma(50_000, torch.Generator().manual_seed(0)).double())
    assert int(index.max()) == 999
    counts = torch.bincount(index // 100, minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


class Oracle(nn.Module):
    """A net for which D = x0 whatever the noise, where c_out·F = x0 − c_skip·x can be solved; v is a constant."""

    def __init__(self, x0, precondition, v: float | None = None) -> None:
        super().__init__()
        self.x0, self.p, self.v = x0, precondition, v
        self.sigma = None

    def forward(self, x, c_noise, one_hot=None, modulations=None):
        c_skip, c_out, c_in, _ = (c.reshape(-1, 1, 1, 1).float() for c in self.p.coefficients(self.sigma))
        f = (self.x0 - c_skip * x / c_in) / c_out
        return f if self.v is None else torch.cat([f, torch.full_like(f, self.v)], 1)


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_the_loss_of_the_truth_is_zero_and_of_an_error_its_weight(name: str) -> None:
    p = PRECONDITIONINGS[name]()
    x0, sigma = torch.randn(3, 1, 4, 4) * 0.5, torch.tensor([0.1, 0.7, 3.0])
    sigma = p.round_sigma(sigma)
    net = Oracle(x0, p)
    net.sigma = sigma
    one_hot = torch.zeros(3, 10, 4, 4)
    exact = diffusion_loss(Denoiser(net, p), x0, one_hot, sigma=sigma, noise=torch.randn_like(x0))
    assert float(exact.loss) < 1e-6
    off = Oracle(x0 + 0.1, p)
    off.sigma = sigma
    report = diffusion_loss(Denoiser(off, p), x0, one_hot, sigma=sigma, noise=torch.randn_like(x0))
    assert torch.allclose(report.per_sample, p.loss_weight(sigma) * 0.01, rtol=1e-2)


def test_the_hybrid_loss_is_least_at_the_true_variance_and_keeps_off_the_mean() -> None:
    p = IDDPM()
    x0 = torch.zeros(4096, 1, 1, 1)
    sigma = p.round_sigma(torch.full((4096,), 0.8))

    def loss(v: float, d: float) -> float:
        net = Oracle(x0 + d, p, v)
        net.sigma = sigma
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(x0.shape, generator=g)
        return float(diffusion_loss(Denoiser(net, p), x0, torch.zeros(4096, 10, 1, 1), sigma=sigma, noise=noise).loss)

    at_truth = [loss(v, 0.0) for v in (-1.0, -0.5, 1.0)]
    assert at_truth[0] < at_truth[1] < at_truth[2]  # D is exact: the posterior's own variance β̃ is the best
    weights = nn.Parameter(torch.zeros(2, 1, 1, 1))

    class Net(nn.Module):
        def forward(self, x, c_noise, one_hot=None, modulations=None):
            return torch.cat([x * weights[0], torch.zeros_like(x) + weights[1]], 1)

    x0 = torch.randn(8, 1, 4, 4)
    options = dict(sigma=sigma[:8], noise=torch.randn_like(x0))
    full = diffusion_loss(Denoiser(Net(), p), x0, torch.zeros(8, 10, 4, 4), **options).loss
    (grad,) = torch.autograd.grad(full, weights)

    class Simple(nn.Module):
        def forward(self, x, c_noise, one_hot=None, modulations=None):
            return x * weights[0]

    simple = diffusion_loss(Denoiser(Simple(), p), x0, torch.zeros(8, 10, 4, 4), **options).loss
    (grad_simple,) = torch.autograd.grad(simple, weights)
    assert torch.allclose(grad[0], grad_simple[0], rtol=1e-5)  # L_vlb sends no gradient through the mean
    assert float(grad[1].abs()) > 0


def test_the_variance_term_is_the_sum_over_all_steps() -> None:
    """L_vlb is M times one step's KL, here ½(a + e^−a − 1) with a the excess of the log variance; 0.001 of it counts."""
    p, v = IDDPM(), 0.4
    x0 = torch.zeros(2, 1, 4, 4)
    sigma = p.table[[960, 995]].float()
    net = Oracle(x0, p, v)
    net.sigma = sigma
    report = diffusion_loss(Denoiser(net, p), x0, torch.zeros(2, 10, 4, 4), sigma=sigma, noise=torch.randn_like(x0))
    steps = [ddpm_log_variances(float(p.table[j]), float(p.table[j + 1])) for j in (960, 995)]
    excess = [(v + 1) / 2 * (large - small) for small, large in steps]
    expected = [0.001 * 1000 * 0.5 * (a + math.exp(-a) - 1) / math.log(2) for a in excess]
    assert report.per_sample.tolist() == pytest.approx(expected, rel=1e-2)


def test_the_last_steps_variance_lies_between_the_clipped_and_the_whole() -> None:
    table = iddpm_table()
    small, large = step_log_variances(table)
    assert torch.isfinite(small).all()
    assert (small < large).all()
    assert small[-1] == small[-2]
    s = float(table[999]) ** 2
    assert math.isclose(math.exp(float(large[-1])), s / (1 + s), rel_tol=1e-9)  # β_1 of the chain
    found = ddpm_log_variances(float(table[300]), float(table[301]))
    assert (float(small[300]), float(large[300])) == pytest.approx(found)


def test_dropped_labels_reach_the_net_as_the_null_mask() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x, c_noise, one_hot=None, modulations=None):
            seen.append(one_hot)
            return x

    drop = torch.tensor([True, False])
    diffusion_loss(Denoiser(Net(), EDM()), torch.zeros(2, 1, 4, 4), torch.ones(2, 10, 4, 4), drop=drop)
    assert seen[0][0].abs().sum() == 0
    assert (seen[0][1] == 1).all()


def test_ema_halves_after_its_half_life_whatever_the_batch() -> None:
    for batch in (10, 25):
        net = nn.Linear(1, 1, bias=False)
        nn.init.ones_(net.weight)
        ema = EMA(net, half_life_images=100)
        nn.init.zeros_(net.weight)
        for _ in range(100 // batch):
            ema.update(net, batch)
        assert math.isclose(float(ema.average["weight"]), 0.5, rel_tol=1e-5)
        other = nn.Linear(1, 1, bias=False)
        restored = EMA(other, 1)
        restored.load_state_dict(ema.state_dict())
        restored.copy_to(other)
        assert torch.equal(other.weight, ema.average["weight"])


def test_noise_belongs_to_its_seed() -> None:
    both, second = seeded_noise([3, 4], (1, 8, 8)), seeded_noise([4], (1, 8, 8))
    assert torch.equal(both[1], second[0])
    assert not torch.equal(both[0], both[1])
    for other in (3 + 2**32, 3 - 2**63, -1):
        assert not torch.equal(seeded_noise([other], (1, 8, 8))[0], both[0]), "all 64 bits of a seed count"


def test_noise_is_standard_normal_and_a_stream_goes_on() -> None:
    x = seeded_noise(range(64), (1, 64, 64)).double()
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    assert abs(float((x**4).mean()) - 3) < 0.1
    assert abs(float((x[1:] * x[:-1]).mean())) < 0.01, "neighbouring seeds have nothing in common"
    first, second = noise_stream(3), noise_stream(3, 1)
    drawn = [first((8, 8)), first((8, 8)), second((8, 8))]
    assert len({float(one.sum()) for one in drawn}) == 3


@pytest.mark.parametrize(
    ("discretization", "low", "high"),
    [
        ("vp", float(vp_sigma(torch.tensor(1e-3))), 152.0),
        ("ve", 0.02, 100.0),
        ("iddpm", 0.002, 81.0),
        ("edm", 0.002, 80.0),
    ],
)
def test_ranges_of_table_1(discretization: str, low: float, high: float) -> None:
    found = sigma_range(SamplerConfig(discretization=discretization), EDM())
    assert found == pytest.approx((low, high), rel=1e-2)


def test_ranges_are_clipped_to_what_the_network_knows() -> None:
    assert sigma_range(SamplerConfig(discretization="edm"), VE())[0] == 0.02
    with pytest.raises(UserError, match="sigma_min"):
        sigma_range(SamplerConfig(sigma_min=0.5, sigma_max=0.1), EDM())
    grid = sigma_grid(SamplerConfig(num_steps=6, discretization="edm"), IDDPM())
    assert all((IDDPM().table - s).abs().min() < 1e-12 for s in grid)


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
