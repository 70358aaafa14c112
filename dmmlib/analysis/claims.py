"""The eight claims of the paper, each judged from a run's tidy tables alone.

A claim is a function of the tables that gives a verdict and a sentence with the numbers behind it. The rule by which
it judges is fixed, written next to it, and shown with the verdict. A method counts as ahead only where the interval
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from dmmlib.analysis.intervals import median_over
from dmmlib.analysis.looks import label
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
    """A judged claim."""

    number: int  # in the paper's order
    text: str
    rule: str  # when it counts as shown
    verdict: Verdict
    finding: str  # what this run says, with numbers and 95 % intervals, or what is missing


Judgement = tuple[Verdict, str]
Judge = Callable[[Tables], Judgement]
_JUDGES: list[tuple[str, str, Judge]] = []


class _Absent(Exception):
    """The tables do not hold what a claim needs."""


def _claim(text: str, rule: str) -> Callable[[Judge], Judge]:
    def add(judge: Judge) -> Judge:
        _JUDGES.append((text, rule, judge))
        return judge

    return add


def judge(tables: Tables) -> list[Claim]:
    """Return all claims, in the paper's order; `not run` where the tables lack what one needs."""
    claims = []
    for number, (text, rule, rate) in enumerate(_JUDGES, 1):
        try:
            claims.append(Claim(number, text, rule, *rate(tables)))
        except _Absent as absent:
            claims.append(Claim(number, text, rule, "not run", f"Not run: {absent}."))
    return claims


# --- the tables, as the claims read them -----------------------------------------------------------------


def is_baseline(method: str) -> bool:
    """Return whether a method is neither a reference nor one that matches or answers with predictions."""
    return method not in ("do_nothing", "retrain") and not method.startswith(("oracle_matching", "dm_direct", "dmm"))


def _table(tables: Tables, name: str, *columns: str) -> pd.DataFrame:
    if name not in tables or tables[name].empty:
        raise _Absent(f"the run has no {name}.csv")
    missing = [c for c in columns if c not in tables[name]]
    if missing:
        raise _Absent(f"{name}.csv lacks the column {missing[0]!r}; run it again with this version")
    return tables[name]


def _statistic(tables: Tables, statistic: str, *methods: str, split: str = "forget") -> list[pd.DataFrame]:
    """value, low and high, each a table (forget sets, methods) that has the methods asked for."""
    results = _table(tables, "results", "forget_set", "method", "split", "statistic", "value", "low", "high")
    here = results[(results["statistic"] == statistic) & (results["split"] == split)]
    if here.empty:
        raise _Absent(f"results.csv has no {statistic} on {split} points")
    order = here["method"].unique()
    if missing := [method for method in methods if method not in order]:
        raise _Absent(f"the run has no {label(missing[0])}")
    return [here.pivot(index="forget_set", columns="method", values=v)[order] for v in ("value", "low", "high")]


def _datamodels(tables: Tables, statistic: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of a statistic on forget points, and of the LDS."""
    columns = ("n_subsets", "forget_set", "split", "statistic", "value", "low", "high")
    table = _table(tables, "datamodels", *columns)
    here = table[(table["statistic"] == statistic) & (table["split"] == "forget")]
    if here.empty:
        raise _Absent(f"datamodels.csv has no {statistic} on forget points")
    return here, table[table["statistic"] == "lds"]


def _baselines(values: pd.DataFrame) -> list[str]:
    found = [m for m in map(str, values) if is_baseline(m)]
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
    value, low, high = _statistic(tables, "klom_p95", "retrain")
    names, floor = _baselines(value), high["retrain"]
    holds = low[names].min(axis=1) > floor
    finding = (
        f"the best baseline of a set ends at a median forget p95 of {median_over(value[names].min(axis=1))}, "
        f"retraining at {median_over(value['retrain'])}"
    )
    if "trajectories" in tables:
        path = _table(tables, "trajectories", "forget_set", "method", "split", "p95", "under", "over")
        path = path[path["method"].isin(names) & (path["split"] == "forget")]
        moments = path.loc[path.groupby("forget_set")["p95"].idxmin()].set_index("forget_set")
        holds &= moments["p95"].reindex(holds.index).fillna(np.inf) > floor
        finding += (
            f"; at the best moment of the best baseline it is {median_over(moments['p95'])}, with "
            f"{moments['under'].median():.0%} of F under- and {moments['over'].median():.0%} over-unlearned by more "
            "than a standard deviation (medians)"
        )
    listed = "; ".join(map(label, names))
    return _verdict(holds), f"On {_of(holds)} every baseline ({listed}) stays above retraining: {finding}."


@_claim(
    "With true oracles, oracle matching has no such problem.",
    f"On every forget set its forget p95 lies below every baseline's, intervals apart, and its interval reaches "
    f"down to {NEAR} x retraining's value.",
)
def oracle_matching(tables: Tables) -> Judgement:
    value, low, high = _statistic(tables, "klom_p95", "oracle_matching", "retrain")
    validation = _statistic(tables, "klom_p95", split="validation")[0]
    ahead = high["oracle_matching"] < low[_baselines(value)].min(axis=1)
    near = low["oracle_matching"] <= NEAR * value["retrain"]
    return _verdict(ahead & near), (
        f"Ahead of every baseline on {_of(ahead)}, near retraining on {_of(near)}: median forget p95 "
        f"{median_over(value['oracle_matching'])} against {median_over(value['retrain'])}, validation "
        f"{median_over(validation['oracle_matching'])} against {median_over(validation['retrain'])}."
    )


@_claim(
    "Datamodels predict oracle outputs.",
    "On every forget set predicted and true changes of the mean margin on F correlate by more than 0.5, intervals "
    "included.",
)
def prediction(tables: Tables) -> Judgement:
    rows, lds = _datamodels(tables, "correlation")
    slope, rows = _datamodels(tables, "slope")[0]["value"], rows.set_index("forget_set")
    last = lds.sort_values("n_subsets").groupby("split")[["value", "low", "high"]].last()
    listed = "".join(f"; LDS on {split} points {Estimate(*ends)}" for split, *ends in last.itertuples())
    holds = rows["low"] > 0.5
    return _verdict(holds), (
        f"Above 0.5 on {_of(holds)}: median correlation {median_over(rows['value'])}, lowest {rows['value'].min():.2f} "
        f"({rows['value'].idxmin()}), median slope of true on predicted {median_over(slope)}{listed}."
    )


@_claim(
    "DM-direct, answering with the prediction, is near the floor.",
    f"On every forget set the interval of its forget p95 reaches down to {NEAR} x retraining's value.",
)
def direct(tables: Tables) -> Judgement:
    value, low, high = _statistic(tables, "klom_p95", "dm_direct", "retrain", "do_nothing")
    holds = low["dm_direct"] <= NEAR * value["retrain"]
    better = high["dm_direct"] < low["do_nothing"]
    worst = str(value["dm_direct"].idxmax())
    return _verdict(holds), (
        f"Near on {_of(holds)}, ahead of doing nothing on {_of(better)}: median forget p95 "
        f"{median_over(value['dm_direct'])}, retraining {median_over(value['retrain'])}, doing nothing "
        f"{median_over(value['do_nothing'])}; worst on {worst} ({value['dm_direct'][worst]:.2f})."
    )


@_claim(
    "DMM is near oracle matching and ahead of every gradient baseline, at a small part of retraining's cost.",
    f"On every forget set its forget p95 lies below every baseline's, intervals apart; its interval reaches down to "
    f"{NEAR} x oracle matching's value; and it costs at most {CHEAP:g} of a retraining. In part if the first holds "
    "on at least half of the sets.",
)
def matching(tables: Tables) -> Judgement:
    value, low, high = _statistic(tables, "klom_p95", "dmm", "oracle_matching")
    cost = _statistic(tables, "cost", split="all")[0]["dmm"]
    baselines = _baselines(value)
    ahead = high["dmm"] < low[baselines].min(axis=1)
    near = low["dmm"] <= NEAR * value["oracle_matching"]
    cheap = cost.reindex(value.index) <= CHEAP
    verdict = _verdict(ahead & near & cheap)
    return "in part" if verdict == "refuted" and ahead.mean() >= 0.5 else verdict, (
        f"Ahead of every baseline on {_of(ahead)}, near oracle matching on {_of(near)}: median forget p95 "
        f"{median_over(value['dmm'])} against {median_over(value['oracle_matching'])}, and "
        f"{median_over(value[baselines].min(axis=1))} for the best baseline of a set. It costs a median "
        f"{cost.median():.2f} of a retraining per request; the datamodel comes on top, before the first request."
    )


@_claim(
    "Better attribution gives lower KLoM: progress in attribution carries over.",
    "On every forget set DM-direct's forget p95 with the most subset models lies below that with the fewest, intervals "
    "apart, and the LDS rises.",
)
def attribution(tables: Tables) -> Judgement:
    here, lds = _datamodels(tables, "klom_p95")
    few, many = here["n_subsets"].min(), here["n_subsets"].max()
    if few == many:
        raise _Absent("datamodels.csv has KLoM for fewer than two numbers of subset models")
    ends = here.pivot(index="forget_set", columns="n_subsets", values=["value", "low", "high"])
    lower = ends["high"][many] < ends["low"][few]
    mean = lds.groupby("n_subsets")["value"].mean()
    known = {few, many} <= set(mean.index)
    text = f"LDS from {mean[few]:.2f} to {mean[many]:.2f}" if known else "LDS not recorded"
    return _verdict(lower & (known and mean[many] > mean[few])), (
        f"From M = {few:,} to {many:,} subset models, {text}: clearly lower KLoM on {_of(lower)}, median forget p95 "
        f"from {median_over(ends['value'][few])} to {median_over(ends['value'][many])}."
    )


@_claim(
    "In the linear setting matching converges at a rate that does not suffer from R's small eigenvalues.",
    "In ridge regression the best matching on training points costs at most twice as much at the highest condition "
    "number as at the lowest, wherever F lies.",
)
def linear(tables: Tables) -> Judgement:
    table = _table(tables, "convex", "problem", "condition", "method", "cost")
    low, high = table["condition"].min(), table["condition"].max()
    if low == high:
        raise _Absent("convex.csv has a single condition number")
    cost = table.pivot_table(index=["method", "problem"], columns="condition", values="cost", sort=False)
    growth = (cost[high] / cost[low]).where(np.isfinite(cost[high]), np.inf).unstack("problem")
    growth = growth[table["problem"].unique()]
    found = growth[growth.index.isin(["OM on F", "OM on S"])].fillna(np.inf)
    if found.empty or "GD on R" not in growth.index:
        raise _Absent("convex.csv has no matching, or no descent")
    parts = [
        f"{problem}: {best} x {found[problem][best]:,.3g}, GD on R x {growth[problem]['GD on R']:,.3g}"
        for problem, best in found.idxmin().items()
    ]
    finding = f"Cost at condition number {high:,.0f} over cost at {low:,.0f}, exact: {'; '.join(parts)}."
    return _verdict(found.min() <= 2), finding


@_claim(
    "U-LiRA's accuracy against DMM is near 50 %.",
    f"On every forget set the interval of its mean accuracy on F comes within {100 * CHANCE:.0f} points of 50 %.",
)
def attack(tables: Tables) -> Judgement:
    value, low, _ = _statistic(tables, "u_lira", "dmm", "retrain", "do_nothing")
    holds = low["dmm"] <= 0.5 + CHANCE
    return _verdict(holds), (
        f"Near chance on {_of(holds)}: median accuracy {median_over(value['dmm'])} against DMM, "
        f"{median_over(value['retrain'])} against retraining itself, {median_over(value['do_nothing'])} "
        "where nothing is done."
    )
