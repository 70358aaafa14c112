"""Judge claims that were written down before a run (docs/claims.yaml), from its results over seeds never used before.

A claim compares a method with another, or with all baselines, on all pairs of seed and forget set whose set's name
matches `sets`: by the ratio of their values, by the difference, or, against baselines, by whether its interval lies
wholly below each of theirs. Over pairs it is the mean that counts (geometric, of ratios), with Student's interval at
the level of all claims divided by their number (Bonferroni): shown where the interval lies within the bound `at_most`,
refuted where it lies beyond, open between. Or it is every pair: shown where all are within it, and else refuted.
"""

from __future__ import annotations

from dataclasses import astuple
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import ValidationError, model_validator

from dmmlib.analysis.claims import is_baseline
from dmmlib.analysis.intervals import mean_over
from dmmlib.errors import PresetError
from dmmlib.metrics import Estimate
from dmmlib.presets import Fraction, NonNegativeInt, Section, Some


class Claim(Section):
    """One claim; see the module."""

    id: str
    text: str
    form: Literal["ratio", "difference", "ahead"]
    over: Literal["mean", "every"] = "every"
    statistic: str
    split: str
    method: str
    to: str = "baselines"
    sets: str = "*"
    at_most: float = 0.0

    @model_validator(mode="after")
    def _whole(self) -> Claim:
        if (self.form == "ahead") != (self.to == "baselines") or (self.form == "ahead" and self.over == "mean"):
            raise ValueError(
                f"form {self.form!r} is over {self.over!r} pairs, to {self.to!r}; ahead is of baselines, every"
            )
        return self


class Plan(Section):
    """Claims, the seeds they are judged on and the level of all of them together."""

    seeds: Some[NonNegativeInt]
    level: Fraction
    claims: Some[Claim]


def load(path: Path) -> Plan:
    """Read what is to be judged; PresetError where the file is no such plan."""
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise PresetError(f"{path} holds no claims ({error!s:.300}); see docs/claims.md.") from error


def judge(plan: Plan, results: pd.DataFrame) -> pd.DataFrame:
    """Judge all claims from results of all seeds: `Study.results` with a column seed.

    Returns:
        Columns id, claim, value (a mean, with low and high, or the share of pairs within the bound), n (pairs) and
        verdict: shown, open, refuted, or not run where the results lack what the claim needs.
    """
    rows = [_judge(claim, results, plan.level / len(plan.claims)) for claim in plan.claims]
    return pd.DataFrame(rows, columns=["id", "claim", "value", "low", "high", "n", "verdict"])


def _judge(claim: Claim, results: pd.DataFrame, level: float) -> tuple[str, str, float, float, float, int, str]:
    here = results[(results["statistic"] == claim.statistic) & (results["split"] == claim.split)]
    here = here[np.array([fnmatchcase(name, claim.sets) for name in here["forget_set"]], bool)]
    baselines = [m for m in here["method"].unique() if is_baseline(m)]
    others = baselines if claim.form == "ahead" else [claim.to]
    if not others or not {claim.method, *others} <= set(here["method"]):
        return claim.id, claim.text, np.nan, np.nan, np.nan, 0, "not run"
    wide = here.pivot_table(["value", "low", "high"], ["seed", "forget_set"], "method", sort=False)
    own = wide.xs(claim.method, axis=1, level=1)
    least = wide.loc[:, pd.IndexSlice[:, others]].T.groupby(level=0).min().T
    value, other = own["value"], least["value"]
    holds = {
        "ahead": own["high"] < least["low"],
        "ratio": value <= claim.at_most * other,
        "difference": value - other <= claim.at_most,
    }[claim.form]
    if claim.over == "every":
        verdict = "shown" if holds.all() else "refuted"
        return claim.id, claim.text, float(holds.mean()), np.nan, np.nan, len(holds), verdict
    log = claim.form == "ratio"
    pairs = np.asarray(value / other if log else value - other)
    found = mean_over(pairs, log, level) if len(pairs) > 1 else Estimate(float(pairs[0]), -np.inf, np.inf)
    verdict = "shown" if found.high <= claim.at_most else "refuted" if found.low > claim.at_most else "open"
    return claim.id, claim.text, *astuple(found), len(pairs), verdict


def written(plan: Plan) -> str:
    """Write the claims as a Markdown table, for docs/claims.md."""
    lines = ["| id | claim | measure | over pairs | bound |", "| --- | --- | --- | --- | --- |"]
    for c in plan.claims:
        sets = "" if c.sets == "*" else f", sets `{c.sets}`"
        measure = f"{c.statistic}, {c.split}: {c.form} of {c.method} to {c.to}{sets}"
        lines.append(f"| {c.id} | {c.text} | {measure} | {c.over} | {f'{c.at_most:g}' if c.at_most else ''} |")
    return "\n".join(lines)


def verdicts(judged: pd.DataFrame, page: str = "docs/claims.md") -> str:
    """Write what `judge` found as a Markdown table, for the README, or for a page that leads elsewhere."""
    counts = judged["verdict"].value_counts()
    lines = ["| claim | measured | pairs | verdict |", "| --- | --- | --- | --- |"]
    for row in judged.to_dict("records"):
        every = f"holds on {row['value']:.0%}" if row["n"] else ""
        digits = 2 if abs(row["value"]) >= 0.05 else 4  # differences of accuracy are small
        mean = f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        lines.append(f"| {row['claim']} | {every if np.isnan(row['low']) else mean} | {row['n']} | {row['verdict']} |")
    said = ", ".join(f"{counts[v]} {v}" for v in ("shown", "open", "refuted", "not run") if v in counts)
    seeds = "on seeds of data, models and forget sets, backdoors included, that nothing was chosen on"
    return f"{said[0].upper()}{said[1:]}, of {len(judged)} [claims]({page}), {seeds}:\n\n" + "\n".join(lines)
