"""Attributors side by side, fitted to the same models: what each makes of an equal training cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.attribution.base import Context, fit, get
from dmmlib.datamodels import Attributor, lds_estimate
from dmmlib.errors import DataError
from dmmlib.forget_sets import ForgetSet

COLUMNS = ["attributor", "n_models", "method", "forget_set", "split", "statistic", "value", "low", "high"]
Unlearn = Callable[[Attributor, ForgetSet], np.ndarray]
"""Margins (n_models, n_points) of models that forgot a set by what an attributor predicts."""


def compare(
    settings: Mapping[str, tuple[str, Mapping[str, Any]]],
    context: Context,
    held_out: tuple[np.ndarray, np.ndarray],
    oracles: Mapping[str, tuple[ForgetSet, np.ndarray]],
    methods: Mapping[str, Unlearn] | None = None,
) -> pd.DataFrame:
    """Fit each setting to the same context and measure it.

    Args:
        settings: label -> (registered name, options).
        context: what all of them are fitted to, with the originals' logits.
        held_out: masks (k, n_train) and logits (k, n_points, n_classes) of subset models that fitted nothing.
        oracles: name -> a forget set, and the logits (n_oracles, n_points, n_classes) of models retrained without it.
        methods: of unlearning by an attributor, besides DM-direct, e.g. DMM.

    Returns:
        Tidy, columns `COLUMNS`; n_models are the subset models spent. Statistics: "cost" of these (retrainings) and
        "seconds" of the fit; "lds" on held-out subsets (over all points), with a 95 % interval over subsets; for each
        method, forget set and split "klom_mean" and "klom_p95"; and of DM-direct also "slope" of the true on the
        predicted change of mean margins, through the origin (1 is calibrated; below 1 overstates).

    Raises:
        MethodError: for a name that is not registered, before anything is fitted.
        DataError: for a context without the originals' logits.
    """
    for name, _ in settings.values():
        get(name)
    if context.original_logits is None:
        raise DataError("DM-direct starts from the originals; give the context `original_logits`.")
    before = metrics.margins(context.original_logits, context.labels)
    true = {name: metrics.margins(logits, context.labels) for name, (_, logits) in oracles.items()}
    rows: list[tuple[Any, ...]] = []
    none = np.nan, np.nan  # no interval
    for label, (name, options) in settings.items():
        start = time.perf_counter()
        attributor = fit(name, context, **options)
        seconds = time.perf_counter() - start
        predicted = metrics.right_logits(attributor.predict(held_out[0]), context.labels)
        lds = lds_estimate(predicted, metrics.margins(held_out[1], context.labels))
        spent = label, len(context.masks)
        rows.append((*spent, "", "", "all", "cost", float(context.masks.mean(1).sum()), *none))
        rows.append((*spent, "", "", "all", "seconds", seconds, *none))
        rows.append((*spent, "", "", "all", "lds", *astuple(lds)))
        for forget, (forget_set, _) in oracles.items():
            splits = forget_set.splits(context.n_train, len(context.x) - context.n_train)
            change = metrics.right_logits(attributor.effect(forget_set.indices), context.labels)
            answers = {"dm_direct": before + change}
            answers |= {method: unlearn(attributor, forget_set) for method, unlearn in (methods or {}).items()}
            for method, margins in answers.items():
                klom = metrics.klom(margins, true[forget])
                for (split, at), (statistic, measure) in itertools.product(splits.items(), metrics.STATISTICS.items()):
                    rows.append((*spent, method, forget, split, f"klom_{statistic}", measure(klom[at]), *none))
            said, happened = (m.mean(0) - before.mean(0) for m in (answers["dm_direct"], true[forget]))
            for split, at in splits.items():
                slope = float(said[at] @ happened[at]) / max(float(said[at] @ said[at]), 1e-12)
                rows.append((*spent, "dm_direct", forget, split, "slope", slope, *none))
    return pd.DataFrame(rows, columns=COLUMNS)
