"""Search hyperparameters on tuning sets; `score` is what a search minimises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.execution import Execution
from dmmlib.progress import Progress, silent
from dmmlib.unlearn import Method, Problem, Registered, Unlearned

STOPS = 4  # moments of a run at which it may stop: after 1/4, 2/4, ... of its steps
RUNGS = (12, 1)  # what the tuning models are divided by: all settings are tried on few models, the best on all
KEPT = 8  # of so many settings one survives a rung
ALONE = Execution()  # one after the other
AT_LEAST = (4, 2)  # models on a rung, and settings that survive it


@dataclass(frozen=True)
class Trial:
    """A tuning set that settings are tried on."""

    name: str  # of the set
    problem: Problem
    oracles: np.ndarray  # margins (n_oracles, n_points) of retrained models
    splits: Mapping[str, np.ndarray]  # name -> positions of points


Moment = tuple[dict[str, Any], dict[str, Any]]
"""Share of the steps and cost at which a method may stop, and its `score` there."""


def score(unlearned: np.ndarray, oracles: np.ndarray, splits: Mapping[str, np.ndarray]) -> dict[str, float]:
    """KLoM's 95th percentile on each split, and as "score" their mean, which a search minimises.

    With few models the percentile jumps; "mean", that of mean KLoM over splits, then says more of what it will be.

    Args:
        unlearned, oracles: margins (n_models, n_points); where unlearned ones diverged, KLoM is at its maximum.
        splits: name -> positions of points.
    """
    found, means = dict[str, float](), list[float]()
    for name, indices in metrics.positions(splits, oracles.shape[1]).items():
        values = np.full(len(indices), -np.log(metrics.FLOOR))
        if np.isfinite(unlearned[:, indices]).all():
            values = metrics.klom(unlearned[:, indices], oracles[:, indices])
        found[name] = float(np.percentile(values, 95))
        means.append(float(values.mean()))
    return found | {"score": float(np.mean(list(found.values()))), "mean": float(np.mean(means))}


def rungs(n_models: int, n_settings: int) -> list[tuple[int, int]]:
    """How many models each rung of a search has, and how many settings are tried on them."""
    models = sorted({max(min(AT_LEAST[0], n_models), n_models // part) for part in RUNGS})
    few = min(AT_LEAST[1], n_settings)
    if few == n_settings:  # there is nothing to halve
        models = models[-1:]
    return [(n, max(few, math.ceil(n_settings / KEPT**i))) for i, n in enumerate(models)]


def search(
    name: str,
    method: Method,
    settings: Sequence[dict[str, Any]],
    trials: Sequence[Trial],
    progress: Progress = silent,
    halve: bool = True,
    execution: Execution = ALONE,
) -> pd.DataFrame:
    """Try every setting of a method on every tuning set: on few models, and what has the least mean KLoM on more.

    Successive halving (Jamieson and Talwalkar, AISTATS 2016) with the same models for all settings; not if `halve` is
    False. A method that records a trajectory is judged at each of its moments, so that all are stopped early alike.
    `execution` says how many are tried at a time.

    Returns:
        One row per setting, stop and set, those that got furthest first, and of these the best: setting (its number),
        stop (share of its steps), n_models (of its last rung), forget_set, cost, the options, `score` of the result,
        and spent (on the setting and the set over all `rungs`, in retrainings). mean_score is the mean over sets, which
        decides.
    """
    n = trials[0].problem.n_models
    left, spent, rows = list(range(len(settings))), dict[tuple[int, str], float](), dict[int, list[dict[str, Any]]]()

    def attempt(task: tuple[int, int, int]) -> tuple[float, list[Moment]]:  # small, as it may go to another process
        n_models, number, i = task
        trial = trials[number]
        problem = few(trial.problem, n_models)
        if execution.workers > 1:  # others have the other cores
            problem = dataclasses.replace(problem, execution=dataclasses.replace(problem.execution, workers=1))
        result = method(problem, **settings[i])
        return result.cost, list(_moments(result, trial))

    for n_models, n_settings in rungs(n, len(settings)) if halve else [(n, len(settings))]:
        left = left[:n_settings]
        tried = [(n_models, number, i) for number in range(len(trials)) for i in left]
        rows |= {i: [] for i in left}
        progress(f"search {name} on {n_models} models", 0, len(tried))
        outcomes = zip(tried, execution.run(attempt, tried), strict=True)
        for done, ((_, number, i), (cost, found)) in enumerate(outcomes, 1):
            trial = trials[number]
            spent[i, trial.name] = spent.get((i, trial.name), 0.0) + n_models * cost
            about = {"setting": i, "n_models": n_models, "forget_set": trial.name, "spent": spent[i, trial.name]}
            rows[i] += [about | moment | settings[i] | measured for moment, measured in found]
            progress(f"search {name} on {n_models} models", done, len(tried))
        means = pd.DataFrame([row for i in left for row in rows[i]]).groupby(["setting", "stop"])["mean"].mean()
        left = means.groupby("setting").min().sort_values(kind="stable").index.tolist()  # at its best stop, best first
    table = pd.DataFrame([row for tries in rows.values() for row in tries])
    table["mean_score"] = table.groupby(["setting", "stop"])["score"].transform("mean")
    order = ["n_models", "mean_score", "setting", "stop", "forget_set"]
    return table.sort_values(order, ascending=[False, True, True, True, True], ignore_index=True)


def _moments(result: Unlearned, trial: Trial) -> Iterator[Moment]:
    moments = len(result.trajectory)
    for k in range(1, STOPS + 1) if moments > 1 else [STOPS]:
        at = max(1, round(k * moments / STOPS)) - 1
        margins = result.margins if k == STOPS else result.trajectory[at]
        cost = result.cost if k == STOPS else float(result.costs[at])
        yield {"stop": k / STOPS, "cost": cost}, score(margins, trial.oracles, trial.splits)


def few(problem: Problem, n: int) -> Problem:
    """The problem of the first n models, with a trajectory of `STOPS` moments."""
    earlier = None if problem.earlier is None else (problem.earlier[0], problem.earlier[1][:n])
    originals, logits = problem.originals[:n], problem.original_logits[:n]
    return dataclasses.replace(problem, originals=originals, original_logits=logits, earlier=earlier, checkpoints=STOPS)


def edges(method: Registered, chosen: Mapping[str, Any]) -> list[str]:
    """Options with a chosen value at an end of their grid, unless nothing lies beyond it (`Registered.limits`)."""
    grids = {k: v for k, v in method.space.items() if len(v) > 1 and not isinstance(v[0], (bool, str))}
    return [k for k, v in grids.items() if chosen[k] in (min(v), max(v)) and chosen[k] not in method.limits.get(k, ())]
