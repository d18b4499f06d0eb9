"""How near two sets of images are: by features of a named extractor, and by grey levels, texture and speckle alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from raysyn.labels import LV_CAVITY, MYOCARDIUM, TISSUE
from raysyn.metrics.extractors import Extractor, open_extractor
from raysyn.metrics.ssim import ms_ssim
from raysyn.types import FrameArrays, UserError

MIN_FRAMES = 8


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """‖μ_a−μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_aΣ_b)^½) of feature sets [n, D] and [m, D], float64.

    tr((Σ_aΣ_b)^½) is the sum of the singular values of A·Bᵀ for centred sets A, B scaled by 1/√(n−1): exact, stable and
    cheap where there are fewer frames than features; where there are more, A and B are replaced by their R factors.
    Raises UserError for fewer than 2 rows in a set.
    """
    _check_rows(2, "a Fréchet distance", a, b)
    centred_a, centred_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    small_a, small_b = _factor(centred_a), _factor(centred_b)
    cross = np.linalg.svd(small_a @ small_b.T, compute_uv=False).sum()
    spread = (centred_a**2).sum() + (centred_b**2).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * cross)


def _check_rows(least: int, what: str, *sets: np.ndarray) -> None:
    for rows in sets:
        if len(rows) < least:
            raise UserError(f"frames: {len(rows)} are too few for {what}, which needs {least}")


def _factor(x: np.ndarray) -> np.ndarray:
    """x, or where it has more rows than columns the R of its QR decomposition: RᵀR = xᵀx."""
    return np.asarray(np.linalg.qr(x, mode="r")) if len(x) > x.shape[1] else x


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, num_subsets: int = 50, subset_size: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x·y/D + 1)³, mean and sd over random subsets (arXiv:1801.01401).

    A subset holds half a small set at most: of the whole set there is but one, and no spread. Raises UserError for fewer
    than 4 rows in a set.
    """
    _check_rows(4, "a kernel distance", a, b)
    size = min(subset_size, len(a) // 2, len(b) // 2)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        x, y = a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]]
        k_xx, k_yy, k_xy = ((u @ v.T / a.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        own = (k_xx.sum() - np.trace(k_xx) + k_yy.sum() - np.trace(k_yy)) / (size * (size - 1))
        values.append(own - 2 * k_xy.mean())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real: np.ndarray, fake: np.ndarray, nearest: int = 5) -> dict[str, float]:
    """Precision, recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) by k-nearest-neighbour balls.

    Raises UserError for fewer than `nearest` + 1 rows in a set.
    """
    for name, rows in (("real", real), ("generated", fake)):
        if len(rows) <= nearest:
            raise UserError(
                f"{name} frames: {len(rows)} are too few for precision and recall, which need {nearest + 1}"
            )
    # Of a frame's distances within its own set the smallest, to itself, is 0: the k-th neighbour is at place k.
    radius_real = np.partition(_squared_distances(real, real), nearest, axis=1)[:, nearest]
    radius_fake = np.partition(_squared_distances(fake, fake), nearest, axis=1)[:, nearest]
    distance = _squared_distances(real, fake)
    within_real = distance < radius_real[:, None]
    return {
        "precision": float(within_real.any(0).mean()),
        "recall": float((distance < radius_fake[None]).any(1).mean()),
        "density": float(within_real.sum(0).mean() / nearest),
        "coverage": float((distance.min(1) < radius_real).mean()),
    }


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances float64 [n, m] by one matrix product; equal rows of one set are at 0."""
    origin = a.mean(0)  # of the shared mean nothing is left to cancel
    x, y = a - origin, b - origin
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * (x @ y.T)
    if a is b:
        np.fill_diagonal(squares, 0)
    return np.maximum(squares, 0)


def histogram_distance(a: FrameArrays, b: FrameArrays) -> float:
    """Wasserstein distance between the grey levels inside the sector, in grey levels (0 to 255).

    Raises UserError where no label map of a set has a sector.
    """
    levels = np.arange(256)
    counts = [np.bincount(f.image_u8[f.label_map != 0], minlength=256) for f in (a, b)]
    for frames, count in zip((a, b), counts):
        if not count.any():
            named = frames.frame_id[0] if len(frames) else "no frame"
            raise UserError(f"label maps: all are 0, outside the sector ({named}, …); realism is measured inside it")
    return float(stats.wasserstein_distance(levels, levels, *counts))


def radial_spectrum(frames: FrameArrays) -> np.ndarray:
    """Log10 of the mean power at each integer spatial frequency 1 … H/2−1 (cycles an image), sector mean taken off."""
    num_parts = -(-len(frames) // 64)  # of thousands of frames at once the float64 images alone would fill memory
    parts = zip(np.array_split(frames.image_u8, num_parts), np.array_split(frames.label_map, num_parts))
    size = frames.image_u8.shape[1]
    power = sum((_power(images, maps != 0) for images, maps in parts), start=np.zeros((size, size))) / len(frames)
    frequency = np.fft.fftfreq(size) * size
    radius = np.hypot(*np.meshgrid(frequency, frequency, indexing="ij")).round().astype(int)
    by_radius = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    return np.log10(by_radius[1 : size // 2] + 1e-12)


def _power(image_u8: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Summed power spectra [H, W] of images [n, H, W], each less its mean `inside` and 0 outside."""
    image = image_u8.astype(np.float64) / 255
    count = inside.sum((1, 2), keepdims=True).clip(1)
    image = (image - (image * inside).sum((1, 2), keepdims=True) / count) * inside
    return np.asarray((np.abs(np.fft.fft2(image)) ** 2).sum(0))


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
    """1 − mean MS-SSIM of random pairs of one view (arXiv:1610.09585): 0 is collapse. NaN without two frames of a view."""
    rng = np.random.default_rng(seed)
    pairs = []
    for view in np.unique(frames.view):
        index = np.flatnonzero(frames.view == view)
        if len(index) > 1:
            pairs += [rng.choice(index, 2, replace=False) for _ in range(num_pairs // 2)]
    if not pairs:
        return float("nan")
    first, second = np.array(pairs).T
    return float(1 - ms_ssim(frames.image_u8[first], frames.image_u8[second]).mean())


@dataclass(frozen=True)
class Measured:
    """Frames with their features float64 [N, D] by one extractor, so that they are computed once."""

    frames: FrameArrays
    features: np.ndarray


def feature_distances(frames: Measured, reference: Measured, name: str) -> dict[str, float]:
    """Fréchet and kernel distance, precision, recall, density, coverage, each with the extractor's `name` in its own."""
    kd, kd_sd = kernel_distance(frames.features, reference.features)
    return {
        f"fd_{name}": frechet_distance(frames.features, reference.features),
        f"kd_{name}": kd,
        f"kd_{name}_sd": kd_sd,
        **{f"{k}_{name}": v for k, v in precision_recall(reference.features, frames.features).items()},
    }


def free_distances(frames: FrameArrays, reference: FrameArrays) -> dict[str, float]:
    """What needs no extractor: grey levels, texture, speckle, diversity."""
    mine, theirs = speckle_snr(frames), speckle_snr(reference)
    return {
        "histogram_wasserstein": histogram_distance(frames, reference),
        "spectrum_distance": spectrum_distance(frames, reference),
        "ssim_diversity": ssim_diversity(frames),
        "ssim_diversity_reference": ssim_diversity(reference),
        **{f"speckle_snr_{k}": v for k, v in mine.items()},
        **{f"speckle_snr_{k}_reference": v for k, v in theirs.items()},
    }


def baseline_distances(frames: Measured, real: Measured, reference: Measured, name: str) -> dict[str, float]:
    """Real against real with the same n: the floor that no generator can be expected to go below.

    `real` (say, training patients) takes the place of `frames` against the same `reference`. Feature distances shrink
    with n, so both are cut (by seed 0) to the smaller n, `baseline_num_frames`; where that cuts `frames`, their own
    distances at that n stand beside as `…_at_baseline`.
    """
    n = min(len(frames.features), len(real.features))
    found = {f"{key}_baseline": value for key, value in _distances(_some(real, n), reference, name).items()}
    if n < len(frames.features):
        own = _distances(_some(frames, n), reference, name)
        found |= {f"{key}_at_baseline": value for key, value in own.items()}
    return {**found, "baseline_num_frames": n}


def _distances(frames: Measured, reference: Measured, name: str) -> dict[str, float]:
    return {
        **feature_distances(frames, reference, name),
        "histogram_wasserstein": histogram_distance(frames.frames, reference.frames),
        "spectrum_distance": spectrum_distance(frames.frames, reference.frames),
    }


def _some(measured: Measured, n: int) -> Measured:
    chosen = np.sort(np.random.default_rng(0).permutation(len(measured.features))[:n])
    return Measured(measured.frames.take(chosen), measured.features[chosen])


def realism(
    frames: FrameArrays,
    reference: FrameArrays,
    extractor: str | Extractor = "lite0",
    *,
    real: FrameArrays | None = None,
) -> dict[str, Any]:
    """All measures of `frames` against `reference`, and of `real` frames of other patients as the `_baseline`.

    Feature distances carry the extractor's name. With fewer frames than features (1280 of lite0) the Fréchet distance is
    biased upwards: compare sets of one n only. Raises UserError for fewer frames than an estimator needs.
    """
    check_enough(frames=frames, reference_frames=reference, **({} if real is None else {"baseline_frames": real}))
    found = extractor if isinstance(extractor, Extractor) else open_extractor(extractor)
    a, b = (Measured(f, found.features(f.image_u8)) for f in (frames, reference))
    scores: dict[str, Any] = {**feature_distances(a, b, found.name), **free_distances(frames, reference)}
    if real is not None:
        scores |= baseline_distances(a, Measured(real, found.features(real.image_u8)), b, found.name)
    return {**scores, **described(found, a, b)}


def check_enough(**sets: FrameArrays) -> None:
    """Raise UserError for a set of fewer frames than the estimators need, or of another image size than the rest."""
    for name, some in sets.items():
        if len(some) < MIN_FRAMES:
            words = name.replace("_", " ")
            raise UserError(f"{words}: {len(some)} are too few for a realism measure, which needs {MIN_FRAMES}")
    sizes = sorted({some.image_u8.shape[1:] for some in sets.values()})
    if len(sizes) > 1:
        raise UserError(f"frame sets of different image sizes cannot be compared: {sizes}; prepare them at one size")


def described(extractor: Extractor, frames: Measured, reference: Measured) -> dict[str, Any]:
    """What the numbers were taken with: extractor, its weights' hash, preprocessing, n of each set."""
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "preprocessing": extractor.preprocessing,
        "num_features": frames.features.shape[1],
        "num_frames": len(frames.features),
        "num_reference_frames": len(reference.features),
    }
