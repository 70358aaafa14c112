"""Ridge regression: the oracle of any forget set in closed form, and additive approximations of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from dmmlib.datamodels import RidgeDatamodel
from dmmlib.errors import DataError
from dmmlib.forget_sets import check_forget_indices


@dataclass(frozen=True)
class Ridge:
    """Ridge regression on a training set S.

    Attributes:
        x: features (n, d).
        y: targets (n, c).
        ridge: weight of ||theta||^2 / 2, > 0.

    Raises:
        DataError: for shapes that differ, values that are not finite, ridge <= 0, or (on the first use of a
            solution) a Hessian that is singular in float64.
    """

    x: np.ndarray
    y: np.ndarray
    ridge: float

    def __post_init__(self) -> None:
        check_arrays(self.x, self.y, self.ridge)
        if self.y.ndim != 2:
            raise DataError(f"y has shape {self.y.shape}; give targets as (n, outputs).")

    @property
    def n(self) -> int:
        return len(self.x)

    @cached_property
    def hessian(self) -> np.ndarray:
        """A_S, (d, d)."""
        return self.x.T @ self.x + self.ridge * np.eye(self.x.shape[1])

    @cached_property
    def theta(self) -> np.ndarray:
        """The original model theta_S, (d, c)."""
        return solve(self.hessian, self.x.T @ self.y)

    def without(self, forget: np.ndarray) -> Ridge:
        """The same regression on R."""
        return Ridge(np.delete(self.x, forget, 0), np.delete(self.y, forget, 0), self.ridge)


def check_arrays(x: np.ndarray, y: np.ndarray, ridge: float) -> None:
    """Raise a DataError unless x, y and ridge make a regression."""
    if x.ndim != 2 or len(x) == 0 or len(x) != len(y):
        raise DataError(f"x has shape {x.shape} and y {y.shape}; give x as (n, features) and n targets, n >= 1.")
    bad = int((~np.isfinite(x)).sum() + (~np.isfinite(y)).sum())
    if bad:
        raise DataError(f"x and y hold {bad} NaN or infinite values; remove or replace them.")
    if not (ridge > 0 and math.isfinite(ridge)):
        raise DataError(f"ridge is {ridge}; give a positive number, which keeps every oracle unique.")


def solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix^-1 right for a symmetric positive definite matrix.

    Raises:
        DataError: if the matrix is singular to working precision.
    """
    try:
        solution = cho_solve(cho_factor(matrix), right)
    except LinAlgError as error:
        raise DataError(
            f"The {len(matrix)} x {len(matrix)} Hessian is singular in float64; raise ridge or drop "
            "features that repeat each other."
        ) from error
    return np.asarray(solution)


@dataclass(frozen=True)
class Effects:
    """What to add to theta_S (d, c) to forget F: the truth and two additive approximations of it."""

    exact: np.ndarray
    leave_one_out: np.ndarray
    first_order: np.ndarray


def effects(problem: Ridge, forget: Sequence[int] | np.ndarray) -> Effects:
    """Closed-form effects of removing F, from the original's solution alone.

    With e_F = y_F - X_F theta_S and the hat matrix H = X_F A_S^-1 X_F^T, Woodbury's identity gives

        theta_R - theta_S = -A_S^-1 X_F^T (I - H)^-1 e_F    (exact),

    the sum of leave-one-out effects keeps only H's diagonal, first-order influence drops H.
    """
    forget = check_forget_indices(forget, problem.n)
    x = problem.x[forget]
    residual = problem.y[forget] - x @ problem.theta
    lift = solve(problem.hessian, x.T)
    hat = x @ lift
    return Effects(
        exact=-lift @ solve(np.eye(len(forget)) - hat, residual),
        leave_one_out=-lift @ (residual / (1 - np.diag(hat))[:, None]),
        first_order=-lift @ residual,
    )


def oracle(problem: Ridge, forget: Sequence[int] | np.ndarray) -> np.ndarray:
    """theta_R (d, c), by Woodbury's identity: no pass over R."""
    return problem.theta + effects(problem, forget).exact


def leverage(problem: Ridge, forget: Sequence[int] | np.ndarray) -> float:
    """Largest eigenvalue of H: it bounds first-order influence's relative error in the A_S norm.

    The error is A_S^-1 X_F^T H (I - H)^-1 e_F, the exact effect A_S^-1 X_F^T (I - H)^-1 e_F, and in the A_S
    norm both are H^(1/2) times a vector that differs by the factor H.
    """
    x = problem.x[check_forget_indices(forget, problem.n)]
    return float(np.linalg.eigvalsh(x @ solve(problem.hessian, x.T))[-1])


def relative_error(estimate: np.ndarray, truth: np.ndarray, metric: np.ndarray) -> float:
    """||estimate - truth|| / ||truth|| of parameters (d, c) in the norm of `metric`, (d, d) or (d c, d c).

    With A_S as the metric, parameters count by what they do to predictions on S (and to the ridge).
    """

    def norm(v: np.ndarray) -> float:
        v = v.reshape(len(metric), -1)
        return math.sqrt(float(np.sum(v * (metric @ v))))

    return norm(estimate - truth) / norm(truth)


def subset_datamodel(
    problem: Ridge,
    forget: Sequence[int] | np.ndarray,
    n_models: int,
    rng: np.random.Generator,
    share: float = 0.5,
) -> np.ndarray:
    """The effect (d, c) that a regression datamodel predicts.

    Models are trained on random parts of S that hold a `share` of it, and their outputs regressed on the
    masks, with the penalty of least leave-one-out error at S. A `RidgeDatamodel` predicts one combination of
    the stored models for all inputs at once, so for a linear model it is a change of theta. It estimates what
    a point does in a smaller training set, which to first order is 1 / share of what it does in S.
    """
    from sklearn.linear_model import RidgeCV

    n, d = problem.x.shape
    masks = (rng.permuted(np.tile(np.arange(n), (n_models, 1)), axis=1) < share * n).astype(float)
    grams = masks @ (problem.x[:, :, None] * problem.x[:, None]).reshape(n, d * d)
    pulls = masks @ (problem.x[:, :, None] * problem.y[:, None]).reshape(n, -1)
    thetas = np.linalg.solve(grams.reshape(n_models, d, d) + problem.ridge * np.eye(d), pulls.reshape(n_models, d, -1))
    outputs = (problem.x @ thetas).reshape(n_models, -1)
    lam = RidgeCV(alphas=n_models * np.logspace(-4, 0, 9)).fit(masks, outputs).alpha_ / n_models
    return RidgeDatamodel.fit(masks, thetas, lam).effect(forget)
