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
becomes a matrix (n_points, rank). All masks are solved for at once by L-BFGS (Nocedal, Math. of Computation 1980),
from the solution on all points and with the inverse of its Hessian as first guess: about twenty steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dmmlib.attribution.base import Context, MarginDatamodel, calibrated, register
from dmmlib.attribution.gradients import gram
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError

RANK = 400
LAM = 0.007
STEEPEST = 0.25  # the logistic loss's second derivative is at most this
FLAT = 0.003  # and is taken to be at least this for a first guess: a point that turns difficult makes it rise
STEPS, MEMORY = 100, 5  # at most so many steps, and gradients that one goes by
FARTHEST = 4.0  # no margin that is trained on moves further in a step
DONE, STILL = 0.001, 0.1  # training on all points, or a mask, is done if no margin moves by this in a step
CROWD = 0.75  # where fewer of the masks than this still move, the others are left out
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
        everything = features.new_ones(1, n_train)
        weights = start._descend(everything, torch.linalg.inv(start._hessian(STEEPEST)), DONE)[0]
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
    def _inverse(self) -> Tensor:
        """Of the Hessian of the mean loss at `weights` (rank, rank)."""
        return torch.linalg.inv(self._hessian(FLAT))

    def trained(self, masks: Tensor) -> Tensor:
        """Weights (k, rank) trained on each mask (k, n_train), starting from `weights`."""
        return self._descend(masks, self._inverse, STILL)

    def _descend(self, masks: Tensor, inverse: Tensor, still: float) -> Tensor:
        """L-BFGS of each mask; `inverse` (rank, rank) is its first guess of the Hessian's inverse."""
        rows, found = self._rows, self.weights.expand(len(masks), -1).clone()
        left, weights = torch.arange(len(masks), device=masks.device), found.clone()
        moving = left >= 0  # masks that are not done
        margins = self.initial + weights @ rows.T
        gradient = self._gradient(weights, margins, masks)
        scale, pairs = gradient.new_ones(len(masks), 1), list[tuple[Tensor, Tensor, Tensor]]()
        for _ in range(STEPS):
            step, shares = gradient, list[Tensor]()
            for moved, bent, per in reversed(pairs):
                shares.append(_dot(moved, step) * per)
                step = step - shares[-1] * bent
            step = step @ inverse * scale
            for (moved, bent, per), share in zip(pairs, reversed(shares), strict=True):
                step = step + moved * (share - _dot(bent, step) * per)
            rise = step @ rows.T
            part = (FARTHEST / (rise.abs() * masks).amax(1, keepdim=True).clamp_min(1e-9)).clamp_max(1)
            step, rise = -part * step, -part * rise
            weights, margins = weights + step, margins + rise
            found[left[moving]] = weights[moving]
            moving &= rise.abs().amax(1) >= still
            if not moving.any():
                break
            new = self._gradient(weights, margins, masks)
            bent, gradient = new - gradient, new
            product, length = _dot(step, bent), _dot(bent @ inverse, bent)
            curved = (product > 0) & (length > 0)  # where nothing moves any more, rounding has the word
            scale = torch.where(curved, product / length, scale)
            pairs = [*pairs[1 - MEMORY :], (step, bent, torch.where(curved, 1 / product, 0))]
            if moving.float().mean() < CROWD:
                pairs = [(moved[moving], bent[moving], per[moving]) for moved, bent, per in pairs]
                left, masks, weights, margins, gradient, scale, moving = (
                    z[moving] for z in (left, masks, weights, margins, gradient, scale, moving)
                )
        return found

    def _gradient(self, weights: Tensor, margins: Tensor, masks: Tensor) -> Tensor:
        """Of the mean loss on each mask (k, rank), at margins of training points (k, n_train)."""
        return self.penalty * weights - (masks * torch.sigmoid(-margins)) @ self._rows / self.n_train

    def change(self, masks: np.ndarray) -> np.ndarray:
        """Change of margins (k, n_points) when trained on each mask (k, n_train) instead of all points."""
        some = torch.as_tensor(np.asarray(masks, np.float32), device=self.features.device)
        margins = self.margins(self.trained(torch.cat([some.new_ones(1, self.n_train), some])))
        return (margins[1:] - margins[0]).cpu().numpy()

    def effects(self) -> Tensor:
        """By how much one more training point raises each margin (n_train, n_points), to first order."""
        spread = self._rows @ torch.linalg.solve(self._hessian(0.0), self.features.T)
        return self._wrong[:, None] / self.n_train * spread

    def leverage(self, forget: np.ndarray) -> float:
        """Length, in the Hessian's metric, of the Newton step that takes the points `forget` out."""
        step = self._wrong[forget] @ self._rows[forget] / self.n_train
        return float((step @ self._inverse @ step).sqrt())


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows (k, 1)."""
    return (a * b).sum(1, keepdim=True)


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
        return self.foresee(masks)[0]

    def foresee(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`change`, and the noise in it (n_points,): its variance over K models by K, mean over masks."""
        k, points = len(self.models), len(self.models[0].features)
        mean, squares = np.zeros((len(masks), points), np.float32), np.zeros(points)
        for model in self.models:
            change = np.concatenate([model.change(masks[at : at + BLOCK]) for at in range(0, len(masks), BLOCK)])
            mean += change / k
            squares += change.var(0) / k
        return mean, (squares - mean.var(0)).clip(0) / max(k - 1, 1)

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


@register("linearised")
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
