r"""Bounds on uniform meta-stability, derived here for exactly the algorithm that `learner` runs.

Wang and Arora (NeurIPS 2024) define uniform meta-stability by the change of loss when one task of the meta-sample
*and* one example of the new task are replaced, and bound it for prox meta-learning. Their constants could not be
checked, so what follows is derived, and claimed, only for this code. Notation of `learner`; G is the loss's Lipschitz
constant on the ball that holds every model visited, mu a lower bound on its curvature (0 if convex, -rho if
rho-weakly convex, lambda + mu > 0), and kappa = 1 for prox, 1 - (1 - eta lambda)^K for gradient descent.

1. *Adaptation, new w.* ||u(w, D) - u(w', D)|| <= c ||w - w'||. Prox: optimality conditions and curvature give
   c = lambda / (lambda + mu). Descent on convex, beta-smooth losses with eta (beta + lambda) <= 1: a step
   u -> u - eta (grad L + lambda (u - w)) shrinks distances by 1 - eta lambda and adds eta lambda ||w - w'||, so c = 1.
2. *Adaptation, one example replaced.* The objective changes by a 2G/n-Lipschitz function, so prox moves by at most
   2G / (n (lambda + mu)); a step of descent adds 2 G eta / n, which sums to 2 G kappa / (n lambda).
3. *Adaptation, all examples replaced.* ||u - w|| <= G kappa / lambda, so at most 2 G kappa / lambda apart.
4. *Meta level.* d_t = ||w_t - w'_t|| for samples that differ in one of m tasks obeys, with gamma lambda <= 1,
   d_{t+1} <= (1 - gamma lambda + gamma lambda c) d_t + gamma lambda r / m with r from 3, or from 2 if only one
   example of the task differs. For convex losses d_T <= 2 G kappa gamma T / m (a task), and
   2 G kappa gamma T / (m n) (an example).
5. *Loss.* beta = G (c d_T + example), so for convex losses **beta = 2 G^2 kappa (gamma T / m + 1 / (lambda n))**.
6. *Generalisation.* Renaming z_11 and an independent example of the same task, and task 1 and an independent task,
   gives E[transfer risk - empirical risk] = E[l(u(A(S^(1)), D_1^(1)), z_11) - l(u(A(S), D_1), z_11)], hence
   |gap| <= beta: no further term.

Drawing tasks or examples with replacement leaves 1 to 6 true in expectation over the draws for convex losses, as
every recursion is linear and a replaced one is met with probability 1/m, 1/n. A robust loss is the maximum of convex
losses: convex with G taken at norm 1 + eps, so prox keeps its bounds; it is not smooth, so descent needs 7.

7. *Descent without smoothness.* g, g' being subgradients at the same data, a step obeys
   ||(1 - eta lambda) D - eta (g - g')||^2 <= ((1 - eta lambda)^2 - 2 eta (1 - eta lambda) mu) ||D||^2 + 4 eta^2 G^2,
   plus eta lambda ||w - w'||, plus 2 G eta / n. The recursion is evaluated numerically; it does not vanish as n and m
   grow, as known for non-smooth convex losses and gradient descent (Bassily, Feldman, Guzman, Talwar, NeurIPS 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dmmlib.errors import PresetError
from dmmlib.studies.meta.learner import Learner
from dmmlib.studies.meta.losses import Loss

KINDS = ("task", "example", "adaptation", "meta")
"""What is replaced: a task of the meta-sample; an example of one of its tasks; an example of the new task; or a task
of the meta-sample and an example of the new task, which is uniform meta-stability."""


@dataclass(frozen=True)
class Constants:
    """What the bounds depend on besides the learner.

    Attributes:
        lipschitz: G.
        curvature: mu.
        smooth: whether gradients are Lipschitz.
        m, n: tasks, and examples a task.
    """

    lipschitz: float
    curvature: float
    smooth: bool
    m: int
    n: int


def constants(loss: Loss, learner: Learner, m: int, n: int, radius: float) -> Constants:
    """Constants of a loss on the ball of that radius (norms of x at most 1, and eps of the adversary)."""
    smooth = loss.smoothness < float("inf") and learner.eps == 0
    curvature = loss.curvature * (1 + learner.eps) ** 2
    return Constants(loss.lipschitz(radius, learner.eps), curvature, smooth, m, n)


def adapted(c: Constants, learner: Learner, apart: float, replaced: bool) -> float:
    """How far two adapted models are at most, whose w are `apart`, on the same data or with one example replaced.

    Raises:
        PresetError: where the bounds do not hold (lambda + mu <= 0, or steps that are too large).
    """
    strong = learner.lam + c.curvature
    if strong <= 0 and learner.inner == "prox":
        raise PresetError(f"lambda + mu = {strong:g}; the bounds need it positive: raise lam.")
    example = 2 * c.lipschitz / c.n if replaced else 0.0
    if learner.inner == "prox":
        return (learner.lam * apart + example) / strong
    keep = 1 - learner.inner_step * learner.lam
    if c.smooth and c.curvature >= 0:
        return apart + _kappa(learner) * example / learner.lam
    eta, distance = learner.inner_step, apart
    for _ in range(learner.inner_steps):
        stretched = (keep**2 - 2 * eta * keep * c.curvature) * distance**2 + 4 * (eta * c.lipschitz) ** 2
        distance = stretched**0.5 + eta * learner.lam * apart + eta * example
    return distance


def _kappa(learner: Learner) -> float:
    return 1.0 if learner.inner == "prox" else 1 - (1 - learner.inner_step * learner.lam) ** learner.inner_steps


def meta(c: Constants, learner: Learner, whole_task: bool) -> float:
    """How far two meta-models are at most whose samples differ in one task, or in one example of one task."""
    share, distance = learner.step * learner.lam, 0.0
    for _ in range(learner.n_steps):
        same = adapted(c, learner, distance, replaced=False)
        if whole_task:
            other = distance + 2 * c.lipschitz * _kappa(learner) / learner.lam
        else:
            other = adapted(c, learner, distance, replaced=True)
        distance = (1 - share) * distance + share * (same + (other - same) / c.m)
    return distance


def stability_bounds(c: Constants, learner: Learner) -> dict[str, float]:
    """The largest change of any loss, for each of `KINDS`."""
    task, example = meta(c, learner, whole_task=True), meta(c, learner, whole_task=False)
    far = {
        "task": adapted(c, learner, task, replaced=False),
        "example": adapted(c, learner, example, replaced=False),
        "adaptation": adapted(c, learner, 0.0, replaced=True),
        "meta": adapted(c, learner, task, replaced=True),
    }
    return {kind: c.lipschitz * distance for kind, distance in far.items()}


def as_if_met(c: Constants, learner: Learner) -> dict[str, float]:
    """The bounds for convex smooth losses and allowed steps, whether or not that is so: kappa = 1."""
    return stability_bounds(replace(c, curvature=0.0, smooth=True), replace(learner, inner="prox"))
