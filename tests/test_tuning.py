"""A search tries whole grids on few models, stops every method alike, and says where a grid was too narrow."""

import dataclasses

import numpy as np
import pytest

from dmmlib import tuning, unlearn
from dmmlib.analysis import tables
from dmmlib.errors import OptionError
from dmmlib.unlearn import Registered, Unlearned

N, POINTS = 24, 12
SPLITS = {"forget": np.arange(4), "retain": np.arange(4, 12)}


@pytest.fixture
def trial(tiny):
    problem = tiny.problem(tiny.tuning_sets()["tune"], "gd", tuning=True)
    oracles = np.random.default_rng(0).normal(size=(N, POINTS)).astype(np.float32)
    return tuning.Trial("tune", problem, oracles, SPLITS)


def runs(shifts, cost=0.1):
    """A method that moves oracle-like margins by some sd, less and less on the way to a third of its way, then more."""
    calls = []

    def method(problem, *, i):
        calls.append((i, problem.n_models))
        noise = np.random.default_rng(1).normal(size=(N, POINTS))[: problem.n_models]
        way = [noise + shifts[i] + abs(at - 2) for at in range(1, problem.checkpoints + 1)]
        costs = cost * np.arange(1, 1 + len(way)) / len(way)
        return Unlearned(way[-1], way[-1] > 0, cost, costs, np.stack(way))

    return method, calls


def test_few_models_choose_what_all_are_tried_on(trial):
    trial = dataclasses.replace(trial, problem=tuning.few(trial.problem, 8))
    method, calls = runs(np.r_[np.linspace(6, 2, 16), 0.0, np.linspace(2, 6, 15)])
    table = tuning.search("some", method, [{"i": i} for i in range(32)], [trial])
    assert [n for _, n in calls] == [4] * 32 + [8] * 4
    best = table.iloc[0]
    assert (best["setting"], best["stop"], best["n_models"]) == (16, 0.5, 8)
    assert best["cost"] == pytest.approx(0.05)
    spent = table.drop_duplicates(["setting", "forget_set"])["spent"].sum()
    assert spent == pytest.approx(0.1 * sum(n for _, n in calls))


def test_rungs_grow_as_settings_get_fewer():
    assert tuning.rungs(50, 64) == [(4, 64), (50, 8)]
    assert tuning.rungs(50, 3) == [(4, 3), (50, 2)]
    assert tuning.rungs(50, 2) == [(50, 2)], "there is nothing to halve"
    assert tuning.rungs(4, 5) == [(4, 5)], "as few models as that try all"


def test_a_stopped_run_is_where_the_whole_run_was(trial):
    whole = tuning.few(trial.problem, 3)
    for name, options in (("gd", {"epochs": 5.0}), ("scrub", {"epochs": 5}), ("oracle_matching", {"cost": 2.0})):
        run = unlearn.get(name)
        result = run(whole, **options)
        at = len(result.trajectory) // 2
        stopped = run(dataclasses.replace(whole, stop=at / len(result.trajectory), checkpoints=2), **options)
        np.testing.assert_allclose(stopped.margins, result.trajectory[at - 1], atol=1e-5, err_msg=name)
        assert stopped.cost == stopped.costs[-1] == pytest.approx(result.costs[at - 1])
    with pytest.raises(OptionError, match="stop=0"):
        dataclasses.replace(whole, stop=0)


def test_chosen_stops_are_what_is_unlearned_with(tiny, monkeypatch):
    table = tiny.search("gd")
    assert tiny.tuned("gd").get("stop", 1.0) == table["stop"].iloc[0]
    monkeypatch.setattr(type(tiny), "tuned", lambda self, method: {"epochs": 5.0, "lr": 0.01, "stop": 0.25})
    forget_set = tiny.forget_sets()["random_6"]
    assert tiny.unlearned("gd", forget_set).cost == pytest.approx(0.25, abs=0.1)


def test_a_table_says_what_was_found_and_what_it_took(tiny):
    table = tables.searches(tiny, ["do_nothing", "gd", "dmm"]).set_index("method")
    assert list(table.index) == ["GD on R"], "the others have nothing to search"
    row, best = table.loc["GD on R"], tiny.search("gd").iloc[0]
    assert row["score"] == best["mean_score"] <= row["median score of those tried"]
    assert f"lr = {best['lr']:g}" in row["chosen"]
    whole = 4 / tiny.training.epochs  # epochs
    assert row["retrainings"] == pytest.approx(whole * sum(n * k for n, k in tuning.rungs(8, 2)), rel=0.2)


def test_an_end_of_a_grid_is_an_edge_unless_nothing_lies_beyond():
    space = {"lr": [0.1, 0.2, 0.3], "share": [0.5, 1.0], "epochs": [5], "kind": ["a", "b"], "whitened": [False, True]}
    method = Registered("shares", lambda problem: None, space, limits={"share": [1.0]})
    inside = {"lr": 0.2, "share": 1.0, "epochs": 5, "kind": "a", "whitened": False}
    assert tuning.edges(method, inside) == []
    assert tuning.edges(method, inside | {"lr": 0.3}) == ["lr"]
    assert tuning.edges(method, inside | {"lr": 0.1, "share": 0.5}) == ["lr", "share"]
