"""Coordinates in which the inputs of each layer are white, for baselines and the ablation of DMM to take steps in.

A layer W h becomes V (A^(-1/2) h) with V = W A^(1/2) and A = E[h h^T] + damping E[|h|^2] / d I, the second moment of
its d inputs, or input channels, over points (and places). Gradient descent on V is descent on W preconditioned by
A^(-1): the input's side of K-FAC (Martens and Grosse, ICML 2015), which does most of what K-FAC does (Benzing,
"Gradient descent on neurons", ICML 2022).
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmmlib.ensemble import Ensemble
from dmmlib.optim import Optimizer, Tensors
from dmmlib.unlearn.base import Phase, Problem, Unlearned, finetune

WHITENER = "whitener"
N_SEEN, DAMPING = 500, 0.03  # points of R on which inputs are measured, at most; see `Whitening`


def finetune_in(
    whitened: bool, problem: Problem, phases: Sequence[Phase], optimizer: Optimizer, seen: int = N_SEEN, **options: Any
) -> Unlearned:
    """`finetune`, in whitened coordinates if asked for; these take a forward pass of `seen` points of R, counted whole.

    `options` are those of `finetune`.
    """
    if not whitened:
        return finetune(problem, phases, optimizer, **options)
    points = np.stack([rng.permutation(problem.retain)[:seen] for rng in problem.rngs(2)])
    whitening = Whitening(problem.x, points, DAMPING, problem.originals.module)
    moved = dataclasses.replace(problem, originals=whitening.enter(problem.originals, np.arange(problem.n_models)))
    options = {"only": list(problem.originals.params), "spent": points.shape[1]} | options
    return finetune(moved, phases, optimizer, **options)


@dataclass(frozen=True)
class Whitening:
    """Whitened coordinates of models of one architecture, for `finetune` to take steps in: give it what has entered."""

    x: Tensor  # points (n_points, ...)
    points: np.ndarray  # indices (N, n) of those on which the inputs of each of N models are measured
    damping: float  # relative to the mean eigenvalue of E[h h^T]
    module: nn.Module

    @torch.no_grad()
    def enter(self, models: Ensemble, members: np.ndarray) -> Ensemble:
        """Models that compute the same in these coordinates; `members` are their numbers among the N.

        Parameters keep their names; beside the weight of each linear or convolutional layer stands its `whitener`,
        A^(-1/2) (n_models, d, d), which must not move.
        """
        module, params = copy.deepcopy(models.module), {k: v.clone() for k, v in models.params.items()}
        for name, moments in _input_moments(models, self.x, self.points[members]).items():
            decomposed = torch.linalg.eigh(moments.double())  # in float32 it can fail where the rank is deficient
            values, vectors = (z.to(moments) for z in decomposed)
            mean = values.mean(1, keepdim=True)
            values = values.clamp_min(0) + torch.where(mean > 0, self.damping * mean, 1)  # all inputs 0: leave them
            root, inverse = ((vectors * z[:, None]) @ vectors.mT for z in (values.sqrt(), values.rsqrt()))
            params[f"{name}weight"] = _times(params[f"{name}weight"], root)
            params[f"{name}{WHITENER}"] = inverse
        for layer in _taking_inputs(module).values():
            layer.register_parameter(WHITENER, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))
            layer.register_forward_pre_hook(_whiten)
        return Ensemble(module, params, models.buffers)

    def leave(self, models: Ensemble) -> Ensemble:
        """The same models in coordinates of their own again, W = V A^(-1/2), in which they are faster to evaluate."""
        params = dict(models.params)
        for name in [name for name in params if name.rpartition(".")[2] == WHITENER]:
            weight = name.removesuffix(WHITENER) + "weight"
            params[weight] = _times(params[weight], params.pop(name))
        return Ensemble(copy.deepcopy(self.module), params, models.buffers)  # a module serves one thread at a time


def _times(weight: Tensor, matrix: Tensor) -> Tensor:
    """Multiply weights (n_models, n_out, d, ...) with matrices (n_models, d, d)."""
    return torch.einsum("moi...,mij->moj...", weight, matrix).contiguous()


def _taking_inputs(module: nn.Module) -> dict[str, nn.Module]:
    """Layers that multiply their inputs with a weight (n_out, n_in, ...) of their own, by the prefix of its name."""
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False) if p.requires_grad)
    return {
        f"{name}." if name else "": layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        and getattr(layer, "groups", 1) == 1
        and uses[id(layer.weight)] == 1
    }


def _whiten(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    whitener = getattr(layer, WHITENER).to(inputs[0].dtype)
    if isinstance(layer, nn.Conv2d):
        return ((inputs[0].movedim(-3, -1) @ whitener).movedim(-1, -3),)
    return (inputs[0] @ whitener,)


def _input_moments(models: Ensemble, x: Tensor, points: np.ndarray) -> Tensors:
    """E[h h^T] (n_models, d, d) of the inputs of each layer, by the prefix of its parameters."""
    module, found = copy.deepcopy(models.module).eval(), list[Tensors]()
    prefixes = {layer: prefix for prefix, layer in _taking_inputs(module).items()}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, prefix = inputs[0].float(), prefixes[layer]
        rows = (rows.movedim(1, -1) if isinstance(layer, nn.Conv2d) else rows).flatten(0, -2)
        found[-1][prefix] = rows.T @ rows / len(rows) + found[-1].get(prefix, 0.0)

    for layer in prefixes:
        layer.register_forward_pre_hook(see)
    for i in range(models.n_models):
        found.append({})
        functional_call(module, models.state_of(i), (x[torch.from_numpy(points[i]).to(x.device)],))
    return {prefix: torch.stack([moments[prefix] for moments in found]) for prefix in found[0]}
