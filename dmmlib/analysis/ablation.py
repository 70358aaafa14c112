"""What matching depends on: DMM with one option changed at a time, and oracle matching with more or fewer oracles.

Ablations run on the tuning sets only, so that nothing they teach is learnt from reported forget sets; comparisons of
methods run on the reported ones, with one setting for all, chosen on the tuning sets. Measurements are kept on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from dmmlib import metrics, unlearn
from dmmlib.attributors.gradients import margin
from dmmlib.errors import OptionError
from dmmlib.files import config_hash, read_json, write_json
from dmmlib.forget_sets import ForgetSet
from dmmlib.metrics import Estimate
from dmmlib.optim import SGD, Adam
from dmmlib.study import Study
from dmmlib.unlearn.base import Phase, Problem, Unlearned, draw_batches, finetune
from dmmlib.unlearn.matching import dmm, match, predicted_oracle, whiten

GRID: dict[str, tuple[Any, ...]] = {
    "forget_share": (0.2, 0.4, 0.6, 0.8),
    "loss": ("mse", "kl", "margin"),
    "lr": (1e-3, 3e-3, 1e-2, 3e-2),
    "batch_size": (10, 20, 50),
    "cost": (0.01, 0.05, 0.1, 0.2, 0.5),
    "influence": (0.0, 0.25, 0.5, 1.0),
    "weighted": (False, True),
    "optimizer": ("whitened", *({"optimizer": o, "lr": lr} for o in ("adam", "sgd") for lr in (3e-3, 1e-2))),
}
"""Values of DMM's options, tried one at a time around its defaults; a mapping changes what must change together."""

N_ORACLES = (1, 2, 5, 10)
COLUMNS = ["forget_set", "split", "value", "low", "high", "cost", "n_models"]


# --- what DMM could be -----------------------------------------------------------------------------------


_kl = functools.partial(kl_div, log_target=True, reduction="none")
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": lambda logits, goal, labels: ((logits - goal) ** 2).mean(2),
    "kl": lambda logits, goal, labels: _kl(logits.log_softmax(2), goal.log_softmax(2)).sum(2),
    "margin": lambda logits, goal, labels: (margin(logits, labels) - margin(goal, labels)) ** 2,
}
"""Distances (n_models, batch) of logits from target logits, both (n_models, batch, n_classes), given labels
(n_models, batch): squared error of logits, KL(target || model) of probabilities, squared error of margins."""


def variant(
    problem: Problem,
    *,
    cost: float,
    lr: float,
    batch_size: int,
    forget_share: float,
    optimizer: str = "whitened",
    loss: str = "mse",
    influence: float = 0.0,
    weighted: bool = False,
) -> Unlearned:
    """Unlearn by DMM with options that it does not have, since none of them was clearly better.

    Args:
        problem, cost, lr, batch_size, forget_share: as in `match`; the problem's attributor predicts.
        optimizer: "whitened" or "adam" as in `match`, or "sgd".
        loss: what to lower, one of `LOSSES`.
        influence: share of what comes from R that is drawn in proportion to how far a point's targets lie from what
            models answer; the rest of it is drawn evenly.
        weighted: let a point count by v / (v + sd^2), with v the variance of its margin over originals and sd how
            uncertain the attributor is of its change: as a normal target of that variance would.

    Raises:
        OptionError: for an unknown loss or optimizer, a share that is none, or weights where the attributor has no sd.
    """
    for name, value, known in (("loss", loss, LOSSES), ("optimizer", optimizer, ("whitened", "adam", "sgd"))):
        if value not in known:
            raise OptionError(f"Option {name}={value!r} was given; use one of {', '.join(map(repr, known))}.")
    if not 0 <= influence <= 1:
        raise OptionError(f"Option influence={influence!r} was given; use a share between 0 and 1.")
    if loss == "mse" and optimizer != "sgd" and not influence and not weighted:
        return dmm(problem, cost=cost, lr=lr, batch_size=batch_size, forget_share=forget_share, optimizer=optimizer)
    originals, y = problem.original_logits[:, : problem.n_train], problem.y
    targets = predicted_oracle(problem)[:, : problem.n_train]
    goal, counts = torch.from_numpy(targets).to(y.device), torch.ones(problem.n_train, device=y.device)
    if weighted:
        sd = problem.attributor.sd(problem.forget) if problem.attributor else None
        if sd is None:
            raise OptionError("weighted=True needs an attributor that has an `sd`; use 'bayesian', or weighted=False.")
        v = metrics.margins(originals, problem.labels[: problem.n_train]).var(0)
        counts *= torch.from_numpy(v / np.maximum(v + sd[: problem.n_train] ** 2, 1e-12)).to(counts)

    def to_targets(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        return (counts[indices] * LOSSES[loss](logits, goal[models[:, None], indices], y[indices])).mean(1)

    seen, whitening = whiten(problem, cost) if optimizer == "whitened" else (0, None)
    n_steps = max(1, round((cost * problem.retraining - seen) / batch_size))
    from_forget = min(max(1, round(forget_share * batch_size)), batch_size - 1)
    by_influence = round(influence * (batch_size - from_forget))
    evenly = batch_size - from_forget - by_influence
    parts = [draw_batches(problem, problem.forget, n_steps, from_forget)]
    if evenly:
        parts.append(draw_batches(problem, problem.retain, n_steps, evenly))
    if by_influence:
        far = ((targets - originals) ** 2).mean((0, 2))[problem.retain] ** 0.5 + 1e-12
        drawn = [rng.choice(problem.retain, (n_steps, by_influence), p=far / far.sum()) for rng in problem.rngs(3)]
        parts.append(np.stack(drawn, axis=1))
    phase = Phase(list(np.concatenate(parts, axis=2)), to_targets)
    steps = SGD(lr) if optimizer == "sgd" else Adam(lr)
    return finetune(problem, [phase], steps, rate=lambda t: lr * (1 - t), spent=seen, whitening=whitening)


DEFAULTS: dict[str, Any] = {**(match.__kwdefaults__ or {}), **(variant.__kwdefaults__ or {})}
"""Of DMM's options, and of those that `variant` adds."""


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
    file = study.runs / "store" / f"measured-{method}-{config_hash(config)}.json"
    if not file.exists():
        problem = dataclasses.replace(study.problem(forget_set, method, tuning=run is not None), checkpoints=0)
        result = (run or unlearn.get(method))(problem, **setting)
        splits = forget_set.splits(study.data.n_train, study.data.n_val)
        found = {split: {"p95": Estimate(*[-float(np.log(metrics.FLOOR))] * 3)} for split in splits}
        if np.isfinite(result.margins).all():
            reference = metrics.margins(study.oracles(forget_set), study.data.y)
            found = metrics.klom_summary(result.margins, reference, splits)
        ends = {split: dataclasses.astuple(estimates["p95"]) for split, estimates in found.items()}
        write_json(file, [[forget_set.name, split, *ends[split], result.cost, n] for split in splits])
    return pd.DataFrame(read_json(file), columns=COLUMNS)


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


def verdict(ablation: pd.DataFrame) -> str:
    """Say which values are clearly better or worse than the defaults, in one sentence for each option."""
    sentences = []
    for option, rows in scores(ablation).groupby("option", sort=False):
        base, best = rows[rows["default"]].iloc[0], rows.iloc[int(rows["value"].argmin())]
        of_base, of_best = (Estimate(row["value"], row["low"], row["high"]) for row in (base, best))
        better = ", ".join(rows.loc[rows["high"] < base["low"], "setting"])
        worse = ", ".join(rows.loc[rows["low"] > base["high"], "setting"])
        sentences.append(
            f"- `{option}`: default {base['setting']} scores {of_base}, the lowest is {best['setting']} with {of_best}"
            f"; clearly better than the default: {better or 'none'}; clearly worse: {worse or 'none'}."
        )
    return "\n".join(sentences)


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


def matching_verdict(table: pd.DataFrame, base: str = "OM, oracle, 1") -> str:
    """Say on how many forget sets each kind of targets ends clearly above one true oracle's."""
    wide = table.pivot_table(index="forget_set", columns=["split", "variant"], values=["low", "high"], sort=False)

    def above(split: str, one: str, other: str) -> str:
        holds = wide["low"][split][one] > wide["high"][split][other]
        return f"{int(holds.sum())} of {len(holds)}"

    lines = [
        f"- {v}: clearly above on {above('forget', v, base)} forget sets, clearly below on {above('forget', base, v)}; "
        f"on validation points {above('validation', v, base)} and {above('validation', base, v)}."
        for v in table["variant"].unique()
        if v not in (base, "retrain")
    ]
    return "\n".join(["Against matching one true oracle each, KLoM p95 on F:", *lines])


def reach(table: pd.DataFrame) -> str:
    """Say how far DMM, as tuned, is from what the study set out to reach. Values, not intervals, are compared."""
    values = table.pivot_table(index="forget_set", columns=["variant", "split"], values="value", sort=False)
    cost = table[table["variant"] == "DMM"].groupby("forget_set")["cost"].first()
    held = {
        "forget within 1.5 x DM-direct": values["DMM"]["forget"] <= 1.5 * values["DM-direct"]["forget"],
        "retain within 1.25 x floor": values["DMM"]["retain"] <= 1.25 * values["retrain"]["retain"],
        "validation within 1.25 x floor": values["DMM"]["validation"] <= 1.25 * values["retrain"]["validation"],
        "cost at most 0.1": cost <= 0.1 + 0.005,
    }
    return "DMM as tuned: " + "; ".join(f"{name} on {int(h.sum())} of {len(h)} sets" for name, h in held.items()) + "."
