"""Tables that a reader can take in: tidy results, laid out by forget set and method."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import tuning, unlearn
from dmmlib.analysis.claims import is_baseline
from dmmlib.analysis.intervals import ks_power, mean_over
from dmmlib.analysis.looks import HEADLINE, SHARP, SPLITS, STATISTICS, label
from dmmlib.study import Study

N_BEST = 3  # baselines in the README, beside these
MATCHING = ("do_nothing", "retrain", "oracle_matching", "dm_direct", "dmm", "dmm@ridge", "dmm_adam")


def main_table(results: pd.DataFrame, statistic: str = "klom_p95") -> pd.DataFrame:
    """Write a statistic of `Study.results` with its interval on forget, retain and validation points, and the cost.

    Returns:
        Rows (forget set, method), columns forget, retain, validation, cost: text. An interval of no width is left out.
    """
    keys = ["forget_set", "method"]
    here = results[results["statistic"] == statistic]
    digits = 3 if statistic in ("accuracy_gap", "ks_share", "ks_fdr") else 2
    ends = here[["value", "low", "high"]].map(f"{{:.{digits}f}}".format)
    interval = (" [" + ends["low"] + ", " + ends["high"] + "]").where(ends["low"] != ends["high"], "")
    here = here.assign(text=ends["value"] + interval)
    table = here.pivot_table(index=keys, columns="split", values="text", aggfunc="first", sort=False)[list(SPLITS)]
    table["cost"] = results[results["statistic"] == "cost"].set_index(keys)["value"].map("{:.3f}".format)
    table = table.rename(index=label, level="method").rename_axis(columns=None)
    return table.rename_axis(index={"forget_set": "forget set"})


def told_apart(results: pd.DataFrame) -> pd.DataFrame:
    """Say what tells each method from retraining: intervals apart, the method's above, on any split.

    Returns:
        Rows (forget set, method), one bool for each measure of `SHARP` that the results hold. A method is at the floor
        on a set where none of them tells.
    """
    keys = ["forget_set", "method"]
    here = results[results["statistic"].isin(SHARP)]
    ends = here.pivot_table(["low", "high"], keys, ["statistic", "split"], sort=False)
    floor = ends["high"].xs("retrain", level="method").reindex(ends.index, level="forget_set")
    return pd.DataFrame((ends["low"] > floor).T.groupby(level="statistic", sort=False).any().T)


def at_the_floor(results: pd.DataFrame) -> pd.Series:
    """Count for each method the forget sets on which no measure of `SHARP`, on any split, tells it from retraining."""
    return (~told_apart(results).any(axis=1)).groupby("method", sort=False).sum()


def medians(results: pd.DataFrame) -> pd.DataFrame:
    """Compute the median over forget sets of each method's statistics: one line for each method.

    Columns, where the results hold them: on each split the mean gap, the share of points that a KS test tells apart and
    KLoM p95; then forget U-LiRA, validation accuracy gap, at the floor (sets), cost.
    """
    table = results.pivot_table(
        index="method", columns=["statistic", "split"], values="value", aggfunc="median", sort=False
    )
    shown = {f"{split} {STATISTICS[name]}": (name, split) for split in SPLITS for name in HEADLINE}
    shown |= {"forget U-LiRA": ("u_lira", "forget"), "validation accuracy gap": ("accuracy_gap", "validation")}
    columns = {words: table[at] for words, at in shown.items() if at in table}
    if "retrain" in table.index:
        columns["at the floor"] = at_the_floor(results).map(f"{{}} of {results['forget_set'].nunique()}".format)
    return pd.DataFrame(columns | {"cost": table["cost", "all"]}).reindex(table.index).rename(index=label)


def klom_p95(results: pd.DataFrame) -> pd.DataFrame:
    """Select KLoM's 95th percentile alone: columns forget_set, method, split, value."""
    return results.loc[results["statistic"] == "klom_p95", ["forget_set", "method", "split", "value"]]


def replications(table: pd.DataFrame) -> pd.DataFrame:
    """Lay out the main table of several pairs of data and model: columns pair, seed, and those of `klom_p95`.

    Returns:
        Rows (pair, method), columns the splits: text, the median over forget sets, its geometric mean over seeds with
        a 95 % t-interval. "best baseline" is, for each forget set and split, the lowest of all baselines; "ahead" is
        how many forget sets, of all seeds, there are on which the method's forget KLoM is below every baseline's.
    """
    keys = ["pair", "seed", "forget_set", "split"]
    baseline = table["method"].map(is_baseline)
    best = table[baseline].groupby(keys, sort=False)["value"].min().rename("best").reset_index()
    known = table[~baseline].merge(best, on=keys, how="left")
    every = pd.concat([known, best.rename(columns={"best": "value"}).assign(method="best baseline")])
    rows: dict[tuple[str, str], dict[str, str]] = {}
    order = ("do_nothing", "best baseline", "oracle_matching", "dm_direct", "dmm", "retrain")
    for pair, method in itertools.product(every["pair"].unique(), order):
        part = every[(every["pair"] == pair) & (every["method"] == method)]
        if part.empty:
            continue
        row = {}
        for split, here in part.groupby("split"):
            medians = here.groupby("seed")["value"].median().to_numpy()
            row[str(split)] = str(mean_over(medians, log=True)) if len(medians) > 1 else f"{medians[0]:.2f}"
        forget = part[(part["split"] == "forget") & part["best"].notna()]
        row["ahead"] = f"{(forget['value'] < forget['best']).sum()} of {len(forget)}" if len(forget) else ""
        rows[pair, label(method)] = row
    return pd.DataFrame(rows).T[[*SPLITS, "ahead"]]


def by_set(results: pd.DataFrame, statistic: str = "klom_p95", split: str = "forget") -> pd.DataFrame:
    """Lay out a statistic on a split: one line for each method, one column for each forget set."""
    here = results[(results["statistic"] == statistic) & (results["split"] == split)]
    table = here.pivot_table(index="method", columns="forget_set", values="value", sort=False)
    return table.rename(index=label).rename_axis(columns=None)


def requests(results: pd.DataFrame) -> pd.DataFrame:
    """Lay out what was asked for and what came of it, of a run whose data has probes, such as the preset `requests`.

    Returns:
        Rows (forget set, method), columns the mean gap and the KS share on forget, retain and validation points, then
        the accuracy on each probe that answers the set's request: what a requester of that set looks at.
    """
    keys = ["forget_set", "method"]
    wide = results.pivot_table(index=keys, columns=["statistic", "split"], values="value", sort=False)
    columns = {
        f"{split} {STATISTICS[name]}": wide[name, split] for name in ("mean_gap", "ks_share") for split in SPLITS
    }
    for probe in (split for split in results["split"].unique() if split not in (*SPLITS, "all")):
        columns[f"{probe}: share"] = wide["accuracy", probe]
    return pd.DataFrame(columns).rename(index=label, level="method").rename_axis(index={"forget_set": "forget set"})


def setting(value: Any) -> str:
    """Write the value of an option."""
    return str(value) if isinstance(value, (str, bool)) else f"{value:g}"


def catalogue(methods: Iterable[str] | None = None) -> pd.DataFrame:
    """Describe methods (all of them if None) before they run: one line for each, in the order given.

    Columns source, cost (sample gradients of each model, as a formula), searched (the grid), elsewhere; text.
    """
    rows = {}
    for name in methods or unlearn.names():
        entry = unlearn.get(name)
        grid = {option: values for option, values in entry.space.items() if len(values) > 1}
        searched = "; ".join(f"{option} {', '.join(map(setting, values))}" for option, values in grid.items())
        rows[label(name)] = [entry.paper, entry.cost, searched or "nothing", entry.elsewhere or "not known"]
    columns = ["source", "cost", "searched", "elsewhere"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("method")


def searches(study: Study, methods: Iterable[str]) -> pd.DataFrame:
    """Say what was found for each method that has something to search: one line for each.

    Columns method, chosen (options, and the share of steps after which it stops), score (see `tuning.score`), median
    score of those tried (on as many models as each got to), tried (settings), retrainings (what the search spent, in
    sample gradients), and edge: options chosen at an end of their grid that could be widened.
    """
    rows = []
    for name in methods:
        if len(unlearn.configurations(name, study.preset.tuning.budget)) > 1:
            found, chosen = study.search(name), study.tuned(name)
            scores = found.groupby("setting")["mean_score"].min()
            spent = found.drop_duplicates(["setting", "forget_set"])["spent"].sum()
            written = ", ".join(f"{option} = {setting(value)}" for option, value in chosen.items())
            edge = ", ".join(tuning.edges(unlearn.get(name), chosen))
            rows.append((label(name), written, found["mean_score"].iloc[0], scores.median(), len(scores), spent, edge))
    columns = ["method", "chosen", "score", "median score of those tried", "tried", "retrainings", "edge"]
    return pd.DataFrame(rows, columns=columns)


def powers(n_models: int) -> str:
    """Say what a KS test at a point can see with so many models of each kind: a shift in the oracles' sd, its power."""
    told = [f"of {shift:g} sd in {ks_power(n_models, shift):.0%}" for shift in (0.25, 0.5, 1.0)]
    return f"a shift {', '.join(told)} of cases"


def by_sets(results: pd.DataFrame) -> str:
    """Write docs/results.md: medians, and the main statistics of the forgotten points on each forget set."""
    held = [name for name in HEADLINE if (results["statistic"] == name).any()]
    parts = "\n\n".join(f"## Forget {STATISTICS[name]}\n\n{markdown(by_set(results, name))}" for name in held)
    head = "# Results set by set\n\nWritten by `make publish`, of the laptop preset."
    return f"{head}\n\n## Medians\n\n{markdown(medians(results))}\n\n{parts}\n"


def readme(results: pd.DataFrame) -> str:
    """Write the results for the README: medians over forget sets, of the baselines those that are nearest."""
    n_sets, n_models = results["forget_set"].nunique(), int(results["n_models"].max())
    here = results[(results["statistic"] == "mean_gap") & (results["split"] == "forget")]
    gaps = here.groupby("method", sort=False)["value"].median()
    others = gaps[[m for m in gaps.index if is_baseline(m)]]
    kept = results[results["method"].isin([*others.nsmallest(N_BEST).index, *MATCHING])]
    table = medians(kept).drop(columns=[f"{split} {name}" for split in SPLITS[1:] for name in ("KS", "KLoM")])
    return f"""Medians over the {n_sets} forget sets of the laptop preset, N = {n_models} models of each kind; of
the {len(others)} baselines the {N_BEST} of least forget gap ([all {len(gaps)} methods](figures/laptop/results.csv)).

{markdown(table)}

*Gap*: between mean margins of unlearned and retrained models, in the latter's standard deviations, mean size. *KS*:
share of points that a test of level .05 tells apart; it sees {powers(n_models)}. *KLoM*: its 95th percentile, at most
11.5. *U-LiRA*: how often an unlearning likelihood-ratio attack is right. *At the floor*: sets on which none tells it,
intervals apart, on any split, from retraining (itself: trivially). Cost: in retrainings. [By set](docs/results.md)."""


def sees(study: Study) -> str:
    """Say what the model is given of a point: "14 x 14 pixels", where 28 x 28 are pooled, or "20 features"."""
    shape = study.data.x_train.shape[1:]
    pooled = round((np.prod(shape) / study.x[0].numel()) ** 0.5)
    return " x ".join(str(side // pooled) for side in shape[:2]) + (" pixels" if len(shape) == 3 else " features")


def markdown(table: pd.DataFrame) -> str:
    """Write a table in Markdown, index included, floats with three significant digits and no power of ten."""
    flat = table.reset_index()
    cells = [[f"{Decimal(f'{v:.3g}'):f}" if isinstance(v, float) else str(v) for v in row] for row in flat.to_numpy()]
    lines = [list(map(str, flat.columns)), ["---"] * flat.shape[1], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
