"""One Newton step away from F: the influence of leaving F out, to second order of the loss on R."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmmlib.baselines.gradient import flat, like, mean_gradient
from dmmlib.ensemble import Ensemble
from dmmlib.errors import MethodError
from dmmlib.optim import Tensors
from dmmlib.unlearn.base import Amount, Count, Positive, Problem, Unlearned, register

Product = Callable[[Tensor], Tensor]
"""v (n_models, n_weights) -> A v, with one symmetric positive definite A for each model."""


def conjugate_gradients(product: Product, b: Tensor, iterations: int) -> Tensor:
    """Solve A x = b from x = 0, for each model on its own: (n_models, n_weights)."""
    x, residual = torch.zeros_like(b), b
    direction, size = b, (b * b).sum(1, keepdim=True)
    tiny = torch.finfo(b.dtype).tiny  # a model that is done stays where it is
    for _ in range(iterations):
        image = product(direction)
        step = size / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        x, residual = x + step * direction, residual - step * image
        before, size = size, (residual * residual).sum(1, keepdim=True)
        direction = residual + size / before.clamp(min=tiny) * direction
    return x


@contextmanager
def lacking_derivatives() -> Iterator[None]:
    """Say in one line where torch cannot differentiate a model twice."""
    try:
        yield
    except RuntimeError as error:
        raise MethodError(f"`newton` takes second derivatives, which torch lacks for this model ({error}).") from error


def gauss_newton(models: Ensemble, x: Tensor, damping: float) -> Product:
    """Products with J^T (diag p - p p^T) J, averaged over points, plus damping.

    It is the Hessian of the mean cross-entropy on points x (n_models, n_points, ...), in evaluation mode, without the
    curvature of the logits, so positive semidefinite; for a linear model it is the Hessian. Weight decay belongs in
    the damping.
    """

    def logits(params: Tensors) -> Tensor:
        return Ensemble(models.module, params, models.buffers).forward(x)

    leaves = {k: v.detach().requires_grad_() for k, v in models.params.items()}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others can be differentiated once only
        z = logits(leaves)
    p = z.detach().softmax(-1)

    def pull(u: Tensor, again: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(z, [*leaves.values()], u, True, create_graph=again, materialize_grads=True)

    def push(v: Tensors) -> Tensor:
        try:
            return jvp(logits, (models.params,), (v,))[1]
        except NotImplementedError:  # as of attention and of LSTMs: the derivative of `pull`, which is linear
            with lacking_derivatives():
                u = torch.zeros_like(z, requires_grad=True)
                return torch.autograd.grad(pull(u, again=True), u, [*v.values()])[0]

    def product(v: Tensor) -> Tensor:
        dz = push(like(models.params, v))
        curved = p * (dz - (p * dz).sum(-1, keepdim=True)) / x.shape[1]
        return flat(dict(zip(leaves, pull(curved), strict=True))) + damping * v

    return product


@register(
    "newton",
    space={"damping": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], "iterations": [5, 10, 20], "cost": [0.25]},
    paper="Koh and Liang, ICML 2017; Guo et al., ICML 2020; Izzo et al., AISTATS 2021",
    cost="cost n_R training epochs",
    elsewhere="OPTML-Group/Unlearn-Sparse, xcadet/deepunlearn (both with WoodFisher)",
)
def newton(problem: Problem, *, damping: Positive = 1e-3, iterations: Count = 10, cost: Amount = 0.25) -> Unlearned:
    """theta + (G_R + (w + damping) I)^-1 (sum over F of grad loss + |F| w theta) / |R|, w the weight decay.

    The Newton step of the loss on R from a minimum of that on S, where the gradient on R is what leaving F out left
    over (Guo et al., section 3). The originals are not quite at a minimum; using R's own gradient instead would train
    them on, too. G_R is the Gauss-Newton matrix over *all* weights, and the system is solved by `iterations` conjugate
    gradients: with early stopping and damping the step stays short where the loss is flat. A product with G_R is
    counted as two sample gradients for each point; each model takes as large a random sample of R as the `cost`,
    relative to one retraining, then allows. On a linear model and with all of R the step is exact.
    """
    affordable = round((cost * problem.retraining - len(problem.forget)) / (2 * iterations))
    size = min(max(1, affordable), len(problem.retain))
    sample = np.stack([rng.choice(problem.retain, size, replace=False) for rng in problem.rngs(use=1)])
    models, decay = problem.originals, problem.training.weight_decay
    steps = []
    for first in range(0, problem.n_models, 16):  # a few models at a time, to bound memory
        few = models[first : first + 16]
        force = flat(mean_gradient(problem, few, problem.forget)) + decay * flat(few.params)
        indices = torch.from_numpy(sample[first : first + 16]).to(problem.x.device)
        product = gauss_newton(few, problem.x[indices], decay + damping)
        steps.append(conjugate_gradients(product, force * (len(problem.forget) / len(problem.retain)), iterations))
    step = like(models.params, torch.cat(steps))
    moved = {name: p + step[name] for name, p in models.params.items()}
    spent = (len(problem.forget) + 2 * iterations * size) / problem.retraining
    stepped = Ensemble(models.module, moved, models.buffers)
    logits = stepped.logits(problem.x).numpy()
    return Unlearned.from_logits(logits, problem.labels, spent, one_step=True, models=stepped)
