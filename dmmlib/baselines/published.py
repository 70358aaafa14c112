"""Matching as its authors published it: Adam on the squared error of logits, for a comparison with `matching`.

Georgiev et al., ICLR 2025, and RoyRin/data-unlearning-bench: an epoch sees F some times and as many points of R for
each of F, drawn anew; five epochs of batches of 512, at a rate that falls by .95 per epoch.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from dmmlib.ensemble import Loss
from dmmlib.errors import DataError
from dmmlib.matching.match import GEORGIEV, means_of_oracles, predicted_oracle
from dmmlib.optim import Adam
from dmmlib.unlearn.base import Count, Phase, Positive, Problem, Unlearned, finetune, register

RATIOS = {"1:3": (1, 3), "5:20": (5, 20)}  # how often an epoch sees F, and points of R for each of F
Ratio = Literal["1:3", "5:20"]
DECAY = 0.95
published = partial(
    register,
    space={"lr": [1e-4, 5e-4], "ratio": list(RATIOS)},
    limits={"lr": [1e-4, 5e-4]},  # as published, nothing else
    paper=f"as published; {GEORGIEV}",
    elsewhere="RoyRin/data-unlearning-bench",
)


@published("dmm_adam", cost="epochs (4 or 25) n_F", attributed=True)
def dmm_adam(
    problem: Problem, *, lr: Positive = 5e-4, ratio: Ratio = "1:3", epochs: Count = 5, batch_size: PositiveInt = 512
) -> Unlearned:
    """Datamodel matching with predicted oracle logits, by `fine_tune`."""
    return fine_tune(problem, predicted_oracle(problem), lr, ratio, epochs, batch_size)


@published("oracle_matching_adam", cost="epochs (4 or 25) n_F (and not counted: 10 retrainings)", alone=False)
def oracle_matching_adam(
    problem: Problem,
    *,
    n_oracles: PositiveInt = 10,
    lr: Positive = 5e-4,
    ratio: Ratio = "1:3",
    epochs: Count = 5,
    batch_size: PositiveInt = 512,
) -> Unlearned:
    """Oracle matching with the mean logits of oracles i, i + 1, ... for original i, by `fine_tune`."""
    if problem.oracle_logits is None:
        raise DataError("oracle_matching_adam needs the logits of retrained models; give Problem(oracle_logits=...).")
    n = min(n_oracles, len(problem.oracle_logits))
    targets = means_of_oracles(problem.oracle_logits, n, problem.n_models)
    return fine_tune(problem, targets, lr, ratio, epochs, batch_size)


def squared_error(targets: np.ndarray, problem: Problem) -> Loss:
    """Mean squared error on target logits (N, at least n_train, n_classes)."""
    goal = torch.from_numpy(targets).to(problem.x.device)

    def to_targets(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        return ((logits - goal[models[:, None], indices]) ** 2).mean((1, 2))

    return to_targets


def fine_tune(problem: Problem, targets: np.ndarray, lr: float, ratio: str, epochs: int, batch_size: int) -> Unlearned:
    """Fine-tune every original to target logits (N, at least n_train, n_classes), as the module says."""
    repeats, per_point = RATIOS[ratio]
    n_retain = min(len(problem.retain), per_point * len(problem.forget))
    forget, rngs, batches = np.tile(problem.forget, repeats), problem.rngs(), list[np.ndarray]()
    for _ in range(epochs):
        drawn = [np.r_[forget, rng.choice(problem.retain, n_retain, replace=False)] for rng in rngs]
        order = np.stack([rng.permutation(points) for rng, points in zip(rngs, drawn, strict=True)])
        batches += np.array_split(order, -(-order.shape[1] // batch_size), axis=1)
    phase = Phase(batches, squared_error(targets, problem))
    return finetune(problem, [phase], Adam(lr), rate=lambda share: lr * DECAY ** int(share * epochs))
