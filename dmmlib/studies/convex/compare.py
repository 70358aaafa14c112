"""What the notebook compares: errors of additive effects, costs to reach the oracle, and what leverage allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmmlib.studies.convex.iterations import conjugate_gradients, gd, match_probes, matchers, rate, steps_to
from dmmlib.studies.convex.logistic import Logistic, logistic_effects
from dmmlib.studies.convex.ridge import Effects, Ridge, effects, leverage, relative_error
from dmmlib.studies.convex.stochastic import Moments, match_sgd, sgd_cost
from dmmlib.studies.convex.synthetic import Synthetic


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
    sets = [order[:k] for k in sizes]
    if isinstance(problem, Ridge):
        metric, bound = problem.hessian, np.array([leverage(problem, forget) for forget in sets])
        found: list[Effects] = [effects(problem, forget) for forget in sets]
    else:
        metric, bound = problem.hessian(problem.theta), None
        found = [logistic_effects(problem, forget) for forget in sets]
        names["newton"] = "one Newton step on R"
    errors = {
        label: np.array([relative_error(getattr(e, name), e.exact, metric) for e in found])
        for name, label in names.items()
    }
    return GroupErrors(np.array(sizes), problem.n, errors, bound)


def costs(case: Synthetic, fraction: float = 0.01) -> dict[str, float]:
    """Sample gradients until the distance to the oracle's parameters is `fraction` of the first."""
    descents = [gd(case), *matchers(case), match_probes(case)]
    stochastic = match_sgd(case)
    return {
        **{m.name: m.cost * steps_to(m, case, fraction) for m in descents},
        "Newton (CG)": case.retain.n * (1 + conjugate_gradients(case, fraction)),
        "SGD on R": sgd_cost(case, fraction),
        stochastic.name: Moments(stochastic, case).steps_to(fraction),
    }


def trade_off(case: Synthetic) -> tuple[float, float, float]:
    """F's largest leverage h, the speed-up of matching on S over descent on R, and first-order error.

    The speed-up is the ratio of 1 - rate, over the directions in which something has to be unlearned; the
    error is in the A_S norm. If all directions count, or if F spans eigen-directions of A_R, h bounds both:
    A_R >= (1 - h) A_S, so that A_S, and the Hessian of matching below it, gains at most 1 / (1 - h) in the
    smallest eigenvalue and nothing in the largest; and the error is at most h (see `leverage`).
    """
    slow, fast = (1 - rate(method, case.delta) for method in (gd(case), matchers(case)[1]))
    found = effects(case.problem, case.forget)
    error = relative_error(found.first_order, found.exact, case.problem.hessian)
    return leverage(case.problem, case.forget), fast / slow, error
