"""Attributors side by side, fitted to the same models: what each makes of an equal training cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.attribution.base import Context, fit, get
from dmmlib.datamodels import Attributor, lds_estimate
from dmmlib.errors import DataError
from dmmlib.forget_sets import ForgetSet


def compare(
    settings: Mapping[str, tuple[str, Mapping[str, Any]]],
    context: Context,
    held_out: tuple[np.ndarray, np.ndarray],
    oracles: Mapping[str, tuple[ForgetSet, np.ndarray]],
) -> pd.DataFrame:
    """Fit each setting to the same context and measure it.

    Args:
        settings: label -> (registered name, options).
        context: what all of them are fitted to, with the originals' logits.
        held_out: masks (k, n_train) and logits (k, n_points, n_classes) of subset models that fitted nothing.
        oracles: name -> a forget set, and the logits (n_oracles, n_points, n_classes) of models retrained without it.

    Returns:
        Tidy: columns attributor, n_models (subset models spent), forget_set, split, statistic, value, low, high.
        Statistics: "lds" on held-out subsets (over all points); for each forget set and split "klom_mean" and
        "klom_p95" of DM-direct, and "slope" of the true on the predicted change of mean margins, through the
        origin (1 is calibrated; below 1 overstates). Intervals are 95 %, over subsets or models; the slope has none.

    Raises:
        MethodError: for a name that is not registered, before anything is fitted.
        DataError: for a context without the originals' logits.
    """
    for name, _ in settings.values():
        get(name)
    if context.original_logits is None:
        raise DataError("DM-direct starts from the originals; give the context `original_logits`.")
    rows: list[dict[str, Any]] = []
    for label, (name, options) in settings.items():
        attributor = fit(name, context, **options)
        head = {"attributor": label, "n_models": len(context.masks)}
        score = lds_estimate(_held_out_margins(attributor, context, held_out[0]), _margins(held_out[1], context))
        rows.append(head | _row("", "all", "lds", score))
        for forget_name, (forget_set, logits) in oracles.items():
            for split, statistic, estimate in _direct(attributor, context, forget_set, logits):
                rows.append(head | _row(forget_name, split, statistic, estimate))
    return pd.DataFrame(rows)


def _row(forget_set: str, split: str, statistic: str, e: metrics.Estimate) -> dict[str, Any]:
    numbers = {"value": e.value, "low": e.low, "high": e.high}
    return {"forget_set": forget_set, "split": split, "statistic": statistic, **numbers}


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


def _direct(
    attributor: Attributor, context: Context, forget_set: ForgetSet, oracle_logits: np.ndarray
) -> list[tuple[str, str, metrics.Estimate]]:
    """Split, statistic and estimate of DM-direct on one forget set."""
    assert context.original_logits is not None
    before, oracle = _margins(context.original_logits, context), _margins(oracle_logits, context)
    unlearned = before + _effect(attributor, context, forget_set.indices)
    splits = forget_set.splits(context.n_train, len(context.x) - context.n_train)
    found = [
        (split, f"klom_{name}", estimate)
        for split, statistics in metrics.klom_summary(unlearned, oracle, splits).items()
        for name, estimate in statistics.items()
    ]
    predicted, true = (m.mean(0) - before.mean(0) for m in (unlearned, oracle))
    for split, indices in splits.items():
        p, t = predicted[indices], true[indices]
        slope = float(p @ t / max(float(p @ p), 1e-12))
        found.append((split, "slope", metrics.Estimate(slope, np.nan, np.nan)))
    return found
