"""Optimizers as pure arithmetic on stacked parameters, so that a whole training step is one function.

The rules are `torch.optim`'s (tests hold them equal to it). They act element by element, hence one call is
exactly one optimizer a model; and with the learning rate a tensor, a compiled step serves every rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Optimizer(Protocol):
    """What `ensemble.descend` needs of an optimizer."""

    @property
    def lr(self) -> float:
        """Learning rate where no schedule says otherwise."""
        ...

    def start(self, params: Tensors) -> dict[str, Tensors]:
        """Its memory before the first step."""
        ...

    def update(self, params: Tensors, gradients: Tensors, state: dict[str, Tensors], rate: Tensor) -> None:
        """Move parameters and memory by one step, in place."""
        ...


def counter(params: Tensors) -> dict[str, Tensors]:
    """Memory of how many steps were taken: a tensor, so that a compiled step serves them all."""
    some = next(iter(params.values()))
    return {"steps": {"taken": torch.zeros((), dtype=torch.float64, device=some.device)}}


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
        zeros = {k: torch.zeros_like(v) for k, v in params.items()}
        return {"mean": zeros, "square": {k: v.clone() for k, v in zeros.items()}, **counter(params)}

    def update(self, params: Tensors, gradients: Tensors, state: dict[str, Tensors], rate: Tensor) -> None:
        t = state["steps"]["taken"].add_(1)
        step, scale = rate / (1 - self.beta1**t), (1 - self.beta2**t).sqrt()
        for name, parameter in params.items():
            gradient = gradients[name]
            mean = state["mean"][name].lerp_(gradient, 1 - self.beta1)
            square = state["square"][name].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            parameter.sub_(step * mean / (square.sqrt() / scale + self.epsilon))
