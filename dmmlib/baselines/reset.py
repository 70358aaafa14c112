"""Spoil some weights, then repair them on R: the two best of a comparison of eighteen methods.

Cadet et al., "Deep Unlearn: Benchmarking Machine Unlearning", arXiv 2410.01276; both come from NeurIPS 2023's
unlearning challenge. SGD with momentum 0.9 and weight decay 5e-4.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from pydantic import PositiveInt

from dmmlib.baselines.fresh import fresh
from dmmlib.baselines.gradient import mean_gradient
from dmmlib.ensemble import Ensemble
from dmmlib.errors import MethodError
from dmmlib.optim import SGD, Tensors
from dmmlib.unlearn.base import Amount, Part, Phase, Positive, Problem, Unlearned, descent, finetune, passes, register

OTHERS = 0.1  # what gradients of weights that MSG keeps are multiplied with


def small_gradients(problem: Problem, share: float) -> Tensors:
    """True for the share of each weight matrix or kernel with the least |gradient of loss on a sample of R - on F|."""
    rng, models = np.random.default_rng([problem.seed, 3]), problem.originals
    sample = rng.choice(problem.retain, min(len(problem.retain), len(problem.forget)), replace=False)
    retain, forget = (mean_gradient(problem, models, points) for points in (sample, problem.forget))
    small = {}
    for name, weight in models.params.items():
        if weight.ndim > 2:
            sizes = (retain[name] - forget[name]).abs().flatten(1)
            least = sizes.topk(round(share * sizes.shape[1]), dim=1, largest=False).indices
            small[name] = torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, least, True).reshape(weight.shape)
    return small


@register(
    "msg",
    space={"epochs": [4.0], "lr": [3e-2, 1e-1, 3e-1], "share": [0.003, 0.01, 0.03, 0.1, 0.3]},
    paper="MSG; Cadet et al., arXiv 2410.01276",
    cost="epochs n_R + 2 n_F",
    elsewhere="xcadet/deepunlearn (kgltop2)",
)
def msg(
    problem: Problem, *, epochs: Amount = 5.0, lr: Positive = 1e-2, share: Part = 0.3, batch_size: PositiveInt = 64
) -> Unlearned:
    """Draw weights with `small_gradients` anew, then descend on R, all other weights' gradients times 0.1.

    The authors mask convolutions only; here linear layers, too, as some models have no others. New weights are drawn
    as the architecture draws them (there: by Kaiming's rule). The rate rises linearly over the first half, then falls.
    """
    small, drawn, models = small_gradients(problem, share), fresh(problem).params, problem.originals
    spoilt = models.params | {k: torch.where(at, drawn[k], models.params[k]) for k, at in small.items()}
    masks = {k: torch.ones_like(v) for k, v in models.params.items()}
    masks |= {k: torch.where(at, 1.0, OTHERS) for k, at in small.items()}
    problem = dataclasses.replace(problem, originals=Ensemble(models.module, spoilt, models.buffers))
    phase = Phase(passes(problem, problem.retain, epochs, batch_size), descent(problem))
    seen = len(problem.forget) + min(len(problem.retain), len(problem.forget))

    def rate(share: float) -> float:
        return lr * min(2 * share, 2 - 2 * share)

    return finetune(problem, [phase], SGD(lr, weight_decay=5e-4), rate, masks=masks, spent=seen)


@register(
    "ct",
    space={"epochs": [4.0], "lr": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]},
    paper="CT; Cadet et al., arXiv 2410.01276",
    cost="epochs n_R",
    elsewhere="xcadet/deepunlearn (kgltop5)",
)
def ct(problem: Problem, *, epochs: Amount = 5.0, lr: Positive = 1e-2, batch_size: PositiveInt = 64) -> Unlearned:
    """Transpose the kernels of convolutions in their two places, then descend on R, at a rate that falls as a cosine.

    Raises MethodError for a model without square kernels of more than one place.
    """
    models = problem.originals
    kernels = {k: v for k, v in models.params.items() if v.ndim == 5 and v.shape[-1] == v.shape[-2] > 1}
    if not kernels:
        raise MethodError("ct transposes the kernels of convolutions, and this model has none; leave ct out.")
    turned = models.params | {k: v.mT.contiguous() for k, v in kernels.items()}
    problem = dataclasses.replace(problem, originals=Ensemble(models.module, turned, models.buffers))
    phase = Phase(passes(problem, problem.retain, epochs, batch_size), descent(problem))
    optimizer = SGD(lr, weight_decay=5e-4)
    return finetune(problem, [phase], optimizer, rate=lambda share: lr * (1 + math.cos(math.pi * share)) / 2)
