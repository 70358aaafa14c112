"""The Bayesian datamodel taken apart: what it predicts with parts switched off, and designs of subsets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.cluster import KMeans

from dmmlib.attribution.base import Response, foresee
from dmmlib.attribution.bayesian import RHOS, _evidence
from dmmlib.errors import DataError

Predict = Callable[[np.ndarray], np.ndarray]
"""From masks (k, n_train) to the margins (k, n_points) of models trained on them, up to a constant."""


def posterior(
    masks: np.ndarray,
    margins: np.ndarray,
    response: Response,
    c: np.ndarray,
    *,
    mean: bool = True,
    own: bool = True,
    each: bool = False,
    noisy: bool = False,
) -> Predict:
    """Posterior mean of margins, for any mask; `bayesian` has model and terms.

    With the defaults it is what `bayesian.fit` predicts margins with.

    Args:
        masks: training sets of the subset models (M, n_train).
        margins: of the subset models (M, n_points), training points first.
        response: f, up to a scale.
        c: covariance of what is wrong with it (n_train, n_train), up to a scale.
        mean: whether f is there, or 0.
        own: whether each point's weight on its own margin is free.
        each: whether rho maximises the evidence of each margin on its own instead of that of all.
        noisy: whether s is fitted as if f were free of noise.
    """
    m, n = masks.shape
    a = masks - masks.mean(0)
    gram = a @ c @ a.T
    values, vectors = np.linalg.eigh(gram + (1 + np.trace(gram)) / m)  # the constant comes last
    values, vectors = np.maximum(values[:-1], 0), vectors[:, :-1]
    change, noise = foresee(response, masks) if mean else (np.zeros_like(margins), np.zeros(margins.shape[1]))
    y, f, points = (vectors.T @ z for z in (margins, change, a))
    if not own:
        points = np.zeros_like(points)
    scale, common, _ = _evidence(values, y, f, points, 0 * noise if noisy else noise)
    e = y - scale * f

    def left(rho: float) -> tuple[np.ndarray, np.ndarray]:
        """Own weights b (n_train,) at that rho, and what they leave of e (M - 1, n_points)."""
        w = 1 / (1 + rho * values)[:, None]
        b = (w * points * e[:, :n]).sum(0) / np.maximum((w * points**2).sum(0), 1e-9)
        rest = e.copy()
        rest[:, :n] -= points * b
        return b, rest

    rhos = np.full(y.shape[1], common)
    if each:
        k = len(values)
        scores = [
            -0.5 * k * np.log(np.maximum((left(r)[1] ** 2 / (1 + r * values)[:, None]).sum(0), 1e-12))
            - 0.5 * np.log1p(r * values).sum()
            for r in RHOS
        ]
        rhos = RHOS[np.argmax(scores, 0)]
    combined, b_own = np.empty_like(e), np.empty(n)
    for rho in np.unique(rhos):
        here = rhos == rho
        b, rest = left(rho)
        combined[:, here] = rest[:, here] * (rho / (1 + rho * values))[:, None]
        b_own[here[:n]] = b[here[:n]]
    dual = vectors @ combined

    def predict(some: np.ndarray) -> np.ndarray:
        d = some - masks.mean(0)
        total = (d @ c @ a.T) @ dual
        total[:, :n] += d * b_own
        return np.asarray(total + scale * response.change(some) if mean else total)

    return predict


def antithetic_masks(masks: np.ndarray) -> np.ndarray:
    """The first half of some masks of half of S, each followed by its complement: (M, n_train)."""
    half = masks[: len(masks) // 2]
    return np.stack([half, ~half], 1).reshape(-1, masks.shape[1])


def clustered_masks(t: np.ndarray, n_masks: int, fraction: float, n_clusters: int, seed: int) -> np.ndarray:
    """Subsets that hold most of a cluster or little of it, so that effects of groups are seen: (n_masks, n_train).

    A cluster's probability is drawn from a beta distribution of mean `fraction`, then points are, to the exact size.

    Args:
        t: the kernel's attributions (n_train, n_points): points with alike directions of them are a cluster.

    Raises:
        DataError: for more clusters than training points.
    """
    n = len(t)
    if not 1 <= n_clusters <= n:
        raise DataError(f"n_clusters={n_clusters} was asked for among {n} training points; use 1 to {n}.")
    directions = t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-12)
    u, s, _ = np.linalg.svd(directions - directions.mean(0), full_matrices=False)
    rank = min(60, n)
    clusters = KMeans(n_clusters, n_init=3, random_state=seed).fit_predict((u * s)[:, :rank])
    rng = np.random.default_rng(seed)
    masks = np.zeros((n_masks, n), bool)
    for mask in masks:
        p = np.clip(rng.beta(2 * fraction, 2 * (1 - fraction), n_clusters), 1e-3, 1 - 1e-3)[clusters]
        key = np.log(p / (1 - p)) + rng.logistic(size=n)
        mask[np.argsort(-key)[: round(fraction * n)]] = True
    return masks
