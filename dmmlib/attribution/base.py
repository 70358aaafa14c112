"""What every attribution method gets, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dmmlib.datamodels import Attributor, Indices, check_varying
from dmmlib.ensemble import Ensemble, check_masks
from dmmlib.errors import DataError
from dmmlib.forget_sets import indicator
from dmmlib.metrics import right_logits
from dmmlib.registry import Registry


@dataclass(frozen=True)
class Context:
    """What there is to attribute from.

    Attributes:
        x: prepared points (n_points, ...), training points first, on the models' device.
        y: labels (n_points,), on the same device.
        masks: training sets of the subset models, bool (M, n_train).
        outputs: their logits in the margin gauge (M, n_points, n_classes): an array, or what slices to arrays on its
            first axis.
        models: weights of the first K subset models, K <= M, for methods that take gradients.
        originals: the models trained on all points, and
        original_logits: their logits (N, n_points, n_classes).
        seed: of whatever a method draws.
    """

    x: Tensor
    y: Tensor
    masks: np.ndarray
    outputs: Any
    models: Ensemble | None = None
    originals: Ensemble | None = None
    original_logits: np.ndarray | None = None
    seed: int = 0

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
                "give one label a point, training points first."
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
    """How margins respond to which points a model is trained on."""

    @property
    def n_train(self) -> int: ...

    @property
    def weights(self) -> np.ndarray:
        """By how much one more training point raises each margin (n_train, n_points)."""
        ...

    def change(self, masks: np.ndarray) -> np.ndarray:
        """Change of margins (k, n_points) of models trained on each mask (k, n_train), against one trained on all."""
        ...


@runtime_checkable
class Averaged(Response, Protocol):
    """A response that is a mean over models, and knows how noisy it is."""

    def foresee(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`change`, and the variance of each margin's (n_points,) over masks that is due to which models they are."""
        ...


def foresee(response: Response, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The change and its noise, 0 where the response does not know."""
    if isinstance(response, Averaged):
        return response.foresee(masks)
    change = response.change(masks)
    return change, np.zeros(change.shape[1])


def slope(yf: float, ff: float, noise: float) -> float:
    """Of least squares of y on f, from their products, without the noise in f that shrinks it.

    Spearman, "The proof and measurement of association between two things", 1904. Where that leaves less than half of
    f's variance, which a few models or masks cannot tell from chance, it is half.
    """
    return yf / max(ff - noise, ff / 2, 1e-12)


@dataclass(frozen=True)
class Linear:
    """A response that is the sum of single points'.

    Attributes:
        weights: W (n_train, n_points).
    """

    weights: np.ndarray

    @property
    def n_train(self) -> int:
        return len(self.weights)

    def change(self, masks: np.ndarray) -> np.ndarray:
        """W^T (mask - 1), (k, n_points)."""
        return (np.asarray(masks, np.float32) - 1) @ self.weights


@dataclass(frozen=True)
class MarginDatamodel(Attributor):
    """A response of margins, scaled; given that a model is wrong, what it answers is taken to stay.

    Attributes:
        response: of margins.
        scale: of it.
        labels: (n_points,).
        offset: (n_points, n_classes), in the margin gauge: what a model trained on all points answers.
    """

    response: Response
    scale: float
    labels: np.ndarray
    offset: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """By how much one more training point raises each margin (n_train, n_points)."""
        return np.float32(self.scale) * self.response.weights

    def change(self, masks: np.ndarray) -> np.ndarray:
        """Change of the label's logit (k, n_points, n_classes) of models trained on each mask, against on all."""
        return self.scaled(self.response.change(masks))

    def scaled(self, change: np.ndarray) -> np.ndarray:
        """A change that the response foresees (k, n_points), scaled, as one of the label's logit."""
        right = np.arange(self.offset.shape[1]) == self.labels[:, None]
        return np.where(right, np.float32(self.scale) * change[..., None], np.float32(0))

    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        """Predict the change of logits (k, n_points, n_classes) on retraining without each forget set."""
        return self.change(np.stack([indicator(forget, self.response.n_train) for forget in forget_sets]) == 0)

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predicted logits (k, n_points, n_classes) of models trained on the given masks (k, n_train)."""
        return self.offset + self.change(masks)


def calibrated(context: Context, response: Response | np.ndarray) -> MarginDatamodel:
    """A response up to its scale, or weights (n_train, n_points) of one; scaled to fit the subset models' margins."""
    if isinstance(response, np.ndarray):
        response = Linear(response)
    (change, noise), actual = foresee(response, context.masks), context.margins
    predicted, actual = change - change.mean(0), actual - actual.mean(0)
    squares = float((predicted**2).sum()), float(noise.sum()) * (len(change) - 1)
    scale = slope(float((predicted * actual).sum()), *squares)
    unshifted = MarginDatamodel(response, scale, context.labels, np.zeros(context.outputs.shape[1:], np.float32))
    offset = np.asarray(context.outputs[: len(context.masks)]).mean(0) - unshifted.scaled(change).mean(0)
    return replace(unshifted, offset=offset)


Fit = Callable[..., Attributor]
"""Fits an attributor to a context, with options by keyword."""

ATTRIBUTORS: Registry[Fit] = Registry(
    "attributor", "dmmlib.attribution.linearised", "dmmlib.attribution.bayesian", "dmmlib.attributors"
)


def register(name: str, version: int = 1) -> Callable[[Fit], Fit]:
    """Register a method by name: a function of a `Context` (and options) that returns an `Attributor`.

    Args:
        name: what presets and `method@name` call it by.
        version: to be raised when its predictions change, so that results are made anew.
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
