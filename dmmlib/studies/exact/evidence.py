"""Two-sample tests: do unlearned and retrained chains come from one distribution? And couplings that fail them."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp

from dmmlib.errors import DataError
from dmmlib.studies.exact.chains import Array, reflection


def same_law(a: np.ndarray, b: np.ndarray, rng: Generator, n_permutations: int = 199) -> dict[str, float]:
    """Test that runs a and b, (n_a, ...) and (n_b, ...), have the same distribution.

    Coordinates that are constant in both are left out; the others are brought to one scale. Returns p-values: of
    Kolmogorov-Smirnov tests in every coordinate ("KS, Holm", the smallest after Holm's correction), of the energy
    distance ("energy"), and of both together ("both", Bonferroni).

    Raises DataError for shapes that differ, or fewer than ten runs.
    """
    if a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 10:
        raise DataError(f"Runs have shapes {a.shape} and {b.shape}; give at least 10 on each side, of one shape.")
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    scale = np.concatenate([a, b]).std(0)
    a, b = (s[:, scale > 0] / scale[scale > 0] for s in (a, b))
    ks = ks_2samp(a, b, axis=0, method="asymp").pvalue
    p = {"KS, Holm": min(1.0, float(len(ks) * ks.min())), "energy": energy_test(a, b, rng, n_permutations)}
    return p | {"both": min(1.0, 2 * min(p.values()))}


def energy_test(a: np.ndarray, b: np.ndarray, rng: Generator, n_permutations: int) -> float:
    """Compute the p-value of the energy distance 2 E|a - b| - E|a - a'| - E|b - b'| under permutations of the labels.

    The statistic is -z^T D z with D the distances between all runs and z = 1/n_a or -1/n_b, so all permutations
    are one product of matrices. Szekely and Rizzo, "Energy statistics", 2013.
    """
    both = np.concatenate([a, b])
    distances = cdist(both, both).astype(np.float32)
    z = np.repeat([1 / len(a), -1 / len(b)], [len(a), len(b)]).astype(np.float32)
    labels = np.stack([z, *(rng.permutation(z) for _ in range(n_permutations))], 1)
    statistic = -np.einsum("ik,ik->k", labels, distances @ labels, dtype=np.float64)
    return float((statistic >= statistic[0]).mean())


def never_refuse(step: Array, old: Array, new: Array, noise: float, rng: Generator) -> tuple[Array, Array]:
    """Keep every stored step (no rejection)."""
    return step, np.zeros(len(step), bool)


def keep_refused(step: Array, old: Array, new: Array, noise: float, rng: Generator) -> tuple[Array, Array]:
    """Keep a refused step without reflecting it, and draw only what comes after it again."""
    return step, reflection(step, old, new, noise, rng)[1]


def redraw_refused(step: Array, old: Array, new: Array, noise: float, rng: Generator) -> tuple[Array, Array]:
    """Draw a fresh step in place of the reflection: plausible, and wrong, as it adds N(new) to what was kept."""
    refused = reflection(step, old, new, noise, rng)[1]
    return np.where(refused[:, None], new + noise * rng.standard_normal(step.shape), step), refused


BROKEN = {"no rejection": never_refuse, "no reflection": keep_refused, "redrawn, not reflected": redraw_refused}
