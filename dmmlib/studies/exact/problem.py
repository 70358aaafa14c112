"""Convex Lipschitz problems: a loss of one score, points in the unit ball, gradients that are checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from torch.nn.functional import adaptive_avg_pool2d

from dmmlib.data import Dataset
from dmmlib.errors import DataError
from dmmlib.models import normalise

Pointwise = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(scores, labels) of one shape -> an array of that shape."""


@dataclass(frozen=True)
class Loss:
    """A convex loss l(s, y) of the score s = w . x and a label y of -1 or 1.

    Attributes:
        name: what a state on disk is bound to.
        value, slope, curvature: l and its first two derivatives in s.
        lipschitz: L, a bound on |slope|. As ||x|| <= 1 it bounds every gradient's norm. It must be given:
            noise is worth nothing without it, and a gradient that exceeds it is an error.
    """

    name: str
    value: Pointwise
    slope: Pointwise
    curvature: Pointwise
    lipschitz: float | None = None


LOGISTIC = Loss(
    "logistic",
    value=lambda s, y: np.logaddexp(0, -y * s),
    slope=lambda s, y: -y * expit(-y * s),
    curvature=lambda s, y: expit(s) * expit(-s),
    lipschitz=1.0,
)


@dataclass(frozen=True)
class Problem:
    """Points that may be trained on, and the loss.

    Attributes:
        x: features (n, d), float64, each of norm at most 1.
        y: labels (n,), -1 or 1.
        loss: what is minimised, on average over the points that are present.

    Raises:
        DataError: for shapes that differ, features outside the unit ball, other labels, or a loss whose
            Lipschitz constant is not given.
    """

    x: np.ndarray
    y: np.ndarray
    loss: Loss = LOGISTIC

    def __post_init__(self) -> None:
        x, y = np.asarray(self.x, np.float64), np.asarray(self.y, np.float64)
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
            raise DataError(f"x has shape {x.shape} and y {y.shape}; give (n, d) and (n,), at least one point.")
        norm = float(np.linalg.norm(x, axis=1).max())
        if not norm <= 1 + 1e-9:
            raise DataError(f"The longest point has norm {norm:.4g}; scale every point into the unit ball.")
        if not np.isin(y, (-1, 1)).all():
            raise DataError(f"Labels include {y[~np.isin(y, (-1, 1))][0]:g}; give -1 and 1.")
        if self.loss.lipschitz is None or not self.loss.lipschitz > 0:
            raise DataError(
                f"Loss {self.loss.name!r} has the Lipschitz constant {self.loss.lipschitz}; give "
                "Loss(lipschitz=...), a positive bound on its slope."
            )
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def dim(self) -> int:
        return self.x.shape[1]

    @property
    def lipschitz(self) -> float:
        """L, a bound on the norm of any point's gradient."""
        return float(self.loss.lipschitz or np.nan)

    def slopes(self, w: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (rows, k, d) of the points (rows, k), and the loss's slope (rows, k) there under w (rows, d).

        A point's gradient is its slope times its features.

        Raises:
            DataError: if a slope exceeds the Lipschitz constant.
        """
        x = self.x[points]
        slope = self.loss.slope(np.matmul(x, w[..., None])[..., 0], self.y[points])
        worst = float(np.abs(slope).max(initial=0))
        if not worst <= self.lipschitz * (1 + 1e-9):
            raise DataError(
                f"Loss {self.loss.name!r} has a slope of {worst:.4g}, above its Lipschitz constant "
                f"{self.lipschitz:g}; give a bound that holds on the whole ball, or another loss."
            )
        return x, slope

    def mean_gradient(self, w: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Average gradient (rows, d) of a batch (rows, m) under w (rows, d)."""
        x, slope = self.slopes(w, points)
        return np.matmul(slope[:, None], x)[:, 0] / points.shape[1]

    def risk(self, w: np.ndarray) -> np.ndarray:
        """Average loss over all points, for w (rows, d): (rows,)."""
        return self.loss.value(w @ self.x.T, self.y).mean(1)

    def margins(self, w: np.ndarray) -> np.ndarray:
        """Log odds y (w . x) of the right class, the margin that KLoM is computed on: (rows, n)."""
        return (w @ self.x.T) * self.y

    def part(self, points: np.ndarray) -> Problem:
        """The same problem on some of the points."""
        return Problem(self.x[points], self.y[points], self.loss)

    def fingerprint(self, present: np.ndarray) -> str:
        """SHA-256 of the loss's name and of the points present, bool (n,); other points leave no trace in it."""
        digest = hashlib.sha256(f"{self.loss.name}{self.x.shape}".encode() + np.packbits(present).tobytes())
        digest.update(self.x[present].tobytes() + self.y[present].tobytes())
        return digest.hexdigest()


def from_images(data: Dataset, side: int, positive: Sequence[int], loss: Loss = LOGISTIC) -> tuple[Problem, Problem]:
    """Training and validation points: images pooled to side x side, a constant 1, scaled to norm 1 one by one.

    Nothing in the features of one point depends on another.
    """
    y = np.where(np.isin(data.y, positive), 1.0, -1.0)
    pixels = adaptive_avg_pool2d(normalise(data, data.x), side).flatten(1).double().numpy()
    x = np.column_stack([pixels, np.ones(len(pixels))])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    n = data.n_train
    return Problem(x[:n], y[:n], loss), Problem(x[n:], y[n:], loss)


def optimum(problem: Problem, radius: float, n_steps: int = 2000) -> np.ndarray:
    """The minimiser (1, d) of the average logistic loss over the ball, by accelerated projected gradients."""
    everything = np.arange(problem.n)[None]
    w = ahead = np.zeros((1, problem.dim))
    for t in range(n_steps):
        previous, w = w, project(ahead - 4 * problem.mean_gradient(ahead, everything), radius)  # smoothness is 1/4
        ahead = w + t / (t + 3) * (w - previous)
    return w


def project(w: np.ndarray, radius: float) -> np.ndarray:
    """The nearest points (rows, d) of the ball of that radius around 0."""
    norm = np.linalg.norm(w, axis=-1, keepdims=True)
    return w * np.minimum(1.0, radius / np.maximum(norm, radius))
