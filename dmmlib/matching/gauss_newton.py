"""Gauss-Newton steps: move a model's weights so that its margins at some points become given ones.

Near weights theta the margins of points are m + G (theta' - theta), with a gradient g_i in each row of G. The step that
brings them towards targets t with the least change in a metric M of weights is

    theta' = theta + M^-1 G^T a,    a = (K + Lambda)^-1 (t - m),    K = G M^-1 G^T,

the Levenberg-Marquardt step of the squared error in its dual form (Nocedal and Wright, "Numerical Optimization", 2006,
section 10.3), so that only a matrix of points x points is solved. M is the second moment A of each layer's inputs, bias
included, plus a damping: the input's side of K-FAC (Martens and Grosse, ICML 2015), which does most of what K-FAC does
(Benzing, "Gradient descent on neurons", ICML 2022). A step for a few points then leaves what a layer does to the usual
inputs alone. Of a layer that is linear on vectors g_i = d_i u_i^T, u its inputs and d the margin's gradient at its
outputs, so that K = sum over layers of (u_i.A^-1 u_j) (d_i.d_j); of a convolution, g_i is a sum of such products over
places. All other weights take explicit gradients, and the identity in M.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from dmmlib import stacking
from dmmlib.attributors.gradients import Layer, explicit, margins_of, observe, separable
from dmmlib.ensemble import Ensemble
from dmmlib.optim import Tensors

DAMPING = 0.03  # of A, relative to its mean diagonal
KINDS = (nn.Linear, nn.Conv2d)  # layers that need no explicit gradients


class Jacobian:
    """Gradients of one model's margins at some points: keeps `margins` m (n,) and `kernel` K (n, n), double.

    Args:
        module: the architecture, in evaluation mode.
        params, buffers: the model's weights and buffers by name.
        x, y: the points (n, ...) and their labels.
        usual: how many of the last points A is measured on.
        known: of `separable_weights`; found out if None.
    """

    def __init__(
        self,
        module: nn.Module,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        y: Tensor,
        usual: int,
        known: Collection[str] | None = None,
    ) -> None:
        margins = margins_of(module, buffers)
        known = separable(module, params, margins, x, y, *KINDS) if known is None else known
        self.margins, layers = observe(module, params, margins, x, y, KINDS, known)
        self._parts = [(_Vectors if layer.d.shape[1] == 1 else _Places)(layer, usual) for layer in layers]
        self.kernel = sum((part.kernel for part in self._parts), x.new_zeros(len(x), len(x), dtype=torch.double))
        covered = {name for layer in layers for name in layer.parameters}
        self._params, self._others = params, [name for name in params if name not in covered]
        if self._others:
            self._explicit = torch.cat(list(explicit(params, self._others, margins, x, y)))
            self.kernel = self.kernel + (self._explicit @ self._explicit.T).double()

    def solve(self, residual: Tensor, ridge: Tensor) -> Tensors:
        """The step M^-1 G^T a, by name, for t - m (n,) and Lambda (n,) relative to K's mean diagonal."""
        k = self.kernel.clone()
        k.diagonal().add_(ridge * k.diagonal().mean() + torch.finfo(torch.float32).tiny)
        a = torch.linalg.solve(k, residual.double())
        step: Tensors = {}
        for part in self._parts:
            moved, (weight, *bias) = part.step(a), part.layer.parameters
            step |= dict.fromkeys(bias, moved[:, -1]) | {weight: moved[:, : -1 if bias else None]}
        if self._others:
            parts = (a.to(self._explicit) @ self._explicit).split([self._params[k].numel() for k in self._others])
            step |= dict(zip(self._others, parts, strict=True))
        return {name: moved.reshape(self._params[name].shape).to(self._params[name]) for name, moved in step.items()}


def separable_weights(models: Ensemble, x: Tensor, y: Tensor) -> tuple[set[str], int]:
    """Weights of layers with gradients that are products, and how many others take explicit ones."""
    module, (params, buffers) = stacking.copied(models.module).eval(), models.state_of(0)
    margins = margins_of(module, buffers)
    known = separable(module, params, margins, x, y, *KINDS)
    layers = observe(module, params, margins, x[:2], y[:2], KINDS, known)[1]
    covered = {name for layer in layers for name in layer.parameters}
    return known, sum(v.numel() for name, v in params.items() if name not in covered)


def _damping(mean: Tensor) -> Tensor:
    """What is added to A, of that mean diagonal; inputs that are all 0 are left alone."""
    return torch.where(mean > 0, DAMPING * mean, 1.0)


class _Vectors:
    """A layer that is linear on vectors: nothing larger than points x points is solved.

    With U the n inputs A is measured on, c = n eps, S = U U^T + c I and any inputs V, by Woodbury's identity

        V A^-1 = (V - W U) / eps,    W = V U^T S^-1,    and so    U A^-1 = n S^-1 U.
    """

    def __init__(self, layer: Layer, usual: int) -> None:
        self.layer, self._rows, self._d, self._n = layer, layer.rows[:, 0].double(), layer.d[:, 0].double(), usual
        self._eps = _damping(self._rows[-usual:].square().mean())
        k = self._rows @ self._rows.T
        one, damping = torch.eye(usual).to(k), usual * self._eps
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(k[-usual:, -usual:] + damping * one))
        self._across = k[:-usual, -usual:] @ self._inverse
        others = (k[:-usual, :-usual] - self._across @ k[-usual:, :-usual]) / self._eps
        seen = usual * torch.cat([self._across.T, one - damping * self._inverse], 1)
        self.kernel = torch.cat([torch.cat([others, usual * self._across], 1), seen]) * (self._d @ self._d.T)

    def step(self, a: Tensor) -> Tensor:
        """Sum of a_i d_i u_i^T A^-1 (d_out, d_in)."""
        weighted = a[:, None] * self._d
        others, seen = weighted[: -self._n] / self._eps, self._n * self._inverse @ weighted[-self._n :]
        return torch.cat([others, seen - self._across.T @ others]).T @ self._rows


class _Places:
    """A convolution: gradients g (n, d_out, d_in) are sums over places, of which only a block is ever held."""

    def __init__(self, layer: Layer, usual: int) -> None:
        seen = layer.rows[-usual:].flatten(0, 1)
        moment = seen.T @ seen / len(seen)
        moment.diagonal().add_(_damping(moment.diagonal().mean()))
        self.layer, self._root = layer, torch.linalg.cholesky(moment)
        self.kernel = layer.d.new_zeros(len(layer.d), len(layer.d), dtype=torch.double)
        for block in layer.blocks():  # g L^-T: in these coordinates A = L L^T is I
            white = torch.linalg.solve_triangular(self._root.T, block.flatten(0, 1), upper=True, left=False)
            white = white.reshape(len(block), -1)
            self.kernel += (white @ white.T).double()

    def step(self, a: Tensor) -> Tensor:
        """Sum of a_i g_i A^-1 (d_out, d_in)."""
        moved = (a.to(self.layer.d)[:, None, None] * self.layer.d).flatten(0, 1).T @ self.layer.rows.flatten(0, 1)
        return torch.cholesky_solve(moved.T, self._root).T
