import math

import torch
from torch import nn

from raysyn.diffusion.ema import EMA


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
