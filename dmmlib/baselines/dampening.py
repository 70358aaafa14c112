"""Selective synaptic dampening: shrink the weights that matter to F more than to S (Foster et al., AAAI 2024)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

from dmmlib import stacking
from dmmlib.ensemble import Ensemble
from dmmlib.optim import Tensors
from dmmlib.unlearn.base import Positive, Problem, Unlearned, register


def importance(problem: Problem, indices: np.ndarray) -> Tensors:
    """Diagonal of each model's empirical Fisher information, name -> (n_models, ...).

    It is the mean over points (indices,) of (d loss / d theta)^2: exact, in evaluation mode, with the true labels.
    """
    models = problem.originals

    def simple(name: str, part: nn.Module) -> bool:
        own = {f"{name}.{weight}".strip("."): weight for weight, _ in part.named_parameters()}
        linear = (
            type(part) is nn.Linear and own.keys() <= models.params.keys() and {*own.values()} <= {"weight", "bias"}
        )
        return type(part) is nn.Sequential or linear or not [*part.children(), *own, *part.buffers()]

    dense = problem.x.ndim == 2 and all(simple(*part) for part in models.module.named_modules(remove_duplicate=False))
    squares = dense_squares if dense else squared_gradients
    size = 100 if dense else max(1, 50_000_000 // sum(p.numel() for p in models.params.values()))
    total = {name: torch.zeros_like(p) for name, p in models.params.items()}
    for part in torch.from_numpy(indices).to(problem.x.device).split(size):
        for name, square in squares(models, problem.x[part], problem.y[part]).items():
            total[name] += square / len(indices)
    return total


def squared_gradients(models: Ensemble, x: Tensor, y: Tensor) -> Tensors:
    """Sum over points of each model's squared gradients: name -> (n_models, ...); writes out every point's gradient."""
    module = stacking.copied(models.module).eval()

    def loss(params: Tensors, buffers: Tensors, point: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(stacking.one(module, params, buffers, point[None].clone())[0], label[None])

    def squares(params: Tensors, buffers: Tensors) -> Tensors:
        gradients = stacking.each(grad(loss), (None, None, 0, 0), params, buffers, x, y)
        return {name: g.square().sum(0) for name, g in gradients.items()}

    return stacking.each(squares, (0, 0), models.params, models.buffers)


def dense_squares(models: Ensemble, x: Tensor, y: Tensor) -> Tensors:
    """`squared_gradients` of linear layers that follow one another on vectors, without writing out any gradient.

    A point's gradient is delta h^T, of that at a layer's output and its input, so squares add up to (delta^2)^T h^2.
    """
    h, seen = x.expand(models.n_models, *x.shape), dict[str, tuple[Tensor, Tensor]]()
    for name, part in models.module.eval().named_modules(remove_duplicate=False):
        if type(part) is nn.Linear:
            prefix = f"{name}." if name else ""
            z = h @ models.params[f"{prefix}weight"].mT
            z = (z + models.params[f"{prefix}bias"][:, None] if part.bias is not None else z).requires_grad_()
            h, seen[prefix] = z, (h.detach(), z)
        elif not list(part.children()):
            h = stacking.each(lambda z, part=part: {"": part(z.clone())}, (0,), h)[""]  # it may change in place
    loss = F.cross_entropy(h.flatten(0, 1), y.repeat(models.n_models), reduction="sum")
    deltas = torch.autograd.grad(loss, [z for _, z in seen.values()])
    squares: Tensors = {}
    for (prefix, (inputs, _)), delta in zip(seen.items(), deltas, strict=True):
        squares[f"{prefix}weight"] = delta.square().mT @ inputs.square()
        if f"{prefix}bias" in models.params:
            squares[f"{prefix}bias"] = delta.square().sum(1)
    return squares


def dampen(params: Tensors, forget: Tensors, everything: Tensors, alpha: float, strength: float) -> Tensors:
    """Weights with importance I_F > alpha I_S, multiplied by min(strength I_S / I_F, 1); the others as they are.

    The paper's selection and dampening, where `strength` is called lambda; I_F (`forget`) and I_S (`everything`) have
    the shapes of the params, name -> (n_models, ...).
    """
    dampened = {}
    for name, p in params.items():
        factor = (strength * everything[name] / forget[name]).clamp(max=1.0)
        dampened[name] = torch.where(forget[name] > alpha * everything[name], p * factor, p)
    return dampened


@register(
    "ssd",
    space={"alpha": [1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0], "strength": [0.01, 0.03, 0.1, 0.3, 1.0, 2.0]},
    limits={"strength": [0.01]},  # selected weights are all but 0
    paper="SSD; Foster et al., AAAI 2024",
    cost="n_F + n_S",
    elsewhere="if-loops/selective-synaptic-dampening, pedroandreou/supreme-unlearning",
)
def ssd(problem: Problem, *, alpha: Positive = 10.0, strength: Positive = 1.0) -> Unlearned:
    """Dampen the weights of which F's importance exceeds alpha times that of all of S; no training.

    The paper defines importance by squares of per-example gradients, and that reading is taken; its authors' code
    squares the mean gradient of each batch, which is smaller by about the batch size. S includes F, as in the code.
    Importance for S could be kept from training and shared by all forget sets; here its cost is counted every time.
    """
    forget, everything = (importance(problem, at) for at in (problem.forget, np.arange(problem.n_train)))
    models = problem.originals
    dampened = Ensemble(models.module, dampen(models.params, forget, everything, alpha, strength), models.buffers)
    cost = (problem.n_train + len(problem.forget)) / problem.retraining
    logits = dampened.logits(problem.x).numpy()
    return Unlearned.from_logits(logits, problem.labels, cost, one_step=True, models=dampened)
