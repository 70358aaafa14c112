"""Losses l(s, y) of one score s = x . u, as batched tensors, and their worst case under a norm-bounded adversary.

Everywhere u is (..., d), x (..., n, d) with norms of at most 1, y and what is returned (..., n), float64. What a
bound needs to know of a loss stands with it: Lipschitz constant on a ball, smoothness, and curvature (0 if convex,
-rho if l + rho/2 ||u||^2 is, "rho-weakly convex").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dmmlib.errors import PresetError

Pointwise = Callable[[Tensor, Tensor], Tensor]
"""(scores, labels) of one shape -> a tensor of that shape."""


@dataclass(frozen=True)
class Loss:
    """A loss of one score.

    Attributes:
        name: what figures and errors call it.
        value, slope, bend: l and its first two derivatives in s (a subgradient where there is a kink).
        uphill: sign (-1 or 1) of the change of score that the adversary wants at (s, y), or None where the best
            answer is not known in closed form and projected gradient ascent looks for it.
        steepest: (largest |s|) -> largest |slope| among scores up to it, for admissible labels.
        smoothness: largest |bend|, infinite where l has a kink.
        curvature: lowest second derivative in s, in the sense of weak convexity.
        flip: a label as far from y as it can be, for adverse replacements.
    """

    name: str
    value: Pointwise
    slope: Pointwise
    bend: Pointwise
    uphill: Pointwise | None
    steepest: Callable[[float], float]
    smoothness: float
    curvature: float
    flip: Callable[[Tensor], Tensor]

    def lipschitz(self, radius: float, eps: float = 0.0) -> float:
        """G: a bound on the gradient's norm for ||u|| <= radius, ||x|| <= 1 and an adversary of norm eps."""
        return self.steepest(radius * (1 + eps)) * (1 + eps)

    def gradient(self, u: Tensor, x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
        """Mean gradient (..., d) over the examples; under an adversary that at its answer (Danskin's theorem)."""
        x = attacked(self, u, x, y, eps)
        return (self.slope(scores(u, x), y)[..., None, :] @ x)[..., 0, :] / x.shape[-2]

    def at(self, u: Tensor, x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
        """Loss of each example (..., n), worst within eps of it."""
        return self.value(scores(u, attacked(self, u, x, y, eps)), y)


def scores(u: Tensor, x: Tensor) -> Tensor:
    """x . u (..., n)."""
    return (x @ u[..., None])[..., 0]


def attacked(loss: Loss, u: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The examples as the adversary leaves them: within eps (Euclidean) of x, of the highest loss.

    In closed form for linear models: x + eps uphill(s, y) u / ||u||, so that the robust logistic loss is
    softplus(-(y s - eps ||u||)) and the robust squared loss (|s - y| + eps ||u||)^2 / 2. Otherwise by `pgd`.

    Raises:
        PresetError: for an adversary that is negative or as large as the data (norm 1).
    """
    check_adversary(eps)
    if eps == 0:
        return x
    if loss.uphill is None:
        return pgd(loss, u, x, y, eps)
    sign = loss.uphill(scores(u, x), y)
    return x + eps * sign[..., None] * torch.nn.functional.normalize(u, dim=-1)[..., None, :]


def check_adversary(eps: float) -> None:
    """Raise PresetError unless 0 <= eps < 1."""
    if not 0 <= eps < 1:
        raise PresetError(f"The adversary has eps={eps:g}, but the data have norm 1; give 0 <= eps < 1.")


def pgd(loss: Loss, u: Tensor, x: Tensor, y: Tensor, eps: float, n_steps: int = 15) -> Tensor:
    """Projected gradient ascent on the loss in x + delta, ||delta|| <= eps; the best example met counts.

    From three starts (both ends along u, and beside x), as the loss may have several maxima. Steps go along the
    normalised gradient and shrink from eps / 2 by 0.7 each.
    """
    unit = torch.nn.functional.normalize(u, dim=-1)[..., None, :]
    best, worst = x, loss.value(scores(u, x), y)
    for begin in (-1.0, 0.01, 1.0):
        delta = begin * eps * unit + torch.zeros_like(x)
        for k in range(n_steps):
            found = loss.value(scores(u, x + delta), y)
            best = torch.where((found > worst)[..., None], x + delta, best)
            worst = torch.maximum(found, worst)
            delta = delta + eps / 2 * 0.7**k * torch.sign(loss.slope(scores(u, x + delta), y))[..., None] * unit
            delta = delta * (eps / torch.linalg.vector_norm(delta, dim=-1, keepdim=True).clamp(min=eps))
    return best


SQUARED = Loss(
    "squared",
    value=lambda s, y: (s - y) ** 2 / 2,
    slope=lambda s, y: s - y,
    bend=lambda s, y: torch.ones_like(s),
    uphill=lambda s, y: torch.where(s >= y, 1.0, -1.0).to(s),
    steepest=lambda s: s + 1,  # |y| <= 1
    smoothness=1.0,
    curvature=0.0,
    flip=lambda y: -y,
)
LOGISTIC = Loss(
    "logistic",
    value=lambda s, y: softplus(-y * s),
    slope=lambda s, y: -y * torch.sigmoid(-y * s),
    bend=lambda s, y: torch.sigmoid(s) * torch.sigmoid(-s),
    uphill=lambda s, y: -y,
    steepest=lambda s: 1.0,
    smoothness=0.25,
    curvature=0.0,
    flip=lambda y: -y,
)
PHASE = Loss(  # robust phase retrieval: measurements y of (x . u)^2, in [0, 1], some of them wrong
    "phase",
    value=lambda s, y: (s**2 - y).abs(),
    slope=lambda s, y: 2 * s * torch.sign(s**2 - y),
    bend=lambda s, y: 2 * torch.sign(s**2 - y),
    uphill=None,
    steepest=lambda s: 2 * s,
    smoothness=math.inf,
    curvature=-2.0,
    flip=lambda y: 1 - y,
)
