"""Linearised retraining: networks replaced by their gradients, and trained again without the forget set.

Around weights theta_0 a network's margins are linear in them: m_t = phi_t.theta, with phi_t the gradient of the margin
of point t at theta_0 (Jacot et al., "Neural tangent kernel", NeurIPS 2018; at weights that have been *trained* it fits
a network well: Fort et al., "Deep learning versus kernel learning", NeurIPS 2020). So retraining without F is a
logistic regression on fixed features, and needs no approximation from there on:

    theta(S) = argmin  sum over i in S of log(1 + exp(-m_i)) + lam mean(diag K) / 2 |theta|^2,
    m_t = m_0 + phi_t.theta,

with K the kernel of training points and m_0 = -log(C - 1) the margin where all C classes are equally likely: the
cross-entropy of a model with margin m is log(1 + exp(-m)) exactly. An effect is m(S without F) - m(S), mean over some
subset models' features.

One Newton step of this is TRAK (Park et al., ICML 2023), and with exact deletions `attribution.kernel`. But deletions
that matter are no small steps: a class whose hardest examples leave is pushed by nothing until margins have risen
severalfold, as the pull of a point that is answered well vanishes exponentially. Taking the loss as it is gets that
right; so does it give a group's effect, and what a point loses itself, without another formula.

Features are compressed to the leading `RANK` directions of the kernel (by a randomised Nystroem approximation: Halko,
Martinsson and Tropp, SIAM Review 2011; Gittens and Mahoney, JMLR 2016), so that a model with any number of weights
becomes a matrix (n_points, rank). All masks are solved for at once by gradient descent with momentum, from the solution
on all points and preconditioned by its Hessian; for 2,000 points the steps leave about a tenth of a change undone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dmmlib.attribution.base import Context, MarginDatamodel, calibrated, register
from dmmlib.attribution.kernel import gram
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError

RANK = 400
LAM = 0.007
FIRST, STEPS, MOMENTUM = 300, 60, 0.85  # steps on all points, and from there on each mask
STEEPEST = 0.25  # the logistic loss's second derivative is at most this
FLAT = 0.05  # and is taken to be at least this where it preconditions: a point that turns difficult makes it rise
BLOCK = 256  # masks at a time


@dataclass(frozen=True)
class Linearised:
    """One linearised model, trained on all training points.

    Attributes:
        features: phi (n_points, rank), training points first.
        penalty: lam mean(diag K) / n_train, of the mean loss.
        initial: m_0.
        weights: theta(S) (rank,).
    """

    features: Tensor
    n_train: int
    penalty: float
    initial: float
    weights: Tensor

    @classmethod
    def fit(cls, features: Tensor, n_train: int, penalty: float, initial: float) -> Linearised:
        """Train on all training points."""
        start = cls(features, n_train, penalty, initial, features.new_zeros(features.shape[1]))
        preconditioner = torch.linalg.inv(start._hessian(STEEPEST))
        weights = start._descend(features.new_ones(1, n_train), FIRST, preconditioner, STEEPEST)[0]
        return cls(features, n_train, penalty, initial, weights)

    def margins(self, weights: Tensor) -> Tensor:
        """Margins (k, n_points) at weights (k, rank)."""
        return self.initial + weights @ self.features.T

    def _hessian(self, least: float) -> Tensor:
        """Of the mean loss at `weights` (rank, rank), each point's second derivative at least so much."""
        rows, p = self._rows, self._wrong
        h = (rows.T * (p * (1 - p)).clamp_min(least)) @ rows / self.n_train
        h.diagonal().add_(self.penalty)
        return h

    @property
    def _rows(self) -> Tensor:
        """Features of the training points."""
        return self.features[: self.n_train]

    @property
    def _wrong(self) -> Tensor:
        """Probability (n_train,) at `weights` of not answering a training point rightly: the pull that it exerts."""
        return torch.sigmoid(-self.margins(self.weights)[: self.n_train])

    @cached_property
    def _preconditioner(self) -> Tensor:
        return torch.linalg.inv(self._hessian(FLAT))

    def trained(self, masks: Tensor) -> Tensor:
        """Weights (k, rank) trained on each mask (k, n_train), starting from `weights`."""
        return self._descend(masks, STEPS, self._preconditioner, FLAT)

    def _descend(self, masks: Tensor, steps: int, preconditioner: Tensor, least: float) -> Tensor:
        """Eigenvalues of the preconditioned Hessian are at most STEEPEST / least, for which this rate is stable."""
        rate = min(1.0, 0.9 * 2 * (1 + MOMENTUM) * least / STEEPEST)
        weights = self.weights.expand(len(masks), -1).clone()
        velocity = torch.zeros_like(weights)
        for _ in range(steps):
            pull = masks * torch.sigmoid(-(self.initial + weights @ self._rows.T))
            gradient = pull @ self._rows / self.n_train - self.penalty * weights
            velocity = MOMENTUM * velocity + gradient @ preconditioner
            weights += rate * velocity
        return weights

    def effects(self) -> Tensor:
        """By how much one more training point raises each margin (n_train, n_points), to first order."""
        spread = self._rows @ torch.linalg.solve(self._hessian(0.0), self.features.T)
        return self._wrong[:, None] / self.n_train * spread

    def leverage(self, forget: np.ndarray) -> float:
        """Length, in the metric of the preconditioner, of the Newton step that takes the points `forget` out."""
        step = self._wrong[forget] @ self._rows[forget] / self.n_train
        return float((step @ self._preconditioner @ step).sqrt())


@dataclass(frozen=True)
class LinearisedResponse:
    """How margins respond to training points, by the mean over linearised models."""

    models: tuple[Linearised, ...]

    @property
    def n_train(self) -> int:
        return self.models[0].n_train

    @cached_property
    def weights(self) -> np.ndarray:
        """`Linearised.effects`, mean over models."""
        total = sum((model.effects() for model in self.models[1:]), self.models[0].effects())
        return (total / len(self.models)).cpu().numpy()

    def change(self, masks: np.ndarray) -> np.ndarray:
        """Change of margins (k, n_points) of models trained on each mask of (k, n_train), against one trained on all.

        Takes, a model and step, four products of k x n_train x rank.
        """
        features = self.models[0].features
        out = np.empty((len(masks), len(features)), np.float32)
        for at in range(0, len(masks), BLOCK):
            some = torch.as_tensor(np.asarray(masks[at : at + BLOCK], np.float32), device=features.device)
            some = torch.cat([some.new_ones(1, self.n_train), some])
            total = torch.zeros(len(some), len(features), device=features.device)
            for model in self.models:
                total += model.margins(model.trained(some))
            out[at : at + BLOCK] = ((total[1:] - total[0]) / len(self.models)).cpu().numpy()
        return out

    def leverage(self, forget: np.ndarray) -> float:
        """`Linearised.leverage`, mean over models: how far the parameters move without the points `forget`."""
        return float(np.mean([model.leverage(forget) for model in self.models]))


def compressed(kernel: Tensor, n_train: int, rank: int, seed: int = 0) -> Tensor:
    """Features (n_points, rank) whose inner products are nearly the kernel's (n_train, n_points)."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, n_train)
    train = kernel[:, :n_train]
    start = torch.randn(n_train, min(n_train, rank + 20), generator=generator).to(kernel.device)
    basis = torch.linalg.qr(train @ torch.linalg.qr(train @ start)[0])[0]
    values, vectors = torch.linalg.eigh(basis.T @ train @ basis)
    values, vectors = values[-rank:].clamp_min(1e-6 * float(values[-1])), vectors[:, -rank:]
    return (kernel.T @ (basis @ vectors)) / values.sqrt()


def linearise(
    models: Ensemble,
    x: Tensor,
    y: Tensor,
    n_train: int,
    initial: float,
    lam: float = LAM,
    rank: int = RANK,
    seed: int = 0,
) -> tuple[Linearised, ...]:
    """Linearise each model of an ensemble, and train it on all training points.

    Args:
        models: at whose weights gradients are taken.
        x, y: all points (n_points, ...), training points first, and their labels.
        n_train: how many are training points.
        initial: m_0 of the module.
        lam: penalty on the linearised weights, relative to the kernel's mean diagonal.
        rank: directions that features are compressed to.
        seed: of the compression.
    """
    found = []
    for i in range(models.n_models):
        kernel = gram(models, i, x, y, seed)[:n_train]
        penalty = lam * float(kernel[:, :n_train].diagonal().mean()) / n_train
        found.append(Linearised.fit(compressed(kernel, n_train, rank, seed), n_train, penalty, initial))
    return tuple(found)


def linearised_response(
    context: Context, lam: float = LAM, n_models: int | None = 20, rank: int = RANK
) -> LinearisedResponse:
    """The response of a context's first subset models, linearised: 4 n_models n_points rank bytes.

    Raises:
        DataError: for a penalty, rank or number of models that is not positive, or a context without weights.
    """
    if not lam > 0:
        raise DataError(f"The penalty is lam={lam}; give a positive number, such as {LAM}.")
    if rank < 1 or (n_models is not None and n_models < 1):
        raise DataError(f"rank={rank} and n_models={n_models} were given; give at least 1 of each.")
    models = context.subset_models()[:n_models]
    initial = -float(np.log(context.n_classes - 1))
    return LinearisedResponse(
        linearise(models, context.x, context.y, context.n_train, initial, lam, rank, context.seed)
    )


@register("linearised", gram, linearised_response)
def linearised(context: Context, lam: float = LAM, n_models: int | None = 20, rank: int = RANK) -> MarginDatamodel:
    """Linearised retraining, scaled on the margins of the context's subset models.

    Args:
        context: with the weights of subset models.
        lam: penalty on the linearised weights, relative to the kernel's mean diagonal.
        n_models: of how many models' features, the first so many; all that there are if None.
        rank: directions that features are compressed to.

    Raises:
        DataError: as `linearised_response`.
    """
    return calibrated(context, linearised_response(context, lam, n_models, rank))
