"""Losses l(s, y) of one score s = x . u, as batched tensors, and their worst case under a norm-bounded adversary.

Everywhere u is (..., d), x is (..., n, d) with norms of at most 1, and y is (..., n); all are float64. Each loss knows
what a bound needs: its Lipschitz constant on a ball, its smoothness, and its curvature, which is 0 if the loss is
convex and -rho if l + rho/2 ||u||^2 is ("rho-weakly convex").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

Pointwise = Callable[[Tensor, Tensor], Tensor]
"""(scores, labels) of one shape -> a tensor of that shape."""


@dataclass(frozen=True)
class Loss:
    """A loss of one score."""

    name: str  # what figures and errors call a model with it
    value: Pointwise  # l
    slope: Pointwise  # its derivative in s (a subgradient where there is a kink)
    steepest: Callable[[float], float]  # (largest |s|) -> largest |slope| among scores up to it, for admissible labels
    smoothness: float  # largest second derivative in s, infinite where l has a kink
    curvature: float = 0.0  # lowest second derivative in s, in the sense of weak convexity
    flip: Callable[[Tensor], Tensor] = torch.neg  # a label as far from y as it can be, for adverse replacements

    def lipschitz(self, radius: float, eps: float = 0.0) -> float:
        """Return G, which bounds the gradient's norm for ||u|| <= radius, ||x|| <= 1 and an adversary of norm eps."""
        return self.steepest(radius * (1 + eps)) * (1 + eps)

    def gradient(self, u: Tensor, x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
        """Mean gradient (..., d) over the examples, taken at the adversary's answer (Danskin's theorem)."""
        x = attacked(self, u, x, y, eps)
        return (self.slope(scores(u, x), y)[..., None, :] @ x)[..., 0, :] / x.shape[-2]

    def at(self, u: Tensor, x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
        """Loss of each example (..., n), the worst within eps of it."""
        return self.value(scores(u, attacked(self, u, x, y, eps)), y)


def scores(u: Tensor, x: Tensor) -> Tensor:
    """Scores x . u (..., n)."""
    return (x @ u[..., None])[..., 0]


def attacked(loss: Loss, u: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Move each example within eps (Euclidean) of x to where the loss is highest.

    For a convex loss this is x + eps sign(slope) u / ||u||, so that the robust logistic loss is
    softplus(-(y s - eps ||u||)) and the robust squared loss (|s - y| + eps ||u||)^2 / 2. Otherwise `pgd` looks for it.
    """
    if eps == 0:
        return x
    if loss.curvature < 0:
        return pgd(loss, u, x, y, eps)
    sign = torch.where(loss.slope(scores(u, x), y) >= 0, 1.0, -1.0).to(x)
    return x + eps * sign[..., None] * normalize(u, dim=-1)[..., None, :]


def pgd(loss: Loss, u: Tensor, x: Tensor, y: Tensor, eps: float, n_steps: int = 15) -> Tensor:
    """Projected gradient ascent on the loss in x + delta, ||delta|| <= eps; returns the best example met.

    It starts from both ends along u and from beside x, as the loss may have several maxima. Steps go along the
    normalised gradient; the first has length eps / 2, each further one 0.7 times the length before.
    """
    unit = normalize(u, dim=-1)[..., None, :]
    best, worst = x, loss.value(scores(u, x), y)
    for begin in (-1.0, 0.01, 1.0):
        delta = begin * eps * unit + torch.zeros_like(x)
        for k in range(n_steps):
            s = scores(u, x + delta)
            found = loss.value(s, y)
            best = torch.where((found > worst)[..., None], x + delta, best)
            worst = torch.maximum(found, worst)
            delta = delta + eps / 2 * 0.7**k * torch.sign(loss.slope(s, y))[..., None] * unit
            delta = delta * (eps / torch.linalg.vector_norm(delta, dim=-1, keepdim=True).clamp(min=eps))
    return best


SQUARED = Loss(
    "linear regression",
    value=lambda s, y: (s - y) ** 2 / 2,
    slope=lambda s, y: s - y,
    steepest=lambda s: s + 1,  # |y| <= 1
    smoothness=1.0,
)
LOGISTIC = Loss(
    "logistic regression",
    value=lambda s, y: softplus(-y * s),
    slope=lambda s, y: -y * torch.sigmoid(-y * s),
    steepest=lambda s: 1.0,
    smoothness=0.25,
)
PHASE = Loss(  # robust phase retrieval: measurements y of (x . u)^2, in [0, 1], some of them wrong
    "phase retrieval",
    value=lambda s, y: (s**2 - y).abs(),
    slope=lambda s, y: 2 * s * torch.sign(s**2 - y),
    steepest=lambda s: 2 * s,
    smoothness=math.inf,
    curvature=-2.0,
    flip=lambda y: 1 - y,
)
