"""Noise belongs to its seed; ranges and grids of noise levels."""

import pytest
import torch

from raysyn.config import SamplerConfig
from raysyn.diffusion.noise import noise_stream, seeded_noise, sigma_grid, sigma_range
from raysyn.diffusion.precondition import (
    EDM,
    IDDPM,
    VE,
    vp_sigma,
)
from raysyn.types import UserError


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
