"""Does one measure order the rows as another does? Rank correlations with bootstrap intervals, and Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_ROWS, MIN_FOR_INTERVAL = 3, 5
PERFECT = 1 - 1e-9


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ and Kendall's τ_b over `num_rows` rows with 95 % percentile intervals; None where undefined.

    `num_models` are those that the rows belong to, 0 where each stands for itself. A perfect order has no interval: every
    resample of it is as perfect, which says nothing of the doubt.
    """

    num_rows: int
    num_models: int = 0
    spearman: float | None = None
    spearman_interval: tuple[float, float] | None = None
    kendall: float | None = None
    kendall_interval: tuple[float, float] | None = None

    @property
    def enough(self) -> bool:
        """Whether what is resampled, models or else rows, is enough for an interval."""
        return (self.num_models or self.num_rows) >= MIN_FOR_INTERVAL

    @property
    def rows(self) -> str:
        """How many in words."""
        return f"{self.num_rows} rows" + (f" of {self.num_models} models" if self.num_models else "")

    def text(self) -> str:
        """One line for a figure or a page, with a word of caution where the rows are few."""
        if self.spearman is None or self.kendall is None:
            return f"no rank correlation: {self.num_rows} rows are too few or do not differ"
        rho = _with_interval("Spearman ρ", self.spearman, self.spearman_interval)
        tau = _with_interval("Kendall τ", self.kendall, self.kendall_interval)
        return f"{rho},  {tau}  ({self.rows}{self._why_no_interval()})"

    def _why_no_interval(self) -> str:
        if self.spearman_interval is not None:
            return ""
        return "; resampling gives a perfect order no interval" if self.enough else "; too few for an interval"


def _with_interval(name: str, value: float, interval: tuple[float, float] | None) -> str:
    text = f"{name} = {value:+.2f}".replace("-", "−")
    return text if interval is None else f"{text} [{interval[0]:+.2f}, {interval[1]:+.2f}]".replace("-", "−")


def rank_correlation(
    x: Sequence[float], y: Sequence[float], models: Sequence[str] = (), *, num_resamples: int = 2000, seed: int = 0
) -> RankCorrelation:
    """Rank correlation of x [n] with y [n], its interval from a bootstrap over `models` [n], given from five on.

    Rows of one model are kin: resampled one by one, 36 rows of six models hold an order to be sure that is not there in up
    to two cases of five; models with all their rows in one of ten at most. Without `models` rows are resampled.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(first)
    found = _correlate(first[None], second[None])[0] if n >= MIN_ROWS else np.array([np.nan, np.nan])
    plain = RankCorrelation(n, len(set(models)))
    if not np.isfinite(found).all():
        return plain
    intervals: list[tuple[float, float] | None] = [None, None]
    if plain.enough:
        drawn = _resampled(first, second, list(models) or list(range(n)), num_resamples, seed)
        low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
        intervals = [(float(low[i]), float(high[i])) if abs(found[i]) < PERFECT else None for i in range(2)]
    return RankCorrelation(n, plain.num_models, float(found[0]), intervals[0], float(found[1]), intervals[1])


def _resampled(x: np.ndarray, y: np.ndarray, groups: Sequence[Any], count: int, seed: int) -> np.ndarray:
    """Both correlations [count, 2] of draws of whole groups of the rows of x, y [n]."""
    names = list(dict.fromkeys(groups))
    members = [np.array([i for i, group in enumerate(groups) if group == name]) for name in names]
    draws = np.random.default_rng(seed).integers(0, len(names), (count, len(names)))
    rows = [np.concatenate([members[i] for i in draw]) for draw in draws]
    parts = []
    for length in {len(r) for r in rows}:
        index = np.stack([r for r in rows if len(r) == length])
        parts += [
            _correlate(x[part], y[part]) for part in np.array_split(index, 1 + len(index) // 100)
        ]  # pairs take memory
    return np.concatenate(parts)


def _correlate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ and Kendall's τ_b of each row: x, y [R, n] → [R, 2]; NaN where one of the two does not vary.

    ρ is Pearson's correlation of average ranks; τ_b that of the signs of all pairs' differences (Kendall 1945).
    """
    from scipy.stats import rankdata

    ranks = [rankdata(v, axis=1) for v in (x, y)]
    rho = _cosine(*(r - r.mean(axis=1, keepdims=True) for r in ranks))
    one, other = np.triu_indices(x.shape[1], k=1)
    tau = _cosine(*(np.sign(r[:, one] - r[:, other]) for r in ranks))
    return np.stack([rho, tau], axis=1)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def claim_text(correlation: RankCorrelation, num_measures: int = 1) -> str:
    """What the rows say about the paper's claim that realism does not order training sets as task performance does.

    The correlation is of a distance (lower is more realistic) with Dice: −1 would be perfect agreement. Chance puts five
    in a perfect order once in 60 times. `num_measures`: how many measures of realism are put to the test, each alone.
    """
    rho, interval = correlation.spearman, correlation.spearman_interval
    if rho is not None and abs(rho) >= PERFECT and correlation.enough:
        interval = rho, rho
    if rho is None or interval is None:
        return (
            "The paper's claim (realism does not order models as task performance does) cannot be tested "
            f"on {correlation.rows}."
        )
    if interval[1] < 0:
        verdict = "more realistic sets gave better Dice here, against the paper's claim"
    elif interval[0] > 0:
        verdict = "more realistic sets gave worse Dice here: realism does not order the sets as the task does"
    else:
        verdict = "the interval holds zero: these rows do not show that realism orders the sets as the task does"
    doubt = "Each Dice has an interval of its own, so the doubt is larger still."
    more = f" One of {num_measures} measures tested, each alone." if num_measures > 1 else ""
    return f"The paper's claim on {correlation.rows}: {verdict}. {doubt}{more}"


def pareto_front(cost: Sequence[float], score: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats: none is as cheap with a higher score, or as good for less. By cost."""
    order = sorted(range(len(cost)), key=lambda i: (cost[i], -score[i]))
    front: list[int] = []
    for i in order:
        if not front or score[i] > score[front[-1]]:
            front.append(i)
    return front
