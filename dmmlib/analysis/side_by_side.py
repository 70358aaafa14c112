"""Attributors of a study side by side: all fitted to the same subset models, and ridge to more of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics, unlearn
from dmmlib.analysis.compare import Unlearn, compare
from dmmlib.attribution.base import Context
from dmmlib.datamodels import Attributor, RidgeDatamodel
from dmmlib.errors import DataError, MethodError
from dmmlib.forget_sets import ForgetSet
from dmmlib.studies.cheap.evaluator import SPLITS, Evaluator, median_over
from dmmlib.study import Study

FLOOR, NOTHING = "retrain (floor)", "do nothing"


def side_by_side(
    study: Study,
    settings: Mapping[str, Mapping[str, Any]],
    forget_sets: Mapping[str, ForgetSet],
    sizes: Iterable[int] = (),
    n_models: int = 16,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """`compare` of registered attributors on the study's own subset models, by DM-direct and DMM.

    Ridge takes the penalty, and the share of it on own weights, of the lowest p95 KLoM of DM-direct on the tuning sets;
    DMM the setting that was tuned there with the study's own attributor. LDS is on the held-out subsets that report.

    Args:
        settings: registered name -> options.
        forget_sets: those to unlearn.
        sizes: of the many subset models of halves, how many ridge is fitted to as well, for reference.
        n_models: originals that are unlearned; they are compared with all oracles.

    Returns:
        The table of `compare`, with rows of doing nothing and of retraining again; and, of each attributor that cannot
        be fitted here, why.
    """
    masks, outputs = study.held_out()
    half, tuning = len(masks) // 2, Evaluator.tuning(study)
    before = study.original_logits()[:n_models]
    oracles = {name: (f, study.oracles(f)) for name, f in forget_sets.items()}

    def run(label: str, name: str, options: Mapping[str, Any], context: Context) -> pd.DataFrame:
        study.progress(f"attributor {label}", 0, 1)
        if name == "ridge":
            options = _tuned_ridge(study, context, tuning) | dict(options)
        methods = {"dmm": _dmm(study, len(before))}
        context = replace(context, original_logits=before)
        table = compare({label: (name, options)}, context, (masks[half:], outputs[half:]), oracles, methods, 0)
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


def _tuned_ridge(study: Study, context: Context, tuning: Evaluator) -> dict[str, float]:
    """The setting of lowest p95 KLoM of DM-direct, over splits and tuning sets."""

    def score(setting: dict[str, float]) -> float:
        model = RidgeDatamodel.fit(context.masks, context.outputs, device=context.device, **setting)
        return tuning.score(tuning.gauged(model))

    return min(study.preset.datamodels.grid, key=score)


def _dmm(study: Study, n_models: int) -> Unlearn:
    setting = study.tuned("dmm")

    def run(attributor: Attributor, forget_set: ForgetSet) -> np.ndarray:
        problem = replace(
            study.problem(forget_set),
            originals=study.originals()[:n_models],
            original_logits=study.original_logits()[:n_models],
            attributor=attributor,
            checkpoints=0,
        )
        return unlearn.get("dmm")(problem, **setting).margins

    return run


def _ends(study: Study, oracles: Mapping[str, tuple[ForgetSet, np.ndarray]], n_models: int) -> pd.DataFrame:
    """p95 KLoM of doing nothing, and of as many models retrained once more."""
    rows = []
    for name, (f, logits) in oracles.items():
        true = metrics.margins(logits, study.data.y)
        ends = {NOTHING: study.original_logits()[:n_models], FLOOR: study.oracles(f, floor=True)[:n_models]}
        for attributor, answers in ends.items():
            klom = metrics.klom(metrics.margins(answers, study.data.y), true)
            for split, at in f.splits(study.data.n_train, study.data.n_val).items():
                head = {"attributor": attributor, "n_models": 0, "method": "", "forget_set": name, "split": split}
                rows.append(head | {"statistic": "klom_p95", "value": float(np.percentile(klom[at], 95))})
    return pd.DataFrame(rows)


def over_sets(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over forget sets with 95 % bootstrap intervals over them; what has no forget set stays as it is."""
    keys = ["attributor", "n_models", "method", "split", "statistic"]
    rows = []
    for key, part in table.groupby(keys, sort=False):
        whole = part["forget_set"].iloc[0] == ""
        e = (
            metrics.Estimate(*part[["value", "low", "high"]].iloc[0])
            if whole
            else median_over(part["value"].to_numpy())
        )
        rows.append((*key, e.value, e.low, e.high))
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high"])


def best(table: pd.DataFrame, n_models: int) -> tuple[list[str], list[str]]:
    """Attributors of that many subset models that none is ahead of: by LDS, and by DMM's p95 KLoM on forget points.

    The first of each has the best value; others stay whose LDS has an interval that reaches the first's, or whose KLoM
    is not above the first's by the paired interval over forget sets (median of log ratios).
    """
    here = table[table["n_models"] == n_models]
    rank = here[here["statistic"] == "lds"].sort_values("value", ascending=False)
    tied = rank.loc[rank["high"] >= rank["low"].iloc[0], "attributor"]
    part = here[(here["method"] == "dmm") & (here["split"] == "forget") & (here["statistic"] == "klom_p95")]
    part = part.assign(log=np.log(part["value"]))
    logs = part.pivot_table(index="forget_set", columns="attributor", values="log")
    order = list(logs.median().sort_values().index)
    behind = {name: median_over((logs[name] - logs[order[0]]).to_numpy()).low for name in order}
    return list(tied), [name for name in order if behind[name] <= 0]


def wide(medians: pd.DataFrame) -> pd.DataFrame:
    """`over_sets` for a reader: a line an attributor."""
    by = {tuple(row[:4]): row[4:] for row in medians[["attributor", "method", "split", "statistic", "n_models",
                                                      "value", "low", "high"]].to_numpy()}  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(medians["attributor"]):
        row: dict[str, Any] = {}
        if (name, "", "all", "lds") in by:
            cost, seconds, lds = (by[name, "", "all", statistic] for statistic in ("cost", "seconds", "lds"))
            row = {"subset models": f"{lds[0]:,}", "retrainings": f"{cost[1]:,.0f}", "fit, s": f"{seconds[1]:.2g}"}
            row |= {"LDS": str(metrics.Estimate(*lds[1:]))}
            row["slope on F"] = f"{by[name, 'dm_direct', 'forget', 'slope'][1]:.2f}"
        for split in SPLITS:
            found = [by.get((name, method, split, "klom_p95")) for method in ("dm_direct", "dmm", "")]
            row[split] = " / ".join(f"{e[1]:.2f}" for e in found if e is not None)
        rows[name] = row
    columns = max(rows.values(), key=len)
    return pd.DataFrame(rows).T.reindex(columns=list(columns)).fillna("").rename_axis("attributor")
