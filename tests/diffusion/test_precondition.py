"""Preconditioning identities and training noise distributions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from raysyn.diffusion.precondition import (
    EDM,
    IDDPM,
    PRECONDITIONINGS,
    VP,
    iddpm_table,
    vp_sigma,
    vp_sigma_inverse,
)

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
