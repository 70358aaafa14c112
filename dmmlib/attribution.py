"""Data attribution: what leaving training points out does to a model's logits, by several methods.

Every method here fits an `Attributor` (`dmmlib.datamodels`) to a `Context`: subset models' masks and outputs,
some of their weights, and the originals. One of your own registers by name:

    @attribution.register("mine")
    def mine(context: Context) -> Attributor: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmmlib.datamodels import Attributor, check_varying
from dmmlib.ensemble import Ensemble, check_masks
from dmmlib.errors import DataError
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
            n = self.models.n_models
            raise DataError(f"{n} subset models have weights, only {len(self.masks)} masks; give each a mask.")

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


Fit = Callable[..., Attributor]
"""Fits an attributor to a context, with options by keyword."""

ATTRIBUTORS: Registry[Fit] = Registry("attributor", "dmmlib.attributors")

Loadings = Callable[[Ensemble, Tensor, Tensor, int], np.ndarray]
"""Of models, points (n, ...), their labels (n,) and k: loadings (n, k) of points on k directions in which they act."""

LOADINGS: Registry[Loadings] = Registry("loadings", "dmmlib.attributors")


def register(name: str, version: int = 1) -> Callable[[Fit], Fit]:
    """Register a function of a `Context` and options; raise its `version` when its predictions change."""
    return ATTRIBUTORS.register(name, version)


def names() -> tuple[str, ...]:
    """The registered attribution methods."""
    return tuple(ATTRIBUTORS)


def get(name: str) -> Fit:
    """The attribution method of that name; raises MethodError if there is none."""
    return ATTRIBUTORS[name]


def fit(name: str, context: Context, **options: Any) -> Attributor:
    """Fit the method of that name; raises MethodError if there is none."""
    return get(name)(context, **options)
