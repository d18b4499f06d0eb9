"""The Γ-VAE against torch.distributions, Monte Carlo and finite differences; codecs; the four loss terms."""

import math

import pytest
import torch
from torch.distributions import Gamma, Normal, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysyn.compose import load_model
from raysyn.models import build_vae
from raysyn.nets.codecs import LatentCodec, PixelCodec
from raysyn.nets.gamma_vae import (
    GammaPosterior,
    GammaVAE,
    GaussianPosterior,
    gamma_kl,
)
from raysyn.types import UserError

PLAIN = torch.contiguous_format
SHAPE = torch.tensor([0.3, 1.0, 3.75, 40.0], dtype=torch.float64)
RATE = torch.tensor([2.0, 10.8, 10.8, 100.0], dtype=torch.float64)


def test_kl_is_that_of_the_posterior_to_the_prior() -> None:
    prior = Gamma(torch.tensor(3.75, dtype=torch.float64), torch.tensor(10.8, dtype=torch.float64))
    found = gamma_kl(SHAPE, RATE, 3.75, 10.8)
    assert torch.allclose(found, kl_divergence(Gamma(SHAPE, RATE), prior), rtol=1e-6)
    assert not torch.allclose(found, kl_divergence(prior, Gamma(SHAPE, RATE)), rtol=1e-2)  # fault 3 of the reference
    assert abs(float(found[2])) < 1e-7
    assert (found[[0, 1, 3]] > 0).all()


def test_kl_equals_its_monte_carlo_estimate() -> None:
    torch.manual_seed(0)
    q, p = Gamma(torch.tensor(6.0), torch.tensor(12.0)), Gamma(torch.tensor(3.75), torch.tensor(10.8))
    z = q.sample((400_000,))
    estimate = float((q.log_prob(z) - p.log_prob(z)).mean())
    assert math.isclose(float(gamma_kl(torch.tensor(6.0), torch.tensor(12.0), 3.75, 10.8)), estimate, rel_tol=0.02)


def posterior(shape, rate, sector=None) -> GammaPosterior:
    sector = torch.ones(shape.shape[0], 1, *shape.shape[2:]) if sector is None else sector
    return GammaPosterior(shape, rate, sector, 3.75, 10.8)


def test_draws_have_the_posteriors_moments() -> None:
    shape, rate = torch.full((1, 1, 300, 300), 5.0), torch.full((1, 1, 300, 300), 9.0)
    z = posterior(shape, rate).sample(torch.Generator().manual_seed(0))
    assert math.isclose(float(z.mean()), 5 / 9, rel_tol=0.01)
    assert math.isclose(float(z.var()), 5 / 81, rel_tol=0.02)


def test_gradients_of_draws_equal_finite_differences() -> None:
    """d/dk and d/dθ of E[z²] at the same random numbers, against its closed form k(k+1)/θ² differenced."""
    k, r = torch.tensor(4.0, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64)

    def second_moment(k, r) -> torch.Tensor:
        big = torch.ones(1, 1, 700, 700, dtype=torch.float64)
        return posterior(big * k, big * r).sample(torch.Generator().manual_seed(1)).square().mean()

    leaves = k.clone().requires_grad_(), r.clone().requires_grad_()
    grads = torch.autograd.grad(second_moment(*leaves), leaves)
    step = 1e-3

    def exact(k, r):
        return float(k * (k + 1) / r**2)

    assert math.isclose(float(grads[0]), (exact(k + step, r) - exact(k - step, r)) / (2 * step), rel_tol=0.02)
    assert math.isclose(float(grads[1]), (exact(k, r + step) - exact(k, r - step)) / (2 * step), rel_tol=0.02)


def test_nothing_is_left_outside_the_sector() -> None:
    sector = torch.zeros(1, 1, 4, 4)
    sector[..., :2] = 1
    p = posterior(torch.full((1, 1, 4, 4), 3.0), torch.full((1, 1, 4, 4), 3.0), sector)
    for latent in (p.mean, p.variance, p.sample()):
        assert (latent[..., 2:] == 0).all()
        assert (latent[..., :2] > 0).all()
    assert torch.allclose(p.kl(), gamma_kl(torch.tensor(3.0), torch.tensor(3.0), 3.75, 10.8).reshape(1))


def test_the_gaussian_control_has_the_gaussian_kl() -> None:
    g = GaussianPosterior(torch.full((1, 1, 2, 2), 0.7), torch.full((1, 1, 2, 2), -1.0), torch.ones(1, 1, 2, 2))
    expected = kl_divergence(Normal(0.7, math.exp(-0.5)), Normal(0.0, 1.0))
    assert torch.allclose(g.kl(), expected.reshape(1))


@pytest.fixture(params=["mean_shape", "shape_rate", "kl"])
def vae(request) -> GammaVAE:
    torch.manual_seed(0)
    kind = "kl" if request.param == "kl" else "gamma"
    form = "mean_shape" if kind == "kl" else request.param
    return GammaVAE(kind=kind, channels=(8, 16), num_blocks=1, attention=True, parametrisation=form)


def batch():
    g = torch.Generator().manual_seed(0)
    image, sector = torch.rand(3, 1, 16, 16, generator=g), torch.ones(3, 1, 16, 16)
    sector[..., :3] = 0
    return image * sector, sector


def test_encode_and_decode_have_their_shapes_and_masks(vae: GammaVAE) -> None:
    image, sector = batch()
    latent = vae.encode(image, sector).mean
    assert latent.shape == (3, 1, 8, 8)
    decoded = vae.decode(latent, sector)
    assert decoded.shape == image.shape
    assert (decoded[..., :3] == 0).all()
    changed = image + (1 - sector)  # what lies outside the sector is not seen
    assert torch.equal(vae.encode(changed, sector).mean, latent)


def test_attention_goes_through_the_fused_kernel_in_either_memory_format(vae: GammaVAE) -> None:
    image, sector = batch()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():  # which raises where it would refuse
        latents = [vae.to(memory_format=form).encode(image, sector).mean for form in (PLAIN, torch.channels_last)]
    assert torch.allclose(*latents, rtol=1e-4, atol=1e-5)


def test_published_size_has_activations_between_its_convolutions() -> None:
    vae = build_vae(load_model("edm_l64"))
    assert vae.downscale == 4
    names = [type(m).__name__ for m in vae.modules()]
    assert names.count("ResBlock") == 2 * (3 * 2 + 2)
    assert {m.num_groups for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}
    x = torch.randn(1, 64, 8, 8)
    block = next(m for m in vae.modules() if type(m).__name__ == "ResBlock")
    with (
        torch.no_grad()
    ):  # fault 5: without an activation a residual block of norms would be odd in its normalised input
        assert not torch.allclose(block(x) - x, -(block(-x) + x), atol=1e-3)


def test_latents_are_standardised_by_stored_statistics(vae: GammaVAE, tmp_path) -> None:
    vae.set_statistics(0.3, 0.2)
    vae.save_pretrained(tmp_path)
    codec = LatentCodec(GammaVAE.from_pretrained(tmp_path, low_cpu_mem_usage=False))
    image, sector = batch()
    x = codec.encode(image * 2 - 1, sector)
    z = vae.encode(image, sector).mean
    assert torch.allclose(x, (z - 0.3) / 0.2 * 0.5, atol=1e-6)
    assert codec.shape(64) == (1, 32, 32)
    decoded = codec.decode(x, sector)
    assert torch.allclose(decoded, vae.decode(z, sector).clamp(0, 1) * 2 - 1, atol=1e-5)
    assert (decoded[..., :3] == -1).all()
    drawn = codec.encode(image * 2 - 1, sector, torch.Generator().manual_seed(0))
    assert not torch.equal(drawn, x)


def test_the_latent_diffusion_sees_the_image(vae: GammaVAE) -> None:
    """Fault 2 of the reference: its latents are overwritten by prior draws."""
    codec, (image, sector) = LatentCodec(vae), batch()
    other = (1 - image) * sector
    assert not torch.allclose(codec.encode(image * 2 - 1, sector), codec.encode(other * 2 - 1, sector))


def test_pixels_are_their_own_codec() -> None:
    codec, (image, sector) = PixelCodec(), batch()
    x = codec.encode(image * 2 - 1, sector)
    assert torch.equal(codec.decode(x, sector), image * 2 - 1 + 0 * sector)
    assert codec.shape(64) == (1, 64, 64)
    with pytest.raises(UserError, match="no autoencoder"):
        build_vae(load_model("edm"))
