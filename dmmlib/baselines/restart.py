"""Retraining in part: from nothing but briefly, or from where training once was."""

from __future__ import annotations

import dataclasses

from dmmlib.baselines.fresh import fresh
from dmmlib.errors import DataError
from dmmlib.unlearn.base import Amount, Phase, Positive, Problem, Unlearned, descent, finetune, passes, register


def retraining(problem: Problem, epochs: float, start: float = 0.0, scale: float = 1.0) -> Unlearned:
    """Train the problem's models on R by the originals' recipe, its rate from the share `start` on, times `scale`."""
    recipe = problem.training
    phase = Phase(passes(problem, problem.retain, epochs, recipe.batch_size), descent(problem))
    tiny = 0.5 / len(phase.batches)  # rates are taken in the middle of a step, as in training

    def rate(share: float) -> float:
        return scale * recipe.rate(start + (1 - start) * (share + tiny))

    return finetune(problem, [phase], recipe.optimizer, rate)


@register(
    "short_retrain",
    space={"epochs": [5.0], "scale": [0.5, 1.0, 2.0, 4.0]},
    paper="retraining from scratch, cut short",
    cost="epochs n_R",
)
def short_retrain(problem: Problem, *, epochs: Amount = 5.0, scale: Positive = 1.0) -> Unlearned:
    """Train new models on R by the originals' recipe, squeezed into fewer epochs: what a practitioner tries first."""
    return retraining(dataclasses.replace(problem, originals=fresh(problem)), epochs, scale=scale)


@register(
    "rewind",
    space={"scale": [0.25, 0.5, 1.0, 2.0, 4.0]},
    paper="R2D; Mu and Klabjan, NeurIPS 2025",
    cost="(1 - share) training epochs n_R (and not counted: weights kept at that share of training)",
    rewinds=True,
)
def rewind(problem: Problem, *, scale: Positive = 1.0) -> Unlearned:
    """Go back to the originals as they were at a share of their training, and finish it on R.

    Arguments in the paper are for gradient descent with one rate and noise at the end; here the originals' recipe goes
    on, its rate times `scale`, without noise and with momentum from zero. Raises DataError without earlier weights.
    """
    if problem.earlier is None:
        raise DataError("rewind needs the originals as they were earlier; give Problem(earlier=(share, models)).")
    share, models = problem.earlier
    then = dataclasses.replace(problem, originals=models)
    return retraining(then, (1 - share) * problem.training.epochs, share, scale)
