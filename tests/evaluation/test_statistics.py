"""Statistics against SciPy."""

import numpy as np
import pytest
from scipy import stats

from omnihuman_jax.evaluation import statistics


def test_pearson_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.standard_normal((2, 21))
        assert statistics.pearson(a, a + b) == pytest.approx(stats.pearsonr(a, a + b).statistic, abs=1e-12)


def test_pearson_of_a_series_that_does_not_vary_is_undefined():
    assert np.isnan(statistics.pearson(np.ones(10), np.arange(10)))
    assert np.isnan(statistics.pearson(np.arange(10), np.full(10, 0.3)))
    with pytest.raises(ValueError, match="same length"):
        statistics.pearson(np.arange(3), np.arange(4))


def test_summary_counts_what_is_left_out_and_bounds_the_mean():
    values = np.random.default_rng(3).normal(0.5, 0.2, 40)
    result = statistics.summarise([*values, float("nan")])
    assert (result["n"], result["left_out"]) == (40, 1)
    assert result["mean"] == pytest.approx(values.mean())
    assert result["std"] == pytest.approx(values.std(ddof=1))
    # The percentile bootstrap of a mean is near the normal interval at this number.
    half = 1.96 * values.std(ddof=1) / np.sqrt(40)
    assert result["low"] == pytest.approx(values.mean() - half, abs=0.02)
    assert result["high"] == pytest.approx(values.mean() + half, abs=0.02)
    assert result["values"][-1] is None


def test_summary_of_too_few_values_has_no_spread():
    assert statistics.summarise([0.3])["mean"] == 0.3
    assert statistics.summarise([0.3])["std"] is None
    assert statistics.summarise([float("nan")])["mean"] is None
