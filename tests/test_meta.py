"""Meta-learning: solvers against scipy and brute force, stability where it is known, bounds, forgetting, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from dmmlib import data, metrics, presets, unlearn
from dmmlib.analysis.intervals import mean_over
from dmmlib.errors import DataError, PresetError
from dmmlib.studies.meta import experiments, forgetting, tasks
from dmmlib.studies.meta.bounds import KINDS, Bounds
from dmmlib.studies.meta.learner import LOGISTIC, PHASE, SQUARED, Learner, Loss
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.tasks import Case

SMALL = MetaSettings(repeats=3, probes=6, queries=16, seeds=8)


def case(loss: Loss = LOGISTIC, m: int = 8, n: int = 8, dim: int = 3, **changes: Any) -> Case:
    return tasks.synthetic(Learner(loss, **changes), m, n, dim, spread=0.5)


def problem(loss: Loss, seed: int = 0, shape: tuple[int, ...] = (3,), n: int = 12, dim: int = 4) -> tuple[Tensor, ...]:
    """Adapted-model problems: w (*shape, dim), x (*shape, n, dim), y (*shape, n)."""
    rng = torch.Generator().manual_seed(seed)
    env = case(loss, dim=dim)
    x, y = env.draw(shape, n, rng)
    return 0.5 * torch.randn(*shape, dim, generator=rng, dtype=torch.float64), x, y


def by_scipy(loss: Loss, lam: float, w: Tensor, x: Tensor, y: Tensor) -> np.ndarray:
    """The prox of one problem by a method that knows nothing of it, from several starts."""

    def objective(u: np.ndarray) -> float:
        at = torch.from_numpy(u)
        return float(loss.at(at, x, y).mean() + lam / 2 * ((at - w) ** 2).sum())

    starts = [w.numpy(), np.zeros(len(w)) + 1e-2, 0.5 * w.numpy()]
    options = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000, "adaptive": True}
    found = [minimize(objective, start, method="Nelder-Mead", options=options) for start in starts]
    return min(found, key=lambda f: f.fun).x


# --- losses and adversaries ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [SQUARED, LOGISTIC, PHASE], ids=lambda loss: loss.name)
def test_gradients_are_those_of_the_values(loss: Loss) -> None:
    u, x, y = problem(loss)
    u.requires_grad_(True)
    (expected,) = torch.autograd.grad(loss.at(u, x, y).mean(-1).sum(), u)
    torch.testing.assert_close(loss.gradient(u.detach(), x, y), expected, rtol=0, atol=1e-12)
    step = 1e-6 * torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
    there, here = (loss.at(v, x, y).mean(-1) for v in ((u + step).detach(), (u - step).detach()))
    torch.testing.assert_close((there - here) / 2e-6, (expected * step).sum(-1) / 1e-6, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", [SQUARED, LOGISTIC, PHASE], ids=lambda loss: loss.name)
def test_constants_hold(loss: Loss) -> None:
    rng = torch.Generator().manual_seed(0)
    _, x, y = problem(loss, shape=(500,))
    u, v = (
        torch.nn.functional.normalize(torch.randn(500, 4, generator=rng, dtype=torch.float64), dim=-1) for _ in "ab"
    )
    change = (loss.at(u, x, y) - loss.at(v, x, y)).abs()
    assert (change <= loss.lipschitz(1.0) * torch.linalg.vector_norm(u - v, dim=-1)[:, None] + 1e-12).all()
    between = loss.at((u + v) / 2, x, y) - (loss.at(u, x, y) + loss.at(v, x, y)) / 2
    assert (between <= -loss.curvature / 8 * ((u - v) ** 2).sum(-1)[:, None] + 1e-12).all(), "weak convexity"
    if loss is PHASE:
        assert (between > 1e-3).any(), "phase retrieval is not convex"


# --- task-level algorithms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "lam", "tolerance"),
    [(SQUARED, 0.3, 1e-5), (LOGISTIC, 0.3, 1e-5), (PHASE, 3.0, 2e-3)],
    ids=["squared", "logistic", "phase"],
)
def test_prox_against_scipy(loss: Loss, lam: float, tolerance: float) -> None:
    w, x, y = problem(loss, dim=3)
    found = Learner(loss, lam=lam).adapt(w, x, y)
    for k in range(len(w)):
        np.testing.assert_allclose(found[k], by_scipy(loss, lam, w[k], x[k], y[k]), atol=tolerance)


@pytest.mark.parametrize("loss", [SQUARED, LOGISTIC], ids=lambda loss: loss.name)
def test_descent_ends_at_the_prox(loss: Loss) -> None:
    w, x, y = problem(loss)
    prox = Learner(loss).adapt(w, x, y)
    gd = Learner(loss, inner="gd", inner_steps=200).adapt(w, x, y)
    torch.testing.assert_close(gd, prox, rtol=0, atol=1e-8)


def test_batched_runs_are_single_runs() -> None:
    env = case(LOGISTIC, dim=3)
    x, y = env.draw((4, 5), 6, torch.Generator().manual_seed(0))
    for at in (Learner(LOGISTIC), Learner(LOGISTIC, inner="gd")):
        many, _ = at.learn(x, y, env.start)
        for k in range(4):
            torch.testing.assert_close(at.learn(x[k], y[k], env.start)[0], many[k], rtol=0, atol=1e-8)


# --- stability where it is known -----------------------------------------------------------------------


def test_mean_estimation_moves_by_what_theory_says() -> None:
    """x = 1, d = 1, squared loss: u = (mean(y) + lam w) / (1 + lam), so all is explicit, at both levels."""
    m, n, lam, gamma, steps = 5, 4, 0.7, 0.3, 6
    rng = torch.Generator().manual_seed(0)
    x = torch.ones(m, n, 1, dtype=torch.float64)
    y = torch.rand(m, n, generator=rng, dtype=torch.float64)
    at = Learner(SQUARED, lam=lam, step=gamma, n_steps=steps)
    start = torch.zeros(1, dtype=torch.float64)
    changed = y.clone()
    changed[2, 1] += 0.5
    moved = float((at.learn(x, changed, start)[0] - at.learn(x, y, start)[0])[0])
    keep = 1 - gamma * lam / (1 + lam)  # w <- keep w + gamma lam / (1 + lam) mean of all y
    assert moved == pytest.approx(0.5 / (m * n) * (1 - keep**steps), abs=1e-12)
    w = torch.full((1,), 0.2, dtype=torch.float64)
    adapted = float((at.adapt(w, x[2], changed[2]) - at.adapt(w, x[2], y[2]))[0])
    assert adapted == pytest.approx(0.5 / (n * (1 + lam)), abs=1e-12)


def test_drawing_every_task_in_turn_is_the_full_step_on_average() -> None:
    env = case(SQUARED, dim=3)
    x, y = env.draw((6,), 5, torch.Generator().manual_seed(0))
    full, _ = Learner(SQUARED, n_steps=8).learn(x, y, env.start)
    some = Learner(SQUARED, n_steps=8, tasks_per_step=2)
    runs, _ = some.learn(x, y, env.start.expand(20_000, -1), torch.Generator().manual_seed(1))
    error = 4 * runs.std(0) / 20_000**0.5
    assert ((runs.mean(0) - full).abs() < error).all(), "every step is affine in w, so the mean is the full run"


def test_shared_draws_leave_only_the_replacement() -> None:
    env = case(LOGISTIC, dim=3)
    x, y = env.draw((1, 6), 5, torch.Generator().manual_seed(0))
    x, y = x.expand(4, -1, -1, -1), y.expand(4, -1, -1)
    at = Learner(LOGISTIC, tasks_per_step=2)
    shared, _ = at.learn(x, y, env.start, torch.Generator().manual_seed(1), shared=True)
    apart, _ = at.learn(x, y, env.start, torch.Generator().manual_seed(1))
    torch.testing.assert_close(shared, shared[:1].expand_as(shared), rtol=0, atol=1e-12)
    assert (apart[0] - apart[1]).abs().max() > 1e-4


def test_masked_tasks_leave_no_trace() -> None:
    env = case(SQUARED, dim=3)
    x, y = env.draw((6,), 5, torch.Generator().manual_seed(0))
    masks = torch.ones(50, 6, dtype=torch.bool)
    masks[:, 2] = False
    at = Learner(SQUARED, tasks_per_step=2)

    def run(labels: Tensor) -> Tensor:
        return at.learn(x, labels, env.start, torch.Generator().manual_seed(3), masks=masks)[0]

    spoilt = y.clone()
    spoilt[2] = -spoilt[2]
    assert (run(spoilt) == run(y)).all()


CASES: list[tuple[Loss, dict[str, Any]]] = [
    (LOGISTIC, {}),
    (LOGISTIC, {"inner": "gd", "inner_steps": 3}),
    (LOGISTIC, {"tasks_per_step": 1}),
    (SQUARED, {"lam": 0.3}),
    (PHASE, {"lam": 4.0, "step": 0.1, "n_steps": 3}),
]


@pytest.mark.parametrize(("loss", "changes"), CASES)
def test_stability_is_below_its_bound(loss: Loss, changes: dict[str, Any]) -> None:
    found = experiments.measure(case(loss, 5, 6, **changes), SMALL, 0)
    assert tuple(found.index) == KINDS
    for kind in KINDS:
        assert 0 < found.loc[kind, "each"].max() <= found.loc[kind, "bound"], kind


def test_bound_is_met_with_equality_where_it_can_be() -> None:
    """The adaptation bound 2 G^2 / (lam n), for gradients as far apart as they can be: a nearly linear loss."""
    lam, n = 100.0, 3
    w, x = torch.zeros(1, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
    same, flipped = torch.ones(n, dtype=torch.float64), torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    at = Learner(LOGISTIC, lam=lam)
    moved = float((at.adapt(w, x, same) - at.adapt(w, x, flipped)).abs())
    half = replace(Bounds.of(case(m=2, n=n, lam=lam), 1.0), lipschitz=0.5)  # the slope at 0
    assert moved == pytest.approx(half.adapted(0.0, replaced=True), rel=0.01)


def test_bounds_have_the_rates_that_they_claim() -> None:
    def at(**changes: Any) -> dict[str, float]:
        return Bounds.of(case(**changes), 1.0).changes()

    base = at()
    assert base["meta"] == pytest.approx(2 * (0.2 * 10 / 8 + 1 / 8)), "2 G^2 (gamma T / m + 1 / (lambda n))"
    assert at(m=16)["task"] == pytest.approx(base["task"] / 2)
    assert at(n=16)["adaptation"] == pytest.approx(base["adaptation"] / 2)
    assert at(n=16)["task"] == pytest.approx(base["task"])
    assert at(lam=0.5)["adaptation"] == pytest.approx(2 * base["adaptation"])
    assert at(n_steps=20, step=0.1)["task"] == pytest.approx(base["task"])
    assert at(inner="gd", inner_steps=1)["adaptation"] == pytest.approx(base["adaptation"] / 2), "kappa = eta lambda"


def test_gap_is_what_replacing_does_on_average() -> None:
    """E[transfer - empirical] = E[loss of z_11 after replacing task 1 in S and z_11 in D_1, minus before]."""
    m, n, repeats = 3, 4, 4000
    few = case(m=m, n=n, lam=0.3)
    env, at = few, few.learner
    direct = experiments.gap(few, MetaSettings(gap_repeats=repeats, gap_tasks=4, queries=8), 0)
    rng = torch.Generator().manual_seed(1)
    x, y = env.draw((repeats, m + 1), n + 1, rng)
    keep_x, keep_y = x[:, :m, :n], y[:, :m, :n]
    other = [m, *range(1, m)]
    here, _ = at.learn(keep_x, keep_y, env.start)
    there, _ = at.learn(x[:, other, :n], y[:, other, :n], env.start)
    before = at.adapt(here, x[:, 0, :n], y[:, 0, :n])
    after = at.adapt(there, x[:, 0, 1:], y[:, 0, 1:])
    point = (x[:, 0, :1], y[:, 0, :1])
    change = (LOGISTIC.at(after, *point) - LOGISTIC.at(before, *point))[:, 0].numpy()
    swapped = mean_over(change)
    assert 0 < direct["low"] < direct["high"] < direct["bound"]
    assert abs(direct["gap"] - swapped.value) < (direct["high"] - direct["low"]) + (swapped.high - swapped.low)


def test_slope_of_a_power_law() -> None:
    x = np.array([2.0, 4.0, 8.0, 32.0])
    rows = 3 * x**-0.7 * np.exp(0.01 * np.random.default_rng(0).standard_normal((6, 4)))
    fitted = experiments.slope(x, rows)
    assert abs(fitted.value + 0.7) < 0.01
    assert 0 < fitted.high - fitted.low < 0.05


# --- forgetting ----------------------------------------------------------------------------------------

FEW = MetaSettings(
    repeats=2, probes=2, queries=8, side=3, shots=4, n_models=40, forget_steps=30, n_subsets=200, n_forget=2,
    forget_lam=3.0, forget_lams=(0.03, 3.0),
)  # fmt: skip


def but(settings: MetaSettings, **changes: Any) -> MetaSettings:
    """The settings with some changed, validated."""
    return MetaSettings(**settings.model_dump() | changes)


@pytest.fixture(scope="module")
def images() -> data.Dataset:
    return data.load("fashion-mnist", n_train=400, n_val=20)


@pytest.fixture(scope="module")
def at(images: data.Dataset) -> forgetting.Setting:
    return forgetting.setting(images, FEW, 3.0)


def test_tasks_share_no_image(images: data.Dataset) -> None:
    x, y = tasks.disjoint_tasks(images, 5, 4, torch.Generator().manual_seed(0))
    assert x.shape[:2] == (24, 8)
    assert len(torch.unique(x.flatten(0, 1), dim=0)) == 24 * 8
    assert (y.sum(1) == 0).all()


def test_points_are_adapted_models(images: data.Dataset) -> None:
    at = forgetting.setting(images, FEW, 0.5)
    w = at.train(torch.ones(3, FEW.tasks, dtype=torch.bool), 0)
    task = 4
    u = at.learner.adapt(w, at.support_x[task], at.support_y[task])
    scores = u @ at.x[task].T
    here = at.splits(task)["forget"]
    logits = at.logits(w)[:, here]
    np.testing.assert_allclose(logits[..., 1] - logits[..., 0], scores, atol=1e-5)
    np.testing.assert_allclose(at.margins(w)[:, here], scores * at.y[task], atol=1e-5)
    own = at.points(3, torch.Generator().manual_seed(0))
    assert own.shape == (3, at.y.numel(), w.shape[1] + 1)
    assert (own[0] != own[1]).any()
    apart = at.margins(w, torch.Generator().manual_seed(0))
    assert (apart != at.margins(w)).any(), "own support sets give own answers"


def test_matching_forgets_a_task(images: data.Dataset) -> None:
    rows = forgetting.compare(images, FEW)
    assert set(rows["forget_set"]) == {"task 0", "task 1"}
    p95 = rows.query("statistic == 'klom_mean' and split == 'forget' and forget_set == 'task 0'").set_index("method")
    assert set(p95.index) == set(forgetting.METHODS)
    assert (p95["low"] <= p95["value"]).all()
    assert p95.loc["dm_direct", "value"] < p95.loc["do_nothing", "value"]
    assert p95.loc["oracle_matching", "value"] < p95.loc["do_nothing", "value"]
    assert p95.loc["dmm", "cost"] == pytest.approx(FEW.cost, rel=0.2)


def test_models_without_a_task(at: forgetting.Setting) -> None:
    keep = at.without(0)
    assert keep.shape == (FEW.n_models, FEW.tasks)
    assert not keep[:, 0].any()
    assert keep[:, 1:].all()
    originals = at.originals()
    moved = at.train(keep, 2, start=originals, learner=replace(at.learner, n_steps=3))
    assert (moved != originals).all()
    assert (at.oracles(0) != at.oracles(0, floor=True)).all(), "the floor is of other models"


def test_attribution_to_tasks_predicts_retraining(at: forgetting.Setting) -> None:
    here = at.splits(0)["forget"]
    predicted = metrics.right_logits(forgetting.attribute(at).effect(here), at.labels)
    keep = at.without(0)[:1].expand(400, -1)
    true = at.margins(at.train(keep, 3)).mean(0) - at.margins(at.train(torch.ones_like(keep), 4)).mean(0)
    sign = 2 * at.labels - 1
    assert np.corrcoef((sign * predicted)[here], (sign * true)[here])[0, 1] > 0.7


def test_tables_of_the_notebook(images: data.Dataset) -> None:
    tiny = but(
        FEW, ms=(3, 6), ns=(3, 6), lams=(0.5, 1.0), gammas=(0.1, 0.2), ts=(2, 4), etas=(0.1, 0.3), ks=(1, 2),
        weak_lams=(3.0, 6.0), m=3, n=4, gap_repeats=5, gap_tasks=3, n_models=10, n_forget=2,
    )  # fmt: skip
    found = experiments.sweeps(images, tiny)
    assert (found["measured"] <= found["bound"]).all()
    fitted = experiments.slopes(found)
    assert set(fitted["replaced"]) <= set(KINDS)
    assert (experiments.gaps(images, tiny, found)["bound"] > 0).all()
    held = experiments.assumptions(images, tiny)
    assert (held["Lipschitz: largest gradient / G"] <= 1).all()
    assert (held["convex: lowest curvature"] >= held["assumed"] - 1e-9).all()
    against = experiments.forgetting_against_stability(images, tiny)
    assert isinstance(against, pd.DataFrame)
    assert (against["adaptation"].diff().dropna() < 0).all(), "regularisation stabilises adaptation"


def test_registered_methods_are_used_as_they_stand() -> None:
    assert {m for m in forgetting.METHODS if m != "gd"} <= set(unlearn.names())


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": 0.0}, r"lambda \+ mu = 0"),
        ({"step": 1.5}, r"Meta-level .* 1.5 > 1"),
        ({"inner": "gd", "inner_step": 0.9}, r"Task-level .* <= 0.8"),
    ],
)
def test_bad_learners(changes: dict[str, Any], message: str) -> None:
    def drawn(*_: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("data were drawn before the check")

    with pytest.raises(PresetError, match=message) as caught:
        experiments.measure(replace(case(**changes), draw=drawn), SMALL, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": 0.0}, "lam"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"spread": -1.0}, "spread"),
        ({"weak_lams": [1.0, 4.0]}, "weak_lams"),
        ({"ms": [4]}, "ms"),
        ({"ms": [1, 8]}, "ms"),
        ({"n": 1}, "meta.n"),
        ({"repeats": 1}, "repeats"),
        ({"shots": 5}, "shots"),
        ({"n_forget": 18}, "n_forget.* retain"),
        ({"tasks_per_step": 19}, "tasks_per_step=19 .* 18 tasks"),
        ({"lams": [0.1, 10.0]}, "step times lambda"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        presets.load(
            "smoke", {f"studies.meta.{key}": value for key, value in changes.items()} | {"studies.meta.tasks": 18}
        )


def test_problems_without_one_answer_are_refused(images: data.Dataset) -> None:
    with pytest.raises(PresetError, match=r"lambda \+ mu = -1.* no one answer"):
        Learner(PHASE, lam=1.0).check()
    with pytest.raises(PresetError, match=r"lambda \+ mu = -1"):
        Bounds.of(case(PHASE), 1.0).changes()
    w, x, y = problem(PHASE)
    with pytest.raises(PresetError, match=r"lambda \+ mu"):
        Learner(PHASE, lam=1.0).adapt(w, x, y)
    with pytest.raises(PresetError, match="not smooth"):
        Learner(PHASE, inner="gd").check()
    with pytest.raises(DataError, match="fewer shots"):
        tasks.disjoint_tasks(images, 5, 20, torch.Generator())
    with pytest.raises(DataError, match="24 of 24 class pairs"):
        forgetting.setting(images, but(FEW, tasks=24), 1.0)
    with pytest.raises(PresetError, match="gamma lambda = 3"):
        forgetting.setting(images, FEW, 10.0)
