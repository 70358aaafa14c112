"""Gradient baselines: descent on R, ascent on F, one after the other, and both at once.

SGD with momentum 0.9 at a constant rate, no weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dmmlib.ensemble import Ensemble, cross_entropy
from dmmlib.optim import SGD, Tensors
from dmmlib.unlearn.base import (
    Phase,
    Problem,
    Unlearned,
    check_options,
    descent,
    draw_batches,
    finetune,
    passes,
    register,
)


def by_epoch(batches: Sequence[np.ndarray], epochs: int) -> list[Sequence[np.ndarray]]:
    """The batches of each of so many whole passes."""
    size = len(batches) // epochs
    return [batches[i * size : (i + 1) * size] for i in range(epochs)]


def mean_gradient(problem: Problem, models: Ensemble, indices: np.ndarray) -> Tensors:
    """Gradient of each model's mean cross-entropy on points (indices,), in evaluation mode: name -> (n_models, ...)."""

    def loss(params: Tensors, part: Tensor) -> Tensor:
        x, y = (of[part].expand(models.n_models, *(-1,) * of.ndim) for of in (problem.x, problem.y))
        logits = Ensemble(models.module, params, models.buffers).forward(x)
        return cross_entropy(logits, y).sum() * (len(part) / len(indices))

    parts = torch.from_numpy(indices).to(problem.x.device).split(100)
    gradients = [torch.func.grad(loss)(models.params, part) for part in parts]
    return {name: sum(g[name] for g in gradients) for name in models.params}


def flat(tensors: Tensors) -> Tensor:
    """All weights of each model in one row: (n_models, n_weights)."""
    return torch.cat([t.reshape(len(t), -1) for t in tensors.values()], 1)


def like(params: Tensors, rows: Tensor) -> Tensors:
    """The inverse of `flat`, for tensors of the params' shapes."""
    parts = rows.split([p[0].numel() for p in params.values()], dim=1)
    return {name: part.reshape(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}


EPOCHS = {"ascent_epochs": [1.0, 3.0, 5.0], "descent_epochs": [1.0, 3.0, 5.0]}


@register(
    "gd",
    space={"epochs": [1.0, 3.0, 6.0], "lr": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "batch_size": [64]},
    paper="fine-tuning on R; Warnecke et al., NDSS 2023, Golatkar et al., CVPR 2020",
    cost="epochs n_R",
    elsewhere="OPTML-Group/Unlearn-Sparse, xcadet/deepunlearn",
)
def gd(problem: Problem, *, epochs: float = 3.0, lr: float = 1e-2, batch_size: int = 64) -> Unlearned:
    """Gradient descent on R: train on, without F."""
    phase = Phase(passes(problem, problem.retain, epochs, batch_size), descent(problem))
    return finetune(problem, [phase], SGD(lr))


@register(
    "ga",
    space={"epochs": [1.0, 3.0, 5.0, 10.0], "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "batch_size": [64]},
    paper="NegGrad; Golatkar et al., CVPR 2020, Thudi et al., EuroS&P 2022",
    cost="epochs n_F",
    elsewhere="OPTML-Group/Unlearn-Sparse, xcadet/deepunlearn",
)
def ga(problem: Problem, *, epochs: float = 5.0, lr: float = 1e-3, batch_size: int = 64) -> Unlearned:
    """Gradient ascent on F: raise the loss of what is to be forgotten."""
    phase = Phase(passes(problem, problem.forget, epochs, batch_size), descent(problem, sign=-1.0))
    return finetune(problem, [phase], SGD(lr))


@register(
    "ga_gd",
    space=EPOCHS | {"lr": [3e-4, 1e-3, 3e-3, 1e-2], "batch_size": [64]},
    paper="GA then GD; baseline of Georgiev et al., ICLR 2025",
    cost="ascent_epochs n_F + descent_epochs n_R",
    elsewhere="easydub/EasyDUB-code",
)
def ga_gd(
    problem: Problem, *, ascent_epochs: float = 3.0, descent_epochs: float = 3.0, lr: float = 1e-3, batch_size: int = 64
) -> Unlearned:
    """Gradient ascent on F, then descent on R, with one optimizer."""
    phases = [
        Phase(passes(problem, problem.forget, ascent_epochs, batch_size), descent(problem, sign=-1.0)),
        Phase(passes(problem, problem.retain, descent_epochs, batch_size), descent(problem)),
    ]
    return finetune(problem, phases, SGD(lr))


@register(
    "neggrad_plus",
    space={"epochs": [1.0, 3.0], "lr": [1e-2, 3e-2, 1e-1], "beta": [0.9, 0.95, 0.99]},
    paper="NegGrad+; Kurmanji et al., NeurIPS 2023",
    cost="epochs n_R (1 + min(batch_size, n_F) / batch_size)",
    elsewhere="meghdadk/SCRUB, xcadet/deepunlearn",
)
def neggrad_plus(
    problem: Problem, *, epochs: float = 3.0, lr: float = 1e-2, beta: float = 0.95, batch_size: int = 64
) -> Unlearned:
    """Descent on R and ascent on F in every step: beta L(R) - (1 - beta) L(F).

    The paper writes the two losses over whole sets. The reading taken is its authors' code: a step's batch of R meets a
    batch of F of the same size (all of F if that is smaller), F starting over whenever it has been gone through. So F
    is seen far more often than R, and beta has to be near 1.
    """
    check_options(lr=lr)
    check_options(beta=beta, high=1.0)
    retain = passes(problem, problem.retain, epochs, batch_size)
    n_forget, y = min(batch_size, len(problem.forget)), problem.y
    forget = draw_batches(problem, problem.forget, len(retain), n_forget)

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        labels = y[indices]
        ascent = cross_entropy(logits[:, -n_forget:], labels[:, -n_forget:])
        return beta * cross_entropy(logits[:, :-n_forget], labels[:, :-n_forget]) - (1 - beta) * ascent

    batches = [np.concatenate(both, axis=1) for both in zip(retain, forget, strict=True)]
    return finetune(problem, [Phase(batches, loss)], SGD(lr))
