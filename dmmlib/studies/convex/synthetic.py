"""Regressions whose retain set has a prescribed Hessian, and whose forget set a prescribed place in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from dmmlib.errors import PresetError
from dmmlib.studies.convex.ridge import Ridge

Span = Literal["weak", "random", "strong"]
Spectrum = Literal["geometric", "power"]


@dataclass(frozen=True)
class Synthetic:
    """A regression whose retain set has a prescribed Hessian."""

    problem: Ridge  # the regression on S
    forget: np.ndarray  # indices of F, the last points
    curvature: np.ndarray  # eigenvalues of A_R, descending (d,); the eigenvectors are the coordinate axes
    x_val: np.ndarray  # validation points (n, d), drawn like R

    @cached_property
    def retain(self) -> Ridge:
        """The regression on R."""
        return self.problem.without(self.forget)

    @cached_property
    def oracle(self) -> np.ndarray:
        """theta_R (d, 1), without a pass over R."""
        return self.problem.theta + self.problem.effects(self.forget)["exact"]

    @property
    def delta(self) -> np.ndarray:
        """What is left to unlearn in the original, theta_S - theta_R (d, 1)."""
        return self.problem.theta - self.oracle

    @property
    def x_forget(self) -> np.ndarray:
        return self.problem.x[self.forget]


def eigenvalues(kind: Spectrum, dim: int, condition: float) -> np.ndarray:
    """List eigenvalues from 1 down to 1 / condition: evenly spaced logarithms, or a power law j^-p."""
    if dim < 2 or not 1 <= condition < math.inf:
        raise PresetError(f"dim={dim} and condition={condition}; give dim >= 2 and a condition number >= 1.")
    if kind not in get_args(Spectrum):
        raise PresetError(f"Unknown spectrum {kind!r}; use geometric or power.")
    if kind == "geometric":
        return condition ** -(np.arange(dim) / (dim - 1))
    return np.arange(1, dim + 1) ** -(math.log(condition) / math.log(dim))


def synthetic_regression(
    n: int,
    dim: int,
    condition: float,
    forget_size: int,
    *,
    span: Span = "random",
    tilt: float = 0.0,
    spectrum: Spectrum = "geometric",
    noise: float = 0.5,
    seed: int = 0,
) -> Synthetic:
    """Make a ridge regression in which A_R has exactly the condition number asked for.

    R's rows are orthonormal columns, scaled; the eigenvectors are the axes, which loses nothing because every method
    here commutes with rotations. `ridge` is a tenth of A_R's smallest eigenvalue.

    Args:
        span: where F's points lie: drawn like R's ("random"), or of unit norm in the weakest or strongest
            eigen-directions (one direction for every four points, at most a fifth of all directions).
        tilt: in [0, 1], breaks the exact alignment of weak and strong spans: points of F are
            sqrt(1 - tilt^2) x + tilt x', x aligned and x' drawn like R's.

    Raises PresetError for sizes, spans, spectra or tilts that make no such problem.
    """
    if not 0 < forget_size <= n - dim:
        raise PresetError(f"forget_size={forget_size} of n={n} points in {dim} dimensions; give 1 to {n - dim}.")
    if not 0 <= tilt <= 1:
        raise PresetError(f"tilt={tilt}; give a number from 0 (aligned) to 1 (drawn like the retain set).")
    if span not in get_args(Span):
        raise PresetError(f"Unknown span {span!r}; use weak, strong or random.")
    rng = np.random.default_rng(seed)
    n_retain = n - forget_size
    curvature = n_retain * eigenvalues(spectrum, dim, condition)
    ridge = 0.1 * curvature[-1]
    scale = np.sqrt(curvature - ridge)
    x_retain = np.linalg.qr(rng.normal(size=(n_retain, dim)))[0] * scale
    like_retain = rng.normal(size=(n + forget_size, dim)) * scale / math.sqrt(n_retain)
    x_forget, x_val = like_retain[:forget_size], like_retain[forget_size:]
    if span != "random":
        # at least four points for each direction, so that F's own Gram matrix is well conditioned
        k = max(1, min(dim // 5, forget_size // 4))
        axes = np.arange(dim)[-k:] if span == "weak" else np.arange(dim)[:k]
        aligned = np.zeros((forget_size, dim))
        aligned[:, axes] = rng.normal(size=(forget_size, k))
        aligned /= np.linalg.norm(aligned, axis=1, keepdims=True)
        x_forget = math.sqrt(1 - tilt**2) * aligned + tilt * x_forget
    x = np.concatenate([x_retain, x_forget])
    y = x @ rng.normal(size=(dim, 1)) + noise * rng.normal(size=(n, 1))
    return Synthetic(Ridge(x, y, ridge), np.arange(n_retain, n), curvature, x_val)


def scaled_forget(case: Synthetic, factor: float) -> Synthetic:
    """Scale F's features by a factor, the retain set unchanged: it sets the leverage from 0 to 1."""
    x = case.problem.x.copy()
    x[case.forget] *= factor
    return replace(case, problem=replace(case.problem, x=x))
