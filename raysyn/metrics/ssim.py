"""Structural similarity of image pairs over several scales."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of scales 1 to 5, finest first (Wang 2003)
SSIM_WINDOW, SSIM_SD = 11, 1.5


def ms_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity (Wang 2003) of image pairs uint8 [N, H, W] each, float64 [N] in [0, 1].

    Gaussian window of 11 px, no padding, 2x2 means between scales. Up to five scales: as many as leave room for the
    window (3 at 64 px), their weights rescaled to sum to 1. Negative contrast terms count as 0.
    """
    scales = max(1, min(len(SSIM_WEIGHTS), int(np.log2(min(a.shape[1:]) / SSIM_WINDOW)) + 1))
    weights = np.array(SSIM_WEIGHTS[:scales]) / sum(SSIM_WEIGHTS[:scales])
    x, y = a.astype(np.float64) / 255, b.astype(np.float64) / 255
    result = np.ones(len(x))
    for scale, weight in enumerate(weights):
        luminance, contrast = _ssim_terms(x, y)
        term = (luminance * contrast).mean((1, 2)) if scale == scales - 1 else contrast.mean((1, 2))
        result *= term.clip(min=0) ** weight
        x, y = _halved(x), _halved(y)
    return result


def _ssim_terms(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SD**2))
    window /= window.sum()
    half = SSIM_WINDOW // 2

    def mean(z: np.ndarray) -> np.ndarray:
        rows = ndimage.correlate1d(z, window, axis=1)
        return ndimage.correlate1d(rows, window, axis=2)[:, half:-half, half:-half]

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (var_x + var_y + c2)


def _halved(x: np.ndarray) -> np.ndarray:
    n, height, width = x.shape
    return x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2).mean((2, 4))
