"""What matching depends on: DMM with one option changed at a time, and oracle matching with more or fewer oracles.

Ablations run on the tuning sets only, so that nothing they teach is learnt from reported forget sets; comparisons of
methods run on the reported ones, with one setting for all, chosen on the tuning sets. Measurements are kept on disk.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import keys, metrics, unlearn
from dmmlib.baselines.published import squared_error
from dmmlib.baselines.whitening import N_SEEN, finetune_in
from dmmlib.errors import OptionError
from dmmlib.files import config_hash, kept, read_json, write_json
from dmmlib.fingerprint import of_own
from dmmlib.forget_sets import ForgetSet
from dmmlib.matching.match import dmm, predicted_oracle
from dmmlib.metrics import Estimate
from dmmlib.optim import Adam
from dmmlib.registry import versions
from dmmlib.study import Study
from dmmlib.unlearn.base import Phase, Problem, Unlearned, draw_batches

GRID: dict[str, tuple[Any, ...]] = {
    "cost": (0.01, 0.02, 0.03, 0.05, 0.1),
    "steps": (2, 3, 4, 6),
    "farthest": (2.0, 4.0, 8.0, 100.0),
    "optimizer": (
        "gauss-newton",
        *({"optimizer": o, "cost": c} for o in ("whitened adam", "adam") for c in (0.03, 0.1)),
    ),
}
"""Values of DMM's options, tried one at a time around its defaults; a mapping changes what must change together."""

N_ORACLES = (1, 2, 5, 10)
COLUMNS = ["forget_set", "split", "value", "low", "high", "cost", "n_models"]


# --- what DMM could be -----------------------------------------------------------------------------------


OPTIMIZERS = ("gauss-newton", "whitened adam", "adam")


def variant(
    problem: Problem, *, cost: float, steps: int, farthest: float, optimizer: str = "gauss-newton", lr: float = 3e-3
) -> Unlearned:
    """Unlearn by DMM, or as it was before Gauss-Newton steps: by Adam, on batches of 20 of which 8 are of F.

    Args:
        problem, cost, steps, farthest: as in `match`; the problem's attributor predicts.
        optimizer: one of `OPTIMIZERS`; whitened Adam steps in coordinates in which a layer's inputs are white.
        lr: Adam's rate at the start, which falls linearly to zero.

    Raises OptionError for an unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        known = ", ".join(map(repr, OPTIMIZERS))
        raise OptionError(f"Option optimizer={optimizer!r} was given; use one of {known}.")
    if optimizer == "gauss-newton":
        return dmm(problem, cost=cost, steps=steps, farthest=farthest)
    whitened = optimizer == "whitened adam"
    seen = max(1, min(N_SEEN, len(problem.retain), round(cost * problem.retraining / 8))) if whitened else 0
    n_steps = max(1, round((cost * problem.retraining - seen) / 20))
    parts = [draw_batches(problem, pool, n_steps, n) for pool, n in ((problem.forget, 8), (problem.retain, 12))]
    phase = Phase(list(np.concatenate(parts, axis=2)), squared_error(predicted_oracle(problem), problem))
    return finetune_in(whitened, problem, [phase], Adam(lr), seen, rate=lambda share: lr * (1 - share))


DEFAULTS: dict[str, Any] = {**(dmm.__kwdefaults__ or {}), "optimizer": "gauss-newton"}
"""Of DMM's options, and of what `variant` adds."""


# --- measuring -------------------------------------------------------------------------------------------


def measure(
    study: Study, method: str, setting: Mapping[str, Any], forget_set: ForgetSet, run: unlearn.Method | None = None
) -> pd.DataFrame:
    """Measure a method with a setting on a forget set: KLoM p95 with its 95 % interval over models, kept on disk.

    It is KLoM's maximum where models diverge. `run` is what to run on a tuning set, with tuning.n_models models, in
    place of the registered method. One row for each split, with `COLUMNS`.
    """
    n = (study.preset.tuning if run else study.preset.ensembles).n_models
    config = study.key_of(method, dict(setting), forget_set)
    config |= {"n_models": n, "checkpoints": 0, "oracles": study.preset.ensembles.n_models}
    config |= versions("metric klom") | keys.apart(study.data)
    config |= of_own(run) | {"run": getattr(run, "__qualname__", "")} if run else {}
    file = study.runs / "store" / f"measured-{method}-{config_hash(config)}.json"

    def rows() -> list[list[Any]]:
        problem = dataclasses.replace(study.problem(forget_set, method, tuning=run is not None), checkpoints=0)
        result = (run or unlearn.get(method))(problem, **setting)
        splits = study.splits(forget_set, probes=False)
        found = {split: {"p95": Estimate(*[-float(np.log(metrics.FLOOR))] * 3)} for split in splits}
        if np.isfinite(result.margins).all():
            reference = metrics.margins(study.oracles(forget_set), study.data.y)
            found = metrics.klom_summary(result.margins, reference, splits)
        ends = {split: dataclasses.astuple(estimates["p95"]) for split, estimates in found.items()}
        return [[forget_set.name, split, *ends[split], result.cost, n] for split in splits]

    return pd.DataFrame(kept(file, rows, read_json, write_json), columns=COLUMNS)


def _measure_all(study: Study, what: str, trials: Sequence[tuple[dict[str, Any], tuple[Any, ...]]]) -> pd.DataFrame:
    """The rows of all trials, (labels, arguments of `measure`), with their labels before; progress is said."""
    parts = []
    for i, (labels, arguments) in enumerate(trials):
        study.progress(what, i, len(trials))
        parts.append(measure(study, *arguments).assign(**labels))
    study.progress(what, len(trials), len(trials))
    return pd.concat(parts, ignore_index=True)[[*trials[0][0], *COLUMNS]]


def run(study: Study, grid: Mapping[str, Sequence[Any]] = GRID) -> pd.DataFrame:
    """Try DMM on the tuning sets with one option at a time changed from its default, which is tried with each, too.

    Returns:
        Columns option, setting (the value), default (whether it is), and those of `measure`.

    Raises:
        OptionError: for an option that DMM does not have.
    """
    if unknown := [option for option in grid if option not in DEFAULTS]:
        raise OptionError(f"Ablation of {unknown[0]!r} was asked for; DMM has the options {', '.join(DEFAULTS)}.")
    trials = []
    for forget_set, option in itertools.product(study.tuning_sets().values(), grid):
        default = DEFAULTS[option]
        for value in [*grid[option], *[default] * (default not in grid[option])]:
            changed = value if isinstance(value, dict) else {option: value}
            setting = ", ".join(str(v) if k == option else f"{k} {v}" for k, v in changed.items())
            labels = {"option": option, "setting": setting, "default": value == default}
            trials.append((labels, ("dmm", DEFAULTS | changed, forget_set, variant)))
    return _measure_all(study, "ablation of DMM", trials)


def scores(ablation: pd.DataFrame) -> pd.DataFrame:
    """Score each setting as `Study.search` does: KLoM p95, mean of splits and of tuning sets, with an interval.

    Returns:
        Columns option, setting, default, value, low, high, cost, worst (the highest p95 on F over tuning sets).
        Intervals take errors of splits and sets as fully dependent, so they are on the wide side.
    """
    keys = ["option", "setting", "default"]
    table = ablation.groupby(keys, sort=False)[["value", "low", "high", "cost"]].mean()
    on_forget = ablation[ablation["split"] == "forget"].groupby(keys, sort=False)["value"]
    return table.assign(worst=on_forget.max()).reset_index()


# --- targets ---------------------------------------------------------------------------------------------


def matching(study: Study, forget_sets: Iterable[ForgetSet]) -> pd.DataFrame:
    """Measure oracle matching with 1 to 10 oracles and both kinds of targets, DMM and DM-direct, on forget sets.

    All that fine-tune use DMM's setting, chosen on the tuning sets, so that targets are all they differ in.

    Returns:
        Columns variant, targets, n_oracles, and those of `measure`.
    """
    setting = study.tuned("dmm")
    variants: list[tuple[str, str, int, str, dict[str, Any]]] = [
        ("retrain", "none", 0, "retrain", {}),
        ("DM-direct", "none", 0, "dm_direct", {}),
        ("DMM", "predicted", 0, "dmm", setting),
    ]
    for targets, k in itertools.product(("oracle", "shifted"), N_ORACLES):
        if k <= study.preset.ensembles.n_models:
            options = setting | {"n_oracles": k, "targets": targets}
            variants.append((f"OM, {targets}, {k}", targets, k, "oracle_matching", options))
    trials = [
        ({"variant": name, "targets": targets, "n_oracles": k}, (method, options, f))
        for f in forget_sets
        for name, targets, k, method, options in variants
    ]
    return _measure_all(study, "matching", trials)


def reach(table: pd.DataFrame) -> str:
    """Say how far DMM is from what the study set out to reach. Values, not intervals, are compared."""
    values = table.pivot_table(index="forget_set", columns=["variant", "split"], values="value", sort=False)
    cost = table[table["variant"] == "DMM"].groupby("forget_set")["cost"].first()
    held = {
        "forget within 1.05 x DM-direct": values["DMM"]["forget"] <= 1.05 * values["DM-direct"]["forget"],
        "retain within 1.25 x floor": values["DMM"]["retain"] <= 1.25 * values["retrain"]["retain"],
        "validation within 1.25 x floor": values["DMM"]["validation"] <= 1.25 * values["retrain"]["validation"],
        "cost at most 0.03": cost <= 0.03 + 0.001,
    }
    return "DMM: " + "; ".join(f"{name} on {int(h.sum())} of {len(h)} sets" for name, h in held.items()) + "."
