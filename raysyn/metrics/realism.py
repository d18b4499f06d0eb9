"""How near two sets of images are: by features of a named extractor, and by grey levels, texture and speckle alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats
from scipy.spatial.distance import cdist

from raysyn.labels import LV_CAVITY, MYOCARDIUM, TISSUE
from raysyn.metrics.extractors import Extractor, open_extractor
from raysyn.types import FrameArrays, UserError

MIN_FRAMES = 8


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """‖μ_a−μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_aΣ_b)^½) of feature sets [n, D] and [m, D], float64.

    tr((Σ_aΣ_b)^½) is the sum of the singular values of A·Bᵀ for centred sets A, B scaled by 1/√(n−1): exact, stable and
    cheap where there are fewer frames than features.
    """
    centred_a = (a - a.mean(0)) / np.sqrt(len(a) - 1)
    centred_b = (b - b.mean(0)) / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()
    spread = (centred_a**2).sum() + (centred_b**2).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * cross)


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, num_subsets: int = 50, subset_size: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x·y/D + 1)³, mean and sd over random subsets (arXiv:1801.01401)."""
    size = min(subset_size, len(a), len(b))
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        x, y = a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]]
        k_xx, k_yy, k_xy = ((u @ v.T / a.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        own = (k_xx.sum() - np.trace(k_xx) + k_yy.sum() - np.trace(k_yy)) / (size * (size - 1))
        values.append(own - 2 * k_xy.mean())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real: np.ndarray, fake: np.ndarray, nearest: int = 5) -> dict[str, float]:
    """Precision, recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) by k-nearest-neighbour balls."""
    radius_real = np.sort(cdist(real, real), axis=1)[:, nearest]
    radius_fake = np.sort(cdist(fake, fake), axis=1)[:, nearest]
    distance = cdist(real, fake)
    within_real = distance < radius_real[:, None]
    return {
        "precision": float(within_real.any(0).mean()),
        "recall": float((distance < radius_fake[None]).any(1).mean()),
        "density": float(within_real.sum(0).mean() / nearest),
        "coverage": float((distance.min(1) < radius_real).mean()),
    }


def histogram_distance(a: FrameArrays, b: FrameArrays) -> float:
    """Wasserstein distance between the grey levels inside the sector, in grey levels (0 to 255)."""
    levels = np.arange(256)
    counts = [np.bincount(f.image_u8[f.label_map != 0], minlength=256) for f in (a, b)]
    return float(stats.wasserstein_distance(levels, levels, *counts))


def radial_spectrum(frames: FrameArrays) -> np.ndarray:
    """Log10 of the mean power at each integer spatial frequency 1 … H/2−1 (cycles an image), sector mean taken off."""
    inside = frames.label_map != 0
    image = frames.image_u8.astype(np.float64) / 255
    count = inside.sum((1, 2), keepdims=True).clip(1)
    image = (image - (image * inside).sum((1, 2), keepdims=True) / count) * inside
    power = (np.abs(np.fft.fft2(image)) ** 2).mean(0)
    size = image.shape[1]
    frequency = np.fft.fftfreq(size) * size
    radius = np.hypot(*np.meshgrid(frequency, frequency, indexing="ij")).round().astype(int)
    by_radius = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    return np.log10(by_radius[1 : size // 2] + 1e-12)


def spectrum_distance(a: FrameArrays, b: FrameArrays) -> float:
    """Root mean square difference of the log10 radial power spectra, in decades."""
    return float(np.sqrt(((radial_spectrum(a) - radial_spectrum(b)) ** 2).mean()))


def speckle_snr(frames: FrameArrays) -> dict[str, float]:
    """Mean over sd of the grey levels in each tissue, averaged over frames."""
    found = {}
    for name, label in (("blood", LV_CAVITY), ("myocardium", MYOCARDIUM), ("tissue", TISSUE)):
        ratios = []
        for image, label_map in zip(frames.image_u8, frames.label_map):
            values = image[label_map == label].astype(np.float64)
            if len(values) > 16 and values.std() > 0:
                ratios.append(values.mean() / values.std())
        found[name] = float(np.mean(ratios)) if ratios else float("nan")
    return found


def ssim_diversity(frames: FrameArrays, *, num_pairs: int = 200, seed: int = 0) -> float:
    """1 − mean structural similarity of random pairs of one view (arXiv:1610.09585 with SSIM at two scales): 0 is collapse."""
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    rng = np.random.default_rng(seed)
    pairs = []
    for view in np.unique(frames.view):
        index = np.flatnonzero(frames.view == view)
        if len(index) > 1:
            pairs += [rng.choice(index, 2, replace=False) for _ in range(num_pairs // 2)]
    if not pairs:
        return float("nan")
    a, b = (torch.from_numpy(frames.image_u8[np.array([p[i] for p in pairs])])[:, None].float() / 255 for i in (0, 1))
    similar = ms_ssim(a, b, data_range=1.0, kernel_size=5, betas=(0.5, 0.5), normalize="relu")
    return 1 - float(similar)


def realism(frames: FrameArrays, reference: FrameArrays, extractor: str | Extractor = "lite0") -> dict[str, Any]:
    """All measures of `frames` against `reference`; the feature distances carry the extractor's name.

    Raises UserError for fewer frames than an estimator needs.
    """
    for name, some in (("frames", frames), ("reference frames", reference)):
        if len(some) < MIN_FRAMES:
            raise UserError(f"{name}: {len(some)} are too few for a realism measure, which needs {MIN_FRAMES}")
    found = extractor if isinstance(extractor, Extractor) else open_extractor(extractor)
    a, b = found.features(frames.image_u8), found.features(reference.image_u8)
    kd, kd_sd = kernel_distance(a, b)
    mine, theirs = speckle_snr(frames), speckle_snr(reference)
    return {
        f"fd_{found.name}": frechet_distance(a, b),
        f"kd_{found.name}": kd,
        f"kd_{found.name}_sd": kd_sd,
        **{f"{k}_{found.name}": v for k, v in precision_recall(b, a).items()},
        "histogram_wasserstein": histogram_distance(frames, reference),
        "spectrum_distance": spectrum_distance(frames, reference),
        "ssim_diversity": ssim_diversity(frames),
        **{f"speckle_snr_{k}": v for k, v in mine.items()},
        **{f"speckle_snr_{k}_reference": v for k, v in theirs.items()},
        "extractor": found.name,
        "extractor_sha256": found.sha256,
        "preprocessing": found.preprocessing,
        "num_frames": len(frames),
        "num_reference_frames": len(reference),
    }
