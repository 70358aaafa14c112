"""Stopping times: chosen and judged by different models, correct where the answer is known."""

import numpy as np
import pytest

from dmmlib.analysis import plots, stopping
from dmmlib.errors import DataError
from dmmlib.metrics import klom


def models(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_a_common_moment_that_suits_all_points_is_found_and_own_moments_gain_nothing():
    away = np.array([6.0, 3.0, 0.0, -3.0])
    margins, oracle = models(0, 4, 60, 30) + away[:, None, None], models(1, 60, 30)
    found, moment = stopping.judge(margins, oracle)
    assert moment == 2
    assert found["common"].value < found["end"].low
    assert found["gain"].low <= 0 < found["gain"].high or abs(found["gain"].value) < 1e-9


def test_points_that_unlearn_at_different_times_gain_from_moments_of_their_own():
    n_points, when = 40, np.arange(40) % 5
    margins = models(2, 5, 60, n_points) + 5.0 * (when - np.arange(5)[:, None])[:, None, :]
    found, _ = stopping.judge(margins, models(3, 60, n_points))
    floor = float(np.percentile(klom(models(4, 30, n_points), models(5, 30, n_points)), 95))
    assert found["gain"].low > 0
    assert found["common"].value > 2 * floor
    assert found["own"].value == pytest.approx(floor, rel=0.5)


def test_choosing_among_noise_does_not_look_better_than_the_floor():
    """Eight moments that are all retraining: the best of them in hindsight would lie below a single one."""
    gains = []
    for seed in range(5):
        margins, oracle = models(100 + seed, 8, 40, 25), models(200 + seed, 40, 25)
        found, _ = stopping.judge(margins, oracle, n_bootstrap=2)
        gains.append(found["end"].value - found["own"].value)
    assert abs(np.mean(gains)) < 0.25
    naive = klom(margins[-1], oracle).mean() - np.min([klom(m, oracle) for m in margins], axis=0).mean()
    assert naive > 0.1, "hindsight flatters: what cross-fitting is for"


def test_gaps_are_positive_where_points_are_under_unlearned():
    oracle = models(6, 50, 3)
    gap = stopping.gaps(np.stack([oracle + 2 * oracle.std(0, ddof=1), oracle - oracle.std(0, ddof=1)]), oracle)
    np.testing.assert_allclose(gap, [[2] * 3, [-1] * 3], atol=1e-9)


def test_too_few_models_are_refused():
    with pytest.raises(DataError, match=r"3 models and 8 oracles.*at least 4"):
        stopping.judge(models(0, 2, 3, 5), models(1, 8, 5))


def test_tables_of_a_study(tiny):
    stops, shares = stopping.table(tiny), stopping.shares(tiny)
    methods, sets = tiny.preset.unlearning.methods, list(tiny.forget_sets())
    assert len(stops) == len(methods) * len(sets) * 4
    assert set(stops["stop"]) == {*stopping.STOPS, "gain"}
    assert (stops["low"] <= stops["value"]).all()
    assert (stops["value"] <= stops["high"]).all()
    still = stops[stops["method"].isin(["do_nothing", "retrain", "dm_direct"])]
    assert still.groupby(["method", "forget_set"])["value"].nunique().max() <= 2, "one moment: no choice, no gain"
    tracks = shares[(shares["method"] == "dmm") & (shares["forget_set"] == sets[0])]
    path, under = tiny.trajectories(), tracks["under"].to_numpy()[1:]
    recorded = path[(path["method"] == "dmm") & (path["forget_set"] == sets[0]) & (path["split"] == "forget")]
    np.testing.assert_allclose(under, recorded["under"])
    assert tracks["moment"].iloc[[0, -1]].tolist() == [0, 1]
    assert stopping.medians(stops).shape[0] == len(methods)
    assert "Gradient baselines** (8 pairs" in stopping.verdict(stops)
    assert len(plots.under_and_over(shares, "t", "c").axes) >= shares["method"].nunique()
    assert plots.stopping_times(stops, "t", "c").axes[0].get_xlabel().startswith("forget KLoM")
