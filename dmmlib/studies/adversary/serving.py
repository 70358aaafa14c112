"""Every method of the study under every attack, as the service would run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.random import PCG64, Generator
from scipy.stats import t as student

from dmmlib import metrics, unlearn
from dmmlib.datamodels import Attributor
from dmmlib.ensemble import concatenate
from dmmlib.execution import Execution
from dmmlib.forget_sets import ForgetSet
from dmmlib.studies.adversary.experiments import Asked, Prepared, never_trained, threads
from dmmlib.studies.adversary.world import World, retrain, together
from dmmlib.unlearn.matching import predicted_oracle

MATCHING = [{"cost": 0.1, "batch_size": 10, "lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "do_nothing": [{}],
    "retrain": [{}],
    "gd": [{"epochs": 1.0, "batch_size": 100, "lr": lr} for lr in (1e-2, 3e-2, 1e-1, 3e-1)],
    "ga": [{"epochs": 3.0, "lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)],
    "ga_gd": [
        {"ascent_epochs": 2.0, "descent_epochs": 1.0, "batch_size": 100, "lr": lr} for lr in (3e-3, 1e-2, 3e-2, 1e-1)
    ],
    "scrub": [{"epochs": 1, "max_epochs": 1, "batch_size": 100, "lr": lr} for lr in (1e-2, 3e-2, 1e-1, 3e-1)],
    "ssd": [{"alpha": a} for a in (2.0, 5.0, 10.0, 25.0, 50.0)],
    "oracle_matching": MATCHING,
    "dm_direct": [{}],
    "dmm": MATCHING,
}
"""Settings tried of each method, on honest requests of the attack's size."""

ALONE = ("ssd",)
"""Methods that look at the forget set's points themselves, not only at batches of them: no steps to share."""

Case = tuple[int, str, dict[str, Any]]
"""Number of a target, method, setting."""


class _Translated(Generator):
    """A generator whose permutations of places are of the points that stand there."""

    def __init__(self, key: Sequence[int], points: np.ndarray) -> None:
        super().__init__(PCG64(list(key)))
        self._points = points

    def permutation(self, x: Any, axis: int = 0) -> np.ndarray:
        return np.asarray(self._points[super().permutation(x, axis)])


@dataclass(frozen=True)
class Several(unlearn.Problem):
    """Requests of one size to one training set, served in the same steps: each has N / T of the models.

    The forget set is 0 .. k - 1 for all: *places*, at which other points stand for each request. Batches are the only
    way by which most methods see the points of a forget set, and every batch is drawn by `rngs`, which translates; so
    each model takes the steps that it would take alone.

    Attributes:
        points: of each request, its own points first (T, n_train).
    """

    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def rngs(self, stream: int | None = None) -> list[np.random.Generator]:
        each = self.n_models // len(self.points)
        key = [] if stream is None else [stream]
        return [_Translated([self.seed, i % each, *key], self.points[i // each]) for i in range(self.n_models)]


@dataclass(frozen=True)
class _Foreseen:
    """An attributor that was asked already: predicted logits (N, n_points, n_classes) of the retrained models."""

    logits: np.ndarray

    def retrained(self, logits: np.ndarray, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.logits


def solve(world: World, asked: Asked, cases: Sequence[Case]) -> list[unlearn.Unlearned]:
    """Each case's result. Requests to one training set share steps, others have a thread each."""
    alone = [i for i, (_, method, _) in enumerate(cases) if len(asked.sites) > 1 or method in ALONE]
    found = dict(zip(alone, threads(world).run(lambda i: _one(world, asked, *cases[i]), alone), strict=True))
    rest: dict[tuple[str, str], list[int]] = {}
    for i in sorted(set(range(len(cases))) - set(alone)):
        rest.setdefault((cases[i][1], repr(cases[i][2])), []).append(i)
    problems: dict[tuple[int, ...], Several] = {}
    for group in rest.values():
        ts = tuple(cases[i][0] for i in group)
        if ts not in problems:
            problems[ts] = _several(world, asked, ts)
        _, method, setting = cases[group[0]]
        result = unlearn.get(method)(problems[ts], **setting)
        for i, margins, right in zip(
            group, *(np.split(z, len(ts)) for z in (result.margins, result.correct)), strict=True
        ):
            found[i] = replace(result, margins=margins, correct=right)
    return [found[i] for i in range(len(cases))]


def _problem(world: World, asked: Asked, t: int) -> unlearn.Problem:
    site = asked.site(t)
    return unlearn.Problem(
        originals=site.originals,
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


def _one(world: World, asked: Asked, t: int, method: str, setting: dict[str, Any]) -> unlearn.Unlearned:
    problem = _problem(world, asked, t)
    return unlearn.get(method)(replace(problem, originals=problem.originals.clone()), **setting)  # a module a thread


def _several(world: World, asked: Asked, ts: Sequence[int]) -> Several:
    """The requests number `ts` as one problem."""
    every = [_problem(world, asked, t) for t in ts]
    first, n = every[0], len(ts)
    return Several(
        originals=concatenate([first.originals] * n),
        original_logits=np.tile(first.original_logits, (n, 1, 1)),
        x=first.x,
        y=first.y,
        n_train=first.n_train,
        forget=np.arange(len(first.forget)),
        training=first.training,
        attributor=cast(Attributor, _Foreseen(np.concatenate([predicted_oracle(p) for p in every]))),
        oracle_logits=np.concatenate([asked.retrained[t] for t in ts]),
        seed=first.seed,
        execution=world.victim.execution,
        points=np.stack([np.concatenate([p.forget, p.retain]) for p in every]),
    )


def choose_options(world: World, prepared: Prepared) -> tuple[dict[str, dict[str, Any]], pd.DataFrame]:
    """Each method's setting: the one nearest to retraining on honest requests of the attack's size.

    They are class-pure sets of images alike, from the site without poison. Distance: mean over requests and over F, R
    and V of the mean absolute difference of mean margins to retrained models. No target plays a part.
    """
    s, site = world.s, prepared.places["honest"]
    rng = np.random.default_rng([s.seed, 7])
    albums = [world.album(world.half, s.n, rng) for _ in range(s.n_requests)]
    retrained = retrain(world, site, albums, 2 * s.n_models)
    asked = Asked("search", [site], albums, retrained[:, : s.n_models], [prepared.monitors["honest"].datamodel])
    goals = [metrics.margins(z[s.n_models :], site.data.y).mean(0) for z in retrained]
    grid = [(method, setting) for method, grid in OPTIONS.items() for setting in grid if len(grid) > 1]
    tried = [(t, *option) for option in grid for t in range(len(albums))]
    rows = []
    for (t, method, setting), result in zip(tried, solve(world, asked, tried), strict=True):
        gap = np.nan_to_num(np.abs(result.margins.mean(0) - goals[t]), nan=1e3, posinf=1e3)
        parts = ForgetSet("", albums[t]).splits(s.n, site.data.n_val).values()
        distance = float(np.mean([gap[part].mean() for part in parts]))
        rows.append({"method": method, "setting": repr(setting), "distance": distance})
    table = pd.DataFrame(rows).groupby(["method", "setting"], sort=False)["distance"].mean().reset_index()
    table = table.assign(setting=pd.Series([setting for _, setting in grid], dtype=object))
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
    cases = [(t, method, setting) for method, setting in options.items() for t in range(len(asked.requests))]
    before = [(metrics.margins(s.logits, s.data.y), metrics.correct(s.logits, s.data.y)) for s in asked.sites]
    tables = []
    for (t, method, _), result in zip(cases, solve(world, asked, cases), strict=True):
        n, target = asked.site(t).data.n_train, int(world.targets[t])
        after = result.margins, result.correct
        told = columns(after, before[t % len(before)], n + target, n + others)
        names = {"attack": asked.attack, "method": method, "target": target, "size": len(asked.requests[t])}
        tables.append(pd.DataFrame(names | {"model": np.arange(len(result.margins)), "cost": result.cost} | told))
    return pd.concat(tables, ignore_index=True)


def interval(table: pd.DataFrame, column: str, n_bootstrap: int = 500, seed: int = 0) -> metrics.Estimate:
    """Mean of a column with a 95 % interval: targets and models are both resampled."""
    values = table.pivot_table(index="target", columns="model", values=column, aggfunc="first").to_numpy(float)
    rng = np.random.default_rng(seed)
    t, m = values.shape
    of_targets, of_models = (rng.multinomial(n, np.full(n, 1 / n), n_bootstrap) / n for n in (t, m))
    low, high = np.percentile(((of_targets @ values) * of_models).sum(1), [2.5, 97.5])
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
    """KLoM's p95 of the served request: a row an attack, method and split, the mean over several requests.

    Each is served from `n_klom` originals and compared with as many retrained models; as many others are what oracle
    matching aims at, and the floor. The 95 % interval is Student's t over requests, whose spread holds the models'.
    "album" is the honest request for images alike.
    """
    rows = []
    for asked in _with_many_models(world, prepared):
        n = world.s.n_klom
        served = replace(asked, retrained=[z[:n] for z in asked.retrained])
        cases = [(t, method, setting) for method, setting in options.items() for t in range(len(asked.requests))]
        for (t, method, _), result in zip(cases, solve(world, served, cases), strict=True):
            data = asked.site(t).data
            parts = ForgetSet("", asked.requests[t]).splits(data.n_train, data.n_val)
            names = {"attack": asked.attack, "method": method, "request": t}
            rows += klom_rows(names, result.margins, metrics.margins(asked.retrained[t][n:], data.y), parts)
    return over_requests(rows)


def klom_rows(
    names: dict[str, Any], unlearned: np.ndarray, oracle: np.ndarray, splits: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """KLoM's p95 of margins (n_models, n_points), a row a split."""
    points = metrics.klom(unlearned, oracle)
    return [names | {"split": name, "value": np.percentile(points[i], 95)} for name, i in splits.items()]


def over_requests(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean of `klom_rows` over an attack's requests, with Student's 95 % interval."""
    by = pd.DataFrame(rows).groupby(["attack", "method", "split"], sort=False)["value"]
    table = by.agg(value="mean", n_requests="count", error="sem").reset_index()
    table["error"] *= student.ppf(0.975, table["n_requests"] - 1)
    return table.assign(low=(table["value"] - table["error"]).clip(lower=0), high=table["value"] + table["error"])


def _with_many_models(world: World, prepared: Prepared) -> list[Asked]:
    """An honest request's and each attack's first few requests, with `n_klom` originals and twice as many retrained.

    Poison for one target alone has models of its own.
    """
    s, every = world.s, prepared.asked
    rng = np.random.default_rng([s.seed, 10])
    albums = [world.album(world.half, s.n, rng) for _ in range(s.n_requests)]
    few = [replace(every["honest_datamodel"], attack="album", requests=albums)]
    for asked in every.values():
        if asked.attack != "never_trained":
            first = slice(s.n_requests)
            few.append(replace(asked, sites=asked.sites[first], requests=asked.requests[first]))
    pairs = [site.poison for asked in few for site in asked.sites]
    requests = [part for asked in few for part in np.array_split(np.stack(asked.requests), len(asked.sites))]
    done = iter(together(world, pairs, s.n_klom, [list(part) for part in requests], 2 * s.n_klom))
    many = []
    for asked in few:
        made = [next(done) for _ in asked.sites]
        many.append(replace(asked, sites=[site for site, _ in made], retrained=np.concatenate([z for _, z in made])))
    camouflage = next(asked for asked in many if asked.attack == "camouflage")
    return [*many, never_trained(world, many[0].sites[0], camouflage, 2 * s.n_klom)]
