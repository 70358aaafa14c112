"""What matching depends on: DMM with one option changed at a time, and oracle matching with more or fewer oracles.

Ablations run on the tuning sets only, so that nothing they teach is learnt from reported forget sets; comparisons of
methods run on the reported ones, with one setting for all, chosen on the tuning sets. Measurements are kept on disk.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from dmmlib import metrics, unlearn
from dmmlib.attribution.gradients import margin
from dmmlib.errors import OptionError
from dmmlib.files import config_hash, read_json, write_json
from dmmlib.forget_sets import ForgetSet
from dmmlib.metrics import Estimate
from dmmlib.optim import SGD, Adam
from dmmlib.study import Study
from dmmlib.unlearn.base import Phase, Problem, Unlearned, draw_batches, finetune
from dmmlib.unlearn.matching import DAMPING, N_WHITEN, dmm, match, predicted_oracle
from dmmlib.unlearn.whitening import Whitening

T = TypeVar("T")

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


def _kl(logits: Tensor, goal: Tensor) -> Tensor:
    return kl_div(logits.log_softmax(2), goal.log_softmax(2), log_target=True, reduction="none").sum(2)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": lambda logits, goal, labels: ((logits - goal) ** 2).mean(2),
    "kl": lambda logits, goal, labels: _kl(logits, goal),
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
    """DMM with options that it does not have, since none of them was clearly better.

    Args:
        problem: what to unlearn; its attributor predicts.
        cost, lr, batch_size, forget_share: of `match`.
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
    targets, x, y = predicted_oracle(problem)[:, : problem.n_train], problem.x, problem.y
    goal = torch.from_numpy(targets).to(x.device)
    counts = torch.from_numpy(_confidence(problem)).to(x.device) if weighted else torch.ones_like(y, dtype=goal.dtype)

    def to_targets(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        return (counts[indices] * LOSSES[loss](logits, goal[models[:, None], indices], y[indices])).mean(1)

    budget, seen, whitening = cost * problem.retraining, 0, None
    if optimizer == "whitened":
        seen = max(1, min(N_WHITEN, len(problem.retain), round(budget / 8)))
        points = np.stack([rng.permutation(problem.retain)[:seen] for rng in problem.rngs(2)])
        whitening = Whitening(x, points, DAMPING, problem.originals.module)
    n_steps = max(1, round((budget - seen) / batch_size))
    from_forget = min(max(1, round(forget_share * batch_size)), batch_size - 1)
    forget = draw_batches(problem, problem.forget, n_steps, from_forget)
    retain = _retained(problem, targets, n_steps, batch_size - from_forget, influence)
    phases = [Phase(list(np.concatenate([forget, retain], axis=2)), to_targets)]
    steps = SGD(lr) if optimizer == "sgd" else Adam(lr)
    return finetune(problem, phases, steps, rate=lambda t: lr * (1 - t), spent=seen, whitening=whitening)


def _confidence(problem: Problem) -> np.ndarray:
    """v / (v + sd^2) of each training point (n_train,)."""
    sd = None if problem.attributor is None else problem.attributor.sd(problem.forget)
    if sd is None:
        raise OptionError("weighted=True needs an attributor that has an `sd`; use 'bayesian', or weighted=False.")
    n = problem.n_train
    v = metrics.margins(problem.original_logits[:, :n], problem.labels[:n]).var(0)
    return np.asarray(v / np.maximum(v + sd[:n] ** 2, 1e-12), np.float32)


def _retained(problem: Problem, targets: np.ndarray, n_steps: int, size: int, influence: float) -> np.ndarray:
    """Points of R (n_steps, N, size), some drawn evenly, some by how far their targets lie."""
    by_influence = round(influence * size)
    parts = [draw_batches(problem, problem.retain, n_steps, size - by_influence)] if by_influence < size else []
    if by_influence:
        far = ((targets - problem.original_logits[:, : problem.n_train]) ** 2).mean((0, 2))[problem.retain] ** 0.5
        shares = (far + 1e-12) / (far + 1e-12).sum()
        drawn = [rng.choice(problem.retain, (n_steps, by_influence), p=shares) for rng in problem.rngs(use=3)]
        parts.append(np.stack(drawn, axis=1))
    return np.concatenate(parts, axis=2)


# --- measuring -------------------------------------------------------------------------------------------


def measure(
    study: Study, method: str, setting: Mapping[str, Any], forget_set: ForgetSet, run: unlearn.Method | None = None
) -> pd.DataFrame:
    """KLoM's 95th percentile of a method with a setting on each split of a forget set, kept on disk.

    Args:
        run: what to run on a tuning set, with tuning.n_models models, in place of the registered method.

    Returns:
        One row for each split: columns forget_set, split, value, low, high (95 % interval over models), cost,
        n_models. A setting that makes models diverge has KLoM's maximum.
    """
    n = study.preset.tuning.n_models if run else study.preset.ensembles.n_models
    config = study.unlearning_identity(method, dict(setting), forget_set)
    config |= {"n_models": n, "checkpoints": 0, "oracles": study.preset.ensembles.n_models}
    file = study.runs / "store" / f"measured-{method}-{config_hash(config)}.json"
    if not file.exists():
        problem = dataclasses.replace(study.problem(forget_set, method, tuning=run is not None), checkpoints=0)
        result = (run or unlearn.get(method))(problem, **setting)
        splits = forget_set.splits(study.data.n_train, study.data.n_val)
        worst = Estimate(*[-float(np.log(metrics.FLOOR))] * 3)
        found = {split: {"p95": worst} for split in splits}
        if np.isfinite(result.margins).all():
            reference = metrics.margins(study.oracles(forget_set), study.data.y)
            found = metrics.klom_summary(result.margins, reference, splits)
        ends = {split: dataclasses.astuple(estimates["p95"]) for split, estimates in found.items()}
        write_json(file, [[forget_set.name, split, *ends[split], result.cost, n] for split in splits])
    return pd.DataFrame(read_json(file), columns=COLUMNS)


def _tracked(study: Study, what: str, items: Sequence[T]) -> Iterator[T]:
    """The items, with progress said before each of them and at the end."""
    for i, item in enumerate(items):
        study.progress(what, i, len(items))
        yield item
    study.progress(what, len(items), len(items))


def default_setting() -> dict[str, Any]:
    """The defaults of DMM, and of what `variant` adds to it."""
    parameters = [p for method in (match, variant) for p in inspect.signature(method).parameters.values()]
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


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
    pairs = [(*trial, f) for f in study.tuning_sets().values() for trial in trials]
    parts = []
    for option, value, forget_set in _tracked(study, "ablation of DMM", pairs):
        changed: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {option: value}
        rows = measure(study, "dmm", base | changed, forget_set, variant)
        label = ", ".join(str(v) if k == option else f"{k} {v}" for k, v in changed.items())
        parts.append(rows.assign(option=option, setting=label, default=value == base[option]))
    return pd.concat(parts, ignore_index=True)[["option", "setting", "default", *COLUMNS]]


def scores(ablation: pd.DataFrame) -> pd.DataFrame:
    """Each setting's score, as `Study.search` has it: KLoM p95, mean of splits and of tuning sets, with an interval.

    Returns:
        Columns option, setting, default, value, low, high, cost, worst (the highest p95 on F over tuning sets).
        Intervals take errors of splits and sets as fully dependent, so they are on the wide side.
    """
    keys = ["option", "setting", "default"]
    table = ablation.groupby(keys, sort=False)[["value", "low", "high", "cost"]].mean()
    on_forget = ablation[ablation["split"] == "forget"].groupby(keys, sort=False)["value"]
    return table.assign(worst=on_forget.max()).reset_index()


def verdict(ablation: pd.DataFrame) -> str:
    """Which values are clearly better or worse than the defaults, in one sentence for each option."""
    sentences = []
    for option, rows in scores(ablation).groupby("option", sort=False):
        base, others, best = (
            rows[rows["default"]].iloc[0],
            rows[~rows["default"]],
            rows.iloc[int(rows["value"].argmin())],
        )
        better = others[others["high"] < base["low"]]["setting"]
        worse = others[others["low"] > base["high"]]["setting"]
        sentences.append(
            f"- `{option}`: default {base['setting']} scores {Estimate(*base[['value', 'low', 'high']])}, the "
            f"lowest is {best['setting']} with {Estimate(*best[['value', 'low', 'high']])}; clearly better "
            f"than the default: {', '.join(better) or 'none'}; clearly worse: {', '.join(worse) or 'none'}."
        )
    return "\n".join(sentences)


# --- targets ---------------------------------------------------------------------------------------------


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
    parts = [
        measure(study, method, options, f).assign(variant=name, targets=targets, n_oracles=k)
        for (name, targets, k, method, options), f in _tracked(study, "matching", pairs)
    ]
    return pd.concat(parts, ignore_index=True)[["variant", "targets", "n_oracles", *COLUMNS]]


def matching_verdict(table: pd.DataFrame, base: str = "OM, oracle, 1") -> str:
    """On how many forget sets each kind of targets ends clearly above one true oracle's, in sentences."""
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


def reach(table: pd.DataFrame, most: float = 0.1) -> str:
    """How far DMM, as tuned, is from what the study set out to reach on each forget set, in a sentence.

    Forget p95 within 1.5 times DM-direct's, retain and validation p95 within 1.25 times retraining's, at a cost of at
    most `most` of a retraining. Values, not intervals, are compared.
    """
    values = table.pivot_table(index="forget_set", columns=["variant", "split"], values="value", sort=False)
    cost = table[table["variant"] == "DMM"].groupby("forget_set")["cost"].first()
    held = {
        "forget within 1.5 x DM-direct": values["DMM"]["forget"] <= 1.5 * values["DM-direct"]["forget"],
        "retain within 1.25 x floor": values["DMM"]["retain"] <= 1.25 * values["retrain"]["retain"],
        "validation within 1.25 x floor": values["DMM"]["validation"] <= 1.25 * values["retrain"]["validation"],
        f"cost at most {most:g}": cost <= most + 0.005,
    }
    return "DMM as tuned: " + "; ".join(f"{name} on {int(h.sum())} of {len(h)} sets" for name, h in held.items()) + "."
