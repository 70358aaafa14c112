"""Ridge datamodels: predict a model's outputs from which points it was trained on.

Each output has a linear model, Y ~ mean + (A - mean) W, fitted on models of random subsets (Ilyas et al.,
"Datamodels", ICML 2022). W (train x target x class) is never built: with centred masks A and ridge penalty
lambda on A^T A / M,

    W = (A^T A / M + lambda I)^-1 A^T Y / M,

so that the sum of W_i over any forget set F, or the prediction for any mask, is one combination of the
*stored outputs*, Y^T v, with v = A (A^T A / M + lambda I)^-1 1_F / M; the same v is
(A A^T / M + lambda I)^-1 A 1_F / M, which is cheaper when M < n.

**Own weights.** What a training point does to itself is far more than what others do to it, so one penalty for
all weights shrinks just those that matter most on F. With penalty s lambda on the own weight W_jj of training
point j, 0 <= s <= 1, and lambda on all others, Sherman-Morrison gives, with H = (A^T A / M + lambda I)^-1 and W
the solution for s = 1,

    W'_j = W_j + H e_j c_j,    c_j = delta W_jj / (1 - delta H_jj),    delta = (1 - s) lambda,

so the sum over F gains (H 1_F)_j c_j at training point j, and nothing else changes.

**What is predicted** are changes in the margin gauge (`metrics.margin_gauge`): the label's logit is then the margin
that KLoM measures, and `retrained` puts a change back on a model's own logits. Outputs in that gauge are regressed as
they are; a datamodel of raw logits is turned into it by `Gauged`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from dmmlib.errors import DataError
from dmmlib.forget_sets import indicator
from dmmlib.metrics import Estimate, margin_gauge, right_logits

BLOCK = 1000  # subset models whose outputs are in memory at a time
TOGETHER = 2**28  # numbers that factors and inverses of one pass may take

Indices = Sequence[int] | np.ndarray


class Attributor(ABC):
    """Predicts how a model's logits, in the margin gauge, depend on which points it is trained on.

    Subclasses say `effects` and `predict`; the rest has defaults that may be bettered.

    >>> class Nothing(Attributor):
    ...     def effects(self, forget_sets): return np.zeros((len(forget_sets), 5, 2))
    ...     def predict(self, masks): return np.zeros((len(masks), 5, 2))
    >>> Nothing().effect([0, 1]).shape
    (5, 2)
    """

    @abstractmethod
    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        """Predict the change of logits on retraining without each forget set: (k, n_points, n_classes).

        Raises:
            ForgetSetError: for indices that are no proper part of the training set.
        """

    @abstractmethod
    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predict the logits (k, n_points, n_classes) of models trained on the masks (k, n_train)."""

    def effect(self, forget: Indices) -> np.ndarray:
        """`effects` of one forget set: (n_points, n_classes)."""
        return self.effects([forget])[0]

    def retrained(self, logits: np.ndarray, forget: Indices, labels: np.ndarray) -> np.ndarray:
        """Predict the logits of models retrained without F from theirs, both (n_models, n_points, n_classes)."""
        return retrained(logits, self.effect(forget), labels)

    def sd(self, forget: Indices) -> np.ndarray | None:
        """Standard deviation (n_points,) of the predicted change of each margin; None where it is not known."""
        return None

    def left_out(self) -> np.ndarray | None:
        """By how much the margins (M, n_points) of fitted models miss what the others predict; None if not known."""
        return None

    def leverage(self, forget: Indices) -> float | None:
        """How far weights move without F, up to a constant factor; None where it is not known."""
        return None


def retrained(logits: np.ndarray, effect: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Predict the logits of models retrained without F from theirs: (n_models, n_points, n_classes), float32.

    The change, of `Attributor.effect`, is added in the margin gauge, so that the margin moves by just the change of
    the label's logit; each model keeps the common mode of its logits, which no probability depends on.
    """
    right = np.arange(logits.shape[-1]) == np.asarray(labels)[:, None]
    before, effect = margin_gauge(logits, labels), np.asarray(effect, np.float32)
    if effect.shape != logits.shape[1:] or not np.isfinite(effect).all():
        given = f"of shape {effect.shape}" if effect.shape != logits.shape[1:] else "that hold NaN or infinity"
        raise DataError(f"The attributor predicts changes {given}; it is to give finite ones of {logits.shape[1:]}.")
    moved = before + effect
    wrong = logsumexp(np.where(right, -np.inf, moved), axis=-1, keepdims=True)
    return np.asarray(logits, np.float32) - before + np.where(right, moved, moved - wrong)


@dataclass(frozen=True)
class RidgeDatamodel(Attributor):
    """A fitted ridge datamodel; see `fit`.

    >>> masks = np.random.default_rng(0).random((50, 4)) < 0.5
    >>> model = RidgeDatamodel.fit(masks, masks[:, :, None] * np.ones(2), lam=1e-4)  # point i answers 1 if it was seen
    >>> model.effect([3])[:, 0].round(2) + 0.0
    array([ 0.,  0.,  0., -1.], dtype=float32)
    """

    outputs: Any  # Y (M, n_points, n_classes), in memory or on disk: `BLOCK` models are sliced from it at a time
    mean_mask: Tensor  # share of subsets that hold each training point (n_train,)
    lam: float
    _masks: Tensor  # centred (M, n_train)
    _factor: Tensor  # Cholesky factor of A^T A / M + lam I, or of A A^T / M + lam I where M < n_train
    own_share: float = 1.0
    _own: np.ndarray | None = None  # c (n_train, n_classes), where own_share < 1

    @classmethod
    def fit(
        cls, masks: np.ndarray, outputs: Any, lam: float, device: torch.device | str = "cpu", own_share: float = 1.0
    ) -> RidgeDatamodel:
        """Factorise once: O(min(M, n_train)^3); after that an effect costs one solve and one pass over Y.

        Args:
            masks: training sets of the subset models, bool (M, n_train).
            outputs: their logits (M, n_points, n_classes): anything that slices to arrays along its first axis.
            lam: ridge penalty on A^T A / M, positive.
            own_share: s in [0, 1]; below 1 the first n_train points of the outputs must be the training
                points, and fitting takes O(M n_train^2) more.

        Raises:
            DataError: for counts of models that differ, masks that are all alike, or a penalty or share out of range.
        """
        return cls.fit_all(masks, outputs, [(lam, own_share)], device)[0]

    @classmethod
    def fit_all(
        cls,
        masks: np.ndarray,
        outputs: Any,
        settings: Sequence[tuple[float, float]],
        device: torch.device | str = "cpu",
    ) -> list[RidgeDatamodel]:
        """`fit` with each (lam, own_share), in one pass over the outputs; `together` says how many fit into memory."""
        masks = np.asarray(masks)
        if masks.ndim != 2 or not hasattr(outputs, "shape"):
            given = f"Masks have shape {masks.shape} and outputs are a {type(outputs).__name__}"
            raise DataError(f"{given}; give arrays (M, n_train) and (M, n_points, n_classes).")
        if len(masks) != outputs.shape[0]:
            raise DataError(f"{len(masks)} masks but outputs of {outputs.shape[0]} models; give one mask per model.")
        check_varying(masks)
        for lam, own_share in settings:
            if not isinstance(lam, Real) or not 0 < lam < np.inf:
                raise DataError(f"The ridge penalty is {lam}; give a positive number, such as 0.1.")
            if not 0 <= own_share <= 1:
                raise DataError(f"own_share is {own_share}; give a number from 0 to 1 (1 is plain ridge).")
        a = torch.from_numpy(np.array(masks, np.float32)).to(device)
        mean = a.mean(0)
        a -= mean
        gram = (a @ a.T if len(a) < a.shape[1] else a.T @ a) / len(a)
        n, plain, varied = a.shape[1], dict[float, RidgeDatamodel](), a.abs().amax(0).cpu().numpy() > 0
        for lam in {lam for lam, _ in settings}:
            penalised = gram.clone()
            penalised.diagonal().add_(lam)
            plain[lam] = cls(outputs, mean, lam, a, torch.linalg.cholesky(penalised))
        inverses = {
            lam: plain[lam]._inverse(np.eye(n, dtype=np.float32)) for lam in {x for x, own in settings if own < 1}
        }
        totals = {lam: np.zeros((n, outputs.shape[2]), np.float32) for lam in inverses}  # W_jj
        for rows in _blocks(outputs, 100) if inverses else ():
            block = np.asarray(outputs[rows], np.float32)[:, :n]
            for lam, inverse in inverses.items():
                v = (a[rows] @ torch.from_numpy(inverse).to(device) / len(a)).cpu().numpy()
                totals[lam] += np.einsum("mj,mjc->jc", v, block)

        def made(lam: float, own_share: float) -> RidgeDatamodel:
            if own_share == 1:
                return plain[lam]
            delta = (1 - own_share) * lam
            left = np.where(varied, 1 - delta * np.diag(inverses[lam]), 1)  # totals are 0 where nothing varies
            own = delta * totals[lam] / left[:, None]
            return replace(plain[lam], own_share=own_share, _own=own)

        return [made(*setting) for setting in settings]

    @property
    def n_train(self) -> int:
        return self._masks.shape[1]

    def _columns(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(rows, np.float32)).to(self._masks.device).T

    def _solve(self, columns: Tensor) -> Tensor:
        return torch.cholesky_solve(columns, self._factor)

    @property
    def _few(self) -> bool:  # the factor is then of A A^T / M + lambda I
        return len(self._masks) < self.n_train

    def weights(self, directions: np.ndarray) -> np.ndarray:
        """Solve for v (M, k) with W^T d = Y^T v: the module's formula, with each row d of (k, n_train) as 1_F."""
        a, d = self._masks, self._columns(directions)
        return ((self._solve(a @ d) if self._few else a @ self._solve(d)) / len(a)).cpu().numpy()

    def _inverse(self, directions: np.ndarray) -> np.ndarray:
        """(A^T A / M + lambda I)^-1 d for each row d of (k, n_train)."""
        a, d = self._masks, self._columns(directions)
        solved = (d - a.T @ self._solve(a @ d) / len(a)) / self.lam if self._few else self._solve(d)
        return solved.T.cpu().numpy()

    def respond(self, directions: np.ndarray, mean: float = 0.0) -> np.ndarray:
        """W^T d (k, n_points, n_classes) for each row d of (k, n_train), plus `mean` times the mean output."""
        return responses([self], directions, mean)[0]

    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        """Predict the change of logits without each forget set, minus the sum of W_i, in one pass over the outputs."""
        return effects_of([self], forget_sets)[0]

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predict the logits (k, n_points, n_classes) of models trained on the masks (k, n_train)."""
        masks = np.asarray(masks, np.float32)
        if masks.ndim != 2 or masks.shape[1] != self.n_train:
            raise DataError(f"Masks have shape {masks.shape}; give (k, {self.n_train}).")
        return self.respond(masks - self.mean_mask.cpu().numpy(), mean=1.0)


def together(settings: Sequence[tuple[float, float]], m: int, n: int) -> list[Sequence[tuple[float, float]]]:
    """Settings (lam, own_share) in groups whose factors and inverses for masks (m, n) take at most 1 GiB."""
    k = max(1, TOGETHER // (n**2 + min(m, n) ** 2))
    return [settings[i : i + k] for i in range(0, len(settings), k)]


def responses(models: Sequence[RidgeDatamodel], directions: np.ndarray, mean: float = 0.0) -> list[np.ndarray]:
    """`RidgeDatamodel.respond` of each of some models of the same outputs, in one pass over these."""
    outputs, k = models[0].outputs, len(directions)
    weights = np.concatenate([model.weights(directions) for model in models], 1) + mean / outputs.shape[0]
    total = np.zeros((weights.shape[1], int(np.prod(outputs.shape[1:]))), np.float32)
    for rows in _blocks(outputs, BLOCK):  # nothing else holds a block, so that there is one at a time
        total += weights[rows].T @ np.asarray(outputs[rows], np.float32).reshape(rows.stop - rows.start, -1)
    check_finite(total)
    found = np.split(total.reshape(-1, *outputs.shape[1:]), range(k, len(total), k))
    for model, response in zip(models, found, strict=True):
        if model._own is not None:
            response[:, : model.n_train] += model._inverse(directions)[:, :, None] * model._own
    return found


def effects_of(models: Sequence[RidgeDatamodel], forget_sets: Sequence[Indices]) -> list[np.ndarray]:
    """`Attributor.effects` of each of some models of the same outputs, in one pass over these."""
    return [-z for z in responses(models, np.stack([indicator(f, models[0].n_train) for f in forget_sets]))]


def _blocks(outputs: Any, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, outputs.shape[0])) for i in range(0, outputs.shape[0], size))


@dataclass(frozen=True)
class Gauged(Attributor):
    """A datamodel of raw logits as an attributor.

    Its change of logits is added to each model's own, as the paper does. So the margin of each bends as it does where a
    class overtakes another, which the margin's own linear datamodel cannot see; but noise of every logit enters it.
    In the margin gauge, which is the same for all models, it predicts the mean change over some originals.
    """

    model: RidgeDatamodel
    logits: np.ndarray  # of some originals (n_models, n_points, n_classes)
    labels: np.ndarray
    known: Mapping[tuple[int, ...], np.ndarray] = field(default_factory=dict)  # forget sets, whose effect is at hand

    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        """Predict the mean change over the originals, in the margin gauge."""
        before, changes = margin_gauge(self.logits, self.labels), self.model.effects(forget_sets)
        return np.stack([(margin_gauge(self.logits + z, self.labels) - before).mean(0) for z in changes])

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predict the logits of models trained on the masks, in the margin gauge."""
        return margin_gauge(self.model.predict(masks), self.labels)

    def retrained(self, logits: np.ndarray, forget: Indices, labels: np.ndarray) -> np.ndarray:
        """Add the predicted change of raw logits to each model's own."""
        known = self.known.get(tuple(forget))
        return np.asarray(logits + (self.model.effect(forget) if known is None else known), np.float32)


def check_finite(outputs: np.ndarray) -> None:
    """Raise DataError for outputs of subset models, or sums of these, that are not finite."""
    if not np.isfinite(outputs).all():
        raise DataError("Outputs of subset models hold NaN or infinity; train those models anew, or leave them out.")


def check_varying(masks: np.ndarray) -> None:
    """Raise DataError if all masks are alike: nothing can be learnt of a point that all models saw, or none."""
    if len(masks) and (np.asarray(masks) == masks[0]).all():
        raise DataError(f"All {len(masks)} masks are alike and tell nothing of a training point; give random subsets.")


def lds(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Linear datamodelling score of each point (Park et al., "TRAK", ICML 2023), in [-1, 1].

    >>> actual = np.array([[1.0, 5.0], [2.0, 4.0], [4.0, 1.0]])
    >>> lds(actual**3, actual), lds(-actual, actual)
    (array([1., 1.]), array([-1., -1.]))

    It is the Spearman rank correlation of margins (n_subsets, n_points) of held-out subset models over subsets; 0
    where either is constant.

    Raises:
        DataError: for shapes that differ, fewer than 3 subsets, or a model whose margins are not finite.
    """
    predicted, actual = np.asarray(predicted), np.asarray(actual)
    if predicted.shape != actual.shape or predicted.ndim != 2 or len(predicted) < 3:
        raise DataError(
            f"Predicted margins have shape {predicted.shape} and actual ones {actual.shape}; give both as "
            "(n_subsets >= 3, n_points)."
        )
    for name, m in (("Predicted", predicted), ("Actual", actual)):
        bad = np.flatnonzero(~np.isfinite(m).all(1))
        if len(bad):
            where = f"{name} margins of model {bad[0]} are NaN or infinite"
            raise DataError(f"{where} ({len(bad)} such models); drop them.")
    return _correlation(*map(_ranks, (predicted, actual)))


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each column; 0 where either is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(norm > 0, (a * b).sum(0) / np.maximum(norm, 1e-12), 0.0)


def _ranks(margins: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata  # a fifth of what it takes to import the library, and few processes need it

    return rankdata(margins, axis=0)


def lds_estimate(predicted: np.ndarray, actual: np.ndarray, n_bootstrap: int = 100, seed: int = 0) -> Estimate:
    """Mean LDS over points, with a 95 % interval that resamples the held-out subsets.

    Ranks with ties, as a resample has them, shrink a correlation slightly, so the interval is the estimate
    +- 1.96 bootstrap standard errors.
    """
    value, n, rng = float(lds(predicted, actual).mean()), len(predicted), np.random.default_rng(seed)
    ranks = [*map(_ranks, (predicted, actual))]
    draws = [rng.integers(0, n, n) for _ in range(n_bootstrap)]
    scores = [float(_correlation(*(r[rows] for r in ranks)).mean()) for rows in draws]
    return Estimate.normal(value, np.std(scores, ddof=1))


def choose_lambda(
    masks: np.ndarray,
    outputs: Any,
    held_out_masks: np.ndarray,
    held_out_logits: np.ndarray,
    labels: np.ndarray,
    candidates: Sequence[float],
    device: torch.device | str = "cpu",
) -> tuple[float, dict[float, float]]:
    """Choose the ridge penalty of best mean LDS on held-out subsets, in the margin gauge; also the LDS of each."""
    actual, scores = right_logits(held_out_logits, labels), dict[float, float]()
    for settings in together([(lam, 1.0) for lam in candidates], *masks.shape):
        models = RidgeDatamodel.fit_all(masks, outputs, settings, device)
        directions = np.asarray(held_out_masks, np.float32) - models[0].mean_mask.cpu().numpy()
        for model, predicted in zip(models, responses(models, directions, mean=1.0), strict=True):
            scores[model.lam] = float(lds(right_logits(predicted, labels), actual).mean())
    return max(scores, key=lambda lam: scores[lam]), scores
