"""Gradient kernels: attribution from the weights of a few dozen models instead of the outputs of thousands.

TRAK (Park et al., ICML 2023) replaces a network by its linearisation: with phi_i the gradient of the margin of
training point i and g_tc that of logit c of point t, both with respect to the weights, K = Phi Phi^T, and p_i the
probability of the right class, leaving point i out changes that logit by about

    - s r_i T_i(t, c),    T = (K + lam mean(diag K) I)^-1 Phi g_tc,    r_i = 1 - p_i,

T and r averaged over models, s one scale that puts it in logit units. Here K is exact, without TRAK's random
projection, wherever a layer is linear on vectors: the gradient of one is an outer product of its input a and the
gradient d at its output, so it adds (a_i.a_j + 1)(d_i.d_j). All other weights take explicit gradients a point.

**T is never built.** For any weights u on the training points, T^T u is g_tc . w with w = Phi^T (K + lam I)^-1 u: one
solve, one backward pass and one Jacobian-vector product a model, for all points and logits at once.

**A group is more than its points.** The rule is exact for kernel ridge regression if r_i is the residual of i in the
model *without* it: T^T r is then what relabelling i with the prediction of others does. For a group F out together,
the residuals of the model without F solve, with margins m of the originals,

    r_j = mean over originals of 1 - sigmoid(m_j - s sum over i in F of T_ij r_i),    j in F.

**Or measured.** Half of the subset models were trained on i and half were not, so the rise of its own margin, mean
with it minus mean without it, is known well, and r_i = rise_i / T_ii lets the kernel say only how an effect spreads.

Which of these serves DM-direct best is open: a kernel at 20 of 100 subset models has the LDS of thousands of them, and
still a KLoM above theirs, since the LDS is blind to how much is predicted. The group's equation did worst so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from dmmlib.attribution.base import Context, register
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError
from dmmlib.forget_sets import check_forget_indices
from dmmlib.metrics import margins as margins_of

Residual = Literal["mean", "held_out", "measured", "group"]
DIRECTIONS = 32  # at a time through a model, to bound memory
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


@dataclass(frozen=True)
class KernelDatamodel:
    """A fitted gradient kernel; see `fit`.

    Attributes:
        models: the K models that gradients are taken at.
        x, y: all points (n_points, ...), training points first, and their labels.
        factors: Cholesky factors of the regularised kernels (K, n_train, n_train).
        ridge: lam mean(diag K), what was added to each kernel's diagonal (K,).
        residual: r (n_train,), of the model without the point where it is to be held out.
        scale: s, one number, or one a point (n_points,).
        mean_mask, mean_output: a prediction for a mask is the mean output plus the effect of its difference to the
            mean mask; (n_train,) and (n_points, n_classes).
        margins: of the originals (N, n_train), where a group's residuals are solved for; else None.
    """

    models: Ensemble
    x: Tensor
    y: Tensor
    factors: Tensor
    ridge: Tensor
    residual: np.ndarray
    mean_mask: np.ndarray
    mean_output: np.ndarray
    scale: float | np.ndarray = 1.0
    margins: np.ndarray | None = None

    @property
    def n_train(self) -> int:
        return self.factors.shape[1]

    def respond(self, directions: np.ndarray) -> np.ndarray:
        """T^T u averaged over models (k, n_points, n_classes), without the scale, for each row u of (k, n_train)."""
        u = torch.from_numpy(np.asarray(directions, np.float32)).to(self.x.device)
        total = torch.zeros(len(u), len(self.x), self.mean_output.shape[1], device=self.x.device)
        for i, factor in enumerate(self.factors):
            model = _Model.of(self.models, i)
            v = torch.cholesky_solve(u.T, factor).T
            total += torch.cat([self._push(model, part) for part in v.split(DIRECTIONS)])
        return (total / len(self.factors)).cpu().numpy()

    def _push(self, model: _Model, v: Tensor) -> Tensor:
        """g . Phi^T v (k, n_points, n_classes) for v (k, n_train): backward from margins, forward to logits."""
        n = self.n_train

        def margins(params: dict[str, Tensor]) -> Tensor:
            return margin(model.logits(params, self.x[:n]), self.y[:n])

        def change(direction: dict[str, Tensor]) -> Tensor:
            return jvp(lambda params: model.logits(params, self.x), (model.params,), (direction,))[1]

        pull = vjp(margins, model.params)[1]
        return vmap(change)(vmap(pull)(v)[0])

    def among(self, forget: np.ndarray) -> np.ndarray:
        """T_FF (|F|, |F|): how each point of F acts on the margin of each, averaged over models, without the scale."""
        unit = torch.zeros(self.n_train, len(forget), device=self.factors.device)
        index = torch.from_numpy(forget).to(unit.device)
        unit[index, torch.arange(len(forget), device=unit.device)] = 1
        total = np.zeros((len(forget), len(forget)))
        for factor, ridge in zip(self.factors, self.ridge, strict=True):
            total += (unit[index] - ridge * torch.cholesky_solve(unit, factor)[index]).cpu().numpy()
        return total / len(self.factors)

    def own(self) -> np.ndarray:
        """T_ii (n_train,): how each training point acts on its own margin, averaged over models, without the scale."""
        inverses = (r * torch.cholesky_inverse(f).diagonal() for f, r in zip(self.factors, self.ridge, strict=True))
        return 1 - (sum(inverses, torch.zeros(())) / len(self.factors)).cpu().numpy()

    def residuals(self, forget: np.ndarray) -> np.ndarray:
        """r of the points of F (|F|,): as fitted, or the solution for the group where `margins` are given."""
        if self.margins is None:
            return self.residual[forget]
        scale = np.broadcast_to(self.scale, len(self.x))[forget]
        return conditional_residuals(self.margins[:, forget], scale[:, None] * self.among(forget).T)

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted change of logits (n_points, n_classes) on retraining without the points `forget`.

        Raises:
            ForgetSetError: for indices that are no proper part of the training set.
        """
        return self.effects([forget])[0]

    def effects(self, forget_sets: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """`effect` of several forget sets (k, n_points, n_classes), in one pass over the models."""
        directions = np.zeros((len(forget_sets), self.n_train))
        for row, forget in zip(directions, forget_sets, strict=True):
            indices = check_forget_indices(forget, self.n_train)
            row[indices] = self.residuals(indices)
        return -self._scaled(self.respond(directions))

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predicted logits (k, n_points, n_classes) of models trained on the given masks (k, n_train)."""
        return self.mean_output + self._scaled(self.respond((masks - self.mean_mask) * self.residual))

    def _scaled(self, response: np.ndarray) -> np.ndarray:
        return response * np.broadcast_to(self.scale, len(self.x))[:, None].astype(np.float32)


def conditional_residuals(margins: np.ndarray, among: np.ndarray, steps: int = 200) -> np.ndarray:
    """Solve r = mean over models of 1 - sigmoid(m - among r), by damped iteration from the margins as they are.

    Args:
        margins: m (n_models, |F|), of models trained with F.
        among: (|F|, |F|), row j how the residuals of F add to the margin of j.

    Returns:
        r (|F|,), in [0, 1].
    """
    r = expit(-margins).mean(0)
    for _ in range(steps):
        new = expit(among @ r - margins).mean(0)
        done = np.abs(new - r).max() < 1e-7
        r = (r + new) / 2
        if done:
            break
    return r


def calibrate(predicted: np.ndarray, actual: np.ndarray, per_point: bool) -> float | np.ndarray:
    """The scale that takes predicted to actual changes of logits, both (n_models, n_points, n_classes), centred here.

    One least-squares slope for all; with `per_point` one a point (n_points,), shrunk to it by empirical Bayes: a
    point's own slope counts with tau^2 / (tau^2 + se^2), se its standard error and tau^2 the variance of slopes
    beyond what errors explain. Classes are centred too, since a shift of all logits changes no margin.
    """
    p, a = (_centred(z) for z in (predicted, actual))
    power, product = (p * p).sum((0, 2)), (p * a).sum((0, 2))
    common = float(product.sum() / max(power.sum(), 1e-12))
    if not per_point:
        return common
    slopes = product / np.maximum(power, 1e-12)
    freedom = max(1, (len(p) - 1) * (p.shape[2] - 1) - 1)
    error = ((a - slopes[:, None] * p) ** 2).sum((0, 2)) / freedom / np.maximum(power, 1e-12)
    weights = power / power.sum()
    tau2 = max(0.0, float((weights * ((slopes - common) ** 2 - error)).sum()))
    return common + tau2 / np.maximum(tau2 + error, 1e-12) * (slopes - common)


def _centred(logits: np.ndarray) -> np.ndarray:
    z = np.asarray(logits, np.float32)
    z = z - z.mean(2, keepdims=True)
    return z - z.mean(0)


@register("kernel")
def kernel(
    context: Context,
    lam: float = 1.0,
    residual: Residual = "measured",
    at: Literal["subsets", "originals"] = "subsets",
    n_models: int | None = None,
    per_point: bool = False,
) -> KernelDatamodel:
    """Fit a gradient kernel, and its scale on the outputs of the context's subset models.

    Fitting takes 4 K n_train^2 bytes, and time K (n_train^3 / 3 + n_train^2 x the widths of the layers).

    Args:
        context: with the weights of subset models, or of the originals; for residual "group" also the originals'
            logits.
        lam: penalty on the kernel, relative to its mean diagonal.
        residual: r of the module's formula: the "mean" over models (TRAK's), "held_out": over those not trained on
            the point, "measured": from the rise of each point's own margin, or "group": solved for all of F being
            out ("held_out" where masks are predicted).
        at: whose gradients: of "subsets", or of the "originals".
        n_models: K, the first so many; all that there are by default.
        per_point: one scale a point, shrunk to the common one, instead of one for all.

    Raises:
        DataError: for a penalty that is not positive, or a context that lacks what the options need.
    """
    if not lam > 0:
        raise DataError(f"The kernel's penalty is {lam}; give a positive number, such as 0.1.")
    models = context.subset_models() if at == "subsets" else context.originals
    if models is None:
        raise DataError("Gradients at the originals were asked for, but the context has no `originals`.")
    models = models[:n_models]
    if residual == "group" and context.original_logits is None:
        raise DataError("The residuals of a group start from the originals; give the context `original_logits`.")
    n, labels = context.n_train, context.labels
    x, y = context.x[:n], context.y[:n]
    factors = torch.empty(models.n_models, n, n, device=context.device)
    ridge = torch.empty(models.n_models, device=context.device)
    for i, factor in enumerate(factors):
        k = gram(models, i, x, y, context.seed)
        ridge[i] = lam * k.diagonal().mean()
        k.diagonal().add_(ridge[i])
        torch.linalg.cholesky(k, out=factor)
    outputs = np.asarray(context.outputs[: len(context.masks)])
    fitted = KernelDatamodel(
        models,
        context.x,
        context.y,
        factors,
        ridge,
        np.zeros(n),
        context.masks.mean(0),
        outputs.mean(0),
        margins=margins_of(context.original_logits[:, :n], labels[:n]) if residual == "group" else None,  # type: ignore[index]
    )
    seen = margins_of(outputs[:, :n], labels[:n])
    if residual == "measured":
        r = measured_residuals(seen, context.masks, fitted.own())
    else:
        r = _residual(seen, context.masks, held_out=residual != "mean")
    fitted = replace(fitted, residual=r)
    return replace(fitted, scale=calibrate(fitted.predict(context.masks), outputs, per_point))


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


@dataclass(frozen=True)
class Mixture:
    """A prior attributor, and a ridge datamodel on what it leaves of the outputs of the same masks."""

    prior: KernelDatamodel
    correction: RidgeDatamodel

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted change of logits (n_points, n_classes) on retraining without the points `forget`."""
        return self.effects([forget])[0]

    def effects(self, forget_sets: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """`effect` of several forget sets (k, n_points, n_classes)."""
        return self.prior.effects(forget_sets) + self.correction.effects(forget_sets)

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predicted logits (k, n_points, n_classes) of models trained on the given masks (k, n_train)."""
        return self.prior.predict(masks) + self.correction.predict(masks)


@register("kernel_ridge")
def kernel_ridge(context: Context, ridge_lam: float = 0.3, **options: Any) -> Mixture:
    """The gradient kernel as prior mean of a ridge datamodel, which regresses outputs minus the kernel's predictions.

    Args:
        context: as for `kernel`.
        ridge_lam: penalty of the ridge, on A^T A / M.
        options: of `kernel`.
    """
    prior: Any = kernel(context, **options)
    left = np.asarray(context.outputs[: len(context.masks)]) - prior.predict(context.masks)
    return Mixture(prior, RidgeDatamodel.fit(context.masks, left, ridge_lam, context.device))
