"""Attributors of a study side by side: all fitted to the same subset models, and ridge to more of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics, unlearn
from dmmlib.analysis.compare import COLUMNS, Unlearn, compare
from dmmlib.analysis.intervals import median_over
from dmmlib.analysis.looks import SPLITS
from dmmlib.attribution.base import Context
from dmmlib.datamodels import Attributor, RidgeDatamodel
from dmmlib.errors import DataError, MethodError
from dmmlib.forget_sets import ForgetSet
from dmmlib.metrics import Estimate
from dmmlib.study import Study
from dmmlib.tuning import score

FLOOR, NOTHING = "retrain (floor)", "do nothing"


def side_by_side(
    study: Study,
    settings: Mapping[str, Mapping[str, Any]],
    forget_sets: Mapping[str, ForgetSet],
    sizes: Iterable[int] = (),
    n_models: int = 16,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """`compare` registered attributors (name -> options) on the study's own subset models, by DM-direct and DMM.

    Ridge has the setting of `tuned_ridge`, DMM the one that was tuned with the study's own attributor. LDS is on the
    held-out subsets that report. `n_models` originals are unlearned, and compared with all oracles.

    Args:
        sizes: of the many subset models of halves, how many ridge is fitted to as well, for reference.

    Returns:
        The table of `compare`, with rows of doing nothing and of retraining again; and, of each attributor that cannot
        be fitted here, why.
    """
    masks, outputs = study.held_out()
    half, before = len(masks) // 2, study.original_logits()[:n_models]
    oracles = {name: (f, study.oracles(f)) for name, f in forget_sets.items()}
    methods = {"dmm": _dmm(study, len(before))}

    def run(label: str, name: str, options: Mapping[str, Any], context: Context) -> pd.DataFrame:
        study.progress(f"attributor {label}", 0, 1)
        options = (tuned_ridge(study, context) if name == "ridge" else {}) | dict(options)
        context = replace(context, original_logits=before)
        table = compare({label: (name, options)}, context, (masks[half:], outputs[half:]), oracles, methods)
        study.progress(f"attributor {label}", 1, 1)
        return table

    parts, missing = [_ends(study, oracles, len(before))], {}
    for name, options in settings.items():
        try:
            parts.append(run(name, name, options, study.context()))
        except (MethodError, DataError) as error:
            missing[name] = str(error)
    for size in sizes:
        many, answers = study.subsets()
        context = Context(study.x, study.y, many[:size], answers[:size])
        parts.append(run(f"ridge, {size:,} models", "ridge", {}, context))
    return pd.concat(parts, ignore_index=True), missing


def tuned_ridge(study: Study, context: Context) -> dict[str, float]:
    """Ridge's penalty and share of it on own weights, of the lowest p95 KLoM of DM-direct on the tuning sets."""
    y, n = study.data.y, study.preset.tuning.n_models
    before = metrics.margins(study.original_logits()[:n], y)
    sets = [(f, metrics.margins(study.oracles(f)[:n], y)) for f in study.tuning_sets().values()]

    def mean_score(setting: dict[str, float]) -> float:
        model = RidgeDatamodel.fit(context.masks, context.outputs, device=context.device, **setting)
        found = [
            score(before + metrics.right_logits(model.effect(f.indices), y), oracle, _splits(study, f))
            for f, oracle in sets
        ]
        return float(np.mean([scores["score"] for scores in found]))

    return min(study.preset.datamodels.grid, key=mean_score)


def _dmm(study: Study, n_models: int) -> Unlearn:
    setting = study.tuned("dmm")

    def run(attributor: Attributor, forget_set: ForgetSet) -> np.ndarray:
        originals, logits = study.originals()[:n_models], study.original_logits()[:n_models]
        problem = replace(study.problem(forget_set), originals=originals, original_logits=logits, checkpoints=0)
        return unlearn.get("dmm")(replace(problem, attributor=attributor), **setting).margins

    return run


def _splits(study: Study, forget_set: ForgetSet) -> dict[str, np.ndarray]:
    return forget_set.splits(study.data.n_train, study.data.n_val)


def _ends(study: Study, oracles: Mapping[str, tuple[ForgetSet, np.ndarray]], n_models: int) -> pd.DataFrame:
    """p95 KLoM of doing nothing, and of as many models retrained once more."""
    rows = []
    for name, (f, logits) in oracles.items():
        ends = {NOTHING: study.original_logits()[:n_models], FLOOR: study.oracles(f, floor=True)[:n_models]}
        reference = metrics.margins(logits, study.data.y)
        for attributor, answers in ends.items():
            found = score(metrics.margins(answers, study.data.y), reference, _splits(study, f))
            rows += [(attributor, 0, "", name, split, "klom_p95", found[split]) for split in SPLITS]
    return pd.DataFrame(rows, columns=COLUMNS[:-2])


def over_sets(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over forget sets with 95 % bootstrap intervals over them; what has no forget set stays as it is."""
    keys, ends = ["attributor", "n_models", "method", "split", "statistic"], ["value", "low", "high"]

    def row(part: pd.DataFrame) -> pd.Series:
        found = median_over(part["value"]) if part["forget_set"].iloc[0] else Estimate(*part[ends].iloc[0])
        return pd.Series(asdict(found))

    return table.groupby(keys, sort=False)[["forget_set", *ends]].apply(row).reset_index()


def best(table: pd.DataFrame, n_models: int) -> tuple[list[str], list[str]]:
    """Attributors of that many subset models that none is ahead of: by LDS, and by DMM's p95 KLoM on forget points.

    The first of each has the best value. Others stay whose LDS has an interval that reaches it, or whose KLoM is not
    above the first's by the paired interval over forget sets (median of log ratios).
    """
    here = table[table["n_models"] == n_models]
    rank = here[here["statistic"] == "lds"].sort_values("value", ascending=False)
    tied = rank.loc[rank["high"] >= rank["low"].iloc[0], "attributor"]
    part = here[(here["method"] == "dmm") & (here["split"] == "forget") & (here["statistic"] == "klom_p95")]
    wide = part.pivot_table(index="forget_set", columns="attributor", values="value")
    logs = wide.apply(np.log)
    order = list(logs.median().sort_values().index)
    return list(tied), [name for name in order if median_over(logs[name] - logs[order[0]]).low <= 0]


def wide(medians: pd.DataFrame) -> pd.DataFrame:
    """`over_sets` for a reader: one line for each attributor."""
    rows: dict[str, dict[str, str]] = {}
    for name, here in medians.groupby("attributor", sort=False):
        at = here.set_index(["method", "split", "statistic"])
        value, row = at["value"], dict[str, str]()
        if ("", "all", "lds") in at.index:
            row["subset models"] = f"{at['n_models'].iloc[0]:,}"
            row["retrainings"] = f"{value['', 'all', 'cost']:,.0f}"
            row["fit, s"] = f"{value['', 'all', 'seconds']:.2g}"
            row["LDS"] = str(Estimate(*at.loc[("", "all", "lds"), ["value", "low", "high"]]))
            row["slope on F"] = f"{value['dm_direct', 'forget', 'slope']:.2f}"
        for split in SPLITS:
            found = [value.get((method, split, "klom_p95")) for method in ("dm_direct", "dmm", "")]
            row[split] = " / ".join(f"{v:.2f}" for v in found if v is not None)
        rows[str(name)] = row
    columns = max(rows.values(), key=len)
    return pd.DataFrame(rows).T.reindex(columns=list(columns)).fillna("").rename_axis("attributor")
