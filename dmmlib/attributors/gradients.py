"""Gradients of margins with respect to weights: as products, layer by layer, where they are such, and explicit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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

POINTS = 100  # whose gradients are taken at a time; on a GPU five times as many
FLOATS = 100_000_000  # numbers in one block of gradients, about

Margins = Callable[[Tensors, Tensor, Tensor], Tensor]  # of one model, from its weights, points and labels
Score = Callable[[Tensor, Tensor], Tensor]  # of logits (n, n_classes) and labels, one number (n,) for each point


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Margins (n_points,) of logits (n_points, n_classes): z_y - logsumexp over c != y of z_c."""
    label = y[..., None] == torch.arange(logits.shape[-1], device=y.device)
    return logits.gather(-1, y[..., None])[..., 0] - logits.masked_fill(label, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies its inputs with a weight of its own, and what one pass over n points shows of it.

    With several places, as in a convolution, the gradient in the weight is the sum of d u^T over them.
    """

    part: nn.Module
    parameters: tuple[str, ...]  # names of the weight and, where it moves, of the bias
    inputs: Tensor  # as the layer takes them (n, ...)
    d: Tensor  # gradients of each point's margin at the outputs (n, places, d_out)

    @property
    def rows(self) -> Tensor:
        """Inputs u, with a 1 for the bias (n, places, d_in); made anew, as a 3 x 3 filter's are nine times `inputs`."""
        rows = _unfolded(self.part, self.inputs)
        return torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if len(self.parameters) == 2 else rows

    def blocks(self) -> Iterator[Tensor]:
        """Yield gradients of margins (n, block, d_in) in the weight and, last, in the bias, for some outputs a time."""
        rows = self.rows
        for d in self.d.split(max(1, FLOATS // (len(rows) * rows.shape[2])), 2):
            yield torch.einsum("ipo,ipd->iod", d, rows)

    def products(self) -> Tensor:
        """The same for all outputs (n, d_out, d_in)."""
        return torch.cat(list(self.blocks()), 1)


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
        if _multiplies(part, inputs) and len(inputs) == len(x):
            names = tuple(name for name in (f"{parts[part]}weight", f"{parts[part]}bias") if name in params)
            layers.append(Layer(part, names, inputs, d[:, None] if d.ndim == 2 else d.flatten(2).mT))
    return found.detach(), layers


def _multiplies(part: nn.Module, inputs: Tensor) -> bool:
    """Whether `_unfolded` knows what a layer's weight multiplies."""
    if isinstance(part, nn.Linear):
        return inputs.ndim == 2
    plain = isinstance(part, nn.Conv2d) and part.groups == 1 and part.padding_mode == "zeros" and part.padding != "same"
    return plain and inputs.ndim == 4


def _unfolded(part: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs (n, places, d_in) of a layer as its weight multiplies them."""
    if not isinstance(part, nn.Conv2d):
        return inputs[:, None]
    padding: Any = 0 if part.padding == "valid" else part.padding
    return F.unfold(inputs, part.kernel_size, part.dilation, padding, part.stride).mT


def separable(
    module: nn.Module, params: Tensors, margins: Margins, x: Tensor, y: Tensor, *kinds: type[nn.Module]
) -> set[str]:
    """Names of the weights of layers whose `products` are the gradients: found out on two points.

    They are not where a weight is used besides its layer.
    """

    def margin_of(point: Tensor, label: Tensor, own: Tensors) -> tuple[Tensor, None]:
        return margins(params | own, point, label)[0], None

    found = set[str]()
    for layer in observe(module, params, margins, x[:2], y[:2], kinds)[1]:
        own, true = {k: params[k] for k in layer.parameters}, list[Tensor]()
        for point in zip(x[:2].split(1), y[:2].split(1), strict=True):
            slopes = stacking.gradient(partial(margin_of, *point), own)[0]
            true.append(torch.cat([slopes[k].reshape(len(layer.d[0, 0]), -1) for k in own], -1))
        if stacking.alike(layer.products(), torch.stack(true)):
            found.add(layer.parameters[0])
    return found


def explicit(params: Tensors, names: Sequence[str], margins: Margins, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield gradients (block, n_weights) of points' margins in the weights `names`, a block of points at a time."""
    rest, chosen = {k: v for k, v in params.items() if k not in names}, {k: params[k] for k in names}

    def one(chosen: Tensors, point: Tensor, label: Tensor) -> Tensor:
        return margins(chosen | rest, point[None], label[None])[0]

    n_weights = sum(v.numel() for v in chosen.values())
    block = max(1, min(POINTS * (5 if x.is_cuda else 1), FLOATS // max(1, n_weights)))
    for points, labels in zip(x.split(block), y.split(block), strict=True):
        per_point = stacking.each(grad(one), (None, 0, 0), chosen, points, labels)
        yield torch.cat([per_point[k].reshape(len(points), -1) for k in names], 1)


def scores_of(module: nn.Module, buffers: Tensors, score: Score) -> Margins:
    """Make the function of weights, points and labels that gives a score (n,) of a module's logits."""
    return lambda params, x, y: score(stacking.one(module, params, buffers, x.clone())[0], y)


def margins_of(module: nn.Module, buffers: Tensors) -> Margins:
    """Make the function of weights, points and labels that gives a module's margins (n,)."""
    return scores_of(module, buffers, margin)


def principal_loadings(models: Ensemble, x: Tensor, y: Tensor, hardness: np.ndarray, n_components: int) -> np.ndarray:
    """Loadings (n, n_components) of points (n, ...) on the principal components of their gradients of margins.

    To first order a point acts on another's margin by the inner product of their gradients, and the more the harder it
    is. So gradients are weighted by the roots of `hardness` (n,), and points with large loadings act together and have
    something to be forgotten; unweighted, they are easy ones for which others stand in. Gradients are those in the
    weights of fully connected layers, where they are products (in all weights, where a module has no such layer),
    averaged as a kernel over models, which is used through its products only. Components have length 1 and the sign by
    which the largest loading in absolute value is positive.
    """
    parts: list[tuple[Tensor, Tensor]] = []  # of gradients d u^T: u (n, d_in) and d (n, d_out)
    n, module = len(x), stacking.copied(models.module).eval()
    weights = torch.from_numpy(np.sqrt(hardness).astype(np.float32))[:, None].to(x.device)
    for params, buffers in map(models.state_of, range(models.n_models)):
        margins = margins_of(module, buffers)
        known = separable(module, params, margins, x, y, nn.Linear)
        blocks = [
            observe(module, params, margins, *some, (nn.Linear,), known)[1]
            for some in zip(x.split(POINTS), y.split(POINTS), strict=True)
        ]
        for layers in zip(*blocks, strict=True):
            parts.append((torch.cat([z.rows[:, 0] for z in layers]), weights * torch.cat([z.d[:, 0] for z in layers])))
        if not known:
            features = torch.cat(list(explicit(params, list(params), margins, x, y)))
            parts.append((weights * features, torch.ones_like(features[:, :1])))

    def products(v: np.ndarray) -> np.ndarray:
        centred = torch.from_numpy(v.reshape(-1, 1) - v.mean()).to(parts[0][0])
        out = sum((((u @ (u.T @ (centred * d))) * d).sum(1) for u, d in parts), torch.zeros(n, device=x.device))
        return np.asarray((out - out.mean()).cpu() / models.n_models)

    start = np.random.default_rng(0).normal(size=n).astype(np.float32)
    values, loadings = eigsh(LinearOperator((n, n), matvec=products, dtype=np.float32), n_components, v0=start)
    loadings = loadings[:, np.argsort(-values)]
    return loadings * np.sign(np.take_along_axis(loadings, np.abs(loadings).argmax(0)[None], 0))


LOADINGS.add("gradients", principal_loadings, version=2)
