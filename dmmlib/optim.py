"""Optimizers as pure arithmetic on stacked parameters, so that a whole training step is one function.

The rules are `torch.optim`'s (tests hold them equal to it). They act element by element, hence one call is
exactly one optimizer a model. Each is there twice: as arithmetic, which torch.compile fuses with the rest of the step
(and, the learning rate being a tensor, one compiled step serves every rate), and as torch's own fused kernel, one pass
over memory instead of ten, for steps that are not compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import adam, sgd

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


def _fusible(params: Tensors) -> bool:
    """Whether torch's fused kernels can take these, which walk through memory in order."""
    return not torch.compiler.is_compiling() and all(p.is_contiguous() for p in params.values())


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
            sgd.sgd(
                list(params.values()),
                [gradients[name].contiguous() for name in params],
                [state["velocity"][name] for name in params],
                fused=True,
                lr=float(rate),
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                nesterov=self.nesterov,
                dampening=0.0,
                maximize=False,
            )
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
            adam.adam(
                list(params.values()),
                [gradients[name].contiguous() for name in params],
                [mean[name] for name in params],
                [square[name] for name in params],
                [],
                [steps[name] for name in params],
                fused=True,
                lr=float(rate),
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.epsilon,
                weight_decay=0.0,
                amsgrad=False,
                maximize=False,
            )
            return
        for name, parameter in params.items():
            gradient, t = gradients[name], steps[name].add_(1).double()
            mean[name].lerp_(gradient, 1 - self.beta1)
            square[name].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            scale = (square[name] / (1 - self.beta2**t)).sqrt() + self.epsilon
            parameter.sub_(rate / (1 - self.beta1**t) * mean[name] / scale)
