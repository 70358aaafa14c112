"""Every method of the study under every attack, as the service would run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from dmmlib import metrics, unlearn
from dmmlib.adversary.experiments import Asked, Prepared, threads
from dmmlib.adversary.world import World, retrain, together
from dmmlib.execution import Execution
from dmmlib.forget_sets import ForgetSet

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "do_nothing": [{}],
    "retrain": [{}],
    "gd": [{"epochs": 1.0, "batch_size": 100, "lr": lr} for lr in (1e-2, 3e-2, 1e-1)],
    "ga": [{"epochs": 3.0, "lr": lr} for lr in (1e-3, 3e-3, 1e-2)],
    "ga_gd": [{"ascent_epochs": 2.0, "descent_epochs": 1.0, "batch_size": 100, "lr": lr} for lr in (1e-3, 3e-3, 1e-2)],
    "scrub": [{"epochs": 1, "max_epochs": 1, "batch_size": 100, "lr": lr} for lr in (3e-3, 1e-2, 3e-2)],
    "ssd": [{"alpha": a} for a in (5.0, 10.0, 25.0)],
    "oracle_matching": [{"cost": 0.1, "batch_size": 40, "lr": lr} for lr in (1e-3, 3e-3, 1e-2)],
    "dm_direct": [{}],
    "dmm": [{"cost": 0.1, "batch_size": 40, "lr": lr} for lr in (1e-3, 3e-3, 1e-2)],
}
"""Settings tried of each method, on an honest request of the attack's size."""

Case = tuple[int, str, dict[str, Any]]
"""Number of a target, method, setting."""
R = TypeVar("R")


def solve(world: World, asked: Asked, cases: Sequence[Case], read: Callable[[int, unlearn.Unlearned], R]) -> list[R]:
    """What `read` makes of each case's result, a case a thread: many small jobs leave nothing to share steps with."""

    def one(case: Case) -> R:
        t, method, setting = case
        site = asked.site(t)
        problem = unlearn.Problem(
            originals=site.originals.clone(),
            original_logits=site.logits,
            x=site.x,
            y=site.y,
            n_train=site.data.n_train,
            forget=asked.requests[t],
            training=world.victim.training,
            attributor=asked.attributors[t % len(asked.attributors)],
            oracle_logits=asked.retrained[t],
            seed=world.s.seed,
            execution=Execution(chunk=64),
        )
        return read(t, unlearn.get(method)(problem, **setting))

    return list(threads(world).run(one, cases))


def _margins(t: int, result: unlearn.Unlearned) -> np.ndarray:
    return result.margins


def choose_options(world: World, prepared: Prepared) -> tuple[dict[str, dict[str, Any]], pd.DataFrame]:
    """Each method's setting: the one nearest to retraining on an honest request of the attack's size.

    The request is a class-pure set of images alike, from the site without poison. Distance: mean over F, R and V of the
    mean absolute difference of mean margins to retrained models. No target plays a part.
    """
    s, site = world.s, prepared.places["honest"]
    forget = world.album(world.half, s.n, np.random.default_rng([s.seed, 7]))
    retrained = retrain(world, site, [forget], 2 * s.n_models)
    asked = Asked("search", [site], [forget], retrained[:, : s.n_models], [prepared.monitors["honest"].datamodel])
    goal = metrics.margins(retrained[0, s.n_models :], site.data.y).mean(0)
    parts = ForgetSet("", forget).splits(s.n, site.data.n_val)
    tried = [(0, method, setting) for method, grid in OPTIONS.items() for setting in grid if len(grid) > 1]
    rows = []
    for (_, method, setting), margins in zip(tried, solve(world, asked, tried, _margins), strict=True):
        gap = np.nan_to_num(np.abs(margins.mean(0) - goal), nan=1e3, posinf=1e3)
        distance = float(np.mean([gap[part].mean() for part in parts.values()]))
        rows.append({"method": method, "setting": setting, "distance": distance})
    table = pd.DataFrame(rows)
    best = {method: grid[0] for method, grid in OPTIONS.items()}
    nearest = table.loc[table.groupby("method")["distance"].idxmin()]
    return best | dict(zip(nearest["method"], nearest["setting"], strict=True)), table


def columns(
    after: tuple[np.ndarray, np.ndarray], before: tuple[np.ndarray, np.ndarray], target: int, others: np.ndarray
) -> dict[str, np.ndarray]:
    """Error and margin at a target, and accuracy on others (n_models,), after and before a request.

    Args:
        after, before: margins, and whether answers are right, both (n_models, n_points).
        target, others: positions among those points.
    """
    return {
        f"{name}{when}": value
        for when, (margins, right) in (("", after), (" before", before))
        for name, value in (
            ("error", ~right[:, target]), ("margin", margins[:, target]), ("accuracy", right[:, others].mean(1)),
        )
    }  # fmt: skip


def serve(world: World, asked: Asked, options: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """Every method on every request: a row an attack, method, target and model.

    Columns: attack, method, target, model, size, error and margin at the target, accuracy on V without the targets, the
    same three before the request, and cost.
    """
    others = np.setdiff1d(np.arange(world.data.n_val), world.targets)

    def told(t: int, result: unlearn.Unlearned) -> pd.DataFrame:
        site = asked.site(t)
        n, y = site.data.n_train, site.data.y
        before = metrics.margins(site.logits, y), metrics.correct(site.logits, y)
        found = columns((result.margins, result.correct), before, n + world.targets[t], n + others)
        return pd.DataFrame({"model": np.arange(len(site.logits)), "cost": result.cost} | found)

    cases = [(t, method, setting) for t in range(len(asked.requests)) for method, setting in options.items()]
    tables = solve(world, asked, cases, told)
    named = [
        table.assign(attack=asked.attack, method=method, target=int(world.targets[t]), size=len(asked.requests[t]))
        for (t, method, _), table in zip(cases, tables, strict=True)
    ]
    return pd.concat(named, ignore_index=True)


def interval(table: pd.DataFrame, column: str, n_bootstrap: int = 500, seed: int = 0) -> metrics.Estimate:
    """Mean of a column with a 95 % interval: targets and models are both resampled."""
    values = table.pivot_table(index="target", columns="model", values=column, aggfunc="first").to_numpy(float)
    rng = np.random.default_rng(seed)
    t, m = values.shape
    draws = [values[np.ix_(rng.integers(0, t, t), rng.integers(0, m, m))].mean() for _ in range(n_bootstrap)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return metrics.Estimate(float(values.mean()), float(low), float(high))


def summary(served: pd.DataFrame, by: Sequence[str] = ("attack", "method")) -> pd.DataFrame:
    """A row a group, by default an attack and method: success, change of margin and of accuracy with intervals.

    "spread": standard deviation, over models, of the share of targets that a model errs on.
    """
    served = served.assign(change=served["margin"] - served["margin before"])
    estimated = {"success": "error", "before": "error before", "change": "change"}
    if "accuracy" in served:
        served, estimated = (
            served.assign(lost=served["accuracy"] - served["accuracy before"]),
            estimated | {"lost": "lost"},
        )
    rows = []
    for key, part in served.groupby(list(by), sort=False):
        row: dict[str, Any] = dict(zip(by, key, strict=True)) | {"n_targets": part["target"].nunique()}
        for name, column in estimated.items():
            e = interval(part, column)
            row |= {name: e.value, f"{name} low": e.low, f"{name} high": e.high}
        row["spread"] = float(part.groupby("model")["error"].mean().std(ddof=1))
        means = [c for c in ("accuracy", "accuracy before", "size", "cost", "balance") if c in part]
        rows.append(row | part[means].mean().to_dict())
    return pd.DataFrame(rows)


def klom(world: World, prepared: Prepared, options: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """KLoM's p95 a split of a request, with many models: a row a kind of request and method.

    The first target's of three attacks, and an honest one for as many images alike.
    """
    s, honest = world.s, prepared.asked["honest_datamodel"]
    forget = world.album(world.half, s.n, np.random.default_rng([s.seed, 10]))
    album = replace(honest, attack="album", requests=[forget])
    few = [album, *(prepared.asked[attack] for attack in ("ddpa_dirty", "honest_datamodel", "camouflage"))]
    pairs, requests = [asked.site(0).poison for asked in few], [[asked.requests[0]] * 2 for asked in few]
    rows = []
    for small, (large, after) in zip(few, together(world, pairs, s.n_klom, requests, s.n_klom), strict=True):
        forget = small.requests[0]
        asked = Asked(small.attack, [large], [forget], after[:1], small.attributors[:1])
        oracle = metrics.margins(after[1], large.data.y)
        parts = ForgetSet("", forget).splits(large.data.n_train, large.data.n_val)
        found = solve(world, asked, [(0, *option) for option in options.items()], _margins)
        for method, margins in zip(options, found, strict=True):
            for split, statistics in metrics.klom_summary(margins, oracle, parts, n_bootstrap=20).items():
                rows.append({"attack": small.attack, "method": method, "split": split} | vars(statistics["p95"]))
    return pd.DataFrame(rows)
