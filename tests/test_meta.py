"""Meta-learning: solvers against scipy and brute force, stability where it is known, bounds, forgetting, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from dmmlib import data, metrics, presets, unlearn
from dmmlib.errors import DataError, PresetError
from dmmlib.studies import meta
from dmmlib.studies.meta import bounds, experiments, forgetting, losses, stability, tasks
from dmmlib.studies.meta.losses import LOGISTIC, PHASE, SQUARED, Loss

SMALL = meta.Sizes(repeats=3, probes=6, queries=16, seeds=8)


def problem(loss: Loss, seed: int = 0, shape: tuple[int, ...] = (3,), n: int = 12, dim: int = 4) -> tuple[Tensor, ...]:
    """Adapted-model problems: w (*shape, dim), x (*shape, n, dim), y (*shape, n)."""
    rng = torch.Generator().manual_seed(seed)
    env = tasks.synthetic(loss, dim, 0.5)
    x, y = env.draw(shape, n, rng)
    return 0.5 * torch.randn(*shape, dim, generator=rng, dtype=torch.float64), x, y


def by_scipy(loss: Loss, lam: float, eps: float, w: Tensor, x: Tensor, y: Tensor) -> np.ndarray:
    """The prox of one problem by a method that knows nothing of it, from several starts."""

    def objective(u: np.ndarray) -> float:
        at = torch.from_numpy(u)
        return float(loss.at(at, x, y, eps).mean() + lam / 2 * ((at - w) ** 2).sum())

    starts = [w.numpy(), np.zeros(len(w)) + 1e-2, 0.5 * w.numpy()]
    options = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000, "adaptive": True}
    found = [minimize(objective, start, method="Nelder-Mead", options=options) for start in starts]
    return min(found, key=lambda f: f.fun).x


# --- losses and adversaries ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [SQUARED, LOGISTIC, PHASE], ids=lambda loss: loss.name)
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_gradients_are_those_of_the_values(loss: Loss, eps: float) -> None:
    u, x, y = problem(loss)
    u.requires_grad_(True)
    (expected,) = torch.autograd.grad(loss.at(u, x, y, eps).mean(-1).sum(), u)
    torch.testing.assert_close(loss.gradient(u.detach(), x, y, eps), expected, rtol=0, atol=1e-12)
    step = 1e-6 * torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
    there, here = (loss.at(v, x, y, eps).mean(-1) for v in ((u + step).detach(), (u - step).detach()))
    torch.testing.assert_close((there - here) / 2e-6, (expected * step).sum(-1) / 1e-6, rtol=1e-3, atol=1e-4)
    s = losses.scores(u.detach(), x).requires_grad_(True)
    (bend,) = torch.autograd.grad(loss.slope(s, y).sum(), s)
    torch.testing.assert_close(bend, loss.bend(s.detach(), y) if loss is not SQUARED else torch.ones_like(s))


@pytest.mark.parametrize("loss", [SQUARED, LOGISTIC, PHASE], ids=lambda loss: loss.name)
@pytest.mark.parametrize("eps", [0.1, 0.6])
def test_robust_loss_is_the_worst_found_by_brute_force(loss: Loss, eps: float) -> None:
    u, x, y = problem(loss, dim=2, n=5)
    angle = torch.linspace(0, 2 * np.pi, 721, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    delta = torch.cat([r * eps * circle for r in np.linspace(0, 1, 41)])
    tried = loss.value(((x[..., None, :] + delta) * u[:, None, None]).sum(-1), y[..., None]).amax(-1)
    robust = loss.at(u, x, y, eps)
    assert (robust >= tried - 1e-3).all(), "brute force found a worse example"
    torch.testing.assert_close(robust, tried, rtol=0, atol=2e-3)
    moved = losses.attacked(loss, u, x, y, eps)
    assert (torch.linalg.vector_norm(moved - x, dim=-1) <= eps + 1e-9).all()


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), eps=st.floats(0.01, 0.9))
def test_pgd_agrees_with_the_closed_form(seed: int, eps: float) -> None:
    for loss in (SQUARED, LOGISTIC):
        u, x, y = problem(loss, seed)
        by_ascent = loss.value(losses.scores(u, losses.pgd(loss, u, x, y, eps)), y)
        torch.testing.assert_close(by_ascent, loss.at(u, x, y, eps), rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", [SQUARED, LOGISTIC, PHASE], ids=lambda loss: loss.name)
def test_constants_hold(loss: Loss) -> None:
    rng = torch.Generator().manual_seed(0)
    _, x, y = problem(loss, shape=(500,))
    u, v = (
        torch.nn.functional.normalize(torch.randn(500, 4, generator=rng, dtype=torch.float64), dim=-1) for _ in "ab"
    )
    change = (loss.at(u, x, y, 0.2) - loss.at(v, x, y, 0.2)).abs()
    assert (change <= loss.lipschitz(1.0, 0.2) * torch.linalg.vector_norm(u - v, dim=-1)[:, None] + 1e-12).all()
    between = loss.at((u + v) / 2, x, y) - (loss.at(u, x, y) + loss.at(v, x, y)) / 2
    assert (between <= -loss.curvature / 8 * ((u - v) ** 2).sum(-1)[:, None] + 1e-12).all(), "weak convexity"
    if loss is PHASE:
        assert (between > 1e-3).any(), "phase retrieval is not convex"


# --- task-level algorithms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "lam", "eps", "tolerance"),
    [(SQUARED, 0.3, 0.0, 1e-5), (LOGISTIC, 0.3, 0.0, 1e-5), (LOGISTIC, 0.3, 0.3, 1e-5), (PHASE, 3.0, 0.0, 2e-3)],
    ids=["squared", "logistic", "robust logistic", "phase"],
)
def test_prox_against_scipy(loss: Loss, lam: float, eps: float, tolerance: float) -> None:
    w, x, y = problem(loss, dim=3)
    found = meta.adapt(meta.Learner(lam=lam, eps=eps), loss, w, x, y)
    for k in range(len(w)):
        np.testing.assert_allclose(found[k], by_scipy(loss, lam, eps, w[k], x[k], y[k]), atol=tolerance)


def test_robust_prox_at_its_kink() -> None:
    _, x, y = problem(LOGISTIC, shape=(40,))
    w = torch.zeros(40, 4, dtype=torch.float64)
    u = meta.adapt(meta.Learner(lam=0.5, eps=0.35), LOGISTIC, w, x, y)
    at_kink = torch.linalg.vector_norm(u, dim=-1) == 0
    assert 0 < at_kink.sum() < 40, "both cases should occur"
    expected = np.stack([by_scipy(LOGISTIC, 0.5, 0.35, w[k], x[k], y[k]) for k in range(8)])
    np.testing.assert_allclose(u[:8], expected, atol=1e-4)


@pytest.mark.parametrize("loss", [SQUARED, LOGISTIC], ids=lambda loss: loss.name)
def test_descent_ends_at_the_prox(loss: Loss) -> None:
    w, x, y = problem(loss)
    prox = meta.adapt(meta.Learner(), loss, w, x, y)
    gd = meta.adapt(meta.Learner(inner="gd", inner_steps=200), loss, w, x, y)
    torch.testing.assert_close(gd, prox, rtol=0, atol=1e-8)


def test_batched_runs_are_single_runs() -> None:
    env = tasks.synthetic(LOGISTIC, 3, 0.5)
    x, y = env.draw((4, 5), 6, torch.Generator().manual_seed(0))
    for at in (meta.Learner(), meta.Learner(inner="gd"), meta.Learner(eps=0.2)):
        many = meta.learn(at, LOGISTIC, x, y, env.start).w
        for k in range(4):
            torch.testing.assert_close(meta.learn(at, LOGISTIC, x[k], y[k], env.start).w, many[k], rtol=0, atol=1e-8)


# --- stability where it is known -----------------------------------------------------------------------


def test_mean_estimation_moves_by_what_theory_says() -> None:
    """x = 1, d = 1, squared loss: u = (mean(y) + lam w) / (1 + lam), so all is explicit, at both levels."""
    m, n, lam, gamma, steps = 5, 4, 0.7, 0.3, 6
    rng = torch.Generator().manual_seed(0)
    x = torch.ones(m, n, 1, dtype=torch.float64)
    y = torch.rand(m, n, generator=rng, dtype=torch.float64)
    at = meta.Learner(lam=lam, step=gamma, n_steps=steps)
    start = torch.zeros(1, dtype=torch.float64)
    changed = y.clone()
    changed[2, 1] += 0.5
    moved = float((meta.learn(at, SQUARED, x, changed, start).w - meta.learn(at, SQUARED, x, y, start).w)[0])
    keep = 1 - gamma * lam / (1 + lam)  # w <- keep w + gamma lam / (1 + lam) mean of all y
    assert moved == pytest.approx(0.5 / (m * n) * (1 - keep**steps), abs=1e-12)
    w = torch.full((1,), 0.2, dtype=torch.float64)
    adapted = float((meta.adapt(at, SQUARED, w, x[2], changed[2]) - meta.adapt(at, SQUARED, w, x[2], y[2]))[0])
    assert adapted == pytest.approx(0.5 / (n * (1 + lam)), abs=1e-12)


def test_drawing_every_task_in_turn_is_the_full_step_on_average() -> None:
    env = tasks.synthetic(SQUARED, 3, 0.5)
    x, y = env.draw((6,), 5, torch.Generator().manual_seed(0))
    full = meta.learn(meta.Learner(n_steps=8), SQUARED, x, y, env.start).w
    some = meta.Learner(n_steps=8, tasks_per_step=2)
    runs = meta.learn(some, SQUARED, x, y, env.start.expand(20_000, -1), torch.Generator().manual_seed(1)).w
    error = 4 * runs.std(0) / 20_000**0.5
    assert ((runs.mean(0) - full).abs() < error).all(), "every step is affine in w, so the mean is the full run"


def test_shared_draws_leave_only_the_replacement() -> None:
    env = tasks.synthetic(LOGISTIC, 3, 0.5)
    x, y = env.draw((1, 6), 5, torch.Generator().manual_seed(0))
    x, y = x.expand(4, -1, -1, -1), y.expand(4, -1, -1)
    for at in (meta.Learner(tasks_per_step=2), meta.Learner(inner="gd", examples_per_step=2)):
        shared = meta.learn(at, LOGISTIC, x, y, env.start, torch.Generator().manual_seed(1), shared=(1,)).w
        apart = meta.learn(at, LOGISTIC, x, y, env.start, torch.Generator().manual_seed(1)).w
        torch.testing.assert_close(shared, shared[:1].expand_as(shared), rtol=0, atol=1e-12)
        assert (apart[0] - apart[1]).abs().max() > 1e-4


def test_masked_tasks_leave_no_trace() -> None:
    env = tasks.synthetic(SQUARED, 3, 0.5)
    x, y = env.draw((6,), 5, torch.Generator().manual_seed(0))
    masks = torch.ones(50, 6, dtype=torch.bool)
    masks[:, 2] = False
    at = meta.Learner(tasks_per_step=2)

    def run(labels: Tensor) -> Tensor:
        return meta.learn(at, SQUARED, x, labels, env.start, torch.Generator().manual_seed(3), masks=masks).w

    spoilt = y.clone()
    spoilt[2] = -spoilt[2]
    assert (run(spoilt) == run(y)).all()


CASES: list[tuple[Loss, dict[str, Any]]] = [
    (LOGISTIC, {}),
    (LOGISTIC, {"inner": "gd", "inner_steps": 3}),
    (LOGISTIC, {"eps": 0.2}),
    (LOGISTIC, {"tasks_per_step": 1}),
    (LOGISTIC, {"inner": "gd", "examples_per_step": 1}),
    (SQUARED, {"lam": 0.3}),
    (PHASE, {"lam": 4.0, "step": 0.1, "n_steps": 3}),
    (PHASE, {"inner": "gd", "inner_step": 0.1}),
]


@pytest.mark.parametrize(("loss", "changes"), CASES)
def test_stability_is_below_its_bound(loss: Loss, changes: dict[str, Any]) -> None:
    found = meta.measure(tasks.synthetic(loss, 3, 0.5), meta.Learner(**changes), 5, 6, SMALL, 0)
    for kind in meta.KINDS:
        assert 0 < found.worst[kind].max() <= found.bound[kind], kind


def test_bound_is_met_with_equality_where_it_can_be() -> None:
    """The adaptation bound 2 G^2 / (lam n), for gradients as far apart as they can be: a nearly linear loss."""
    lam, n = 100.0, 3
    w, x = torch.zeros(1, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
    same, flipped = torch.ones(n, dtype=torch.float64), torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    at = meta.Learner(lam=lam)
    moved = float((meta.adapt(at, LOGISTIC, w, x, same) - meta.adapt(at, LOGISTIC, w, x, flipped)).abs())
    half = replace(bounds.constants(LOGISTIC, at, 2, n, 1.0), lipschitz=0.5)  # the slope at 0
    assert moved == pytest.approx(bounds.adapted(half, at, 0.0, replaced=True), rel=0.01)


def test_bounds_have_the_rates_that_they_claim() -> None:
    def at(m: int = 8, n: int = 8, **changes: Any) -> dict[str, float]:
        chosen = meta.Learner(**changes)
        return meta.stability_bounds(meta.constants(LOGISTIC, chosen, m, n, 1.0), chosen)

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
    env, at, m, n, repeats = tasks.synthetic(LOGISTIC, 3, 0.5), meta.Learner(lam=0.3), 3, 4, 4000
    transfer, empirical, _ = meta.gap(env, at, m, n, repeats, 4, 8, 0)
    rng = torch.Generator().manual_seed(1)
    x, y = env.draw((repeats, m + 1), n + 1, rng)
    keep_x, keep_y = x[:, :m, :n], y[:, :m, :n]
    other = [m, *range(1, m)]
    here = meta.learn(at, LOGISTIC, keep_x, keep_y, env.start).w
    there = meta.learn(at, LOGISTIC, x[:, other, :n], y[:, other, :n], env.start).w
    before = meta.adapt(at, LOGISTIC, here, x[:, 0, :n], y[:, 0, :n])
    after = meta.adapt(at, LOGISTIC, there, x[:, 0, 1:], y[:, 0, 1:])
    point = (x[:, 0, :1], y[:, 0, :1])
    change = (LOGISTIC.at(after, *point) - LOGISTIC.at(before, *point))[:, 0].numpy()
    direct, swapped = stability.mean_estimate(transfer - empirical), stability.mean_estimate(change)
    assert direct.low > 0
    assert abs(direct.value - swapped.value) < (direct.high - direct.low) + (swapped.high - swapped.low)


def test_slope_of_a_power_law() -> None:
    x = np.array([2.0, 4.0, 8.0, 32.0])
    rows = 3 * x**-0.7 * np.exp(0.01 * np.random.default_rng(0).standard_normal((6, 4)))
    fitted = stability.slope(x, rows)
    assert abs(fitted.value + 0.7) < 0.01
    assert 0 < fitted.high - fitted.low < 0.05


# --- forgetting ----------------------------------------------------------------------------------------

FEW = meta.MetaSettings(
    repeats=2, probes=4, side=3, shots=4, n_models=40, forget_steps=30, n_subsets=200, n_forget=1, n_tuning=1,
    forget_lam=3.0, forget_lams=(0.03, 3.0), matching_lrs=(3e-3, 3e-2),
)  # fmt: skip


@pytest.fixture(scope="module")
def images() -> data.Dataset:
    return data.load("fashion-mnist", n_train=400, n_val=20)


def test_tasks_share_no_image(images: data.Dataset) -> None:
    x, y = tasks.disjoint_tasks(images, 5, 8, torch.Generator().manual_seed(0))
    assert x.shape[:2] == (24, 8)
    assert len(torch.unique(x.flatten(0, 1), dim=0)) == 24 * 8
    assert (y.sum(1) == 0).all()


def test_points_are_adapted_models(images: data.Dataset) -> None:
    at = forgetting.setting(images, FEW, 0.5)
    w = at.train(torch.ones(3, at.m, dtype=torch.bool), [0])
    task = 4
    u = meta.adapt(at.learner, SQUARED, w, at.support_x[task], at.support_y[task])
    scores = u @ at.asked_x[task].T
    logits = at.logits(w)[:, at.splits(task)["forget"]]
    np.testing.assert_allclose(logits[..., 1] - logits[..., 0], scores, atol=1e-5)
    own = at.points(torch.Generator().manual_seed(0), 3)
    assert own.shape == (3, len(at.task_of), w.shape[1] + 1)
    assert (own[0] != own[1]).any()


def test_matching_forgets_a_task_and_the_datamodel_predicts_it(images: data.Dataset) -> None:
    rows, rates = forgetting.compare(images, FEW)
    assert set(rates) == {"oracle_matching", "dmm"}
    p95 = rows[(rows["statistic"] == "klom_mean") & (rows["split"] == "forget")].set_index("method")
    assert set(p95.index) == set(forgetting.METHODS)
    assert (p95["low"] <= p95["value"]).all()
    assert p95.loc["dm_direct", "value"] < p95.loc["do_nothing", "value"]
    assert p95.loc["oracle_matching", "value"] < p95.loc["do_nothing", "value"]
    assert p95.loc["dmm", "cost"] == pytest.approx(FEW.cost, rel=0.2)


def test_every_method_moves_the_models(images: data.Dataset) -> None:
    at = forgetting.setting(images, FEW, 3.0)
    originals = at.train(torch.ones(6, at.m, dtype=torch.bool), [1])
    keep = at.without(0, 6)
    assert not keep[:, 0].any()
    assert keep[:, 1:].all()
    moved = at.train(keep, [2], start=originals, steps=3)
    assert (moved != originals).all()
    attributor = forgetting.attribute(at, FEW)
    effect = attributor.effect(at.splits(0)["forget"])
    without, with_ = (at.logits(at.train(m, [k])) for k, m in ((3, at.without(0, 400)), (4, torch.ones(400, at.m) > 0)))
    true = metrics.margins(without, at.labels).mean(0) - metrics.margins(with_, at.labels).mean(0)
    here, sign = at.splits(0)["forget"], 2 * at.labels - 1
    predicted = metrics.right_logits(effect, at.labels)
    together = np.corrcoef((sign * predicted)[here], (sign * true)[here])
    assert together[0, 1] > 0.7, "attribution to tasks predicts retraining"


def test_tables_of_the_notebook(images: data.Dataset) -> None:
    tiny = replace(
        FEW, ms=(3, 6), ns=(3, 6), lams=(0.5, 1.0), gammas=(0.1, 0.2), ts=(2, 4), etas=(0.1, 0.3), ks=(1, 2),
        weak_lams=(3.0, 6.0), m=3, n=4, gap_repeats=5, gap_tasks=3, epsilons=(0.0, 0.2), broken_ns=(4,),
        broken_labels=(1.0, 20.0), broken_etas=(0.5, 3.0), n_models=10, n_forget=2,
    )  # fmt: skip
    found = experiments.sweeps(images, tiny)
    assert (found["measured"] <= found["bound"]).all()
    fitted = experiments.slopes(found)
    assert set(fitted["replaced"]) <= set(meta.KINDS)
    assert (experiments.gaps(images, tiny, found)["bound"] > 0).all()
    held = experiments.assumptions(images, tiny)
    assert (held["Lipschitz: largest gradient / G"] <= 1).all()
    assert (held["convex: lowest curvature"] >= held["assumed"] - 1e-9).all()
    fails = experiments.broken(tiny)
    worst = fails[fails["value"].isin([3.0, 20.0])]
    assert (worst["measured"] > worst["bound"]).all(), "a broken assumption must show"
    assert len(experiments.robust(tiny)) == 4
    assert len(experiments.stochastic(tiny)) == 16
    against = experiments.forgetting_against_stability(images, tiny)
    assert isinstance(against, pd.DataFrame)
    assert (against["adaptation"].diff().dropna() < 0).all(), "regularisation stabilises adaptation"


def test_registered_methods_are_used_as_they_stand() -> None:
    assert {m for m in forgetting.METHODS if m != "gd"} <= set(unlearn.names())
    assert presets.load("smoke").meta.n_models < presets.load("laptop").meta.n_models


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "m", "n", "error", "message"),
    [
        ({}, 1, 8, DataError, "m=1 task, but one is to be replaced or forgotten; give at least 2"),
        ({}, 4, 1, DataError, "n=1 example a task"),
        ({"inner": "gd", "examples_per_step": 9}, 4, 8, DataError, "takes 9 examples, but a task has n=8"),
        ({"tasks_per_step": 5}, 4, 8, DataError, "takes 5 tasks of m=4"),
        ({"step": 1.5}, 4, 8, PresetError, r"meta-level step is unstable: gamma lambda = 1.5 > 1; give step <= 1"),
        ({"inner": "gd", "inner_step": 0.9}, 4, 8, PresetError, r"task-level step is unstable: eta=0.9 .* <= 0.8"),
        ({"eps": 1.0}, 4, 8, PresetError, "eps=1, but the data have norm 1; give 0 <= eps < 1"),
        ({"eps": -0.1}, 4, 8, PresetError, "eps=-0.1"),
        ({"lam": 0.0}, 4, 8, PresetError, "lam=0; give a positive"),
        ({"inner_steps": 0}, 4, 8, PresetError, "inner_steps=0"),
        ({"examples_per_step": 2}, 4, 8, PresetError, "for inner='gd'"),
    ],
)
def test_bad_learners(changes: dict[str, Any], m: int, n: int, error: type[Exception], message: str) -> None:
    env = tasks.synthetic(LOGISTIC, 3, 0.5)

    def drawn(*_: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("data were drawn before the check")

    with pytest.raises(error, match=message) as caught:
        meta.measure(replace(env, draw=drawn), meta.Learner(**changes), m, n, SMALL, 0)
    assert "\n" not in str(caught.value)


def test_problems_without_one_answer_are_refused(images: data.Dataset) -> None:
    _, x, y = problem(SQUARED, n=3)
    with pytest.raises(DataError, match="lam=0 has n=3 examples for 4 features; give n >= 4"):
        meta.affine(0.0, x, y)
    with pytest.raises(PresetError, match="weakly convex with modulus 2, so prox with lam=1 has no one answer"):
        meta.Learner(lam=1.0).check(PHASE, 4, 8)
    with pytest.raises(PresetError, match="robust squared loss has no prox solver here; use inner='gd'"):
        meta.Learner(eps=0.1).check(SQUARED, 4, 8)
    with pytest.raises(PresetError, match=r"lambda \+ mu = -1"):
        meta.stability_bounds(meta.constants(PHASE, meta.Learner(), 4, 8, 1.0), meta.Learner())
    with pytest.raises(DataError, match="ask for fewer shots"):
        tasks.disjoint_tasks(images, 5, 40, torch.Generator())
    with pytest.raises(DataError, match="n=5 examples; give an even number"):
        tasks.disjoint_tasks(images, 5, 5, torch.Generator())
    with pytest.raises(DataError, match=r"24 of 24 class pairs are training tasks, 1 \+ 1"):
        forgetting.setting(images, replace(FEW, tasks=24), 1.0)
    with pytest.raises(PresetError, match="gamma lambda = 3 > 1"):
        forgetting.setting(images, FEW, 10.0)
    with pytest.raises(DataError, match="interval over 1 value"):
        stability.mean_estimate(np.ones(1))
    with pytest.raises(DataError, match="spread -1"):
        tasks.synthetic(SQUARED, 3, -1)
