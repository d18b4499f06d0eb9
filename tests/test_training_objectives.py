"""What is fitted: losses per sample by their equations, draws that belong to the position, latents encoded beforehand."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from raysyn.cluster.fit_build import compile_net
from raysyn.config import AugmentConfig, FitConfig, ModelConfig, NetConfig, VAEConfig
from raysyn.diffusion.ema import EMA
from raysyn.diffusion.loss import diffusion_loss
from raysyn.models import build_denoiser
from raysyn.nets.codecs import LatentCodec
from raysyn.nets.gamma_vae import GammaPosterior, GammaVAE, GaussianPosterior
from raysyn.nets.spade import one_hot_from_index
from raysyn.training import SampleLosses, build_optimizer, train
from raysyn.training_batches import Batch, FrameSource
from raysyn.training_objectives import (
    AutoencoderLoss,
    AutoencoderObjective,
    DiffusionObjective,
    Moments,
    draw_each,
    encode_rows,
    latent_statistics,
    moments_of,
    posterior_of,
    sector_of,
)
from raysyn.training_state import TrainState

NET = NetConfig(
    base_channels=8,
    channel_multipliers=[1, 2],
    num_blocks=1,
    attention_resolutions=[],
    dropout=0.0,
    spade_hidden=4,
    spade_kernel=1,
)
VAE = VAEConfig(channels=[8], num_blocks=1, attention=False, stem_patch=2, parametrisation="mean_shape")
FIT = FitConfig(num_images=32, global_batch=8, micro_batch=8, num_validation_images=4, lr=1e-3, ema_half_life_images=8)
SIZE, CPU = 16, torch.device("cpu")


def make_source(num: int = 6, augment: AugmentConfig | None = None, copies: int = 0) -> FrameSource:
    rng = np.random.default_rng(1)
    yy, xx = np.mgrid[:SIZE, :SIZE]
    labels = np.stack([np.where((yy - 8) ** 2 + (xx - 8) ** 2 < 9 + 4 * i, 1 + i % 4, 2) for i in range(num)])
    labels[:, :3] = 0
    images = rng.integers(1, 256, (num, SIZE, SIZE), dtype=np.uint8)
    return FrameSource(images, labels.astype(np.uint8), rng.integers(0, 2, num).astype(np.uint8), 0, augment, copies)


def make_vae(kind: str = "gamma") -> GammaVAE:
    torch.manual_seed(0)
    vae = GammaVAE.from_vae_config(dataclasses.replace(VAE, kind=kind)).eval().requires_grad_(False)
    vae.set_statistics(0.3, 0.2)
    return vae


def latent_objective(moments: Moments | None, source: FrameSource, config: FitConfig = FIT) -> DiffusionObjective:
    torch.manual_seed(0)
    model = ModelConfig(name="edm_l128", latent_downscale=2, net=NET, vae=VAE)
    codec = LatentCodec(make_vae())
    return DiffusionObjective(
        build_denoiser(model, SIZE), source, make_source(4), codec.shape(SIZE), config, 0.0, codec, moments
    )


@pytest.mark.parametrize("kind", ["gamma", "kl"])
def test_draws_belong_to_the_sample(kind: str) -> None:
    vae, source = make_vae(kind), make_source()
    image, index = source.copied(np.arange(6), np.zeros(6, dtype=np.int64))
    posterior = vae.encode(image, sector_of(index))
    assert isinstance(posterior, GammaPosterior if kind == "gamma" else GaussianPosterior)
    together = draw_each(posterior, range(6))
    again = draw_each(vae.encode(image[2:4], sector_of(index[2:4])), [2, 3])
    assert torch.allclose(together[2:4], again, atol=1e-5)
    assert not torch.equal(together, draw_each(posterior, range(1, 7)))
    many = torch.stack([draw_each(posterior, [1000 * k + i for i in range(6)]) for k in range(400)])
    assert torch.allclose(many.mean(0), posterior.mean, atol=0.2 * float(posterior.variance.max()) ** 0.5)


@pytest.mark.parametrize("kind", ["gamma", "kl"])
def test_moments_hold_the_whole_posterior(kind: str) -> None:
    vae, source = make_vae(kind), make_source()
    image, index = source.copied(np.arange(6), np.zeros(6, dtype=np.int64))
    posterior = vae.encode(image, sector_of(index))
    again = posterior_of(vae, moments_of(posterior), sector_of(index))
    assert torch.equal(again.mean, posterior.mean)
    assert torch.equal(again.variance, posterior.variance)
    assert torch.equal(draw_each(again, range(6)), draw_each(posterior, range(6)))


def test_latents_encoded_beforehand_are_those_encoded_on_the_way() -> None:
    fly = latent_objective(None, make_source())
    source = make_source(copies=1)
    rows = encode_rows(fly.codec.vae, source, 0, np.arange(6), CPU, 4)  # type: ignore[union-attr]
    held_out = encode_rows(fly.codec.vae, make_source(4), 0, np.arange(4), CPU, 4)  # type: ignore[union-attr]
    stored = latent_objective(Moments(rows[None], held_out[None]), source)
    positions = np.arange(3, 11)
    a, b = fly.batch(positions, 0), stored.batch(positions, 0)
    assert a.latent is None
    assert b.image_01 is None
    assert torch.equal(a.index, b.index)
    clean = fly.module._clean(a)  # type: ignore[operator]
    assert torch.allclose(clean, stored.module._clean(b), atol=1e-5)  # type: ignore[operator]
    one, two = fly.module(a), stored.module(b)
    assert torch.allclose(one.loss, two.loss, rtol=1e-4)
    v, w = fly.validation_batch(np.arange(4)), stored.validation_batch(np.arange(4))
    assert torch.allclose(fly.module(v).loss, stored.module(w).loss, rtol=1e-4)


def test_each_epoch_draws_latents_anew() -> None:
    source = make_source(copies=1)
    rows = encode_rows(make_vae(), source, 0, np.arange(6), CPU, 8)
    objective = latent_objective(Moments(rows[None], rows[None]), source)
    first, second = objective.batch(np.arange(6), 0), objective.batch(np.arange(6, 12), 0)
    order = [int(np.flatnonzero(second_frame(source, 6) == f)[0]) for f in second_frame(source, 0)]
    assert first.latent is not None
    assert second.latent is not None
    assert torch.equal(first.index, second.index[order])
    assert not torch.allclose(first.latent, second.latent[order], atol=1e-3)


def second_frame(source: FrameSource, start: int) -> np.ndarray:
    from raysyn.training_batches import frames_at

    return frames_at(np.arange(start, start + 6), 6, source.seed)[0]


def test_warped_copies_are_encoded_with_their_label_maps() -> None:
    source = make_source(augment=AugmentConfig(), copies=3)
    vae = make_vae()
    rows = np.stack([encode_rows(vae, source, k, np.arange(6), CPU, 4) for k in range(3)])
    objective = latent_objective(Moments(rows, rows), source)
    positions = np.arange(18)
    batch = objective.batch(positions, 0)
    image, index, _ = source.pairs(positions, 0)
    assert torch.equal(batch.index, index)
    expected = posterior_of(vae, moments_of(vae.encode(image, sector_of(index))), sector_of(index))
    drawn = (draw_each(expected, batch.seeds) - 0.3) / 0.2 * 0.5
    assert torch.allclose(batch.latent, drawn, atol=1e-4)  # type: ignore[arg-type]


def test_diffusion_loss_is_that_of_the_formulation() -> None:
    torch.manual_seed(0)
    model = ModelConfig(name="edm", space="pixel", latent_downscale=1, net=NET)
    config = dataclasses.replace(FIT, micro_batch=3)
    objective = DiffusionObjective(build_denoiser(model, SIZE), make_source(), None, (1, SIZE, SIZE), config, 0.5)
    batch = objective.batch(np.arange(8), 0)
    losses: SampleLosses = objective.module(batch)
    image, index, _ = objective.train.pairs(np.arange(8), 0)
    sector = sector_of(index)
    x0 = torch.where(sector > 0, image * 2 - 1, -1.0)
    sigma = objective.denoiser.precondition.sigma_quantile(batch.uniform)
    by_hand = diffusion_loss(
        objective.denoiser, x0, one_hot_from_index(index), sigma=sigma, noise=batch.noise, drop=batch.dropped
    )
    assert torch.equal(losses.loss, by_hand.per_sample)
    assert losses.total.item() == pytest.approx(8 * by_hand.loss.item(), rel=1e-6)
    assert batch.dropped is not None
    assert batch.dropped.any()
    assert not batch.dropped.all()
    assert objective.num_validation == 0


def test_dropout_belongs_to_the_sample_however_the_batch_is_shared() -> None:
    """The published nets drop 10 %: two workers, or smaller pieces, must not change what is fitted."""
    torch.manual_seed(0)
    model = ModelConfig(name="edm", space="pixel", latent_downscale=1, net=dataclasses.replace(NET, dropout=0.5))
    objective = DiffusionObjective(build_denoiser(model, SIZE), make_source(), None, (1, SIZE, SIZE), FIT, 0.0)
    with torch.no_grad():
        for p in objective.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    objective.module.train()

    def gradient(*parts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        objective.model.zero_grad()
        losses = [objective.module(objective.batch(part, 0)) for part in parts]
        sum(one.total for one in losses).backward()
        grads = [p.grad.flatten() for p in objective.model.parameters() if p.grad is not None]
        return torch.cat([one.loss for one in losses]), torch.cat(grads)

    whole, halves = gradient(np.arange(8)), gradient(np.arange(4), np.arange(4, 8))
    for a, b in zip(whole, halves):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], gradient(np.arange(8, 16))[0], rtol=1e-2)
    net = objective.denoiser.net
    net.dropout_seeds = None
    objective.module.eval()
    assert not torch.allclose(objective.module(objective.batch(np.arange(8), 0)).loss, whole[0], rtol=1e-3)


@pytest.mark.slow
def test_compiled_nets_have_the_same_losses_and_gradients() -> None:
    """One graph whatever the batch, dropout by sample and the Γ draws included."""
    net = dataclasses.replace(NET, channel_multipliers=[1], dropout=0.5)
    model = ModelConfig(name="edm", space="pixel", latent_downscale=1, net=net)
    torch.manual_seed(0)
    diffusion = DiffusionObjective(build_denoiser(model, SIZE), make_source(), None, (1, SIZE, SIZE), FIT, 0.0)
    autoencoder = AutoencoderObjective(
        GammaVAE.from_vae_config(VAE), dataclasses.replace(VAE, fit=FIT), make_source(), None, CPU
    )
    for objective in (diffusion, autoencoder):
        objective.module.train()
        batches = [objective.batch(np.arange(8 * i, 8 * i + 8), 0) for i in range(2)]

        def both(of=objective, given=batches) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
            of.model.zero_grad()
            losses = [of.module(batch).total for batch in given]
            sum(losses).backward()
            return [*losses, *(p.grad.clone() for p in of.model.parameters() if p.grad is not None)]

        plain = both()
        compile_net(objective.model)
        assert torch.isfinite(plain[0])
        for a, b in zip(plain, both()):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_autoencoder_loss_is_that_of_its_terms_and_late_terms_come_late() -> None:
    weights = dataclasses.replace(VAE, late_terms_from_epoch=1, fit=FIT)
    vae = make_vae()
    objective = AutoencoderObjective(vae, weights, make_source(), make_source(4))
    batch: Batch = objective.batch(np.arange(2, 10), 0)  # epochs 0 and 1
    losses = objective.module(batch)
    assert batch.image_01 is not None
    assert batch.epoch is not None
    assert batch.epoch.tolist() == [0] * 4 + [1] * 4
    for i in range(8):
        image, sector = batch.image_01[i : i + 1], sector_of(batch.index[i : i + 1])
        posterior = vae.encode(image * sector, sector)
        z = posterior.sample(torch.Generator().manual_seed(batch.seeds[i]))
        decoded = vae.decode(z, sector)
        expected = 10 * F.mse_loss(decoded, image * sector) + 1e-3 * posterior.kl()
        if i >= 4:
            small = F.interpolate(image * sector, size=(8, 8), mode="area") * posterior.sector
            expected = expected + 1e-2 * F.mse_loss(z, small)
        assert float(losses.loss[i]) == pytest.approx(float(expected), rel=1e-4)
    assert objective.part_names == ("image", "kl", "latent")
    assert float(losses.total) == pytest.approx(float(losses.loss.sum()), rel=1e-5)


def test_all_four_terms_with_their_weights_reach_every_parameter() -> None:
    class Features(torch.nn.Module):
        def forward(self, x):
            return [x.repeat(1, 4, 1, 1), F.avg_pool2d(x, 2).repeat(1, 4, 1, 1)]

    weights = dataclasses.replace(VAE, fit=FIT, weight_latent=0.5)
    vae = make_vae().train().requires_grad_(True)
    batch = AutoencoderObjective(vae, weights, make_source(), make_source()).validation_batch(np.arange(4))
    losses = AutoencoderLoss(vae, weights, Features())(batch)
    parts = losses.parts
    assert set(parts) == {"image", "kl", "latent", "perceptual"}
    given = {"image": weights.weight_image, "kl": weights.weight_kl, "latent": 0.5}
    expected = sum(given[k] * parts[k] for k in given) + weights.weight_perceptual * parts["perceptual"]
    assert torch.allclose(losses.loss, expected)
    losses.total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vae.parameters())


def test_latent_statistics_are_those_of_draws_inside_the_sector() -> None:
    vae, source = make_vae(), make_source()
    mean, std = latent_statistics(vae, source, CPU, batch=4)
    image, index = source.copied(np.arange(6), np.zeros(6, dtype=np.int64))
    posterior = vae.encode(image, sector_of(index))
    draws = torch.cat([draw_each(posterior, range(6 * k, 6 * k + 6))[posterior.sector > 0] for k in range(200)])
    assert mean == pytest.approx(float(draws.mean()), rel=0.02)
    assert std == pytest.approx(float(draws.std()), rel=0.02)


def test_fitting_lowers_the_losses() -> None:
    config = dataclasses.replace(FIT, num_images=320, lr=5e-3)
    vae = GammaVAE.from_vae_config(VAE)
    objective = AutoencoderObjective(vae, dataclasses.replace(VAE, fit=config), make_source(), None)
    state = TrainState(vae, build_optimizer(vae, config), EMA(vae, 0.0))
    curve = [r.parts["image"] for r in train(state, objective, config)]
    assert np.mean(curve[-5:]) < 0.5 * np.mean(curve[:3])
