"""Unlearning where everything can be computed: ridge and multinomial logistic regression.

Throughout, S is the training set, F the forget set, R = S \\ F, and

    theta_S = A_S^-1 X_S^T y_S,    A_S = X_S^T X_S + ridge I,    delta = theta - theta_R,

so that delta is what is left to unlearn. Losses are sums over examples (half the squared error, or the
cross-entropy) plus (ridge / 2) ||theta||^2. All arrays are float64; the linear models have no intercept
(add a column of ones for one).
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import log_softmax, softmax

from dmmlib.data import Dataset
from dmmlib.errors import DataError, PresetError
from dmmlib.forget_sets import check_forget_indices

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Span = Literal["weak", "strong", "random"]
Spectrum = Literal["geometric", "power"]


@dataclass(frozen=True)
class ConvexSettings:
    """Sizes of the convex study.

    Attributes:
        n, dim: training points and features of the synthetic problems.
        condition: condition number of the retain set's Hessian A_R where it is not varied.
        conditions: those of the cost figure.
        forget_size: |F| where it is not varied.
        group_sizes: |F| of the group-effect figure.
        noise: standard deviation of the synthetic labels' noise.
        log2_steps, image_log2_steps: iterations are followed for 2 ** log2_steps steps.
        n_chains: independent runs of each stochastic method.
        n_subset_models: models behind the regression datamodel.
        image_n, image_side: training images, and their side after average pooling.
        image_ridge: ridge of the models on images.
        seed: of everything random.
    """

    n: int = 500
    dim: int = 20
    condition: float = 1e4
    conditions: tuple[float, ...] = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
    forget_size: int = 12
    group_sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200)
    noise: float = 0.5
    log2_steps: int = 17
    image_log2_steps: int = 13
    n_chains: int = 64
    n_subset_models: int = 2000
    image_n: int = 1000
    image_side: int = 5
    image_ridge: float = 1.0
    seed: int = 0


# --- ridge regression ----------------------------------------------------------------------------------


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
        _check_arrays(self.x, self.y, self.ridge)
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

    def part(self, indices: np.ndarray) -> Ridge:
        """The same regression on some of the points."""
        return Ridge(self.x[indices], self.y[indices], self.ridge)


def _check_arrays(x: np.ndarray, y: np.ndarray, ridge: float) -> None:
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


def retained(forget: np.ndarray, n: int) -> np.ndarray:
    """Indices of R."""
    return np.setdiff1d(np.arange(n), forget)


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
    """||estimate - truth|| / ||truth|| in the norm of `metric` (p, p).

    With A_S as the metric, parameters count by what they do to predictions on S (and to the ridge).
    """

    def norm(v: np.ndarray) -> float:
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
    masks (scikit-learn's ridge, its strength chosen by leave-one-out error on the outputs at S). Such a
    datamodel is one combination of the stored models for all inputs at once, so for a linear model it is a
    change of theta. It estimates what a point does in a smaller training set, which to first order is
    1 / share of what it does in S.
    """
    from sklearn.linear_model import Ridge as Regression
    from sklearn.linear_model import RidgeCV

    forget = check_forget_indices(forget, problem.n)
    n, d = problem.x.shape
    masks = (rng.permuted(np.tile(np.arange(n), (n_models, 1)), axis=1) < share * n).astype(float)
    grams = masks @ (problem.x[:, :, None] * problem.x[:, None]).reshape(n, d * d)
    pulls = masks @ (problem.x[:, :, None] * problem.y[:, None]).reshape(n, -1)
    thetas = np.linalg.solve(grams.reshape(n_models, d, d) + problem.ridge * np.eye(d), pulls.reshape(n_models, d, -1))
    outputs = (problem.x @ thetas).reshape(n_models, -1)
    strength = RidgeCV(alphas=n_models * np.logspace(-4, 0, 9)).fit(masks, outputs).alpha_
    weights = Regression(alpha=strength).fit(masks, thetas.reshape(n_models, -1)).coef_
    return -weights[:, forget].sum(1).reshape(problem.theta.shape)


# --- synthetic problems --------------------------------------------------------------------------------


def eigenvalues(kind: Spectrum, dim: int, condition: float) -> np.ndarray:
    """Eigenvalues from 1 down to 1 / condition: evenly spaced logarithms, or a power law j^-p.

    Raises:
        PresetError: for an unknown kind, a condition number below 1, or fewer than two dimensions.
    """
    if dim < 2 or not (condition >= 1 and math.isfinite(condition)):
        raise PresetError(f"dim={dim} and condition={condition}; give dim >= 2 and a condition number >= 1.")
    if kind == "geometric":
        return condition ** -(np.arange(dim) / (dim - 1))
    if kind == "power":
        return np.arange(1, dim + 1) ** -(math.log(condition) / math.log(dim))
    raise PresetError(f"Unknown spectrum {kind!r}; use geometric or power.")


@dataclass(frozen=True)
class Synthetic:
    """A regression whose retain set has a prescribed Hessian.

    Attributes:
        problem: the regression on S.
        forget: indices of F, the last points.
        curvature: eigenvalues of A_R, descending (d,); the eigenvectors are the coordinate axes.
        x_val: validation points (n_val, d), drawn like R.
    """

    problem: Ridge
    forget: np.ndarray
    curvature: np.ndarray
    x_val: np.ndarray

    @cached_property
    def oracle(self) -> np.ndarray:
        return oracle(self.problem, self.forget)

    @property
    def x_forget(self) -> np.ndarray:
        return self.problem.x[self.forget]


def synthetic(
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
    """Ridge regression in which A_R has exactly the condition number asked for.

    R's rows are orthonormal columns, scaled; the eigenvectors are the axes, which loses nothing because
    every method here commutes with rotations. `ridge` is a tenth of A_R's smallest eigenvalue. F's points lie
    in the weakest or strongest eigen-directions (unit norm; a direction for every four points, at most a
    fifth of all), or are drawn like R's ("random").

    Args:
        tilt: in [0, 1], how much of F's points is replaced by points drawn like R's: they are
            sqrt(1 - tilt^2) x + tilt x', so that tilt breaks the exact alignment of weak and strong spans.

    Raises:
        PresetError: for sizes, spans or tilts that make no such problem.
    """
    if not 0 < forget_size <= n - dim:
        raise PresetError(
            f"forget_size={forget_size} of n={n} points in {dim} dimensions; the retain set needs at least "
            f"{dim} points, so give 1 to {n - dim}."
        )
    if not 0 <= tilt <= 1:
        raise PresetError(f"tilt={tilt}; give a number from 0 (aligned) to 1 (drawn like the retain set).")
    rng = np.random.default_rng(seed)
    n_retain = n - forget_size
    curvature = n_retain * eigenvalues(spectrum, dim, condition)
    ridge = 0.1 * curvature[-1]
    scale = np.sqrt(curvature - ridge)
    x_retain = np.linalg.qr(rng.normal(size=(n_retain, dim)))[0] * scale
    like_retain = rng.normal(size=(n + forget_size, dim)) * scale / math.sqrt(n_retain)
    generic, x_val = like_retain[:forget_size], like_retain[forget_size:]
    if span == "random":
        x_forget = generic
    else:
        # at least four points a direction, so that F's own Gram matrix is well conditioned
        k = max(1, min(dim // 5, forget_size // 4))
        axes = np.arange(dim)[-k:] if span == "weak" else np.arange(dim)[:k]
        if span not in ("weak", "strong"):
            raise PresetError(f"Unknown span {span!r}; use weak, strong or random.")
        aligned = np.zeros((forget_size, dim))
        aligned[:, axes] = rng.normal(size=(forget_size, k))
        aligned /= np.linalg.norm(aligned, axis=1, keepdims=True)
        x_forget = math.sqrt(1 - tilt**2) * aligned + tilt * generic
    x = np.concatenate([x_retain, x_forget])
    y = x @ rng.normal(size=(dim, 1)) + noise * rng.normal(size=(n, 1))
    return Synthetic(Ridge(x, y, ridge), np.arange(n_retain, n), curvature, x_val)


# --- deterministic iterations on quadratics ------------------------------------------------------------


@dataclass(frozen=True)
class Descent:
    """The iteration theta <- theta - step (hessian theta - pull).

    Attributes:
        hessian, pull: (d, d) and (d, c). Gradient ascent has a negative hessian.
        step: its size; None takes 1 / L, L the largest eigenvalue.
        cost: sample gradients a step.

    Raises:
        PresetError: for a step beyond 2 / L, at which descent diverges.
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


def _largest(hessian: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(hessian)[-1])


def gd(problem: Ridge, forget: np.ndarray, relative_step: float = 1.0) -> Descent:
    """Gradient descent on R's loss; steps are `relative_step` / L."""
    part = problem.part(retained(forget, problem.n))
    step = relative_step / _largest(part.hessian)
    return Descent("GD on R", part.hessian, part.x.T @ part.y, part.n, step)


def ga(problem: Ridge, forget: np.ndarray, relative_step: float = 1.0) -> Descent:
    """Gradient ascent on F's loss, with the step that training on S would take: ascent has no stable one."""
    x, y = problem.x[forget], problem.y[forget]
    return Descent("GA on F", -x.T @ x, -x.T @ y, len(x), relative_step / _largest(problem.hessian))


def ga_gd(problem: Ridge, forget: np.ndarray, relative_step: float = 1.0) -> Descent:
    """Descent on R's loss and ascent on F's in one step: F weighs -1 where the oracle gives it 0."""
    down, up = gd(problem, forget), ga(problem, forget)
    hessian, pull = down.hessian + up.hessian, down.pull + up.pull
    return Descent("GA + GD", hessian, pull, problem.n, relative_step / _largest(hessian))


def match(
    name: str,
    x: np.ndarray,
    predictions: np.ndarray,
    weights: np.ndarray | None = None,
    relative_step: float = 1.0,
) -> Descent:
    """Oracle or datamodel matching: descent on sum_i w_i (x_i theta - prediction_i)^2 / 2, without ridge.

    Args:
        x: the points to match on (q, d).
        predictions: the oracle's outputs there, true or predicted (q, c).
        weights: (q,), one each if None.
    """
    weighted = x if weights is None else x * weights[:, None]
    hessian = weighted.T @ x
    return Descent(name, hessian, weighted.T @ predictions, len(x), relative_step / _largest(hessian))


def checkpoints(log2_steps: int, per_octave: int = 1) -> np.ndarray:
    """Steps 0, 1, ..., 2 ** log2_steps: the powers of two, or `per_octave` steps for each of them."""
    exponents = np.arange(log2_steps * per_octave + 1) / per_octave
    return np.unique(np.concatenate([[0], np.round(2**exponents).astype(int)]))


def iterate(method: Descent, theta: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Run a method step by step and keep theta after each number of steps (n_steps,): (n_steps, d, c)."""
    path, t = [], 0
    shrink = np.eye(len(theta)) - method.step * method.hessian
    push = method.step * method.pull
    with np.errstate(over="ignore", invalid="ignore"):  # ascent may leave every bound
        for stop in steps:
            for _ in range(stop - t):
                theta = shrink @ theta + push
            t = stop
            path.append(theta)
    return np.stack(path)


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


def rate(method: Descent, displacement: np.ndarray, negligible: float = 1e-9) -> float:
    """The factor a step by which the distance finally shrinks, by theory: the largest |1 - step h|.

    Only eigen-directions count that hold more than `negligible` of the displacement (d, c): a direction
    in which nothing has to be unlearned slows nothing.
    """
    h, vectors = method.spectrum
    share = np.linalg.norm(vectors.T @ displacement, axis=1) / np.linalg.norm(displacement)
    return float(np.abs(1 - method.step * h[share > negligible]).max())


def measured_rate(method: Descent, theta: np.ndarray, target: np.ndarray, log2_steps: int) -> float:
    """The factor a step by which a run's distance to `target` shrinks, or grows, over its last doubling.

    The run ends at 2 ** log2_steps steps, or where rounding (1e-10 of the first distance) or overflow begins.
    """
    steps = checkpoints(log2_steps, 4)
    d = distance(iterate(method, theta, steps), target)
    usable = np.flatnonzero((d > 1e-10) & (d < 1e100) & (steps > 0))
    last = usable[-1]
    first = np.searchsorted(steps, steps[last] // 2)
    return float((d[last] / d[first]) ** (1 / (steps[last] - steps[first])))


def unreachable(x: np.ndarray, displacement: np.ndarray) -> float:
    """The share, in norm, of a displacement (d, c) outside the span of the points x: matching on x keeps it."""
    basis = np.linalg.svd(x, full_matrices=False)
    within = basis[2][basis[1] > 1e-10 * basis[1][0]]
    rest = displacement - within.T @ (within @ displacement)
    return float(np.linalg.norm(rest) / np.linalg.norm(displacement))


def distance(path: np.ndarray, target: np.ndarray, x: np.ndarray | None = None) -> np.ndarray:
    """||theta_t - target||, or of the predictions at x, relative to the first: (n_checkpoints,)."""
    with np.errstate(over="ignore", invalid="ignore"):  # a diverging method
        delta = path - target if x is None else x @ (path - target)
        norms = np.linalg.norm(delta.reshape(len(path), -1), axis=1)
    return norms / norms[0]


def steps_to(method: Descent, theta: np.ndarray, target: np.ndarray, fraction: float = 0.01) -> float:
    """Steps until the distance to `target` is `fraction` of the first; inf if that never happens.

    Exact, from `closed_form`: for steps up to 1 / L and a target that is a fixed point, distance only falls.
    """
    start = np.linalg.norm(theta - target)

    def close(t: int) -> bool:
        return bool(np.linalg.norm(closed_form(method, theta, np.array([t]))[0] - target) <= fraction * start)

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


def conjugate_gradients(problem: Ridge, forget: np.ndarray, theta: np.ndarray, fraction: float = 0.01) -> int:
    """Hessian-vector products that bring the Newton step on R to `fraction` of the first distance."""
    part = problem.part(retained(forget, problem.n))
    target = oracle(problem, forget)
    start = np.linalg.norm(theta - target)
    residual = part.x.T @ part.y - part.hessian @ theta
    direction, products = residual, 0
    while np.linalg.norm(theta - target) > fraction * start and products < 20 * len(theta):
        image = part.hessian @ direction
        alpha = np.sum(residual**2) / np.sum(direction * image)
        theta, smaller = theta + alpha * direction, residual - alpha * image
        direction = smaller + np.sum(smaller**2) / np.sum(residual**2) * direction
        residual, products = smaller, products + 1
    return products


# --- stochastic iterations -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stochastic:
    """SGD on a least-squares problem, one row a step, drawn in proportion to its squared norm:

        theta <- theta - relax x_i (x_i theta - y_i) / ||x_i||^2.

    This is the randomised Kaczmarz method (Strohmer and Vershynin, 2009), i.e. SGD with importance sampling
    (Needell, Srebro and Ward, 2014).

    Attributes:
        x, y: rows (q, d) and targets (q,).
        relax: step size relative to the full projection, in (0, 1].
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    relax: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.relax <= 1:
            raise PresetError(f"{self.name} was given relax={self.relax}; give a share of the full step in (0, 1].")

    @property
    def contraction(self) -> float:
        """Bound on the factor a step of E||delta||^2 for full steps on a consistent problem.

        1 - sigma_min^2 / ||X||_F^2 over X's non-zero singular values (Strohmer and Vershynin, theorem 2).
        """
        s = np.linalg.svd(self.x, compute_uv=False) ** 2
        return float(1 - s[s > 1e-12 * s[0]].min() / s.sum())


def sgd(problem: Ridge, forget: np.ndarray, relax: float = 1.0) -> Stochastic:
    """SGD on R's loss. The ridge is d more examples sqrt(ridge) e_j with target 0."""
    part = problem.part(retained(forget, problem.n))
    d = problem.x.shape[1]
    x = np.concatenate([part.x, math.sqrt(problem.ridge) * np.eye(d)])
    return Stochastic("SGD on R", x, np.concatenate([part.y[:, 0], np.zeros(d)]), relax)


def simulate(
    method: Stochastic, theta: np.ndarray, steps: np.ndarray, n_chains: int, rng: np.random.Generator
) -> np.ndarray:
    """Independent runs from theta (d,), kept after each number of steps: (n_steps, n_chains, d)."""
    norms = np.sum(method.x**2, axis=1)
    units, levels = method.x / np.sqrt(norms)[:, None], method.y / np.sqrt(norms)
    cumulative = np.cumsum(norms / norms.sum())
    chains = np.tile(theta, (n_chains, 1))
    path, t, block = [], 0, 4096
    for stop in steps:
        while t < stop:
            ahead = min(block, stop - t)
            rows = np.searchsorted(cumulative, rng.random((ahead, n_chains)) * cumulative[-1], side="right")
            for chosen in rows:
                u = units[chosen]
                gap = levels[chosen] - np.einsum("ij,ij->i", u, chains)
                chains += (method.relax * gap)[:, None] * u
            t += ahead
        path.append(chains.copy())
    return np.stack(path)


class Moments:
    """The exact mean and second moment of delta = theta - centre under `Stochastic`.

    With rows x_i drawn with p_i = ||x_i||^2 / ||X||_F^2, G = X^T X / ||X||_F^2 and residuals e_i = y_i - x_i
    centre at the least-squares solution (so that X^T e = 0), m = E delta and M = E delta delta^T follow

        m <- (I - relax G) m
        M <- M - relax (G M + M G)
               + relax^2 sum_i (x_i^T M x_i - 2 e_i x_i^T m + e_i^2) u_i u_i^T / ||X||_F^2

    (u_i = x_i / ||x_i||): a linear map of (M, m, 1), whose powers give any number of steps.
    """

    def __init__(self, method: Stochastic, centre: np.ndarray) -> None:
        x, relax = method.x, method.relax
        d = x.shape[1]
        norms = np.sum(x**2, axis=1)
        total = norms.sum()
        e = method.y - x @ centre
        gram = x.T @ x / total
        outer = (x[:, :, None] * x[:, None]).reshape(-1, d * d)
        scaled = outer * (relax**2 / (total * norms))[:, None]
        size = d * d + d + 1
        step = np.zeros((size, size))
        identity = np.eye(d)
        step[: d * d, : d * d] = (
            np.eye(d * d) - relax * (np.kron(gram, identity) + np.kron(identity, gram)) + scaled.T @ outer
        )
        step[: d * d, d * d : -1] = -2 * scaled.T @ (e[:, None] * x)
        step[: d * d, -1] = scaled.T @ e**2
        step[d * d : -1, d * d : -1] = identity - relax * gram
        step[-1, -1] = 1
        self.d, self.squares = d, [step]

    def _square(self, k: int) -> np.ndarray:
        while len(self.squares) <= k:
            self.squares.append(self.squares[-1] @ self.squares[-1])
        return self.squares[k]

    def _state(self, delta: np.ndarray) -> np.ndarray:
        return np.concatenate([np.outer(delta, delta).ravel(), delta, [1.0]])

    def _squared(self, state: np.ndarray) -> float:
        return float(state[: self.d**2].reshape(self.d, self.d).trace())

    def expected(self, delta: np.ndarray, log2_steps: int) -> np.ndarray:
        """sqrt(E||delta_t||^2) relative to the first, at `checkpoints(log2_steps)`."""
        state = self._state(delta)
        states = [state] + [self._square(k) @ state for k in range(log2_steps + 1)]
        return np.sqrt(np.array([self._squared(s) for s in states]) / self._squared(state))

    def floor(self, delta: np.ndarray) -> float:
        """Where sqrt(E||delta_t||^2) ends, relative to the first."""
        step = self.squares[0]
        m = self.d**2
        stationary = np.linalg.solve(np.eye(m) - step[:m, :m], step[:m, -1])
        return math.sqrt(max(0.0, stationary.reshape(self.d, self.d).trace()) / float(delta @ delta))

    def steps_to(self, delta: np.ndarray, fraction: float = 0.01, log2_limit: int = 40) -> float:
        """Steps until sqrt(E||delta||^2) is `fraction` of the first; inf beyond 2 ** log2_limit."""
        state = self._state(delta)
        goal = fraction**2 * self._squared(state)
        if self._squared(self._square(log2_limit) @ state) > goal:
            return math.inf
        steps = 0
        for k in reversed(range(log2_limit)):
            later = self._square(k) @ state
            if self._squared(later) > goal:
                state, steps = later, steps + 2**k
        return steps + 1


# --- multinomial logistic regression -------------------------------------------------------------------


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression, cross-entropy summed over S plus (ridge / 2) ||theta||^2.

    Attributes:
        x: features (n, d).
        y: labels (n,), 0 to n_classes - 1.
    """

    x: np.ndarray
    y: np.ndarray
    ridge: float
    n_classes: int

    def __post_init__(self) -> None:
        _check_arrays(self.x, self.y, self.ridge)
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
        return fit(self)

    def part(self, indices: np.ndarray) -> Logistic:
        return Logistic(self.x[indices], self.y[indices], self.ridge, self.n_classes)

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


def fit(problem: Logistic, start: np.ndarray | None = None, tolerance: float = 1e-11) -> np.ndarray:
    """The minimiser, by Newton's method with a halving line search.

    Raises:
        DataError: if 50 steps do not bring the gradient below `tolerance` a point.
    """
    theta = np.zeros((problem.x.shape[1], problem.n_classes)) if start is None else start
    for _ in range(50):
        gradient = problem.gradient(theta)
        if np.abs(gradient).max() <= tolerance * problem.n:
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
    theta = problem.theta
    rest = problem.part(retained(forget, problem.n))
    x, shape = problem.x[forget], theta.shape
    gradients = x[:, :, None] * problem.errors(theta)[forget][:, None]
    inverse = solve(problem.hessian(theta), np.eye(theta.size))
    # leave-one-out: every refit at once, by Newton's method with the Hessian of S kept fixed
    singles = np.tile(theta, (len(forget), 1, 1))
    for _ in range(30):
        errors = problem.errors(singles)
        own = errors[np.arange(len(forget)), forget]
        g = problem.x.T @ errors + problem.ridge * singles - x[:, :, None] * own[:, None]
        change = (g.reshape(len(forget), -1) @ inverse).reshape(singles.shape)
        singles = singles - change
        if np.abs(change).max() < 1e-8:
            break
    return LogisticEffects(
        exact=fit(rest, theta) - theta,
        leave_one_out=(singles - theta).sum(0),
        first_order=(inverse @ gradients.sum(0).ravel()).reshape(shape),
        newton=newton_step(rest, theta),
    )


def descend(
    gradient: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, step: float, steps: np.ndarray
) -> np.ndarray:
    """Gradient descent on any loss, kept after each number of steps: (n_steps, d, n_classes)."""
    path, t = [], 0
    for stop in steps:
        for _ in range(stop - t):
            theta = theta - step * gradient(theta)
        t = stop
        path.append(theta)
    return np.stack(path)


def smoothness(problem: Logistic) -> float:
    """L of the cross-entropy: a softmax's Hessian is at most 1/2 (Boehning, 1992)."""
    return float(np.linalg.norm(problem.x, 2) ** 2 / 2 + problem.ridge)


Residual = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(indices (b,), logits (b, n_classes)) -> a loss's gradient with respect to the logits."""


def minibatches(
    x: np.ndarray, residual: Residual, ridge: float, curvature: float, batch: int, rng: np.random.Generator
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
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


def linearised(problem: Logistic, theta: np.ndarray, step: float) -> Descent:
    """Descent on the quadratic around the loss's minimiser theta, for iterates theta.ravel()[:, None]."""
    hessian = problem.hessian(theta)
    return Descent("linearised", hessian, hessian @ theta.ravel()[:, None], problem.n, step)


# --- images --------------------------------------------------------------------------------------------


def image_features(data: Dataset, x: np.ndarray, side: int) -> np.ndarray:
    """Images average-pooled to side x side, flattened, with a column of ones: (n, features + 1).

    Pooling has no fitted part, so the features know nothing of F. Features of other data pass unchanged.
    """
    from torch.nn.functional import adaptive_avg_pool2d

    from dmmlib.models import normalise

    images = normalise(data, x)
    if images.ndim == 4:
        images = adaptive_avg_pool2d(images, side)
    flat = images.flatten(1).double().numpy()
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def image_problems(data: Dataset, n: int, side: int, ridge: float) -> tuple[Ridge, Logistic]:
    """Ridge regression onto one-hot labels, and logistic regression, on the first n training images.

    Raises:
        DataError: if there are fewer.
    """
    if not 1 < n <= data.n_train:
        raise DataError(f"{n} images were asked of {data.name!r}, which has {data.n_train}; ask for at most that.")
    x, y = image_features(data, data.x_train[:n], side), data.y_train[:n]
    return Ridge(x, np.eye(data.n_classes)[y], ridge), Logistic(x, y, ridge, data.n_classes)


def neighbours(x: np.ndarray, centre: int, k: int) -> np.ndarray:
    """Indices of the k points nearest to one of them, itself first."""
    return np.argsort(np.linalg.norm(x - x[centre], axis=1), kind="stable")[:k]


# --- what the notebook compares ------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupErrors:
    """Relative errors, in the Hessian's norm, of approximate effects for nested forget sets of growing size.

    Attributes:
        sizes: |F|, (k,).
        n: training points.
        errors: name -> (k,).
        bound: the largest leverage of each set, which first-order influence does not exceed (ridge only).
    """

    sizes: np.ndarray
    n: int
    errors: dict[str, np.ndarray]
    bound: np.ndarray | None = None


def group_errors(problem: Ridge | Logistic, order: np.ndarray, sizes: Sequence[int]) -> GroupErrors:
    """Effects of the first |F| points of `order`, approximate against exact."""
    names = {"leave_one_out": "sum of leave-one-out", "first_order": "first-order influence"}
    if isinstance(problem, Ridge):
        metric, bound = problem.hessian, np.array([leverage(problem, order[:k]) for k in sizes])
    else:
        metric, bound = problem.hessian(problem.theta), None
        names["newton"] = "one Newton step on R"
    errors: dict[str, list[float]] = {label: [] for label in names.values()}
    for k in sizes:
        found = effects(problem, order[:k]) if isinstance(problem, Ridge) else logistic_effects(problem, order[:k])
        for attribute, label in names.items():
            estimate, truth = (e.reshape(len(metric), -1) for e in (getattr(found, attribute), found.exact))
            errors[label].append(relative_error(estimate, truth, metric))
    return GroupErrors(np.array(sizes), problem.n, {k: np.array(v) for k, v in errors.items()}, bound)


def matchers(case: Synthetic, target: np.ndarray | None = None, label: str = "OM") -> list[Descent]:
    """Matching on F alone and on S, to the predictions of a model `target` (the true oracle if None)."""
    goal = case.oracle if target is None else target
    return [match(f"{label} on {name}", x, x @ goal) for name, x in (("F", case.x_forget), ("S", case.problem.x))]


def probes(dim: int, seed: int = 0) -> np.ndarray:
    """5 dim points from an isotropic Gaussian: inputs that no training set chose, (5 dim, dim)."""
    return np.random.default_rng(seed).normal(size=(5 * dim, dim))


def sgd_cost(case: Synthetic, fraction: float = 0.01) -> float:
    """Sample gradients after which SGD on R is `fraction` from the oracle, in root mean square.

    With a constant step SGD ends at a floor. Its square is proportional to small steps, which gives a first
    guess; from there the step is halved until the floor is below half of the goal.
    """
    delta = (case.problem.theta - case.oracle)[:, 0]
    small = 1e-3
    floor = Moments(sgd(case.problem, case.forget, small), case.oracle[:, 0]).floor(delta)
    relax = min(1.0, small * (0.6 * fraction / floor) ** 2)
    while relax > 1e-12:
        moments = Moments(sgd(case.problem, case.forget, relax), case.oracle[:, 0])
        if moments.floor(delta) < fraction / 2:
            return moments.steps_to(delta, fraction, log2_limit=45)
        relax /= 2
    return math.inf


def costs(case: Synthetic, fraction: float = 0.01) -> dict[str, float]:
    """Sample gradients until the distance to the oracle's parameters is `fraction` of the first."""
    problem, forget, truth = case.problem, case.forget, case.oracle
    delta = (problem.theta - truth)[:, 0]
    points = probes(problem.x.shape[1])
    descents = [gd(problem, forget), *matchers(case), match("OM on probes", points, points @ truth)]
    found = {m.name: m.cost * steps_to(m, problem.theta, truth, fraction) for m in descents}
    n_retain = problem.n - len(forget)
    found["Newton (CG)"] = n_retain * (1 + conjugate_gradients(problem, forget, problem.theta, fraction))
    found["SGD on R"] = sgd_cost(case, fraction)
    matching = Stochastic("OM on S, SGD", problem.x, (problem.x @ truth)[:, 0])
    found[matching.name] = Moments(matching, truth[:, 0]).steps_to(delta, fraction)
    return found


def trade_off(case: Synthetic) -> tuple[float, float, float]:
    """F's largest leverage h, the speed-up of matching on S over descent on R, and first-order error.

    The speed-up is the ratio of 1 - rate, over the directions in which something has to be unlearned; the
    error is in the A_S norm. If all directions count, or if F spans eigen-directions of A_R, h bounds both:
    A_R >= (1 - h) A_S, so that A_S, and the Hessian of matching below it, gains at most 1 / (1 - h) in the
    smallest eigenvalue and nothing in the largest; and the error is at most h (see `leverage`).
    """
    problem, forget = case.problem, case.forget
    delta = problem.theta - case.oracle
    slow, fast = (1 - rate(m, delta) for m in (gd(problem, forget), matchers(case)[1]))
    found = effects(problem, forget)
    error = relative_error(found.first_order, found.exact, problem.hessian)
    return leverage(problem, forget), fast / slow, error


def scaled_forget(case: Synthetic, factor: float) -> Synthetic:
    """The same retain set, with F's features times a factor: it sets the leverage from 0 to 1."""
    x = case.problem.x.copy()
    x[case.forget] *= factor
    return Synthetic(Ridge(x, case.problem.y, case.problem.ridge), case.forget, case.curvature, case.x_val)


# --- figures -------------------------------------------------------------------------------------------

STYLE = {  # place in seaborn's colour-blind palette, line style
    "GD on R": (0, "-"),
    "GA on F": (1, "-"),
    "GA + GD": (2, "-"),
    "SGD on R": (3, "-"),
    "Newton (CG)": (7, "-"),
    "OM on S": (4, "-"),
    "OM on F": (5, "-"),
    "OM on S, SGD": (9, "-"),
    "OM on probes": (8, "-"),
    "DMM, first order": (4, "--"),
    "DMM, regression": (4, ":"),
}


def _style(name: str) -> dict[str, Any]:
    import seaborn

    place, line = STYLE[name]
    return {"color": seaborn.color_palette("colorblind")[place], "ls": line}


def _panels(
    rows: int,
    columns: int,
    title: str,
    caption: str,
    size: tuple[float, float] = (3.6, 2.9),
    share: bool = True,
) -> tuple[Figure, np.ndarray]:
    """A figure with a finding as its title, and what was run in small print below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=9, color="0.35", x=0.01, ha="left")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for ax in axes.flat:
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _step_axis(ax: Axes, steps: np.ndarray) -> None:
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks([0, *10 ** np.arange(0, math.floor(math.log10(steps[-1])) + 1, 2)])
    ax.set_xlim(0, steps[-1])


def _plain(figure: Figure) -> Figure:
    """Without minor ticks, which on logarithmic axes take most of the time to draw."""
    for ax in figure.axes:
        ax.minorticks_off()
    return figure


def _legend_beside(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)


def plot_group_effects(curves: Mapping[str, GroupErrors], title: str, caption: str) -> Figure:
    """A panel a problem: error against |F|. What is exact (leave-one-out of one point) is off the axis."""
    import seaborn

    figure, axes = _panels(2, math.ceil(len(curves) / 2), title, caption)
    colours = seaborn.color_palette("colorblind")
    for ax, (name, found) in zip(axes.flat, curves.items(), strict=False):
        for colour, marker, (label, errors) in zip(colours, "osD", found.errors.items(), strict=False):
            ax.loglog(found.sizes, errors, marker=marker, ms=4, color=colour, label=label)
        if found.bound is not None:
            ax.loglog(found.sizes, found.bound, "--", color="0.4", label="bound: largest leverage")
        ax.set_ylim(1e-3, 2)
        ax.set_title(f"{name} (n = {found.n})", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("|F|, points forgotten")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error")
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    axes[-1, -1].legend(fontsize=8, frameon=False, loc="lower right")
    return _plain(figure)


def plot_directions(case: Synthetic, methods: Sequence[Descent], log2_steps: int, title: str, caption: str) -> Figure:
    """A panel a method: |delta| in each eigen-direction of A_R against steps, run and predicted."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    figure, axes = _panels(2, math.ceil(len(methods) / 2), title, caption)
    norm, colours = LogNorm(case.curvature[-1], case.curvature[0]), colormaps["cividis"]
    steps = checkpoints(log2_steps, 3)
    scale = np.linalg.norm(case.problem.theta - case.oracle)
    for ax, method in zip(axes.flat, methods, strict=True):
        run = np.abs(iterate(method, case.problem.theta, steps) - case.oracle)[:, :, 0] / scale
        theory = np.abs(closed_form(method, case.problem.theta, steps) - case.oracle)[:, :, 0] / scale
        for j in reversed(range(len(case.curvature))):
            ax.plot(steps, run[:, j], color=colours(norm(case.curvature[j])), lw=2)
            ax.plot(steps, theory[:, j], ":", color="black", lw=0.8)
        ax.set(yscale="log", ylim=(1e-6, 30))
        _step_axis(ax, steps)
        ax.set_title(method.name, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("steps")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$|\delta|$ in a direction")
    label = "eigenvalue of $A_R$ in the direction"
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=label, shrink=0.8)
    return _plain(figure)


def plot_distances(
    cases: Mapping[str, tuple[Synthetic, Sequence[Descent]]], log2_steps: int, title: str, caption: str
) -> Figure:
    """A row a case: distance to the oracle in parameters, predictions on F and on validation points."""
    figure, axes = _panels(len(cases), 3, title, caption)
    steps = checkpoints(log2_steps, 3)
    for row, (name, (case, methods)) in zip(axes, cases.items(), strict=True):
        products = conjugate_gradients(case.problem, case.forget, case.problem.theta)
        newton = (case.problem.n - len(case.forget)) * (1 + products)
        for method in methods:
            path = iterate(method, case.problem.theta, steps)
            for ax, x in zip(row, (None, case.x_forget, case.x_val), strict=True):
                curve = distance(path, case.oracle, x)
                ax.plot(steps[1:] * method.cost, curve[1:], **_style(method.name), label=method.name)
        for ax, kind in zip(row, ("parameters", "predictions on F", "predictions on new points"), strict=True):
            ax.axhline(0.01, color="0.6", lw=0.8)
            ax.set(xscale="log", yscale="log", ylim=(1e-4, 30))
            ax.set_title(kind, fontsize=10)
        row[0].plot(newton, 0.01, "*", ms=12, color="black", label="Newton (CG), to 1 %")
        row[0].set_ylabel(f"$\\bf{{{name.replace(' ', '~')}}}$\ndistance to the oracle\n(original = 1)")
    for ax in axes[-1]:
        ax.set_xlabel("sample gradients")
    _legend_beside(figure, axes[0, 0])
    return _plain(figure)


def plot_stochastic(
    case: Synthetic,
    methods: Mapping[str, Stochastic],
    log2_steps: int,
    n_chains: int,
    title: str,
    caption: str,
) -> Figure:
    """Root mean square distance of stochastic methods: runs (points), exact expectation (lines)."""
    import seaborn

    figure, axes = _panels(1, 1, title, caption, size=(7.5, 3.6))
    ax, steps = axes[0, 0], checkpoints(log2_steps)
    theta, truth = case.problem.theta[:, 0], case.oracle[:, 0]
    colours = seaborn.color_palette("colorblind")
    for colour, marker, (name, method) in zip(colours, "osD^v", methods.items(), strict=False):
        runs = simulate(method, theta, steps, n_chains, np.random.default_rng(0))
        measured = np.sqrt(np.mean(np.sum((runs - truth) ** 2, 2), 1))
        expected = Moments(method, truth).expected(theta - truth, log2_steps)
        ax.plot(steps[1:], measured[1:] / measured[0], marker, ms=5, color=colour)
        ax.plot(steps[1:], expected[1:], color=colour, label=name)
    ax.plot([], [], "o", color="0.4", label=f"mean of {n_chains} runs")
    ax.plot([], [], color="0.4", label="exact expectation")
    ax.set(xscale="log", yscale="log", ylim=(3e-3, 30), xlabel="sample gradients, one a step")
    ax.set_ylabel("root mean square distance\nto the oracle (original = 1)")
    ax.legend(fontsize=9, frameon=False)
    return _plain(figure)


def plot_costs(tables: Mapping[str, Mapping[float, Mapping[str, float]]], title: str, caption: str) -> Figure:
    """A panel a case: sample gradients to 1 % against the condition number; what never arrives is on top."""
    figure, axes = _panels(1, len(tables), title, caption, size=(5.0, 3.9))
    rows = [row for table in tables.values() for row in table.values()]
    top = 30 * max(cost for row in rows for cost in row.values() if math.isfinite(cost))
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        conditions = np.array(list(table))
        for marker, method in zip("osD^v<>pX", rows[0], strict=False):
            values = np.array([row[method] for row in table.values()])
            arrives = np.isfinite(values)
            style = {**_style(method), "marker": marker, "ms": 5}
            ax.plot(conditions[arrives], values[arrives], label=method, **style)
            ax.plot(conditions[~arrives], np.full((~arrives).sum(), top), **{**style, "ls": "", "mfc": "none"})
        ax.axhline(top, color="0.6", lw=0.8, ls=":")
        ax.text(conditions[0], top * 2.5, "never", fontsize=8, color="0.4")
        ax.set(xscale="log", yscale="log", xlabel="condition number of $A_R$", ylim=(None, top * 30))
        ax.set_title(name, fontsize=10)
    axes[0, 0].set_ylabel("sample gradients to 1 %\nof the first distance")
    _legend_beside(figure, axes[0, 0])
    return _plain(figure)


def plot_tilts(cases: Mapping[float, Synthetic], log2_steps: int, title: str, caption: str) -> Figure:
    """Matching on F, matching on S and descent on R as F's points leave the weak eigen-directions."""
    from matplotlib import colormaps

    figure, axes = _panels(1, 3, title, caption, size=(3.7, 3.4))
    steps = checkpoints(log2_steps, 3)
    for i, (tilt, case) in enumerate(cases.items()):
        colour = colormaps["cividis"](i / len(cases))
        theta, truth = case.problem.theta, case.oracle
        methods = [*matchers(case), gd(case.problem, case.forget)]
        for ax, method in zip(axes[0], methods, strict=True):
            ax.plot(steps, distance(iterate(method, theta, steps), truth), color=colour, lw=2, label=f"{tilt:g}")
            ax.plot(steps, distance(closed_form(method, theta, steps), truth), ":", color="black", lw=0.8)
            ax.set_title(method.name, fontsize=10)
        axes[0, 0].axhline(unreachable(case.x_forget, theta - truth), color=colour, ls="--", lw=1)
    for ax in axes[0]:
        ax.set(yscale="log", ylim=(1e-4, 3), xlabel="steps")
        _step_axis(ax, steps)
    axes[0, 0].set_ylabel("distance to the oracle\n(original = 1)")
    axes[0, -1].legend(title="tilt of F", fontsize=8, title_fontsize=8, frameon=False, loc="lower left")
    return _plain(figure)


def plot_trade_off(points: Mapping[str, Sequence[tuple[float, float, float]]], title: str, caption: str) -> Figure:
    """Speed-up of matching and error of first-order influence against leverage, with their bounds."""
    import seaborn

    figure, axes = _panels(1, 2, title, caption, size=(4.8, 3.5), share=False)
    remaining = np.logspace(-4, 0, 200)
    axes[0, 0].plot(remaining, 1 / remaining, "--", color="0.4", label="bound 1 / (1 - h)")
    axes[0, 1].plot(remaining, 1 - remaining, "--", color="0.4", label="bound h")
    for colour, marker, (name, rows) in zip(seaborn.color_palette("colorblind"), "os", points.items(), strict=False):
        h, speed_up, error = np.array(rows).T
        axes[0, 0].plot(1 - h, speed_up, marker, color=colour, label=name)
        axes[0, 1].plot(1 - h, error, marker, color=colour, label=name)
    for ax in axes[0]:
        ax.set(xscale="log", xlabel="1 - h, where h is F's largest leverage")
        ax.set_xlim(2, remaining[0])  # harder sets to the right
        ax.legend(fontsize=9, frameon=False, loc="upper left")
    axes[0, 0].set(yscale="log", ylabel="speed-up of OM on S over GD on R")
    axes[0, 1].set(ylabel="error of first-order influence", ylim=(-0.02, 1.25))
    return _plain(figure)


@dataclass(frozen=True)
class Trace:
    """A run on a logistic regression: theta (k, d, n_classes) after each number of sample gradients (k,)."""

    cost: np.ndarray
    path: np.ndarray
    style: dict[str, Any]


def logistic_traces(
    problem: Logistic, forget: np.ndarray, log2_steps: int, rng: np.random.Generator
) -> dict[str, Trace]:
    """Every method on a logistic regression, from the original, each with the step that theory gives it."""
    rest, gone = problem.part(retained(forget, problem.n)), problem.part(forget)
    start, found = problem.theta, logistic_effects(problem, forget)
    truth = start + found.exact
    steps = checkpoints(log2_steps, 2)
    step = 1 / smoothness(rest)
    x, batch = problem.x, 10
    labels = np.eye(problem.n_classes)[rest.y]

    def ascent(theta: np.ndarray) -> np.ndarray:
        return -gone.x.T @ gone.errors(theta)

    traces = {
        "GD on R": (rest.n, descend(rest.gradient, start, step, steps)),
        "GA on F": (gone.n, descend(ascent, start, step, steps)),
        "GA + GD": (problem.n, descend(lambda t: rest.gradient(t) + ascent(t), start, step, steps)),
    }
    noisy, noisy_step = minibatches(
        rest.x, lambda i, logits: softmax(logits, axis=1) - labels[i], rest.ridge, 0.5, batch, rng
    )
    traces["SGD on R"] = (batch, descend(noisy, start, noisy_step, steps))
    targets = x @ truth
    matched, matched_step = minibatches(x, lambda i, logits: logits - targets[i], 0.0, 1.0, batch, rng)
    traces["OM on S, SGD"] = (batch, descend(matched, start, matched_step, steps))
    for name, points, goal in (
        ("OM on F", gone.x, truth),
        ("OM on S", x, truth),
        ("DMM, first order", x, start + found.first_order),
    ):
        traces[name] = (len(points), iterate(match(name, points, points @ goal), start, steps))
    result = {k: Trace(steps * cost, path, _style(k)) for k, (cost, path) in traces.items()}
    theory = closed_form(linearised(rest, truth, step), start.reshape(-1, 1), steps).reshape(-1, *start.shape)
    result["GD on R, linearised"] = Trace(steps * rest.n, theory, {"color": "black", "ls": ":", "lw": 1})
    newton = [start, start + found.newton]
    newton.append(newton[-1] + newton_step(rest, newton[-1]))
    # a Hessian is as many products with basis vectors as it has columns
    cost = rest.n * (1 + start.size) * np.arange(3)
    result["Newton steps"] = Trace(cost, np.stack(newton), {"color": "black", "marker": "*", "ms": 9, "lw": 1})
    return result


def plot_logistic(
    traces: Mapping[str, Trace],
    truth: np.ndarray,
    points: Mapping[str, np.ndarray | None],
    title: str,
    caption: str,
) -> Figure:
    """A panel a kind of distance to the oracle `truth`: parameters (None), or logits at some points."""
    figure, axes = _panels(1, len(points), title, caption, size=(3.8, 3.6))
    for ax, (kind, x) in zip(axes[0], points.items(), strict=True):
        for name, trace in traces.items():
            ax.plot(trace.cost[1:], distance(trace.path, truth, x)[1:], label=name, **trace.style)
        ax.set(xscale="log", yscale="log", ylim=(1e-3, 30), xlabel="sample gradients")
        ax.set_title(kind, fontsize=10)
    axes[0, 0].set_ylabel("distance to the oracle\n(original = 1)")
    _legend_beside(figure, axes[0, 0])
    return _plain(figure)


# --- sliders -------------------------------------------------------------------------------------------


def plot_explorer(
    condition: float, forget_size: int, relative_step: float, span: Span, n: int = 500, dim: int = 20
) -> Figure:
    """Distance to the oracle against steps for one synthetic problem, in closed form.

    Raises:
        PresetError: for values that make no problem, or a step beyond 2 / L.
    """
    case = synthetic(n, dim, condition, forget_size, span=span)
    problem, forget, truth = case.problem, case.forget, case.oracle
    x_all, x_forget = problem.x, case.x_forget
    methods = [
        gd(problem, forget, relative_step),
        ga(problem, forget, relative_step),
        ga_gd(problem, forget, relative_step),
        match("OM on F", x_forget, x_forget @ truth, relative_step=relative_step),
        match("OM on S", x_all, x_all @ truth, relative_step=relative_step),
    ]
    first_order = problem.theta + effects(problem, forget).first_order
    methods.append(match("DMM, first order", x_all, x_all @ first_order, relative_step=relative_step))
    title = f"F's largest leverage: {leverage(problem, forget):.3g}"
    caption = (
        f"n = {n}, d = {dim}, condition number {condition:.3g}, |F| = {forget_size} ({span} directions), "
        f"step {relative_step:g} / L"
    )
    figure, axes = _panels(1, 3, title, caption, size=(3.5, 3.0))
    steps = checkpoints(20, 4)
    for method in methods:
        path = closed_form(method, problem.theta, steps)
        for ax, x in zip(axes[0], (None, x_forget, case.x_val), strict=True):
            ax.plot(steps, distance(path, truth, x), label=method.name, **_style(method.name))
    for ax, kind in zip(axes[0], ("parameters", "predictions on F", "predictions on new points"), strict=True):
        ax.set(yscale="log", ylim=(1e-4, 30), xlabel="steps")
        _step_axis(ax, steps)
        ax.set_title(kind, fontsize=10)
    axes[0, 0].set_ylabel("distance to the oracle\n(original = 1)")
    _legend_beside(figure, axes[0, 0])
    return _plain(figure)


def _png(figure: Figure, dpi: int = 90) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def explorer(settings: ConvexSettings) -> ipywidgets.VBox:
    """Sliders over `plot_explorer`. Where no widget can be shown, the notebook keeps the first picture."""
    import ipywidgets as widgets

    def slider(kind: type, **options: Any) -> widgets.Widget:
        return kind(style={"description_width": "9em"}, layout={"width": "26em"}, **options)

    controls = {
        "condition": slider(
            widgets.FloatLogSlider,
            description="condition number",
            value=settings.condition,
            min=1,
            max=6,
            step=0.25,
        ),
        "forget_size": slider(
            widgets.IntSlider, description="|F|", value=settings.forget_size, min=1, max=settings.n // 4
        ),
        "relative_step": slider(
            widgets.FloatSlider, description="step, in 1 / L", value=1.0, min=0.1, max=2.1, step=0.1
        ),
        "span": slider(widgets.Dropdown, description="F spans", value="weak", options=["weak", "random", "strong"]),
    }
    picture, message = widgets.Image(format="png"), widgets.HTML()

    def redraw(_: object = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        try:
            picture.value = _png(plot_explorer(**values, n=settings.n, dim=settings.dim))
            message.value = ""
        except PresetError as error:  # the last good picture stays
            message.value = f"<b>{html.escape(str(error))}</b>"

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()

    class Explorer(widgets.VBox):
        def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
            bundle = super()._repr_mimebundle_(**options)
            return {**bundle, "image/png": base64.b64encode(picture.value).decode()}

    rows = [widgets.HBox(list(controls.values())[i : i + 2]) for i in (0, 2)]
    return Explorer([*rows, message, picture])
