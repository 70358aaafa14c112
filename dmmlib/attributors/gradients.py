"""Gradients of margins with respect to weights: as products, layer by layer, where they are such, and explicit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

from dmmlib import stacking
from dmmlib.attribution import LOADINGS
from dmmlib.ensemble import Ensemble
from dmmlib.optim import Tensors

POINTS = 100  # explicit gradients at a time

Margins = Callable[[Tensors, Tensor, Tensor], Tensor]  # of one model, from its weights, points and labels


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Margins (n_points,) of logits (n_points, n_classes): z_y - logsumexp over c != y of z_c."""
    label = y[..., None] == torch.arange(logits.shape[-1], device=y.device)
    return logits.gather(-1, y[..., None])[..., 0] - logits.masked_fill(label, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies its inputs with a weight of its own, and what one pass over n points shows of it.

    With several places, as in a convolution, the gradient in the weight is the sum of d u^T over them.
    """

    parameters: tuple[str, ...]  # names of the weight and, where it moves, of the bias
    rows: Tensor  # inputs u, with a 1 for the bias (n, places, d_in)
    d: Tensor  # gradients of each point's margin at the outputs (n, places, d_out)

    def products(self) -> Tensor:
        """Gradients of margins (n, d_out, d_in) in the weight and, last, in the bias."""
        return torch.einsum("ipo,ipd->iod", self.d, self.rows)


def observe(
    module: nn.Module,
    params: Tensors,
    margins: Margins,
    x: Tensor,
    y: Tensor,
    kinds: tuple[type[nn.Module], ...],
    only: Collection[str] | None = None,
) -> tuple[Tensor, list[Layer]]:
    """Margins (n,) of points, and layers of some kinds, from one forward and one backward pass.

    Layers are those whose weights' names are among `only`, all by default, that the pass meets once, with all points.
    """
    prefixes = {part: f"{name}." if name else "" for name, part in module.named_modules() if type(part) in kinds}
    parts = {part: k for part, k in prefixes.items() if f"{k}weight" in (params if only is None else only)}
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def keep(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.setdefault(part, []).append((inputs[0].detach().clone(), output))
        return output.clone()  # which what comes next may change in place

    hooks = [part.register_forward_hook(keep) for part in parts]
    try:
        with torch.enable_grad():
            found = margins({k: v.detach().requires_grad_() for k, v in params.items()}, x, y)
            once = [(part, *seen[0]) for part, seen in calls.items() if len(seen) == 1 and seen[0][1].requires_grad]
            gradients = torch.autograd.grad(found.sum(), [z for *_, z in once], materialize_grads=True) if once else ()
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for (part, inputs, _), d in zip(once, gradients, strict=True):
        rows = _unfolded(part, inputs)
        if rows is not None and len(inputs) == len(x):
            names = [name for name in (f"{parts[part]}weight", f"{parts[part]}bias") if name in params]
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if len(names) == 2 else rows
            layers.append(Layer(tuple(names), rows, d[:, None] if d.ndim == 2 else d.flatten(2).mT))
    return found.detach(), layers


def _unfolded(part: nn.Module, inputs: Tensor) -> Tensor | None:
    """Inputs (n, places, d_in) of a layer as its weight multiplies them; None where they are not known to be such."""
    if isinstance(part, nn.Linear) and inputs.ndim == 2:
        return inputs[:, None]
    if isinstance(part, nn.Conv2d) and inputs.ndim == 4 and part.groups == 1 and part.padding_mode == "zeros":
        if part.padding == "same":
            return None
        padding = 0 if part.padding == "valid" else part.padding
        return F.unfold(inputs, part.kernel_size, part.dilation, padding, part.stride).mT  # type: ignore[arg-type]
    return None


def separable(
    module: nn.Module, params: Tensors, margins: Margins, x: Tensor, y: Tensor, *kinds: type[nn.Module]
) -> set[str]:
    """Names of the weights of layers whose `products` are the gradients: found out on two points.

    They are not where a weight is used besides its layer.
    """
    few, found = (params, margins, x[:2], y[:2]), set[str]()
    for layer in observe(module, *few, kinds)[1]:
        true = torch.cat(list(explicit(few[0], layer.parameters, *few[1:])))
        shape = (2, len(layer.d[0, 0]), -1)
        parts = [part.reshape(shape) for part in true.split([params[k].numel() for k in layer.parameters], 1)]
        if stacking.close(layer.products(), torch.cat(parts, -1)):
            found.add(layer.parameters[0])
    return found


def explicit(params: Tensors, names: Sequence[str], margins: Margins, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield gradients (block, n_weights) of points' margins in the weights `names`, a block of points at a time."""
    rest, chosen = {k: v for k, v in params.items() if k not in names}, {k: params[k] for k in names}

    def one(chosen: Tensors, point: Tensor, label: Tensor) -> Tensor:
        return margins(chosen | rest, point[None], label[None])[0]

    n_weights = sum(v.numel() for v in chosen.values())
    block = POINTS if n_weights <= 1_000_000 else max(1, 100_000_000 // n_weights)
    for points, labels in zip(x.split(block), y.split(block), strict=True):
        per_point = stacking.each(grad(one), (None, 0, 0), chosen, points, labels)
        yield torch.cat([per_point[k].reshape(len(points), -1) for k in names], 1)


def margins_of(module: nn.Module, buffers: Tensors) -> Margins:
    """Make the function of weights, points and labels that gives a module's margins (n,)."""
    return lambda params, x, y: margin(stacking.one(module, params, buffers, x.clone())[0], y)


def principal_loadings(models: Ensemble, x: Tensor, y: Tensor, n_components: int) -> np.ndarray:
    """Loadings (n, n_components) of points (n, ...) on the principal components of their gradients of margins.

    To first order a point acts on another's margin by the inner product of their gradients, so that points with large
    loadings act together. Gradients are those in the weights of fully connected layers, where they are products (in
    all weights, where a module has no such layer), averaged as a kernel over models, which is used through its products
    only. Components have length 1 and the sign by which the largest loading in absolute value is positive.
    """
    parts: list[tuple[Tensor, Tensor]] = []  # of gradients d u^T: u (n, d_in) and d (n, d_out)
    n, module = len(x), stacking.copied(models.module).eval()
    for params, buffers in map(models.state_of, range(models.n_models)):
        margins = margins_of(module, buffers)
        known = separable(module, params, margins, x, y, nn.Linear)
        blocks = [
            observe(module, params, margins, *some, (nn.Linear,), known)[1]
            for some in zip(x.split(POINTS), y.split(POINTS), strict=True)
        ]
        for layers in zip(*blocks, strict=True):
            parts.append((torch.cat([z.rows[:, 0] for z in layers]), torch.cat([z.d[:, 0] for z in layers])))
        if not known:
            features = torch.cat(list(explicit(params, list(params), margins, x, y)))
            parts.append((features, torch.ones_like(features[:, :1])))

    def products(v: np.ndarray) -> np.ndarray:
        centred = torch.from_numpy(v.reshape(-1, 1) - v.mean()).to(parts[0][0])
        out = sum((((u @ (u.T @ (centred * d))) * d).sum(1) for u, d in parts), torch.zeros(n, device=x.device))
        return np.asarray((out - out.mean()).cpu() / models.n_models)

    start = np.random.default_rng(0).normal(size=n).astype(np.float32)
    values, loadings = eigsh(LinearOperator((n, n), matvec=products, dtype=np.float32), n_components, v0=start)
    loadings = loadings[:, np.argsort(-values)]
    return loadings * np.sign(np.take_along_axis(loadings, np.abs(loadings).argmax(0)[None], 0))


LOADINGS.add("gradients", principal_loadings)
