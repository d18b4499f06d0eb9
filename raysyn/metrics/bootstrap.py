"""Uncertainty: intervals from a bootstrap over patients (frames of one patient are not independent)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def patient_interval(
    values: np.ndarray, patients: Sequence[str], *, num_draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [N] (NaN left out) when patients are drawn with replacement.

    NaN where fewer than two patients have a value: of one nobody can tell how patients differ.
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    finite = np.isfinite(values)
    sums = np.bincount(owner[finite], weights=values[finite], minlength=len(names))
    counts = np.bincount(owner[finite], minlength=len(names))
    if (counts > 0).sum() < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(names), (num_draws, len(names)))
    total = counts[draws].sum(1)
    means = sums[draws].sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def patient_interval_of(
    statistic: Callable[[np.ndarray], float],
    patients: Sequence[str],
    *,
    num_draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Like `patient_interval` for any `statistic(frame numbers int64 [M])`; draws where it is NaN are left out.

    NaN for fewer than two patients.
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    frames_of = [np.flatnonzero(owner == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_draws):
        drawn = rng.integers(0, len(names), len(names))
        values.append(statistic(np.concatenate([frames_of[i] for i in drawn])))
    finite = [v for v in values if np.isfinite(v)]
    if not finite:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def lowest_share(num_patients: int, level: float = 0.95) -> float:
    """Lower end of the exact interval (Clopper-Pearson) for a share of patients that all of `num_patients` are in.

    Resampling what does not vary would give an interval of no width.
    """
    return float(((1 - level) / 2) ** (1 / num_patients))


def subset_protocol(
    values: np.ndarray, *, num_draws: int = 1000, share: float = 0.8, seed: int = 0
) -> tuple[float, float]:
    """The published protocol: mean and sd of the mean over random subsets of 80 % of the test set, without replacement.

    NaN values are left out beforehand; with none left both are NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    size = max(1, round(share * len(values)))
    means = [rng.permutation(values)[:size].mean() for _ in range(num_draws)]
    return float(np.mean(means)), float(np.std(means))


def subset_protocol_of(
    statistic: Callable[[np.ndarray], float], count: int, *, num_draws: int = 1000, share: float = 0.8, seed: int = 0
) -> tuple[float, float]:
    """Like `subset_protocol` for any `statistic(item numbers int64 [M])` of `count` items; NaN draws are left out."""
    rng = np.random.default_rng(seed)
    size = max(1, round(share * count))
    drawn = [statistic(rng.permutation(count)[:size]) for _ in range(num_draws)]
    finite = [value for value in drawn if np.isfinite(value)]
    return (float(np.mean(finite)), float(np.std(finite))) if finite else (float("nan"), float("nan"))


def with_spread(
    name: str, statistic: Callable[[np.ndarray], float], patients: Sequence[str], seed: int = 0
) -> dict[str, float]:
    """`name` of all items, its 95 % interval over patients (`_low`, `_high`), the published protocol's
    `_protocol_mean` and `_protocol_sd`; `statistic(item numbers int64 [M])`, an item a frame or what `patients` lists."""
    low, high = patient_interval_of(statistic, patients, seed=seed)
    mean, sd = subset_protocol_of(statistic, len(patients), seed=seed)
    return {
        name: statistic(np.arange(len(patients))),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_protocol_mean": mean,
        f"{name}_protocol_sd": sd,
    }
