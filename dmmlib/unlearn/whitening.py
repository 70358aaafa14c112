"""Models in coordinates in which what enters a layer is white; matching takes its steps there."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmmlib.ensemble import Ensemble
from dmmlib.optim import Tensors

WHITENER = "whitener"


@torch.no_grad()
def whitened(models: Ensemble, x: Tensor, points: np.ndarray, damping: float) -> Ensemble:
    """The same functions in other coordinates: what enters a linear or convolutional layer is made white first.

    A layer W h becomes V (A^(-1/2) h) with V = W A^(1/2) and A = E[h h^T] + damping E[|h|^2] / d I, the second moment
    of its d inputs, or input channels, over points (and places). Gradient descent on V is descent on W
    preconditioned by A^(-1): the input's side of K-FAC (Martens and Grosse, ICML 2015), which does most of what K-FAC
    does (Benzing, "Gradient descent on neurons", ICML 2022).

    Args:
        models: whose layers; they are left as they are.
        x: points (n_points, ...).
        points: which of them each model's layers are measured on (n_models, n).
        damping: relative to the mean eigenvalue.

    Returns:
        Models with the same names of parameters, and beside a layer's weight its frozen `whitener`, A^(-1/2)
        (n_models, d, d), which must not move.
    """
    module, params = copy.deepcopy(models.module), {k: v.clone() for k, v in models.params.items()}
    for name, moments in _input_moments(models, x, points).items():
        values, vectors = torch.linalg.eigh(moments)
        values = values.clamp_min(0) + damping * values.mean(1, keepdim=True)
        weight = f"{name}.weight" if name else "weight"
        root = (vectors * values.sqrt()[:, None]) @ vectors.mT
        params[weight] = torch.einsum("moi...,mij->moj...", params[weight], root).contiguous()
        params[f"{name}.{WHITENER}" if name else WHITENER] = (vectors * values.rsqrt()[:, None]) @ vectors.mT
    for _, layer in _taking_inputs(module):
        layer.register_parameter(WHITENER, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))
        layer.register_forward_pre_hook(_whiten)
    return Ensemble(module, params, models.buffers)


def unwhitened(models: Ensemble, module: nn.Module) -> Ensemble:
    """Models of the architecture that `whitened` was given, W = V A^(-1/2): the same functions, faster to evaluate."""
    params = dict(models.params)
    for name in [name for name in params if name.rpartition(".")[2] == WHITENER]:
        weight = name.removesuffix(WHITENER) + "weight"
        params[weight] = torch.einsum("moi...,mij->moj...", params[weight], params.pop(name)).contiguous()
    return Ensemble(copy.deepcopy(module), params, models.buffers)  # a module serves one thread at a time


def _taking_inputs(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and layers that multiply what enters them with a weight (n_out, n_in, ...)."""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        (k, part) for k, part in module.named_modules() if isinstance(part, kinds) and getattr(part, "groups", 1) == 1
    ]


def _whiten(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    whitener = getattr(layer, WHITENER).to(inputs[0].dtype)
    if isinstance(layer, nn.Conv2d):
        return ((inputs[0].movedim(-3, -1) @ whitener).movedim(-1, -3),)
    return (inputs[0] @ whitener,)


def _input_moments(models: Ensemble, x: Tensor, points: np.ndarray) -> Tensors:
    """E[h h^T] of what enters each linear and convolutional layer: its name -> (n_models, d, d)."""
    module, found = copy.deepcopy(models.module).eval(), list[Tensors]()

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, name = inputs[0].float(), names[layer]
        rows = (rows.movedim(1, -1) if isinstance(layer, nn.Conv2d) else rows).flatten(0, -2)
        found[-1][name] = rows.T @ rows / len(rows) + found[-1].get(name, 0.0)

    names = {layer: name for name, layer in _taking_inputs(module)}
    for layer in names:
        layer.register_forward_pre_hook(see)
    for i in range(models.n_models):
        found.append({})
        functional_call(module, models.state_of(i), (x[torch.from_numpy(points[i]).to(x.device)],))
    return {name: torch.stack([moments[name] for moments in found]) for name in found[0]}


@dataclass(frozen=True)
class Whitening:
    """Whitened coordinates to fine-tune in; see `unlearn.finetune`.

    Attributes:
        x: points (n_points, ...).
        points: which of them each model's layers are measured on (n_models, n).
        damping: of `whitened`.
        module: the models' architecture.
    """

    x: Tensor
    points: np.ndarray
    damping: float
    module: nn.Module

    def enter(self, models: Ensemble, members: np.ndarray) -> Ensemble:
        """The models in these coordinates; `members` are their numbers."""
        return whitened(models, self.x, self.points[members], self.damping)

    def leave(self, models: Ensemble) -> Ensemble:
        """The models in coordinates of their own again."""
        return unwhitened(models, self.module)
