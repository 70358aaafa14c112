"""Two-sample tests: do unlearned and retrained chains come from one distribution?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp

from dmmlib.errors import DataError
from dmmlib.studies.exact.chains import reflection


@dataclass(frozen=True)
class Verdict:
    """Evidence against equality of two samples.

    Attributes:
        energy_p: p-value of the energy distance's permutation test.
        ks_p: smallest Kolmogorov-Smirnov p-value over coordinates, Holm-corrected.
        n: runs on each side.
        n_coordinates: how many coordinates were tested.
    """

    energy_p: float
    ks_p: float
    n: int
    n_coordinates: int

    @property
    def p(self) -> float:
        """p-value of both tests together (Bonferroni)."""
        return min(1.0, 2 * min(self.energy_p, self.ks_p))


def same_law(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, n_permutations: int = 199) -> Verdict:
    """Test that runs a and b, (n_a, ...) and (n_b, ...), have the same distribution.

    Coordinates that are constant in both are left out; the others are brought to one scale.

    Raises:
        DataError: for shapes that differ, or fewer than ten runs.
    """
    if a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 10:
        raise DataError(f"Runs have shapes {a.shape} and {b.shape}; give at least 10 a side, of one shape.")
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    scale = np.concatenate([a, b]).std(0)
    a, b = (s[:, scale > 0] / scale[scale > 0] for s in (a, b))
    return Verdict(energy_test(a, b, rng, n_permutations), holm(ks(a, b)), min(len(a), len(b)), a.shape[1])


def energy_test(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, n_permutations: int) -> float:
    """p-value of the energy distance 2 E|a - b| - E|a - a'| - E|b - b'| under permutations of the labels.

    The statistic is -z^T D z with D the distances between all runs and z = 1/n_a or -1/n_b, so all permutations
    are one product of matrices. Szekely and Rizzo, "Energy statistics", 2013.
    """
    both = np.concatenate([a, b])
    distances = cdist(both, both).astype(np.float32)
    z = np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), -1 / len(b))]).astype(np.float32)
    labels = np.stack([z, *(rng.permutation(z) for _ in range(n_permutations))], 1)
    statistic = -np.einsum("ik,ik->k", labels, distances @ labels, dtype=np.float64)
    return float((statistic >= statistic[0]).mean())


def ks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kolmogorov-Smirnov p-value of each coordinate (d,)."""
    return np.array([ks_2samp(a[:, j], b[:, j], method="asymp").pvalue for j in range(a.shape[1])])


def holm(p: np.ndarray) -> float:
    """The smallest p-value after Holm's correction (of the smallest, that is Bonferroni's)."""
    return float(min(1.0, len(p) * p.min()))


# --- couplings that are wrong, for the tests to catch --------------------------------------------------


def never_refuse(
    step: np.ndarray, old: np.ndarray, new: np.ndarray, noise: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """No rejection: every stored step is kept."""
    return step, np.zeros(len(step), bool)


def _refusing(step: np.ndarray, old: np.ndarray, new: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    return reflection(step, old, new, noise, rng)[1]


def keep_refused(
    step: np.ndarray, old: np.ndarray, new: np.ndarray, noise: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """No reflection: a refused step stays, and only what comes after it is drawn again."""
    return step, _refusing(step, old, new, noise, rng)


def redraw_refused(
    step: np.ndarray, old: np.ndarray, new: np.ndarray, noise: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A fresh step in place of the reflection: plausible, and wrong, as it adds N(new) to what was kept."""
    refused = _refusing(step, old, new, noise, rng)
    return np.where(refused[:, None], new + noise * rng.standard_normal(step.shape), step), refused
