"""Does one measure order the rows as another does? Rank correlations with bootstrap intervals, and Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_ROWS, MIN_ROWS_FOR_INTERVAL = 3, 5
PERFECT = 1 - 1e-9


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ and Kendall's τ_b over `num_rows` rows with 95 % percentile intervals; None where undefined.

    A perfect order has no interval: every resample of it is as perfect, which says nothing of the doubt.
    """

    num_rows: int
    spearman: float | None = None
    spearman_interval: tuple[float, float] | None = None
    kendall: float | None = None
    kendall_interval: tuple[float, float] | None = None

    def text(self) -> str:
        """One line for a figure or a page, with a word of caution where the rows are few."""
        if self.spearman is None or self.kendall is None:
            return f"no rank correlation: {self.num_rows} rows are too few or do not differ"
        rho = _with_interval("Spearman ρ", self.spearman, self.spearman_interval)
        tau = _with_interval("Kendall τ", self.kendall, self.kendall_interval)
        return f"{rho},  {tau}  ({self.num_rows} rows{self._why_no_interval()})"

    def _why_no_interval(self) -> str:
        if self.spearman_interval is not None:
            return ""
        few = self.num_rows < MIN_ROWS_FOR_INTERVAL
        return "; too few rows for an interval" if few else "; resampling gives a perfect order no interval"


def _with_interval(name: str, value: float, interval: tuple[float, float] | None) -> str:
    text = f"{name} = {value:+.2f}".replace("-", "−")
    return text if interval is None else f"{text} [{interval[0]:+.2f}, {interval[1]:+.2f}]".replace("-", "−")


def rank_correlation(
    x: Sequence[float], y: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> RankCorrelation:
    """Rank correlation of x [n] with y [n]; the interval is from a bootstrap over rows, given from five rows on.

    Rows of one model are kin, so the interval is a lower bound on the doubt.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(first)
    found = _correlate(first[None], second[None])[0] if n >= MIN_ROWS else np.array([np.nan, np.nan])
    if not np.isfinite(found).all():
        return RankCorrelation(n)
    intervals: list[tuple[float, float] | None] = [None, None]
    if n >= MIN_ROWS_FOR_INTERVAL:
        index = np.random.default_rng(seed).integers(0, n, (num_resamples, n))
        parts = [_correlate(first[part], second[part]) for part in np.array_split(index, 20)]  # pairs take memory
        low, high = np.nanpercentile(np.concatenate(parts), [2.5, 97.5], axis=0)
        intervals = [(float(low[i]), float(high[i])) if abs(found[i]) < PERFECT else None for i in range(2)]
    return RankCorrelation(n, float(found[0]), intervals[0], float(found[1]), intervals[1])


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

    The correlation is of a distance (lower is more realistic) with Dice: −1 would be perfect agreement. A perfect order of
    five rows is told by chance once in 60. `num_measures`: how many measures of realism are put to the test, each alone.
    """
    rho, interval = correlation.spearman, correlation.spearman_interval
    if rho is not None and abs(rho) >= PERFECT and correlation.num_rows >= MIN_ROWS_FOR_INTERVAL:
        interval = rho, rho
    if rho is None or interval is None:
        return (
            "The paper's claim (realism does not order models as task performance does) cannot be tested "
            f"on {correlation.num_rows} rows."
        )
    if interval[1] < 0:
        verdict = "more realistic sets gave better Dice here, against the paper's claim"
    elif interval[0] > 0:
        verdict = "more realistic sets gave worse Dice here: realism does not order the sets as the task does"
    else:
        verdict = "the interval holds zero: these rows do not show that realism orders the sets as the task does"
    kin = "Rows of one model are kin and a Dice has an interval of its own, so the doubt is larger still."
    more = f" One of {num_measures} measures tested, each alone." if num_measures > 1 else ""
    return f"The paper's claim on {correlation.num_rows} rows: {verdict}. {kin}{more}"


def pareto_front(cost: Sequence[float], score: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats: none is as cheap with a higher score, or as good for less. By cost."""
    order = sorted(range(len(cost)), key=lambda i: (cost[i], -score[i]))
    front: list[int] = []
    for i in order:
        if not front or score[i] > score[front[-1]]:
            front.append(i)
    return front
