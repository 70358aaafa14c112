"""Measure unlearned models against retrained ones: the rows of a study's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmmlib import metrics
from dmmlib.metrics import Estimate
from dmmlib.unlearn import Unlearned

TRAJECTORY = ("split", "cost", "p95", "gap", "under", "over")


def evaluate(
    result: Unlearned, margins: np.ndarray, correct: np.ndarray, splits: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Compare a method's result with oracles.

    Args:
        result: of a method.
        margins, correct: of the oracles (N, n_points).
        splits: name -> positions of points.

    Returns:
        One row per split and statistic (klom_mean, klom_p95, mean_gap, ks_share, ks_fdr, accuracy, accuracy_gap,
        u_lira; cost on the split "all"): split, statistic, value, low, high (a 95 % interval: over models, but for
        u_lira over points) and n_models.
    """
    kloms = metrics.klom_summary(result.margins, margins, splits)
    gaps = metrics.gap_summary(result.margins, margins, splits)
    accuracy_gaps = metrics.accuracy_gap(result.correct, correct, splits)
    found = [(split, f"klom_{name}", e) for split, statistics in kloms.items() for name, e in statistics.items()]
    found += [(split, name, e) for split, statistics in gaps.items() for name, e in statistics.items()]
    found += [(split, "accuracy", Estimate.of(result.correct[:, at].mean(1), 0.0)) for split, at in splits.items()]
    found += [(split, "accuracy_gap", e) for split, e in accuracy_gaps.items()]
    for split, indices in splits.items():
        accuracy = metrics.u_lira(result.margins[:, indices], margins[:, indices])
        alone = len(accuracy) == 1  # and one point has no spread
        found.append((split, "u_lira", Estimate(float(accuracy[0]), 0.0, 1.0) if alone else Estimate.of(accuracy)))
    found.append(("all", "cost", Estimate(result.cost, result.cost, result.cost)))
    return [
        {"split": split, "statistic": name, "value": e.value, "low": e.low, "high": e.high, "n_models": len(margins)}
        for split, name, e in found
    ]


def trajectory(result: Unlearned, margins: np.ndarray) -> list[tuple[str, float, float, float, float, float]]:
    """Follow a method's models along the way, against oracles' margins (N, n_forget) on F.

    Returns:
        Rows of `TRAJECTORY`, one per moment: p95 is KLoM's 95th percentile, gap the mean of |`metrics.gaps`|; under and
        over are the shares of points whose gap is above 1, or below -1.
    """
    rows = []
    for cost, at in zip(result.costs, result.trajectory, strict=True):
        p95, gaps = float(np.percentile(metrics.klom(at, margins), 95)), metrics.gaps(at, margins)
        rows.append(("forget", float(cost), p95, float(np.abs(gaps).mean()), (gaps > 1).mean(), (gaps < -1).mean()))
    return rows
