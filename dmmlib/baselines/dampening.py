"""Selective synaptic dampening: shrink the weights that matter to F more than to S (Foster et al., AAAI 2024)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from dmmlib.ensemble import Ensemble
from dmmlib.optim import Tensors
from dmmlib.unlearn.base import Problem, Unlearned, check_options, register


def importance(problem: Problem, indices: np.ndarray) -> Tensors:
    """Diagonal of each model's empirical Fisher information: the mean square of per-example gradients.

    Exact, in evaluation mode, with the true labels: name -> (n_models, ...), the mean over points (indices,)
    of (d loss / d theta)^2. Points are taken a few at a time, so that what they need fits in memory.
    """
    models = problem.originals
    owners = [part for part in models.module.modules() if next(part.parameters(recurse=False), None) is not None]
    chained = isinstance(models.module, nn.Linear | nn.Sequential)  # so that each layer is applied once
    dense = chained and problem.x.ndim == 2 and all(type(part) is nn.Linear for part in owners)
    squares = dense_squares if dense else squared_gradients
    n_weights = sum(p.numel() for p in models.params.values())
    size = 100 if dense else max(1, 50_000_000 // n_weights)
    total = {name: torch.zeros_like(p) for name, p in models.params.items()}
    for part in torch.from_numpy(indices).to(problem.x.device).split(size):
        for name, square in squares(models, problem.x[part], problem.y[part]).items():
            total[name] += square / len(indices)
    return total


def squared_gradients(models: Ensemble, x: Tensor, y: Tensor) -> Tensors:
    """Sum over points of each model's squared gradients: name -> (n_models, ...), for any architecture.

    Every point's gradient is written out, so this takes n_points times the memory of the models.
    """
    module = models.module.eval()

    def loss(params: Tensors, buffers: Tensors, point: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, (params, buffers), (point[None],)), label[None])

    def squares(params: Tensors, buffers: Tensors) -> Tensors:
        gradients = torch.vmap(grad(loss), in_dims=(None, None, 0, 0))(params, buffers, x, y)
        return {name: g.square().sum(0) for name, g in gradients.items()}

    return torch.vmap(squares)(models.params, models.buffers)


def dense_squares(models: Ensemble, x: Tensor, y: Tensor) -> Tensors:
    """`squared_gradients` of a model whose only weights are those of linear layers on vectors, without writing
    out any: the gradient of a point is delta h^T, delta the gradient at the layer's output and h its input, so
    that its squares add up to (delta^2)^T h^2.
    """
    module = models.module.eval()
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}

    def logits(params: Tensors, buffers: Tensors, zeros: Tensors) -> tuple[Tensor, Tensors]:
        inputs: Tensors = {}

        def tap(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
                inputs[name] = args[0]
                return output + zeros[name]

            return hook

        handles = [layer.register_forward_hook(tap(name)) for name, layer in layers.items()]
        try:
            return functional_call(module, (params, buffers), (x,)), inputs
        finally:
            for handle in handles:
                handle.remove()

    shape = (models.n_models, len(x))
    zeros = {name: x.new_zeros(*shape, layer.out_features).requires_grad_() for name, layer in layers.items()}
    z, inputs = torch.vmap(logits)(models.params, models.buffers, zeros)
    deltas = torch.autograd.grad(
        F.cross_entropy(z.flatten(0, 1), y.repeat(len(z)), reduction="sum"), list(zeros.values())
    )
    squares: Tensors = {}
    for (name, layer), delta in zip(layers.items(), deltas, strict=True):
        prefix = f"{name}." if name else ""
        squares[f"{prefix}weight"] = delta.square().mT @ inputs[name].detach().square()
        if layer.bias is not None:
            squares[f"{prefix}bias"] = delta.square().sum(1)
    return squares


def dampen(params: Tensors, forget: Tensors, everything: Tensors, alpha: float, strength: float) -> Tensors:
    """Weights with importance I_F > alpha I_S, multiplied by min(strength I_S / I_F, 1); the others as they are.

    The paper's selection and dampening, where `strength` is called lambda.

    Args:
        params: name -> (n_models, ...).
        forget: importance for F, of the same shapes.
        everything: importance for S, of the same shapes.
    """
    return {
        name: torch.where(
            forget[name] > alpha * everything[name],
            p * (strength * everything[name] / forget[name]).clamp(max=1.0),
            p,
        )
        for name, p in params.items()
    }


@register(
    "ssd",
    space={"alpha": [2.0, 5.0, 10.0, 25.0, 50.0], "strength": [0.3, 1.0, 2.0]},
    paper="SSD; Foster et al., AAAI 2024",
    cost="n_F + n_S",
    elsewhere="if-loops/selective-synaptic-dampening, pedroandreou/supreme-unlearning",
)
def ssd(problem: Problem, *, alpha: float = 10.0, strength: float = 1.0) -> Unlearned:
    """Dampen the weights of which F's importance exceeds alpha times that of all of S; no training.

    The paper defines importance by squares of per-example gradients, and that reading is taken; its authors'
    code squares the mean gradient of each batch, which is smaller by about the batch size where gradients
    are unlike each other, for F and S alike. S includes F, as in the code. Importance for S could be kept
    from training and shared by all forget sets; here its cost is counted every time.
    """
    check_options(alpha=alpha, strength=strength)
    everything = importance(problem, np.arange(problem.n_train))
    forget = importance(problem, problem.forget)
    models = problem.originals
    dampened = Ensemble(models.module, dampen(models.params, forget, everything, alpha, strength), models.buffers)
    cost = (problem.n_train + len(problem.forget)) / problem.retraining
    return Unlearned.from_logits(dampened.logits(problem.x).numpy(), problem.labels, cost, one_step=True)
