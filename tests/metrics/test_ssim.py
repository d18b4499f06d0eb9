"""MS-SSIM against torchmetrics' own."""

import numpy as np
import pytest
from scipy import ndimage

from raysyn.metrics.ssim import ms_ssim


def test_ms_ssim_is_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    rng = np.random.default_rng(0)
    a = ndimage.gaussian_filter(rng.uniform(0, 255, (3, 192, 192)), (0, 2, 2)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 6, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(v)[:, None].double() / 255 for v in (a, b))
    theirs = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, normalize="relu", reduction="none")
    assert ms_ssim(a, b) == pytest.approx(theirs.numpy(), abs=2e-3)
    assert ms_ssim(a, a) == pytest.approx(np.ones(3))
