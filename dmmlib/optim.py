"""Optimizers as pure arithmetic on stacked parameters, so that a whole training step is one function.

The rules are `torch.optim`'s (tests hold them equal to it). They act element by element, so one call takes one step of
every model's own optimizer. Each is there twice: as arithmetic, which torch.compile fuses with the rest of the step
(the learning rate is a tensor, so one compiled step serves every rate), and as torch's own fused kernel, which passes
over memory once instead of ten times, for steps that are not compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import adam, sgd

Tensors = dict[str, Tensor]

_fused_sgd: Callable[..., None] = partial(sgd.sgd, fused=True, dampening=0.0, maximize=False)
_fused_adam: Callable[..., None] = partial(adam.adam, fused=True, weight_decay=0.0, amsgrad=False, maximize=False)


class Optimizer(Protocol):
    """What `ensemble.descend` needs: a default rate, a memory to start with, and a step that moves all in place."""

    @property
    def lr(self) -> float: ...

    def start(self, params: Tensors) -> dict[str, Tensors]: ...

    def update(self, params: Tensors, gradients: Tensors, state: dict[str, Tensors], rate: Tensor) -> None: ...


def _fusible(params: Tensors) -> bool:
    """Whether torch's fused kernels can take these, which walk through memory in order."""
    return not torch.compiler.is_compiling() and all(p.is_contiguous() for p in params.values())


def _lists(params: Tensors, *others: Tensors) -> list[list[Tensor]]:
    """Parameters, and what belongs to them, as the lists that torch's kernels take."""
    return [[tensors[name].contiguous() for name in params] for tensors in (params, *others)]


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with (Nesterov) momentum and L2 weight decay."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False

    def start(self, params: Tensors) -> dict[str, Tensors]:
        return {"velocity": {k: torch.zeros_like(v) for k, v in params.items()}}

    def update(self, params: Tensors, gradients: Tensors, state: dict[str, Tensors], rate: Tensor) -> None:
        if _fusible(params):
            options = {"momentum": self.momentum, "weight_decay": self.weight_decay}
            lists = _lists(params, gradients, state["velocity"])
            _fused_sgd(*lists, lr=float(rate), nesterov=self.nesterov, **options)
            return
        for name, parameter in params.items():
            gradient = gradients[name] + self.weight_decay * parameter
            velocity = state["velocity"][name].mul_(self.momentum).add_(gradient)
            parameter.sub_(rate * (gradient + self.momentum * velocity if self.nesterov else velocity))


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, ICLR 2015), without weight decay."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def start(self, params: Tensors) -> dict[str, Tensors]:
        moments = {moment: {k: torch.zeros_like(v) for k, v in params.items()} for moment in ("mean", "square")}
        return moments | {"steps": {k: torch.zeros((), device=v.device) for k, v in params.items()}}

    def update(self, params: Tensors, gradients: Tensors, state: dict[str, Tensors], rate: Tensor) -> None:
        mean, square, steps = state["mean"], state["square"], state["steps"]
        if _fusible(params):
            values, slopes, means, squares, counts = _lists(params, gradients, mean, square, steps)
            options = {"lr": float(rate), "beta1": self.beta1, "beta2": self.beta2, "eps": self.epsilon}
            _fused_adam(values, slopes, means, squares, [], counts, **options)
            return
        for name, parameter in params.items():
            gradient, t = gradients[name], steps[name].add_(1).double()
            mean[name].lerp_(gradient, 1 - self.beta1)
            square[name].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            scale = (square[name] / (1 - self.beta2**t)).sqrt() + self.epsilon
            parameter.sub_(rate / (1 - self.beta1**t) * mean[name] / scale)
