"""Environments: where tasks come from. A draw gives any number of independent tasks as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from dmmlib.data import Dataset
from dmmlib.errors import DataError
from dmmlib.studies.convex.images import image_features
from dmmlib.studies.meta.learner import LOGISTIC, PHASE, Learner

CLOTHES = (0, 1, 2, 3, 4, 6)  # of Fashion-MNIST; the rest are shoes and bags


@dataclass(frozen=True)
class Case:
    """A meta-learner on m tasks of n examples, drawn from an environment."""

    name: str  # of the environment, as figures call it
    draw: Callable[[Sequence[int], int, torch.Generator], tuple[Tensor, Tensor]]
    """(shape, n, rng) -> x (*shape, n, d) in the unit ball and y (*shape, n): independent tasks."""
    start: Tensor  # where meta-learning starts from (d,)
    learner: Learner
    m: int
    n: int

    def changed(self, **quantities: Any) -> Case:
        """Return the case with some of its quantities, or of its learner's, changed."""
        own = {name: int(quantities.pop(name)) for name in ("m", "n") if name in quantities}
        return replace(self, learner=replace(self.learner, **quantities), **own)  # type: ignore[arg-type]


def synthetic(learner: Learner, m: int, n: int, dim: int, spread: float) -> Case:
    """Make linear models with parameters centre + spread N(0, I / d), pulled into the unit ball; x on the sphere.

    Labels: for the squared loss x . theta + 0.1 N(0, 1), cut at -1 and 1; for the logistic loss 1 with probability
    sigmoid(4 x . theta), else -1; for phase retrieval (x . theta)^2, every tenth replaced by a uniform number.
    Tasks differ by `spread`; at 0 all are the same.
    """
    loss, centre = learner.loss, torch.zeros(dim, dtype=torch.float64)
    centre[0] = 0.7

    def draw(shape: Sequence[int], n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        def normal(*size: int) -> Tensor:
            return torch.randn(*shape, *size, generator=rng, dtype=torch.float64)

        theta = centre + spread * normal(1, dim) / dim**0.5
        theta = theta / torch.linalg.vector_norm(theta, dim=-1, keepdim=True).clamp(min=1)
        x = normalize(normal(n, dim), dim=-1)
        s = (x * theta).sum(-1)
        uniform = torch.rand(s.shape, generator=rng, dtype=torch.float64)
        if loss is LOGISTIC:
            return x, torch.where(uniform < torch.sigmoid(4 * s), 1.0, -1.0).double()
        if loss is PHASE:
            return x, torch.where(uniform < 0.1, 10 * uniform, s**2)
        return x, (s + 0.1 * normal(n)).clamp(-1, 1)

    start = centre / 2 if loss is PHASE else torch.zeros(dim, dtype=torch.float64)  # 0 is stationary for phase
    return Case(loss.name, draw, start, learner, m, n)


def features(data: Dataset, side: int) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
    """Prepare training images x (n_train, d) for tasks of two classes: pooled to side x side, scaled to norm 1 each.

    Also returns the indices of each class, and every pair of a class of clothes (labelled 1) and another (-1).

    Raises DataError if a class has no image, or there is no pair.
    """
    pooled = image_features(data, data.x_train, side)
    x = torch.from_numpy(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    members = [torch.from_numpy(np.flatnonzero(data.y_train == c)) for c in range(data.n_classes)]
    for name, member in zip(data.class_names, members, strict=True):
        if not len(member):
            raise DataError(f"Class {name!r} of {data.name!r} has no training image; load more of them.")
    classes = range(data.n_classes)
    pairs = [(a, b) for a in classes for b in classes if a in CLOTHES and b not in CLOTHES]
    if not pairs:
        raise DataError(f"The {data.n_classes} classes of {data.name!r} leave no pair; use data of at least 6 classes.")
    return x, members, pairs


def alternating(shape: Sequence[int]) -> Tensor:
    """Return labels 1, -1, 1, ... along the last dimension: a task's examples alternate between its classes."""
    return (1.0 - 2.0 * (torch.arange(shape[-1]) % 2)).double().expand(shape)


def images(data: Dataset, side: int, learner: Learner, m: int, n: int) -> Case:
    """Make few-shot tasks, each a random pair of classes, examples drawn with replacement; raises as `features`."""
    x, members, pairs = features(data, side)
    table = pad_sequence(members, batch_first=True)
    sizes, classes = torch.tensor([len(member) for member in members]), torch.tensor(pairs)

    def draw(shape: Sequence[int], n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        pair = classes[torch.randint(len(pairs), tuple(shape), generator=rng)]
        label = pair[..., torch.arange(n) % 2]
        which = (torch.rand(label.shape, generator=rng, dtype=torch.float64) * sizes[label]).long()
        return x[table[label, which]], alternating(label.shape)

    start = torch.zeros(x.shape[1], dtype=torch.float64)
    return Case(f"{data.name}, class pairs", draw, start, learner, m, n)


def disjoint_tasks(data: Dataset, side: int, n_each: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make one task x (2 n_each, d), y (2 n_each,) for every pair of classes, in random order, no image in two.

    Raises DataError if a class has too few images, or as `features` does.
    """
    x, members, pairs = features(data, side)
    needed = [n_each * sum(c in pair for pair in pairs) for c in range(data.n_classes)]
    for name, member, count in zip(data.class_names, members, needed, strict=True):
        if count > len(member):
            raise DataError(f"Tasks need {count} images of {name!r}, but there are {len(member)}; ask for fewer shots.")
    left = [iter(member[torch.randperm(len(member), generator=rng)].tolist()) for member in members]
    order = torch.randperm(len(pairs), generator=rng).tolist()
    rows = torch.tensor([[next(left[c]) for _ in range(n_each) for c in pairs[p]] for p in order])
    return x[rows], alternating(rows.shape)
