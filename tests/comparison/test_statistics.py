"""Statistics of paired differences: error rates over synthetic studies, and agreement with scipy."""

from functools import cache

import numpy as np
import pytest
from scipy import stats

from t2i_lm.comparison.statistics import (
    BOOTSTRAP_MIN,
    PairedStatistics,
    holm,
    paired_statistics,
    pairs_for_difference,
    pairs_for_equivalence,
    power_of_difference,
    power_of_equivalence,
)

pytestmark = pytest.mark.slow

DRAWS = 500
MARGIN = 1.0
# Three standard errors of a share of 5 % over DRAWS.
SLACK = 3 * (0.05 * 0.95 / DRAWS) ** 0.5


@cache
def studies(mean: float, pairs: int, skewed: bool = False) -> list[PairedStatistics]:
    """The statistics of DRAWS synthetic studies with a standard deviation of 1."""
    random = np.random.default_rng([pairs, skewed, round(100 * mean)])
    noise = random.exponential(size=(DRAWS, pairs)) - 1 if skewed else random.normal(size=(DRAWS, pairs))
    return [paired_statistics(mean + row, MARGIN) for row in noise]


@pytest.mark.parametrize("pairs", [3, BOOTSTRAP_MIN, 5, 10])
def test_intervals_cover_the_true_mean(pairs: int) -> None:
    results = studies(0.3, pairs)
    intervals = [one.t_interval for one in results]
    covered = np.mean([interval is not None and interval[0] <= 0.3 <= interval[1] for interval in intervals])
    assert abs(covered - 0.95) < SLACK
    bootstrapped = [one.bootstrap_interval for one in results]
    if pairs < BOOTSTRAP_MIN:
        assert bootstrapped == [None] * DRAWS
    else:
        covered = np.mean([interval is not None and interval[0] <= 0.3 <= interval[1] for interval in bootstrapped])
        assert abs(covered - 0.95) < SLACK


def test_the_bootstrap_covers_the_mean_of_skewed_differences_better_than_the_t_interval() -> None:
    covered = {"t_interval": 0, "bootstrap_interval": 0}
    for one in studies(0.0, 6, skewed=True):
        for kind in covered:
            low, high = getattr(one, kind)
            covered[kind] += low <= 0 <= high
    assert covered["bootstrap_interval"] > covered["t_interval"]
    assert covered["bootstrap_interval"] / DRAWS > 0.95 - 2 * SLACK


def test_the_bootstrap_of_differences_that_tie_covers_or_is_none() -> None:
    """Shares of 64 samples; an interval must not end at the mean for want of resamples that differ."""
    assert paired_statistics([0.0, 0.0, 0.0, 1.0], None).bootstrap_interval is None
    random = np.random.default_rng(0)
    shares = (random.binomial(64, 0.5, (DRAWS, 5)) - random.binomial(64, 0.4, (DRAWS, 5))) / 64
    found = [one.bootstrap_interval for one in (paired_statistics(list(row), None) for row in shares)]
    known = [interval for interval in found if interval is not None]
    assert len(known) > 0.8 * DRAWS
    assert np.mean([low <= 0.1 <= high for low, high in known]) >= 0.95 - SLACK


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_equivalence_is_claimed_at_most_at_its_level_where_there_is_none(pairs: int) -> None:
    claimed = np.mean([(one.p_equivalence or 0) < 0.05 for one in studies(MARGIN, pairs)])
    assert claimed < 0.05 + SLACK


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_a_difference_is_claimed_at_its_level_where_there_is_none(pairs: int) -> None:
    claimed = np.mean([(one.p_difference or 0) < 0.05 for one in studies(0.0, pairs)])
    assert abs(claimed - 0.05) < SLACK


def test_tests_are_those_of_scipy() -> None:
    differences = [0.31, -0.02, 0.4, 0.17, 0.22]
    one = paired_statistics(differences, MARGIN)
    assert one.p_difference == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    upper = stats.ttest_1samp(differences, MARGIN, alternative="less").pvalue
    lower = stats.ttest_1samp(differences, -MARGIN, alternative="greater").pvalue
    assert one.p_equivalence == pytest.approx(max(upper, lower))
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert one.t_interval == pytest.approx((low, high))


@pytest.mark.parametrize("pairs", [3, 8, 20])
def test_power_is_the_share_of_studies_that_find_it(pairs: int) -> None:
    draws = np.random.default_rng(pairs).normal(size=(20_000, pairs))
    means, errors = draws.mean(axis=1), draws.std(axis=1, ddof=1) / pairs**0.5
    shown = np.mean(stats.t.sf((MARGIN - abs(means)) / errors, pairs - 1) < 0.05)
    assert power_of_equivalence(MARGIN, 1.0, pairs, 0.05) == pytest.approx(shown, abs=0.015)
    found = np.mean(2 * stats.t.sf(abs(means + 0.8) / errors, pairs - 1) < 0.05)
    assert power_of_difference(0.8, 1.0, pairs, 0.05) == pytest.approx(found, abs=0.015)


def test_the_pairs_needed_are_the_least_with_the_power() -> None:
    needed = pairs_for_equivalence(0.0173, 0.033)
    assert needed == 33
    assert power_of_equivalence(0.0173, 0.033, 33, 0.05) >= 0.8 > power_of_equivalence(0.0173, 0.033, 32, 0.05)
    found = pairs_for_difference(0.02, 0.033)
    assert found is not None
    assert power_of_difference(0.02, 0.033, found, 0.05) >= 0.8 > power_of_difference(0.02, 0.033, found - 1, 0.05)
    assert pairs_for_difference(1e-6, 0.033) is None


def test_one_pair_and_equal_differences_have_a_mean_and_no_test() -> None:
    for differences in ([0.2], [0.2, 0.2, 0.2]):
        one = paired_statistics(differences, MARGIN)
        assert one.mean == pytest.approx(0.2)
        assert (one.t_interval, one.p_difference, one.p_equivalence) == (None,) * 3


def test_holm_orders_and_never_lowers() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
