"""One step: the gradient of the global batch whoever shares it, what its report says, the learning rate."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from raysyn.config import AugmentConfig, FitConfig
from raysyn.training import Parallel, StepReport, learning_rate, train
from tests.regression import CONFIG, Objective, make


def test_micro_batches_give_the_gradient_of_the_global_batch() -> None:
    curves = []
    for micro in (12, 5, 1):
        config = dataclasses.replace(CONFIG, micro_batch=micro)
        state, objective = make(config)
        curves.append([r.loss for r in train(state, objective, config)])
    assert len(curves[0]) == CONFIG.num_steps == 20
    assert np.allclose(curves[0], curves[1], rtol=1e-5)
    assert np.allclose(curves[0], curves[2], rtol=1e-5)


def test_one_step_is_plain_sgd_on_the_mean_loss() -> None:
    config = dataclasses.replace(CONFIG, optimizer="sgd", momentum=0.0, lr=0.1, micro_batch=4)
    state, objective = make(config)
    by_hand = Objective()
    next(iter(train(state, objective, config)))
    loss = by_hand.module(by_hand.batch(np.arange(12), 0)).total / 12
    loss.backward()
    for p, q in zip(by_hand.model.parameters(), objective.model.parameters()):
        assert p.grad is not None
        assert torch.allclose(p - 0.1 * p.grad, q, atol=1e-6)


def test_ranks_together_see_the_batch_once_and_make_its_gradient() -> None:
    """Two ranks one after the other in this process: what DDP would average is the gradient of one rank alone."""
    alone, whole = Objective(), make()[1]
    alone.module(alone.batch(np.arange(12), 0)).total.div(12).backward()
    gradients = []
    for rank in (0, 1):
        state, objective = make()
        parallel = Parallel(rank, 2, all_reduce=lambda v: v)
        steps = train(state, objective, dataclasses.replace(CONFIG, grad_clip=1e9), parallel)
        next(steps)
        gradients.append([p.grad.clone() for p in objective.model.parameters() if p.grad is not None])
        whole.asked += objective.asked[:6]
        steps.close()
    for p, a, b in zip(alone.model.parameters(), *gradients):
        assert p.grad is not None
        assert torch.allclose(p.grad, (a + b) / 2, atol=1e-6)
    assert whole.asked == list(range(12))


def test_reports_say_what_happened() -> None:
    state, objective = make()
    reports: list[StepReport] = list(train(state, objective, CONFIG))
    assert [r.step for r in reports] == list(range(1, 21))
    assert reports[-1].images_seen == 240
    assert reports[-1].loss < 0.5 * reports[0].loss
    for r in reports:
        assert r.parts["error"] == pytest.approx(r.loss)
        assert r.grad_norm > 0
        assert len(r.sigma_losses) == 5
    assert objective.asked == list(range(240))


def test_losses_by_noise_level_are_means_of_their_buckets() -> None:
    state, objective = make()
    batch = objective.batch(np.arange(12), 0)
    losses = objective.module(batch)
    assert losses.sigma is not None
    report = next(iter(train(state, objective, CONFIG)))
    edges = [0, 0.05, 0.2, 0.8, 3.0, math.inf]
    for low, high, mean in zip(edges, edges[1:], report.sigma_losses):
        inside = (losses.sigma > low) & (losses.sigma <= high)
        if inside.any():
            assert mean == pytest.approx(float(losses.loss[inside].mean()), rel=1e-5)
        else:
            assert math.isnan(mean)


def test_learning_rate_warms_up_and_decays() -> None:
    config = FitConfig(num_images=1000, global_batch=10, lr=1.0, warmup_images=100, lr_decay="cosine")
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 40) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.04)))
    assert learning_rate(config, 500) == pytest.approx(0.5)
    assert learning_rate(config, 1000) == pytest.approx(0.0)
    assert learning_rate(FitConfig(lr=0.3), 12345) == 0.3


def test_clipping_bounds_the_step_and_the_report_has_the_norm_before_it() -> None:
    config = dataclasses.replace(CONFIG, optimizer="sgd", momentum=0.0, lr=1.0, grad_clip=1e-3)
    state, objective = make(config)
    before = [p.detach().clone() for p in objective.model.parameters()]
    report = next(iter(train(state, objective, config)))
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(objective.model.parameters(), before)]).norm()
    assert report.grad_norm > 1e-2
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


def test_augmentation_of_nothing_is_known() -> None:
    from raysyn.training_batches import is_identity

    assert is_identity(AugmentConfig(False, 0, 0, 1, 1))
    assert not is_identity(AugmentConfig(True, 0, 0, 1, 1))
