"""Prox meta-learning: adapt to a task near the meta-model w, and move w towards what the tasks adapted to.

Task level, on a task's n examples D, started from w:

    prox:  u(w, D) = argmin_u L_D(u) + lambda / 2 ||u - w||^2
    gd:    K steps of u <- u - eta (grad L_D(u) + lambda (u - w))

Meta level, over m tasks, T steps (lambda (w - u) is the gradient of the Moreau envelope of L_D at w):

    w <- w - gamma lambda (w - mean_j u(w, D_j))

That is the prox meta-learning of Wang and Arora ("On the Stability and Generalization of Meta-Learning", NeurIPS
2024) with its two task-level algorithms, last iterate. Stochastic: a step sees some tasks, a task-level gradient some
examples. Robust: L_D is the worst case within eps of each example. Any leading dimensions are independent runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmmlib.errors import DataError, PresetError
from dmmlib.studies.meta.losses import LOGISTIC, SQUARED, Loss, attacked, check_adversary, scores


@dataclass(frozen=True)
class Learner:
    """How to meta-learn.

    Attributes:
        lam: lambda, how much an adapted model is held at w.
        step, n_steps: gamma and T of the meta level.
        inner: the task-level algorithm.
        inner_step, inner_steps: eta and K of "gd".
        eps: norm of the adversary.
        tasks_per_step: drawn with replacement a meta-step; all of them if None.
        examples_per_step: drawn with replacement a task-level gradient ("gd"); all of them if None.
        unchecked: run with steps that are known to be unstable, to see what happens.
    """

    lam: float = 1.0
    step: float = 0.2
    n_steps: int = 10
    inner: Literal["prox", "gd"] = "prox"
    inner_step: float = 0.5
    inner_steps: int = 5
    eps: float = 0.0
    tasks_per_step: int | None = None
    examples_per_step: int | None = None
    unchecked: bool = False

    def check(self, loss: Loss, m: int, n: int) -> None:
        """Refuse what cannot work, before anything is computed.

        Raises:
            DataError: for fewer than two tasks, or fewer examples than the task-level algorithm needs.
            PresetError: for steps beyond stability, an adversary as large as the data, or a loss whose task-level
                problem has no unique solution or no solver.
        """
        if m < 2:
            raise DataError(f"m={m} task, but one is to be replaced or forgotten; give at least 2.")
        if n < 2:
            raise DataError(f"n={n} example a task, but one is to be replaced; give at least 2.")
        if self.examples_per_step is not None and not 1 <= self.examples_per_step <= n:
            raise DataError(
                f"The task-level gradient takes {self.examples_per_step} examples, but a task has n={n}; "
                f"give n >= {self.examples_per_step}, or take fewer."
            )
        if self.tasks_per_step is not None and not 1 <= self.tasks_per_step <= m:
            raise DataError(f"A meta-step takes {self.tasks_per_step} tasks of m={m}; give 1 to {m}.")
        for name in ("lam", "step", "n_steps", "inner_step", "inner_steps"):
            if not getattr(self, name) > 0:
                raise PresetError(f"{name}={getattr(self, name):g}; give a positive number.")
        check_adversary(self.eps)
        if self.inner == "prox" and self.eps and loss is not LOGISTIC:
            raise PresetError(f"The robust {loss.name} loss has no prox solver here; use inner='gd'.")
        if self.inner == "prox" and loss not in (SQUARED, LOGISTIC) and self.examples_per_step is None:
            _dual_margin(self.lam, loss)
        if self.inner == "prox" and self.examples_per_step is not None:
            raise PresetError("examples_per_step is for inner='gd'; prox uses all examples, so leave it out.")
        if self.unchecked:
            return
        if self.step * self.lam > 1:
            raise PresetError(
                f"The meta-level step is unstable: gamma lambda = {self.step * self.lam:g} > 1; "
                f"give step <= {1 / self.lam:g}."
            )
        smooth = loss.smoothness if loss.smoothness < float("inf") else 0.0
        limit = 1 / (self.lam + smooth * (1 + self.eps) ** 2)
        if self.inner == "gd" and self.inner_step > limit:
            raise PresetError(
                f"The task-level step is unstable: eta={self.inner_step:g} > 1 / (lambda + smoothness); "
                f"give inner_step <= {limit:.4g}."
            )


@dataclass(frozen=True)
class Meta:
    """What was learned.

    Attributes:
        w: meta-models (..., d).
        radius: largest norm of any model visited, of w or adapted.
    """

    w: Tensor
    radius: float


Adapt = Callable[[Tensor, Tensor | None], Tensor]


def learn(
    learner: Learner,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    rng: torch.Generator | None = None,
    shared: tuple[int, ...] | None = None,
    masks: Tensor | None = None,
) -> Meta:
    """Meta-learn from tasks x (..., m, n, d), y (..., m, n), many runs at once.

    Args:
        start: w_0 (..., d); its leading dimensions broadcast with those of x and masks.
        rng: of the stochastic variants.
        shared: shape of the random draws' leading dimensions, broadcastable to the runs': a 1 makes runs along
            that dimension see the same draws. Each run has its own by default.
        masks: tasks that each run may see, bool (..., m); only where a step takes some of the tasks.

    Raises:
        DataError, PresetError: as `Learner.check`; and if a run diverges.
    """
    m, n, dim = x.shape[-3:]
    learner.check(loss, m, n)
    lead = torch.broadcast_shapes(
        x.shape[:-3], start.shape[:-1], masks.shape[:-1] if masks is not None else (), shared or ()
    )
    w = start.expand(*lead, dim)
    if masks is not None and learner.tasks_per_step is None:
        raise PresetError("masks choose among the tasks of a step; give tasks_per_step.")
    drawn = masks.shape[:-1] if masks is not None else shared or lead
    weights = (torch.ones(m) if masks is None else masks.float()).expand(*drawn, m).reshape(-1, m)
    radius = float(torch.linalg.vector_norm(w, dim=-1).max())
    adapted: Tensor | None = None
    prepared = affine(learner.lam, x, y) if learner.inner == "prox" and loss is SQUARED else None
    for _ in range(learner.n_steps):
        if learner.tasks_per_step is None:
            tasks, maps = (x, y), prepared
        else:
            chosen = torch.multinomial(weights, learner.tasks_per_step, replacement=True, generator=rng)
            chosen = chosen.reshape(*drawn, -1).expand(*lead, -1)
            adapted = None
            tasks = (x, y) if prepared else (_take(x, chosen, 2), _take(y, chosen, 1))
            maps = (_take(prepared[0], chosen, 2), _take(prepared[1], chosen, 1)) if prepared else None
        if maps is not None:
            adapted = (maps[0] @ w[..., None, :, None])[..., 0] + maps[1]
        else:
            adapted = adapt(learner, loss, w[..., None, :], *tasks, start=adapted, rng=rng, shared=shared)
        radius = max(radius, float(torch.linalg.vector_norm(adapted, dim=-1).max()))
        w = w - learner.step * learner.lam * (w - adapted.mean(-2))
        radius = max(radius, float(torch.linalg.vector_norm(w, dim=-1).max()))
    if not torch.isfinite(w).all():
        raise DataError("A meta-training diverged (NaN); lower step or inner_step.")
    return Meta(w, radius)


def _take(values: Tensor, chosen: Tensor, trailing: int) -> Tensor:
    """values (..., m, *trailing) at tasks chosen (..., k): (..., k, *trailing), leading dimensions broadcast."""
    values = values.expand(*chosen.shape[:-1], *values.shape[-1 - trailing :])
    index = chosen.reshape(*chosen.shape, *[1] * trailing).expand(
        *chosen.shape, *values.shape[values.ndim - trailing :]
    )
    return values.gather(chosen.ndim - 1, index)


def adapt(
    learner: Learner,
    loss: Loss,
    w: Tensor,
    x: Tensor,
    y: Tensor,
    start: Tensor | None = None,
    rng: torch.Generator | None = None,
    shared: tuple[int, ...] | None = None,
) -> Tensor:
    """Task-level algorithm: adapted models u (..., d) for meta-models w (..., d) and tasks x (..., n, d), y (..., n).

    Args:
        start: where an iterative prox solver starts (it has one answer, found sooner from nearby).
        rng, shared: of random examples, as in `learn`.
    """
    if learner.inner == "gd":
        return _descend(learner, loss, w, x, y, rng, shared)
    if loss is SQUARED:
        matrix, offset = affine(learner.lam, x, y)
        return (matrix @ w[..., None])[..., 0] + offset
    if loss is LOGISTIC:
        return _newton(learner, w, x, y, start)
    return _dual(learner.lam, loss, w, x, y)


def affine(lam: float, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Prox-regularised least squares in closed form: u = P w + c, with P = lam (X^T X / n + lam I)^-1.

    Returns:
        P (..., d, d) and c (..., d).

    Raises:
        DataError: for lam = 0 and fewer examples than features, where there is no one answer.
    """
    n, dim = x.shape[-2:]
    if lam == 0 and n < dim:
        raise DataError(f"Least squares with lam=0 has n={n} examples for {dim} features; give n >= {dim}, or lam > 0.")
    eye = torch.eye(dim, dtype=x.dtype)
    hessian = x.mT @ x / n + lam * eye
    moment = (x.mT @ y[..., None])[..., 0] / n
    solved = torch.linalg.solve(hessian, torch.cat([(lam * eye).expand_as(hessian), moment[..., None]], -1))
    return solved[..., :-1], solved[..., -1]


def _descend(
    learner: Learner,
    loss: Loss,
    w: Tensor,
    x: Tensor,
    y: Tensor,
    rng: torch.Generator | None,
    shared: tuple[int, ...] | None,
) -> Tensor:
    lead = torch.broadcast_shapes(w.shape[:-1], x.shape[:-2])
    u = w.expand(*lead, -1)
    for _ in range(learner.inner_steps):
        part = (x, y)
        if learner.examples_per_step is not None:
            draws = (*(shared if shared is not None else lead[:-1]), lead[-1], learner.examples_per_step)
            chosen = torch.randint(x.shape[-2], draws, generator=rng).expand(*lead, -1)
            part = (_take(x, chosen, 1), _take(y, chosen, 0))
        gradient = loss.gradient(u, *part, learner.eps) + learner.lam * (u - w)
        u = u - learner.inner_step * gradient
    return u


def _newton(learner: Learner, w: Tensor, x: Tensor, y: Tensor, start: Tensor | None, n_steps: int = 60) -> Tensor:
    """Prox of the (robust) logistic loss by damped Newton steps.

    With an adversary the loss has a kink at u = 0, and only there. 0 is the answer iff the gradient's part that does
    not come from the adversary, y x / 2 on average + lam w, is no longer than eps / 2; elsewhere that is a direction
    of descent from 0, and Newton starts where it is below the kink, so that it never meets it.

    Raises:
        DataError: if it does not converge.
    """
    lam, eps = learner.lam, learner.eps
    lead = torch.broadcast_shapes(w.shape[:-1], x.shape[:-2])
    w = w.expand(*lead, -1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype)

    def objective(v: Tensor) -> Tensor:
        return LOGISTIC.at(v, x, y, eps).mean(-1) + lam / 2 * ((v - w) ** 2).sum(-1)

    stuck = torch.zeros(lead, dtype=torch.bool)
    u = w if start is None else start
    if eps:
        downhill = (y[..., None] * x).mean(-2) / 2 + lam * w
        stuck = torch.linalg.vector_norm(downhill, dim=-1) <= eps / 2 + 1e-9
        at_kink, u = objective(torch.zeros_like(w)), downhill
        while bool((outside := (objective(u) >= at_kink) & ~stuck).any()):
            u = torch.where(outside[..., None], u / 2, u)
    value = objective(u)
    for _ in range(n_steps):
        moved = attacked(LOGISTIC, u, x, y, eps)
        s = scores(u, moved)
        slope, bend = LOGISTIC.slope(s, y), LOGISTIC.bend(s, y)
        gradient = (slope[..., None, :] @ moved)[..., 0, :] / x.shape[-2] + lam * (u - w)
        size = torch.linalg.vector_norm(gradient, dim=-1)
        if bool(((size < 1e-9) | stuck).all()):
            return u.where(~stuck[..., None], torch.zeros_like(u))
        hessian = moved.mT @ (bend[..., None] * moved) / x.shape[-2] + lam * eye
        if eps:
            norm = torch.linalg.vector_norm(u, dim=-1).clamp(min=1e-12)[..., None, None]
            unit = u[..., None] / norm
            hessian = hessian + (-y * slope).mean(-1)[..., None, None] * eps / norm * (eye - unit @ unit.mT)
        towards = torch.linalg.solve(hessian, gradient)
        length = torch.ones_like(size)
        for _ in range(20):
            trial = u - length[..., None] * towards
            new = objective(trial)
            worse = new > value + 1e-14
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        u, value = torch.where((new <= value + 1e-14)[..., None], trial, u), torch.minimum(new, value)
    left = float(size[~stuck].max())
    if left > 1e-6:
        raise DataError(f"Newton's method left a gradient of {left:.2g} after {n_steps} steps; raise lam.")
    return u.where(~stuck[..., None], torch.zeros_like(u))


def _dual_margin(lam: float, loss: Loss) -> float:
    margin = lam + loss.curvature
    if margin <= 0:
        raise PresetError(
            f"The {loss.name} loss is weakly convex with modulus {-loss.curvature:g}, so prox with lam={lam:g} has no "
            f"one answer; give lam > {-loss.curvature:g}, or inner='gd'."
        )
    return margin


def _dual(lam: float, loss: Loss, w: Tensor, x: Tensor, y: Tensor, n_steps: int = 150) -> Tensor:
    """Prox of robust phase retrieval as a saddle point, over |a_i| <= 1:

        max_a min_u (1/n) sum_i a_i ((x_i . u)^2 - y_i) + lam / 2 ||u - w||^2.

    For lam > 2 the inner minimum is a linear system and the outer problem concave with a smooth objective:
    accelerated projected gradient ascent, restarted where it turns.
    """
    margin = _dual_margin(lam, loss)
    n, dim = x.shape[-2:]
    lead = torch.broadcast_shapes(w.shape[:-1], x.shape[:-2])
    w = w.expand(*lead, -1)
    eye = lam * torch.eye(dim, dtype=x.dtype)
    reach = lam / margin * torch.linalg.vector_norm(w, dim=-1).clamp(min=1e-6)
    gram = torch.linalg.matrix_norm(x, 2) ** 2  # of sum x x^T
    step = (n**2 * margin / (4 * reach**2 * gram))[..., None]

    def solve(a: Tensor) -> Tensor:
        return torch.linalg.solve(eye + 2 / n * x.mT @ (a[..., None] * x), lam * w)

    def climb(u: Tensor) -> Tensor:
        return (scores(u, x) ** 2 - y) / n

    a = torch.sign(scores(w, x) ** 2 - y)
    ahead, momentum = a, torch.ones(*lead, 1, dtype=x.dtype)
    for _ in range(n_steps):
        uphill = climb(solve(ahead))
        new = (ahead + step * uphill).clamp(-1, 1)
        turned = ((new - a) * uphill).sum(-1, keepdim=True) < 0
        following = torch.where(turned, 1.0, (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        ahead = torch.where(turned, new, new + (momentum - 1) / following * (new - a))
        a, momentum = new, following
    return solve(a)
