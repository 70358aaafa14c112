"""Prox meta-learning: adapt to a task near the meta-model w, and move w towards what the tasks adapted to.

Task level, on a task's n examples D, started from w:

    prox:  u(w, D) = argmin_u L_D(u) + lambda / 2 ||u - w||^2
    gd:    K steps of u <- u - eta (grad L_D(u) + lambda (u - w))

Meta level, over m tasks, T steps (lambda (w - u) is the gradient of the Moreau envelope of L_D at w):

    w <- w - gamma lambda (w - mean_j u(w, D_j))

That is the prox meta-learning of Wang and Arora ("On the Stability and Generalization of Meta-Learning", NeurIPS
2024) with its two task-level algorithms, last iterate. Stochastic: a step sees some of the tasks. Any leading
dimensions are independent runs.

A loss l(s, y) is one of a score s = x . u. Everywhere u is (..., d), x is (..., n, d) with norms of at most 1, and y is
(..., n); all are float64. Each loss knows what a bound needs: its Lipschitz constant on a ball, its smoothness, and its
curvature, which is 0 if the loss is convex and -rho if l + rho/2 ||u||^2 is ("rho-weakly convex").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dmmlib.errors import DataError, PresetError

Pointwise = Callable[[Tensor, Tensor], Tensor]
"""(scores, labels) of one shape -> a tensor of that shape."""
Rng = torch.Generator | None


@dataclass(frozen=True)
class Loss:
    """A loss of one score."""

    name: str  # what figures and errors call a model with it
    value: Pointwise  # l
    slope: Pointwise  # its derivative in s (a subgradient where there is a kink)
    lipschitz: Callable[[float], float]  # radius -> G, which bounds gradients for ||u|| <= radius, ||x|| <= 1
    smoothness: float  # largest second derivative in s, infinite where l has a kink
    curvature: float = 0.0  # lowest second derivative in s, in the sense of weak convexity
    flip: Callable[[Tensor], Tensor] = torch.neg  # a label as far from y as it can be, for adverse replacements

    def gradient(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Compute the mean gradient (..., d) over the examples."""
        return (self.slope(scores(u, x), y)[..., None, :] @ x)[..., 0, :] / x.shape[-2]

    def at(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Compute the loss of each example (..., n)."""
        return self.value(scores(u, x), y)


def scores(u: Tensor, x: Tensor) -> Tensor:
    """Compute scores x . u (..., n)."""
    return (x @ u[..., None])[..., 0]


SQUARED = Loss(
    "linear regression",
    value=lambda s, y: (s - y) ** 2 / 2,
    slope=lambda s, y: s - y,
    lipschitz=lambda s: s + 1,  # |y| <= 1
    smoothness=1.0,
)
LOGISTIC = Loss(
    "logistic regression",
    value=lambda s, y: softplus(-y * s),
    slope=lambda s, y: -y * torch.sigmoid(-y * s),
    lipschitz=lambda s: 1.0,
    smoothness=0.25,
)
PHASE = Loss(  # robust phase retrieval: measurements y of (x . u)^2, in [0, 1], some of them wrong
    "phase retrieval",
    value=lambda s, y: (s**2 - y).abs(),
    slope=lambda s, y: 2 * s * torch.sign(s**2 - y),
    lipschitz=lambda s: 2 * s,
    smoothness=math.inf,
    curvature=-2.0,
    flip=lambda y: 1 - y,
)


@dataclass(frozen=True)
class Learner:
    """How to meta-learn, for numbers as `settings` allows them."""

    loss: Loss
    lam: float = 1.0  # lambda, how much an adapted model is held at w
    step: float = 0.2  # gamma of the meta level
    n_steps: int = 10  # T
    inner: Literal["prox", "gd"] = "prox"  # the task-level algorithm
    inner_step: float = 0.5  # eta of "gd"
    inner_steps: int = 5  # its K
    tasks_per_step: int | None = None  # drawn with replacement for each meta-step; all of them if None

    def check(self) -> None:
        """Raise PresetError for steps beyond stability, or a loss that the task-level algorithm is not for."""
        prox = self.inner == "prox"
        if prox:
            strong_convexity(self.lam, self.loss.curvature)
        elif math.isinf(self.loss.smoothness):
            raise PresetError(f"The loss of {self.loss.name} is not smooth, so descent has no bound; use inner='prox'.")
        if self.step * self.lam > 1:
            raise PresetError(
                f"Meta-level steps are unstable (gamma lambda = {self.step * self.lam:g} > 1); lower step."
            )
        limit = 1 / (self.lam + self.loss.smoothness)
        if not prox and self.inner_step > limit:
            raise PresetError(f"Task-level steps eta={self.inner_step:g} are unstable; give inner_step <= {limit:.4g}.")

    def learn(
        self, x: Tensor, y: Tensor, start: Tensor, rng: Rng = None, shared: bool = False, masks: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Meta-learn from tasks x (..., m, n, d), y (..., m, n), many runs at once.

        Args:
            start: w_0 (..., d); its leading dimensions broadcast with those of x and masks.
            rng: of the stochastic variants.
            shared: let runs along the last leading dimension see the same draws; each has its own by default.
            masks: tasks that each run may see, bool (..., m); only where a step takes some of the tasks.

        Returns:
            Meta-models w (..., d), and the largest norm of any model visited, be it a meta-model or an adapted one.

        Raises DataError or PresetError as `check` does, and if a run diverges.
        """
        self.check()
        if masks is not None and self.tasks_per_step is None:
            raise PresetError("masks choose among the tasks of a step; give tasks_per_step.")
        weights = torch.ones(x.shape[-3]) if masks is None else masks.float()
        lead = torch.broadcast_shapes(x.shape[:-3], start.shape[:-1], weights.shape[:-1])
        drawn = (*lead[:-1], 1) if shared else lead
        weights = weights.expand(*drawn, -1).reshape(-1, x.shape[-3])
        closed_form = self.inner == "prox" and self.loss is SQUARED
        every = affine(self.lam, x, y) if closed_form else (x, y)
        w = start.expand(*lead, -1)
        radius = largest_norm(w)
        for _ in range(self.n_steps):
            tasks = every
            if self.tasks_per_step is not None:
                chosen = torch.multinomial(weights, self.tasks_per_step, replacement=True, generator=rng)
                chosen = chosen.reshape(*drawn, -1).expand(*lead, -1)
                tasks = _take(every[0], chosen, 2), _take(every[1], chosen, 1)
            begin = w[..., None, :]
            adapted = scores(begin, tasks[0]) + tasks[1] if closed_form else self.adapt(begin, *tasks)
            w = w - self.step * self.lam * (w - adapted.mean(-2))
            radius = max(radius, largest_norm(adapted), largest_norm(w))
        if not torch.isfinite(w).all():
            raise DataError("A meta-training diverged (NaN); lower step or inner_step.")
        return w, radius

    def adapt(self, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Adapt meta-models w (..., d) to tasks x (..., n, d), y (..., n): models u (..., d).

        Raises PresetError or DataError if prox has no one answer with this lambda, or its solver does not converge.
        """
        lead = torch.broadcast_shapes(w.shape[:-1], x.shape[:-2])
        w = w.expand(*lead, -1)
        if self.inner == "prox":
            if self.loss is SQUARED:
                matrix, offset = affine(self.lam, x, y)
                return scores(w, matrix) + offset
            return _newton(self.lam, w, x, y) if self.loss is LOGISTIC else _dual(self.lam, w, x, y)
        u = w
        for _ in range(self.inner_steps):
            u = u - self.inner_step * (self.loss.gradient(u, x, y) + self.lam * (u - w))
        return u


def strong_convexity(lam: float, curvature: float) -> float:
    """Return lambda + mu, by which the prox problem is strongly convex; raises PresetError unless it is positive."""
    if lam + curvature <= 0:
        raise PresetError(
            f"lambda + mu = {lam + curvature:g}, so prox has no one answer; raise lam, or use inner='gd'."
        )
    return lam + curvature


def largest_norm(models: Tensor) -> float:
    """Compute the largest norm of models (..., d)."""
    return float(torch.linalg.vector_norm(models, dim=-1).max())


def _take(values: Tensor, chosen: Tensor, trailing: int) -> Tensor:
    """values (..., m, *trailing) at tasks chosen (..., k): (..., k, *trailing), leading dimensions broadcast."""
    values = values.expand(*chosen.shape[:-1], *values.shape[-1 - trailing :])
    return torch.take_along_dim(values, chosen[(..., *[None] * trailing)], -1 - trailing)


def affine(lam: float, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Solve prox-regularised least squares: u = P w + c, P (..., d, d) = lam (X^T X / n + lam I)^-1, c (..., d)."""
    n, dim = x.shape[-2:]
    penalty = lam * torch.eye(dim, dtype=x.dtype)
    hessian, moment = x.mT @ x / n + penalty, x.mT @ y[..., None] / n
    solved = torch.linalg.solve(hessian, torch.cat([penalty.expand_as(hessian), moment], -1))
    return solved[..., :-1], solved[..., -1]


def _newton(lam: float, w: Tensor, x: Tensor, y: Tensor, n_steps: int = 60) -> Tensor:
    """Prox of the logistic loss by damped Newton steps."""
    n, eye = x.shape[-2], torch.eye(x.shape[-1], dtype=x.dtype)

    def objective(v: Tensor) -> Tensor:
        return LOGISTIC.at(v, x, y).mean(-1) + lam / 2 * ((v - w) ** 2).sum(-1)

    u, value = w, objective(w)
    for _ in range(n_steps):
        wrong = torch.sigmoid(-y * scores(u, x))
        gradient = scores(-y * wrong, x.mT) / n + lam * (u - w)
        left = largest_norm(gradient)
        if left < 1e-9:
            return u
        hessian = x.mT @ ((wrong * (1 - wrong))[..., None] * x) / n + lam * eye
        towards = torch.linalg.solve(hessian, gradient)
        length = torch.ones_like(value)
        for _ in range(20):
            trial = u - length[..., None] * towards
            new = objective(trial)
            worse = new > value + 1e-14
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        u, value = torch.where(worse[..., None], u, trial), torch.minimum(new, value)
    if left > 1e-6:
        raise DataError(f"Newton's method left a gradient of {left:.2g} after {n_steps} steps; raise lam.")
    return u


def _dual(lam: float, w: Tensor, x: Tensor, y: Tensor, n_steps: int = 150) -> Tensor:
    """Prox of robust phase retrieval as a saddle point, over |a_i| <= 1:

        max_a min_u (1/n) sum_i a_i ((x_i . u)^2 - y_i) + lam / 2 ||u - w||^2.

    For lam > 2 the inner minimum is a linear system and the outer problem concave with a smooth objective:
    accelerated projected gradient ascent, restarted where it turns.
    """
    margin = strong_convexity(lam, PHASE.curvature)
    n, eye = x.shape[-2], lam * torch.eye(x.shape[-1], dtype=x.dtype)
    reach = lam / margin * torch.linalg.vector_norm(w, dim=-1).clamp(min=1e-6)
    step = (n**2 * margin / (4 * reach**2 * torch.linalg.matrix_norm(x, 2) ** 2))[..., None]

    def solve(a: Tensor) -> Tensor:
        return torch.linalg.solve(eye + 2 / n * x.mT @ (a[..., None] * x), lam * w)

    a = torch.sign(scores(w, x) ** 2 - y)
    ahead, momentum = a, torch.ones_like(a[..., :1])
    for _ in range(n_steps):
        uphill = (scores(solve(ahead), x) ** 2 - y) / n
        new = (ahead + step * uphill).clamp(-1, 1)
        turned = ((new - a) * uphill).sum(-1, keepdim=True) < 0
        following = torch.where(turned, 1.0, (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        ahead = torch.where(turned, new, new + (momentum - 1) / following * (new - a))
        a, momentum = new, following
    return solve(a)
