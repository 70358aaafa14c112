"""Linearised retraining: networks replaced by their gradients, and trained again without the forget set.

Around trained weights a network is nearly linear in its weights (Jacot et al., "Neural tangent kernel", NeurIPS 2018;
Fort et al., "Deep learning versus kernel learning", NeurIPS 2020). With phi_t the gradient of the margin of point t
there, retraining on S is a logistic regression:

    theta(S) = argmin  sum over i in S of log(1 + exp(-m_i)) + lam mean(diag K) / 2 |theta|^2,  m_t = m_0 + phi_t.theta,

with K the kernel of training points and m_0 = -log(C - 1) the margin of C equally likely classes; at margin m the
cross-entropy is just log(1 + exp(-m)). The effect of F is m(S without F) - m(S), averaged over some subset models.

That retrains from nothing, with features that know the answer. Every second model is retrained from where it is: m_0
are its own margins, and a constant pull, of the size and against the direction of its loss's gradient on its own
subset, holds theta = 0 there, as weight decay and the end of training do. So easy points pull by as little as they do
in the model. Neither is right: from nothing, the effect of points that are answered well is overstated; from the
trained weights, a group that leaves is held by what the model has learnt of it. Their mean errs less than either.
A single Newton step gives TRAK (Park et al., ICML 2023) or, with exact deletions, `attributors.kernel`. But the pull of
a point that is answered well vanishes exponentially: where the hardest examples of a class leave, the others resist
only once margins have moved far, which no single step sees.

Features are compressed to the leading directions of the kernel by a randomised Nystroem approximation (Halko et al.,
SIAM Review 2011; Gittens and Mahoney, JMLR 2016). All masks are solved for at once by L-BFGS (Nocedal, Math. of
Computation 1980), from the solution on all points and the inverse of its Hessian, in about twenty steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dmmlib.attribution import Context, register
from dmmlib.attributors.kernel import gram
from dmmlib.attributors.margins import MarginDatamodel, calibrated
from dmmlib.errors import DataError

RANK = 400
LAM = 0.007
STEEPEST = 0.25  # the logistic loss's second derivative is at most this
FLAT = 0.003  # and is taken to be at least this for a first guess: a point that turns difficult makes it rise
STEPS, MEMORY = 100, 5  # at most so many steps, and past steps that each is computed from
FARTHEST = 4.0  # no margin that is trained on moves further in a step
DONE, STILL = 0.001, 0.1  # training on all points, or a mask, is done if no margin moves by this in a step
CROWD = 0.75  # where fewer of the masks than this still move, the others are left out
BLOCK = 256  # masks at a time


@dataclass(frozen=True)
class Linearised:
    """One linearised model, trained on all training points."""

    features: Tensor  # phi (n_points, rank), training points first
    n_train: int
    penalty: float  # lam mean(diag K) / n_train, of the mean loss
    initial: Tensor  # m_0 (n_train,)
    pull: Tensor  # gradient of the linear term of the mean loss (rank,)
    weights: Tensor  # theta(S) (rank,)

    @classmethod
    def fit(cls, features: Tensor, n_train: int, penalty: float, initial: Tensor, pull: Tensor) -> Linearised:
        """Train on all training points."""
        start = cls(features, n_train, penalty, initial, pull, torch.zeros_like(pull))
        guess = torch.linalg.inv(start._hessian(STEEPEST))
        return replace(start, weights=start._descend(features.new_ones(1, n_train), guess, DONE)[0])

    def change(self, masks: np.ndarray) -> np.ndarray:
        """Change of margins (k, n_points) when trained on masks (k, n_train) instead of all points."""
        some = torch.as_tensor(np.asarray(masks, np.float32), device=self.features.device)
        weights = self._descend(torch.cat([some.new_ones(1, self.n_train), some]), self._inverse, STILL)
        margins = weights @ self.features.T
        return (margins[1:] - margins[0]).cpu().numpy()

    def influence(self) -> Tensor:
        """By how much one more training point raises each margin (n_train, n_points), to first order."""
        spread = self._rows @ torch.linalg.solve(self._hessian(0.0), self.features.T)
        return self._wrong[:, None] / self.n_train * spread

    def leverage(self, forget: np.ndarray) -> float:
        """Length, in the Hessian's metric, of the Newton step that takes the points `forget` out."""
        step = self._wrong[forget] @ self._rows[forget] / self.n_train
        return float((step @ self._inverse @ step).sqrt())

    @property
    def _rows(self) -> Tensor:
        """Features of the training points."""
        return self.features[: self.n_train]

    @property
    def _wrong(self) -> Tensor:
        """Probability (n_train,) of a wrong answer to each training point at `weights`: the pull that it exerts."""
        return torch.sigmoid(-(self.initial + self._rows @ self.weights))

    def _hessian(self, least: float) -> Tensor:
        """Of the mean loss at `weights` (rank, rank), with the second derivative of each point at least `least`."""
        p = self._wrong
        h = (self._rows.T * (p * (1 - p)).clamp_min(least)) @ self._rows / self.n_train
        h.diagonal().add_(self.penalty)
        return h

    @cached_property
    def _inverse(self) -> Tensor:
        """First guess of the Hessian's inverse (rank, rank) for training on a mask."""
        return torch.linalg.inv(self._hessian(FLAT))

    def _gradient(self, weights: Tensor, margins: Tensor, masks: Tensor) -> Tensor:
        """Of the mean loss on each mask (k, rank), at margins of training points (k, n_train)."""
        return self.penalty * weights - (masks * torch.sigmoid(-margins)) @ self._rows / self.n_train + self.pull

    def _descend(self, masks: Tensor, inverse: Tensor, still: float) -> Tensor:
        """Weights (k, rank) that L-BFGS finds for each mask (k, n_train) from `weights` and a first guess `inverse`."""
        rows, found = self._rows, self.weights.expand(len(masks), -1).clone()
        left, weights = torch.arange(len(masks), device=masks.device), found.clone()
        moving = left >= 0  # masks that are not done
        margins = self.initial + weights @ rows.T
        gradient = self._gradient(weights, margins, masks)
        gamma, memory = gradient.new_ones(len(masks), 1), list[tuple[Tensor, Tensor, Tensor]]()
        for _ in range(STEPS):
            step, alphas = gradient, list[Tensor]()
            for s, y, rho in reversed(memory):
                alphas.append(rho * _dot(s, step))
                step = step - alphas[-1] * y
            step = gamma * (step @ inverse)
            for (s, y, rho), alpha in zip(memory, reversed(alphas), strict=True):
                step = step + (alpha - rho * _dot(y, step)) * s
            rise = step @ rows.T
            length = (FARTHEST / (rise.abs() * masks).amax(1, keepdim=True).clamp_min(1e-9)).clamp_max(1)
            s, rise = -length * step, -length * rise
            weights, margins = weights + s, margins + rise
            found[left[moving]] = weights[moving]
            moving &= rise.abs().amax(1) >= still
            if not moving.any():
                break
            previous, gradient = gradient, self._gradient(weights, margins, masks)
            y = gradient - previous
            sy, yy = _dot(s, y), _dot(y @ inverse, y)
            curved = (sy > 0) & (yy > 0)  # where nothing moves any more, rounding has the word
            gamma = torch.where(curved, sy / yy, gamma)
            memory = [*memory[1 - MEMORY :], (s, y, torch.where(curved, 1 / sy, 0))]
            if moving.float().mean() < CROWD:
                memory = [(s[moving], y[moving], rho[moving]) for s, y, rho in memory]
                left, masks, weights, margins, gradient, gamma, moving = (
                    z[moving] for z in (left, masks, weights, margins, gradient, gamma, moving)
                )
        return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows (k, 1)."""
    return (a * b).sum(1, keepdim=True)


@dataclass(frozen=True)
class LinearisedResponse:
    """How margins respond to training points, averaged over linearised models."""

    models: tuple[Linearised, ...]

    @property
    def n_train(self) -> int:
        return self.models[0].n_train

    @cached_property
    def weights(self) -> np.ndarray:
        """`Linearised.influence` (n_train, n_points), mean over models."""
        total = sum((model.influence() for model in self.models[1:]), self.models[0].influence())
        return (total / len(self.models)).cpu().numpy()

    def change(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict as `Response.change`; the noise is the variance over K models by K, mean over masks.

        Takes, for each model and step, four products of k x n_train x rank.
        """
        k, points = len(self.models), len(self.models[0].features)
        mean, squares = np.zeros((len(masks), points), np.float32), np.zeros(points)
        for model in self.models:
            change = np.concatenate([model.change(masks[at : at + BLOCK]) for at in range(0, len(masks), BLOCK)])
            mean += change / k
            squares += change.var(0) / k
        return mean, (squares - mean.var(0)).clip(0) / max(k - 1, 1)

    def leverage(self, forget: np.ndarray) -> float:
        """`Linearised.leverage`, mean over models."""
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


def linearised_response(
    context: Context,
    lam: float = LAM,
    n_models: int | None = 20,
    rank: int = RANK,
    project: int | None = None,
    first: int = 0,
) -> LinearisedResponse:
    """Linearise the first n_models subset models of a context (all if None), in 4 n_models n_points rank bytes.

    Args:
        lam: penalty on the linearised weights, relative to the kernel's mean diagonal.
        rank: directions that features are compressed to.
        project: features that gradients are projected on before; needed for models of a million weights, see `gram`.
        first: of the models; those before it are left out.

    Raises DataError for a penalty, rank or number of models that is not positive, or a context without weights.
    """
    if not lam > 0:
        raise DataError(f"The penalty is lam={lam}; give a positive number, such as {LAM}.")
    if rank < 1 or (n_models is not None and n_models < 1):
        raise DataError(f"rank={rank} and n_models={n_models} were given; give at least 1 of each.")
    models, n, found = context.subset_models()[:n_models], context.n_train, list[Linearised]()
    margins = context.margins[: models.n_models, :n]
    for i in range(first, models.n_models):
        kernel = gram(models, i, context.x, context.y, context.seed, project)[:n]
        features, penalty = compressed(kernel, n, rank, context.seed), lam * float(kernel.diagonal().mean()) / n
        if i % 2:
            initial = torch.from_numpy(margins[i]).to(features)
            seen = torch.from_numpy(context.masks[i]).to(features)
            pull = (seen * torch.sigmoid(-initial)) @ features[:n] / n
        else:
            initial = features.new_full((n,), -float(np.log(context.n_classes - 1)))
            pull = features.new_zeros(features.shape[1])
        found.append(Linearised.fit(features, n, penalty, initial, pull))
    return LinearisedResponse(tuple(found))


@register("linearised", version=2)
def linearised(
    context: Context, lam: float = LAM, n_models: int | None = 20, rank: int = RANK, project: int | None = None
) -> MarginDatamodel:
    """Fit `linearised_response`, scaled to the margins of the context's subset models."""
    return calibrated(context, linearised_response(context, lam, n_models, rank, project))
