"""What DMM could be, ablations on the tuning sets, oracle matching with more or fewer oracles."""

import dataclasses

import numpy as np
import pytest
import torch

from dmmlib import metrics, unlearn
from dmmlib.analysis import ablation, plots
from dmmlib.analysis.ablation import LOSSES, variant
from dmmlib.errors import OptionError
from dmmlib.unlearn.matching import predicted_oracle

PLAIN = {"cost": 0.1, "lr": 3e-3, "batch_size": 20, "forget_share": 0.4}


@pytest.fixture(scope="module")
def problem(tiny):
    return tiny.problem(next(iter(tiny.tuning_sets().values())), "dmm", tuning=True)


@pytest.fixture(scope="module")
def goal(problem):
    """Margins (N, n_train) of the targets."""
    n = problem.n_train
    return metrics.margins(predicted_oracle(problem)[:, :n], problem.labels[:n])


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


def test_every_loss_brings_forgotten_points_nearer_to_their_targets(problem, goal):
    at = problem.forget
    start = metrics.margins(problem.original_logits, problem.labels)[:, at]
    found = {loss: variant(problem, **PLAIN | {"lr": 1e-2, "cost": 0.5}, loss=loss).margins[:, at] for loss in LOSSES}
    error = {loss: ((m - goal[:, at]) ** 2).mean() for loss, m in found.items()}
    assert max(error.values()) < ((start - goal[:, at]) ** 2).mean()
    assert not np.allclose(found["mse"], found["kl"])


def test_whitened_a_step_for_forgotten_points_leaves_the_others_more_alone(problem, goal):
    """The same targets at the same cost, at rates that bring forgotten points equally near to theirs."""
    error = {}
    for optimizer, lr in (("whitened", 3e-3), ("adam", 1e-2), ("sgd", 1e-2)):
        result = variant(problem, **PLAIN | {"lr": lr, "cost": 0.5}, optimizer=optimizer)
        assert result.cost == pytest.approx(0.5, rel=0.05), "the pass over points that whitens is counted"
        squared = (result.margins[:, : problem.n_train] - goal) ** 2
        error[optimizer] = {"forget": squared[:, problem.forget].mean(), "retain": squared[:, problem.retain].mean()}
    assert error["whitened"]["forget"] < 1.1 * error["adam"]["forget"] < error["sgd"]["forget"]
    assert error["whitened"]["retain"] < 0.8 * error["adam"]["retain"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"loss": "l1"}, r"loss='l1'.*'margin'"),
        ({"optimizer": "lbfgs"}, r"optimizer='lbfgs'.*'sgd'"),
        ({"influence": 1.5}, r"influence=1.5.*between 0 and 1"),
    ],
)
def test_options_that_make_no_sense(problem, option, message):
    with pytest.raises(OptionError, match=message):
        variant(problem, **PLAIN, **option)


def test_retained_points_are_drawn_by_how_far_their_targets_lie(problem, monkeypatch):
    """Targets of three points lie far away; the batches that are fine-tuned on say how often each is drawn."""
    targets, far = problem.original_logits.copy(), problem.retain[:3]
    targets[:, far] += 1.0
    monkeypatch.setattr(ablation, "predicted_oracle", lambda _: targets)
    monkeypatch.setattr(ablation, "finetune", lambda _, phases, *args, **options: np.stack(phases[0].batches))
    for influence, share in ((0.5, 0.5), (1.0, 1.0)):
        batches = variant(problem, **PLAIN | {"cost": 5.0, "forget_share": 0.2}, influence=influence)
        drawn = batches[:, :, 4:]  # the first fifth of a batch comes from F
        assert np.isin(drawn, problem.retain).all()
        assert np.isin(drawn, far).mean() == pytest.approx(share, abs=0.05)


def test_points_whose_change_is_uncertain_count_less(problem, monkeypatch):
    """The weights are v / (v + sd^2), read from a loss of 1 at every point; without an sd there are none."""
    monkeypatch.setitem(LOSSES, "mse", lambda logits, goal, labels: torch.ones(labels.shape))
    monkeypatch.setattr(ablation, "finetune", lambda _, phases, *args, **options: phases[0].loss)
    loss = variant(problem, **PLAIN, weighted=True)
    points, models = torch.arange(problem.n_train)[:, None], torch.zeros(problem.n_train, dtype=torch.long)
    logits = torch.zeros(problem.n_train, 1, 10)
    found = loss(logits, points, models).numpy()
    sd = problem.attributor.sd(problem.forget)[: problem.n_train]
    v = metrics.margins(problem.original_logits, problem.labels)[:, : problem.n_train].var(0)
    np.testing.assert_allclose(found, v / (v + sd**2), rtol=1e-4)


def test_weights_need_an_attributor_that_knows_how_uncertain_it_is(tiny, problem):
    plain = dataclasses.replace(problem, attributor=tiny.attributor("ridge"))
    with pytest.raises(OptionError, match=r"weighted=True.*`sd`"):
        variant(plain, **PLAIN, weighted=True)


def test_ablation_runs_on_tuning_sets_only_and_is_kept(tiny, monkeypatch):
    grid = {"loss": ("mse", "kl"), "cost": (0.05,), "optimizer": ({"optimizer": "adam", "lr": 1e-2},)}
    table = ablation.run(tiny, grid)
    assert set(table["forget_set"]) == set(tiny.tuning_sets())
    assert len(table) == 3 * 6 * len(tiny.tuning_sets())
    assert table[table["option"] == "optimizer"]["setting"].unique().tolist() == ["adam, lr 0.01", "whitened"]
    assert table[table["option"] == "cost"].drop_duplicates("setting")["default"].tolist() == [False, True]
    monkeypatch.setattr(tiny, "problem", lambda *_, **options: pytest.fail("ran again"))
    assert ablation.run(tiny, grid).equals(table)
    scores = ablation.scores(table)
    mean = table[(table["option"] == "loss") & (table["setting"] == "kl")]["value"].mean()
    assert scores.set_index("setting")["value"]["kl"] == pytest.approx(mean)
    assert ablation.verdict(table).count("\n") == 2
    assert len(plots.ablation(scores, "t", "c").axes) == 3


def test_the_default_is_dmm_itself_and_unknown_options_are_refused(tiny, problem):
    default = ablation.DEFAULTS
    assert set(ablation.GRID) == set(default)
    np.testing.assert_array_equal(variant(problem, **default).margins, unlearn.get("dmm")(problem).margins)
    with pytest.raises(OptionError, match=r"'optimiser' was asked for.*options cost, lr"):
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
    assert "OM, shifted, 5: clearly above on" in ablation.matching_verdict(table)
    assert f"of {len(tiny.forget_sets())} sets" in ablation.reach(table)
    assert plots.matching(table, "t", "c").axes[0].get_title() == "forget"
