"""Models by name: factories of `nn.Module`s, each with the fixed transform that feeds it.

A model is *deterministic given its batch* (no dropout), so that an ensemble member depends on nothing but
its seed and its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmmlib.data import Dataset
from dmmlib.errors import DeviceError
from dmmlib.files import short
from dmmlib.registry import Registry


def normalise(data: Dataset, x: np.ndarray) -> Tensor:
    """Images (n, height, width, channels) as normalised float32 (n, channels, height, width); features unchanged."""
    if x.dtype != np.uint8:
        return torch.from_numpy(x)
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().float() / 255
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    return (images - mean) / std


def normalising(make: Callable[[], nn.Module], data: Dataset, device: torch.device) -> nn.Module:
    """A model that takes bytes: `normalise` as its first step, which adds no parameter or name to it."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (data.mean, data.std))
    model = make()
    model.register_forward_pre_hook(lambda _, inputs: ((inputs[0].float() / 255 - mean) / std,))
    return model


def pooled(data: Dataset, x: np.ndarray) -> Tensor:
    """`normalise`, average-pooled 2 x 2 where there are at least 20 rows, and flattened: (n, features)."""
    images = normalise(data, x)
    if images.ndim == 4 and images.shape[-1] >= 20:
        images = F.avg_pool2d(images, 2)
    return images.flatten(1)


Factory = Callable[..., nn.Module]
Prepare = Callable[[Dataset, np.ndarray], Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model and how to feed it.

    Attributes:
        factory: (input shape of one prepared point, number of classes, **options) -> nn.Module whose forward takes
            (n, *input shape) and returns logits (n, n_classes). Weights are drawn from torch's global generator,
            which `ensemble` seeds for each model.
        prepare: the fixed, parameter-free part of the model, applied once to all points.
    """

    factory: Factory
    prepare: Prepare


MODELS: Registry[ModelSpec] = Registry("model", "dmmlib.zoo.architectures")


def register(name: str, prepare: Prepare = normalise, version: int = 1) -> Callable[[Factory], Factory]:
    """Make presets find a model factory by name."""

    def add(factory: Factory) -> Factory:
        MODELS.add(name, ModelSpec(factory, prepare), version)
        return factory

    return add


def get(name: str) -> ModelSpec:
    """The registered model of that name; raises MethodError if there is none."""
    return MODELS[name]


def fingerprint(make: Callable[[], nn.Module], x: Tensor) -> str:
    """Hash a model's structure and its seeded answers on a few points: what a user registers has no version.

    Answers are in double precision and rounded, so that they are the same on every machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().to(x.device, torch.float64).eval()
    with torch.no_grad():
        answers = module(x[:4].to(torch.float64, copy=True) if x.is_floating_point() else x[:4].clone())
    return short(f"{module} {[f'{z:.6g}' for z in answers.flatten().tolist()]}".encode())


def resolve_device(device: str) -> torch.device:
    """The device of that name; `auto` takes CUDA where there is one. Raises DeviceError for what is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise DeviceError(f"Unknown device {device!r}; use auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("Device 'cuda' was asked for, but torch finds no GPU here; use device='auto' or 'cpu'.")
    return torch.device(device)


def build(name: str, shape: tuple[int, ...], n_classes: int, **options: Any) -> nn.Module:
    """An `nn.Module` by registered name, for one prepared point of `shape`."""
    return get(name).factory(shape, n_classes, **options)
