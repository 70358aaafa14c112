"""Fine-tuning towards sparse weights (Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveInt
from torch import Tensor

from dmmlib.optim import SGD, Tensors
from dmmlib.unlearn.base import Amount, Phase, Positive, Problem, Unlearned, descent, finetune, passes, register


@register(
    "l1_sparse",
    space={"epochs": [4.0], "lr": [3e-3, 1e-2, 3e-2, 1e-1], "gamma": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]},
    limits={"gamma": [3e-5]},  # below, it is GD
    paper="l1-sparse MU; Jia et al., NeurIPS 2023",
    cost="epochs n_R",
    elsewhere="OPTML-Group/Unlearn-Sparse, OPTML-Group/Unlearn-Saliency",
)
def l1_sparse(
    problem: Problem, *, epochs: Amount = 3.0, lr: Positive = 1e-2, gamma: Positive = 1e-4, batch_size: PositiveInt = 64
) -> Unlearned:
    """Descend cross-entropy on R + gamma_t |theta|_1, over all parameters, biases and norms included.

    The paper tries a constant, a growing and a falling gamma_t and recommends the last; the reading taken is a linear
    fall to 0 over all steps (its authors' code lowers it epoch by epoch, and can end with epochs without penalty). The
    subgradient is gamma_t sign(theta), as there.
    """
    batches = passes(problem, problem.retain, epochs, batch_size)
    return finetune(problem, [Phase(batches, descent(problem))], SparseSGD(lr, gamma=gamma, n_steps=len(batches)))


@dataclass(frozen=True)
class SparseSGD(SGD):
    """SGD on the loss plus gamma |theta|_1, with a gamma that falls linearly to 0 over `n_steps` steps."""

    gamma: float = 0.0
    n_steps: int = 1

    def start(self, params: Tensors) -> dict[str, Tensors]:
        device = next(iter(params.values())).device
        return super().start(params) | {"steps": {"taken": torch.zeros((), device=device)}}  # compiled once for all

    def update(self, params: Tensors, gradients: Tensors, state: dict[str, Tensors], rate: Tensor) -> None:
        weight = self.gamma * (1 - state["steps"]["taken"] / self.n_steps)
        state["steps"]["taken"] += 1
        super().update(params, {k: g + weight * params[k].sign() for k, g in gradients.items()}, state, rate)
