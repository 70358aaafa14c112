"""Attribution to people: what leaving profiles out of the teaching does to every token of every answer.

The unit is a profile: masks are over people. What a profile teaches is nearly all about its own person, and a share of
the subset models has seen it and a share has not; so the attribution is a *contrast*: the mean answer of models that
were not taught the person minus that of models that were, at answers about that person, and nothing at others'. Of the
study's Bayesian datamodel (`attributors.bayesian`) this is the free own weight; around it a gradient kernel over
profiles moved nothing here. Ridge, which knows nothing of whom an answer is about, stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dmmlib import datamodels, metrics
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.studies.multimodal.world import World

Change = Callable[[Sequence[int] | np.ndarray], np.ndarray]
"""The change of logits in the margin gauge (n_questions, A, V) without some people, for their indices."""


def moved(world: World, logits: np.ndarray, change: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Predict logits (n_models, n, A, V) of some questions: each model's own, moved in the margin gauge."""
    truth = world.truth[questions].cpu().numpy().ravel()
    flat = logits.reshape(len(logits), len(truth), -1)
    return datamodels.retrained(flat, change.reshape(flat.shape[1:]), truth).reshape(logits.shape)


def gauged(world: World, logits: np.ndarray) -> np.ndarray:
    """Shift logits (n_models, n, A, V) of the first n questions to the margin gauge."""
    truth = world.truth[: logits.shape[1]].cpu().numpy().ravel()
    return metrics.margin_gauge(logits.reshape(len(logits), len(truth), -1), truth).reshape(logits.shape)


def mean_change(world: World, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Compute the mean change (n, A, V), in the margin gauge, of logits of the first n questions."""
    return np.asarray(gauged(world, after).mean(0) - gauged(world, before).mean(0))


def fit(world: World, masks: np.ndarray, logits: np.ndarray) -> dict[str, Change]:
    """Fit "contrast", and "ridge" with each penalty, to what subset models answer.

    Args:
        masks: who each subset model was taught (M, n_people).
        logits: their answers (M, n_questions, A, V).
    """
    outputs, shape = gauged(world, logits), logits.shape[1:]
    flat = outputs.reshape(len(masks), -1, 1)

    def of_ridge(model: RidgeDatamodel, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        return model.effect(forget).reshape(shape)

    found: dict[str, Change] = {"contrast": contrast(masks, outputs, world.person)}
    for lam in world.s.lams:
        found[f"ridge, {lam:g}"] = partial(of_ridge, RidgeDatamodel.fit(masks, flat, lam))
    return found


def contrast(masks: np.ndarray, outputs: np.ndarray, owner: np.ndarray) -> Change:
    """Subtract mean outputs (M, n, ...) of models taught the owner (n,) from those of models not; -1 owns nothing."""
    taught = (masks[:, owner] & (owner >= 0)).reshape(*outputs.shape[:2], *[1] * (outputs.ndim - 2))
    means = [(outputs * m).sum(0) / np.maximum(m.sum(0), 1) for m in (~taught, taught)]
    difference = np.asarray(means[0] - means[1], np.float32)
    return lambda forget: np.isin(owner, forget).reshape(-1, *[1] * (outputs.ndim - 2)) * difference
