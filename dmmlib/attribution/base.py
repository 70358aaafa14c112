"""What every attribution method gets, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmmlib.datamodels import Attributor
from dmmlib.ensemble import Ensemble, check_masks
from dmmlib.errors import DataError, MethodError
from dmmlib.forget_sets import check_forget_indices
from dmmlib.hashing import source_hash
from dmmlib.metrics import right_logits


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


@dataclass(frozen=True)
class MarginDatamodel:
    """Weights of training points on margins; given that it is wrong, what a model answers is taken to stay.

    Attributes:
        weights: W (n_train, n_points): by how much training on a point raises each margin.
        labels: (n_points,).
        mean_mask: (n_train,), and
        mean_output: (n_points, n_classes): a prediction for a mask is the mean output, in the margin gauge, plus the
            effect of the mask's difference to the mean mask.
    """

    weights: np.ndarray
    labels: np.ndarray
    mean_mask: np.ndarray
    mean_output: np.ndarray

    def respond(self, directions: np.ndarray) -> np.ndarray:
        """W^T d as a change of the label's logit (k, n_points, n_classes), for each row d of (k, n_train)."""
        change = np.asarray(directions, np.float32) @ self.weights
        right = np.arange(self.mean_output.shape[1]) == self.labels[:, None]
        return np.where(right, change[..., None], np.float32(0))

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted change of logits (n_points, n_classes) on retraining without F; raises ForgetSetError."""
        return -self.respond(indicator(forget, len(self.weights))[None])[0]

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Predicted logits (k, n_points, n_classes) of models trained on the given masks (k, n_train)."""
        return self.mean_output + self.respond(masks - self.mean_mask)


def indicator(forget: Sequence[int] | np.ndarray, n_train: int) -> np.ndarray:
    """1_F (n_train,), float32; raises ForgetSetError for indices that are no proper part of the training set."""
    u = np.zeros(n_train, np.float32)
    u[check_forget_indices(forget, n_train)] = 1
    return u


def calibrated(context: Context, raw: np.ndarray) -> MarginDatamodel:
    """Scores (n_train, n_points) of any unit, times the least-squares slope of the subset models' margins on them."""
    outputs = np.asarray(context.outputs[: len(context.masks)])
    actual = context.margins
    actual = actual - actual.mean(0)
    predicted = (context.masks - context.masks.mean(0)).astype(np.float32) @ raw
    slope = float((predicted * actual).sum() / max(float((predicted**2).sum()), 1e-12))
    return MarginDatamodel(np.float32(slope) * raw, context.labels, context.masks.mean(0), outputs.mean(0))


Fit = Callable[..., Attributor]
"""Fits an attributor to a context, with options by keyword."""

_ATTRIBUTORS: dict[str, tuple[Fit, str]] = {}


def register(name: str) -> Callable[[Fit], Fit]:
    """Register a method by name: a function of a `Context` (and options) that returns an `Attributor`."""

    def add(method: Fit) -> Fit:
        _ATTRIBUTORS[name] = method, source_hash(method)
        return method

    return add


def names() -> tuple[str, ...]:
    """The registered attribution methods."""
    return tuple(_ATTRIBUTORS)


def get(name: str) -> Fit:
    """The attribution method of that name.

    Raises:
        MethodError: if there is none.
    """
    if name not in _ATTRIBUTORS:
        raise MethodError(
            f"Unknown attribution method {name!r}; use one of {', '.join(names())}, or register your own."
        )
    return _ATTRIBUTORS[name][0]


def source(name: str) -> str:
    """Hash of the source of the attribution method of that name; raises MethodError if there is none."""
    get(name)
    return _ATTRIBUTORS[name][1]


def fit(name: str, context: Context, **options: Any) -> Attributor:
    """Fit the method of that name; raises MethodError if there is none."""
    return get(name)(context, **options)
