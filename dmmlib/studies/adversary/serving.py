"""Every method of the study under every attack, as the service would run it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics, unlearn
from dmmlib.analysis.intervals import certain, means_over
from dmmlib.forget_sets import ForgetSet
from dmmlib.studies.adversary.experiments import Asked, Prepared, never_trained
from dmmlib.studies.adversary.world import World, retrain, together

Setting = dict[str, Any]
MATCHING = [{"cost": cost} for cost in (0.03, 0.1)]
OPTIONS: dict[str, list[Setting]] = {
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


def solve(
    world: World, asked: Asked, options: Iterable[tuple[str, Setting]]
) -> Iterator[tuple[int, str, Setting, unlearn.Unlearned]]:
    """Yield the result of each method and setting for each request, after the request's number and these."""

    def one(case: tuple[int, str, Setting]) -> tuple[int, str, Setting, unlearn.Unlearned]:
        t, method, setting = case
        site = asked.site(t)
        problem = unlearn.Problem(
            originals=site.originals.clone(),  # every thread has its own module
            original_logits=site.logits,
            x=site.x,
            y=site.y,
            n_train=site.data.n_train,
            forget=asked.requests[t],
            training=world.victim.training,
            attributor=asked.attributors[t % len(asked.attributors)],
            oracle_logits=asked.retrained[t],
            seed=world.s.seed,
        )
        return *case, unlearn.get(method)(problem, **setting)

    cases = [(t, *option) for option in options for t in range(len(asked.requests))]
    return world.victim.one_by_one.run(one, cases)


def choose_options(world: World, prepared: Prepared) -> tuple[dict[str, Setting], pd.DataFrame]:
    """Choose each method's setting: the one nearest to retraining on honest requests of the attack's size.

    They are class-pure sets of images alike, from the site without poison. Distance: mean over requests and over F, R
    and V of the mean absolute difference of mean margins to retrained models. No target plays a part.
    """
    s, site = world.s, prepared.places["honest"]
    albums = _albums(world, 7)
    retrained = retrain(world, site, albums, 2 * s.n_models)
    asked = Asked("search", [site], albums, retrained[:, : s.n_models], [prepared.monitors["honest"].datamodel])
    goals = [metrics.margins(z[s.n_models :], site.data.y).mean(0) for z in retrained]
    grid = [(method, setting) for method, settings in OPTIONS.items() for setting in settings if len(settings) > 1]
    rows = []
    for t, method, setting, result in solve(world, asked, grid):
        gap = np.nan_to_num(np.abs(result.margins.mean(0) - goals[t]), nan=1e3, posinf=1e3)
        parts = ForgetSet("", albums[t]).splits(s.n, site.data.n_val).values()
        rows.append((method, repr(setting), np.mean([gap[part].mean() for part in parts])))
    table = pd.DataFrame(rows, columns=["method", "setting", "distance"])
    table = table.groupby(["method", "setting"], sort=False)["distance"].mean().reset_index()
    table["setting"] = pd.Series([setting for _, setting in grid], dtype=object)
    nearest = table.loc[table.groupby("method")["distance"].idxmin()]
    best = {method: settings[0] for method, settings in OPTIONS.items()}
    return best | dict(zip(nearest["method"], nearest["setting"], strict=True)), table


def _albums(world: World, stream: int) -> list[np.ndarray]:
    """Honest requests for images alike."""
    rng = np.random.default_rng([world.s.seed, stream])
    return [world.album(world.s.n, rng) for _ in range(world.s.n_requests)]


def serve(world: World, asked: Asked, options: Mapping[str, Setting]) -> pd.DataFrame:
    """Record what each model answers after each method has served each request.

    Columns: attack, method, target, model, size, error and margin at the target, accuracy on V without the targets, the
    same three before the request, and cost.
    """
    others = np.setdiff1d(np.arange(world.data.n_val), world.targets)
    before = [(metrics.margins(s.logits, s.data.y), metrics.correct(s.logits, s.data.y)) for s in asked.sites]
    tables = []
    for t, method, _, result in solve(world, asked, options.items()):
        n, target = asked.site(t).data.n_train, int(world.targets[t])
        told = {"attack": asked.attack, "method": method, "target": target, "size": len(asked.requests[t])}
        told |= {"model": np.arange(len(result.margins)), "cost": result.cost}
        answers = {"": (result.margins, result.correct), " before": before[t % len(before)]}
        for when, (margins, correct) in answers.items():
            told |= {f"error{when}": ~correct[:, n + target], f"margin{when}": margins[:, n + target]}
            told[f"accuracy{when}"] = correct[:, n + others].mean(1)
        tables.append(pd.DataFrame(told))
    return pd.concat(tables, ignore_index=True)


def interval(table: pd.DataFrame, column: str, n_bootstrap: int = 500, seed: int = 0) -> metrics.Estimate:
    """Compute a column's mean with a 95 % interval: targets and models resampled; of bools all alike Wilson's."""
    (targets, row), (models, of) = (np.unique(table[name], return_inverse=True) for name in ("target", "model"))
    values = np.full((len(targets), len(models)), np.nan)
    values[row[::-1], of[::-1]] = table[column].to_numpy(float)[::-1]  # the first of several
    rng = np.random.default_rng(seed)
    of_targets, of_models = (rng.multinomial(n, np.full(n, 1 / n), n_bootstrap) / n for n in values.shape)
    draws = ((of_targets @ values) * of_models).sum(1)
    found = metrics.Estimate(float(values.mean()), *np.percentile(draws, [2.5, 97.5]).tolist())
    return certain(found, len(values)) if table[column].dtype == bool else found


def bounds(name: str, e: metrics.Estimate) -> dict[str, float]:
    """Write an estimate as columns: the name, and "low" and "high" after it."""
    return {name: e.value, f"{name} low": e.low, f"{name} high": e.high}


def summary(served: pd.DataFrame, by: Sequence[str] = ("attack", "method")) -> pd.DataFrame:
    """Summarise success and change of margin and of accuracy, with intervals, for each attack and method, or groups.

    "spread": standard deviation, over models, of the share of targets that a model errs on.
    """
    served = served.assign(change=served["margin"] - served["margin before"])
    estimated = {"success": "error", "before": "error before", "change": "change"}
    if "accuracy" in served:
        served["lost"] = served["accuracy"] - served["accuracy before"]
        estimated["lost"] = "lost"
    rows, means = list[Any](), [c for c in ("accuracy", "size", "cost") if c in served]
    for key, part in served.groupby(list(by), sort=False):
        row: dict[str, Any] = dict(zip(by, key, strict=True)) | {"n_targets": part["target"].nunique()}
        for name, column in estimated.items():
            row |= bounds(name, interval(part, column))
        row["spread"] = float(part.groupby("model")["error"].mean().std(ddof=1))
        rows.append(row | part[means].mean().to_dict())
    return pd.DataFrame(rows)


def distances(world: World, prepared: Prepared, options: Mapping[str, Setting]) -> pd.DataFrame:
    """Measure how far each attack's first few requests leave each method from retraining, on each split.

    Each is served from `n_compared` originals and compared with as many retrained models; as many others are what
    oracle matching aims at, and the floor. So few models fill KLoM's bins too sparsely (its floor is high), so the
    measures are those of `metrics.gap_summary`. "album" is the honest request for images alike.

    Returns:
        Columns attack, method, split, statistic ("mean_gap", "ks_share"), then value, low, high (mean over requests
        with Student's 95 % interval, whose spread holds the models') and n.
    """
    rows, n = list[dict[str, Any]](), world.s.n_compared
    for asked in _with_many_models(world, prepared):
        served = replace(asked, retrained=asked.retrained[:, :n])
        for t, method, _, result in solve(world, served, options.items()):
            data = asked.site(t).data
            splits = ForgetSet("", asked.requests[t]).splits(data.n_train, data.n_val)
            aim = metrics.margins(asked.retrained[t][n:], data.y)
            for split, found in metrics.gap_summary(result.margins, aim, splits, n_bootstrap=2).items():
                told = {"attack": asked.attack, "method": method, "split": split}
                rows += [told | {"statistic": name, "value": found[name].value} for name in ("mean_gap", "ks_share")]
    table = means_over(pd.DataFrame(rows), ["attack", "method", "split", "statistic"])
    return table.assign(low=table["low"].clip(lower=0))


def _with_many_models(world: World, prepared: Prepared) -> list[Asked]:
    """An honest request's and each attack's first few, with `n_compared` originals and twice as many retrained."""
    n, every, first = world.s.n_compared, prepared.asked, slice(world.s.n_requests)
    few = [replace(every["honest_datamodel"], attack="album", requests=_albums(world, 10))]
    few += [replace(asked, requests=asked.requests[first]) for name, asked in every.items() if name != "never_trained"]
    few = [replace(asked, sites=asked.sites[first]) for asked in few]
    poisons = [site.poison for asked in few for site in asked.sites]
    requests = [list(part) for asked in few for part in np.array_split(np.stack(asked.requests), len(asked.sites))]
    done, many = iter(together(world, poisons, n, requests, 2 * n)), list[Asked]()
    for asked in few:
        made, retrained = zip(*(next(done) for _ in asked.sites), strict=True)
        many.append(replace(asked, sites=list(made), retrained=np.concatenate(retrained)))
    camouflage = next(asked for asked in many if asked.attack == "camouflage")
    return [*many, never_trained(world, many[0].sites[0], camouflage, 2 * n)]
