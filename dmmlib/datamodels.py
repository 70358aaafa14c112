"""Ridge datamodels: predict a model's outputs from which points it was trained on.

One linear model an output, Y ~ mean + (A - mean) W, fitted on models of random subsets (Ilyas et al.,
"Datamodels", ICML 2022). W (train x target x class) is never built: with centred masks A and ridge penalty
lambda on A^T A / M,

    W = (A^T A / M + lambda I)^-1 A^T Y / M,

so that the sum of W_i over any forget set F, or the prediction for any mask, is one combination of the
*stored outputs*, Y^T v, with v = A (A^T A / M + lambda I)^-1 1_F / M; the same v is
(A A^T / M + lambda I)^-1 A 1_F / M, which is cheaper when M < n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from scipy.stats import rankdata
from torch import Tensor

from dmmlib.errors import DataError
from dmmlib.forget_sets import check_forget_indices
from dmmlib.metrics import Estimate, margins


class Attributor(Protocol):
    """Predicts how a model's logits change when a forget set is left out of its training."""

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted change of logits (n_points, n_classes) on retraining without the points `forget`."""
        ...


@dataclass(frozen=True)
class RidgeDatamodel:
    """A fitted ridge datamodel; see `fit`.

    Attributes:
        outputs: Y, the logits (M, n_points, n_classes) of the subset models: anything that slices to arrays
            along its first axis, in memory or on disk.
        mean_mask: share of subsets that hold each training point (n_train,).
        lam: ridge penalty on A^T A / M.
    """

    outputs: Any
    mean_mask: Tensor
    lam: float
    _masks: Tensor  # centred (M, n_train)
    _factor: Tensor  # Cholesky factor of A^T A / M + lam I, or of A A^T / M + lam I where M < n_train

    @classmethod
    def fit(cls, masks: np.ndarray, outputs: Any, lam: float, device: torch.device | str = "cpu") -> RidgeDatamodel:
        """Factorise once: O(min(M, n_train)^3); after that an effect costs one solve and one pass over Y.

        Args:
            masks: training sets of the subset models, bool (M, n_train).
            outputs: their logits (M, n_points, n_classes).
            lam: ridge penalty on A^T A / M, positive.

        Raises:
            DataError: for counts of models that differ or a penalty that is not positive.
        """
        if len(masks) != outputs.shape[0]:
            raise DataError(f"{len(masks)} masks but outputs of {outputs.shape[0]} models; give one mask a model.")
        if not lam > 0:
            raise DataError(f"The ridge penalty is {lam}; give a positive number, such as 0.1.")
        a = torch.from_numpy(np.ascontiguousarray(masks)).to(device, torch.float32)
        mean = a.mean(0)
        a -= mean
        gram = (a @ a.T if len(a) < a.shape[1] else a.T @ a) / len(a)
        gram.diagonal().add_(lam)
        return cls(outputs, mean, lam, a, torch.linalg.cholesky(gram))

    @property
    def n_train(self) -> int:
        return self._masks.shape[1]

    def weights(self, directions: np.ndarray) -> np.ndarray:
        """v of the module's formula for each direction d in place of 1_F.

        Args:
            directions: (k, n_train), e.g. indicator vectors.

        Returns:
            (M, k), such that W^T d = Y^T v.
        """
        d = torch.from_numpy(np.asarray(directions, np.float32)).to(self._masks.device).T
        m = len(self._masks)
        if m < self.n_train:
            v = torch.cholesky_solve(self._masks @ d, self._factor) / m
        else:
            v = self._masks @ torch.cholesky_solve(d, self._factor) / m
        return v.cpu().numpy()

    def adjoint(self, u: np.ndarray) -> np.ndarray:
        """The transpose of `weights`: (k, n_train) for u (k, M)."""
        v = torch.from_numpy(np.asarray(u, np.float32)).to(self._masks.device).T
        m = len(self._masks)
        if m < self.n_train:
            d = self._masks.T @ torch.cholesky_solve(v, self._factor) / m
        else:
            d = torch.cholesky_solve(self._masks.T @ v, self._factor) / m
        return d.T.cpu().numpy()

    def combine(self, weights: np.ndarray) -> np.ndarray:
        """Y^T v (k, n_points, n_classes) for weights v (M, k): one pass over the stored outputs."""
        m, *row = self.outputs.shape
        total = np.zeros((weights.shape[1], int(np.prod(row))), np.float32)
        block = m if isinstance(self.outputs, np.ndarray) else 500
        for first in range(0, m, block):
            rows = np.asarray(self.outputs[first : first + block], np.float32)
            total += weights[first : first + block].T @ rows.reshape(len(rows), -1)
        return total.reshape(-1, *row)

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted change of logits (n_points, n_classes) on retraining without F: minus the sum of W_i.

        Raises:
            ForgetSetError: for indices that are no proper part of the training set.
        """
        return self.effects([forget])[0]

    def effects(self, forget_sets: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """`effect` of several forget sets in one pass over the outputs: (k, n_points, n_classes)."""
        indicators = np.zeros((len(forget_sets), self.n_train), np.float32)
        for row, forget in zip(indicators, forget_sets, strict=True):
            row[check_forget_indices(forget, self.n_train)] = 1
        return -self.combine(self.weights(indicators))

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predicted logits (k, n_points, n_classes) of models trained on the given masks (k, n_train)."""
        v = self.weights(np.asarray(masks, np.float32) - self.mean_mask.cpu().numpy())
        return self.combine(v + 1 / len(v))  # adding 1/M adds the mean output


def lds(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Linear datamodelling score of each point (Park et al., "TRAK", ICML 2023).

    Args:
        predicted, actual: margins (n_subsets, n_points) of held-out subset models.

    Returns:
        Spearman rank correlation over subsets (n_points,), in [-1, 1]; 0 where either is constant.
    """
    if predicted.shape != actual.shape or len(predicted) < 3:
        raise DataError(
            f"Predicted margins have shape {predicted.shape} and actual ones {actual.shape}; give the same "
            "shape, with at least 3 subsets."
        )
    ranks = [rankdata(m, axis=0) for m in (predicted, actual)]
    centred = [r - r.mean(0) for r in ranks]
    norm = np.prod([np.sqrt((c**2).sum(0)) for c in centred], axis=0)
    return np.where(norm > 0, (centred[0] * centred[1]).sum(0) / np.maximum(norm, 1e-12), 0.0)


def lds_estimate(predicted: np.ndarray, actual: np.ndarray, n_bootstrap: int = 100, seed: int = 0) -> Estimate:
    """Mean LDS over points, with a 95 % interval that resamples the held-out subsets.

    Ranks with ties, as a resample has them, shrink a correlation slightly, so the interval is the estimate
    +- 1.96 bootstrap standard errors.
    """
    rng = np.random.default_rng(seed)
    ranks = [rankdata(m, axis=0) for m in (predicted, actual)]

    def score(rows: np.ndarray) -> float:
        a, b = (r[rows] - r[rows].mean(0) for r in ranks)
        norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
        return float(((a * b).sum(0) / np.maximum(norm, 1e-12)).mean())

    value = float(lds(predicted, actual).mean())
    n = len(predicted)
    error = 1.96 * float(np.std([score(rng.integers(0, n, n)) for _ in range(n_bootstrap)], ddof=1))
    return Estimate(value, value - error, value + error)


def choose_lambda(
    masks: np.ndarray,
    outputs: Any,
    held_out_masks: np.ndarray,
    held_out_logits: np.ndarray,
    labels: np.ndarray,
    candidates: Sequence[float],
    device: torch.device | str = "cpu",
) -> tuple[float, dict[float, float]]:
    """The ridge penalty with the best mean LDS on held-out subsets.

    Returns:
        The best candidate, and the mean LDS of each.
    """
    actual = margins(held_out_logits, labels)
    scores = {}
    for lam in candidates:
        predicted = RidgeDatamodel.fit(masks, outputs, lam, device).predict(held_out_masks)
        scores[lam] = float(lds(margins(predicted, labels), actual).mean())
    return max(scores, key=lambda lam: scores[lam]), scores


def principal_loadings(model: RidgeDatamodel, train_margins: np.ndarray, n_components: int) -> np.ndarray:
    """Loadings of the training points on the principal components of the train x train datamodel matrix.

    Row j of that matrix is how every training point acts on the margin of point j, so a component is a
    direction over training points *as influences*: points with large loadings act together. The matrix is
    used through its products only and never built.

    Args:
        model: fitted on the subset models that `train_margins` comes from.
        train_margins: margins (M, n_train) of the subset models on the training points.
        n_components: how many, below n_train.

    Returns:
        (n_train, n_components), component 1 first, each of length 1. The sign, which PCA leaves open, is
        such that the largest loading in absolute value is positive.
    """
    n = model.n_train
    y = train_margins.astype(np.float32)
    y = y - y.mean(1, keepdims=True)  # centres the rows of the matrix: subtracts the mean over points j

    def rows(d: np.ndarray) -> np.ndarray:
        return y.T @ model.weights(d.reshape(1, -1))[:, 0]

    def columns(r: np.ndarray) -> np.ndarray:
        return model.adjoint((y @ r.reshape(-1).astype(np.float32))[None])[0]

    operator = LinearOperator((n, n), matvec=rows, rmatvec=columns, dtype=np.float32)
    start = np.random.default_rng(0).normal(size=n).astype(np.float32)
    _, s, vt = svds(operator, k=n_components, v0=start, solver="arpack")
    loadings = vt[np.argsort(-s)].T
    return loadings * np.sign(np.take_along_axis(loadings, np.abs(loadings).argmax(0)[None], 0))
