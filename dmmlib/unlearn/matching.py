"""Matching methods: fine-tune the original to the answers of a model that never saw F.

Georgiev et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", ICLR 2025. Oracle matching
(OM) takes true oracles' logits as targets and is a bound; datamodel matching (DMM) takes predicted ones.
Each original keeps its own randomness: its target is its own answer plus the predicted change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmmlib.errors import DataError
from dmmlib.optim import Adam
from dmmlib.unlearn.base import Phase, Problem, Unlearned, finetune, register

SPACE: dict[str, list[Any]] = {
    "cost": [0.1, 0.2],
    "lr": [1e-3, 3e-3, 1e-2],
    "batch_size": [20, 50],
    "forget_share": [0.2, 0.4, 0.6],
}


def predicted_oracle(problem: Problem) -> np.ndarray:
    """z_original + effect(F): predicted oracle logits (N, n_points, n_classes), one set an original."""
    if problem.attributor is None:
        raise DataError("Datamodel methods need an attributor; give Problem(attributor=...).")
    return problem.original_logits + problem.attributor.effect(problem.forget)


@register("dm_direct")
def dm_direct(problem: Problem) -> Unlearned:
    """Answer with the predicted logits: what matching could reach; not a model, so of no cost in gradients."""
    return Unlearned.from_logits(predicted_oracle(problem), problem.labels, cost=0.0)


@register("dmm", space=SPACE)
def dmm(problem: Problem, **hyperparameters: float) -> Unlearned:
    """Datamodel matching: `match` with predicted oracle logits as targets."""
    return match(problem, predicted_oracle(problem)[:, : problem.n_train], **hyperparameters)  # type: ignore[arg-type]


@register("oracle_matching", space=SPACE)
def oracle_matching(problem: Problem, *, n_oracles: int = 1, **hyperparameters: float) -> Unlearned:
    """Oracle matching: `match` with the mean logits of `n_oracles` true oracles as targets.

    Original i takes oracles i, i + 1, ..., so with one oracle each the targets are distributed as oracles
    are; a mean of several is less spread than they are.
    """
    if problem.oracle_logits is None:
        raise DataError("oracle_matching needs the logits of retrained models; give Problem(oracle_logits=...).")
    oracles = problem.oracle_logits[:, : problem.n_train]
    if not 1 <= n_oracles <= len(oracles):
        raise DataError(f"n_oracles={n_oracles}, but there are {len(oracles)} oracles; use 1 to {len(oracles)}.")
    chosen = (np.arange(problem.n_models)[:, None] + np.arange(n_oracles)) % len(oracles)
    targets = sum(oracles[chosen[:, j]] for j in range(n_oracles)) / n_oracles
    return match(problem, np.asarray(targets, np.float32), **hyperparameters)  # type: ignore[arg-type]


def match(
    problem: Problem,
    targets: np.ndarray,
    *,
    cost: float = 0.1,
    lr: float = 3e-3,
    batch_size: int = 20,
    forget_share: float = 0.4,
) -> Unlearned:
    """Fine-tune every original to target logits on F and a random sample of R.

    Mean squared error on logits, Adam, a rate that falls linearly to zero. A batch holds a fixed share of F;
    the rest is drawn from R. The published setting (F repeated 5 times with 20 |F| of R an epoch) is
    `forget_share` 0.2; here the *cost* is fixed instead of the number of epochs, so that small and large
    forget sets are given the same work, and small batches have been the better use of it.

    Args:
        problem: what to unlearn, from which models.
        targets: logits (N, n_train, n_classes) to match.
        cost: sample gradients to spend, relative to one retraining.
        lr: Adam's rate at the start.
        batch_size: examples a step.
        forget_share: share of a batch that comes from F.
    """
    goal = torch.from_numpy(targets).to(problem.x.device)

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        return ((logits - goal[models[:, None], indices]) ** 2).mean((1, 2))

    n_steps = max(1, round(cost * problem.retraining / batch_size))
    from_forget = min(max(1, round(forget_share * batch_size)), batch_size - 1)
    batches = np.concatenate(
        [
            _stream(problem, problem.forget, n_steps, from_forget),
            _stream(problem, problem.retain, n_steps, batch_size - from_forget),
        ],
        axis=2,
    )
    return finetune(
        problem,
        [Phase(list(batches), loss)],
        Adam(lr),
        rate=lambda share: lr * (1 - share),
    )


def _stream(problem: Problem, pool: np.ndarray, n_steps: int, size: int) -> np.ndarray:
    """`size` points of a pool a step, pass after pass without replacement: (n_steps, n_models, size)."""
    n_passes = -(-n_steps * size // len(pool))
    orders = []
    for rng in problem.rngs():
        order = np.concatenate([rng.permutation(pool) for _ in range(n_passes)])
        orders.append(order[: n_steps * size].reshape(n_steps, size))
    return np.stack(orders, axis=1)
