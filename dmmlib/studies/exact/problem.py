"""Logistic regression whose gradients are bounded: the loss is log(1 + exp(-y w . x)) of points in the unit ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from dmmlib.data import Dataset
from dmmlib.errors import DataError
from dmmlib.studies.convex.images import image_features

LIPSCHITZ = 1.0  # L, which no point's gradient exceeds


@dataclass(frozen=True)
class Problem:
    """Points that may be trained on; raises DataError for those that are no such points."""

    x: np.ndarray  # features (n, d), float64, each of norm at most 1
    y: np.ndarray  # labels (n,), -1 or 1

    def __post_init__(self) -> None:
        x, y = np.asarray(self.x, np.float64), np.asarray(self.y, np.float64)
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
            raise DataError(f"x has shape {x.shape} and y {y.shape}; give (n, d) and (n,), at least one point.")
        norm = float(np.linalg.norm(x, axis=1).max())
        if not norm <= 1 + 1e-9:
            raise DataError(f"The longest point has norm {norm:.4g}; scale every point into the unit ball.")
        if not np.isin(y, (-1, 1)).all():
            raise DataError(f"Labels include {y[~np.isin(y, (-1, 1))][0]:g}; give -1 and 1.")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def dim(self) -> int:
        return self.x.shape[1]

    def slopes(self, w: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features (rows, k, d) of points (rows, k), and slopes (rows, k) of their losses in the scores.

        A point's gradient is its slope times its features.
        """
        x, y = self.x[points], self.y[points]
        return x, -y * expit(-y * np.matmul(x, w[..., None])[..., 0])

    def mean_gradient(self, w: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Average gradient (rows, d) of a batch (rows, m) under w (rows, d)."""
        x, slope = self.slopes(w, points)
        return np.matmul(slope[:, None], x)[:, 0] / points.shape[1]

    def risk(self, w: np.ndarray) -> np.ndarray:
        """Average loss over all points, for w (rows, d): (rows,)."""
        return np.logaddexp(0, -self.margins(w)).mean(1)

    def margins(self, w: np.ndarray) -> np.ndarray:
        """Compute log odds y (w . x) of the correct class, the margin that KLoM is computed on: (rows, n)."""
        return (w @ self.x.T) * self.y

    def part(self, points: np.ndarray) -> Problem:
        """Make the same problem on some of the points."""
        return Problem(self.x[points], self.y[points])


def from_images(data: Dataset, side: int, positive: Sequence[int]) -> tuple[Problem, Problem]:
    """Make training and validation points: pooled images and a constant 1, each scaled to norm 1 on its own.

    Nothing in the features of one point depends on another. Raises DataError for a positive class that the data lack.
    """
    if lacking := sorted(set(positive) - set(range(data.n_classes))):
        raise DataError(
            f"studies.exact.positive names class {lacking[0]}, but {data.name!r} has {data.n_classes} classes; give "
            f"some of 0 to {data.n_classes - 1}."
        )
    y = np.where(np.isin(data.y, positive), 1.0, -1.0)
    if abs(y[: data.n_train].mean()) == 1:
        raise DataError(f"Of the classes {tuple(positive)} the training points are all, or none; name some of them.")
    x = image_features(data, data.x, side)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    n = data.n_train
    return Problem(x[:n], y[:n]), Problem(x[n:], y[n:])


def optimum(problem: Problem, radius: float, n_steps: int = 2000) -> np.ndarray:
    """Find the minimiser (1, d) of the average loss over the ball, by accelerated projected gradients."""
    everything = np.arange(problem.n)[None]
    w = ahead = np.zeros((1, problem.dim))
    for t in range(n_steps):
        previous, w = w, project(ahead - 4 * problem.mean_gradient(ahead, everything), radius)  # smoothness is 1/4
        ahead = w + t / (t + 3) * (w - previous)
    return w


def project(w: np.ndarray, radius: float) -> np.ndarray:
    """Project on the ball of that radius around 0: the nearest points (rows, d)."""
    norm = np.linalg.norm(w, axis=-1, keepdims=True)
    return w * np.minimum(1.0, radius / np.maximum(norm, radius))
