"""LASSO datamodels, for all targets at once.

For each output (Ilyas et al., "Datamodels", ICML 2022), with centred masks A and outputs y of M subset models,

    minimise over w:  |y - A w|^2 / 2M + lambda |w|_1,

the objective of scikit-learn's Lasso. The targets, one logit of one point each, are solved together, a block at a time,
by proximal gradient steps of Barzilai and Borwein's length (SpaRSA; Wright, Nowak & Figueiredo, 2009), each until its
duality gap is small. A step multiplies by A and its transpose, or by A^T A / M where that is cheaper. lambda is a share
of each target's smallest lambda that leaves no weight, max |A^T y| / M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_array, hstack
from torch import Tensor

from dmmlib.attribution import Context, register
from dmmlib.datamodels import Attributor, Indices, check_finite
from dmmlib.errors import DataError
from dmmlib.forget_sets import indicator
from dmmlib.presets import Fraction

SHARES = (0.9, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)  # of the lambda that leaves no weight; from sparse to dense
BLOCK = 1000  # targets solved at a time
STEPS, CHECK = 5000, 5  # at most; between two looks at the duality gaps
LEAST = 1e-7  # that `tol` is above, as below it the gap is float32's rounding


class Solver:
    """Solves for the weights of many targets with the same float masks (M, n_train), on their device."""

    def __init__(self, masks: Tensor) -> None:
        m, n = masks.shape
        self.mean = masks.mean(0)
        self.a = masks - self.mean
        self.gram = self.a.T @ self.a / m if 2 * m >= n else None
        self.steepest = float(torch.linalg.matrix_norm(self.a, 2)) ** 2 / m  # curvature; 1 / this step never fails

    def solve(self, y: Tensor, shares: Tensor, start: Tensor, tol: float) -> Tensor:
        """Find the weights (n_targets, n_train) of outputs y (n_targets, M), from those of `start`.

        Args:
            shares: each target's lambda, as a share of the smallest that leaves no weight (n_targets,).
            tol: a target is solved once its duality gap is at most this share of |y|^2 / 2M, the objective of w = 0;
                DataError if it has not come to that after 5,000 steps.
        """
        a, m = self.a, len(self.a)
        y = y - y.mean(1, keepdim=True)
        correlation, scale = y @ a / m, (y**2).sum(1) / 2 / m
        w, lam = start, shares * correlation.abs().amax(1)
        solved, left = torch.empty_like(w), torch.arange(len(y), device=y.device)

        def gradient(w: Tensor, correlation: Tensor) -> Tensor:
            """Minus that of the squared error."""
            return correlation - (w @ a.T @ a / m if self.gram is None else w @ self.gram)

        g, curvature = gradient(w, correlation), torch.full_like(lam, self.steepest)
        for step in range(STEPS + 1):
            if step % CHECK == 0:
                rest = y - w @ a.T
                dual = (lam / g.abs().amax(1).clamp(min=1e-30)).clamp(max=1)[:, None] * rest
                gap = (rest**2 + (y - dual) ** 2).sum(1) / 2 / m - scale + lam * w.abs().sum(1)
                done = gap <= tol * scale
                solved[left[done]] = w[done]
                rows = (v[~done] for v in (left, w, g, y, correlation, scale, lam, curvature))
                left, w, g, y, correlation, scale, lam, curvature = rows
                if not len(left):
                    return solved
            ahead = torch.addcdiv(w, g, curvature[:, None])
            threshold = (lam / curvature)[:, None]
            new = ahead - torch.minimum(torch.maximum(ahead, -threshold), threshold)
            new_g = gradient(new, correlation)
            moved = new - w
            bent, length = ((moved * v).sum(1) for v in (g - new_g, moved))
            low = self.steepest * max(1e-3, (step / STEPS) ** 2)  # ever shorter steps: none goes astray for good
            curvature = torch.where(bent > 0, bent / length.clamp(min=1e-30), self.steepest).clamp(low, self.steepest)
            w, g = new, new_g
        raise DataError(f"The LASSO has not converged after {STEPS:,} steps; raise its penalties or `tol`.")

    def predict(self, w: Tensor, y: Tensor, masks: Tensor) -> Tensor:
        """Predict the outputs (n_targets, k) for masks (k, n_train), by weights that were fitted to outputs y."""
        return y.mean(1, keepdim=True) + w @ (masks - self.mean).T


@dataclass(frozen=True)
class LassoDatamodel(Attributor):
    """Fitted LASSO datamodels."""

    weights: csr_array  # (n_train, n_points * n_classes)
    mean_mask: np.ndarray  # (n_train,)
    mean_output: np.ndarray  # (n_points, n_classes)

    def _respond(self, directions: np.ndarray) -> np.ndarray:
        return (np.asarray(directions, np.float32) @ self.weights).reshape(-1, *self.mean_output.shape)

    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        """Predict the change of logits (k, n_points, n_classes) on retraining without each forget set."""
        return -self._respond(np.stack([indicator(forget, len(self.mean_mask)) for forget in forget_sets]))

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predict the logits (k, n_points, n_classes) of models trained on the given masks (k, n_train)."""
        return self.mean_output + self._respond(masks - self.mean_mask)


@register("lasso")
def lasso(
    context: Context,
    shares: Fraction | Annotated[Sequence[Fraction], Field(min_length=1)] = SHARES,
    held_out: Fraction = 0.1,
    tol: Annotated[float, Field(gt=LEAST, le=1)] = 1e-3,
) -> LassoDatamodel:
    """Fit LASSO datamodels; of several penalties each target takes one by its error on held-out subsets.

    Penalties are tried from the first on, and a target stops where its error no longer falls. A step costs 4 M n_train,
    or 2 n_train^2 where that is less, multiplications for each target, and a fit some tens of steps for each penalty.

    Args:
        shares: of the penalty that leaves no weight, in (0, 1), tried in this order.
        held_out: share of the subset models that chooses among several penalties, before a fit to all of them.
        tol: see `Solver.solve`.

    Raises DataError for outputs that cannot be used, too few models to hold some out, or no convergence.
    """
    shares = np.ravel(shares).tolist()
    m = len(context.masks)
    k = m - (max(1, round(held_out * m)) if len(shares) > 1 else 0)
    if k <= 1:
        raise DataError(f"held_out={held_out} of {m} subset models was asked for; leave at least two to fit to.")
    masks = torch.from_numpy(context.masks.astype(np.float32)).to(context.device)
    outputs = np.asarray(context.outputs[:m], np.float32).reshape(m, -1)
    check_finite(outputs)
    every, fitting = Solver(masks), Solver(masks[:k])
    parts, means = [], []
    for first in range(0, outputs.shape[1], BLOCK):
        y = torch.from_numpy(outputs[:, first : first + BLOCK].T.copy()).to(context.device)
        share, start = torch.full_like(y[:, 0], shares[0]), torch.zeros(len(y), masks.shape[1], device=y.device)
        left, error, w = torch.arange(len(y), device=y.device), torch.full_like(share, torch.inf), start
        for candidate in shares if k < m else ():
            w = fitting.solve(y[left, :k], torch.full_like(share[left], candidate), w, tol)
            missed = ((fitting.predict(w, y[left, :k], masks[k:]) - y[left, k:]) ** 2).mean(1)
            better = missed < error[left]
            left, w = left[better], w[better]
            error[left], share[left], start[left] = missed[better], candidate, w
        parts.append(csr_array(every.solve(y, share, start, tol).cpu().numpy()).T)
        means.append(y.mean(1).cpu().numpy())
    mean = np.concatenate(means).reshape(context.outputs.shape[1:])
    return LassoDatamodel(csr_array(hstack(parts, format="csr")), context.masks.mean(0, dtype=np.float32), mean)
