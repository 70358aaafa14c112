"""Data attribution: what leaving training points out does to a model's logits, by several methods.

Every method here fits an `Attributor` (`dmmlib.datamodels`) to a `Context`: subset models' masks and outputs,
some of their weights, and the originals. One of your own registers by name:

    @attribution.register("mine")
    def mine(context: Context) -> Attributor: ...
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmmlib import files
from dmmlib.datamodels import Attributor, check_finite, check_varying
from dmmlib.ensemble import Ensemble, check_masks
from dmmlib.errors import DataError
from dmmlib.metrics import right_logits
from dmmlib.registry import Registry, check_call


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
        """Margins (M, n_points) of the subset models; raises DataError where one is NaN or infinite."""
        found = right_logits(np.asarray(self.outputs[: len(self.masks)]), self.labels)
        check_finite(found)
        return found

    def subset_models(self) -> Ensemble:
        """The weights of the first subset models; raises DataError where none were given."""
        if self.models is None:
            raise DataError("This method takes gradients at subset models; give the context `models`, their weights.")
        return self.models


LARGEST = 2**30  # bytes of an attributor that is kept on disk
OURS = "dmmlib.attributors."  # whose classes a kept attributor may be made of

Fit = Callable[..., Attributor]
"""Fits an attributor to a context, with options by keyword."""

ATTRIBUTORS: Registry[Fit] = Registry("attributor", "dmmlib.attributors")
register = ATTRIBUTORS.register  # of a function of a `Context` and options to an `Attributor`

Loadings = Callable[[Ensemble, Tensor, Tensor, np.ndarray, int], np.ndarray]
"""Of models, points (n, ...), labels and hardness (n,), and k: loadings (n, k) on k directions in which points act."""

LOADINGS: Registry[Loadings] = Registry("loadings", "dmmlib.attributors")


def names() -> tuple[str, ...]:
    """The registered attribution methods."""
    return tuple(ATTRIBUTORS)


def get(name: str) -> Fit:
    """The attribution method of that name; raises MethodError if there is none."""
    return ATTRIBUTORS[name]


def fit(name: str, context: Context, **options: Any) -> Attributor:
    """Fit the method of that name; raises MethodError if there is none, OptionError for options it does not take."""
    check_call(f"attributor {name!r}", get(name), context, **options)
    return get(name)(context, **options)


# --- kept on disk ----------------------------------------------------------------------------------------


def save(path: Path, attributor: Attributor) -> None:
    """Write an attributor for `load`, if it is made of the library's parts, arrays and numbers, and not too large."""
    arrays: dict[str, np.ndarray] = {}
    try:
        tree = json.dumps(_taken_apart(attributor, arrays))
    except TypeError:  # it holds something else, and is fitted again when it is needed
        return
    if sum(array.nbytes for array in arrays.values()) <= LARGEST:
        files.write_arrays(path, {**arrays, "tree": np.array(tree)})


def load(path: Path, device: torch.device) -> Attributor:
    """Read what `save` wrote, its tensors to a device; raises StoreError, if it is damaged DamageError."""
    arrays = files.read_arrays(path)
    made: Attributor = _put_together(json.loads(str(arrays.pop("tree"))), arrays, device)
    return made


def kept(path: Path, device: torch.device, fit: Callable[[], Attributor]) -> Attributor:
    """Read the attributor that is kept at a path; where there is none, or it is damaged, fit it and save it first."""
    return files.kept(path, fit, partial(load, device=device), save)


def _taken_apart(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A value as JSON, with names in the place of arrays; TypeError for anything that is no part of an attributor."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, tuple):
        return [_taken_apart(part, arrays) for part in value]
    if isinstance(value, (np.ndarray, Tensor)):
        name = f"{'tensor' if isinstance(value, Tensor) else 'array'}{len(arrays)}"
        arrays[name] = value.cpu().numpy() if isinstance(value, Tensor) else value
        return name
    if not is_dataclass(value) or not type(value).__module__.startswith(OURS):
        raise TypeError(f"{type(value).__name__} is no part of a kept attributor.")
    parts = {field.name: _taken_apart(getattr(value, field.name), arrays) for field in fields(value)}
    return {"of": f"{type(value).__module__}:{type(value).__qualname__}", "parts": parts}


def _put_together(tree: Any, arrays: dict[str, np.ndarray], device: torch.device) -> Any:
    if isinstance(tree, list):
        return tuple(_put_together(part, arrays, device) for part in tree)
    if isinstance(tree, str):
        return torch.from_numpy(arrays[tree]).to(device) if tree.startswith("tensor") else arrays[tree]
    if not isinstance(tree, dict):
        return tree
    module, _, name = tree["of"].partition(":")
    made = getattr(importlib.import_module(module), name) if module.startswith(OURS) else None
    if not is_dataclass(made):
        raise DataError(f"{tree['of']} is no part of an attributor; remove its file.")
    return made(**{name: _put_together(part, arrays, device) for name, part in tree["parts"].items()})  # type: ignore[operator]
