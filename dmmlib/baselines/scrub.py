"""SCRUB: distil from the original on R, away from it on F (Kurmanji et al., NeurIPS 2023)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from dmmlib.baselines.gradient import turns
from dmmlib.ensemble import Loss, cross_entropy
from dmmlib.metrics import correct
from dmmlib.optim import SGD
from dmmlib.unlearn.base import Count, Positive, Problem, Unlearned, finetune, register

DECAYS, DECAY = (3, 5, 9), 0.1  # after these epochs the rate falls by this factor, as in the authors' code


def distillation(teacher: Tensor, temperature: float) -> Loss:
    """Mean KL of softened answers from a teacher's, by its logits (n_models, n_points, n_classes)."""

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        student = F.log_softmax(logits / temperature, -1)
        soft = F.log_softmax(teacher[models[:, None], indices] / temperature, -1)
        return F.kl_div(student, soft, reduction="none", log_target=True).sum(-1).mean(1)

    return loss


@register(
    "scrub",
    space={
        "epochs": [4],
        "max_epochs": [3],
        "lr": [3e-3, 1e-2, 3e-2, 1e-1],
        "alpha": [0.1, 0.5],
        "rewind": [False, True],
    },
    limits={"alpha": [0.1, 0.5]},  # as published
    version=2,
    paper="SCRUB; Kurmanji et al., NeurIPS 2023",
    cost="epochs n_R + max_epochs n_F",
    elsewhere="meghdadk/SCRUB, xcadet/deepunlearn",
)
def scrub(
    problem: Problem,
    *,
    epochs: Count = 6,
    max_epochs: Count = 3,
    lr: Positive = 1e-2,
    alpha: NonNegativeFloat = 0.1,
    gamma: NonNegativeFloat = 0.99,
    temperature: Positive = 4.0,
    batch_size: PositiveInt = 64,
    forget_batch_size: PositiveInt = 32,
    rewind: bool = False,
) -> Unlearned:
    """Each of the first `max_epochs` epochs ascends KL(teacher || student) on F; every epoch then descends
    alpha KL(teacher || student) + gamma cross-entropy on R. The teacher is the original.

    SGD with momentum 0.9 and weight decay 5e-4; the rate falls as `DECAYS` says. With `rewind` (SCRUB+R) each model
    goes back to the end of that epoch at which its error on F is nearest to what F's error would be unseen: where the
    paper takes validation points of F's kind at the end of the run, here they are all, weighted as F's classes are.
    """
    y, divergence = problem.y, distillation(torch.from_numpy(problem.original_logits).to(problem.x.device), temperature)

    def ascend(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        return -divergence(logits, indices, models) * temperature**2

    def descend(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        distance = divergence(logits, indices, models) * temperature**2
        return alpha * distance + gamma * cross_entropy(logits, y[indices])

    phases = turns(problem, (epochs, max_epochs), (batch_size, forget_batch_size), ascend, descend)
    sizes = np.cumsum([len(phase.batches) for phase in phases])
    ends = sizes[[i for i, phase in enumerate(phases) if phase.loss is descend]] / sizes[-1]  # of epochs
    optimizer = SGD(lr, weight_decay=5e-4)

    def rate(share: float) -> float:
        epoch = int(np.searchsorted(ends, share, side="right"))
        return lr * DECAY ** sum(epoch >= decay for decay in DECAYS)

    def nearest(logits: np.ndarray) -> np.ndarray:
        """Of logits (n_phases, n_models, n_points, n_classes), the epoch's end to which each model is rewound."""
        right = np.stack([correct(z, problem.labels) for z in logits])
        after = [i for i, phase in enumerate(phases[: len(logits)]) if phase.loss is descend] or [len(logits) - 1]
        aim = right[-1][:, problem.n_train :] @ like_forget(problem)
        return np.array(after)[np.abs(right[after][:, :, problem.forget].mean(2) - aim).argmin(0)]

    if rewind:  # what is on the way is not where a run ends that is stopped there
        problem = dataclasses.replace(problem, checkpoints=min(1, problem.checkpoints))
    return finetune(problem, phases, optimizer, rate, rewind=nearest if rewind else None)


def like_forget(problem: Problem) -> np.ndarray:
    """Weights (n_val,) of validation points that add up to 1 and give each class the share that it has of F."""
    labels, others = problem.labels[problem.forget], problem.labels[problem.n_train :]
    weights = (labels[:, None] == others).mean(0) / np.maximum(1, (others[:, None] == others).sum(0))
    return weights / weights.sum() if weights.any() else np.full(len(others), 1 / len(others))
