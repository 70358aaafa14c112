"""When to stop: could a method that unlearns points at different times do with another stopping time?

Georgiev et al., "Attribute-to-Delete", ICLR 2025, say that no stopping time suits all points. Here a method may stop at
its end, at the one recorded moment that is best for F as a whole, or, as no method can, at every point's own best.
The best of many noisy moments looks better than it is, so moments are chosen with one half of the models and judged
with the other, in turn; all numbers, the floor's too, are then of N / 2 models and comparable with each other only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.analysis.claims import is_baseline, over_sets
from dmmlib.errors import DataError
from dmmlib.metrics import Estimate

if TYPE_CHECKING:
    from dmmlib.forget_sets import ForgetSet
    from dmmlib.study import Study

STOPS = {"end": "at its end", "common": "best common moment", "own": "each point's own moment"}
COLUMNS = ["forget_set", "method", "stop", "value", "low", "high", "cost", "under", "over", "n_models"]


def path(study: Study, method: str, forget_set: ForgetSet) -> tuple[np.ndarray, np.ndarray]:
    """A method's way from the originals on: costs (n_moments,), margins on F (n_moments, N, n_forget).

    Methods that record no trajectory have one moment, their end.
    """
    result = study.unlearned(method, forget_set)
    if not len(result.costs):
        return np.array([result.cost]), result.margins[None, :, forget_set.indices]
    start = metrics.margins(study.original_logits()[:, forget_set.indices], study.data.y[forget_set.indices])
    return np.array([0.0, *result.costs]), np.concatenate([start[None], result.trajectory[:, :, forget_set.indices]])


def gaps(margins: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Mean margin minus the oracles', in the oracles' standard deviations; above 0 is under-unlearned.

    Args:
        margins: (n_moments, n_models, n_points).
        oracle: (n_oracles, n_points).

    Returns:
        (n_moments, n_points).
    """
    return (margins.mean(1) - oracle.mean(0)) / np.maximum(oracle.std(0), 1e-6)


def judge(
    margins: np.ndarray, oracle: np.ndarray, n_bootstrap: int = 50, seed: int = 0
) -> tuple[dict[str, Estimate], float]:
    """KLoM's 95th percentile over points for each of `STOPS`, cross-fitted, and what own moments gain.

    Args:
        margins: (n_moments, N, n_points).
        oracle: (n_oracles, n_points).

    Returns:
        Estimates "end", "common", "own" and "gain" (common minus own, resampled together), with 95 % intervals over
        models given the moments chosen; and the mean number of the common moment.

    Raises:
        DataError: for fewer than four models on either side.
    """
    if min(margins.shape[1], len(oracle)) < 4:
        raise DataError(f"A stopping time got {margins.shape[1]} models and {len(oracle)} oracles; give at least 4.")
    n_moments, _, n_points = margins.shape
    values = {stop: np.zeros(n_points) for stop in STOPS}
    draws = {stop: np.zeros((n_bootstrap, n_points)) for stop in STOPS}
    chosen = []
    for fold in (0, 1):
        choosing = np.stack([metrics.klom(at[fold::2], oracle[fold::2]) for at in margins])
        common = int(np.percentile(choosing, 95, axis=1).argmin())
        moments = {"end": np.full(n_points, n_moments - 1), "common": np.full(n_points, common)}
        moments["own"] = choosing.argmin(0)
        chosen.append(common)
        judged = [metrics.klom_draws(at[1 - fold :: 2], oracle[1 - fold :: 2], n_bootstrap, seed) for at in margins]
        point, resampled = (np.stack(part) for part in zip(*judged, strict=True))
        for stop, at in moments.items():
            values[stop] += point[at, np.arange(n_points)] / 2
            draws[stop] += resampled[at, :, np.arange(n_points)].T / 2
    p95 = {stop: float(np.percentile(v, 95)) for stop, v in values.items()}
    drawn = {stop: np.percentile(d, 95, axis=1) for stop, d in draws.items()}
    p95["gain"], drawn["gain"] = p95["common"] - p95["own"], drawn["common"] - drawn["own"]
    errors = {name: 1.96 * float(np.std(d, ddof=1)) for name, d in drawn.items()}
    low = {name: v - errors[name] if name == "gain" else max(0.0, v - errors[name]) for name, v in p95.items()}
    return {name: Estimate(v, low[name], v + errors[name]) for name, v in p95.items()}, float(np.mean(chosen))


def table(study: Study) -> pd.DataFrame:
    """Every method on every forget set: a row a way to stop, and one for what own moments gain.

    Returns:
        Columns forget_set, method, stop (see `STOPS`, and "gain"), value, low, high (KLoM's 95th percentile on F), cost
        (of the moment; NaN for own moments), under and over (shares of F more than one of the oracles' standard
        deviations above and below their mean margin), n_models (that a KLoM is of).
    """
    rows = []
    for forget_set in study.forget_sets().values():
        oracle = study.reference(forget_set)[0][:, forget_set.indices]
        for method in study.preset.unlearning.methods:
            costs, margins = path(study, method, forget_set)
            estimates, common = judge(margins, oracle)
            away = gaps(margins, oracle)
            at = {"end": len(costs) - 1, "common": round(common)}
            for stop, e in estimates.items():
                moment = at.get(stop)
                extra = [np.nan] * 3 if moment is None else [costs[moment], *_shares(away[moment])]
                rows.append([forget_set.name, method, stop, e.value, e.low, e.high, *extra, len(oracle) // 2])
    return pd.DataFrame(rows, columns=COLUMNS)


def _shares(gap: np.ndarray) -> tuple[float, float]:
    return float((gap > 1).mean()), float((gap < -1).mean())


def shares(study: Study) -> pd.DataFrame:
    """Share of F under- and over-unlearned on the way, from the originals on.

    Returns:
        Columns forget_set, method, moment (share of the method's run, 0 to 1), cost, under, over.
    """
    rows = []
    for forget_set in study.forget_sets().values():
        oracle = study.reference(forget_set)[0][:, forget_set.indices]
        for method in study.preset.unlearning.methods:
            costs, margins = path(study, method, forget_set)
            for i, away in enumerate(gaps(margins, oracle) if len(costs) > 1 else ()):
                rows.append((forget_set.name, method, i / (len(costs) - 1), costs[i], *_shares(away)))
    return pd.DataFrame(rows, columns=["forget_set", "method", "moment", "cost", "under", "over"])


def medians(stops: pd.DataFrame) -> pd.DataFrame:
    """`table` in a line a method: medians over forget sets, with how many sets own moments clearly gain on."""
    wide = stops.pivot_table(index="method", columns="stop", values="value", aggfunc="median", sort=False)
    common = stops[stops["stop"] == "common"].groupby("method", sort=False)[["cost", "under", "over"]].median()
    gain = stops[stops["stop"] == "gain"].set_index("method")
    common["sets that gain"] = [
        f"{int((gain.loc[[m], 'low'] > 0).sum())} of {len(gain.loc[[m]])}" for m in common.index
    ]
    return wide[list(STOPS)].rename(columns=STOPS).join(common.add_prefix("common: ").rename(columns=_PLAIN))


_PLAIN = {"common: sets that gain": "sets where own moments gain"}


def verdict(stops: pd.DataFrame) -> str:
    """What the numbers say of the claim that no stopping time suits all points, in sentences."""
    at = {stop: rows.set_index(["method", "forget_set"]) for stop, rows in stops.groupby("stop")}
    floor = at["end"].loc["retrain"]
    every = [m for m in stops["method"].unique() if m not in ("do_nothing", "retrain", "dm_direct")]
    sentences = []
    for name, methods in (
        ("Gradient baselines", [m for m in every if is_baseline(m)]),
        ("Oracle matching and DMM", [m for m in every if not is_baseline(m)]),
    ):
        pairs = [(m, f) for m in methods for f in floor.index]
        if not pairs:
            continue
        n = len(pairs)
        above = {
            stop: sum(at[stop].loc[(m, f), "low"] > floor.loc[f, "high"] for m, f in pairs)
            for stop in ("common", "own")
        }
        gain = sum(at["gain"].loc[pair, "low"] > 0 for pair in pairs)
        median = {stop: over_sets(at[stop]["value"].loc[methods].groupby("forget_set").min()) for stop in STOPS}
        sentences.append(
            f"**{name}** ({n} pairs of method and forget set): even at the best common moment {above['common']} stay "
            f"clearly above retraining; a moment of each point's own clearly lowers {gain} of the {n}, and still "
            f"leaves {above['own']} above. The best of them on a set has a median p95 of {median['end']} at its end, "
            f"{median['common']} at the best common moment and {median['own']} at own moments; retraining has "
            f"{over_sets(floor['value'])}."
        )
    return "\n\n".join(sentences) or "The run has neither a gradient baseline nor a matching method."
