"""Losses with known minimisers."""

import math

import pytest
import torch
from torch import nn

from raysyn.diffusion.loss import diffusion_loss, step_log_variances
from raysyn.diffusion.precondition import (
    EDM,
    IDDPM,
    PRECONDITIONINGS,
    Denoiser,
    iddpm_table,
)
from raysyn.diffusion.solvers import ddpm_log_variances


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
