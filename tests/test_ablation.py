"""What DMM could be, ablations on the tuning sets, oracle matching with more or fewer oracles."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from dmmlib import metrics, unlearn
from dmmlib.analysis import ablation, plots
from dmmlib.analysis.ablation import variant
from dmmlib.errors import OptionError
from dmmlib.matching.match import predicted_oracle
from dmmlib.registry import VERSIONS


@pytest.fixture(scope="module")
def problem(tiny):
    return tiny.problem(next(iter(tiny.tuning_sets().values())), "dmm", tuning=True)


@pytest.fixture(scope="module")
def goal(problem):
    """Margins (N, n_train) of the targets."""
    n = problem.n_train
    return metrics.margins(predicted_oracle(problem)[:, :n], problem.labels[:n])


def test_gauss_newton_comes_nearer_to_its_targets_than_adam_does(problem, goal):
    """The same targets at the same cost."""
    error = {}
    for optimizer in ablation.OPTIMIZERS:
        result = variant(problem, cost=0.1, steps=4, farthest=4.0, optimizer=optimizer)
        assert result.cost == pytest.approx(0.1, rel=0.25), "the pass over points that whitens is counted"
        squared = (result.margins[:, : problem.n_train] - goal) ** 2
        error[optimizer] = {"forget": squared[:, problem.forget].mean(), "retain": squared[:, problem.retain].mean()}
    assert error["gauss-newton"]["forget"] < 0.2 * min(error["whitened adam"]["forget"], error["adam"]["forget"])


def test_options_that_make_no_sense(problem):
    with pytest.raises(OptionError, match=r"optimizer='lbfgs'.*'adam'"):
        variant(problem, cost=0.1, steps=4, farthest=4.0, optimizer="lbfgs")


def test_ablation_runs_on_tuning_sets_only_and_is_kept(tiny, monkeypatch):
    grid = {"steps": (4, 2), "cost": (0.05,), "optimizer": ({"optimizer": "adam", "cost": 0.1},)}
    table = ablation.run(tiny, grid)
    assert set(table["forget_set"]) == set(tiny.tuning_sets())
    assert len(table) == 3 * 6 * len(tiny.tuning_sets())
    assert table[table["option"] == "optimizer"]["setting"].unique().tolist() == ["adam, cost 0.1", "gauss-newton"]
    assert table[table["option"] == "cost"].drop_duplicates("setting")["default"].tolist() == [False, True]
    monkeypatch.setattr(tiny, "problem", lambda *_, **options: pytest.fail("ran again"))
    assert ablation.run(tiny, grid).equals(table)
    scores = ablation.scores(table)
    mean = table[(table["option"] == "steps") & (table["setting"] == "2")]["value"].mean()
    assert scores.set_index(["option", "setting"])["value"]["steps", "2"] == pytest.approx(mean)
    assert len(plots.ablation(scores, "t", "c").axes) == 3


def test_what_one_function_measured_is_not_anothers(tiny):
    (forget_set,) = tiny.tuning_sets().values()
    ways = unlearn.get("do_nothing").run, unlearn.get("retrain").run, lambda problem: unlearn.get("gd")(problem)
    found = [ablation.measure(tiny, "dmm", {}, forget_set, run)["value"].tolist() for run in (*ways, None)]
    assert len({tuple(values) for values in found}) == 4


def test_what_is_kept_follows_the_metric_and_the_points_that_count(tiny, monkeypatch):
    (forget_set,) = tiny.tuning_sets().values()

    def kept():
        ablation.measure(tiny, "do_nothing", {}, forget_set)
        return len(list((tiny.runs / "store").glob("measured-do_nothing-*")))

    before = kept()
    monkeypatch.setattr(tiny, "data", dataclasses.replace(tiny.data, probes={"asked": np.arange(3)}))
    assert kept() == before + 1
    monkeypatch.setattr(tiny, "data", dataclasses.replace(tiny.data, probes={"asked": np.arange(5)}))
    assert kept() == before + 2
    monkeypatch.setitem(VERSIONS, "metric klom", 9)
    assert kept() == before + 3


def test_a_search_follows_the_points_that_count(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr("dmmlib.tuning.search", lambda *given: asked.append(given) or pd.DataFrame({"setting": [0]}))
    for probes in ({"a": np.arange(3)}, {"a": np.arange(5)}, {"a": np.arange(5)}):
        monkeypatch.setattr(tiny, "data", dataclasses.replace(tiny.data, probes=probes))
        tiny.search("gd")
    assert [len(trials[0].splits["validation"]) for _, _, _, trials, *_ in asked] == [37, 35]


def test_the_default_is_dmm_itself_and_unknown_options_are_refused(tiny, problem):
    default = ablation.DEFAULTS
    assert set(ablation.GRID) == set(default)
    np.testing.assert_array_equal(variant(problem, **default).margins, unlearn.get("dmm")(problem).margins)
    with pytest.raises(OptionError, match=r"'optimiser' was asked for.*options cost, steps"):
        ablation.run(tiny, {"optimiser": (1,)})


def test_matching_compares_targets_at_one_setting(tiny, monkeypatch):
    monkeypatch.setattr(ablation, "N_ORACLES", (1, 5, 10))
    table = ablation.matching(tiny, tiny.forget_sets().values())
    assert set(table["n_oracles"]) == {0, 1, 5}, "ten oracles are more than a tiny study has"
    floor = table[table["variant"] == "retrain"].set_index(["forget_set", "split"])["value"]
    results = tiny.results()
    rows = results[(results["method"] == "retrain") & (results["statistic"] == "klom_p95")]
    expected = rows.set_index(["forget_set", "split"])["value"]
    np.testing.assert_allclose(floor.sort_index(), expected.sort_index(), rtol=1e-6)
    matched = table[table["variant"].str.startswith(("OM", "DMM"))]
    assert matched.groupby("forget_set")["cost"].nunique().max() == 1
    assert f"of {len(tiny.forget_sets())} sets" in ablation.reach(table)
    assert plots.matching(table, "t", "c").axes[0].get_title() == "forget"
