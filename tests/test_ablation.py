"""Losses of matching, ablations on the tuning sets, oracle matching with more or fewer oracles."""

import dataclasses

import numpy as np
import pytest
import torch

from dmmlib import metrics, unlearn
from dmmlib.analysis import ablation, plots
from dmmlib.errors import OptionError
from dmmlib.unlearn import matching
from dmmlib.unlearn.base import draw_batches
from dmmlib.unlearn.matching import LOSSES, _retained, dmm


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_zero_on_its_target_and_falls_towards_it(loss):
    torch.manual_seed(0)
    goal, labels = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    assert LOSSES[loss](goal, goal, labels).abs().max() < 1e-6
    start = goal + torch.randn_like(goal)
    for_each = LOSSES[loss](start, goal, labels)
    assert for_each.shape == (3, 5)
    assert (for_each > 0).all()
    assert (LOSSES[loss](goal + (start - goal) / 2, goal, labels) < for_each).all()


def test_losses_are_what_they_say():
    torch.manual_seed(1)
    logits, goal, labels = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randint(4, (2, 3))
    p, q = goal.softmax(2), logits.softmax(2)
    torch.testing.assert_close(LOSSES["kl"](logits, goal, labels), (p * (p / q).log()).sum(2))
    margins = [
        np.stack([metrics.margins(z[i : i + 1].numpy(), labels[i].numpy())[0] for i in range(2)])
        for z in (logits, goal)
    ]
    expected = (margins[0] - margins[1]) ** 2
    np.testing.assert_allclose(LOSSES["margin"](logits, goal, labels).numpy(), expected, rtol=1e-5)


def test_matching_lowers_the_loss_that_it_was_given(tiny):
    problem = tiny.problem(next(iter(tiny.tuning_sets().values())), "dmm", tuning=True)
    targets = matching.predicted_oracle(problem)[:, : problem.n_train]
    goal = metrics.margins(targets, problem.labels[: problem.n_train])[:, problem.forget]
    start = metrics.margins(problem.original_logits, problem.labels)[:, problem.forget]
    found = {
        loss: matching.match(problem, targets, loss=loss, cost=0.5, lr=1e-2).margins[:, problem.forget]
        for loss in LOSSES
    }
    error = {loss: ((m - goal) ** 2).mean() for loss, m in found.items()}
    assert max(error.values()) < ((start - goal) ** 2).mean()
    assert not np.allclose(found["mse"], found["kl"])
    with pytest.raises(OptionError, match=r"loss='l1' was given; use one of 'mse', 'kl', 'margin'"):
        matching.match(problem, targets, loss="l1")


def test_whitened_a_step_for_forgotten_points_leaves_the_others_more_alone(tiny):
    """The same targets at the same cost, at rates that bring forgotten points equally near to theirs."""
    problem = tiny.problem(next(iter(tiny.tuning_sets().values())), "dmm", tuning=True)
    targets = matching.predicted_oracle(problem)[:, : problem.n_train]
    goal = metrics.margins(targets, problem.labels[: problem.n_train])
    error = {}
    for optimizer, lr in (("whitened", 3e-3), ("adam", 1e-2), ("sgd", 1e-2)):
        result = matching.match(problem, targets, optimizer=optimizer, lr=lr, cost=0.5)
        assert result.cost == pytest.approx(0.5, rel=0.05), "the pass over points that whitens is counted"
        squared = (result.margins[:, : problem.n_train] - goal) ** 2
        error[optimizer] = {"forget": squared[:, problem.forget].mean(), "retain": squared[:, problem.retain].mean()}
    assert error["whitened"]["forget"] < 1.1 * error["adam"]["forget"] < error["sgd"]["forget"]
    assert error["whitened"]["retain"] < 0.8 * error["adam"]["retain"]
    with pytest.raises(OptionError, match=r"optimizer='lbfgs' was given; use one of 'whitened', 'adam', 'sgd'"):
        matching.match(problem, targets, optimizer="lbfgs")


def test_retained_points_are_drawn_by_how_far_their_targets_lie(tiny):
    problem = tiny.problem(next(iter(tiny.tuning_sets().values())), "dmm", tuning=True)
    targets = problem.original_logits[:, : problem.n_train].copy()
    far = problem.retain[:3]
    targets[:, far] += 1.0
    for influence, share in ((0.5, 0.5), (1.0, 1.0)):
        drawn = _retained(problem, targets, 50, 4, influence)
        assert drawn.shape == (50, problem.n_models, 4)
        assert np.isin(drawn, far).mean() == pytest.approx(share, abs=0.05)
        assert np.isin(drawn, problem.retain).all()
    np.testing.assert_array_equal(_retained(problem, targets, 50, 4, 0.0), draw_batches(problem, problem.retain, 50, 4))
    with pytest.raises(OptionError, match=r"influence=1.5 was given; use a share between 0 and 1"):
        matching.match(problem, targets, influence=1.5)


def test_points_whose_change_is_uncertain_count_less(tiny):
    """Against the same matching with the weights written out; and a weight of 0 is not matched at all."""
    problem = tiny.problem(next(iter(tiny.tuning_sets().values())), "dmm", tuning=True)
    n = problem.n_train
    sd = problem.attributor.sd(problem.forget)[:n]
    v = metrics.margins(problem.original_logits, problem.labels)[:, :n].var(0)
    targets = matching.predicted_oracle(problem)[:, :n]
    found = dmm(problem, weighted=True, cost=0.1).margins
    np.testing.assert_allclose(found, matching.match(problem, targets, v / (v + sd**2), cost=0.1).margins, rtol=1e-3)
    assert not np.allclose(found, dmm(problem, cost=0.1).margins)
    untouched = matching.match(problem, targets, np.zeros(n, np.float32), cost=0.1).margins
    np.testing.assert_allclose(untouched, metrics.margins(problem.original_logits, problem.labels), atol=1e-3)
    plain = dataclasses.replace(problem, attributor=tiny.attributor("ridge"))
    with pytest.raises(OptionError, match="weighted=True needs an attributor that has an `sd`"):
        dmm(plain, weighted=True)


def test_ablation_runs_on_tuning_sets_only_and_is_kept(tiny, monkeypatch):
    grid = {"loss": ("mse", "kl"), "cost": (0.05,), "optimizer": ({"optimizer": "adam", "lr": 1e-2},)}
    table = ablation.run(tiny, grid)
    assert set(table["forget_set"]) == set(tiny.tuning_sets())
    assert len(table) == 3 * 6 * len(tiny.tuning_sets())
    assert table[table["option"] == "optimizer"]["setting"].unique().tolist() == ["adam, lr 0.01", "whitened"]
    assert table[table["option"] == "cost"].drop_duplicates("setting")["default"].tolist() == [False, True]
    monkeypatch.setattr(unlearn, "get", lambda name: pytest.fail(f"{name} ran again"))
    assert ablation.run(tiny, grid).equals(table)
    scores = ablation.scores(table)
    mean = table[(table["option"] == "loss") & (table["setting"] == "kl")]["value"].mean()
    assert scores.set_index("setting")["value"]["kl"] == pytest.approx(mean)
    assert ablation.verdict(table).count("\n") == 2
    assert len(plots.ablation(scores, "t", "c").axes) == 3


def test_default_setting_is_that_of_dmm_and_unknown_options_are_refused(tiny):
    assert set(ablation.GRID) == set(ablation.default_setting())
    with pytest.raises(OptionError, match="'optimiser' was asked for; DMM has the options cost, lr"):
        ablation.run(tiny, {"optimiser": (1,)})


def test_matching_compares_targets_at_one_setting(tiny):
    table = ablation.matching(tiny)
    assert set(table["n_oracles"]) == {0, 1, 2, 5}, "ten oracles are more than a tiny study has"
    floor = table[table["variant"] == "retrain"].set_index(["forget_set", "split"])["value"]
    results = tiny.results()
    rows = results[(results["method"] == "retrain") & (results["statistic"] == "klom_p95")]
    expected = rows.set_index(["forget_set", "split"])["value"]
    np.testing.assert_allclose(floor.sort_index(), expected.sort_index(), rtol=1e-6)
    matched = table[table["variant"].str.startswith(("OM", "DMM"))]
    assert matched.groupby("forget_set")["cost"].nunique().max() == 1
    assert "OM, shifted, 5: clearly above on" in ablation.matching_verdict(table)
    assert f"of {len(tiny.forget_sets())} sets" in ablation.reach(table)
    assert plots.matching(table, "t", "c").axes[0].get_title() == "forget"
