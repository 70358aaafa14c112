"""Deterministic iterations on quadratics: descent, ascent and matching, run and in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dmmlib.errors import PresetError
from dmmlib.studies.convex.synthetic import Synthetic


@dataclass(frozen=True)
class Descent:
    """The iteration theta <- theta - step (hessian theta - pull).

    Attributes:
        hessian, pull: (d, d) and (d, c). Gradient ascent has a negative hessian.
        cost: sample gradients a step.
        step: its size.

    Raises:
        PresetError: for a step that is not positive, or beyond 2 / L, at which descent diverges (L is the
            hessian's largest eigenvalue).
    """

    name: str
    hessian: np.ndarray
    pull: np.ndarray
    cost: int
    step: float

    def __post_init__(self) -> None:
        largest = self.spectrum[0][-1]
        if not (self.step > 0 and math.isfinite(self.step)):
            raise PresetError(f"{self.name} was given step {self.step:.3g}; give a positive number.")
        if self.step * largest > 2:
            raise PresetError(
                f"{self.name} was given step {self.step:.3g}, but descent diverges beyond 2 / L = "
                f"{2 / largest:.3g}; choose a smaller one (1 / L is the default)."
            )

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues (d,), ascending, and eigenvectors (d, d) of the hessian."""
        values, vectors = np.linalg.eigh(self.hessian)
        return values, vectors


# --- methods: steps are `relative_step` / L ------------------------------------------------------------


def _largest(hessian: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(hessian)[-1])


def gd(case: Synthetic, relative_step: float = 1.0) -> Descent:
    """Gradient descent on R's loss."""
    rest = case.retain
    return Descent("GD on R", rest.hessian, rest.x.T @ rest.y, rest.n, relative_step / _largest(rest.hessian))


def ga(case: Synthetic, relative_step: float = 1.0) -> Descent:
    """Gradient ascent on F's loss, with the step that training on S would take: ascent has no stable one."""
    x, y = case.x_forget, case.problem.y[case.forget]
    return Descent("GA on F", -x.T @ x, -x.T @ y, len(x), relative_step / _largest(case.problem.hessian))


def ga_gd(case: Synthetic, relative_step: float = 1.0) -> Descent:
    """Descent on R's loss and ascent on F's in one step: F weighs -1 where the oracle gives it 0."""
    down, up = gd(case), ga(case)
    hessian, pull = down.hessian + up.hessian, down.pull + up.pull
    return Descent("GA + GD", hessian, pull, case.problem.n, relative_step / _largest(hessian))


def match(name: str, x: np.ndarray, predictions: np.ndarray, relative_step: float = 1.0) -> Descent:
    """Oracle or datamodel matching: descent on sum_i (x_i theta - prediction_i)^2 / 2, without ridge.

    Args:
        x: the points to match on (q, d).
        predictions: the oracle's outputs there, true or predicted (q, c).
    """
    hessian = x.T @ x
    return Descent(name, hessian, x.T @ predictions, len(x), relative_step / _largest(hessian))


def baselines(case: Synthetic, relative_step: float = 1.0) -> list[Descent]:
    """Gradient methods that know nothing of the oracle."""
    return [method(case, relative_step) for method in (gd, ga, ga_gd)]


def matchers(
    case: Synthetic, target: np.ndarray | None = None, label: str = "OM", relative_step: float = 1.0
) -> list[Descent]:
    """Matching on F alone and on S, to the predictions of a model `target` (the true oracle if None)."""
    goal = case.oracle if target is None else target
    points = {"F": case.x_forget, "S": case.problem.x}
    return [match(f"{label} on {name}", x, x @ goal, relative_step) for name, x in points.items()]


def match_probes(case: Synthetic, seed: int = 0) -> Descent:
    """Oracle matching on 5 d points from an isotropic Gaussian: inputs that no training set chose."""
    d = len(case.oracle)
    x = np.random.default_rng(seed).normal(size=(5 * d, d))
    return match("OM on probes", x, x @ case.oracle)


# --- runs and their theory -----------------------------------------------------------------------------


def checkpoints(log2_steps: int, per_octave: int = 1) -> np.ndarray:
    """Steps 0, 1, ..., 2 ** log2_steps: the powers of two, or `per_octave` steps for each of them."""
    exponents = np.arange(log2_steps * per_octave + 1) / per_octave
    return np.unique(np.concatenate([[0], np.round(2**exponents).astype(int)]))


def follow(update: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Repeat an update and keep theta after each number of steps (n_steps,): (n_steps, d, c)."""
    path, t = [], 0
    with np.errstate(over="ignore", invalid="ignore"):  # ascent may leave every bound
        for stop in steps:
            for _ in range(stop - t):
                theta = update(theta)
            t = stop
            path.append(theta)
    return np.stack(path)


def iterate(method: Descent, theta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Run a method step by step: (n_steps, d, c), see `follow`."""
    shrink = np.eye(len(theta)) - method.step * method.hessian
    push = method.step * method.pull
    return follow(lambda theta: shrink @ theta + push, theta, steps)


def closed_form(method: Descent, theta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What `iterate` returns, by theory, for any number of steps: (n_steps, d, c).

    In the Hessian's eigenbasis a component with eigenvalue h moves from c_0 by
    (pull - h c_0) (1 - (1 - step h)^t) / h, which is t step (pull - h c_0) in the limit of h = 0.
    """
    h, vectors = method.spectrum
    gradient = vectors.T @ (method.pull - method.hessian @ theta)
    t = np.asarray(steps, float)[:, None]
    factor = 1 - method.step * h
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # 1 - factor^t, without cancellation where the factor is close to 1
        moved = np.where(factor > 0.5, -np.expm1(t * np.log1p(-method.step * h)), 1 - factor**t)
        flat = np.abs(method.step * h) < 1e-15
        gain = np.where(flat, t * method.step, moved / np.where(flat, 1, h))
        return np.asarray(theta + vectors @ (gain[:, :, None] * gradient))


def distance(path: np.ndarray, target: np.ndarray, x: np.ndarray | None = None) -> np.ndarray:
    """||theta_t - target||, or of the predictions at x, relative to the first: (n_checkpoints,)."""
    with np.errstate(over="ignore", invalid="ignore"):  # a diverging method
        delta = path - target if x is None else x @ (path - target)
        norms = np.linalg.norm(delta.reshape(len(path), -1), axis=1)
    return norms / norms[0]


def steps_to(method: Descent, case: Synthetic, fraction: float = 0.01) -> float:
    """Steps until the distance to the oracle is `fraction` of the first; inf if that never happens.

    Exact, from `closed_form`: for steps up to 1 / L and where the oracle is a fixed point, distance only falls.
    """
    goal = fraction * np.linalg.norm(case.delta)

    def close(t: int) -> bool:
        theta = closed_form(method, case.problem.theta, np.array([t]))[0]
        return bool(np.linalg.norm(theta - case.oracle) <= goal)

    high = 1
    while not close(high):
        high *= 2
        if high > 2**50:
            return math.inf
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if close(middle) else (middle, high)
    return high


def rate(method: Descent, displacement: np.ndarray, negligible: float = 1e-9) -> float:
    """The factor a step by which the distance finally shrinks, by theory: the largest |1 - step h|.

    Only eigen-directions count that hold more than `negligible` of the displacement (d, c): a direction
    in which nothing has to be unlearned slows nothing.
    """
    h, vectors = method.spectrum
    share = np.linalg.norm(vectors.T @ displacement, axis=1) / np.linalg.norm(displacement)
    return float(np.abs(1 - method.step * h[share > negligible]).max())


def measured_rates(method: Descent, theta: np.ndarray, log2_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The factor a step of a run in each eigen-direction of the method, and the theory's |1 - step h|: (d,) each.

    Distances are to where the method goes, or what it flees from. A direction is followed until rounding
    (1e-10 of the largest distance so far) or overflow begins; NaN where nothing has to move, or where it moves
    too little or too fast to be followed.
    """
    h, vectors = method.spectrum
    gradient = vectors.T @ (method.pull - method.hessian @ theta)
    curved = np.abs(h) > 1e-12 * np.abs(h).max()  # flat directions keep theta
    fixed_point = theta + vectors[:, curved] @ (gradient[curved] / h[curved, None])
    steps = checkpoints(log2_steps, 4)
    with np.errstate(over="ignore", invalid="ignore"):  # ascent
        size = np.linalg.norm(vectors.T @ (iterate(method, theta, steps) - fixed_point), axis=2)
    clear = (size > 1e-10 * np.maximum.accumulate(size.max(1))[:, None]) & (size < 1e100)
    measured = np.full(len(h), np.nan)
    for j in np.flatnonzero(size[0] > 1e-6 * size[0].max()):
        last = np.flatnonzero(clear[:, j])[-1]
        if last > 0 and abs(np.log(size[last, j] / size[0, j])) > 0.1:
            measured[j] = (size[last, j] / size[0, j]) ** (1 / steps[last])
    return measured, np.abs(1 - method.step * h)


def unreachable(x: np.ndarray, displacement: np.ndarray) -> float:
    """The share, in norm, of a displacement (d, c) outside the span of the points x: matching on x keeps it."""
    basis = np.linalg.svd(x, full_matrices=False)
    within = basis[2][basis[1] > 1e-10 * basis[1][0]]
    rest = displacement - within.T @ (within @ displacement)
    return float(np.linalg.norm(rest) / np.linalg.norm(displacement))


def conjugate_gradients(case: Synthetic, fraction: float = 0.01) -> int:
    """Hessian-vector products that bring the Newton step on R to `fraction` of the first distance."""
    rest, theta = case.retain, case.problem.theta
    goal = fraction * np.linalg.norm(case.delta)
    residual = rest.x.T @ rest.y - rest.hessian @ theta
    direction, products = residual, 0
    while np.linalg.norm(theta - case.oracle) > goal and products < 20 * len(theta):
        image = rest.hessian @ direction
        alpha = np.sum(residual**2) / np.sum(direction * image)
        theta, smaller = theta + alpha * direction, residual - alpha * image
        direction = smaller + np.sum(smaller**2) / np.sum(residual**2) * direction
        residual, products = smaller, products + 1
    return products
