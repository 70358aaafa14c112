"""Deterministic iterations on quadratics: descent, ascent and matching, run and in closed form.

In the eigenbasis of its Hessian, a component of theta with eigenvalue h moves in t steps from c_0 by

    (pull - h c_0) (1 - (1 - step h)^t) / h,

which is t step (pull - h c_0) in the limit of h = 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import orth
from scipy.sparse.linalg import cg

from dmmlib.errors import PresetError
from dmmlib.studies.convex.synthetic import Synthetic


@dataclass(frozen=True)
class Descent:
    """The iteration theta <- theta - step (hessian theta - pull); raises PresetError for a step out of range."""

    name: str
    hessian: np.ndarray  # (d, d); that of gradient ascent is negative
    pull: np.ndarray  # (d, c)
    cost: int  # sample gradients per step
    relative_step: float = 1.0  # in (0, 2]; beyond, descent diverges
    smoothness: float | None = None  # L; the hessian's largest eigenvalue if None

    def __post_init__(self) -> None:
        if not 0 < self.relative_step <= 2:
            given = f"{self.name} was given the step {self.relative_step:g} / L"
            raise PresetError(f"{given}, but descent diverges beyond 2 / L; give a number above 0 and at most 2.")

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues (d,), ascending, and eigenvectors (d, d) of the hessian."""
        return np.linalg.eigh(self.hessian)

    @cached_property
    def step(self) -> float:
        """relative_step / L."""
        return self.relative_step / float(self.smoothness or np.linalg.eigvalsh(self.hessian)[-1])


def match(name: str, x: np.ndarray, predictions: np.ndarray, relative_step: float = 1.0) -> Descent:
    """Make oracle or datamodel matching: descent on sum_i (x_i theta - prediction_i)^2 / 2, without ridge.

    Args:
        x: the points to match on (q, d).
        predictions: the oracle's outputs there, true or predicted (q, c).
    """
    return Descent(name, x.T @ x, x.T @ predictions, len(x), relative_step)


def descents(case: Synthetic, relative_step: float = 1.0) -> dict[str, Descent]:
    """List methods that know nothing of the oracle, and oracle matching (OM), by name.

    "GA on F" ascends on F's loss with the step that training on S would take, since ascent has no stable one. "GA + GD"
    descends on R's loss and ascends on F's: F weighs -1 where the oracle gives it 0.
    """
    rest, x, every = case.retain, case.x_forget, case.problem
    down, down_pull = rest.hessian, rest.x.T @ rest.y
    up, up_pull = -x.T @ x, -x.T @ every.y[case.forget]
    smoothness = float(np.linalg.eigvalsh(every.hessian)[-1])
    methods = [
        Descent("GD on R", down, down_pull, rest.n, relative_step),
        Descent("GA on F", up, up_pull, len(x), relative_step, smoothness),
        Descent("GA + GD", down + up, down_pull + up_pull, every.n, relative_step),
        match("OM on F", x, x @ case.oracle, relative_step),
        match("OM on S", every.x, every.x @ case.oracle, relative_step),
    ]
    return {method.name: method for method in methods}


def match_probes(case: Synthetic) -> Descent:
    """Make oracle matching on 5 d points from an isotropic Gaussian: inputs that no training set chose."""
    d = len(case.oracle)
    x = np.random.default_rng(0).normal(size=(5 * d, d))
    return match("OM on probes", x, x @ case.oracle)


def checkpoints(log2_steps: int, per_octave: int = 1) -> np.ndarray:
    """List the steps 0, 1, ..., 2 ** log2_steps: the powers of two, or `per_octave` steps for each of them."""
    exponents = np.arange(log2_steps * per_octave + 1) / per_octave
    return np.unique(np.concatenate([[0], np.round(2**exponents).astype(int)]))


def follow(update: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Repeat an update and keep theta after each number of steps (n_steps,): (n_steps, d, c)."""
    path = []
    with np.errstate(over="ignore", invalid="ignore"):  # ascent may leave every bound
        for ahead in np.diff(steps, prepend=0):
            for _ in range(ahead):
                theta = update(theta)
            path.append(theta)
    return np.stack(path)


def iterate(method: Descent, theta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Run a method from theta (d, c) and keep it after each number of steps (n_steps,): (n_steps, d, c)."""
    shrink = np.eye(len(theta)) - method.step * method.hessian
    push = method.step * method.pull
    return follow(lambda theta: shrink @ theta + push, theta, steps)


def closed_form(method: Descent, theta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Compute what `iterate` returns, by the module's formula, for any number of steps."""
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
    """Compute ||theta_t - target||, or of the predictions at x, relative to the first: (n_steps,)."""
    with np.errstate(over="ignore", invalid="ignore"):  # a diverging method
        delta = path - target if x is None else x @ (path - target)
        norms = np.linalg.norm(delta.reshape(len(path), -1), axis=1)
    return norms / norms[0]


def steps_to(method: Descent, case: Synthetic, fraction: float = 0.01) -> float:
    """Count steps until the distance to the oracle is `fraction` of the first; inf if that takes 2^50 or more.

    Exact: for steps up to 1 / L and where the oracle is a fixed point, the distance of `closed_form` only falls.
    """

    def close(t: int) -> bool:
        return bool(distance(closed_form(method, case.problem.theta, np.array([0, t])), case.oracle)[1] <= fraction)

    found = bisect_left(range(2**50), True, key=close)
    return found if found < 2**50 else math.inf


def rate(method: Descent, displacement: np.ndarray) -> float:
    """Return the factor per step by which the distance finally shrinks, by theory: the largest |1 - step h|.

    Only eigen-directions count that hold more than 1e-9 of the displacement (d, c): a direction in which nothing has
    to be unlearned slows nothing.
    """
    h, vectors = method.spectrum
    share = np.linalg.norm(vectors.T @ displacement, axis=1) / np.linalg.norm(displacement)
    return float(np.abs(1 - method.step * h[share > 1e-9]).max())


def measured_rates(method: Descent, theta: np.ndarray, log2_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each eigen-direction's factor per step in a run of the method, and the theory's |1 - step h|: (d,) each.

    Distances are to where the method goes, or what it flees from. A direction is followed until rounding (1e-10 of the
    largest distance so far) or overflow begins; NaN where nothing has to move, or where it moves too little or too
    fast to be followed.
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
    """Return the share, in norm, of a displacement (d, c) outside the span of the points x: matching on x keeps it."""
    within = orth(x.T, rcond=1e-10)
    rest = displacement - within @ (within.T @ displacement)
    return float(np.linalg.norm(rest) / np.linalg.norm(displacement))


def conjugate_gradients(case: Synthetic, fraction: float = 0.01) -> int:
    """Count Hessian-vector products until conjugate gradients bring Newton's step on R within `fraction` of the oracle.

    Distances are to the oracle's parameters, relative to the original's; those of conjugate gradients only fall.
    """
    rest, path = case.retain, [case.problem.theta[:, 0]]
    pull = (rest.x.T @ rest.y)[:, 0]
    cg(rest.hessian, pull, path[0], rtol=1e-12, callback=lambda theta: path.append(theta.copy()))
    return int((distance(np.stack(path), case.oracle[:, 0]) > fraction).sum())
