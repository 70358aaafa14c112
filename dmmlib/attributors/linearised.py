"""Linearised retraining: networks replaced by their gradients, and trained again without the forget set.

Around trained weights a network is nearly linear in its weights (Jacot et al., "Neural tangent kernel", NeurIPS 2018;
Fort et al., "Deep learning versus kernel learning", NeurIPS 2020). With J_t the gradients of the logits of point t
there, retraining on S is a softmax regression:

    theta(S) = argmin  sum over i in S of -log softmax(z_i)[y_i] + lam mean(diag K) / 2 |theta|^2,
    z_t = z_0t + J_t theta,

with K the kernel of training points' margins, and z_0 that of equally likely classes. The effect of F is how the
margins of z change from theta(S) to theta(S without F), averaged over some subset models. Of each point the `n_logits`
classes that it has most to do with, its own and the likeliest wrong ones, have logits of their own; the others keep
their shares among themselves. With n_logits = 1 the margin itself is linear, and retraining is a logistic regression;
then what stands second cannot change, which overstates what a group of one label, or of wrong labels, does to others.

That retrains from nothing, with features that know the answer. Every second model is retrained from where it is: z_0
are its own logits, and a constant pull, of the size and against the direction of its loss's gradient on its own
subset, holds theta = 0 there, as weight decay and the end of training do. So easy points pull by as little as they do
in the model. Neither is right: from nothing, the effect of points that are answered well is overstated; from the
trained weights, a group that leaves is held by what the model has learnt of it. Their mean errs less than either.
A single Newton step gives TRAK (Park et al., ICML 2023) or, with exact deletions, `attributors.kernel`. But the pull of
a point that is answered well vanishes exponentially: where the hardest examples of a class leave, the others resist
only once margins have moved far, which no single step sees.

J is compressed to the leading directions of K by a randomised Nystroem approximation (Halko et al., SIAM Review 2011;
Gittens and Mahoney, JMLR 2016): at the weights, cross-entropy pulls along gradients of margins. All masks are solved
for at once by L-BFGS (Nocedal, Math. of Computation 1980), from the solution on all points and the inverse of its
Hessian, in about twenty steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from dmmlib.attribution import Context, register
from dmmlib.attributors.gradients import margin
from dmmlib.attributors.kernel import gradients_of, products
from dmmlib.attributors.margins import MarginDatamodel, calibrated

RANK = 400
LOGITS = 3
LAM = 0.007
STEEPEST = 0.25  # the logistic loss's second derivative is at most this
FLAT = 0.003  # and is taken to be at least this for a first guess: a point that turns difficult makes it rise
STEPS, MEMORY = 100, 5  # at most so many steps, and past steps that each is computed from
FARTHEST = 4.0  # no margin that is trained on moves further in a step
DONE, STILL = 0.001, 0.1  # training on all points, or a mask, is done if no logit moves by this in a step,
SHARE = 0.2  # and by this share of the way that logits have come, or small effects, above DONE, would not be followed
CROWD = 0.75  # where fewer of the masks than this still move, the others are left out
BLOCK = 256  # masks at a time


@dataclass(frozen=True)
class Linearised:
    """One linearised model, trained on all training points.

    Logits are those of a point's own class, then of the likeliest wrong ones, less that of the others together.
    """

    features: Tensor  # J (n_points, n_logits, rank), training points first
    n_train: int
    penalty: float  # lam mean(diag K) / n_train, of the mean loss
    initial: Tensor  # z_0 (n_points, n_logits)
    pull: Tensor  # gradient of the linear term of the mean loss (rank,)
    weights: Tensor  # theta(S) (rank,)

    @classmethod
    def fit(cls, features: Tensor, n_train: int, penalty: float, initial: Tensor, seen: Tensor | None) -> Linearised:
        """Train on all training points: from nothing, or held where the training points `seen` (n_train,) put it."""
        none = features.new_zeros(features.shape[2])
        start = cls(features, n_train, penalty, initial, none, none)
        if seen is not None:
            start = replace(start, pull=seen @ start._steps)
        guess = torch.linalg.inv(start._hessian(STEEPEST))
        return replace(start, weights=start._descend(features.new_ones(1, n_train), guess, DONE)[0])

    def change(self, masks: np.ndarray) -> np.ndarray:
        """Change of margins (k, n_points) when trained on masks (k, n_train) instead of all points."""
        some = torch.as_tensor(np.asarray(masks, np.float32), device=self.features.device)
        weights = self._descend(torch.cat([some.new_ones(1, self.n_train), some]), self._inverse, STILL)
        margins = _margins(self._answers(weights, self.n_points) + self.initial.T[:, None])
        return (margins[1:] - margins[0]).cpu().numpy()

    def influence(self) -> Tensor:
        """By how much one more training point raises each margin (n_train, n_points), to first order."""
        logits = (self.initial + self.features @ self.weights).T
        with torch.enable_grad():
            slopes = torch.autograd.grad(_margins(logits.requires_grad_()).sum(), logits)[0]
        rises = torch.einsum("ct,tcr->rt", slopes, self.features)
        return self._steps @ torch.linalg.solve(self._hessian(0.0), rises)

    def leverage(self, forget: np.ndarray) -> float:
        """Length, in the Hessian's metric, of the Newton step that takes the points `forget` out."""
        step = self._steps[forget].sum(0)
        return float((step @ self._inverse @ step).sqrt())

    @property
    def n_points(self) -> int:
        return len(self.features)

    @property
    def _logits(self) -> Tensor:
        """Of the training points (n_logits, n_train), at `weights`."""
        return (self.initial + self.features @ self.weights)[: self.n_train].T

    @property
    def _steps(self) -> Tensor:
        """Minus the gradient of each training point's share of the mean loss (n_train, rank)."""
        return torch.einsum("cn,ncr->nr", _pulls(self._logits), self.features[: self.n_train]) / self.n_train

    def _hessian(self, least: float) -> Tensor:
        """Of the mean loss at `weights` (rank, rank), with the probability of each class at least `least`."""
        p, j = _with_others(self._logits).softmax(0).clamp_min(least), self.features[: self.n_train]
        mean, rows = torch.einsum("cn,ncr->nr", p[:-1] / p.sum(0).sqrt(), j), j.flatten(0, 1)
        h = ((rows.T * p[:-1].T.flatten()) @ rows - mean.T @ mean) / self.n_train
        h.diagonal().add_(self.penalty)
        return h

    @cached_property
    def _inverse(self) -> Tensor:
        """First guess of the Hessian's inverse (rank, rank) for training on a mask."""
        return torch.linalg.inv(self._hessian(FLAT))

    def _answers(self, weights: Tensor, n: int) -> Tensor:
        """What weights (k, rank) add to the logits of the first n points (n_logits, k, n)."""
        return torch.stack([weights @ rows.T for rows in self.features[:n].unbind(1)])

    def _gradient(self, weights: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
        """Of the mean loss on each mask (k, rank), at logits of training points (n_logits, k, n_train)."""
        gradient = self.penalty * weights + self.pull
        for pulls, rows in zip(_pulls(logits) * masks, self.features[: self.n_train].unbind(1), strict=True):
            gradient.addmm_(pulls, rows, alpha=-1 / self.n_train)
        return gradient

    def _descend(self, masks: Tensor, inverse: Tensor, still: float) -> Tensor:
        """Weights (k, rank) that L-BFGS finds for each mask (k, n_train) from `weights` and a first guess `inverse`."""
        n, found = self.n_train, self.weights.expand(len(masks), -1).clone()
        left, weights = torch.arange(len(masks), device=masks.device), found.clone()
        moving, way = left >= 0, weights.new_zeros(len(masks))  # masks that are not done; how far logits have come
        logits = self._answers(weights, n) + self.initial[:n].T[:, None]
        gradient = self._gradient(weights, logits, masks)
        gamma, memory = gradient.new_ones(len(masks), 1), list[tuple[Tensor, Tensor, Tensor]]()
        for _ in range(STEPS):
            step, alphas = gradient, list[Tensor]()
            for s, y, rho in reversed(memory):
                alphas.append(rho * _dot(s, step))
                step = step - alphas[-1] * y
            step = gamma * (step @ inverse)
            for (s, y, rho), alpha in zip(memory, reversed(alphas), strict=True):
                step = step + (alpha - rho * _dot(y, step)) * s
            rise = self._answers(step, n)
            most = rise.abs().amax(0)
            length = (FARTHEST / (most * masks).amax(1, keepdim=True).clamp_min(1e-9)).clamp_max(1)
            s = -length * step
            weights, logits = weights + s, logits.addcmul_(length, rise, value=-1)
            found[left[moving]] = weights[moving]
            way = way + (moved := (length * most).amax(1))
            moving &= moved >= (SHARE * way).clamp(DONE, still)
            if not moving.any():
                break
            previous, gradient = gradient, self._gradient(weights, logits, masks)
            y = gradient - previous
            sy, yy = _dot(s, y), _dot(y @ inverse, y)
            curved = (sy > 0) & (yy > 0)  # where nothing moves any more, rounding has the word
            gamma = torch.where(curved, sy / yy, gamma)
            memory = [*memory[1 - MEMORY :], (s, y, torch.where(curved, 1 / sy, 0))]
            if moving.float().mean() < CROWD:
                memory, logits = [(s[moving], y[moving], rho[moving]) for s, y, rho in memory], logits[:, moving]
                left, masks, weights, gradient, gamma, way, moving = (
                    z[moving] for z in (left, masks, weights, gradient, gamma, way, moving)
                )
        return found


def _with_others(logits: Tensor) -> Tensor:
    """Logits (n_logits + 1, ...), those of the others together, 0, last."""
    return torch.cat([logits, logits.new_zeros(1, *logits.shape[1:])])


def _pulls(logits: Tensor) -> Tensor:
    """Minus the gradients of points' losses in their logits, both (n_logits, ...)."""
    pulls = -_with_others(logits).softmax(0)[:-1]
    pulls[0] += 1
    return pulls


def _margins(logits: Tensor) -> Tensor:
    """Of logits (n_logits, ...): the first less the log of the sum of all others' exponentials."""
    return logits[0] - _with_others(logits)[1:].logsumexp(0)


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
        k, points = len(self.models), self.models[0].n_points
        mean, squares = np.zeros((len(masks), points), np.float32), np.zeros(points)
        for model in self.models:
            change = np.concatenate([model.change(masks[at : at + BLOCK]) for at in range(0, len(masks), BLOCK)])
            mean += change / k
            squares += change.var(0) / k
        return mean, (squares - mean.var(0)).clip(0) / max(k - 1, 1)

    def leverage(self, forget: np.ndarray) -> float:
        """`Linearised.leverage`, mean over models."""
        return float(np.mean([model.leverage(forget) for model in self.models]))


def leading(kernel: Tensor, rank: int, seed: int = 0) -> Tensor:
    """Map (n_train, rank) that makes features of products with training points, from their kernel (n_train, n_train).

    Inner products of the features that it makes of the kernel's rows are nearly the kernel.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, len(kernel))
    start = torch.randn(len(kernel), min(len(kernel), rank + 20), generator=generator).to(kernel.device)
    basis = torch.linalg.qr(kernel @ torch.linalg.qr(kernel @ start)[0])[0]
    values, vectors = torch.linalg.eigh(basis.T @ kernel @ basis)
    values, vectors = values[-rank:].clamp_min(1e-6 * float(values[-1])), vectors[:, -rank:]
    return (basis @ vectors) / values.sqrt()


def likeliest(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Classes (n_points, n_classes) of each point, its own first, then by mean logits (n_points, n_classes)."""
    ranked = np.where(np.arange(outputs.shape[1]) == labels[:, None], np.inf, outputs)
    return np.argsort(-ranked, 1, kind="stable")


def against_others(logits: Tensor, order: Tensor, n_logits: int) -> Tensor:
    """Logits (n_points, n_logits) of the first classes in a point's order, less that of the others together."""
    sorted_ = logits.gather(1, order)
    return sorted_[:, :n_logits] - sorted_[:, n_logits:].logsumexp(1, keepdim=True)


@torch.no_grad()
def compressed(
    context: Context, i: int, order: Tensor, n_logits: int, rank: int, project: int | None
) -> tuple[Tensor, float]:
    """J of model i (n_points, n_logits, rank), and mean(diag K); points' classes in `order` (n_points, n_classes)."""
    models, x, n, seed, inputs = context.subset_models(), context.x, context.n_train, context.seed, dict[int, Tensor]()
    train = gradients_of(models, i, margin, x[:n], context.y[:n], seed, project)
    kernel = products(train, train)
    made = leading(kernel, rank, seed)

    def of_logit(j: int) -> Tensor:
        parts = gradients_of(models, i, lambda z, o: against_others(z, o, n_logits)[:, j], x, order, seed, project)
        return products(parts, train, inputs) @ made

    return torch.stack([of_logit(j) for j in range(n_logits)], 1), float(kernel.diagonal().mean())


def linearised_response(
    context: Context,
    lam: float = LAM,
    n_models: int | None = 20,
    rank: int = RANK,
    project: int | None = None,
    n_logits: int = LOGITS,
    first: int = 0,
) -> LinearisedResponse:
    """Linearise the first n_models subset models of a context (all if None).

    Takes 4 n_models n_points n_logits rank bytes; n_logits is at most one less than there are classes.

    Args:
        lam: penalty on the linearised weights, relative to the kernel's mean diagonal.
        rank: directions that features are compressed to.
        n_logits: of each point that are linear, for themselves.
        project: features that gradients are projected on before; needed for models of a million weights, see `gram`.
        first: of the models; those before it are left out.

    Raises DataError for a context without weights.
    """
    models, n, found = context.subset_models()[:n_models], context.n_train, list[Linearised]()
    outputs, n_logits = np.asarray(context.outputs[: len(context.masks)]), min(n_logits, context.n_classes - 1)
    order = torch.from_numpy(likeliest(outputs.mean(0), context.labels)).to(context.device)
    even = order.new_zeros(order.shape, dtype=torch.float32)
    for i in range(first, models.n_models):
        features, unit = compressed(context, i, order, n_logits, rank, project)
        logits = torch.from_numpy(outputs[i]).to(features) if i % 2 else even
        seen = torch.from_numpy(context.masks[i]).to(features) if i % 2 else None
        found.append(Linearised.fit(features, n, lam * unit / n, against_others(logits, order, n_logits), seen))
    return LinearisedResponse(tuple(found))


@register("linearised", version=3)
def linearised(
    context: Context,
    lam: PositiveFloat = LAM,
    n_models: PositiveInt | None = 20,
    rank: PositiveInt = RANK,
    project: PositiveInt | None = None,
    n_logits: PositiveInt = LOGITS,
) -> MarginDatamodel:
    """Fit `linearised_response`, scaled to the margins of the context's subset models."""
    return calibrated(context, linearised_response(context, lam, n_models, rank, project, n_logits))
