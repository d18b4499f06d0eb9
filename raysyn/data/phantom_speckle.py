"""How the phantom's tissue becomes an ultrasound picture: scatterers, point spread, compression, scan conversion.

All in polar space: rows are depth samples from the transducer down, columns are beams from left to right.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter1d, map_coordinates

AXIAL_SIGMA = 1.6  # samples
LATERAL_SIGMA = (1.5, 3.6)  # beams, in the focus and far from it
SIDE_LOBE_SIGMA = 9.0  # beams
SIDE_LOBE_LEVEL = 0.025
MARGIN = 8  # samples
FOCUS = 0.42  # of the depth
DISPLAY_GAMMA = 1.4


def spread(scatterers: np.ndarray) -> np.ndarray:
    """Image a complex scatterer field [samples, beams] through the point spread function; unit power stays unit power.

    Gaussian in depth and across beams; across beams it is narrowest in the focus and widens to both sides of it, so in
    millimetres it grows with depth; a weak wide pedestal stands for the side lobes.
    """
    narrow, wide = LATERAL_SIGMA
    axial = gaussian_filter1d(scatterers, AXIAL_SIGMA, axis=0, mode="wrap", truncate=3.0)
    sharp = gaussian_filter1d(axial, narrow, axis=1, mode="wrap", truncate=3.0) * _unit(narrow)
    blurred = gaussian_filter1d(axial, wide, axis=1, mode="wrap", truncate=3.0) * _unit(wide)
    depth = np.linspace(0, 1, len(scatterers))[:, None]
    weight = np.where(depth < FOCUS, 1 - depth / FOCUS, 0.7 * (depth - FOCUS) / (1 - FOCUS)) ** 1.5
    overlap = np.sqrt(2 * narrow * wide / (narrow**2 + wide**2))  # correlation of the two, both of unit power
    power = (1 - weight) ** 2 + weight**2 + 2 * weight * (1 - weight) * overlap
    image = ((1 - weight) * sharp + weight * blurred) / np.sqrt(power)
    image *= _unit(AXIAL_SIGMA)
    coarse = gaussian_filter1d(axial[:, ::3], SIDE_LOBE_SIGMA / 3, axis=1, mode="wrap", truncate=2.5)
    lobes = np.repeat(coarse, 3, axis=1)[:, : scatterers.shape[1]]
    return image + SIDE_LOBE_LEVEL * _unit(AXIAL_SIGMA) * _unit(SIDE_LOBE_SIGMA) * lobes


def _unit(sigma: float) -> float:
    """Gain that keeps the power of white noise through a Gaussian filter of `sigma`: (2σ√π)^½."""
    return float(np.sqrt(2 * sigma * np.sqrt(np.pi)))


def complex_noise(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Circular complex Gaussian noise of unit power, complex64: so many scatterers in a cell that speckle is full."""
    parts = rng.standard_normal((*shape, 2), dtype=np.float32)
    return (parts * np.float32(np.sqrt(0.5))).view(np.complex64)[..., 0]


def speckle(rng: np.random.Generator, strength: np.ndarray) -> np.ndarray:
    """Complex echo [samples, beams] of scatterers of amplitude `strength`: its envelope is Rayleigh where that is even.

    The filters wrap around; a margin in depth keeps the transducer's clutter out of the far end.
    """
    padded = np.pad(strength, ((0, MARGIN), (0, 0)), mode="edge")
    return spread(complex_noise(rng, padded.shape) * padded)[: len(strength)]


def amplitude(level_db: np.ndarray) -> np.ndarray:
    """10^(dB/20) as float32."""
    return np.exp(np.float32(np.log(10) / 20) * level_db.astype(np.float32))


def compress(envelope: np.ndarray, gain_db: np.ndarray, grey_at_0db: float, range_db: float) -> np.ndarray:
    """Envelope with its gain to grey in [0, 1]: logarithm, then a display curve that darkens the dark.

    Black to white are `range_db` apart, and an envelope of 1 lies at `grey_at_0db` before the curve.
    """
    level = 20 * np.log10(envelope + 1e-5) + gain_db
    return np.clip(grey_at_0db + level / range_db, 0, 1) ** DISPLAY_GAMMA


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], modes: tuple[int, int]) -> np.ndarray:
    """A smooth random field of about unit variance: low cosine modes, `modes` of them in depth and across beams."""
    weights = rng.standard_normal(modes)
    weights[0, 0] = 0.0
    down, across = (
        np.cos(np.pi * np.outer(np.linspace(0, 1, n), np.arange(m))) * np.where(np.arange(m) > 0, np.sqrt(2), 1)
        for n, m in zip(shape, modes)
    )
    return (down @ weights @ across.T / np.sqrt(modes[0] * modes[1])).astype(np.float32)


def scan_convert(polar: np.ndarray, sample: np.ndarray, beam: np.ndarray) -> np.ndarray:
    """Polar picture [samples, beams] at fractional positions `sample`, `beam` [H, W], linearly; edges are continued."""
    return map_coordinates(polar, np.stack([sample, beam]), order=1, mode="nearest", prefilter=False)
