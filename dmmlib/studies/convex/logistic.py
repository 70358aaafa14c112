"""Multinomial logistic regression: the same questions where the loss is not quadratic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import log_softmax, softmax

from dmmlib.errors import DataError
from dmmlib.forget_sets import check_forget_indices
from dmmlib.studies.convex.iterations import Descent, checkpoints, closed_form, follow, iterate, match
from dmmlib.studies.convex.ridge import Effects, check_arrays, solve


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression, cross-entropy summed over S plus (ridge / 2) ||theta||^2.

    Attributes:
        x: features (n, d).
        y: labels (n,), 0 to n_classes - 1.

    Raises:
        DataError: for arrays or labels that make no such regression.
    """

    x: np.ndarray
    y: np.ndarray
    ridge: float
    n_classes: int

    def __post_init__(self) -> None:
        check_arrays(self.x, self.y, self.ridge)
        if self.y.min() < 0 or self.y.max() >= self.n_classes:
            raise DataError(
                f"Labels go from {self.y.min()} to {self.y.max()}; {self.n_classes} classes need 0 to "
                f"{self.n_classes - 1}."
            )

    @property
    def n(self) -> int:
        return len(self.x)

    @cached_property
    def theta(self) -> np.ndarray:
        """The original model (d, n_classes)."""
        return fit(self, np.zeros((self.x.shape[1], self.n_classes)))

    def part(self, indices: np.ndarray) -> Logistic:
        """The same regression on some of the points."""
        return Logistic(self.x[indices], self.y[indices], self.ridge, self.n_classes)

    def without(self, forget: np.ndarray) -> Logistic:
        """The same regression on R."""
        return self.part(np.delete(np.arange(self.n), forget))

    def loss(self, theta: np.ndarray) -> float:
        log_p = log_softmax(self.x @ theta, axis=1)
        return float(-log_p[np.arange(self.n), self.y].sum() + self.ridge / 2 * np.sum(theta**2))

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """Of the loss, (d, n_classes)."""
        return self.x.T @ self.errors(theta) + self.ridge * theta

    def errors(self, theta: np.ndarray) -> np.ndarray:
        """Gradients with respect to the logits, probabilities minus one-hot labels: (..., n, n_classes)."""
        return softmax(self.x @ theta, axis=-1) - np.eye(self.n_classes)[self.y]

    def hessian(self, theta: np.ndarray) -> np.ndarray:
        """(d n_classes, d n_classes), in the order of theta.ravel()."""
        d, c = theta.shape
        p = softmax(self.x @ theta, axis=1)
        blocks = np.empty((d, c, d, c))
        for a in range(c):
            for b in range(a, c):
                weight = p[:, a] * ((a == b) - p[:, b])
                blocks[:, a, :, b] = blocks[:, b, :, a] = (self.x * weight[:, None]).T @ self.x
        return blocks.reshape(d * c, d * c) + self.ridge * np.eye(d * c)


def newton_step(problem: Logistic, theta: np.ndarray) -> np.ndarray:
    """What one undamped Newton step on the problem adds to theta."""
    return -solve(problem.hessian(theta), problem.gradient(theta).ravel()).reshape(theta.shape)


def fit(problem: Logistic, theta: np.ndarray) -> np.ndarray:
    """The minimiser, from theta by Newton's method with a halving line search.

    Raises:
        DataError: if 50 steps do not bring the gradient below 1e-11 a point.
    """
    for _ in range(50):
        gradient = problem.gradient(theta)
        if np.abs(gradient).max() <= 1e-11 * problem.n:
            return theta
        step, loss, size = newton_step(problem, theta), problem.loss(theta), 1.0
        while problem.loss(theta + size * step) > loss + 1e-12 * abs(loss) and size > 1e-6:
            size /= 2
        theta = theta + size * step
    raise DataError(
        f"Logistic regression did not converge in 50 Newton steps (gradient {np.abs(gradient).max():.1e}); "
        "scale the features or raise ridge."
    )


@dataclass(frozen=True)
class LogisticEffects(Effects):
    """`Effects` of a logistic regression, and those of one Newton step on R's loss."""

    newton: np.ndarray


def logistic_effects(problem: Logistic, forget: Sequence[int] | np.ndarray) -> LogisticEffects:
    """Effects of removing F: refitted, summed over single refits, first-order, and one Newton step.

    First-order influence is H_S^-1 sum_F gradient_i; the Newton step puts H_R in the place of H_S.
    """
    forget = check_forget_indices(forget, problem.n)
    theta, rest = problem.theta, problem.without(forget)
    x, own = problem.x[forget], (np.arange(len(forget)), forget)
    inverse = solve(problem.hessian(theta), np.eye(theta.size))
    # leave-one-out: every refit at once, by Newton's method with the Hessian of S kept fixed
    singles = np.tile(theta, (len(forget), 1, 1))
    for _ in range(30):
        errors = problem.errors(singles)
        g = problem.x.T @ errors + problem.ridge * singles - x[:, :, None] * errors[own][:, None]
        change = (g.reshape(len(forget), -1) @ inverse).reshape(singles.shape)
        singles = singles - change
        if np.abs(change).max() < 1e-8:
            break
    return LogisticEffects(
        exact=fit(rest, theta) - theta,
        leave_one_out=(singles - theta).sum(0),
        first_order=(inverse @ (x.T @ problem.errors(theta)[forget]).ravel()).reshape(theta.shape),
        newton=newton_step(rest, theta),
    )


# --- runs ----------------------------------------------------------------------------------------------

Gradient = Callable[[np.ndarray], np.ndarray]
Residual = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(indices (b,), logits (b, n_classes)) -> a loss's gradient with respect to the logits."""


def smoothness(problem: Logistic) -> float:
    """L of the cross-entropy: a softmax's Hessian is at most 1/2 (Boehning, 1992)."""
    return float(np.linalg.norm(problem.x, 2) ** 2 / 2 + problem.ridge)


def minibatches(
    x: np.ndarray, residual: Residual, ridge: float, curvature: float, batch: int, rng: np.random.Generator
) -> tuple[Gradient, float]:
    """An unbiased estimate of a summed loss's gradient from random batches, and a step for it.

    The step is 1 / (2 L'), L' the expected smoothness of batches drawn without replacement (Gower et al.,
    "SGD: General analysis and improved rates", 2019, proposition 3.8), so nothing is tuned.

    Args:
        curvature: largest second derivative of the loss with respect to the logits.
    """
    n = len(x)

    def gradient(theta: np.ndarray) -> np.ndarray:
        chosen = rng.choice(n, batch, replace=False)
        return n / batch * x[chosen].T @ residual(chosen, x[chosen] @ theta) + ridge * theta

    whole = curvature * np.linalg.norm(x, 2) ** 2 + ridge
    single = n * curvature * np.sum(x**2, axis=1).max() + ridge
    expected = n * (batch - 1) / (batch * (n - 1)) * whole + (n - batch) / (batch * (n - 1)) * single
    return gradient, 1 / (2 * expected)


@dataclass(frozen=True)
class Trace:
    """A run on a logistic regression: theta (k, d, n_classes) after each number of sample gradients (k,)."""

    cost: np.ndarray
    path: np.ndarray


def logistic_traces(
    problem: Logistic, forget: np.ndarray, log2_steps: int, rng: np.random.Generator, batch: int = 10
) -> dict[str, Trace]:
    """Every method on a logistic regression, from the original, each with the step that theory gives it."""
    rest, gone = problem.without(forget), problem.part(forget)
    start, found = problem.theta, logistic_effects(problem, forget)
    truth = start + found.exact
    steps = checkpoints(log2_steps, 2)
    step = 1 / smoothness(rest)
    traces = {}

    def descend(name: str, cost: int, step: float, gradient: Gradient) -> None:
        traces[name] = Trace(steps * cost, follow(lambda theta: theta - step * gradient(theta), start, steps))

    def ascent(theta: np.ndarray) -> np.ndarray:
        return -gone.x.T @ gone.errors(theta)

    descend("GD on R", rest.n, step, rest.gradient)
    descend("GA on F", gone.n, step, ascent)
    descend("GA + GD", problem.n, step, lambda theta: rest.gradient(theta) + ascent(theta))
    labels, targets = np.eye(problem.n_classes)[rest.y], problem.x @ truth
    noisy, noisy_step = minibatches(
        rest.x, lambda i, logits: softmax(logits, axis=1) - labels[i], rest.ridge, 0.5, batch, rng
    )
    descend("SGD on R", batch, noisy_step, noisy)
    exact, exact_step = minibatches(problem.x, lambda i, logits: logits - targets[i], 0.0, 1.0, batch, rng)
    descend("OM on S, SGD", batch, exact_step, exact)
    for name, x, goal in (
        ("OM on F", gone.x, truth),
        ("OM on S", problem.x, truth),
        ("DMM, first order", problem.x, start + found.first_order),
    ):
        traces[name] = Trace(steps * len(x), iterate(match(name, x, x @ goal), start, steps))
    # descent on the quadratic around the oracle, for theta.ravel()
    hessian = rest.hessian(truth)
    quadratic = Descent("GD on R, linearised", hessian, hessian @ truth.reshape(-1, 1), rest.n, step)
    theory = closed_form(quadratic, start.reshape(-1, 1), steps)
    traces[quadratic.name] = Trace(steps * rest.n, theory.reshape(-1, *start.shape))
    once = start + found.newton
    newton = np.stack([start, once, once + newton_step(rest, once)])
    # a Hessian is as many products with basis vectors as it has columns
    traces["Newton steps"] = Trace(rest.n * (1 + start.size) * np.arange(3), newton)
    return traces
