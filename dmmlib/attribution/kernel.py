"""Gradient kernels: attribution from the weights of a few dozen models instead of the outputs of thousands.

TRAK (Park et al., ICML 2023) replaces a network by its linearisation: with phi_i the gradient of the margin of point i
with respect to the weights, and K = Phi Phi^T over training points, training on point i raises the margin of point t
by about

    W_it = s r_i T_it,    T = (K + lam mean(diag K) I)^-1 Phi phi_t,

T averaged over models, s one scale. Here K is exact, without TRAK's random projection, wherever a layer is linear on
vectors: the gradient of one is an outer product of its input a and the gradient d at its output, so it adds
(a_i.a_j + 1)(d_i.d_j). All other weights take explicit gradients a point.

**The residual** r_i says how much there is to spread. TRAK's is 1 - p_i, p_i the probability of the right class, "mean"
over models; the rule is exact for kernel ridge regression if it is that of a model *without* i ("held_out"). But some
subset models were trained on i and some were not, so the rise of its own margin is *measured*: with r_i = rise_i / T_ii
the kernel says only how an effect spreads, and no longer how large it is. That is what KLoM asks for and the LDS, a
rank correlation, is blind to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dmmlib.attribution.base import Context, MarginDatamodel, calibrated, register
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError

Residual = Literal["mean", "held_out", "measured"]
RESIDUALS: tuple[Residual, ...] = get_args(Residual)
At = Literal["subsets", "originals"]
POINTS = 100  # explicit gradients at a time, likewise
FEATURES = 20_000  # of them a point, beyond which they are projected


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Margins (n_points,) of logits (n_points, n_classes): z_y - logsumexp over c != y of z_c."""
    right = y[..., None] == torch.arange(logits.shape[-1], device=y.device)
    return logits.gather(-1, y[..., None])[..., 0] - logits.masked_fill(right, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class _Model:
    """One model of an ensemble, as functions of its weights."""

    module: nn.Module
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, models: Ensemble, i: int) -> _Model:
        models.module.eval()
        return cls(
            models.module, {k: v[i] for k, v in models.params.items()}, {k: v[i] for k, v in models.buffers.items()}
        )

    def logits(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.module, (params, self.buffers), (x,))


def _layers(model: _Model, x: Tensor, y: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Name, inputs a (n, n_in) and gradients d (n, n_out) of the margins at the outputs, of each linear layer.

    Only of layers that a forward pass meets once, on vectors, and whose weights no other part shares.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    linear = {name: part for name, part in model.module.named_modules() if type(part) is nn.Linear}

    def keep(name: str) -> Callable[..., None]:
        return lambda part, inputs, output: calls.setdefault(name, []).append((inputs[0], output))

    hooks = [part.register_forward_hook(keep(name)) for name, part in linear.items()]
    try:
        with torch.enable_grad():
            params = {k: v.detach().requires_grad_() for k, v in model.params.items()}
            m = margin(model.logits(params, x), y)
            once = {k: c[0] for k, c in calls.items() if len(c) == 1 and c[0][0].ndim == 2}
            gradients = torch.autograd.grad(m.sum(), [out for _, out in once.values()]) if once else ()
    finally:
        for hook in hooks:
            hook.remove()
    return [(name, a.detach(), d) for (name, (a, _)), d in zip(once.items(), gradients, strict=True)]


def _explicit(model: _Model, x: Tensor, y: Tensor, names: Sequence[str], seed: int) -> Tensor:
    """Gradients (n, n_features) of each point's margin in the weights `names`, randomly projected if very many."""
    rest = {k: v for k, v in model.params.items() if k not in names}
    chosen = {k: model.params[k] for k in names}

    def one(chosen: dict[str, Tensor], point: Tensor, label: Tensor) -> Tensor:
        return margin(model.logits(chosen | rest, point[None]), label[None])[0]

    per_point = vmap(grad(one), in_dims=(None, 0, 0))
    n_weights = sum(v.numel() for v in chosen.values())
    block = POINTS if n_weights <= 1_000_000 else max(1, 100_000_000 // n_weights)
    rows = []
    for points, labels in zip(x.split(block), y.split(block), strict=True):
        gradients = torch.cat([g.flatten(1) for g in per_point(chosen, points, labels).values()], 1)
        rows.append(_project(gradients, seed) if n_weights > FEATURES else gradients)
    return torch.cat(rows)


def _project(gradients: Tensor, seed: int, n_features: int = 4096, block: int = 10_000) -> Tensor:
    """Inner products are kept in expectation: (n, n_features) by a fixed matrix of random signs, never built whole."""
    generator = torch.Generator(gradients.device).manual_seed(seed)
    total = gradients.new_zeros(len(gradients), n_features)
    for part in gradients.split(block, 1):
        signs = torch.randint(0, 2, (part.shape[1], n_features), generator=generator, device=part.device)
        total += part @ (2.0 * signs - 1.0)
    return total / n_features**0.5


@torch.no_grad()
def gram(models: Ensemble, i: int, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """K (n, n): inner products of the gradients of the points' margins in the weights of model i.

    Args:
        models: an ensemble; evaluated as at test time (batch norm with its running statistics).
        i: which of its models.
        x: points (n, ...).
        y: their labels (n,).
        seed: of the random projection of gradients that are not outer products, where they are more than 20,000.
    """
    model = _Model.of(models, i)
    layers = _layers(model, x, y)
    k = x.new_zeros(len(x), len(x))
    covered: set[str] = set()
    for name, a, d in layers:
        prefix = f"{name}." if name else ""
        covered |= {f"{prefix}weight", f"{prefix}bias"} & set(model.params)
        k += (a @ a.T + float(f"{prefix}bias" in model.params)) * (d @ d.T)
    others = [name for name in model.params if name not in covered]
    if others:
        features = _explicit(model, x, y, others, seed)
        k += features @ features.T
    return k


def attributions(models: Ensemble, x: Tensor, y: Tensor, n_train: int, lam: float, seed: int = 0) -> np.ndarray:
    """T (n_train, n_points), float32, averaged over models.

    Takes 4 (n_points^2 + n_train^2 + n_train n_points) bytes, and a model 2 n_train^2 n_points multiplications.

    Args:
        models: where gradients are taken.
        x, y: all points (n_points, ...), training points first, and their labels.
        n_train: how many are training points.
        lam: penalty, relative to the kernel's mean diagonal.
        seed: see `gram`.
    """
    total = torch.zeros(n_train, len(x), device=x.device)
    for i in range(models.n_models):
        k = gram(models, i, x, y, seed)[:n_train]
        a = k[:, :n_train].clone()
        a.diagonal().add_(lam * a.diagonal().mean())
        total += torch.cholesky_solve(k, torch.linalg.cholesky(a))
    return (total / models.n_models).cpu().numpy()


def kernel_weights(context: Context, lam: float, residual: Residual, at: At, n_models: int | None = None) -> np.ndarray:
    """r_i T_it (n_train, n_points): by how much, up to a scale, each training point raises each margin.

    Raises:
        DataError: for a penalty that is not positive, or a context that lacks what the options need.
    """
    if not lam > 0:
        raise DataError(f"The kernel's penalty is {lam}; give a positive number, such as 0.3.")
    if residual not in RESIDUALS:
        raise DataError(f"residual={residual!r} was asked for; use one of {', '.join(map(repr, RESIDUALS))}.")
    models = context.subset_models() if at == "subsets" else context.originals
    if models is None:
        raise DataError("Gradients at the originals were asked for, but the context has no `originals`.")
    n = context.n_train
    t = attributions(models[:n_models], context.x, context.y, n, lam, context.seed)
    margins = context.margins[:, :n]
    if residual == "measured":
        r = measured_residuals(margins, context.masks, np.diagonal(t))
    else:
        r = _residual(margins, context.masks, held_out=residual == "held_out")
    return np.asarray(r[:, None] * t, np.float32)


@register("kernel")
def kernel(
    context: Context, lam: float = 0.3, residual: Residual = "measured", at: At = "subsets", n_models: int | None = None
) -> MarginDatamodel:
    """Fit a gradient kernel, and its scale on the margins of the context's subset models.

    Args:
        context: with the weights of subset models, or of the originals.
        lam: penalty on the kernel, relative to its mean diagonal.
        residual: r of the module's formula: the "mean" over models (TRAK's), "held_out": over those not trained on
            the point, or "measured": from the rise of each point's own margin.
        at: whose gradients: of "subsets", or of the "originals".
        n_models: of how many, the first so many; all that there are by default.

    Raises:
        DataError: as `kernel_weights`.
    """
    return calibrated(context, kernel_weights(context, lam, residual, at, n_models))


def measured_residuals(margins: np.ndarray, masks: np.ndarray, own: np.ndarray) -> np.ndarray:
    """r (n_train,) such that T_ii r_i is how far training on point i raised its own margin.

    Args:
        margins: of subset models on the training points (M, n_train).
        masks: their training sets (M, n_train); points in all or none of them get 0.
        own: T_ii (n_train,).
    """
    n_in, n_out = masks.sum(0), (~masks).sum(0)
    rise = (margins * masks).sum(0) / np.maximum(n_in, 1) - (margins * ~masks).sum(0) / np.maximum(n_out, 1)
    return np.where((n_in > 0) & (n_out > 0), rise, 0) / np.maximum(own, 1e-6)


def _residual(margins: np.ndarray, masks: np.ndarray, held_out: bool) -> np.ndarray:
    """1 - p of each training point (n_train,), mean over the subset models, or over those not trained on it."""
    r = expit(-margins)
    if not held_out:
        return r.mean(0)
    out = ~masks
    return np.where(out.any(0), (r * out).sum(0) / np.maximum(out.sum(0), 1), r.mean(0))
