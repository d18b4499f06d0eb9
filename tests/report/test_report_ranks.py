"""Rank correlations against closed forms, and the Pareto front against its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysyn.report.ranks import claim_text, pareto_front, rank_correlation


def test_perfect_order_and_its_reverse() -> None:
    x = [1.0, 2.0, 5.0, 9.0, 30.0]
    same, opposite = rank_correlation(x, np.exp(x)), rank_correlation(x, [-v for v in x])
    assert (same.spearman, same.kendall) == (pytest.approx(1), pytest.approx(1))
    assert (opposite.spearman, opposite.kendall) == (pytest.approx(-1), pytest.approx(-1))
    assert (opposite.spearman_interval, opposite.kendall_interval) == (None, None)
    assert "a perfect order no interval" in opposite.text()
    assert "[" not in opposite.text()


def test_spearman_by_its_formula_without_ties() -> None:
    # ρ = 1 − 6 Σd² / (n (n² − 1)); d = (0, 1, −1, 2, −2), Σd² = 10, n = 5 → 0.5; 7 of 10 pairs agree → τ = 0.4
    found = rank_correlation([1, 2, 3, 4, 5], [1, 3, 2, 6, 2.5])
    ranks = np.argsort(np.argsort([1, 3, 2, 6, 2.5])) + 1
    distance = float(np.sum((np.arange(1, 6) - ranks) ** 2))
    assert found.spearman == pytest.approx(1 - 6 * distance / (5 * 24))
    agree = sum((j - i) * (ranks[j] - ranks[i]) > 0 for i in range(5) for j in range(i + 1, 5))
    assert found.kendall == pytest.approx((2 * agree - 10) / 10)


def test_agrees_with_scipy_ties_included() -> None:
    from scipy.stats import kendalltau, spearmanr

    rng = np.random.default_rng(1)
    for _ in range(20):
        x, y = rng.integers(0, 6, 15).astype(float), rng.integers(0, 4, 15).astype(float)
        found = rank_correlation(x, y, num_resamples=10)
        assert found.spearman == pytest.approx(spearmanr(x, y).statistic)
        assert found.kendall == pytest.approx(kendalltau(x, y).statistic)


def test_intervals_hold_zero_for_noise_and_not_for_a_strong_order() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=40)
    noise, strong = rank_correlation(x, rng.normal(size=40)), rank_correlation(x, x + 0.3 * rng.normal(size=40))
    assert noise.spearman_interval is not None
    assert noise.spearman_interval[0] < 0 < noise.spearman_interval[1]
    assert strong.spearman_interval is not None
    assert 0.6 < strong.spearman_interval[0] < strong.spearman < strong.spearman_interval[1] <= 1


def test_rows_of_one_model_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    models, sure = [name for name in "abcdef" for _ in range(6)], 0
    for trial in range(20):  # a model's rows are alike, and the models in no order
        x, y = (np.repeat(rng.normal(size=6), 6) + 0.2 * rng.normal(size=36) for _ in range(2))
        low, high = rank_correlation(x, y, models, num_resamples=200, seed=trial).spearman_interval or (0, 0)
        sure += low > 0 or high < 0
    assert sure <= 4  # row by row it is 7 of 20
    uneven = rank_correlation(x, y, [*models[:-1], "e"], num_resamples=200)
    assert uneven.spearman_interval is not None
    assert "(36 rows of 6 models)" in uneven.text()
    few = rank_correlation(x, y, [name for name in "abcd" for _ in range(9)])
    assert "36 rows of 4 models; too few for an interval" in few.text()
    assert "cannot be tested on 36 rows of 4 models" in claim_text(few)


def test_few_or_equal_rows_are_said_to_be_so() -> None:
    two, four, flat = (
        rank_correlation([1, 2], [1, 2]),
        rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]),
        rank_correlation([1, 1, 1], [1, 2, 3]),
    )
    assert "2 rows are too few" in two.text()
    assert four.spearman_interval is None
    assert "4 rows; too few for an interval" in four.text()
    assert flat.spearman is None
    assert "cannot be tested on 4 rows" in claim_text(four)


def test_the_claim_is_worded_by_the_interval() -> None:
    x = list(range(12))
    assert "against the paper's claim" in claim_text(rank_correlation(x, [-v for v in x]))
    assert "gave worse Dice" in claim_text(rank_correlation(x, x))
    noise = np.random.default_rng(0).permutation(12)
    assert "holds zero" in claim_text(rank_correlation(x, noise))
    assert "cannot be tested on 4 rows" in claim_text(rank_correlation(x[:4], x[:4]))
    assert "One of 3 measures tested" in claim_text(rank_correlation(x, noise), 3)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=25))
def test_no_point_beats_one_on_the_front_and_every_other_is_beaten(points: list[tuple[int, int]]) -> None:
    cost, score = [float(c) for c, _ in points], [float(s) for _, s in points]
    front = pareto_front(cost, score)

    def beaten(i: int) -> bool:
        return any(
            cost[j] <= cost[i] and score[j] >= score[i] and (cost[j], score[j]) != (cost[i], score[i])
            for j in range(len(points))
        )

    assert {points[i] for i in front} == {points[i] for i in range(len(points)) if not beaten(i)}
    assert [cost[i] for i in front] == sorted(cost[i] for i in front)
