"""What the notebook compares: errors of additive effects, costs to reach the oracle, and what leverage allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dmmlib.studies.convex.iterations import conjugate_gradients, descents, match_probes, rate, steps_to
from dmmlib.studies.convex.logistic import Logistic
from dmmlib.studies.convex.ridge import Ridge, relative_error
from dmmlib.studies.convex.stochastic import match_sgd, sgd_cost
from dmmlib.studies.convex.synthetic import Synthetic

BOUND = "bound: largest leverage"


def group_errors(problem: Ridge | Logistic, order: np.ndarray, sizes: Sequence[int]) -> pd.DataFrame:
    """Compare approximate effects of the first |F| points of `order` with the exact ones, for each |F| of `sizes`.

    Returns:
        Relative errors in the Hessian's norm: a row for each |F|, a column for each approximation and, for ridge
        regression, `BOUND`, which first-order influence does not exceed.
    """
    rows = []
    for forget in (order[:size] for size in sizes):
        effects = problem.effects(forget)
        truth = effects.pop("exact")
        rows.append({name: relative_error(effect, truth, problem.hessian) for name, effect in effects.items()})
        if isinstance(problem, Ridge):
            rows[-1][BOUND] = problem.leverage(forget)
    return pd.DataFrame(rows, index=list(sizes))


def costs(case: Synthetic) -> dict[str, float]:
    """Count sample gradients of each method until the distance to the oracle's parameters is 1 % of the first."""
    methods = [*(descents(case)[name] for name in ("GD on R", "OM on F", "OM on S")), match_probes(case)]
    return {
        **{method.name: method.cost * steps_to(method, case) for method in methods},
        "Newton (CG)": case.retain.n * (1 + conjugate_gradients(case)),
        "SGD on R": sgd_cost(case),
        "OM on S, SGD": match_sgd(case).steps_to(),
    }


def trade_off(case: Synthetic) -> tuple[float, float, float]:
    """Return F's largest leverage h, the speed-up of matching on S over descent on R, and the first-order error.

    The speed-up is the ratio of 1 - rate. If all directions count, or if F spans eigen-directions of A_R, it is at most
    1 / (1 - h): from A_R >= (1 - h) A_S, the Hessian of matching, which is below A_S, gains at most that in the
    smallest eigenvalue and nothing in the largest.
    """
    methods, found = descents(case), case.problem.effects(case.forget)
    slow, fast = (1 - rate(methods[name], case.delta) for name in ("GD on R", "OM on S"))
    error = relative_error(found["first-order influence"], found["exact"], case.problem.hessian)
    return case.problem.leverage(case.forget), fast / slow, error
