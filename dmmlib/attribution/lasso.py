"""LASSO datamodels, for all targets at once.

One sparse linear model an output (Ilyas et al., "Datamodels", ICML 2022): with centred masks A and outputs y of M
subset models,

    minimise over w:  |y - A w|^2 / 2M + lambda |w|_1,

the objective of scikit-learn's Lasso. Its gradient needs only G = A^T A / M and C = A^T Y / M, so the columns of Y, a
point's logit each, are solved together by accelerated proximal gradient steps (Beck & Teboulle's FISTA, 2009, with
the restarts of O'Donoghue & Candes, 2015), a block of targets at a time. lambda is a share of each target's smallest
lambda that leaves no weight, max |C_t|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array, hstack
from torch import Tensor

from dmmlib.attribution.base import Context, register
from dmmlib.errors import DataError
from dmmlib.forget_sets import check_forget_indices

SHARES = (0.5, 0.35, 0.25, 0.18, 0.12)  # of the lambda that leaves no weight; from sparse to dense
BLOCK = 2500  # targets solved at a time


def solve(gram: Tensor, correlation: Tensor, lam: Tensor, start: Tensor | None = None, tol: float = 1e-4) -> Tensor:
    """LASSO weights (n_train, n_targets).

    Args:
        gram: A^T A / M (n_train, n_train).
        correlation: A^T Y / M (n_train, n_targets).
        lam: a penalty a target (n_targets,).
        start: weights to start from, zero if None.
        tol: stop once no weight moves by more than this share of its target's largest in a step.

    Raises:
        DataError: if it has not converged after 2,000 steps.
    """
    step = 1 / float(torch.linalg.eigvalsh(gram)[-1].clamp(min=1e-12))
    w = torch.zeros_like(correlation) if start is None else start
    ahead, t = w, torch.ones_like(lam)
    for _ in range(2000):
        new = torch.addmm(correlation, gram, ahead, alpha=-1).mul_(step).add_(ahead)
        new = new.sign() * (new.abs() - step * lam).clamp(min=0)
        restart = ((ahead - new) * (new - w)).sum(0) > 0  # momentum points uphill: drop it for that target
        t_new = torch.where(restart, 1.0, (1 + (1 + 4 * t**2).sqrt()) / 2)
        moved = (new - w).abs().amax(0)
        ahead = new + torch.where(restart, 0.0, (t - 1) / t_new) * (new - w)
        w, t = new, t_new
        if bool((moved <= tol * w.abs().amax(0)).all()):
            return w
    raise DataError("The LASSO has not converged after 2,000 steps; raise its penalties or `tol`.")


@dataclass(frozen=True)
class LassoDatamodel:
    """Fitted LASSO datamodels.

    Attributes:
        weights: sparse (n_train, n_points * n_classes).
        mean_mask: (n_train,).
        mean_output: (n_points, n_classes).
        shares: the penalty chosen for each target, as a share of the one that leaves no weight (n_points, n_classes).
    """

    weights: csr_array
    mean_mask: np.ndarray
    mean_output: np.ndarray
    shares: np.ndarray

    def respond(self, directions: np.ndarray) -> np.ndarray:
        """W^T d (k, n_points, n_classes) for each row d of (k, n_train)."""
        return (np.asarray(directions, np.float32) @ self.weights).reshape(-1, *self.mean_output.shape)

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted change of logits (n_points, n_classes) on retraining without F; raises ForgetSetError."""
        return self.effects([forget])[0]

    def effects(self, forget_sets: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """`effect` of several forget sets (k, n_points, n_classes)."""
        indicators = np.zeros((len(forget_sets), len(self.mean_mask)), np.float32)
        for row, forget in zip(indicators, forget_sets, strict=True):
            row[check_forget_indices(forget, len(row))] = 1
        return -self.respond(indicators)

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predicted logits (k, n_points, n_classes) of models trained on the given masks (k, n_train)."""
        return self.mean_output + self.respond(masks - self.mean_mask)


@register("lasso")
def lasso(
    context: Context, shares: Sequence[float] = SHARES, held_out: float = 0.1, tol: float = 1e-3
) -> LassoDatamodel:
    """Fit LASSO datamodels; of several penalties each target takes the one of least error on held-out subsets.

    A step costs n_train^2 x n_targets multiplications, and a fit some tens of steps a penalty.

    Args:
        context: of masks and outputs; no weights are needed.
        shares: of the penalty that leaves no weight, in (0, 1), tried in this order.
        held_out: share of the subset models that chooses among several penalties, before a fit to all of them.
        tol: see `solve`.

    Raises:
        DataError: for shares or a held-out part that cannot be used, or no convergence.
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise DataError(f"The LASSO's shares are {tuple(shares)}; give numbers between 0 and 1.")
    m = len(context.masks)
    n_held = max(1, round(held_out * m)) if len(shares) > 1 else 0
    if not (0 < held_out < 1 and m - n_held > 1):
        raise DataError(f"held_out={held_out} of {m} subset models was asked for; leave at least two to fit to.")
    a, mean_mask = _centre(torch.from_numpy(context.masks.astype(np.float32)).to(context.device))
    fitting, held = slice(m - n_held), slice(m - n_held, m)
    flat = int(np.prod(context.outputs.shape[1:]))
    outputs = np.asarray(context.outputs[:m], np.float32).reshape(m, flat)
    parts, means, chosen = [], [], []
    gram, gram_fitting = _gram(a), _gram(a[fitting])
    candidates = torch.tensor(shares, device=a.device)
    for first in range(0, flat, BLOCK):
        y, mean = _centre(torch.from_numpy(outputs[:, first : first + BLOCK]).to(a.device))
        best = torch.zeros(y.shape[1], dtype=torch.long, device=y.device)
        if n_held:
            correlation, a_mean, y_mean = _correlation(a[fitting], y[fitting])
            errors, w = [], None
            for share in candidates:
                w = solve(gram_fitting, correlation, share * correlation.abs().amax(0), w, tol)
                errors.append(((y[held] - y_mean - (a[held] - a_mean) @ w) ** 2).mean(0))
            best = torch.stack(errors).argmin(0)
        correlation, _, _ = _correlation(a, y)
        w = solve(gram, correlation, candidates[best] * correlation.abs().amax(0), None, tol)
        parts.append(csr_array(w.cpu().numpy()))
        means.append(mean.cpu().numpy())
        chosen.append(candidates[best].cpu().numpy())
    row = context.outputs.shape[1:]
    return LassoDatamodel(
        csr_array(hstack(parts, format="csr")),
        mean_mask.cpu().numpy(),
        np.concatenate(means).reshape(row),
        np.concatenate(chosen).reshape(row),
    )


def _centre(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(0)
    return rows - mean, mean


def _gram(a: Tensor) -> Tensor:
    a, _ = _centre(a)
    return a.T @ a / len(a)


def _correlation(a: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A^T Y / M of centred rows, and the means that they were centred with."""
    (a, a_mean), (y, y_mean) = _centre(a), _centre(y)
    return a.T @ y / len(a), a_mean, y_mean
