"""Gradients of margins with respect to weights, and their inner products.

The kernel K = Phi Phi^T, with phi_i the gradient of the margin of point i, takes no random projection (as in TRAK, Park
et al., ICML 2023) wherever a layer is linear on vectors: the gradient of one is an outer product of its input a and the
gradient d at its output, so it adds (a_i.a_j + 1)(d_i.d_j). All other weights take explicit gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dmmlib.ensemble import Ensemble
from dmmlib.optim import Tensors

POINTS = 100  # explicit gradients at a time
FEATURES = 20_000  # weights with explicit gradients, beyond which these are projected

Margins = Callable[[Tensors, Tensor, Tensor], Tensor]  # of one model, from its weights, points and labels


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Margins (n_points,) of logits (n_points, n_classes): z_y - logsumexp over c != y of z_c."""
    label = y[..., None] == torch.arange(logits.shape[-1], device=y.device)
    return logits.gather(-1, y[..., None])[..., 0] - logits.masked_fill(label, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies its inputs with a weight of its own, and what one pass shows of it."""

    module: nn.Module
    weight: str  # the parameter's name
    shape: torch.Size  # of the weight
    bias: str | None  # likewise a name; None where there is none, or it does not move
    inputs: Tensor  # (n, ...)
    gradients: Tensor  # of each point's margin at its outputs (n, ...)

    @property
    def parameters(self) -> list[str]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def observe(
    module: nn.Module, params: Tensors, margins: Margins, x: Tensor, y: Tensor, *kinds: type[nn.Module]
) -> tuple[Tensor, list[Layer]]:
    """Margins (n,) of points, and layers of some kinds, from one forward and one backward pass.

    Only layers that the forward pass meets once, and whose parameters no other part shares.
    """
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    prefixes = {part: f"{name}." if name else "" for name, part in module.named_modules() if type(part) in kinds}
    alone = {part: k for part, k in prefixes.items() if all(uses[id(p)] == 1 for p in part.parameters())}
    alone = {part: k for part, k in alone.items() if f"{k}weight" in params}
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def keep(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.setdefault(part, []).append((inputs[0].detach(), output))
        return output.clone()  # which what follows may change in place

    hooks = [part.register_forward_hook(keep) for part in alone]
    try:
        with torch.enable_grad():
            found = margins({k: v.detach().requires_grad_() for k, v in params.items()}, x, y)
            once = {part: seen[0] for part, seen in calls.items() if len(seen) == 1}
            gradients = torch.autograd.grad(found.sum(), [output for _, output in once.values()]) if once else ()
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for (part, (inputs, _)), gradient in zip(once.items(), gradients, strict=True):
        weight, bias = (f"{alone[part]}{k}" for k in ("weight", "bias"))
        known = (weight, params[weight].shape, bias if bias in params else None)
        layers.append(Layer(part, *known, inputs, gradient))
    return found.detach(), layers


def explicit(params: Tensors, names: Sequence[str], margins: Margins, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield gradients (block, n_weights) of points' margins in the weights `names`, a block of points at a time."""
    rest, chosen = {k: v for k, v in params.items() if k not in names}, {k: params[k] for k in names}

    def one(chosen: Tensors, point: Tensor, label: Tensor) -> Tensor:
        return margins(chosen | rest, point[None], label[None])[0]

    per_point = vmap(grad(one), in_dims=(None, 0, 0))
    n_weights = sum(v.numel() for v in chosen.values())
    block = POINTS if n_weights <= 1_000_000 else max(1, 100_000_000 // n_weights)
    for points, labels in zip(x.split(block), y.split(block), strict=True):
        yield torch.cat([g.flatten(1) for g in per_point(chosen, points, labels).values()], 1)


def margins_of(module: nn.Module, buffers: Tensors) -> Margins:
    """Make the function of weights, points and labels that gives a module's margins (n,)."""
    return lambda params, x, y: margin(functional_call(module, (params, buffers), (x,)), y)


def _project(gradients: Tensor, seed: int, n_features: int = 4096, block: int = 10_000) -> Tensor:
    """Project on random signs (n, n_features), drawn a block at a time; inner products are kept in expectation."""
    generator = torch.Generator(gradients.device).manual_seed(seed)
    total = gradients.new_zeros(len(gradients), n_features)
    for part in gradients.split(block, 1):
        signs = torch.randint(0, 2, (part.shape[1], n_features), generator=generator, device=part.device)
        total += part @ (2.0 * signs - 1.0)
    return total / n_features**0.5


@torch.no_grad()
def gram(models: Ensemble, i: int, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """K (n, n): inner products of gradients of the margins of points (n, ...) in the weights of model i.

    Args:
        models: an ensemble; evaluated as at test time (batch norm with its running statistics).
        i: which of its models.
        x, y: points and their labels (n,).
        seed: of the random projection of gradients that are not outer products, where they are more than 20,000.
    """
    module, (params, buffers) = models.module.eval(), models.state_of(i)
    margins, k, covered = margins_of(module, buffers), x.new_zeros(len(x), len(x)), set[str]()
    for layer in observe(module, params, margins, x, y, nn.Linear)[1]:
        a, d = layer.inputs, layer.gradients
        if a.ndim == 2:
            covered |= set(layer.parameters)
            k += (a @ a.T + float(layer.bias is not None)) * (d @ d.T)
    others = [name for name in params if name not in covered]
    if others:
        blocks = explicit(params, others, margins, x, y)
        features = torch.cat([_project(z, seed) if z.shape[1] > FEATURES else z for z in blocks])
        k += features @ features.T
    return k
