"""Environments: where tasks come from. A draw gives any number of independent tasks as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmmlib.data import Dataset
from dmmlib.errors import DataError
from dmmlib.studies.convex.images import image_features
from dmmlib.studies.meta.losses import LOGISTIC, PHASE, Loss

Draw = Callable[[Sequence[int], int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Environment:
    """A distribution of tasks.

    Attributes:
        name: what figures call it.
        loss: of every task.
        draw: (shape, n, rng) -> x (*shape, n, d) in the unit ball and y (*shape, n): independent tasks.
        start: where meta-learning starts from (d,).
    """

    name: str
    loss: Loss
    draw: Draw
    start: Tensor

    @property
    def dim(self) -> int:
        return len(self.start)


def _normal(shape: Sequence[int], rng: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def synthetic(loss: Loss, dim: int, spread: float) -> Environment:
    """Linear models with parameters centre + spread N(0, I / d), pulled into the unit ball; x uniform on the sphere.

    Labels: for the squared loss x . theta + 0.1 N(0, 1), cut at -1 and 1; for the logistic loss 1 with probability
    sigmoid(4 x . theta), else -1; for phase retrieval (x . theta)^2, every tenth replaced by a uniform number.

    Args:
        spread: how much tasks differ; at 0 all are the same.
    """
    if spread < 0 or dim < 1:
        raise DataError(
            f"Tasks have spread {spread:g} and {dim} features; give a spread of 0 or more, and 1 or more features."
        )
    centre = torch.zeros(dim, dtype=torch.float64)
    centre[0] = 0.7

    def draw(shape: Sequence[int], n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        theta = centre + spread * _normal((*shape, 1, dim), rng) / dim**0.5
        theta = theta / torch.linalg.vector_norm(theta, dim=-1, keepdim=True).clamp(min=1)
        x = torch.nn.functional.normalize(_normal((*shape, n, dim), rng), dim=-1)
        s = (x * theta).sum(-1)
        uniform = torch.rand(s.shape, generator=rng, dtype=torch.float64)
        if loss is LOGISTIC:
            return x, torch.where(uniform < torch.sigmoid(4 * s), 1.0, -1.0).double()
        if loss is PHASE:
            return x, torch.where(uniform < 0.1, 10 * uniform, s**2)
        return x, (s + 0.1 * _normal(s.shape, rng)).clamp(-1, 1)

    start = centre / 2 if loss is PHASE else torch.zeros(dim, dtype=torch.float64)  # 0 is stationary for phase
    names = {"squared": "linear regression", "logistic": "logistic regression", "phase": "phase retrieval"}
    return Environment(names[loss.name], loss, draw, start)


def class_pairs(data: Dataset, first: Sequence[int]) -> list[tuple[int, int]]:
    """Every pair of a class of `first` (labelled 1) and another (labelled -1)."""
    rest = [c for c in range(data.n_classes) if c not in first]
    return [(a, b) for a in first for b in rest]


CLOTHES = (0, 1, 2, 3, 4, 6)  # of Fashion-MNIST; the rest are shoes and bags


def images(data: Dataset, side: int, loss: Loss = LOGISTIC, first: Sequence[int] = CLOTHES) -> Environment:
    """Few-shot tasks: a random pair of classes, images pooled to side x side, scaled to norm 1 one by one.

    The examples of a task alternate between its classes and are drawn with replacement from the training set.

    Raises:
        DataError: if `first` leaves no class on either side, or a class has no image.
    """
    x, members = features(data, side)
    pairs = torch.tensor(class_pairs(data, [c for c in first if c < data.n_classes]))
    if not len(pairs):
        raise DataError(f"Classes {tuple(first)} of {data.name!r} leave no pair; name some of its classes, not all.")
    sizes = torch.tensor([len(member) for member in members])
    table = torch.zeros(len(members), int(sizes.max()), dtype=torch.long)
    for row, member in zip(table, members, strict=True):
        row[: len(member)] = member

    def draw(shape: Sequence[int], n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        pair = pairs[torch.randint(len(pairs), tuple(shape), generator=rng)]
        side_of = torch.arange(n) % 2
        label = pair[..., side_of]
        which = (torch.rand(label.shape, generator=rng, dtype=torch.float64) * sizes[label]).long()
        return x[table[label, which]], (1.0 - 2.0 * side_of).double().expand(label.shape)

    return Environment(f"{data.name}, class pairs", loss, draw, torch.zeros(x.shape[1], dtype=torch.float64))


def features(data: Dataset, side: int) -> tuple[Tensor, list[Tensor]]:
    """Unit-norm features (n_train, d) of the training images, and the indices of each class.

    Raises:
        DataError: if a class has no image.
    """
    pooled = image_features(data, data.x_train, side)
    x = torch.from_numpy(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    members = [torch.from_numpy(np.flatnonzero(data.y_train == c)) for c in range(data.n_classes)]
    for name, member in zip(data.class_names, members, strict=True):
        if not len(member):
            raise DataError(f"Class {name!r} of {data.name!r} has no training image; load more of them.")
    return x, members


def disjoint_tasks(
    data: Dataset, side: int, n: int, rng: torch.Generator, first: Sequence[int] = CLOTHES
) -> tuple[Tensor, Tensor]:
    """One task of n examples for every pair of classes, no image in two of them: x (n_pairs, n, d), y (n_pairs, n).

    Pairs come in random order; the examples of a task alternate between its classes.

    Raises:
        DataError: if a class has too few images, or n is odd.
    """
    x, members = features(data, side)
    pairs = class_pairs(data, [c for c in first if c < data.n_classes])
    if n % 2 or n < 2:
        raise DataError(f"A task of two classes asks for n={n} examples; give an even number, at least 2.")
    for c in range(data.n_classes):
        needed = sum(c in pair for pair in pairs) * n // 2
        if needed > len(members[c]):
            raise DataError(
                f"{len(pairs)} tasks of {n} examples need {needed} images of {data.class_names[c]!r}, but there are "
                f"{len(members[c])}; ask for fewer shots, or load more images."
            )
    left = [iter(member[torch.randperm(len(member), generator=rng)].tolist()) for member in members]
    order = torch.randperm(len(pairs), generator=rng).tolist()
    rows = torch.tensor([[next(left[pairs[p][k % 2]]) for k in range(n)] for p in order])
    return x[rows], (1.0 - 2.0 * (torch.arange(n) % 2)).double().expand(rows.shape)
