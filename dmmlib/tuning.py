"""Search hyperparameters on tuning sets; `score` is what a search minimises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.progress import Progress, silent
from dmmlib.unlearn import Method, Problem


@dataclass(frozen=True)
class Trial:
    """A tuning set that settings are tried on."""

    name: str  # of the set
    problem: Problem
    oracles: np.ndarray  # margins (n_oracles, n_points) of retrained models
    splits: Mapping[str, np.ndarray]  # name -> positions of points


def score(unlearned: np.ndarray, oracles: np.ndarray, splits: Mapping[str, np.ndarray]) -> dict[str, float]:
    """KLoM's 95th percentile on each split, and as "score" their mean, which a search minimises.

    Args:
        unlearned, oracles: margins (n_models, n_points); where unlearned ones diverged, KLoM is at its maximum.
        splits: name -> positions of points.
    """
    found = {}
    for name, indices in splits.items():
        values = np.full(len(indices), -np.log(metrics.FLOOR))
        if np.isfinite(unlearned[:, indices]).all():
            values = metrics.klom(unlearned[:, indices], oracles[:, indices])
        found[name] = float(np.percentile(values, 95))
    return found | {"score": float(np.mean(list(found.values())))}


def search(
    name: str,
    method: Method,
    settings: Sequence[dict[str, Any]],
    trials: Iterable[Trial],
    progress: Progress = silent,
) -> pd.DataFrame:
    """Try every setting of a method on every tuning set.

    Returns:
        One row per setting and set, the best setting first: setting (its number), forget_set, cost, the options,
        and `score` of the result; mean_score is the mean over sets, which decides.
    """
    rows = []
    for trial in trials:
        for i, setting in enumerate(settings):
            progress(f"search {name} on {trial.name}", i, len(settings))
            result = method(trial.problem, **setting)
            measured = score(result.margins, trial.oracles, trial.splits)
            rows.append({"setting": i, "forget_set": trial.name, "cost": result.cost, **setting, **measured})
        progress(f"search {name} on {trial.name}", len(settings), len(settings))
    table = pd.DataFrame(rows)
    table["mean_score"] = table.groupby("setting")["score"].transform("mean")
    return table.sort_values(["mean_score", "setting", "forget_set"], ignore_index=True)
