"""Attributors of margins alone: any response of margins to training points, scaled to what subset models show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dmmlib.attribution import Context
from dmmlib.datamodels import Attributor, Indices
from dmmlib.forget_sets import check_forget_indices, indicator


class Response(Protocol):
    """How margins depend on which points a model is trained on, up to a scale."""

    @property
    def n_train(self) -> int: ...

    @property
    def weights(self) -> np.ndarray:
        """By how much one more training point raises each margin (n_train, n_points)."""
        ...

    def change(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict how margins change (k, n_points) when models are trained on masks (k, n_train), not on all points.

        Beside it stands its noise (n_points,): the variance of each margin's change that is due to which models the
        response averages over, or 0 where that is not known.
        """
        ...

    def leverage(self, forget: np.ndarray) -> float | None:
        """`Attributor.leverage` of the points `forget`."""
        ...


def slope(yf: float, ff: float, noise: float) -> float:
    """Slope of y on f by least squares, from their products, corrected for the noise in f, which would shrink it.

    Spearman, "The proof and measurement of association between two things", 1904. At most half of f's variance is taken
    for noise: a few models or masks cannot tell more from chance.
    """
    return yf / max(ff - noise, ff / 2, 1e-12)


@dataclass(frozen=True)
class Linear:
    """A response that adds up over points: W^T (mask - 1)."""

    weights: np.ndarray  # W (n_train, n_points)

    @property
    def n_train(self) -> int:
        return len(self.weights)

    def change(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict as `Response.change`, of unknown noise."""
        return (np.asarray(masks, np.float32) - 1) @ self.weights, np.zeros(self.weights.shape[1])

    def leverage(self, forget: np.ndarray) -> None:
        """Weights do not say it."""


def of_label(change: np.ndarray, scale: float, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Scale a change of margins (k, n_points) into one of logits in the margin gauge (k, n_points, n_classes).

    Only the label's logit changes: given that a model is wrong, what it answers is taken to stay.
    """
    correct = np.arange(n_classes) == labels[:, None]
    return np.where(correct, np.float32(scale) * change[..., None], np.float32(0))


@dataclass(frozen=True)
class MarginDatamodel(Attributor):
    """A response of margins, scaled."""

    response: Response
    scale: float
    labels: np.ndarray  # (n_points,)
    offset: np.ndarray  # logits of a model trained on all points (n_points, n_classes), in the margin gauge

    @property
    def weights(self) -> np.ndarray:
        """By how much one more training point raises each margin (n_train, n_points)."""
        return np.float32(self.scale) * self.response.weights

    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        return self._change(np.stack([indicator(forget, self.response.n_train) for forget in forget_sets]) == 0)

    def predict(self, masks: np.ndarray) -> np.ndarray:
        return self.offset + self._change(masks)

    def leverage(self, forget: Indices) -> float | None:
        return self.response.leverage(check_forget_indices(forget, self.response.n_train))

    def _change(self, masks: np.ndarray) -> np.ndarray:
        return of_label(self.response.change(masks)[0], self.scale, self.labels, self.offset.shape[1])


def calibrated(context: Context, response: Response | np.ndarray) -> MarginDatamodel:
    """Scale a response, or linear weights (n_train, n_points), to fit the margins of the context's subset models."""
    if isinstance(response, np.ndarray):
        response = Linear(response)
    (change, noise), actual = response.change(context.masks), context.margins
    predicted, actual = change - change.mean(0), actual - actual.mean(0)
    squares = float((predicted**2).sum()), float(noise.sum()) * (len(change) - 1)
    scale = slope(float((predicted * actual).sum()), *squares)
    moved = of_label(change, scale, context.labels, context.n_classes)
    offset = np.asarray(context.outputs[: len(context.masks)]).mean(0) - moved.mean(0)
    return MarginDatamodel(response, scale, context.labels, offset)
