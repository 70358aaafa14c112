"""Gradient kernels: attribution from the weights of a few dozen models instead of the outputs of thousands.

TRAK (Park et al., ICML 2023) replaces a network by its linearisation: phi_i is the gradient of the margin of point i
with respect to the weights, K = Phi Phi^T over training points. Training is then ridge regression in the kernel, and
leaving points out of that has a closed form. With a penalty Lambda, G = (K + Lambda)^-1 and T = G Phi phi_t, a model
retrained without F has margins lower by

    T_F^T (D^-1 G_FF)^-1 r_F,    D = diag G,

(block inversion; for one point, the leave-one-out formula of Cook and Weisberg, "Residuals and Influence in
Regression", 1982). r_i says by how much the margin of i falls short where i alone is missing, and (D^-1 G_FF)^-1 by how
much more it does where its likes are missing too: a group's effect is not the sum of its points'. Here K is exact
wherever a layer is linear on vectors, without TRAK's random projection: the gradient of such a layer is an outer
product of its input a and the gradient d at its output, so it adds (a_i.a_j + 1)(d_i.d_j). All other weights take
explicit gradients.

**The penalty** of a point is lam mean(diag K) / h_i. TRAK has h = 1. But cross-entropy pulls at a point that models get
right with next to no force, so that such a point hardly ties the model down: the Gauss-Newton step weighs it by little
(Martens, "New insights and perspectives on the natural gradient method", JMLR 2020). So h_i is the mean over models of
1 - p_i, p_i the probability of the correct class, relative to its mean over points, and at least `EASY`.

**The residual** r_i says how much there is to spread. TRAK's is 1 - p_i. But some subset models were trained on i and
some were not, so here the rise of its own margin is measured. Where a subset leaves B out, i among it, i falls short by
((D^-1 G_BB)^-1 r)_i, and taking it in raises its margin by the share 1 - (1 - T_ii) / ((D^-1 G_BB)^-1)_ii of that: T_ii
where i alone is missing, more where its likes are, too. The mean over subsets is linear in r and is solved for it. So r
is of models with all other points present, although no model was trained so, and the kernel says only how an effect
spreads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional as F

from dmmlib import stacking
from dmmlib.attribution import Context, register
from dmmlib.attributors.gradients import Layer, Score, explicit, margin, observe, scores_of, separable
from dmmlib.attributors.margins import MarginDatamodel, calibrated
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError

FEATURES = 20_000  # weights with explicit gradients, beyond which these are projected
BLOCK = {"cpu": 2**27, "cuda": 2**31}  # numbers held for a block of points whose gradients are sketched
EASY = 0.01  # of the mean: below it a point's hardness does not fall
MASKS = 100  # subsets that residuals are solved with; each costs an inverse of what it leaves out


def _project(gradients: Tensor, seed: int, n_features: int = 4096, block: int = 10_000) -> Tensor:
    """Project on random signs (n, n_features), drawn a block at a time; inner products are kept in expectation."""
    generator = torch.Generator(gradients.device).manual_seed(seed)
    total = gradients.new_zeros(len(gradients), n_features)
    for part in gradients.split(block, 1):
        signs = torch.randint(0, 2, (part.shape[1], n_features), generator=generator, device=part.device)
        total += part @ (2.0 * signs - 1.0)
    return total / n_features**0.5


class Sketch:
    """A sparse random projection of gradients, block by block of weights, summed into `n_features` features.

    Each weight goes to one feature with a random sign, as many weights to each (CountSketch; Charikar et al., ICALP
    2002; Weinberger et al., "Feature hashing for large scale multitask learning", ICML 2009). Inner products g.g' are
    kept in expectation, up to at most about |g| |g'| sqrt(2 / n_features), at the cost of reading the gradients once.
    """

    def __init__(self, n_features: int, seed: int, device: torch.device) -> None:
        self._n_features, self._generator = n_features, torch.Generator(device).manual_seed(seed)
        self._drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str, gradients: Tensor) -> Tensor:
        """Features (n, n_features) of gradients (n, n_weights); the same projection for the same name."""
        n, g = gradients.shape[1], self._generator
        size = -(-n // self._n_features) * self._n_features
        if name not in self._drawn:
            signs = torch.randint(0, 2, (n,), generator=g, device=g.device) * 2.0 - 1.0
            self._drawn[name] = signs, torch.randperm(size, generator=g, device=g.device)
        signs, order = self._drawn[name]
        return F.pad(gradients * signs, (0, size - n))[:, order].unflatten(1, (-1, self._n_features)).sum(1)


@torch.no_grad()
def gram(models: Ensemble, i: int, x: Tensor, y: Tensor, seed: int = 0, project: int | None = None) -> Tensor:
    """K (n, n): inner products of gradients of the margins of points (n, ...) in the weights of model i.

    Args:
        models: an ensemble; evaluated as at test time (batch norm with its running statistics).
        i: which of its models.
        x, y: points and their labels (n,).
        seed: of random projections.
        project: how many features the gradients of convolutions and all other weights than those of layers that are
            linear on vectors are projected on, by a `Sketch`. With None they are taken explicitly, and projected by
            dense signs where they are more than 20,000: exact for small models, and out of reach for large ones.

    Takes 4 n (3 n + project) bytes and, with `project`, about 1 GB for a block of points on a CPU, 8 GB on a GPU.
    Raises DataError for a number of features that is not positive.
    """
    parts = gradients_of(models, i, margin, x, y, seed, project)
    return products(parts, parts)


Parts = list[tuple[Tensor | None, Tensor]]
"""Gradients of n points, in parts of the weights: products of inputs (n, d_in) and what arrives at outputs (n, d_out);
of all other weights, as they are or projected (n, n_features), without inputs."""


def gradients_of(
    models: Ensemble, i: int, score: Score, x: Tensor, y: Tensor, seed: int = 0, project: int | None = None
) -> Parts:
    """Gradients in the weights of model i of a score of each point's logits and label; arguments as of `gram`."""
    if project is not None and project < 1:
        raise DataError(f"project={project} was given; give a number of features, such as 8192, or null.")
    module, (params, buffers) = stacking.copied(models.module).eval(), models.state_of(i)
    scores, kinds = scores_of(module, buffers, score), (nn.Linear,) if project is None else (nn.Linear, nn.Conv2d)
    known = separable(module, params, scores, x, y, *kinds)
    few = observe(module, params, scores, x[:2], y[:2], kinds, known)[1]
    sketch, vectors = Sketch(project or 1, seed, x.device), dict[str, list[Layer]]()
    features = next(iter(params.values())).new_zeros(len(x), project or 0)
    block = len(x) if project is None else max(1, BLOCK[x.device.type] // _floats(few))
    for points, labels, sums in zip(*(z.split(block) for z in (x, y, features)), strict=True):
        for layer in observe(module, params, scores, points, labels, kinds, known)[1]:
            if layer.d.shape[1] == 1:
                vectors.setdefault(layer.parameters[0], []).append(layer)
            else:
                sums += sketch(layer.parameters[0], layer.products().flatten(1))
    covered = {name for layer in few for name in layer.parameters}
    if others := [name for name in params if name not in covered]:
        blocks = explicit(params, others, scores, x, y)
        if project is None:
            features = torch.cat([_project(z, seed) if z.shape[1] > FEATURES else z for z in blocks])
        else:
            features += torch.cat([sketch("", z) for z in blocks])
    parts: Parts = [(None, features)]
    for layers in vectors.values():
        parts.append((torch.cat([z.rows[:, 0] for z in layers]), torch.cat([z.d[:, 0] for z in layers])))
    return parts


def products(a: Parts, b: Parts, known: dict[int, Tensor] | None = None) -> Tensor:
    """Inner products (n_a, n_b) of gradients of one model; those of inputs, the same for any score, stay in `known`."""
    known = {} if known is None else known
    k = a[0][1].new_zeros(len(a[0][1]), len(b[0][1]))
    for i, ((u, d), (v, e)) in enumerate(zip(a, b, strict=True)):
        if u is None or v is None:
            k += d @ e.T
        else:
            if i not in known:
                known[i] = u @ v.T
            k += known[i] * (d @ e.T)
    return k.float()


def _floats(layers: list[Layer]) -> int:
    """Numbers that a block holds for each point: what layers keep, and thrice the gradients of the largest."""
    kept = [layer.inputs[0].numel() + layer.d[0].numel() for layer in layers]
    largest = [layer.rows[0].numel() + 3 * layer.d.shape[2] * layer.rows.shape[2] for layer in layers]
    return sum(kept) + max(largest, default=1)


@dataclass(frozen=True)
class Kernel:
    """Ridge regression in a gradient kernel, averaged over models; see the module."""

    transfer: np.ndarray  # T (n_train, n_points)
    inverse: np.ndarray  # G times mean diag K (n_train, n_train)

    @cached_property
    def coupling(self) -> np.ndarray:
        """D^-1 G (n_train, n_train), of diagonal 1."""
        return np.asarray(self.inverse / np.diagonal(self.inverse)[:, None], np.float32)

    def change(self, residuals: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """Change of margins (k, n_points) of models trained on each mask (k, n_train): a solve of what is left out."""
        coupling, r = self.coupling, residuals.astype(np.float32)
        out = np.zeros((len(masks), self.transfer.shape[1]), np.float32)
        for row, mask in zip(out, masks, strict=True):
            b = np.flatnonzero(~np.asarray(mask, bool))
            if len(b):
                row[:] = -np.linalg.solve(coupling[np.ix_(b, b)], r[b]) @ self.transfer[b]
        return out

    def measured(self, margins: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """r (n_train,) from `measured_rise`, by means of the first `MASKS` subsets."""
        own, coupling = np.maximum(np.diagonal(self.transfer), 1e-6), self.coupling
        mean, left_out = np.zeros_like(coupling), (~masks[:MASKS]).sum(0)
        for mask in masks[:MASKS]:
            b = np.ix_(~mask, ~mask)
            short = np.linalg.inv(coupling[b])
            mean[b] += (1 - (1 - own[~mask]) / np.diagonal(short))[:, None] * short
        mean /= np.maximum(left_out, 1)[:, None]
        mean[left_out == 0, left_out == 0] = own[left_out == 0]
        return np.linalg.solve(mean, measured_rise(margins, masks).astype(np.float32))


def hardness(margins: np.ndarray) -> np.ndarray:
    """h (n_train,) of the module, from margins (M, n_train) of models on the training points."""
    h = expit(-margins).mean(0)
    return np.maximum(h / max(float(h.mean()), 1e-12), EASY)


def gradient_kernel(
    models: Ensemble,
    x: Tensor,
    y: Tensor,
    n_train: int,
    lam: float,
    hardness: np.ndarray | None = None,
    seed: int = 0,
    project: int | None = None,
) -> Kernel:
    """Average the kernel over models, where gradients are taken.

    Takes 4 (n_points^2 + 2 n_train^2 + n_train n_points) bytes, and per model 2 n_train^2 n_points multiplications.

    Args:
        x, y: all points (n_points, ...), training points first, and their labels.
        lam: penalty, relative to the kernel's mean diagonal.
        hardness: h (n_train,), by which a point's penalty is divided; 1 by default, which is TRAK's.
        seed, project: as `gram` takes them.
    """
    transfer = torch.zeros(n_train, len(x), device=x.device)
    inverse = torch.zeros(n_train, n_train, device=x.device)
    h = torch.ones(n_train) if hardness is None else torch.from_numpy(np.asarray(hardness, np.float32))
    for i in range(models.n_models):
        k = gram(models, i, x, y, seed, project)[:n_train]
        a = k[:, :n_train].clone()
        unit = a.diagonal().mean()
        a.diagonal().add_(lam * unit / h.to(x.device))
        factor = torch.linalg.cholesky(a)
        transfer += torch.cholesky_solve(k, factor)
        inverse += unit * torch.cholesky_inverse(factor)
    return Kernel(*(z.cpu().numpy() / models.n_models for z in (transfer, inverse)))


@dataclass(frozen=True)
class KernelResponse:
    """How margins respond to training points, up to a scale, by a kernel and its residuals r (n_train,)."""

    kernel: Kernel
    residuals: np.ndarray

    @property
    def n_train(self) -> int:
        return len(self.residuals)

    @property
    def weights(self) -> np.ndarray:
        """r_i T_it (n_train, n_points): what one point does where all others are present."""
        return np.asarray(self.residuals[:, None] * self.kernel.transfer, np.float32)

    def change(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`Kernel.change` (k, n_points), of unknown noise."""
        change = self.kernel.change(self.residuals, masks)
        return change, np.zeros(change.shape[1])

    def leverage(self, forget: np.ndarray) -> float:
        """Length, in the models' own metric, of the displacement without the points `forget`, up to a constant.

        The displacement is sum_F r_i h_i A^-1 phi_i, A = sum h_i phi_i phi_i^T + mu. Its squared length in the metric A
        is r_F . T_FF (h r)_F, and h_i is proportional to G_ii / (1 - T_ii).
        """
        own, inverse = (np.diagonal(z)[forget] for z in (self.kernel.transfer, self.kernel.inverse))
        r, h = self.residuals[forget], inverse / np.maximum(1 - own, 1e-6)
        return float(np.sqrt(max(0.0, r @ self.kernel.transfer[np.ix_(forget, forget)] @ (h * r))))


def kernel_response(
    context: Context, lam: float = 0.1, n_models: int | None = None, project: int | None = None
) -> KernelResponse:
    """Take the kernel at the weights of a context's first `n_models` subset models, and measure the residuals.

    The penalty `lam` is relative to the kernel's mean diagonal. For models of a million weights give `project`, a
    number of features; see `gram`. Raises DataError for no weights.
    """
    n, models = context.n_train, context.subset_models()[:n_models]
    margins = context.margins[:, :n]
    kernel = gradient_kernel(models, context.x, context.y, n, lam, hardness(margins), context.seed, project)
    return KernelResponse(kernel, kernel.measured(margins, context.masks))


@register("kernel", version=2)
def kernel(
    context: Context, lam: PositiveFloat = 0.1, n_models: PositiveInt | None = None, project: PositiveInt | None = None
) -> MarginDatamodel:
    """Fit `kernel_response`, and its scale on the margins of the context's subset models."""
    return calibrated(context, kernel_response(context, lam, n_models, project))


def measured_rise(margins: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """How far training on each point raised its own margin (n_train,).

    From margins (M, n_train) of subset models and their masks (M, n_train); points in all or none of them get 0.
    """
    n_in, n_out = masks.sum(0), (~masks).sum(0)
    rise = (margins * masks).sum(0) / np.maximum(n_in, 1) - (margins * ~masks).sum(0) / np.maximum(n_out, 1)
    return np.where((n_in > 0) & (n_out > 0), rise, 0)
