"""Tables that a reader can take in: tidy results, laid out by forget set and method."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from dmmlib import unlearn
from dmmlib.analysis.claims import is_baseline
from dmmlib.analysis.plots import SPLITS, label
from dmmlib.studies.cheap.experiments import mean_over


def main_table(results: pd.DataFrame, statistic: str = "klom_p95") -> pd.DataFrame:
    """A statistic with its interval on forget, retain and validation points, beside the cost.

    Args:
        results: `Study.results`.
        statistic: klom_mean, klom_p95, accuracy_gap or u_lira.

    Returns:
        Rows (forget set, method), columns forget, retain, validation, cost: text.
    """
    here = results[results["statistic"] == statistic].copy()
    digits = 3 if statistic == "accuracy_gap" else 2
    here["text"] = [
        f"{v:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]"
        for v, lo, hi in zip(here["value"], here["low"], here["high"], strict=True)
    ]
    table = here.pivot_table(
        index=["forget_set", "method"], columns="split", values="text", aggfunc="first", sort=False
    )[list(SPLITS)]
    cost = results[results["statistic"] == "cost"].set_index(["forget_set", "method"])["value"]
    table["cost"] = [f"{cost[key]:.3f}" for key in table.index]
    return _named(table)


def medians(results: pd.DataFrame) -> pd.DataFrame:
    """Median over forget sets of each method's statistics: a line a method."""
    p95 = results[results["statistic"] == "klom_p95"]
    table = p95.pivot_table(index="method", columns="split", values="value", aggfunc="median", sort=False)
    table = table[list(SPLITS)].add_suffix(" KLoM p95")
    lira = results[(results["statistic"] == "u_lira") & (results["split"] == "forget")]
    table["forget U-LiRA"] = lira.groupby("method")["value"].median()
    gap = results[(results["statistic"] == "accuracy_gap") & (results["split"] == "validation")]
    table["validation accuracy gap"] = gap.groupby("method")["value"].median()
    table["cost"] = results[results["statistic"] == "cost"].groupby("method")["value"].median()
    table.index = pd.Index([label(m) for m in table.index], name="method")
    table.columns.name = None
    return table


def klom_p95(results: pd.DataFrame) -> pd.DataFrame:
    """KLoM's 95th percentile alone: columns forget_set, method, split, value."""
    return results.loc[results["statistic"] == "klom_p95", ["forget_set", "method", "split", "value"]]


def replications(table: pd.DataFrame) -> pd.DataFrame:
    """The main table on several pairs of data and model, and seeds.

    Args:
        table: columns pair, seed, and those of `klom_p95`.

    Returns:
        Rows (pair, method), columns the splits: text, the median over forget sets, its geometric mean over seeds with
        a 95 % t-interval. "best baseline" is, a forget set and split, the lowest of all baselines; "ahead" is how many
        forget sets, of all seeds, there are on which the method's forget KLoM is below every baseline's.
    """
    keys = ["pair", "seed", "forget_set", "split"]
    baseline = table["method"].map(is_baseline)
    best = table[baseline].groupby(keys, sort=False)["value"].min().rename("best").reset_index()
    known = table[~baseline].merge(best, on=keys, how="left")
    every = pd.concat([known, best.rename(columns={"best": "value"}).assign(method="best baseline")])
    order = ("do_nothing", "best baseline", "oracle_matching", "dm_direct", "dmm", "retrain")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for pair in dict.fromkeys(table["pair"]):
        for method in order:
            part = every[(every["pair"] == pair) & (every["method"] == method)]
            row = {}
            for split in SPLITS if len(part) else ():
                medians = part[part["split"] == split].groupby("seed")["value"].median().to_numpy()
                row[split] = str(mean_over(medians, log=True)) if len(medians) > 1 else f"{medians[0]:.2f}"
            if row:
                forget = part[(part["split"] == "forget") & part["best"].notna()]
                row["ahead"] = f"{(forget['value'] < forget['best']).sum()} of {len(forget)}" if len(forget) else ""
                rows[str(pair), label(method)] = row
    return pd.DataFrame(rows).T


def by_set(results: pd.DataFrame, statistic: str = "klom_p95", split: str = "forget") -> pd.DataFrame:
    """A statistic on a split: a line a method, a column a forget set."""
    here = results[(results["statistic"] == statistic) & (results["split"] == split)]
    table = here.pivot_table(index="method", columns="forget_set", values="value", sort=False)
    table.index = pd.Index([label(m) for m in table.index], name="method")
    table.columns.name = None
    return table


def catalogue(methods: Iterable[str] | None = None) -> pd.DataFrame:
    """What is to be known of methods before they run: a line a method, in the order given.

    Args:
        methods: registered names; all of them if None.

    Returns:
        Columns source, cost (sample gradients a model, as a formula), searched (the grid), elsewhere; text.
    """
    names = tuple(methods or unlearn.names())
    rows = []
    for name in names:
        entry = unlearn.registered(name)
        grid = {option: values for option, values in entry.space.items() if len(values) > 1}
        searched = "; ".join(f"{option} {', '.join(f'{v:g}' for v in values)}" for option, values in grid.items())
        rows.append([entry.paper, entry.cost, searched or "nothing", entry.elsewhere or "not known"])
    index = pd.Index([label(name) for name in names], name="method")
    return pd.DataFrame(rows, columns=["source", "cost", "searched", "elsewhere"], index=index)


def readme(results: pd.DataFrame) -> str:
    """The results as the README shows them: medians over forget sets, and the main statistic of each folded away."""
    n_sets, n_models = results["forget_set"].nunique(), int(results["n_models"].max())
    return "\n".join(
        [
            f"Medians over the {n_sets} forget sets of the laptop preset, N = {n_models} models of each kind:",
            "",
            markdown(medians(results)),
            "",
            f"<details><summary>Forget KLoM p95 on each of the {n_sets} forget sets</summary>",
            "",
            markdown(by_set(results)),
            "",
            "</details>",
            "",
            "Every statistic, with 95 % intervals over models: [results.csv](figures/laptop/results.csv).",
        ]
    )


def _named(table: pd.DataFrame) -> pd.DataFrame:
    table.index = pd.MultiIndex.from_tuples(
        [(name, label(method)) for name, method in table.index], names=["forget set", "method"]
    )
    table.columns.name = None
    return table


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, index included, floats with three significant digits."""
    flat = table.reset_index()
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in flat.to_numpy()]
    lines = [list(map(str, flat.columns)), ["---"] * flat.shape[1], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
