"""Intervals: correct where the answer is known, and they hold their estimate."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from dmmlib.analysis import intervals
from dmmlib.errors import DataError


def test_means_have_students_intervals():
    e = intervals.mean_over(np.array([1.0, 2.0, 3.0]))
    assert e.value == 2
    assert e.high - 2 == pytest.approx(t.ppf(0.975, 2) / np.sqrt(3))
    logs = intervals.mean_over(np.array([0.5, 2.0]), log=True)
    assert logs.value == pytest.approx(1)
    assert logs.low * logs.high == pytest.approx(1)
    with pytest.raises(DataError, match=r"1 value.*at least 2"):
        intervals.mean_over(np.array([1.0]))


def test_means_of_groups_have_students_intervals():
    table = pd.DataFrame({"of": ["b", "b", "b", "a"], "score": [1.0, 2.0, 3.0, 4.0]})
    found = intervals.means_over(table, ["of"], "score").set_index("of")
    e = intervals.mean_over(np.array([1.0, 2.0, 3.0]))
    assert found.loc["b"].tolist() == pytest.approx([e.value, e.low, e.high, 3])
    assert list(found.index) == ["b", "a"]
    assert found.loc["a", "value"] == 4
    assert found.loc["a", ["low", "high"]].isna().all()


def test_medians_are_resampled_and_normal_intervals_are_cut_off():
    e = intervals.median_over(np.arange(11.0))
    assert e.low < e.value == 5 < e.high
    assert intervals.median_over([3.0] * 4) == intervals.Estimate(3, 3, 3)
    assert intervals.Estimate.normal(1.0, 1.0, least=0) == intervals.Estimate(1, 0, 2.96)


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_holds_the_share(successes, more):
    n = successes + more
    e = intervals.wilson(successes, n)
    assert 0 <= e.low <= e.value <= e.high <= 1
    assert e.high > 0


def test_wilson_is_its_formula():
    z, n, p = 1.96, 40, 0.3
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    e = intervals.wilson(12, 40)
    assert e.low == pytest.approx((centre - half) / (1 + z**2 / n))
    assert e.high == pytest.approx((centre + half) / (1 + z**2 / n))


@given(st.integers(1, 5), st.integers(1, 4), st.floats(0.01, 100))
def test_copies_of_a_direction_count_once(k, copies, scale):
    directions = np.repeat(np.eye(k, 6), copies, axis=0) * np.linspace(1, scale, k * copies)[:, None]
    assert intervals.effective_number(directions) == pytest.approx(k)


def test_directions_that_are_alike_count_for_less():
    assert intervals.effective_number(np.array([[1.0, 0.0], [1.0, 1.0]])) == pytest.approx(4 / 3)
