"""Losses of matching, ablations on the tuning sets, oracle matching with more or fewer oracles."""

import dataclasses

import numpy as np
import pytest
import torch

from dmmlib import ablation, metrics, plots, unlearn
from dmmlib.errors import OptionError
from dmmlib.unlearn.matching import LOSSES, dmm


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
    problem = tiny.problem(next(iter(tiny.tuning_sets.values())), "dmm", tuning=True)
    targets = unlearn.predicted_oracle(problem)[:, : problem.n_train]
    goal = metrics.margins(targets, problem.labels[: problem.n_train])[:, problem.forget]
    start = metrics.margins(problem.original_logits, problem.labels)[:, problem.forget]
    found = {
        loss: unlearn.match(problem, targets, loss=loss, cost=0.5, lr=1e-2).margins[:, problem.forget]
        for loss in LOSSES
    }
    error = {loss: ((m - goal) ** 2).mean() for loss, m in found.items()}
    assert max(error.values()) < ((start - goal) ** 2).mean()
    assert not np.allclose(found["mse"], found["kl"])
    with pytest.raises(OptionError, match=r"loss='l1' was given; use one of 'mse', 'kl', 'margin'"):
        unlearn.match(problem, targets, loss="l1")


def test_points_whose_change_is_uncertain_count_less(tiny):
    """Against the same matching with the weights written out; and a weight of 0 is not matched at all."""
    problem = tiny.problem(next(iter(tiny.tuning_sets.values())), "dmm", tuning=True)
    n = problem.n_train
    sd = problem.attributor.sd(problem.forget)[:n]
    v = metrics.margins(problem.original_logits, problem.labels)[:, :n].var(0)
    targets = unlearn.predicted_oracle(problem)[:, :n]
    found = dmm(problem, weighted=True, cost=0.1).margins
    np.testing.assert_allclose(found, unlearn.match(problem, targets, v / (v + sd**2), cost=0.1).margins, rtol=1e-3)
    assert not np.allclose(found, dmm(problem, cost=0.1).margins)
    untouched = unlearn.match(problem, targets, np.zeros(n, np.float32), cost=0.1).margins
    np.testing.assert_allclose(untouched, metrics.margins(problem.original_logits, problem.labels), atol=1e-3)
    plain = dataclasses.replace(problem, attributor=tiny.attributor_of("ridge"))
    with pytest.raises(OptionError, match="weighted=True needs an attributor that has an `sd`"):
        dmm(plain, weighted=True)


def test_ablation_runs_on_tuning_sets_only_and_is_kept(tiny, monkeypatch):
    grid = {"loss": ("mse", "kl"), "cost": (0.05,)}
    table = ablation.run(tiny, grid)
    assert set(table["forget_set"]) == set(tiny.tuning_sets)
    assert len(table) == 3 * 4 * len(tiny.tuning_sets)
    assert table[table["option"] == "cost"].drop_duplicates("setting")["default"].tolist() == [False, True]
    monkeypatch.setattr(unlearn, "get", lambda name: pytest.fail(f"{name} ran again"))
    assert ablation.run(tiny, grid).equals(table)
    scores = ablation.scores(table)
    mean = table[(table["option"] == "loss") & (table["setting"] == "kl")]["value"].mean()
    assert scores.set_index("setting")["value"]["kl"] == pytest.approx(mean)
    assert ablation.verdict(table).count("\n") == 1
    assert len(plots.ablation(scores, "t", "c").axes) == 2


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
    assert f"of {len(tiny.forget_sets)} sets" in ablation.reach(table)
    assert plots.matching(table, "t", "c").axes[0].get_title() == "forget"
