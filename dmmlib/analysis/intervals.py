"""Intervals of 95 %: Student's over draws, the bootstrap's over forget sets, Wilson's; and the power of KS tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm, t

from dmmlib.errors import DataError
from dmmlib.metrics import LEVEL, Estimate, ks_p_values

Z = 1.96


def mean_over(values: np.ndarray, log: bool = False, level: float = 0.05) -> Estimate:
    """Compute the mean (geometric, if `log`) with a t-interval of 1 - `level`; one value for each draw or seed.

    Raises:
        DataError: for fewer than two values.
    """
    v = np.log(values) if log else np.asarray(values, float)
    if len(v) < 2:
        raise DataError(f"An interval was asked for over {len(v)} value; give at least 2 draws or seeds.")
    mean, error = float(v.mean()), float(t.ppf(1 - level / 2, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v)))
    ends = (mean, mean - error, mean + error)
    return Estimate(*(float(np.exp(e)) for e in ends)) if log else Estimate(*ends)


def means_over(table: pd.DataFrame, keys: Sequence[str], column: str = "value") -> pd.DataFrame:
    """Compute the mean of a column for each combination of keys, with a t-interval over its rows; NaN does not count.

    Returns:
        Columns `keys`, value, low, high (NaN of one value), n.
    """
    found = table.groupby([*keys], sort=False)[column].agg(value="mean", error="sem", n="count")
    error = found["error"] * t.ppf(0.975, found["n"] - 1)
    found = found.assign(low=found["value"] - error, high=found["value"] + error)
    return found[["value", "low", "high", "n"]].reset_index()


def median_over(values: np.ndarray | pd.Series | Sequence[float], n_bootstrap: int = 2000, seed: int = 0) -> Estimate:
    """Compute the median with a percentile interval that resamples the values, one for each forget set."""
    values = np.asarray(values, float)
    rows = np.random.default_rng(seed).integers(0, len(values), (n_bootstrap, len(values)))
    low, high = np.percentile(np.median(values[rows], axis=1), [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high))


def effective_number(directions: np.ndarray) -> float:
    """Compute how many independent directions k vectors (k, d) are worth, from 1 to k.

    It is the participation ratio of their matrix of cosines C, tr(C)^2 / tr(C^2).
    """
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True).clip(1e-12)
    return len(unit) ** 2 / float(((unit @ unit.T) ** 2).sum())


def wilson(successes: int, n: int) -> Estimate:
    """Compute the share of successes in n trials, with Wilson's interval."""
    found = binomtest(successes, n).proportion_ci(2 * float(norm.cdf(Z)) - 1, "wilson")
    return Estimate(successes / n, float(found.low), float(found.high))


def certain(share: Estimate, n: int) -> Estimate:
    """A share of n, resampled; with Wilson's interval where no resample differs from it, as it is 0 or 1."""
    nearest = np.clip(np.round(share.value), 0, 1)
    return wilson(int(nearest) * n, n) if np.allclose(astuple(share), nearest, atol=1e-9) else share


def ks_power(n_models: int, shift: float, n_draws: int = 4000) -> float:
    """Compute how often a KS test of level .05 tells n normal margins from n that are shifted, in sd; by simulation."""
    margins = np.random.default_rng(0).normal(size=(2, n_models, n_draws)).astype(np.float32)
    return float((ks_p_values(margins[0] + shift, margins[1]) <= LEVEL).mean())
