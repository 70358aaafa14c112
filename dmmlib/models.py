"""Models by name: factories of `nn.Module`s, each with the fixed transform that feeds it.

A model depends on nothing but its seed and its mask; what it draws, as dropout does, is drawn by its seed. It must be
deterministic in evaluation, and keep its state in parameters and buffers (`stacking.check`).
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
from dmmlib.loops import Loop
from dmmlib.registry import Registry
from dmmlib.stacking import drawing


def normalise(data: Dataset, x: np.ndarray) -> Tensor:
    """Images (n, height, width, channels) as normalised float32 (n, channels, height, width); features unchanged."""
    if x.dtype != np.uint8:
        return torch.from_numpy(x)
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().float() / 255
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    return (images - mean) / std


def normalising(make: Callable[[], nn.Module], data: Dataset, device: torch.device) -> nn.Module:
    """One of the library's models that takes bytes: `normalise` first, which adds no parameter or name to it."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (data.mean, data.std))
    model = make()
    model.register_forward_pre_hook(lambda _, inputs: ((inputs[0].float() / 255 - mean) / std,))
    return model


def pooled(data: Dataset, x: np.ndarray) -> Tensor:
    """`normalise`, average-pooled 2 x 2 where there are at least 20 rows and columns, and flattened: (n, features)."""
    images = normalise(data, x)
    if images.ndim == 4 and min(images.shape[-2:]) >= 20:
        images = F.avg_pool2d(images, 2)
    return images.flatten(1)


Factory = Callable[..., nn.Module]
Prepare = Callable[[Dataset, np.ndarray], Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model and how to feed it.

    A factory makes, of the shape of one prepared point, the number of classes and options, a module that takes points
    (n, *shape) to logits (n, n_classes). It draws weights from torch's generator, which is seeded for each model.
    """

    factory: Factory
    prepare: Prepare  # the fixed, parameter-free part of the model, applied once to all points
    loop: Loop | None = None  # how it is trained, if not by the preset's `training`


MODELS: Registry[ModelSpec] = Registry("model", "dmmlib.zoo.architectures")


def register(
    name: str, prepare: Prepare = normalise, version: int = 1, loop: Loop | None = None
) -> Callable[[Factory], Factory]:
    """Make presets find a model factory by name."""
    return MODELS.register(name, version, lambda factory: ModelSpec(factory, prepare, loop))


def get(name: str) -> ModelSpec:
    """The registered model of that name; raises MethodError if there is none."""
    return MODELS[name]


def fingerprint(make: Callable[[], nn.Module], x: Tensor) -> str:
    """Hash a model's structure and its seeded answers on a few points: what a user registers has no version.

    Answers are those of evaluation and of training, with the sizes of their gradients, in double precision where the
    module can, and rounded, so that they are the same on every machine. What does not train, and is not all zeros and
    ones, is seen whole: few points may not meet it, as rows of an embedding.
    """

    def still(v: Tensor) -> str:
        v = v.detach().flatten().double().nan_to_num(0, 1, -1)
        places = torch.arange(len(v), device=v.device, dtype=v.dtype) * 0.6180339887 % 1 - 0.5
        return f" {v.norm():.5g} {float(places @ v / v.norm()):.5f}"

    def seen(dtype: torch.dtype | None, digits: int) -> str:
        with drawing(0, x.device):
            module, points = make().to(x.device), x[:4]
            fixed = [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]
            sums = [still(v) for v in fixed if ((v != 0) & (v != 1)).any()]
            if dtype is not None:
                module, points = module.to(dtype), points.to(dtype) if points.is_floating_point() else points
            answers, trained = module.eval()(points.clone()), module.train()(points.clone())
        trained.square().sum().backward()
        sizes = [torch.zeros(()) if p.grad is None else p.grad.norm() for p in module.parameters()]
        numbers = [z for part in (answers, trained, *sizes) for z in part.flatten().tolist()]
        least = 10.0 ** -(digits + 2) * max(map(abs, numbers))  # below is noise: gradients of biases before norms
        return f"{module} {[f'{z if abs(z) > least else 0:.{digits}g}' for z in numbers]}{''.join(sums)}"

    try:
        found = seen(torch.float64, 6)
    except RuntimeError:  # it makes tensors of a precision of its own
        found = seen(None, 3)
    return short(found.encode())


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
