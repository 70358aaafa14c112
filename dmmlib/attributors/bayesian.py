"""Bayesian datamodels: what linearised retraining expects, corrected by what a hundred subset models show.

Each output y (a margin, or another logit in the margin gauge) of a model trained on a subset of centred mask a is

    y = mean + s (f - mean f) + a.w + noise,    w ~ N(0, rho sigma^2 C) + own,    noise ~ N(0, sigma^2):

- f is the change of the margin that `attributors.linearised` expects of that subset (0 for other logits), s its scale.
  As a mean over a few models f is noisy, which would shrink s where a random quarter of S is left out; so s is that of
  generalised least squares corrected for the noise (`attributors.margins.slope`);
- w corrects it, linearly in the mask. With W0 (n_train, n_points) the response's effects of single points, C = (1 -
  delta) W0 W0^T / n_points + delta times its diagonal, scaled to mean diagonal 1. By default delta = 1: points err
  independently, each in proportion to its effects;
- own: what a training point does to *itself* is far more than C allows for, and well seen, as some models have it and
  some have not; so the weight b_j a_j of training point j on its own outputs is free;
- rho maximises the evidence of all margins, with s, sigma^2 and b_j profiled out.

With R = rho A C A^T + I and F left out, the posterior mean of the change is

    s f(S without F) - rho (A C 1_F)^T R^-1 e - b_j [j in F],    e = Y - s f - b_j a_j  (centred),

and its variance is that of universal kriging (Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006,
sections 2.5 and 2.7): with q = A C 1_F and a = a_j,

    sigma^2 ( rho 1_F.C 1_F - rho^2 q^T R^-1 q + ([j in F] - rho a^T R^-1 q)^2 / a^T R^-1 a ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from dmmlib.attribution import Context, register
from dmmlib.attributors.linearised import LAM, LOGITS, RANK, linearised_response
from dmmlib.attributors.margins import Linear, MarginDatamodel, Response, of_label, slope
from dmmlib.datamodels import Attributor, Indices
from dmmlib.errors import DataError
from dmmlib.forget_sets import indicator
from dmmlib.metrics import right_logits

RHOS = np.geomspace(1e-4, 1e3, 29)


@dataclass(frozen=True)
class BayesianDatamodel(Attributor):
    """The posterior that `fit` finds, in the notation of the module.

    >>> from dmmlib.attribution import Context
    >>> masks = np.random.default_rng(0).random((40, 6)) < 0.75
    >>> outputs = masks[:, :, None] * np.array([1.0, 0.0])  # each point's margin is 1 if it was seen
    >>> context = Context(torch.zeros(6, 1), torch.zeros(6, dtype=torch.long), masks, outputs)
    >>> fit(context, np.eye(6, dtype=np.float32)).effect([2])[:, 0].round(2) + 0.0
    array([ 0.,  0., -1.,  0.,  0.,  0.], dtype=float32)
    """

    prior: MarginDatamodel  # s f, and the outputs of a model trained on all points
    cross: np.ndarray  # A C (M, n_train)
    coefficients: np.ndarray  # rho R^-1 e (M, n_points, n_classes)
    own: np.ndarray  # b (n_train, n_classes)
    covariance: np.ndarray  # C (n_train, n_train)
    precision: np.ndarray  # R^-1 on centred vectors (M, M)
    masks: np.ndarray  # A (M, n_train)
    mean_mask: np.ndarray  # by which masks are centred (n_train,)
    rho: float
    sigma: np.ndarray  # (n_points,) for each margin

    @property
    def n_train(self) -> int:
        return self.cross.shape[1]

    @property
    def scale(self) -> float:
        """s."""
        return self.prior.scale

    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        left_out = np.stack([indicator(forget, self.n_train) for forget in forget_sets])
        return self.prior.effects(forget_sets) - self._correction(left_out)

    def predict(self, masks: np.ndarray) -> np.ndarray:
        return self.prior.predict(masks) + self._correction(masks - self.mean_mask)

    def leverage(self, forget: Indices) -> float | None:
        return self.prior.leverage(forget)

    def sd(self, forget: Indices) -> np.ndarray:
        """Posterior standard deviation (n_points,), without what groups do beyond the sum of their points."""
        u = indicator(forget, self.n_train).astype(np.float64)
        q = self.masks @ (self.covariance @ u)
        pq = self.precision @ q
        common = self.rho * float(u @ self.covariance @ u) - self.rho**2 * float(q @ pq)
        variance = np.full(len(self.sigma), max(common, 0.0))
        missing = u - self.rho * self.masks.T @ pq
        variance[: self.n_train] += missing**2 / self._own_information[1]
        return self.sigma * np.sqrt(variance)

    def left_out(self) -> np.ndarray:
        """Leave-one-out residuals P e / diag P (Dubrule, Math. Geology 15, 1983), P: R^-1 without mean and own mask."""
        weighted, information = self._own_information
        kept = np.repeat(np.diagonal(self.precision)[:, None], len(self.sigma), 1)
        kept[:, : self.n_train] -= weighted**2 / information
        return right_logits(self.coefficients, self.prior.labels) / self.rho / kept.clip(1e-9)

    @cached_property
    def _own_information(self) -> tuple[np.ndarray, np.ndarray]:
        """R^-1 a_j of each training point (M, n_train), and a_j^T R^-1 a_j (n_train,)."""
        weighted = self.precision @ self.masks
        return weighted, np.maximum((self.masks * weighted).sum(0), 1e-9)

    def _correction(self, directions: np.ndarray) -> np.ndarray:
        """w.d (k, n_points, n_classes), with own weights, for each direction d of (k, n_train)."""
        d = np.asarray(directions, np.float32)
        total = np.tensordot(d @ self.cross.T, self.coefficients, 1)
        total[:, : self.n_train] += d[:, :, None] * self.own
        return total


@register("bayesian")
def bayesian(
    context: Context,
    lam: PositiveFloat = LAM,
    delta: Annotated[float, Field(gt=0, le=1)] = 1.0,
    n_models: PositiveInt | None = 20,
    rank: PositiveInt = RANK,
    project: PositiveInt | None = None,
    n_logits: PositiveInt = LOGITS,
) -> BayesianDatamodel:
    """Fit the posterior to all subset models of the context, around `linearised_response`.

    Takes what that does, its prediction of every subset, O(M^3) for the evidence, and 4 M n_points n_classes bytes.
    Raises DataError for fewer than three subset models, or a context without weights.
    """
    if len(context.masks) < 3:
        raise DataError(f"{len(context.masks)} subset models were given; a Bayesian datamodel takes at least 3.")
    return fit(context, linearised_response(context, lam, n_models, rank, project, n_logits), delta)


def fit(context: Context, response: Response | np.ndarray, delta: float = 1.0) -> BayesianDatamodel:
    """Fit the posterior around any response of margins, or linear weights (n_train, n_points), up to a scale."""
    if isinstance(response, np.ndarray):
        response = Linear(response)
    n, m = context.n_train, len(context.masks)
    c = covariance(response.weights, delta)
    mean_mask = context.masks.mean(0)
    a = context.masks - mean_mask
    outputs = np.asarray(context.outputs[:m], np.float32)
    gram = a @ c @ a.T
    values, vectors = np.linalg.eigh(gram + (1 + np.trace(gram)) / m)  # the constant, which the mean takes, comes last
    values, vectors = np.maximum(values[:-1], 0), vectors[:, :-1]
    change, noise = response.change(context.masks)
    y, f, own = (vectors.T @ z for z in (context.margins, change, a))  # constants are gone
    scale, rho, sigma = evidence(values, y, f, own, noise)
    precision = (vectors / (1 + rho * values)) @ vectors.T
    left = outputs - of_label(change, scale, context.labels, context.n_classes)
    prior = MarginDatamodel(response, scale, context.labels, left.mean(0))
    left -= prior.offset
    weighted = precision @ a  # R^-1 a_j
    b = np.einsum("mj,mjc->jc", weighted, left[:, :n]) / np.maximum((a * weighted).sum(0), 1e-9)[:, None]
    left[:, :n] -= a.astype(np.float32)[:, :, None] * b.astype(np.float32)
    coefficients = np.tensordot((rho * precision).astype(np.float32), left, 1)
    cross = (a @ c).astype(np.float32)
    return BayesianDatamodel(
        prior, cross, coefficients, b.astype(np.float32), c, precision, a, mean_mask.astype(np.float32), rho, sigma
    )


def covariance(w0: np.ndarray, delta: float) -> np.ndarray:
    """C (n_train, n_train) of mean diagonal 1, from effects W0 (n_train, n_points)."""
    c = (w0 @ w0.T).astype(np.float64)
    diagonal = np.diagonal(c).copy()
    c *= 1 - delta
    np.fill_diagonal(c, diagonal)
    return c / max(float(diagonal.mean()), 1e-12)


def evidence(
    values: np.ndarray, y: np.ndarray, f: np.ndarray, own: np.ndarray, noise: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """Find the scale s, the rho that maximises the evidence of all margins, and sigma (n_points,) there.

    Everything is in the eigenbasis of A C A^T, of eigenvalues `values` (k,): margins y (k, n_points), predictions f of
    them with white noise of variance `noise` (n_points,), and masks of single points own (k, n_train). With residuals e
    the log evidence of a margin is - k / 2 log (e^T R^-1 e / k) - 1 / 2 log det R, up to a constant.
    """
    k, n = own.shape
    most, found = -np.inf, (0.0, 0.0, np.zeros(y.shape[1]))
    for rho in RHOS:
        w = 1 / (1 + rho * values)[:, None]
        yy, yf, ff = ((w * p * q).sum(0) for p, q in ((y, y), (y, f), (f, f)))
        white = noise * w.sum()
        aa, ay, af, a2 = ((w * own * q).sum(0) for q in (own, y[:, :n], f[:, :n], w * own))
        aa = np.maximum(aa, 1e-9)  # each margin's own mask is projected out
        yy[:n] -= ay**2 / aa
        yf[:n] -= ay * af / aa
        ff[:n] -= af**2 / aa
        white[:n] -= noise[:n] * a2 / aa
        scale = slope(float(yf.sum()), float(ff.sum()), float(white.sum()))
        square = np.maximum(yy - 2 * scale * yf + scale**2 * ff, 1e-12)
        total = -0.5 * k * np.log(square).sum() - 0.5 * y.shape[1] * np.log1p(rho * values).sum()
        if total > most:
            most, found = total, (scale, float(rho), np.sqrt(square / k))
    return found
