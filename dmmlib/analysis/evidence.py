"""Tidy tables behind claims that the main table does not hold: what datamodels predict, and how M carries over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dmmlib import datamodels, metrics
from dmmlib.metrics import Estimate

if TYPE_CHECKING:
    from dmmlib.study import Study

COLUMNS = ["n_subsets", "forget_set", "split", "statistic", "value", "low", "high"]


def predictions(study: Study, fitted: Mapping[int, datamodels.RidgeDatamodel], n_bootstrap: int = 200) -> pd.DataFrame:
    """How well datamodels predict oracles, and what more subset models bring: a row a statistic.

    Args:
        study: whose forget sets, originals and oracles.
        fitted: number of subset models -> plain ridge datamodel fitted on as many, from `Study.datamodel_of`.

    Returns:
        Columns n_subsets, forget_set, split, statistic, value, low, high. Statistics:
            correlation, slope: of predicted against true change of a point's mean margin on F, with the study's
                attributor; intervals resample originals and oracles.
            klom_p95: of DM-direct on F, with each of the fitted datamodels.
            lds: of the same, on training and validation points (forget_set is then "every").
    """
    rows: list[tuple[Any, ...]] = []

    def add(n_subsets: int, forget_set: str, split: str, statistic: str, e: Estimate) -> None:
        rows.append((n_subsets, forget_set, split, statistic, e.value, e.low, e.high))

    n, m = study.data.n_train, study.n_subsets_of(study.preset.attribution.name)
    for size, model in fitted.items():
        both = study.lds(model)
        add(size, "every", "train", "lds", datamodels.lds_estimate(*both[:, :, :n]))
        add(size, "every", "validation", "lds", datamodels.lds_estimate(*both[:, :, n:]))
        for f in study.forget_sets().values():
            before = metrics.margins(study.original_logits()[:, f.indices], study.data.y[f.indices])
            answers = before + metrics.right_logits(model.effect(f.indices), study.data.y)[f.indices]
            oracles = study.reference(f)[0][:, f.indices]
            summary = metrics.klom_summary(answers, oracles, {"forget": np.arange(len(f))})
            add(size, f.name, "forget", "klom_p95", summary["forget"]["p95"])
    for f in study.forget_sets().values():
        before = metrics.margins(study.original_logits()[:, f.indices], study.data.y[f.indices])
        after = before + metrics.right_logits(study.attributor().effect(f.indices), study.data.y)[f.indices]
        for statistic, estimate in agreement(before, after, study.reference(f)[0][:, f.indices], n_bootstrap).items():
            add(m, f.name, "forget", statistic, estimate)
    return pd.DataFrame(rows, columns=COLUMNS)


def agreement(
    originals: np.ndarray, predicted: np.ndarray, oracles: np.ndarray, n_bootstrap: int = 200, seed: int = 0
) -> dict[str, Estimate]:
    """Correlation and slope of predicted against true change of mean margins, with 95 % intervals over models.

    Args:
        originals: margins (N, n_points) before.
        predicted: margins (N, n_points) of predicted oracles, one an original.
        oracles: margins (n_oracles, n_points) of true ones.
    """
    rng = np.random.default_rng(seed)

    def scores(u: np.ndarray, o: np.ndarray) -> tuple[float, float]:
        base = u @ originals
        true, said = o @ oracles - base, u @ predicted - base
        true, said = true - true.mean(), said - said.mean()
        norm = float(np.sqrt((true**2).sum() * (said**2).sum()))
        return float(true @ said) / max(norm, 1e-12), float(true @ said) / max(float((true**2).sum()), 1e-12)

    sizes = len(originals), len(oracles)
    value = scores(*(np.full(k, 1 / k) for k in sizes))
    draws = [scores(*(rng.multinomial(k, np.full(k, 1 / k)) / k for k in sizes)) for _ in range(n_bootstrap)]
    errors = 1.96 * np.std(draws, axis=0, ddof=1)
    return {
        name: Estimate(v, v - float(e), v + float(e))
        for name, v, e in zip(("correlation", "slope"), value, errors, strict=True)
    }
