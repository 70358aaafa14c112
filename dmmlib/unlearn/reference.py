"""The two ends of the scale: do nothing, and retrain."""

from __future__ import annotations

from dmmlib.errors import DataError
from dmmlib.unlearn.base import Problem, Unlearned, register


@register("do_nothing", paper="the original, unchanged", cost="none")
def do_nothing(problem: Problem) -> Unlearned:
    """The originals as they are, at no cost: what unlearning is to be nearer to retraining than."""
    return Unlearned.from_logits(problem.original_logits, problem.labels, cost=0.0, models=problem.originals)


@register("retrain", paper="retraining on R: what unlearning is to equal", cost="training epochs n_R", alone=False)
def retrain(problem: Problem) -> Unlearned:
    """Fresh oracles, independent of those that results are measured against: the floor of KLoM, at the cost of 1."""
    if problem.oracle_logits is None:
        raise DataError("retrain needs the logits of retrained models; give Problem(oracle_logits=...).")
    return Unlearned.from_logits(problem.oracle_logits, problem.labels, cost=1.0)
