"""When to stop: could a method that unlearns points at different times do with another stopping time?

Georgiev et al., "Attribute-to-Delete", ICLR 2025, say that no stopping time suits all points. Here a method may stop at
its end, at the one recorded moment that is best for F as a whole, or, as no method can, at every point's own best.
The best of many noisy moments looks better than it is, so moments are chosen with one half of the models and judged
with the other, in turn; all numbers, the floor's too, are then of N / 2 models and comparable with each other only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.analysis.claims import is_baseline
from dmmlib.analysis.intervals import median_over
from dmmlib.analysis.looks import STOPS
from dmmlib.errors import DataError
from dmmlib.forget_sets import ForgetSet
from dmmlib.metrics import Estimate
from dmmlib.study import Study


def path(study: Study, method: str, forget_set: ForgetSet) -> tuple[np.ndarray, np.ndarray]:
    """Follow a method from the originals on: costs (n_moments,) and margins on F (n_moments, N, n_forget).

    Methods that record no trajectory have one moment, their end.
    """
    result, here = study.unlearned(method, forget_set), forget_set.indices
    if not len(result.costs):
        return np.array([result.cost]), result.margins[None, :, here]
    start = metrics.margins(study.original_logits()[:, here], study.data.y[here])
    return np.array([0.0, *result.costs]), np.concatenate([start[None], result.trajectory])


def gaps(margins: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Compute `metrics.gaps` at each moment; above 0 is under-unlearned.

    Takes margins (n_moments, n_models, n_points) and those of oracles (n_oracles, n_points): (n_moments, n_points).
    """
    return np.stack([metrics.gaps(at, oracle) for at in margins])


def judge(margins: np.ndarray, oracle: np.ndarray, n_bootstrap: int = 50) -> tuple[dict[str, Estimate], float]:
    """Compute KLoM's 95th percentile over points for each of `STOPS`, cross-fitted, and what own moments gain.

    Args:
        margins: (n_moments, N, n_points).
        oracle: (n_oracles, n_points).

    Returns:
        Estimates "end", "common", "own" and "gain" (common minus own, resampled together), with 95 % intervals over
        models given the moments chosen; and the mean number of the common moment.

    Raises DataError for fewer than four models on either side.
    """
    if min(margins.shape[1], len(oracle)) < 4:
        raise DataError(f"A stopping time got {margins.shape[1]} models and {len(oracle)} oracles; give at least 4.")
    points = np.arange(margins.shape[2])
    found = {stop: np.zeros((1 + n_bootstrap, len(points))) for stop in STOPS}  # the estimate, then its resamples
    chosen = []
    for fold in (0, 1):
        choosing = np.stack([metrics.klom(at[fold::2], oracle[fold::2]) for at in margins])
        chosen.append(int(np.percentile(choosing, 95, axis=1).argmin()))
        judged = [metrics.klom_draws(at[1 - fold :: 2], oracle[1 - fold :: 2], n_bootstrap) for at in margins]
        kloms = np.stack([np.vstack(draws) for draws in judged])
        for stop, at in zip(STOPS, (-1, chosen[-1], choosing.argmin(0)), strict=True):
            found[stop] += kloms[at, :, points].T / 2
    p95 = {stop: np.percentile(kloms, 95, axis=1) for stop, kloms in found.items()}
    estimates = {stop: Estimate.normal(float(v[0]), np.std(v[1:], ddof=1), least=0) for stop, v in p95.items()}
    gain = p95["common"] - p95["own"]
    return estimates | {"gain": Estimate.normal(float(gain[0]), np.std(gain[1:], ddof=1))}, float(np.mean(chosen))


def _ways(study: Study) -> Iterator[tuple[str, str, np.ndarray, np.ndarray, np.ndarray]]:
    """Forget set, method, `path`, and the oracles' margins on F, of every method on every forget set."""
    for forget_set in study.forget_sets().values():
        oracle = study.reference(forget_set)[0][:, forget_set.indices]
        for method in study.methods:
            yield forget_set.name, method, *path(study, method, forget_set), oracle


def _shares(gap: np.ndarray) -> tuple[float, float]:
    return float((gap > 1).mean()), float((gap < -1).mean())


def table(study: Study) -> pd.DataFrame:
    """Measure every method on every forget set: a row for each way to stop, and one for what own moments gain.

    Returns:
        Columns forget_set, method, stop (see `STOPS`, and "gain"), value, low, high (KLoM's 95th percentile on F), cost
        (of the moment; NaN for own moments), under and over (shares of F more than one of the oracles' standard
        deviations above and below their mean margin), n_models (that a KLoM is of).
    """
    rows = []
    for forget_set, method, costs, margins, oracle in _ways(study):
        estimates, common = judge(margins, oracle)
        away = gaps(margins, oracle)
        extra = {stop: (costs[at], *_shares(away[at])) for stop, at in (("end", -1), ("common", round(common)))}
        for stop, e in estimates.items():
            rows.append((forget_set, method, stop, *astuple(e), *extra.get(stop, [np.nan] * 3), len(oracle) // 2))
    columns = ["forget_set", "method", "stop", "value", "low", "high", "cost", "under", "over", "n_models"]
    return pd.DataFrame(rows, columns=columns)


def shares(study: Study) -> pd.DataFrame:
    """Compute the share of F that is under- and over-unlearned on the way, from the originals on.

    Returns:
        Columns forget_set, method, moment (cost as a share of the whole run's, 0 to 1), cost, under, over. Sets have
        moments of their own: interpolate before a mean is taken over sets.
    """
    rows = [
        (forget_set, method, costs[i] / costs[-1], costs[i], *_shares(away))
        for forget_set, method, costs, margins, oracle in _ways(study)
        if len(costs) > 1
        for i, away in enumerate(gaps(margins, oracle))
    ]
    return pd.DataFrame(rows, columns=["forget_set", "method", "moment", "cost", "under", "over"])


def medians(stops: pd.DataFrame) -> pd.DataFrame:
    """Summarise `table`, one line for each method: medians over sets, and on how many sets own moments clearly gain."""
    wide = stops.pivot_table(index="method", columns="stop", values="value", aggfunc="median", sort=False)
    common = stops[stops["stop"] == "common"].groupby("method", sort=False)[["cost", "under", "over"]].median()
    gains = (stops[stops["stop"] == "gain"].set_index("method")["low"] > 0).groupby("method")
    table = wide[list(STOPS)].rename(columns=STOPS).join(common.add_prefix("common: "))
    table["sets where own moments gain"] = gains.sum().astype(str) + " of " + gains.size().astype(str)
    return table


def verdict(stops: pd.DataFrame) -> str:
    """Say what the numbers make of the claim that no stopping time suits all points."""
    ends = stops.pivot_table(["value", "low", "high"], ["method", "forget_set"], "stop", sort=False)
    floor = ends.xs("retrain", level="method")
    every = [m for m in stops["method"].unique() if m.partition("@")[0] not in ("do_nothing", "retrain", "dm_direct")]
    sentences = []
    for name, kind in {"Gradient baselines": True, "Oracle matching and DMM": False}.items():
        if not (methods := [m for m in every if is_baseline(m) is kind]):
            continue
        here = ends.loc[methods]
        n, gain, alone = len(here), (here["low", "gain"] > 0).sum(), "dmm" in methods  # not oracles, who know
        high = floor["high", "end"].reindex(here.index, level="forget_set")
        above = {stop: (here["low", stop] > high).sum() for stop in ("common", "own")}
        lowest = here["value"].loc["dmm"] if alone else here["value"].groupby("forget_set").min()
        median = {stop: median_over(lowest[stop]) for stop in STOPS}
        which = "DMM alone has a" if alone else "The lowest of them on each set has a"
        sentences.append(
            f"**{name}** ({n} pairs of method and forget set): even at the best common moment {above['common']} stay "
            f"clearly above retraining; a moment of each point's own clearly lowers {gain} of the {n}, and still "
            f"leaves {above['own']} above. {which} median p95 of {median['end']} at its end, "
            f"{median['common']} at the best common moment and {median['own']} at own moments; retraining has "
            f"{median_over(floor['value', 'end'])}."
        )
    return "\n\n".join(sentences) or "The run has neither a gradient baseline nor a matching method."
