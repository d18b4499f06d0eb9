"""Evaluations are counted exactly: with guidance in an interval, two where it applies and one elsewhere."""

import pytest
import torch

from raysyn.config import SOLVERS, SamplerConfig
from raysyn.diffusion.generate import generate, num_network_evals
from raysyn.diffusion.precondition import PRECONDITIONINGS, Denoiser
from raysyn.nets.unet import SemanticUNet

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


def test_guidance_in_a_narrow_interval_costs_less_than_everywhere() -> None:
    precondition = PRECONDITIONINGS["edm"]()
    grid = {"solver": "euler", "num_steps": 10, "sigma_min": 0.002, "sigma_max": 80.0}
    plain, everywhere = (num_network_evals(SamplerConfig(guidance_scale=w, **grid), precondition) for w in (1.0, 3.0))
    narrow = SamplerConfig(guidance_scale=3.0, guidance_sigma_min=0.2, guidance_sigma_max=5.0, **grid)
    assert (plain, everywhere) == (10, 20)
    assert plain < num_network_evals(narrow, precondition) < everywhere
