"""Gradient baselines: descent on R, ascent on F, one after the other, by turns, and both at once.

SGD with momentum 0.9 at a constant rate, no weight decay; if `whitened`, in coordinates in which the inputs of each
layer are white, as Gauss-Newton matching steps in, so that a comparison with it is of targets, not of optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from dmmlib import stacking
from dmmlib.baselines.whitening import finetune_in
from dmmlib.ensemble import Ensemble, Loss, cross_entropy
from dmmlib.optim import SGD, Tensors
from dmmlib.unlearn.base import (
    Amount,
    Count,
    Part,
    Phase,
    Positive,
    Problem,
    Unlearned,
    descent,
    draw_batches,
    passes,
    register,
)


def by_epoch(batches: Sequence[np.ndarray], epochs: int) -> list[Sequence[np.ndarray]]:
    """The batches of each of so many whole passes."""
    size = len(batches) // epochs
    return [batches[i * size : (i + 1) * size] for i in range(epochs)]


def mean_gradient(problem: Problem, models: Ensemble, indices: np.ndarray) -> Tensors:
    """Gradient of each model's mean cross-entropy on points (indices,), in evaluation mode: name -> (n_models, ...)."""

    def loss(part: Tensor, params: Tensors) -> tuple[Tensor, None]:
        x, y = (of[part].expand(models.n_models, *(-1,) * of.ndim) for of in (problem.x, problem.y))
        logits = Ensemble(models.module, params, models.buffers).forward(x)
        return cross_entropy(logits, y).sum() * (len(part) / len(indices)), None

    parts = torch.from_numpy(indices).to(problem.x.device).split(100)
    gradients = [stacking.gradient(partial(loss, part), models.params)[0] for part in parts]
    return {name: sum((g[name] for g in gradients[1:]), gradients[0][name]) for name in models.params}


def flat(tensors: Tensors) -> Tensor:
    """All weights of each model in one row: (n_models, n_weights)."""
    return torch.cat([t.reshape(len(t), -1) for t in tensors.values()], 1)


def like(params: Tensors, rows: Tensor) -> Tensors:
    """The inverse of `flat`, for tensors of the params' shapes."""
    parts = rows.split([p[0].numel() for p in params.values()], dim=1)
    return {name: part.reshape(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}


EITHER = [False, True]


@register(
    "gd",
    space={"epochs": [4.0], "lr": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "whitened": EITHER},
    paper="fine-tuning on R; Warnecke et al., NDSS 2023, Golatkar et al., CVPR 2020",
    cost="epochs n_R",
    elsewhere="OPTML-Group/Unlearn-Sparse, xcadet/deepunlearn",
)
def gd(
    problem: Problem, *, epochs: Amount = 3.0, lr: Positive = 1e-2, batch_size: PositiveInt = 64, whitened: bool = False
) -> Unlearned:
    """Gradient descent on R: train on, without F."""
    phase = Phase(passes(problem, problem.retain, epochs, batch_size), descent(problem))
    return finetune_in(whitened, problem, [phase], SGD(lr))


@register(
    "ga",
    space={"epochs": [10.0], "lr": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], "whitened": EITHER},
    paper="NegGrad; Golatkar et al., CVPR 2020, Thudi et al., EuroS&P 2022",
    cost="epochs n_F",
    elsewhere="OPTML-Group/Unlearn-Sparse, xcadet/deepunlearn",
)
def ga(
    problem: Problem, *, epochs: Amount = 5.0, lr: Positive = 1e-3, batch_size: PositiveInt = 64, whitened: bool = False
) -> Unlearned:
    """Gradient ascent on F: raise the loss of what is to be forgotten.

    It fails where F and R depend on each other (Mavrothalassitis et al., "Ascent Fails to Forget", NeurIPS 2025).
    """
    phase = Phase(passes(problem, problem.forget, epochs, batch_size), descent(problem, sign=-1.0))
    return finetune_in(whitened, problem, [phase], SGD(lr))


@register(
    "ga_gd",
    space={
        "ascent_epochs": [1.0, 3.0, 10.0, 30.0],
        "descent_epochs": [4.0],
        "lr": [3e-3, 1e-2, 3e-2, 1e-1],
        "whitened": EITHER,
    },
    paper="GA then GD; baseline of Georgiev et al., ICLR 2025",
    cost="ascent_epochs n_F + descent_epochs n_R",
    elsewhere="easydub/EasyDUB-code",
)
def ga_gd(
    problem: Problem,
    *,
    ascent_epochs: Amount = 3.0,
    descent_epochs: Amount = 3.0,
    lr: Positive = 1e-3,
    batch_size: PositiveInt = 64,
    whitened: bool = False,
) -> Unlearned:
    """Gradient ascent on F, then descent on R, with one optimizer."""
    phases = [
        Phase(passes(problem, problem.forget, ascent_epochs, batch_size), descent(problem, sign=-1.0)),
        Phase(passes(problem, problem.retain, descent_epochs, batch_size), descent(problem)),
    ]
    return finetune_in(whitened, problem, phases, SGD(lr))


@register(
    "ga_gd_turns",
    space={"epochs": [4], "ascent_epochs": [1, 2, 4], "lr": [3e-3, 1e-2, 3e-2, 1e-1], "whitened": EITHER},
    limits={"ascent_epochs": [1, 4]},
    paper="GA and GD by turns; public benchmark of Georgiev et al., ICLR 2025",
    cost="ascent_epochs n_F + epochs n_R",
    elsewhere="RoyRin/data-unlearning-bench",
)
def ga_gd_turns(
    problem: Problem,
    *,
    epochs: Count = 4,
    ascent_epochs: Count = 3,
    lr: Positive = 1e-3,
    batch_size: PositiveInt = 64,
    forget_batch_size: PositiveInt = 64,
    whitened: bool = False,
) -> Unlearned:
    """Each of the first `ascent_epochs` epochs ascends on F; every epoch then descends on R: `ascent_descent` there."""
    phases = turns(
        problem, (epochs, ascent_epochs), (batch_size, forget_batch_size), descent(problem, -1.0), descent(problem)
    )
    return finetune_in(whitened, problem, phases, SGD(lr))


def turns(
    problem: Problem, epochs: tuple[int, int], batch_sizes: tuple[int, int], ascend: Loss, descend: Loss
) -> list[Phase]:
    """Epochs on R, before each of the first of which comes one on F; of numbers and batch sizes that of R is first."""
    pools = zip((problem.retain, problem.forget), epochs, batch_sizes, strict=True)
    retain, forget = (by_epoch(passes(problem, pool, n, size), n) for pool, n, size in pools)
    phases = list[Phase]()
    for epoch in range(epochs[0]):
        phases += [Phase(forget[epoch], ascend)] if epoch < epochs[1] else []
        phases.append(Phase(retain[epoch], descend))
    return phases


@register(
    "neggrad_plus",
    space={"epochs": [3.0], "lr": [3e-3, 1e-2, 3e-2], "beta": [0.8, 0.9, 0.95, 0.99], "whitened": EITHER},
    paper="NegGrad+; Kurmanji et al., NeurIPS 2023",
    cost="epochs n_R (1 + min(batch_size, n_F) / batch_size)",
    elsewhere="meghdadk/SCRUB, xcadet/deepunlearn",
)
def neggrad_plus(
    problem: Problem,
    *,
    epochs: Amount = 3.0,
    lr: Positive = 1e-2,
    beta: Part = 0.95,
    batch_size: PositiveInt = 64,
    whitened: bool = False,
) -> Unlearned:
    """Descent on R and ascent on F in every step: beta L(R) - (1 - beta) L(F).

    The paper writes the two losses over whole sets. The reading taken is its authors' code: a step's batch of R meets a
    batch of F of the same size (all of F if that is smaller), F starting over whenever it has been gone through. So F
    is seen far more often than R, and beta has to be near 1.
    """
    retain = passes(problem, problem.retain, epochs, batch_size)
    n_forget, y = min(batch_size, len(problem.forget)), problem.y
    forget = draw_batches(problem, problem.forget, len(retain), n_forget)

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        labels = y[indices]
        ascent = cross_entropy(logits[:, -n_forget:], labels[:, -n_forget:])
        return beta * cross_entropy(logits[:, :-n_forget], labels[:, :-n_forget]) - (1 - beta) * ascent

    batches = [np.concatenate(both, axis=1) for both in zip(retain, forget, strict=True)]
    return finetune_in(whitened, problem, [Phase(batches, loss)], SGD(lr))
