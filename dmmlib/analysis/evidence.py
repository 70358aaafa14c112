"""Tidy tables behind claims that the main table does not hold: what datamodels predict, and how M carries over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import datamodels, metrics
from dmmlib.metrics import Estimate
from dmmlib.study import Study
from dmmlib.trainer import ModelSet

COLUMNS = ["n_subsets", "forget_set", "split", "statistic", "value", "low", "high"]


def predictions(study: Study, fitted: Mapping[int, datamodels.RidgeDatamodel], n_bootstrap: int = 200) -> pd.DataFrame:
    """Measure how well datamodels predict a study's oracles, and what more subset models bring.

    Args:
        fitted: number of subset models -> plain ridge datamodel fitted on as many, from `Study.datamodel_of`.

    Returns:
        Columns `COLUMNS`. Statistics: "lds" of each fitted datamodel on training and validation points (forget_set is
        then "every"), and "klom_p95" of DM-direct on F with it; "correlation" and "slope", see `agreement`, with the
        study's attributor.
    """
    rows: list[list[Any]] = []
    n, m, y = study.data.n_train, study.n_subsets_of(study.preset.attribution.name), study.data.y
    sets = {}
    for f in study.forget_sets().values():
        before = metrics.margins(study.original_logits()[:, f.indices], y[f.indices])
        sets[f.name] = f.indices, before, study.reference(f)[0][:, f.indices]
    forgotten = [forget for forget, _, _ in sets.values()]
    for size, model in fitted.items():
        both = study.lds(model)
        for split, points in (("train", slice(n)), ("validation", slice(n, None))):
            rows.append([size, "every", split, "lds", *astuple(datamodels.lds_estimate(*both[:, :, points]))])
        for (name, (forget, before, oracles)), change in zip(sets.items(), model.effects(forgotten), strict=True):
            after = before + metrics.right_logits(change, y)[forget]
            summary = metrics.klom_summary(after, oracles, {"forget": np.arange(len(forget))})
            rows.append([size, name, "forget", "klom_p95", *astuple(summary["forget"]["p95"])])
    for (name, (forget, before, oracles)), change in zip(
        sets.items(), study.attributor().effects(forgotten), strict=True
    ):
        after = before + metrics.right_logits(change, y)[forget]
        for statistic, estimate in agreement(before, after, oracles, n_bootstrap).items():
            rows.append([m, name, "forget", statistic, *astuple(estimate)])
    return pd.DataFrame(rows, columns=COLUMNS)


def agreement(
    originals: np.ndarray, predicted: np.ndarray, oracles: np.ndarray, n_bootstrap: int = 200, seed: int = 0
) -> dict[str, Estimate]:
    """Compute correlation, and slope of true on predicted change of mean margins; 95 % intervals over models.

    Takes margins of originals (N, n_points), of the oracle predicted for each, and of true ones (n_oracles, n_points).
    """
    rng = np.random.default_rng(seed)

    def scores(u: np.ndarray, o: np.ndarray) -> tuple[float, float]:
        base = u @ originals
        true, said = o @ oracles - base, u @ predicted - base
        slope = float(true @ said) / max(float(said @ said), 1e-12)  # through the origin: 1 is calibrated
        true, said = true - true.mean(), said - said.mean()
        return float(true @ said) / max(float(np.sqrt((true**2).sum() * (said**2).sum())), 1e-12), slope

    even = [np.full(k, 1 / k) for k in (len(originals), len(oracles))]
    draws = [scores(*(rng.multinomial(len(p), p) / len(p) for p in even)) for _ in range(n_bootstrap)]
    ends = zip(scores(*even), np.std(draws, axis=0, ddof=1), strict=True)
    return dict(zip(("correlation", "slope"), (Estimate.normal(value, error) for value, error in ends), strict=True))


def ceiling(margins: np.ndarray) -> np.ndarray:
    """Estimate the LDS (n_points,) of a predictor that knows the mean margin of each training set: what noise leaves.

    With variances B of means between masks and W of models within one, the correlation of a mean with a single model is
    sqrt(B / (B + W)); B is what the means of `margins` (n_masks, n_seeds, n_points) vary by beyond W / n_seeds.

    >>> rng = np.random.default_rng(0)
    >>> float(ceiling(rng.normal(size=(400, 1, 1)) + 0.5 * rng.normal(size=(400, 8, 1)))[0].round(2))  # sqrt(1 / 1.25)
    0.89
    """
    within = margins.var(1, ddof=1).mean(0)
    between = np.clip(margins.mean(1).var(0, ddof=1) - within / margins.shape[1], 0, None)
    return np.sqrt(between / np.maximum(between + within, 1e-12))


def repeated(study: Study, n_masks: int = 12, n_seeds: int = 8) -> np.ndarray:
    """Train models of several seeds on held-out training sets: margins (n_masks, n_seeds, n_points)."""
    masks = study.held_out()[0][-n_masks:]
    outputs = study.outputs(ModelSet("ceiling", np.repeat(masks, n_seeds, axis=0)))[:]
    return metrics.right_logits(outputs, study.data.y).reshape(len(masks), n_seeds, -1)


OWN = ("laptop", "smoke", "digits", "cifar10", "cifar10-images", "living17", "replicate")


def expect(study: Study, holds: Any, finding: str) -> None:
    """Assert a finding where the presets of the library are run as they are; on other data it is no error, but said.

    What must hold on any data, however small, is asserted by `assert`.
    """
    if not holds and study.preset.name in OWN and study.output == study.directory:
        raise AssertionError(f"{finding[0].upper()}{finding[1:]}; {study.preset.name} does not show it.")
    if not holds:
        print(f"Not seen on these data, or with so few models: {finding}.")
