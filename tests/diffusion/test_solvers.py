"""Solvers against closed forms: the denoiser of Gaussian data is known, and so is where the ODE ends."""

import math
from itertools import pairwise

import pytest
import torch

from raysyn.diffusion.noise import iddpm_sigmas, karras_sigmas, ve_sigmas, vp_sigmas
from raysyn.diffusion.precondition import IDDPM
from raysyn.diffusion.solvers import SOLVERS, ddpm_log_variances, num_function_evals, solve_generalised
from raysyn.types import UserError

S0, MEAN, HIGH, LOW = 0.5, 0.3, 10.0, 1e-3


def gaussian(x, sigma):
    """D of data N(MEAN, S0²)."""
    return (S0**2 * x + sigma**2 * MEAN) / (S0**2 + sigma**2)


def ode_end(x, sigma):
    """Where the probability-flow ODE takes x from σ to 0."""
    return MEAN + (x - MEAN) * S0 / math.sqrt(S0**2 + sigma**2)


def mixture(x, sigma):
    """D of ½N(−1, 0.1²) + ½N(1, 0.1²)."""
    variance = 0.1**2 + sigma**2
    means = torch.tensor([-1.0, 1.0], dtype=x.dtype)
    weight = torch.softmax(-((x[..., None] - means) ** 2) / (2 * variance), -1)
    each = (0.1**2 * x[..., None] + sigma**2 * means) / variance
    return (weight * each).sum(-1)


@pytest.fixture
def start():
    return torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * HIGH


def orders(solve, start, grid, **kw) -> list[float]:
    errors = [
        float((solve(gaussian, start, grid(n, sigma_min=LOW, sigma_max=HIGH), **kw) - ode_end(start, HIGH)).abs().max())
        for n in (32, 64, 128)
    ]
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("euler", 0.9, 1.1),
        ("ddim", 0.9, 1.1),
        ("reference_heun", 0.9, 1.1),  # fault 1 of the reference: twice the price of Euler, and its order
        ("heun", 1.9, 2.5),
        ("generalised", 1.9, 2.5),
        ("dpmpp_2m", 1.9, 2.5),
    ],
)
def test_order_of_convergence(name: str, least: float, most: float, start) -> None:
    found = orders(SOLVERS[name], start, karras_sigmas)
    assert all(least <= o <= most for o in found), found


def test_third_order_multistep_is_of_third_order(start) -> None:
    high, low = 100.0, 1e-4  # wide: the last step's own error, of order low, stays out of sight
    ends = [
        SOLVERS["dpmpp_3m"](gaussian, 10 * start, karras_sigmas(n, sigma_min=low, sigma_max=high))
        for n in (64, 128, 256)
    ]
    errors = [float((end - ode_end(10 * start, high)).abs().max()) for end in ends]
    assert all(2.8 <= math.log2(a / b) <= 3.4 for a, b in pairwise(errors)), errors


def test_third_order_multistep_is_nearer_than_second(start) -> None:
    grid = karras_sigmas(24, sigma_min=LOW, sigma_max=HIGH)
    two, three = (
        float((SOLVERS[f"dpmpp_{k}m"](gaussian, start, grid) - ode_end(start, HIGH)).abs().max()) for k in (2, 3)
    )
    assert three < 0.5 * two


@pytest.mark.parametrize(
    ("grid", "schedule", "scaling"),
    [
        (vp_sigmas, "vp", "vp"),
        (ve_sigmas, "ve", "none"),
        (karras_sigmas, "linear", "vp"),
        (karras_sigmas, "vp", "none"),
    ],
)
def test_the_family_of_table_1_converges_at_second_order_to_the_same_end(grid, schedule, scaling, start) -> None:
    assert all(o >= 1.9 for o in orders(solve_generalised, start, grid, schedule=schedule, scaling=scaling))
    end = solve_generalised(
        gaussian, start, grid(400, sigma_min=LOW, sigma_max=HIGH), schedule=schedule, scaling=scaling
    )
    assert (end - ode_end(start, HIGH)).abs().max() < 5e-3


def test_the_reference_branch_is_of_first_order_in_the_schedules_of_vp_and_ve_and_far_off_at_few_steps(start) -> None:
    def error(name: str, grid, num_steps: int, **options) -> float:
        end = SOLVERS[name](gaussian, start, grid(num_steps, sigma_min=0.02, sigma_max=HIGH), **options)
        return float((end - ode_end(start, HIGH)).square().mean().sqrt())

    vp, ve = {"schedule": "vp", "scaling": "vp"}, {"schedule": "ve", "scaling": "none"}
    for grid, options in ((vp_sigmas, vp), (ve_sigmas, ve)):
        coarse, fine = (error("reference_heun", grid, n, **options) for n in (320, 1280))
        assert 0.9 < math.log(coarse / fine, 4) < 1.3
    assert error("reference_heun", vp_sigmas, 5, **vp) > 30 * error("generalised", vp_sigmas, 5, **vp)


def test_raised_levels_are_rounded_to_those_the_network_knows() -> None:
    p, seen = IDDPM(), []

    def watching(x, sigma):
        seen.append(float(sigma))
        return gaussian(x, sigma)

    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    grid = iddpm_sigmas(12, sigma_min=0.02, sigma_max=50.0)
    SOLVERS["stochastic_heun"](watching, x, grid, s_churn=4.0, round_sigma=p.round_sigma)
    assert max(float((p.table - s).abs().min()) for s in seen) < 1e-9
    assert seen[0] > float(grid[0])


def test_the_reference_branch_repeats_euler_exactly(start) -> None:
    grid = karras_sigmas(10, sigma_min=LOW, sigma_max=HIGH)
    euler, twice = (SOLVERS[n](gaussian, start, grid) for n in ("euler", "reference_heun"))
    assert torch.allclose(euler, twice, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [("stochastic_heun", {"s_churn": 40.0, "s_noise": 1.0}), ("ddpm", {}), ("ddim", {"eta": 1.0})],
)
def test_stochastic_solvers_reach_the_right_moments(name: str, options: dict) -> None:
    g = torch.Generator().manual_seed(1)

    def noise(x):
        return torch.randn(x.shape, generator=g, dtype=x.dtype)

    grid = karras_sigmas(256, sigma_min=LOW, sigma_max=HIGH)
    x = torch.randn(40_000, 1, 1, 1, generator=g, dtype=torch.float64) * HIGH
    end = SOLVERS[name](gaussian, x, grid, noise=noise, **options)
    assert abs(float(end.mean()) - MEAN) < 0.02
    assert abs(float(end.std()) - S0) < 0.02
    both = SOLVERS[name](mixture, x, grid, noise=noise, **options)
    assert abs(float((both > 0).double().mean()) - 0.5) < 0.02
    assert abs(float(both.abs().mean()) - 1) < 0.02


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_evaluations_are_counted_in_closed_form(name: str, num_steps: int, start) -> None:
    calls = []

    def counting(x, sigma):
        calls.append(float(sigma))
        return gaussian(x, sigma)

    end = SOLVERS[name](counting, start.float(), karras_sigmas(num_steps, sigma_min=LOW, sigma_max=HIGH))
    assert len(calls) == num_function_evals(name, num_steps)
    assert end.dtype == torch.float32
    assert all(sigma > 0 for sigma in calls)


def test_learned_variance_interpolates_between_the_two_of_a_ddpm_step() -> None:
    small, large = ddpm_log_variances(2.0, 1.5)
    assert small < large
    sigmas = torch.tensor([2.0, 1.5, 0.0], dtype=torch.float64)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def spread(v: float) -> float:
        seen = []

        def denoise(y, sigma):
            seen.append(y)
            return torch.zeros_like(y), torch.full_like(y, v)

        SOLVERS["ddpm"](denoise, x, sigmas, noise=torch.ones_like)
        return float(seen[1])

    assert math.isclose(spread(-1.0), math.exp(small / 2))
    assert math.isclose(spread(1.0), math.exp(large / 2))


@pytest.mark.parametrize("grid", [karras_sigmas, vp_sigmas, ve_sigmas, iddpm_sigmas])
def test_grids_fall_from_the_top_to_the_bottom_to_zero(grid) -> None:
    sigmas = grid(12, sigma_min=0.02, sigma_max=50.0)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (13,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    loose = 0.1 if grid is iddpm_sigmas else 1e-9
    assert abs(float(sigmas[0]) - 50.0) <= loose * 50
    assert abs(float(sigmas[-2]) - 0.02) <= loose * 0.02


def test_karras_grid_is_its_formula() -> None:
    found = karras_sigmas(5, sigma_min=0.002, sigma_max=80.0)
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)] + [0.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert karras_sigmas(1, sigma_min=0.002, sigma_max=80.0).tolist() == pytest.approx([80.0, 0.0])
    with pytest.raises(UserError, match="num_steps"):
        karras_sigmas(0, sigma_min=0.002, sigma_max=80.0)
