"""Preconditioning D(x;σ) = c_skip·x + c_out·F(c_in·x; c_noise): VP, VE, iDDPM and EDM (arXiv:2206.00364, Table 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SIGMA_DATA = 0.5
Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]


def vp_sigma(t: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    """σ(t) = √(exp(½β_d t² + β_min t) − 1) of the VP schedule."""
    return torch.expm1(0.5 * beta_d * t**2 + beta_min * t).sqrt()


def vp_sigma_inverse(sigma: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    """t(σ), the inverse of `vp_sigma` for t ≥ 0."""
    return ((beta_min**2 + 2 * beta_d * torch.log1p(sigma**2)).sqrt() - beta_min) / beta_d


def iddpm_table(num: int = 1000, c1: float = 0.001, c2: float = 0.008) -> Tensor:
    """u_0 > … > u_M = 0, float64 [num+1]: u_{j−1} = √((u_j²+1)/max(ᾱ_{j−1}/ᾱ_j, C₁) − 1)."""
    j = torch.arange(num + 1, dtype=torch.float64)
    alpha_bar = torch.sin(0.5 * math.pi * j / num / (c2 + 1)).square()
    u = torch.zeros(num + 1, dtype=torch.float64)
    for k in range(num, 0, -1):
        ratio = (alpha_bar[k - 1] / alpha_bar[k]).clamp(min=c1)
        u[k - 1] = ((u[k] ** 2 + 1) / ratio - 1).sqrt()
    return u


class Preconditioning(nn.Module):
    """Coefficients, training noise and loss weight of one formulation. σ is a tensor of any shape, in x's units."""

    sigma_min: float
    sigma_max: float

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """(c_skip, c_out, c_in, c_noise), each of σ's shape."""
        raise TypeError(f"{type(self).__name__} has no coefficients: use one of {', '.join(PRECONDITIONINGS)}")

    def sigma_quantile(self, u: Tensor) -> Tensor:
        """Training noise levels: the quantile function of their distribution at uniform u in (0, 1)."""
        raise TypeError(f"{type(self).__name__} has no noise distribution: use one of {', '.join(PRECONDITIONINGS)}")

    def draw_sigma(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent training noise levels, float32 [n], on the CPU."""
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        return self.sigma_quantile(u.clamp(1e-12, 1 - 1e-12)).float()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """λ(σ)."""
        return 1 / sigma**2

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that the network was trained at."""
        return sigma


class EDM(Preconditioning):
    """ln σ ~ N(−1.2, 1.2²), σ_data 0.5."""

    def __init__(self, sigma_data: float = SIGMA_DATA, p_mean: float = -1.2, p_std: float = 1.2) -> None:
        super().__init__()
        self.sigma_data, self.p_mean, self.p_std = sigma_data, p_mean, p_std
        self.sigma_min, self.sigma_max = 0.0, math.inf

    def coefficients(self, sigma: Tensor) -> Coefficients:
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4

    def sigma_quantile(self, u: Tensor) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return (self.p_mean + self.p_std * normal).exp()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VP(Preconditioning):
    """σ(t), t ~ U(1e-5, 1)."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, num: int = 1000, epsilon_t: float = 1e-5) -> None:
        super().__init__()
        self.beta_d, self.beta_min, self.num, self.epsilon_t = beta_d, beta_min, num, epsilon_t
        self.sigma_min, self.sigma_max = (
            float(self.sigma(torch.tensor(epsilon_t))),
            float(self.sigma(torch.tensor(1.0))),
        )

    def sigma(self, t: Tensor) -> Tensor:
        """σ(t) of this schedule."""
        return vp_sigma(t.double(), self.beta_d, self.beta_min)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = (self.num - 1) * vp_sigma_inverse(sigma, self.beta_d, self.beta_min)
        return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), c_noise

    def sigma_quantile(self, u: Tensor) -> Tensor:
        return self.sigma(self.epsilon_t + u * (1 - self.epsilon_t))


class VE(Preconditioning):
    """ln σ ~ U(ln 0.02, ln 100)."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__()
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return torch.ones_like(sigma), sigma, torch.ones_like(sigma), (0.5 * sigma).log()

    def sigma_quantile(self, u: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u


class IDDPM(Preconditioning):
    """Discrete noise levels u_j, j ~ U{0..M−1}; c_noise = M − 1 − (nearest index of σ)."""

    table: Tensor

    def __init__(self, num: int = 1000, c1: float = 0.001, c2: float = 0.008) -> None:
        super().__init__()
        self.num = num
        self.register_buffer("table", iddpm_table(num, c1, c2), persistent=False)
        self.sigma_min, self.sigma_max = float(self.table[num - 1]), float(self.table[0])

    def index(self, sigma: Tensor) -> Tensor:
        """The index j in {0..M} of the table's level nearest to each σ."""
        table = self.table.to(sigma.device)  # a grid of levels is made on the CPU, wherever the network is
        return (sigma.reshape(-1, 1).double() - table).abs().argmin(1).reshape(sigma.shape)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = (self.num - 1 - self.index(sigma)).to(sigma.dtype)
        return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), c_noise

    def sigma_quantile(self, u: Tensor) -> Tensor:
        return self.table.to(u.device)[(u * self.num).long().clamp(0, self.num - 1)]

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.table.to(sigma.device)[self.index(sigma)].to(sigma.dtype)


PRECONDITIONINGS: dict[str, type[Preconditioning]] = {"edm": EDM, "vp": VP, "ve": VE, "iddpm": IDDPM}


class Denoiser(nn.Module):
    """A network with its preconditioning: D(x; σ, map), the estimate of the clean image.

    x float [B, 1, H, W]; sigma [B] or a scalar; one_hot [B, 10, h, w] at any size, None for the null mask; D has x's
    shape and dtype. Under autocast only the network runs in low precision.
    """

    def __init__(self, net: nn.Module, precondition: Preconditioning) -> None:
        super().__init__()
        self.net, self.precondition = net, precondition

    def forward(
        self, x: Tensor, sigma: Tensor | float, one_hot: Tensor | None = None, modulations: Any = None
    ) -> Tensor:
        return self.with_variance(x, sigma, one_hot, modulations)[0]

    def with_variance(
        self, x: Tensor, sigma: Tensor | float, one_hot: Tensor | None = None, modulations: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """(D, v): v in about [−1, 1] interpolates the log variance of a DDPM step; None if the net has no such head."""
        # One level for all images is embedded once.
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1)
        c_skip, c_out, c_in, c_noise = self.precondition.coefficients(sigma)
        column = (-1, *[1] * (x.dim() - 1))
        work, one_hot = x.float(), None if one_hot is None else one_hot.float()
        out = self.net((c_in.reshape(column) * work), c_noise.float(), one_hot, modulations=modulations).float()
        f, v = out.chunk(2, dim=1) if out.shape[1] == 2 * x.shape[1] else (out, None)
        return (c_skip.reshape(column) * work + c_out.reshape(column) * f).to(x.dtype), v

    def modulations(self, one_hot: Tensor, budget_bytes: float | None = None) -> Any:
        """What depends on the maps alone, computed once for all noise levels: pass it to `forward`."""
        return self.net.modulations(one_hot.float(), budget_bytes)  # type: ignore[operator]
