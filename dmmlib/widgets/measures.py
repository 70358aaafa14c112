"""What is known of each point, from the originals and the hundred subset models that the attributor has."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse.linalg import svds
from scipy.special import expit
from sklearn.neighbors import NearestNeighbors

from dmmlib import metrics
from dmmlib.datamodels import BLOCK
from dmmlib.study import Study

N_NEIGHBOURS = 5  # whose mean distance says how far out a point lies


def measures(study: Study, effects: np.ndarray) -> dict[str, np.ndarray]:
    """Measure all points (n_points,), training points first; NaN where a measure is of training points only.

    Returns:
        "margin", "confidence" and "loss", means over originals; "memorisation"; "unseen margin", the mean margin of
        subset models that did not have the point, low where its label is doubtful; "nearest" and "apart", the distance
        to the nearest other training point and the mean distance to five, of prepared pixels; "PC 1" and "PC 2", see
        `loadings`.
    """
    context, labels, n = study.context(), study.data.y, study.data.n_train
    margins = metrics.margins(study.original_logits(), labels)
    each = {"margin": margins, "confidence": expit(margins), "loss": np.logaddexp(0, -margins)}
    known = {name: values.mean(0) for name, values in each.items()}
    out, unseen = ~context.masks, context.margins
    inside = np.where(out.any(0), (unseen[:, :n] * out).sum(0) / np.maximum(out.sum(0), 1), np.nan)
    ours = {"memorisation": memorisation(context.masks, context.outputs, labels[:n])}
    ours |= {f"PC {k + 1}": column for k, column in enumerate(loadings(effects[:, :n]).T)}
    known["unseen margin"] = np.concatenate([inside, unseen[:, n:].mean(0)])
    known["nearest"], known["apart"] = distances(study.features, n)
    return known | {name: np.append(column, np.full(len(labels) - n, np.nan)) for name, column in ours.items()}


def loadings(effects: np.ndarray, k: int = 2) -> np.ndarray:
    """Load training points on the principal components of what they do to one another: (n_train, k).

    `effects` (n_train, n_train) are those of each point on each margin. Points with large loadings act together; the
    largest loading of a component is positive.
    """
    rows = effects.T - effects.mean(1)
    _, s, vt = svds(rows, k=k, v0=np.random.default_rng(0).normal(size=len(rows)).astype(np.float32))
    found = vt[np.argsort(-s)].T
    return found * np.sign(np.take_along_axis(found, np.abs(found).argmax(0)[None], 0))


def distances(features: np.ndarray, n_train: int) -> tuple[np.ndarray, np.ndarray]:
    """Measure the distance of each point (n_points, ...) to the nearest training point but itself, and to some."""
    index = NearestNeighbors(n_neighbors=min(N_NEIGHBOURS, n_train - 1)).fit(features[:n_train])
    near = np.concatenate([index.kneighbors()[0], index.kneighbors(features[n_train:])[0]])
    return near[:, 0], near.mean(1)


def memorisation(masks: np.ndarray, outputs: Any, labels: np.ndarray) -> np.ndarray:
    """Return by how much more often each point is answered correctly if it was trained on (Feldman, STOC 2020).

    Args:
        masks: training sets of models of random subsets, bool (n_models, n_train).
        outputs: their logits (n_models, n_points, n_classes), training points first; read some models at a time.
        labels: of the training points (n_train,), as is the answer; it is 0 where all models saw the point, or none.
    """
    n_models, n_train = masks.shape
    seen, hits = masks.sum(0), np.zeros((2, n_train), int)  # with the point, and without
    for first in range(0, n_models, BLOCK):
        rows = slice(first, first + BLOCK)
        correct = metrics.correct(outputs[rows][:, :n_train], labels)
        hits += [(correct & masks[rows]).sum(0), (correct & ~masks[rows]).sum(0)]
    shares = hits / np.maximum([seen, n_models - seen], 1)
    return np.where((seen > 0) & (seen < n_models), shares[0] - shares[1], 0.0)
