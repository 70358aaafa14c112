"""Attributors side by side, fitted to the same models: what each makes of an equal training cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.attribution.base import Context, fit, get
from dmmlib.datamodels import Attributor, lds_estimate
from dmmlib.errors import DataError
from dmmlib.forget_sets import ForgetSet

Unlearn = Callable[[Attributor, ForgetSet], np.ndarray]
"""Margins (n_models, n_points) of models that forgot a set by what an attributor predicts."""


def compare(
    settings: Mapping[str, tuple[str, Mapping[str, Any]]],
    context: Context,
    held_out: tuple[np.ndarray, np.ndarray],
    oracles: Mapping[str, tuple[ForgetSet, np.ndarray]],
    methods: Mapping[str, Unlearn] | None = None,
    n_bootstrap: int = 50,
) -> pd.DataFrame:
    """Fit each setting to the same context and measure it.

    Args:
        settings: label -> (registered name, options).
        context: what all of them are fitted to, with the originals' logits.
        held_out: masks (k, n_train) and logits (k, n_points, n_classes) of subset models that fitted nothing.
        oracles: name -> a forget set, and the logits (n_oracles, n_points, n_classes) of models retrained without it.
        methods: of unlearning by an attributor, besides DM-direct, e.g. DMM.
        n_bootstrap: resamples of models for the intervals of KLoM; 0 for none.

    Returns:
        Tidy: columns attributor, n_models (subset models spent), method, forget_set, split, statistic, value, low,
        high. Statistics: "cost" of the subset models (retrainings) and "seconds" of the fit; "lds" on held-out subsets
        (over all points); for each method, forget set and split "klom_mean" and "klom_p95"; and of DM-direct also
        "slope" of the true on the predicted change of mean margins, through the origin (1 is calibrated; below 1
        overstates). Intervals are 95 %, over subsets or models; slope, cost and seconds have none.

    Raises:
        MethodError: for a name that is not registered, before anything is fitted.
        DataError: for a context without the originals' logits.
    """
    for name, _ in settings.values():
        get(name)
    if context.original_logits is None:
        raise DataError("DM-direct starts from the originals; give the context `original_logits`.")
    before = _margins(context.original_logits, context)
    true = {name: _margins(logits, context) for name, (_, logits) in oracles.items()}
    rows: list[dict[str, Any]] = []
    for label, (name, options) in settings.items():
        start = time.perf_counter()
        attributor = fit(name, context, **options)
        seconds = time.perf_counter() - start
        head = {"attributor": label, "n_models": len(context.masks)}
        score = lds_estimate(_held_out_margins(attributor, context, held_out[0]), _margins(held_out[1], context))
        cost = float(context.masks.mean(1).sum())
        for statistic, estimate in (("cost", _exact(cost)), ("seconds", _exact(seconds)), ("lds", score)):
            rows.append(head | _row("", "", "all", statistic, estimate))
        for forget_name, (forget_set, _) in oracles.items():
            splits = forget_set.splits(context.n_train, len(context.x) - context.n_train)
            direct = before + _effect(attributor, context, forget_set.indices)
            answers = {"dm_direct": direct} | {m: run(attributor, forget_set) for m, run in (methods or {}).items()}
            for method, margins in answers.items():
                for split, found in _klom(margins, true[forget_name], splits, n_bootstrap).items():
                    for statistic, estimate in found.items():
                        rows.append(head | _row(method, forget_name, split, f"klom_{statistic}", estimate))
            changes = [m.mean(0) - before.mean(0) for m in (direct, true[forget_name])]
            for split, indices in splits.items():
                slope = _slope(*(change[indices] for change in changes))
                rows.append(head | _row("dm_direct", forget_name, split, "slope", _exact(slope)))
    return pd.DataFrame(rows)


def _row(method: str, forget_set: str, split: str, statistic: str, e: metrics.Estimate) -> dict[str, Any]:
    what = {"method": method, "forget_set": forget_set, "split": split, "statistic": statistic}
    return what | {"value": e.value, "low": e.low, "high": e.high}


def _exact(value: float) -> metrics.Estimate:
    return metrics.Estimate(value, np.nan, np.nan)


def _slope(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(predicted @ true / max(float(predicted @ predicted), 1e-12))


def _klom(
    margins: np.ndarray, oracle: np.ndarray, splits: Mapping[str, np.ndarray], n_bootstrap: int
) -> Mapping[str, Mapping[str, metrics.Estimate]]:
    if n_bootstrap:
        return metrics.klom_summary(margins, oracle, splits, n_bootstrap)
    values = metrics.klom(margins, oracle)
    return {
        split: {name: _exact(statistic(values[indices])) for name, statistic in metrics.STATISTICS.items()}
        for split, indices in splits.items()
    }


def _margins(logits: np.ndarray, context: Context) -> np.ndarray:
    return metrics.margins(logits, context.labels)


def _held_out_margins(attributor: Attributor, context: Context, masks: np.ndarray) -> np.ndarray:
    """Predicted margins (k, n_points) of masks; without a `predict` of its own, the mean original plus an effect."""
    predict = getattr(attributor, "predict", None)
    if predict is not None:
        return metrics.right_logits(predict(masks), context.labels)
    assert context.original_logits is not None
    mean = _margins(context.original_logits, context).mean(0)
    return np.stack([mean + _effect(attributor, context, np.flatnonzero(~mask)) for mask in masks])


def _effect(attributor: Attributor, context: Context, forget: np.ndarray) -> np.ndarray:
    """Predicted change of margins (n_points,)."""
    return metrics.right_logits(attributor.effect(forget), context.labels)
