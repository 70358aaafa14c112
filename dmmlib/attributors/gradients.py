"""Gradients of margins with respect to weights, and their inner products.

The kernel K = Phi Phi^T, with phi_i the gradient of the margin of point i, takes no random projection (as in TRAK, Park
et al., ICML 2023) wherever a layer is linear on vectors: the gradient of one is an outer product of its input a and the
gradient d at its output, so it adds (a_i.a_j + 1)(d_i.d_j). All other weights take explicit gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def _layers(
    module: nn.Module, params: Tensors, margins: Margins, x: Tensor, y: Tensor
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, inputs a (n, n_in) and gradients d (n, n_out) at the outputs, of each linear layer.

    Only of layers that a forward pass meets once, on vectors, and whose weights no other part shares.
    """
    names: dict[nn.Module, str] = {m: name for name, m in module.named_modules() if type(m) is nn.Linear}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.setdefault(names[part], []).append((inputs[0], output))

    hooks = [part.register_forward_hook(keep) for part in names]
    try:
        with torch.enable_grad():
            total = margins({k: v.detach().requires_grad_() for k, v in params.items()}, x, y).sum()
            once = {k: c[0] for k, c in calls.items() if len(c) == 1 and c[0][0].ndim == 2}
            gradients = torch.autograd.grad(total, [out for _, out in once.values()]) if once else ()
    finally:
        for hook in hooks:
            hook.remove()
    return [(name, a.detach(), d) for (name, (a, _)), d in zip(once.items(), gradients, strict=True)]


def _explicit(params: Tensors, names: Sequence[str], margins: Margins, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Gradients (n, n_features) of each point's margin in the weights `names`, projected if they are very many."""
    rest, chosen = {k: v for k, v in params.items() if k not in names}, {k: params[k] for k in names}

    def one(chosen: Tensors, point: Tensor, label: Tensor) -> Tensor:
        return margins(chosen | rest, point[None], label[None])[0]

    per_point = vmap(grad(one), in_dims=(None, 0, 0))
    n_weights = sum(v.numel() for v in chosen.values())
    block = POINTS if n_weights <= 1_000_000 else max(1, 100_000_000 // n_weights)
    rows = []
    for points, labels in zip(x.split(block), y.split(block), strict=True):
        gradients = torch.cat([g.flatten(1) for g in per_point(chosen, points, labels).values()], 1)
        rows.append(_project(gradients, seed) if n_weights > FEATURES else gradients)
    return torch.cat(rows)


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
    module = models.module.eval()
    params, buffers = ({k: v[i] for k, v in part.items()} for part in (models.params, models.buffers))

    def margins(params: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return margin(functional_call(module, (params, buffers), (x,)), y)

    k, covered = x.new_zeros(len(x), len(x)), set[str]()
    for name, a, d in _layers(module, params, margins, x, y):
        prefix = f"{name}." if name else ""
        covered |= {f"{prefix}weight", f"{prefix}bias"}
        k += (a @ a.T + float(f"{prefix}bias" in params)) * (d @ d.T)
    others = [name for name in params if name not in covered]
    if others:
        features = _explicit(params, others, margins, x, y, seed)
        k += features @ features.T
    return k
