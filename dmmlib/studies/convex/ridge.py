"""Ridge regression: the oracle of any forget set in closed form, and additive approximations of it.

With e_F = y_F - X_F theta_S and the hat matrix H = X_F A_S^-1 X_F^T, Woodbury's identity gives the exact effect

    theta_R - theta_S = -A_S^-1 X_F^T (I - H)^-1 e_F.

The sum of leave-one-out effects keeps only H's diagonal, first-order influence drops H. In the A_S norm the exact
effect and the error of first-order influence are H^(1/2) times vectors that differ by the factor H, so the largest
eigenvalue of H, F's *leverage*, bounds the relative error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from dmmlib.datamodels import RidgeDatamodel
from dmmlib.errors import DataError
from dmmlib.forget_sets import check_forget_indices


@dataclass(frozen=True)
class Regression:
    """A regularised linear regression on a training set S; raises DataError for arrays that do not fit."""

    x: np.ndarray  # features (n, d)
    y: np.ndarray  # targets (n, c)
    ridge: float  # weight of ||theta||^2 / 2, > 0

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.ndim != 2 or not 0 < len(self.x) == len(self.y):
            shapes = f"x has shape {self.x.shape} and y {self.y.shape}"
            raise DataError(f"{shapes}; give x as (n, features) and y as (n, outputs), n >= 1.")
        bad = int((~np.isfinite(self.x)).sum() + (~np.isfinite(self.y)).sum())
        if bad:
            raise DataError(f"x and y hold {bad} NaN or infinite values; remove or replace them.")
        if not 0 < self.ridge < math.inf:
            raise DataError(f"ridge is {self.ridge}; give a positive number, which keeps every oracle unique.")

    @property
    def n(self) -> int:
        return len(self.x)

    def part(self, indices: np.ndarray) -> Self:
        """Make the same regression on some of the points."""
        return replace(self, x=self.x[indices], y=self.y[indices])

    def without(self, forget: np.ndarray) -> Self:
        """Make the same regression on R."""
        return self.part(np.delete(np.arange(self.n), forget))


class Ridge(Regression):
    """Ridge regression."""

    @cached_property
    def hessian(self) -> np.ndarray:
        """A_S, (d, d)."""
        return self.x.T @ self.x + self.ridge * np.eye(self.x.shape[1])

    @cached_property
    def theta(self) -> np.ndarray:
        """The original model theta_S, (d, c)."""
        return solve(self.hessian, self.x.T @ self.y)

    def effects(self, forget: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Compute what to add to theta_S (d, c) to forget F, from theta_S alone; raises ForgetSetError for a bad F."""
        gone = self.part(check_forget_indices(forget, self.n))
        residual = gone.y - gone.x @ self.theta
        lift = solve(self.hessian, gone.x.T)
        hat = gone.x @ lift
        return {
            "exact": -lift @ solve(np.eye(gone.n) - hat, residual),
            "sum of leave-one-out": -lift @ (residual / (1 - np.diag(hat))[:, None]),
            "first-order influence": -lift @ residual,
        }

    def leverage(self, forget: Sequence[int] | np.ndarray) -> float:
        """Compute the largest eigenvalue of H, in (0, 1); raises ForgetSetError as `effects` does."""
        x = self.x[check_forget_indices(forget, self.n)]
        return float(np.linalg.eigvalsh(x @ solve(self.hessian, x.T))[-1])


def solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve for a symmetric positive definite matrix; raises DataError if it is singular in float64."""
    try:
        return np.asarray(cho_solve(cho_factor(matrix), right))
    except LinAlgError as error:
        advice = "raise ridge or drop features that repeat each other"
        raise DataError(
            f"The {' x '.join(map(str, matrix.shape))} Hessian is singular in float64; {advice}."
        ) from error


def relative_error(estimate: np.ndarray, truth: np.ndarray, metric: np.ndarray) -> float:
    """Compute ||estimate - truth|| / ||truth|| of parameters (d, c) in the norm of `metric`, (d, d) or (d c, d c).

    With A_S as the metric, parameters count by what they do to predictions on S (and to the ridge).
    """
    gap, whole = (v.reshape(len(metric), -1) for v in (estimate - truth, truth))
    return math.sqrt(np.vdot(gap, metric @ gap) / np.vdot(whole, metric @ whole))


def subset_datamodel(
    problem: Ridge, forget: Sequence[int] | np.ndarray, n_models: int, rng: np.random.Generator
) -> np.ndarray:
    """Predict the effect (d, c) by a regression datamodel of random halves of S.

    Outputs of models of the halves are regressed on the masks, with the penalty of least leave-one-out error at S. A
    `RidgeDatamodel` predicts one combination of the stored models for all inputs at once, so for a linear model it is
    a change of theta. It estimates what a point does in half of S, which to first order is twice what it does in S.
    """
    from sklearn.linear_model import RidgeCV

    masks = rng.permuted(np.tile(np.arange(problem.n), (n_models, 1)), axis=1) < 0.5 * problem.n
    thetas = np.stack([problem.part(mask).theta for mask in masks])
    outputs = (problem.x @ thetas).reshape(n_models, -1)
    lam = RidgeCV(alphas=n_models * np.logspace(-4, 0, 9)).fit(masks.astype(float), outputs).alpha_ / n_models
    return RidgeDatamodel.fit(masks, thetas, lam).effect(forget)
