"""What notebook 10 runs, each a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dmmlib.data import Dataset
from dmmlib.studies.meta import forgetting
from dmmlib.studies.meta.bounds import KINDS, as_if_met, constants, stability_bounds
from dmmlib.studies.meta.learner import Learner, adapt
from dmmlib.studies.meta.losses import LOGISTIC, PHASE, SQUARED, Loss
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.stability import Sizes, Stability, gap, mean_estimate, measure, slope
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


def sizes(s: MetaSettings) -> Sizes:
    return Sizes(s.repeats, s.probes, s.queries, s.seeds)


def learner(s: MetaSettings, **changes: Any) -> Learner:
    """The learner of the settings, where nothing varies."""
    return replace(Learner(s.lam, s.step, s.steps, "prox", s.inner_step, s.inner_steps), **changes)


def _rows(found: Stability, **named: Any) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        estimate = mean_estimate(found.worst[kind])
        yield named | {
            "kind": kind,
            "measured": estimate.value,
            "low": max(0.0, estimate.low),
            "high": estimate.high,
            "bound": found.bound[kind],
            "radius": found.radius,
            "each": found.worst[kind],
        }


def learner_with(base: Learner, name: str, value: float) -> Learner:
    """The learner with one quantity changed; whole numbers stay whole."""
    change: dict[str, Any] = {name: int(value) if isinstance(getattr(base, name), int) else value}
    return replace(base, **change)


def _sweep(
    env: Environment, base: Learner, s: MetaSettings, varied: dict[str, Sequence[float]], stream: int
) -> Iterator[dict[str, Any]]:
    for varies, values in varied.items():
        for value in values:
            m, n = (int(value) if varies == key else getattr(s, key) for key in ("m", "n"))
            at = base if varies in ("m", "n") else learner_with(base, varies, value)
            found = measure(env, at, m, n, sizes(s), s.seed + stream)
            yield from _rows(found, tasks=env.name, inner=at.inner, varies=varies, value=value)


def environments(data: Dataset, s: MetaSettings) -> dict[str, Environment]:
    """Every kind of task that is studied."""
    return {
        "logistic": synthetic(LOGISTIC, s.dim, s.spread),
        "squared": synthetic(SQUARED, s.dim, s.spread),
        "images": images(data, s.side),
        "phase": synthetic(PHASE, s.dim, s.spread),
    }


def sweeps(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """Stability and its bounds while one quantity varies: a row a task family, quantity, value and replacement."""
    env = environments(data, s)
    sizes_: dict[str, Sequence[float]] = {"m": s.ms, "n": s.ns}
    meta_level: dict[str, Sequence[float]] = {"step": s.gammas, "n_steps": s.ts}
    every = {**sizes_, "lam": s.lams, **meta_level}
    descent = {**sizes_, **meta_level, "inner_step": s.etas, "inner_steps": s.ks}
    weak = learner(s, lam=s.weak_lams[1], step=s.step / s.weak_lams[1])
    rows = [
        *_sweep(env["logistic"], learner(s), s, every, 0),
        *_sweep(env["logistic"], learner(s, inner="gd"), s, descent, 0),
        *_sweep(env["squared"], learner(s), s, every, 0),
        *_sweep(env["images"], learner(s), s, {"m": s.ms[:4], "n": s.ns[:4], "lam": s.lams}, 0),
        *_sweep(env["phase"], weak, s, {"m": s.ms[:3], "n": s.ns[:3], "lam": s.weak_lams}, 0),
    ]
    return pd.DataFrame(rows)


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Log-log slopes of the measured stability, with 95 % intervals, beside the bounds' over the same grid."""
    rows = []
    for (tasks, inner, varies, kind), part in table.groupby(["tasks", "inner", "varies", "kind"], sort=False):
        x = part["value"].to_numpy(float)
        each = np.stack(part["each"].to_list(), 1)
        if (each <= 0).any():
            continue
        fitted = slope(x, each)
        rows.append(
            {
                "tasks": tasks,
                "inner": inner,
                "varies": SYMBOLS[str(varies)],
                "replaced": kind,
                "slope": fitted.value,
                "low": fitted.low,
                "high": fitted.high,
                "bound's slope": slope(x, np.stack([part["bound"].to_numpy()] * 2)).value,
                "looseness": float((part["bound"] / part["measured"]).median()),
            }
        )
    return pd.DataFrame(rows)


def stochastic(s: MetaSettings) -> pd.DataFrame:
    """Full gradients, and random tasks, examples, or both a step: expected change of loss over the draws."""
    env = synthetic(LOGISTIC, s.dim, s.spread)
    variants: dict[str, dict[str, Any]] = {
        "all tasks, all examples": {},
        "one task a step": {"tasks_per_step": 1},
        "one example a step": {"examples_per_step": 1},
        "one task, one example": {"tasks_per_step": 1, "examples_per_step": 1},
    }
    rows: list[dict[str, Any]] = []
    for name, changes in variants.items():
        found = measure(env, learner(s, inner="gd", **changes), s.m, s.n, sizes(s), s.seed)
        rows += _rows(found, variant=name)
    return pd.DataFrame(rows)


def gaps(data: Dataset, s: MetaSettings, measured: pd.DataFrame) -> pd.DataFrame:
    """Transfer risk minus empirical risk against m, n and lambda, beside the stability that `sweeps` measured."""
    env = {e.name: e for e in environments(data, s).values() if e.loss is not PHASE}
    chosen = measured[
        (measured["kind"] == "meta") & (measured["inner"] == "prox") & measured["varies"].isin(["m", "n", "lam"])
    ]
    rows = []
    for _, row in chosen[chosen["tasks"].isin(env)].iterrows():
        varies, value, e = row["varies"], row["value"], env[row["tasks"]]
        m, n = (int(value) if varies == k else getattr(s, k) for k in ("m", "n"))
        at = learner(s, lam=value) if varies == "lam" else learner(s)
        found = {"stability": row["measured"], "radius": row["radius"]}
        rows.append({"tasks": e.name, "varies": varies, "value": value} | _gap(e, at, m, n, s, found))
    return pd.DataFrame(rows)


def _gap(env: Environment, at: Learner, m: int, n: int, s: MetaSettings, found: dict[str, float]) -> dict[str, float]:
    transfer, empirical, radius = gap(env, at, m, n, s.gap_repeats, s.gap_tasks, s.queries, s.seed + 1)
    estimate = mean_estimate(transfer - empirical)
    c = constants(env.loss, at, m, n, max(radius, found["radius"]))
    return {
        "transfer": float(transfer.mean()),
        "empirical": float(empirical.mean()),
        "gap": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "stability": found["stability"],
        "bound": stability_bounds(c, at)["meta"],
    }


def robust(s: MetaSettings) -> pd.DataFrame:
    """Stability, gap and risk of adversarially robust meta-learning against the adversary's norm.

    Logistic regression with prox, where the worst case is in closed form, and phase retrieval with task-level
    gradient descent on examples that projected gradient ascent found.
    """
    cases = {
        "logistic regression, prox": (synthetic(LOGISTIC, s.dim, s.spread), learner(s)),
        "phase retrieval, gd, PGD": (
            synthetic(PHASE, s.dim, s.spread),
            learner(s, inner="gd", inner_step=min(s.inner_step, 0.1)),
        ),
    }
    rows = []
    for name, (env, base) in cases.items():
        for eps in s.epsilons:
            at = replace(base, eps=eps)
            stability = measure(env, at, s.m, s.n, sizes(s), s.seed + 2)
            found = {"stability": float(stability.worst["meta"].mean()), "radius": stability.radius}
            rows.append({"case": name, "eps": eps} | _gap(env, at, s.m, s.n, s, found))
    return pd.DataFrame(rows)


def _heavy(size: float) -> Loss:
    """The squared loss with adverse labels of that size."""
    return replace(SQUARED, flip=lambda y: -size * torch.sign(y))


def broken(s: MetaSettings) -> pd.DataFrame:
    """Where an assumption does not hold, against the bound as if it did (convex, smooth, |y| <= 1, allowed steps).

    One example of the new task is replaced. "step": task-level steps eta from allowed to beyond 2 / lambda.
    "Lipschitz": adverse labels of linear regression of size B, which G does not know of. "convexity": phase
    retrieval adapted by gradient descent with lambda far below its modulus, from next to its saddle point, against n.
    """
    rows: list[dict[str, Any]] = []

    def add(case: str, env: Environment, at: Learner, n: int, value: float) -> None:
        found = measure(env, at, s.m, n, sizes(s), s.seed + 3)
        limit = as_if_met(constants(env.loss, at, s.m, n, 1.0), at)["adaptation"]
        estimate = mean_estimate(found.worst["adaptation"])
        rows.append(
            {"case": case, "tasks": env.name, "value": value, "measured": estimate.value, "bound": limit}
            | {"low": max(0.0, estimate.low), "high": estimate.high, "each": found.worst["adaptation"]}
        )

    for eta in s.broken_etas:
        at = learner(s, inner="gd", inner_step=eta / s.lam, inner_steps=20, unchecked=True)
        add("step", synthetic(LOGISTIC, s.dim, s.spread), at, s.n, eta)
    linear = synthetic(SQUARED, s.dim, s.spread)
    for size in s.broken_labels:
        add("Lipschitz", replace(linear, loss=_heavy(size)), learner(s, inner="gd"), s.n, size)
    phase = synthetic(PHASE, s.dim, s.spread)
    saddle = replace(phase, start=torch.full((s.dim,), 1e-3, dtype=torch.float64))
    for n in s.broken_ns:
        add("convexity", saddle, learner(s, inner="gd", lam=0.1, inner_step=0.2, inner_steps=50), n, n)
    return pd.DataFrame(rows)


def _lowest_curvature(env: Environment, u: Tensor, x: Tensor, y: Tensor, moved: Tensor) -> float:
    """Lowest (grad l(u') - grad l(u)) . (u' - u) / ||u' - u||^2 of single examples: negative if not convex."""
    apart = moved - u
    one_x, one_y = x[..., None, :], y[..., None]
    change = env.loss.gradient(moved[..., None, :], one_x, one_y) - env.loss.gradient(u[..., None, :], one_x, one_y)
    return float(((change * apart[..., None, :]).sum(-1) / (apart**2).sum(-1)[..., None]).min())


def assumptions(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """What the bounds assume and what the experiments do, checked on adapted models: a row a task family."""
    rows = []
    for key, env in environments(data, s).items():
        at = learner(s) if key != "phase" else learner(s, lam=s.weak_lams[1], step=s.step / s.weak_lams[1])
        rng = torch.Generator().manual_seed(s.seed)
        x, y = env.draw((256,), s.n, rng)
        u = adapt(at, env.loss, env.start.expand(256, -1), x, y)
        moved = u + 0.1 * torch.randn(u.shape, generator=rng, dtype=u.dtype)
        radius = float(torch.linalg.vector_norm(torch.cat([u, moved]), dim=-1).max())
        c = constants(env.loss, at, s.m, s.n, radius)
        g = env.loss.gradient(u[:, None], x[:, :, None], y[..., None])
        strong = at.lam + c.curvature
        lowest = _lowest_curvature(env, u, x, y, moved)
        rows.append(
            {
                "tasks": env.name,
                "‖x‖ ≤ 1": float(torch.linalg.vector_norm(x, dim=-1).max()),
                "Lipschitz: largest gradient / G": float(torch.linalg.vector_norm(g, dim=-1).max()) / c.lipschitz,
                "G": c.lipschitz,
                "G holds": "everywhere" if env.loss is LOGISTIC else f"for ‖u‖ ≤ {radius:.2f}, as visited",
                "convex: lowest curvature": lowest,
                "assumed": c.curvature,
                "smooth": "yes" if c.smooth else "no",
                "λ + μ > 0": strong,
                "γλ ≤ 1": at.step * at.lam,
                "tasks i.i.d.": "yes",
                "loss bounded": "not needed in expectation",
            }
        )
    return pd.DataFrame(rows)


def forgetting_against_stability(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """KLoM of doing nothing, and measured stability of the same learner, a row a lambda."""
    rows = []
    for lam in s.forget_lams:
        found = forgetting.nothing(data, s, lam)
        at = forgetting.setting(data, s, lam).learner
        stability = measure(images(data, s.side, SQUARED), at, s.tasks, s.shots, replace(sizes(s), seeds=4), s.seed)
        row: dict[str, Any] = {"lam": lam}
        for name, values in found.items():
            estimate = mean_estimate(values)
            row |= {name: estimate.value, f"{name} low": max(0.0, estimate.low), f"{name} high": estimate.high}
        for kind in KINDS:
            estimate = mean_estimate(stability.worst[kind])
            row |= {kind: estimate.value, f"{kind} low": max(0.0, estimate.low), f"{kind} high": estimate.high}
            row[f"{kind} bound"] = stability.bound[kind]
        rows.append(row)
    return pd.DataFrame(rows)
