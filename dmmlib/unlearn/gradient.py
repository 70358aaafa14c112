"""Gradient baselines: descent on R, ascent on F, and one after the other.

SGD with momentum 0.9 at a constant rate, no weight decay.
"""

from __future__ import annotations

import math

import numpy as np

from dmmlib.ensemble import Loss, classification, epoch_batches
from dmmlib.optim import SGD
from dmmlib.unlearn.base import Phase, Problem, Unlearned, finetune, register


def passes(problem: Problem, pool: np.ndarray, epochs: float, batch_size: int) -> list[np.ndarray]:
    """Batches (n_models, batch) of so many passes over a pool, in an order of each model's own.

    Half a pass is the first half of a pass's batches.
    """
    whole = math.ceil(epochs)
    batches = list(epoch_batches([pool] * problem.n_models, batch_size, whole, problem.rngs()))
    return batches[: max(1, round(len(batches) * epochs / whole))]


def descent(problem: Problem, sign: float = 1.0) -> Loss:
    """Cross-entropy as a `Loss`; ascent with sign -1."""
    return classification(problem.y, sign)


@register("gd", space={"epochs": [1.0, 3.0, 6.0], "lr": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "batch_size": [64]})
def gd(problem: Problem, *, epochs: float = 3.0, lr: float = 1e-2, batch_size: int = 64) -> Unlearned:
    """Gradient descent on R: train on, without F."""
    phase = Phase(passes(problem, problem.retain, epochs, batch_size), descent(problem))
    return finetune(problem, [phase], SGD(lr))


@register("ga", space={"epochs": [1.0, 3.0, 5.0, 10.0], "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "batch_size": [64]})
def ga(problem: Problem, *, epochs: float = 5.0, lr: float = 1e-3, batch_size: int = 64) -> Unlearned:
    """Gradient ascent on F: raise the loss of what is to be forgotten."""
    phase = Phase(passes(problem, problem.forget, epochs, batch_size), descent(problem, sign=-1.0))
    return finetune(problem, [phase], SGD(lr))


@register(
    "ga_gd",
    space={
        "ascent_epochs": [1.0, 3.0, 5.0],
        "descent_epochs": [1.0, 3.0, 5.0],
        "lr": [3e-4, 1e-3, 3e-3, 1e-2],
        "batch_size": [64],
    },
)
def ga_gd(
    problem: Problem,
    *,
    ascent_epochs: float = 3.0,
    descent_epochs: float = 3.0,
    lr: float = 1e-3,
    batch_size: int = 64,
) -> Unlearned:
    """Gradient ascent on F, then descent on R, with one optimizer."""
    phases = [
        Phase(passes(problem, problem.forget, ascent_epochs, batch_size), descent(problem, sign=-1.0)),
        Phase(passes(problem, problem.retain, descent_epochs, batch_size), descent(problem)),
    ]
    return finetune(problem, phases, SGD(lr))
