"""Did a method forget a set? The answer in words, from a run's main table alone, by a rule that is fixed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from dmmlib.analysis.looks import SHARP, label
from dmmlib.metrics import Estimate

Answer = Literal["yes", "mostly", "in part", "no", "nothing to forget"]
MOSTLY, PARTLY = 0.25, 0.75  # of the way from doing nothing to retraining that may be left
RULE = (
    "Yes: no measure of the forgotten images (KLoM, mean gap, KS tests, U-LiRA) has an interval above that of "
    "retraining against itself. Otherwise by what is left of the way in KLoM's 95th percentile: mostly up to "
    f"{MOSTLY:.0%}, in part up to {PARTLY:.0%}, no beyond."
)


@dataclass(frozen=True)
class Verdict:
    """What a method did to a forget set."""

    forget_set: str
    method: str
    answer: Answer
    headline: str  # the answer in a sentence
    forgotten: str  # what the forgotten images show, against doing nothing and against the floor
    paid: str  # what images that stay, and validation accuracy, paid
    price: str


def method_of(results: pd.DataFrame) -> str:
    """Name the method that a run is about: DMM, or the first that is no reference and is not told the answers."""
    methods = list(results["method"].unique())
    able = [m for m in methods if m not in ("do_nothing", "retrain") and not m.startswith("oracle_matching")]
    return "dmm" if "dmm" in methods else (able or methods)[0]


def judge(results: pd.DataFrame, forget_set: str, method: str = "") -> Verdict:
    """Judge a method, `method_of` the results by default, on a forget set; raises KeyError for what they lack."""
    method = method or method_of(results)
    table = results[results["forget_set"] == forget_set].set_index(["statistic", "split", "method"]).sort_index()
    n, name = int(table["n_models"].max()), label(method)

    def row(statistic: str, who: str, split: str = "forget") -> Any:
        return table.loc[(statistic, split, who), :]

    def estimate(found: Any) -> Estimate:
        return Estimate(found["value"], found["low"], found["high"])

    def beyond(statistic: str, who: str, split: str = "forget") -> bool:
        known = (statistic, split, who) in table.index and (statistic, split, "retrain") in table.index
        return bool(known and row(statistic, who, split)["low"] > row(statistic, "retrain", split)["high"])

    told = [s for s in SHARP if beyond(s, method)]
    nothing, floor, here = (row("klom_p95", who) for who in ("do_nothing", "retrain", method))
    way = nothing["value"] - floor["value"]
    done = 1 - (here["value"] - floor["value"]) / way if way > 0 else 1.0
    never = "models that never saw these images"
    if not any(beyond(s, "do_nothing") for s in SHARP):
        answer: Answer = "nothing to forget"
        headline = f"There was nothing to forget: even the original models can't be told from {never}."
    elif not told:
        answer = "yes"
        headline = f"Yes, as far as N = {n} models of each kind can tell: {name} can't be told from {never}."
    else:
        answer = "mostly" if done >= 1 - MOSTLY else "in part" if done >= 1 - PARTLY else "no"
        went = f"{name} went {done:.0%} of the way to" if done > 0 else f"{name} came no nearer to"
        headline = f"{answer.capitalize()}: {went} {never}, and can be told from them."
    forgotten = (
        f"KLoM of the forgotten images (95th percentile) is {estimate(here)}; it was {nothing['value']:.1f} before, "
        f"and is {floor['value']:.2f} for retraining against itself."
    )
    if ("ks_share", "forget", method) in table.index:
        shares = [row("ks_share", who)["value"] for who in (method, "do_nothing", "retrain")]
        forgotten += " A KS test tells {:.0%} of them from retraining; before {:.0%}, by chance {:.0%}.".format(*shares)
    stay, usual = row("klom_p95", method, "retain"), row("klom_p95", "retrain", "retain")
    verb = "were disturbed" if any(beyond(s, method, "retain") for s in SHARP) else "can't be told from retraining"
    paid = f"Images that stay {verb}: KLoM {estimate(stay)}, floor {usual['value']:.2f}."
    if ("accuracy_gap", "validation", method) in table.index:
        gap = row("accuracy_gap", method, "validation")["value"]
        paid += f" Validation accuracy is {abs(gap):.1%} {'above' if gap > 0 else 'below'} retraining's."
    cost = row("cost", method, "all")["value"]
    price = f"{name} cost {cost:.0%} of a retraining for each model." if cost else f"{name} trains nothing."
    return Verdict(forget_set, method, answer, headline, forgotten, paid, price)
