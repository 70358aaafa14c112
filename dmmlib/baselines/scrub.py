"""SCRUB: distil from the original on R, away from it on F (Kurmanji et al., NeurIPS 2023)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dmmlib.baselines.gradient import by_epoch
from dmmlib.ensemble import Loss, cross_entropy
from dmmlib.optim import SGD
from dmmlib.unlearn.base import Phase, Problem, Unlearned, finetune, passes, register


def distillation(teacher: Tensor, temperature: float) -> Loss:
    """Mean KL of softened answers from a teacher's, by its logits (n_models, n_points, n_classes)."""

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        student = F.log_softmax(logits / temperature, -1)
        soft = F.log_softmax(teacher[models[:, None], indices] / temperature, -1)
        return F.kl_div(student, soft, reduction="none", log_target=True).sum(-1).mean(1)

    return loss


@register(
    "scrub",
    space={"epochs": [3, 6], "max_epochs": [1, 2, 3], "lr": [1e-3, 3e-3, 1e-2, 3e-2], "alpha": [0.1, 0.5]},
    paper="SCRUB; Kurmanji et al., NeurIPS 2023",
    cost="epochs n_R + max_epochs n_F",
    elsewhere="meghdadk/SCRUB, xcadet/deepunlearn",
)
def scrub(
    problem: Problem,
    *,
    epochs: int = 6,
    max_epochs: int = 3,
    lr: float = 1e-2,
    alpha: float = 0.1,
    gamma: float = 0.99,
    temperature: float = 4.0,
    batch_size: int = 64,
    forget_batch_size: int = 32,
) -> Unlearned:
    """Each of the first `max_epochs` epochs ascends KL(teacher || student) on F; every epoch then descends
    alpha KL(teacher || student) + gamma cross-entropy on R. The teacher is the original.
    """
    y, divergence = problem.y, distillation(torch.from_numpy(problem.original_logits).to(problem.x.device), temperature)

    def ascend(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        return -divergence(logits, indices, models) * temperature**2

    def descend(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        distance = divergence(logits, indices, models) * temperature**2
        return alpha * distance + gamma * cross_entropy(logits, y[indices])

    forget = by_epoch(passes(problem, problem.forget, max_epochs, forget_batch_size), max_epochs)
    retain = by_epoch(passes(problem, problem.retain, epochs, batch_size), epochs)
    phases = []
    for epoch in range(epochs):
        phases += [Phase(forget[epoch], ascend)] if epoch < max_epochs else []
        phases.append(Phase(retain[epoch], descend))
    return finetune(problem, phases, SGD(lr))
