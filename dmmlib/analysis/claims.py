"""The eight claims of the paper, each judged from a run's tidy tables alone.

A claim is a function of the tables that gives a verdict and a sentence with the numbers behind it. The rule by which
it judges is fixed, written next to it, and shown with the verdict. A method counts as ahead only where the interval
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from dmmlib.analysis.plots import label
from dmmlib.metrics import Estimate

Tables = Mapping[str, pd.DataFrame]
"""File name without .csv -> table: results, trajectories, datamodels, convex; see `Study.results`,
`Study.trajectories` and `evidence`."""

Verdict = Literal["shown", "in part", "refuted", "not run"]

NEAR = 1.5  # times the other's value
CHEAP = 0.25  # of one retraining
CHANCE = 0.05  # from 50 %


@dataclass(frozen=True)
class Claim:
    """A judged claim.

    Attributes:
        number: as in the list above `CLAIMS`.
        text: what is claimed.
        rule: when it counts as shown.
        finding: what this run says, with numbers and 95 % intervals, or what is missing.
    """

    number: int
    text: str
    rule: str
    verdict: Verdict
    finding: str


Judgement = tuple[Verdict, str]
_JUDGES: list[tuple[str, str, Callable[[Tables], Judgement]]] = []


class _Absent(Exception):
    """The tables do not hold what a claim needs."""


def _claim(text: str, rule: str) -> Callable[[Callable[[Tables], Judgement]], Callable[[Tables], Judgement]]:
    def add(judge: Callable[[Tables], Judgement]) -> Callable[[Tables], Judgement]:
        _JUDGES.append((text, rule, judge))
        return judge

    return add


def judge(tables: Tables) -> list[Claim]:
    """All claims, in the paper's order; `not run` where the tables lack what one needs."""
    claims = []
    for number, (text, rule, rate) in enumerate(_JUDGES, 1):
        verdict: Verdict = "not run"
        try:
            verdict, finding = rate(tables)
        except _Absent as absent:
            finding = f"Not run: {absent}."
        claims.append(Claim(number, text, rule, verdict, finding))
    return claims


# --- the tables, as the claims read them -----------------------------------------------------------------


def over_sets(values: pd.Series | Sequence[float], seed: int = 0) -> Estimate:
    """Median over forget sets, with a 95 % percentile interval from resampling the sets."""
    array = np.asarray(values, float)
    draws = np.random.default_rng(seed).integers(len(array), size=(2000, len(array)))
    low, high = np.percentile(np.median(array[draws], axis=1), [2.5, 97.5])
    return Estimate(float(np.median(array)), float(low), float(high))


def is_baseline(method: str) -> bool:
    """Whether a method is neither a reference nor one that matches or answers with predictions."""
    return method not in ("do_nothing", "retrain") and not method.startswith(("oracle_matching", "dm_direct", "dmm"))


def _table(tables: Tables, name: str, columns: Sequence[str]) -> pd.DataFrame:
    if name not in tables or tables[name].empty:
        raise _Absent(f"the run has no {name}.csv")
    missing = [c for c in columns if c not in tables[name]]
    if missing:
        raise _Absent(f"{name}.csv lacks the column {missing[0]!r}; run it again with this version")
    return tables[name]


def _statistic(tables: Tables, statistic: str, split: str = "forget") -> dict[str, pd.DataFrame]:
    """value, low and high, each a table (forget sets, methods)."""
    results = _table(tables, "results", ["forget_set", "method", "split", "statistic", "value", "low", "high"])
    here = results[(results["statistic"] == statistic) & (results["split"] == split)]
    if here.empty:
        raise _Absent(f"results.csv has no {statistic} on {split} points")
    order = here["method"].unique()
    return {v: here.pivot(index="forget_set", columns="method", values=v)[order] for v in ("value", "low", "high")}


def _need(frames: dict[str, pd.DataFrame], *methods: str) -> None:
    for method in methods:
        if method not in frames["value"]:
            raise _Absent(f"the run has no {label(method)}")


def _baselines(frames: dict[str, pd.DataFrame]) -> list[str]:
    found = [m for m in map(str, frames["value"]) if is_baseline(m)]
    if not found:
        raise _Absent("the run has no gradient baseline")
    return found


def _verdict(holds: pd.Series) -> Verdict:
    share = float(holds.mean())
    return "shown" if share == 1 else "in part" if share >= 0.5 else "refuted"


def _of(holds: pd.Series) -> str:
    return f"{int(holds.sum())} of {len(holds)} forget sets"


# --- the claims ------------------------------------------------------------------------------------------


@_claim(
    "Gradient baselines leave or overshoot part of F: points unlearn at different times, so no stopping time suits "
    "all.",
    "On every forget set every baseline's forget p95 stays above retraining, its interval clear of retraining's, and "
    "no recorded moment on the way gets below that interval.",
)
def stopping_times(tables: Tables) -> Judgement:
    p95 = _statistic(tables, "klom_p95")
    _need(p95, "retrain")
    names = _baselines(p95)
    floor = p95["high"]["retrain"]
    holds = p95["low"][names].min(axis=1) > floor
    best = p95["value"][names].min(axis=1)
    finding = (
        f"the best baseline of a set ends at a median forget p95 of {over_sets(best)}, retraining at "
        f"{over_sets(p95['value']['retrain'])}"
    )
    if "trajectories" in tables:
        path = _table(tables, "trajectories", ["forget_set", "method", "split", "p95"])
        path = path[path["method"].isin(names) & (path["split"] == "forget")]
        moments = path.loc[path.groupby("forget_set")["p95"].idxmin()].set_index("forget_set")
        holds &= moments["p95"].reindex(holds.index).fillna(np.inf) > floor
        finding += f"; at the best moment of the best baseline it is {over_sets(moments['p95'])}"
        if "under" in path:
            finding += (
                f", with {moments['under'].median():.0%} of F under- and {moments['over'].median():.0%} over-unlearned "
                "by more than a standard deviation (medians)"
            )
    listed = "; ".join(label(m) for m in names)
    return _verdict(holds), f"On {_of(holds)} every baseline ({listed}) stays above retraining: {finding}."


@_claim(
    "With true oracles, oracle matching has no such problem.",
    f"On every forget set its forget p95 lies below every baseline's, intervals apart, and its interval reaches "
    f"down to {NEAR} x retraining's value.",
)
def oracle_matching(tables: Tables) -> Judgement:
    p95, validation = _statistic(tables, "klom_p95"), _statistic(tables, "klom_p95", "validation")
    _need(p95, "oracle_matching", "retrain")
    ahead = p95["high"]["oracle_matching"] < p95["low"][_baselines(p95)].min(axis=1)
    near = p95["low"]["oracle_matching"] <= NEAR * p95["value"]["retrain"]
    return _verdict(ahead & near), (
        f"Ahead of every baseline on {_of(ahead)}, near retraining on {_of(near)}: median forget p95 "
        f"{over_sets(p95['value']['oracle_matching'])} against {over_sets(p95['value']['retrain'])}, validation "
        f"{over_sets(validation['value']['oracle_matching'])} against {over_sets(validation['value']['retrain'])}."
    )


@_claim(
    "Datamodels predict oracle outputs.",
    "On every forget set predicted and true changes of the mean margin on F correlate by more than 0.5, intervals "
    "included.",
)
def prediction(tables: Tables) -> Judgement:
    table = _table(tables, "datamodels", ["n_subsets", "forget_set", "split", "statistic", "value", "low", "high"])
    rows = table[(table["statistic"] == "correlation") & (table["split"] == "forget")].set_index("forget_set")
    slope = table[(table["statistic"] == "slope") & (table["split"] == "forget")]["value"]
    if rows.empty or slope.empty:
        raise _Absent("datamodels.csv has no correlation on forget points")
    lds = table[table["statistic"] == "lds"].sort_values("n_subsets").groupby("split").last()
    text = "; ".join(
        f"LDS on {split} points {Estimate(row['value'], row['low'], row['high'])}" for split, row in lds.iterrows()
    )
    holds = rows["low"] > 0.5
    return _verdict(holds), (
        f"Above 0.5 on {_of(holds)}: median correlation {over_sets(rows['value'])}, lowest {rows['value'].min():.2f} "
        f"({rows['value'].idxmin()}), median slope of predicted against true {over_sets(slope)}"
        f"{'; ' + text if text else ''}."
    )


@_claim(
    "DM-direct, answering with the prediction, is near the floor.",
    f"On every forget set the interval of its forget p95 reaches down to {NEAR} x retraining's value.",
)
def direct(tables: Tables) -> Judgement:
    p95 = _statistic(tables, "klom_p95")
    _need(p95, "dm_direct", "retrain", "do_nothing")
    value = p95["value"]
    holds = p95["low"]["dm_direct"] <= NEAR * value["retrain"]
    better = p95["high"]["dm_direct"] < p95["low"]["do_nothing"]
    worst = str(value["dm_direct"].idxmax())
    return _verdict(holds), (
        f"Near on {_of(holds)}, ahead of doing nothing on {_of(better)}: median forget p95 "
        f"{over_sets(value['dm_direct'])}, retraining {over_sets(value['retrain'])}, doing nothing "
        f"{over_sets(value['do_nothing'])}; worst on {worst} "
        f"({value['dm_direct'][worst]:.2f})."
    )


@_claim(
    "DMM is near oracle matching and ahead of every gradient baseline, at a small part of retraining's cost.",
    f"On every forget set its forget p95 lies below every baseline's, intervals apart; its interval reaches down to "
    f"{NEAR} x oracle matching's value; and it costs at most {CHEAP:g} of a retraining. In part if the first holds "
    "on at least half of the sets.",
)
def matching(tables: Tables) -> Judgement:
    p95 = _statistic(tables, "klom_p95")
    cost = _statistic(tables, "cost", "all")["value"]
    _need(p95, "dmm", "oracle_matching")
    value = p95["value"]
    ahead = p95["high"]["dmm"] < p95["low"][_baselines(p95)].min(axis=1)
    near = p95["low"]["dmm"] <= NEAR * value["oracle_matching"]
    cheap = cost["dmm"].reindex(value.index) <= CHEAP
    all_three = _verdict(ahead & near & cheap)
    verdict: Verdict = "in part" if all_three == "refuted" and ahead.mean() >= 0.5 else all_three
    return verdict, (
        f"Ahead of every baseline on {_of(ahead)}, near oracle matching on {_of(near)}: median forget p95 "
        f"{over_sets(value['dmm'])} against {over_sets(value['oracle_matching'])}, and "
        f"{over_sets(value[_baselines(p95)].min(axis=1))} for the best baseline of a set. It costs a median "
        f"{cost['dmm'].median():.2f} of a retraining a request; the datamodel comes on top, once for all requests."
    )


@_claim(
    "Better attribution gives lower KLoM: progress in attribution carries over.",
    "On every forget set DM-direct's forget p95 with the most subset models lies below that with the fewest, intervals "
    "apart, and the LDS rises.",
)
def attribution(tables: Tables) -> Judgement:
    table = _table(tables, "datamodels", ["n_subsets", "forget_set", "split", "statistic", "value", "low", "high"])
    here = table[(table["statistic"] == "klom_p95") & (table["split"] == "forget")]
    if here["n_subsets"].nunique() < 2:
        raise _Absent("datamodels.csv has KLoM for fewer than two numbers of subset models")
    frames = {v: here.pivot(index="forget_set", columns="n_subsets", values=v) for v in ("value", "low", "high")}
    few, many = frames["value"].columns.min(), frames["value"].columns.max()
    lower = frames["high"][many] < frames["low"][few]
    lds = table[table["statistic"] == "lds"].groupby("n_subsets")["value"].mean()
    rises = many in lds and few in lds and lds[many] > lds[few]
    text = f"LDS from {lds[few]:.2f} to {lds[many]:.2f}" if many in lds and few in lds else "LDS not recorded"
    return _verdict(lower & rises), (
        f"From M = {few:,} to {many:,} subset models, {text}: clearly lower KLoM on {_of(lower)}, median forget p95 "
        f"from {over_sets(frames['value'][few])} to {over_sets(frames['value'][many])}."
    )


@_claim(
    "In the linear setting matching converges at a rate that does not suffer from R's small eigenvalues.",
    "In ridge regression the best matching on training points costs at most twice as much at the highest condition "
    "number as at the lowest, wherever F lies.",
)
def linear(tables: Tables) -> Judgement:
    table = _table(tables, "convex", ["problem", "condition", "method", "cost"])
    low, high = table["condition"].min(), table["condition"].max()
    if low == high:
        raise _Absent("convex.csv has a single condition number")
    cost = table.pivot_table(index=["problem", "method"], columns="condition", values="cost", sort=False)
    matchers = [m for m in cost.index.get_level_values("method").unique() if m in ("OM on F", "OM on S")]
    if not matchers or "GD on R" not in cost.index.get_level_values("method"):
        raise _Absent("convex.csv has no matching, or no descent")
    growth = (cost[high] / cost[low]).where(np.isfinite(cost[high]), np.inf)
    holds, parts = {}, []
    for problem in cost.index.get_level_values("problem").unique():
        here = growth[problem]
        best = here.reindex(matchers).fillna(np.inf).idxmin()
        holds[problem] = here[best] <= 2
        parts.append(f"{problem}: {best} x {here[best]:,.3g}, GD on R x {here['GD on R']:,.3g}")
    verdict = _verdict(pd.Series(holds))
    return verdict, f"Cost at condition number {high:,.0f} over cost at {low:,.0f}, exact: " + "; ".join(parts) + "."


@_claim(
    "U-LiRA's accuracy against DMM is near 50 %.",
    f"On every forget set the interval of its mean accuracy on F comes within {100 * CHANCE:.0f} points of 50 %.",
)
def attack(tables: Tables) -> Judgement:
    lira = _statistic(tables, "u_lira")
    _need(lira, "dmm", "retrain", "do_nothing")
    holds = lira["low"]["dmm"] <= 0.5 + CHANCE
    return _verdict(holds), (
        f"Near chance on {_of(holds)}: median accuracy {over_sets(lira['value']['dmm'])} against DMM, "
        f"{over_sets(lira['value']['retrain'])} against retraining itself, {over_sets(lira['value']['do_nothing'])} "
        "where nothing is done."
    )
