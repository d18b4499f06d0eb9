"""Training sets of a task: synthetic frames, real ones, both together, or one after the other."""

from __future__ import annotations

import numpy as np

from raysyn.config import TaskConfig
from raysyn.types import FrameArrays, UserError


def mix_frames(synthetic: FrameArrays, real: FrameArrays | None, task: TaskConfig) -> list[tuple[FrameArrays, float]]:
    """Phases of training, (frames, share of the steps), for `real_fraction` r of real frames.

    `together`: one set in which a share r is real, as large as both allow: one keeps all its frames, the other is cut to fit.
    `synthetic_then_real`: the first 1−r of the steps on synthetic frames, the rest on real ones.
    """
    r = task.real_fraction
    if r == 0:
        return [(synthetic, 1.0)]
    if real is None or len(real) == 0:
        raise UserError(f"task.real_fraction: {r} needs real training frames, and there are none")
    if r == 1:
        return [(real, 1.0)]
    if task.mixing == "synthetic_then_real":
        return [(synthetic, 1 - r), (real, r)]
    total = min(len(synthetic) / (1 - r), len(real) / r)
    rng = np.random.default_rng(task.seed)
    some_synthetic = rng.permutation(len(synthetic))[: max(1, round(total * (1 - r)))]
    some_real = rng.permutation(len(real))[: max(1, round(total * r))]
    return [(FrameArrays.concatenate([synthetic.take(some_synthetic), real.take(some_real)]), 1.0)]
