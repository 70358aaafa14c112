"""What every attribution method gets, the registry, and datamodels of margins alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmmlib.datamodels import Attributor, Indices, check_varying
from dmmlib.ensemble import Ensemble, check_masks
from dmmlib.errors import DataError
from dmmlib.forget_sets import check_forget_indices, indicator
from dmmlib.metrics import right_logits
from dmmlib.registry import Registry


@dataclass(frozen=True)
class Context:
    """What there is to attribute from."""

    x: Tensor  # prepared points (n_points, ...), training points first, on the models' device
    y: Tensor  # labels (n_points,), on the same device
    masks: np.ndarray  # training sets of the subset models, bool (M, n_train)
    outputs: Any  # their logits in the margin gauge (M, n_points, n_classes); slices to arrays along its first axis
    models: Ensemble | None = None  # the first K <= M subset models, for methods that take gradients
    originals: Ensemble | None = None  # models trained on all points
    original_logits: np.ndarray | None = None  # theirs (N, n_points, n_classes)
    seed: int = 0  # of whatever a method draws

    def __post_init__(self) -> None:
        check_masks(self.masks, self.masks.shape[-1])
        check_varying(self.masks)
        if tuple(self.outputs.shape[:2]) != (len(self.masks), len(self.x)):
            raise DataError(
                f"outputs have shape {tuple(self.outputs.shape)} for {len(self.masks)} masks and {len(self.x)} "
                "points; give (n_masks, n_points, n_classes)."
            )
        if len(self.x) != len(self.y) or len(self.x) < self.n_train:
            raise DataError(
                f"There are {len(self.x)} points, {len(self.y)} labels and masks of {self.n_train} training points; "
                "give one label for each point, training points first."
            )
        if self.models is not None and self.models.n_models > len(self.masks):
            raise DataError(
                f"Weights of {self.models.n_models} subset models but only {len(self.masks)} masks; "
                "give the weights of the first models of the masks."
            )

    @property
    def n_train(self) -> int:
        return self.masks.shape[1]

    @property
    def n_classes(self) -> int:
        return self.outputs.shape[2]

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def labels(self) -> np.ndarray:
        return self.y.cpu().numpy()

    @property
    def margins(self) -> np.ndarray:
        """Margins (M, n_points) of the subset models."""
        return right_logits(np.asarray(self.outputs[: len(self.masks)]), self.labels)

    def subset_models(self) -> Ensemble:
        """The weights of the first subset models; raises DataError where none were given."""
        if self.models is None:
            raise DataError("This method takes gradients at subset models; give the context `models`, their weights.")
        return self.models


class Response(Protocol):
    """How margins depend on which points a model is trained on, up to a scale."""

    @property
    def n_train(self) -> int: ...

    @property
    def weights(self) -> np.ndarray:
        """By how much one more training point raises each margin (n_train, n_points)."""
        ...

    def change(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict how margins change when models are trained on masks (k, n_train) instead of all points.

        Returns:
            The change (k, n_points), and its noise (n_points,): the variance of each margin's change that is due to
            which models the response averages over; 0 where that is not known.
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


Fit = Callable[..., Attributor]
"""Fits an attributor to a context, with options by keyword."""

ATTRIBUTORS: Registry[Fit] = Registry("attributor", "dmmlib.attributors")


def register(name: str, version: int = 1) -> Callable[[Fit], Fit]:
    """Register a function of a `Context` and options that returns an `Attributor`.

    Raise `version` when its predictions change, so that results are made anew.
    """

    def add(method: Fit) -> Fit:
        ATTRIBUTORS.add(name, method, version)
        return method

    return add


def names() -> tuple[str, ...]:
    """The registered attribution methods."""
    return tuple(ATTRIBUTORS)


def get(name: str) -> Fit:
    """The attribution method of that name; raises MethodError if there is none."""
    return ATTRIBUTORS[name]


def fit(name: str, context: Context, **options: Any) -> Attributor:
    """Fit the method of that name; raises MethodError if there is none."""
    return get(name)(context, **options)
