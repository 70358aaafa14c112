"""Multinomial logistic regression: the same questions where the loss is not quadratic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, softmax

from dmmlib.errors import DataError
from dmmlib.forget_sets import check_forget_indices
from dmmlib.studies.convex.iterations import Descent, checkpoints, closed_form, follow, iterate, match
from dmmlib.studies.convex.ridge import Regression, solve


class Logistic(Regression):
    """Multinomial logistic regression onto one-hot labels y (n, c), with the cross-entropy summed over S."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (np.isin(self.y, (0, 1)).all() and (self.y.sum(1) == 1).all()):
            raise DataError("Labels of logistic regression must be one-hot; give np.eye(n_classes)[labels].")

    @cached_property
    def theta(self) -> np.ndarray:
        """The original model (d, c)."""
        return fit(self, np.zeros((self.x.shape[1], self.y.shape[1])))

    @cached_property
    def hessian(self) -> np.ndarray:
        """The Hessian of the loss at the original, (d c, d c)."""
        return self.hessian_at(self.theta)

    def loss(self, theta: np.ndarray) -> float:
        """Compute the loss at theta (d, c)."""
        return float(-np.sum(self.y * log_softmax(self.x @ theta, axis=1)) + self.ridge / 2 * np.sum(theta**2))

    def errors(self, theta: np.ndarray) -> np.ndarray:
        """Compute gradients with respect to the logits, probabilities minus one-hot labels: (..., n, c)."""
        return softmax(self.x @ theta, axis=-1) - self.y

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """Compute the gradient of the loss at theta, (..., d, c)."""
        return self.x.T @ self.errors(theta) + self.ridge * theta

    def hessian_at(self, theta: np.ndarray) -> np.ndarray:
        """Compute the Hessian of the loss at theta, (d c, d c) in the order of theta.ravel()."""
        p = softmax(self.x @ theta, axis=1)
        weights = p[:, :, None] * (np.eye(p.shape[1]) - p[:, None])
        blocks = np.tensordot(self.x, weights[..., None] * self.x[:, None, None], axes=(0, 0))  # (d, c, c, d)
        return blocks.swapaxes(2, 3).reshape(theta.size, theta.size) + self.ridge * np.eye(theta.size)

    def newton_step(self, theta: np.ndarray) -> np.ndarray:
        """Return what one undamped Newton step adds to theta (d, c)."""
        return -solve(self.hessian_at(theta), self.gradient(theta).ravel()).reshape(theta.shape)

    def effects(self, forget: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Compute what to add to theta to forget F, as `Ridge.effects` does, and what one Newton step on R adds.

        First-order influence is H_S^-1 sum_F gradient_i; the Newton step puts H_R in the place of H_S.
        """
        forget = check_forget_indices(forget, self.n)
        theta, rest, gone = self.theta, self.without(forget), self.part(forget)
        inverse = solve(self.hessian, np.eye(theta.size))
        # leave-one-out: every refit at once, by Newton's method with the Hessian of S kept fixed
        singles, each = np.tile(theta, (gone.n, 1, 1)), np.arange(gone.n)
        for _ in range(30):
            own = gone.x[:, :, None] * gone.errors(singles)[each, each][:, None]  # gradient of the point left out
            change = ((self.gradient(singles) - own).reshape(gone.n, -1) @ inverse).reshape(singles.shape)
            singles = singles - change
            if np.abs(change).max() < 1e-8:
                break
        return {
            "exact": fit(rest, theta) - theta,
            "sum of leave-one-out": (singles - theta).sum(0),
            "first-order influence": (inverse @ (gone.x.T @ gone.errors(theta)).ravel()).reshape(theta.shape),
            "one Newton step on R": rest.newton_step(theta),
        }


def fit(problem: Logistic, theta: np.ndarray) -> np.ndarray:
    """Minimise the loss from theta by Newton's method with a halving line search; raises DataError if it cannot."""
    for _ in range(50):
        if np.abs(problem.gradient(theta)).max() <= 1e-11 * problem.n:
            return theta
        step, loss, size = problem.newton_step(theta), problem.loss(theta), 1.0
        while problem.loss(theta + size * step) > loss + 1e-12 * abs(loss) and size > 1e-6:
            size /= 2
        theta = theta + size * step
    raise DataError("Logistic regression did not converge in 50 Newton steps; scale the features or raise ridge.")


Gradient = Callable[[np.ndarray], np.ndarray]
Residual = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(indices (b,), logits (b, c)) -> a loss's gradient with respect to the logits."""


class Trace(NamedTuple):
    """A run: theta (k, d, c) after each number of sample gradients (k,)."""

    cost: np.ndarray
    path: np.ndarray


def minibatches(
    x: np.ndarray, residual: Residual, ridge: float, curvature: float, batch: int, rng: np.random.Generator
) -> tuple[int, float, Gradient]:
    """Estimate a summed loss's gradient from random batches; returns their size, a step, and the estimate.

    The step is 1 / (2 L'), L' the expected smoothness of batches drawn without replacement (Gower et al., "SGD: General
    analysis and improved rates", 2019, proposition 3.8), so nothing is tuned. `curvature` is the largest second
    derivative of the loss with respect to the logits.
    """
    n = len(x)

    def gradient(theta: np.ndarray) -> np.ndarray:
        chosen = rng.choice(n, batch, replace=False)
        return n / batch * x[chosen].T @ residual(chosen, x[chosen] @ theta) + ridge * theta

    whole = curvature * np.linalg.norm(x, 2) ** 2 + ridge
    single = n * curvature * np.sum(x**2, axis=1).max() + ridge
    expected = n * (batch - 1) / (batch * (n - 1)) * whole + (n - batch) / (batch * (n - 1)) * single
    return batch, 1 / (2 * expected), gradient


def logistic_traces(
    problem: Logistic, forget: np.ndarray, log2_steps: int, rng: np.random.Generator, batch: int = 10
) -> dict[str, Trace]:
    """Run every method on a logistic regression, from the original, each with the step that theory gives it."""
    rest, gone, start, found = problem.without(forget), problem.part(forget), problem.theta, problem.effects(forget)
    truth, steps = start + found["exact"], checkpoints(log2_steps, 2)
    # a softmax's Hessian is <= 1/2 (Boehning, 1992)
    smoothness = float(np.linalg.norm(rest.x, 2) ** 2 / 2 + rest.ridge)
    targets = problem.x @ truth

    def ascent(theta: np.ndarray) -> np.ndarray:
        return -gone.x.T @ gone.errors(theta)

    def descend(cost: int, step: float, gradient: Gradient) -> Trace:
        return Trace(steps * cost, follow(lambda theta: theta - step * gradient(theta), start, steps))

    runs: dict[str, tuple[int, float, Gradient]] = {
        "GD on R": (rest.n, 1 / smoothness, rest.gradient),
        "GA on F": (gone.n, 1 / smoothness, ascent),
        "GA + GD": (problem.n, 1 / smoothness, lambda theta: rest.gradient(theta) + ascent(theta)),
        "SGD on R": minibatches(rest.x, lambda i, z: softmax(z, axis=1) - rest.y[i], rest.ridge, 0.5, batch, rng),
        "OM on S, SGD": minibatches(problem.x, lambda i, z: z - targets[i], 0.0, 1.0, batch, rng),
    }
    traces = {name: descend(*method) for name, method in runs.items()}
    predicted = start + found["first-order influence"]
    matching = (("OM on F", gone.x, truth), ("OM on S", problem.x, truth), ("DMM, first order", problem.x, predicted))
    for name, x, goal in matching:
        traces[name] = Trace(steps * len(x), iterate(match(name, x, x @ goal), start, steps))
    # descent on the quadratic around the oracle, for theta.ravel()
    hessian = rest.hessian_at(truth)
    linear = Descent("GD on R, linearised", hessian, hessian @ truth.reshape(-1, 1), rest.n, smoothness=smoothness)
    theory = closed_form(linear, start.reshape(-1, 1), steps)
    traces[linear.name] = Trace(steps * rest.n, theory.reshape(-1, *start.shape))
    once = start + found["one Newton step on R"]
    newton = np.stack([start, once, once + rest.newton_step(once)])
    # a Hessian is as many products with basis vectors as it has columns
    traces["Newton steps"] = Trace(rest.n * (1 + start.size) * np.arange(3), newton)
    return traces
