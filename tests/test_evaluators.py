"""Evaluators: correct where the answer is known; the power of KLoM is 5 % where there is nothing to find."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmmlib import metrics
from dmmlib.analysis import evaluators, plots
from dmmlib.errors import DataError


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_membership_auc_is_the_share_of_pairs_in_order(members, others):
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    found = evaluators.membership_auc(np.array([members], float), np.array([others], float))
    np.testing.assert_allclose(found, [np.mean(pairs)])
    swapped = evaluators.membership_auc(np.array([others], float), np.array([members], float))
    np.testing.assert_allclose(found + swapped, 1)


def test_membership_auc_refuses_other_models():
    with pytest.raises(DataError, match=r"\(2, 3\) and \(4, 3\).*same models"):
        evaluators.membership_auc(np.zeros((2, 3)), np.zeros((4, 3)))


def answers(seed, shift):
    margins = np.concatenate([normal(seed, 40, 30) + shift, normal(seed + 50, 40, 60)], axis=1)
    return margins, margins > 0


def measured(shift, seed=0):
    """Of 30 training points, all of them forgotten, and 60 validation points."""
    return evaluators.distances(answers(seed, shift), answers(seed + 1, 0.0), np.arange(30), 30)


def test_every_evaluator_grows_with_the_distance_and_its_interval_holds_it():
    none, some, far = measured(0.0), measured(1.0), measured(3.0)
    assert set(none) == {*evaluators.EVALUATORS, "auc"}
    for name in evaluators.EVALUATORS:
        assert none[name].value < some[name].value < far[name].value, name
        assert some[name].low <= some[name].value <= some[name].high
        assert none[name].high < far[name].low, name
    assert none["u_lira"].value < 0.6
    assert none["membership"].value < 0.05


def test_halves_stay_apart_when_models_are_resampled(monkeypatch):
    """Every margin is its model's number, so that a resample shows from which half each of its models comes."""
    seen = []
    monkeypatch.setattr(metrics, "u_lira", lambda u, o: seen.append(u[:, 0].astype(int)) or np.full(2, 0.5))
    numbers = np.tile(np.arange(11.0)[:, None], 3)
    evaluators.distances((numbers, numbers > 0), (numbers, numbers > 0), np.arange(2), 2, n_bootstrap=3)
    for drawn in seen:
        assert (drawn % 2 == np.arange(11) % 2).all()
    assert min(len(set(drawn)) for drawn in seen) < 11


def test_tables_of_a_study(tiny):
    table = evaluators.table(tiny)
    methods, sets = tiny.preset.unlearning.methods, list(tiny.forget_sets())
    assert len(table) == len(sets) * (1 + len(methods) * (len(evaluators.EVALUATORS) + 1))
    results = tiny.results()
    same = results[(results["statistic"] == "klom_p95") & (results["split"] == "forget")]
    here = table[table["evaluator"] == "klom_p95"]
    np.testing.assert_allclose(here["value"], same["value"], rtol=1e-6)
    ranks = evaluators.agreement(table, n_bootstrap=50)
    assert set(ranks["n_pairs"]) == {len(methods) * len(sets)}
    assert ((ranks["low"] <= ranks["high"]) | ranks["low"].isna()).all()
    told = evaluators.told_apart(table)
    assert len(told) == len(sets) * (len(methods) - 1)
    assert len(plots.evaluators(table, evaluators.EVALUATORS, "t", "c").axes) == 5
    one = table[table["method"] == "dmm"]
    with pytest.raises(DataError, match=r"1 method.*at least two"):
        evaluators.agreement(one)


def invented(rows):
    made = [["f", m, y, v, v - 0.1, v + 0.1, 8] for m, values in rows.items() for y, v in values.items()]
    return pd.DataFrame(made, columns=evaluators.COLUMNS)


def test_only_pairs_that_both_evaluators_separate_disagree():
    others = dict.fromkeys(evaluators.EVALUATORS, 0.5)
    table = invented(
        {
            "ga": others | {"klom_p95": 1, "ks": 3},
            "gd": others | {"klom_p95": 2, "ks": 2},
            "dmm": others | {"klom_p95": 1.05, "ks": 1},
            "retrain": others | {"klom_p95": 0.5, "ks": 0.5},
        }
    )
    found = evaluators.disagreements(table)
    assert found[["nearer_by_klom", "nearer_by_other"]].to_numpy().tolist() == [["ga", "gd"]]
    assert found["klom"].tolist() == ["1.00 / 2.00"]
    assert evaluators.named(found).to_numpy().tolist() == [["f", "KS", "GA on F", "GD on R"]]
    told = evaluators.told_apart(table).set_index("method")
    assert told["klom_p95"].all()
    assert not told["accuracy_gap"].any()


def test_agreement_is_one_where_ranks_are_the_same():
    same = {f"m{i}": {y: float(i) for y in evaluators.EVALUATORS} for i in range(6)}
    ranks = evaluators.agreement(invented(same), n_bootstrap=30)
    np.testing.assert_allclose(ranks[["value", "low", "high"]], 1)


@pytest.mark.parametrize("convention", ["closed", "easydub"])
def test_power_is_the_level_where_there_is_nothing_to_find(convention):
    """Over ten data sets: of the floor against itself, and of a method that is retraining."""
    shares = []
    for seed in range(10):
        powers = evaluators.power(
            {"same": normal(seed, 80, 10)}, normal(seed + 100, 160, 10), [10], convention=convention, seed=seed
        )
        shares.append(powers.set_index("method")["power"])
    floor, same = np.mean([s["retrain"] for s in shares]), np.mean([s["same"] for s in shares])
    assert 0.01 < floor < 0.1
    assert 0.01 < same < 0.12


def test_power_grows_with_models_and_with_the_distance():
    retrained, slight, far = normal(0, 100, 15), normal(1, 50, 15) + 1.5, normal(2, 50, 15) + 9
    powers = evaluators.power({"slight": slight, "far": far}, retrained, [5, 50], n_draws=60)
    share = powers.set_index(["method", "n_models"])["power"]
    assert share["far", 5] == share["far", 50] == 1
    assert share["slight", 5] < 0.6 < share["slight", 50]
    floor = powers[powers["method"] == "retrain"].set_index("n_models")["median"]
    assert floor[50] < floor[5]
    assert evaluators.enough(powers)["far"] == 5
    assert evaluators.enough(powers)["slight"] == 50
    assert len(plots.power(powers, "t", "c", ["far"]).axes) == 2


def test_more_bins_raise_the_floor():
    floors = [
        evaluators.power({}, normal(0, 60, 10), [20], n_bins=b, n_draws=20)["median"].iloc[0] for b in (5, 20, 80)
    ]
    assert floors == sorted(floors)
    with pytest.raises(DataError, match=r"n_bins=1; use 2 to"):
        metrics.klom(normal(0, 5, 2), normal(1, 5, 2), n_bins=1)


def test_power_refuses_sizes_that_the_models_do_not_allow():
    with pytest.raises(DataError, match=r"N = 10, 50.*2 to 20"):
        evaluators.power({"a": normal(0, 20, 3)}, normal(1, 60, 3), [10, 50])
