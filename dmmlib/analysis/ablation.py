"""What matching depends on: DMM with one option changed at a time, and oracle matching with more or fewer oracles.

Ablations run on the tuning sets only, so that nothing they teach is learnt from reported forget sets; comparisons of
methods run on the reported ones, with one setting for all, chosen on the tuning sets. Measurements are kept on disk.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dmmlib import metrics, unlearn
from dmmlib.errors import OptionError
from dmmlib.files import config_hash, read_json, write_json
from dmmlib.metrics import Estimate
from dmmlib.unlearn.matching import dmm, match

if TYPE_CHECKING:
    from dmmlib.forget_sets import ForgetSet
    from dmmlib.study import Study

GRID: dict[str, tuple[Any, ...]] = {
    "forget_share": (0.2, 0.4, 0.6, 0.8),
    "loss": ("mse", "kl", "margin"),
    "lr": (1e-3, 3e-3, 1e-2, 3e-2),
    "batch_size": (10, 20, 50),
    "cost": (0.01, 0.05, 0.1, 0.2, 0.5),
    "influence": (0.0, 0.25, 0.5, 1.0),
    "weighted": (False, True),
    "optimizer": (
        "whitened",
        *({"optimizer": name, "lr": lr} for name, lrs in (("adam", (3e-3, 1e-2)), ("sgd", (3e-3, 1e-2))) for lr in lrs),
    ),
}
"""Values of DMM's options, tried one at a time around its defaults; a mapping changes what must change together."""

N_ORACLES = (1, 2, 5, 10)
COLUMNS = ["forget_set", "split", "value", "low", "high", "cost", "n_models"]


def measure(
    study: Study, method: str, setting: Mapping[str, Any], forget_set: ForgetSet, tuning: bool = False
) -> pd.DataFrame:
    """KLoM's 95th percentile of a method with a setting on each split of a forget set, kept on disk.

    Args:
        tuning: with tuning.n_models models, against all oracles, and nothing recorded on the way.

    Returns:
        A row a split: columns forget_set, split, value, low, high (95 % interval over models), cost, n_models. A
        setting that makes models diverge has KLoM's maximum.
    """
    n = study.preset.tuning.n_models if tuning else study.preset.ensembles.n_models
    config = study.unlearning_identity(method, dict(setting), forget_set)
    config |= {"n_models": n, "checkpoints": 0, "oracles": study.preset.ensembles.n_models}
    file = study.runs / "store" / f"measured-{method}-{config_hash(config)}.json"
    if not file.exists():
        problem = dataclasses.replace(study.problem(forget_set, method, tuning), checkpoints=0)
        result = unlearn.get(method)(problem, **setting)
        reference = metrics.margins(study.oracles(forget_set), study.data.y)
        worst = Estimate(*[-float(np.log(metrics.FLOOR))] * 3)
        rows = []
        for split, indices in forget_set.splits(study.data.n_train, study.data.n_val).items():
            here = result.margins[:, indices]
            if np.isfinite(here).all():
                e = metrics.klom_summary(here, reference[:, indices], {split: np.arange(len(indices))})[split]["p95"]
            else:
                e = worst
            rows.append([forget_set.name, split, e.value, e.low, e.high, result.cost, n])
        write_json(file, rows)
    return pd.DataFrame(read_json(file), columns=COLUMNS)


def default_setting() -> dict[str, Any]:
    """The defaults of DMM."""
    parameters = [p for method in (match, dmm) for p in inspect.signature(method).parameters.values()]
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def run(study: Study, grid: Mapping[str, Sequence[Any]] | None = None) -> pd.DataFrame:
    """DMM on the tuning sets with one option at a time changed from its default.

    Args:
        grid: option -> values, or mappings of several options; `GRID` if None. The default is tried with every option.

    Returns:
        Columns option, setting (the value), default (whether it is), and those of `measure`.

    Raises:
        OptionError: for an option that DMM does not have.
    """
    base, wanted = default_setting(), dict(GRID if grid is None else grid)
    for option in wanted:
        if option not in base:
            raise OptionError(f"Ablation of {option!r} was asked for; DMM has the options {', '.join(base)}.")
    trials = [(o, v) for o, values in wanted.items() for v in (*values, *(() if base[o] in values else (base[o],)))]
    pairs = [(trial, f) for f in study.tuning_sets().values() for trial in trials]
    parts = []
    for i, ((option, value), forget_set) in enumerate(pairs):
        study.progress("ablation of DMM", i, len(pairs))
        changed: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {option: value}
        rows = measure(study, "dmm", base | changed, forget_set, tuning=True)
        label = ", ".join(str(v) if k == option else f"{k} {v}" for k, v in changed.items())
        parts.append(rows.assign(option=option, setting=label, default=value == base[option]))
    study.progress("ablation of DMM", len(pairs), len(pairs))
    table = pd.concat(parts, ignore_index=True)
    return table[["option", "setting", "default", *COLUMNS]]


def scores(ablation: pd.DataFrame) -> pd.DataFrame:
    """Each setting's score, as `Study.search` has it: KLoM p95, mean of splits and of tuning sets, with an interval.

    Returns:
        Columns option, setting, default, value, low, high, cost, worst (the highest p95 on F over tuning sets).
        Intervals take errors of splits and sets as fully dependent, so they are on the wide side.
    """
    grouped = ablation.groupby(["option", "setting", "default"], sort=False)
    table = grouped[["value", "low", "high", "cost"]].mean()
    on_forget = ablation[ablation["split"] == "forget"].groupby(["option", "setting", "default"], sort=False)
    return table.assign(worst=on_forget["value"].max()).reset_index()


def verdict(ablation: pd.DataFrame) -> str:
    """Which values are clearly better or worse than the defaults, in a sentence an option."""
    sentences = []
    for option, rows in scores(ablation).groupby("option", sort=False):
        base, others = rows[rows["default"]].iloc[0], rows[~rows["default"]]
        better = others[others["high"] < base["low"]]["setting"]
        worse = others[others["low"] > base["high"]]["setting"]
        best = rows.iloc[int(rows["value"].argmin())]
        sentences.append(
            f"- `{option}`: default {base['setting']} scores {Estimate(base['value'], base['low'], base['high'])}, the "
            f"lowest is {best['setting']} with {Estimate(best['value'], best['low'], best['high'])}; clearly better "
            f"than the default: {', '.join(better) or 'none'}; clearly worse: {', '.join(worse) or 'none'}."
        )
    return "\n".join(sentences)


def matching(study: Study, forget_sets: Sequence[ForgetSet] | None = None) -> pd.DataFrame:
    """Oracle matching with 1 to 10 oracles and both kinds of targets, DMM and DM-direct, on reported forget sets.

    All that fine-tune use DMM's setting, chosen on the tuning sets, so that targets are all they differ in.

    Args:
        forget_sets: those to compare on; all of the study's if None.

    Returns:
        Columns variant, targets, n_oracles, and those of `measure`.
    """
    setting = study.tuned("dmm")
    variants: list[tuple[str, str, int, str, dict[str, Any]]] = [
        ("retrain", "none", 0, "retrain", {}),
        ("DM-direct", "none", 0, "dm_direct", {}),
        ("DMM", "predicted", 0, "dmm", setting),
    ]
    for targets in ("oracle", "shifted"):
        for k in (k for k in N_ORACLES if k <= study.preset.ensembles.n_models):
            options = setting | {"n_oracles": k, "targets": targets}
            variants.append((f"OM, {targets}, {k}", targets, k, "oracle_matching", options))
    pairs = [(v, f) for f in forget_sets or study.forget_sets().values() for v in variants]
    parts = []
    for i, ((variant, targets, k, method, options), forget_set) in enumerate(pairs):
        study.progress("matching", i, len(pairs))
        rows = measure(study, method, options, forget_set)
        parts.append(rows.assign(variant=variant, targets=targets, n_oracles=k))
    study.progress("matching", len(pairs), len(pairs))
    return pd.concat(parts, ignore_index=True)[["variant", "targets", "n_oracles", *COLUMNS]]


def matching_verdict(table: pd.DataFrame) -> str:
    """On how many forget sets each kind of targets ends clearly above one true oracle's, in sentences."""
    forget = table[table["split"] == "forget"].set_index(["variant", "forget_set"])
    validation = table[table["split"] == "validation"].set_index(["variant", "forget_set"])
    base = "OM, oracle, 1"
    lines = []
    for variant in (v for v in table["variant"].unique() if v not in (base, "retrain")):
        lines.append(
            f"- {variant}: clearly above on {_above(forget, variant, base)} forget sets, clearly below on "
            f"{_above(forget, base, variant)}; on validation points {_above(validation, variant, base)} and "
            f"{_above(validation, base, variant)}."
        )
    return "Against matching one true oracle each, KLoM p95 on F:\n" + "\n".join(lines)


def _above(rows: pd.DataFrame, one: str, other: str) -> str:
    holds = rows.loc[one]["low"] > rows.loc[other]["high"]
    return f"{int(holds.sum())} of {len(holds)}"


def reach(table: pd.DataFrame, most: float = 0.1) -> str:
    """How far DMM, as tuned, is from what the study set out to reach on each forget set, in a sentence.

    Forget p95 within 1.5 times DM-direct's, retain and validation p95 within 1.25 times retraining's, at a cost of at
    most `most` of a retraining. Values, not intervals, are compared.
    """
    values = table.pivot_table(index="forget_set", columns=["variant", "split"], values="value", sort=False)
    cost = table[table["variant"] == "DMM"].groupby("forget_set")["cost"].first()
    held: Iterable[tuple[str, pd.Series]] = (
        ("forget within 1.5 x DM-direct", values["DMM"]["forget"] <= 1.5 * values["DM-direct"]["forget"]),
        ("retain within 1.25 x floor", values["DMM"]["retain"] <= 1.25 * values["retrain"]["retain"]),
        ("validation within 1.25 x floor", values["DMM"]["validation"] <= 1.25 * values["retrain"]["validation"]),
        (f"cost at most {most:g}", cost <= most + 0.005),
    )
    return "DMM as tuned: " + "; ".join(f"{name} on {int(h.sum())} of {len(h)} sets" for name, h in held) + "."
