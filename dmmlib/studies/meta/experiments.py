"""What notebook 10 runs, each a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from dmmlib.data import Dataset
from dmmlib.studies.meta import forgetting
from dmmlib.studies.meta.bounds import KINDS, Bounds
from dmmlib.studies.meta.learner import Learner, adapt, largest_norm
from dmmlib.studies.meta.losses import LOGISTIC, PHASE, SQUARED
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.stability import gap, mean_estimate, measure, slope
from dmmlib.studies.meta.tasks import Environment, images, synthetic

SYMBOLS = {
    "m": "tasks m",
    "n": "examples n",
    "lam": "regularisation λ",
    "step": "meta-step γ",
    "n_steps": "meta-steps T",
    "inner_step": "task-step η",
    "inner_steps": "task-steps K",
}


def learner(s: MetaSettings, **changes: Any) -> Learner:
    """The learner of the settings, where nothing varies, with some of its numbers changed."""
    return replace(Learner(s.lam, s.step, s.steps, "prox", s.inner_step, s.inner_steps), **changes)


def environments(data: Dataset, s: MetaSettings) -> dict[str, tuple[Environment, Learner]]:
    """Every kind of task that is studied, with the learner of it."""
    weak = learner(s, lam=s.weak_lams[1], step=s.step / s.weak_lams[1])
    return {
        "logistic": (synthetic(LOGISTIC, s.dim, s.spread), learner(s)),
        "squared": (synthetic(SQUARED, s.dim, s.spread), learner(s)),
        "images": (images(data, s.side), learner(s)),
        "phase": (synthetic(PHASE, s.dim, s.spread), weak),
    }


def changed(base: Learner, s: MetaSettings, name: str, value: float) -> tuple[Learner, int, int]:
    """The learner, m and n with one quantity of `SYMBOLS` changed."""
    sizes = {"m": s.m, "n": s.n}
    if name in sizes:
        return base, *(sizes | {name: int(value)}).values()
    return replace(base, **{name: value}), s.m, s.n


def interval(values: np.ndarray, name: str = "measured", low: str = "low", high: str = "high") -> dict[str, float]:
    """Mean and 95 % interval, which ends at 0, of values (k,) that are not negative."""
    estimate = mean_estimate(values)
    return {name: estimate.value, low: max(0.0, estimate.low), high: estimate.high}


def stabilities(
    env: Environment, at: Learner, m: int, n: int, s: MetaSettings, seed: int, **named: Any
) -> list[dict[str, Any]]:
    """`measure` as rows of a table, one for each kind of replacement; `each` holds the values of all meta-samples."""
    found = measure(env, at, m, n, s, seed)
    return [
        named
        | {"kind": kind, **interval(found.worst[kind])}
        | {"bound": found.bound[kind], "radius": found.radius, "each": found.worst[kind]}
        for kind in KINDS
    ]


def sweeps(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """Stability and its bounds while one quantity varies: a row for each task family, quantity, value and kind."""
    every: dict[str, Sequence[float]] = {"m": s.ms, "n": s.ns, "lam": s.lams, "step": s.gammas, "n_steps": s.ts}
    descent = {k: v for k, v in every.items() if k != "lam"} | {"inner_step": s.etas, "inner_steps": s.ks}
    env = environments(data, s)
    logistic, weak = env["logistic"][0], {"m": s.ms[:3], "n": s.ns[:3], "lam": s.weak_lams}
    varied: list[tuple[Environment, Learner, Mapping[str, Sequence[float]]]] = [
        (*env["logistic"], every),
        (logistic, learner(s, inner="gd"), descent),
        (*env["squared"], every),
        (*env["images"], {"m": s.ms[:4], "n": s.ns[:4], "lam": s.lams}),
        (*env["phase"], weak),
    ]
    return pd.DataFrame(
        row
        for tasks, base, quantities in varied
        for name, values in quantities.items()
        for value in values
        for row in stabilities(
            tasks,
            *changed(base, s, name, value),
            s,
            s.seed,
            tasks=tasks.name,
            inner=base.inner,
            varies=name,
            value=value,
        )
    )


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Log-log slopes of the measured stability, with 95 % intervals, beside the bounds' over the same grid."""
    rows = []
    for (tasks, inner, varies, kind), part in table.groupby(["tasks", "inner", "varies", "kind"], sort=False):
        x, each, bound = part["value"].to_numpy(float), np.stack(part["each"].to_list(), 1), part["bound"].to_numpy()
        if (each <= 0).any():
            continue
        fitted, its = slope(x, each), slope(x, np.stack([bound] * 2))
        looseness = float((part["bound"] / part["measured"]).median())
        case = {"tasks": tasks, "inner": inner, "varies": SYMBOLS[str(varies)], "replaced": kind}
        ends = {"slope": fitted.value, "low": fitted.low, "high": fitted.high}
        rows.append(case | ends | {"bound's slope": its.value, "looseness": looseness})
    return pd.DataFrame(rows)


def stochastic(s: MetaSettings) -> pd.DataFrame:
    """Full gradients, and random tasks, examples, or both at each step: expected change of loss over the draws."""
    variants: dict[str, dict[str, Any]] = {
        "all tasks, all examples": {},
        "one task a step": {"tasks_per_step": 1},
        "one example a step": {"examples_per_step": 1},
        "one task, one example": {"tasks_per_step": 1, "examples_per_step": 1},
    }
    env = synthetic(LOGISTIC, s.dim, s.spread)
    return pd.DataFrame(
        row
        for name, changes in variants.items()
        for row in stabilities(env, learner(s, inner="gd", **changes), s.m, s.n, s, s.seed, variant=name)
    )


def _gap(env: Environment, at: Learner, m: int, n: int, s: MetaSettings, stability: float, radius: float) -> dict:
    """Risks and their gap beside a measured stability, and its bound for a G that holds everywhere visited."""
    transfer, empirical, reached = gap(env, at, m, n, s, s.seed + 1)
    estimate = mean_estimate(transfer - empirical)
    return {
        "transfer": float(transfer.mean()),
        "empirical": float(empirical.mean()),
        "gap": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "stability": stability,
        "bound": Bounds.of(env.loss, at, m, n, max(reached, radius)).changes()["meta"],
    }


def gaps(data: Dataset, s: MetaSettings, measured: pd.DataFrame) -> pd.DataFrame:
    """Transfer risk minus empirical risk against m, n and lambda, beside the stability that `sweeps` measured."""
    known = {env.name: (env, base) for key, (env, base) in environments(data, s).items() if key != "phase"}
    chosen = measured.query("kind == 'meta' and inner == 'prox' and varies in ['m', 'n', 'lam'] and tasks in @known")
    rows = []
    for row in chosen.itertuples():
        env, base = known[row.tasks]
        case = {"tasks": row.tasks, "varies": row.varies, "value": row.value}
        rows.append(case | _gap(env, *changed(base, s, row.varies, row.value), s, row.measured, row.radius))
    return pd.DataFrame(rows)


def robust(s: MetaSettings) -> pd.DataFrame:
    """Stability, gap and risk of adversarially robust meta-learning against the adversary's norm.

    Logistic regression with prox, where the worst case is in closed form, and phase retrieval with task-level
    gradient descent on examples that projected gradient ascent found.
    """
    descent = learner(s, inner="gd", inner_step=min(s.inner_step, 0.1))
    cases = {
        "logistic regression, prox": (synthetic(LOGISTIC, s.dim, s.spread), learner(s)),
        "phase retrieval, gd, PGD": (synthetic(PHASE, s.dim, s.spread), descent),
    }
    rows = []
    for name, (env, base) in cases.items():
        for eps in s.epsilons:
            at = replace(base, eps=eps)
            found = measure(env, at, s.m, s.n, s, s.seed + 2)
            stability = float(found.worst["meta"].mean())
            rows.append({"case": name, "eps": eps} | _gap(env, at, s.m, s.n, s, stability, found.radius))
    return pd.DataFrame(rows)


def broken(s: MetaSettings) -> pd.DataFrame:
    """Where an assumption does not hold, against the bound as if it did (convex, smooth, |y| <= 1, allowed steps).

    One example of the new task is replaced. "step": task-level steps eta from allowed to beyond 2 / lambda.
    "Lipschitz": adverse labels of linear regression of size B, which G does not know of. "convexity": phase
    retrieval adapted by gradient descent with lambda far below its modulus, from next to its saddle point, against n.
    """
    logistic, linear, phase = (synthetic(loss, s.dim, s.spread) for loss in (LOGISTIC, SQUARED, PHASE))
    saddle = replace(phase, start=torch.full((s.dim,), 1e-3, dtype=torch.float64))
    weak = learner(s, inner="gd", lam=0.1, inner_step=0.2, inner_steps=50)
    cases: list[tuple[str, Environment, Learner, int, float]] = []
    for eta in s.broken_etas:
        at = learner(s, inner="gd", inner_step=eta / s.lam, inner_steps=20, unchecked=True)
        cases.append(("step", logistic, at, s.n, eta))
    for size in s.broken_labels:
        heavy = replace(SQUARED, flip=lambda y, size=size: -size * torch.sign(y))
        cases.append(("Lipschitz", replace(linear, loss=heavy), learner(s, inner="gd"), s.n, size))
    cases += [("convexity", saddle, weak, n, n) for n in s.broken_ns]
    rows = []
    for case, env, at, n, value in cases:
        worst = measure(env, at, s.m, n, s, s.seed + 3).worst["adaptation"]
        bound = Bounds.of(env.loss, at, s.m, n, 1.0).as_if_met().changes()["adaptation"]
        row = {"case": case, "tasks": env.name, "value": value, "bound": bound, "each": worst}
        rows.append(row | interval(worst))
    return pd.DataFrame(rows)


def assumptions(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """What the bounds assume and what the experiments do, checked on adapted models: a row for each task family.

    The curvature is the lowest (grad l(u') - grad l(u)) . (u' - u) / ||u' - u||^2 of single examples; it is negative
    if the loss is not convex.
    """
    rows = []
    for env, at in environments(data, s).values():
        rng = torch.Generator().manual_seed(s.seed)
        x, y = env.draw((256,), s.n, rng)
        u = adapt(at, env.loss, env.start, x, y)
        moved = u + 0.1 * torch.randn(u.shape, generator=rng, dtype=u.dtype)
        radius, apart = max(largest_norm(u), largest_norm(moved)), moved - u
        g, g_moved = (env.loss.gradient(v[:, None], x[:, :, None], y[..., None]) for v in (u, moved))
        curvature = ((g_moved - g) * apart[:, None]).sum(-1) / (apart**2).sum(-1)[:, None]
        bounds = Bounds.of(env.loss, at, s.m, s.n, radius)
        rows.append(
            {
                "tasks": env.name,
                "‖x‖ ≤ 1": largest_norm(x),
                "Lipschitz: largest gradient / G": largest_norm(g) / bounds.lipschitz,
                "G": bounds.lipschitz,
                "G holds": "everywhere" if env.loss is LOGISTIC else f"for ‖u‖ ≤ {radius:.2f}, as visited",
                "convex: lowest curvature": float(curvature.min()),
                "assumed": bounds.curvature,
                "smooth": "yes" if bounds.smooth else "no",
                "λ + μ > 0": at.lam + bounds.curvature,
                "γλ ≤ 1": at.step * at.lam,
                "tasks i.i.d.": "yes",
                "loss bounded": "not needed in expectation",
            }
        )
    return pd.DataFrame(rows)


def forgetting_against_stability(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """KLoM of doing nothing, and measured stability of the same learner: a row for each lambda."""
    env, rows = images(data, s.side, SQUARED), []
    for lam in s.forget_lams:
        row = {"lam": lam}
        for name, values in forgetting.nothing(data, s, lam).items():
            row |= interval(values.to_numpy(), name, f"{name} low", f"{name} high")
        at = forgetting.setting(data, s, lam).learner
        found = measure(env, at, s.tasks, s.shots, s.model_copy(update={"seeds": 4}), s.seed)
        for kind in KINDS:
            row |= interval(found.worst[kind], kind, f"{kind} low", f"{kind} high")
            row[f"{kind} bound"] = found.bound[kind]
        rows.append(row)
    return pd.DataFrame(rows)
