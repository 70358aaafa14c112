"""What every attribution method gets, and the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmmlib.datamodels import Attributor
from dmmlib.ensemble import Ensemble, check_masks
from dmmlib.errors import DataError, MethodError


@dataclass(frozen=True)
class Context:
    """What there is to attribute from.

    Attributes:
        x: prepared points (n_points, ...), training points first, on the models' device.
        y: labels (n_points,), on the same device.
        masks: training sets of the subset models, bool (M, n_train).
        outputs: their logits (M, n_points, n_classes): an array, or what slices to arrays on its first axis.
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

    def subset_models(self) -> Ensemble:
        """The weights of the first subset models; raises DataError where none were given."""
        if self.models is None:
            raise DataError("This method takes gradients at subset models; give the context `models`, their weights.")
        return self.models


Fit = Callable[..., Attributor]
"""Fits an attributor to a context, with options by keyword."""

_ATTRIBUTORS: dict[str, Fit] = {}


def register(name: str) -> Callable[[Fit], Fit]:
    """Register a method by name: a function of a `Context` (and options) that returns an `Attributor`."""

    def add(method: Fit) -> Fit:
        _ATTRIBUTORS[name] = method
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
    return _ATTRIBUTORS[name]


def fit(name: str, context: Context, **options: Any) -> Attributor:
    """Fit the method of that name; raises MethodError if there is none."""
    return get(name)(context, **options)
