"""Poison: points that pull a model's parameters towards the vertices of a simplex, within a bound on their pixels.

Group i of k + 1 is to move the parameters towards vertex v_i, so each of its points (x, y) is chosen, and its pixels
changed by at most epsilon, to raise

    p |cos|^angle,    p = -c . v_i / ||v_i||,    cos = p / ||c||,    c the coordinates of its loss's gradient:

gradient matching in the subspace (`subspace`). With angle 0 only the length of the pull towards the vertex counts; the
higher it is, the more a pull aside counts against it. The base images are the attacker's own, chosen so that the pulls
of all groups cancel (`_choose`). *Clean* labels leave the base image its true label; *dirty* ones give it any.

A request asks to delete some of it, so that a target chosen after training is answered wrongly. To move the parameters
along d, the direction in which the target's margin falls fastest in the subspace, it takes the convex coordinates
lambda of the point where d leaves the simplex, keeps of group i the share lambda_i / max lambda and deletes the rest:
what is kept pulls to sum_i lambda_i v_i / max lambda, a multiple of d, as the whole simplex pulled nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmmlib.errors import OptionError
from dmmlib.studies.adversary.geometry import apportion, farthest, regular
from dmmlib.studies.adversary.subspace import Subspace

Prepare = Callable[[Tensor], Tensor]
"""Images (n, height, width, channels) with values from 0 to 1 to what models take, differentiable."""


@dataclass(frozen=True)
class Poison:
    """What the attacker contributes, and what it expects of it."""

    images: np.ndarray  # uint8 (p, height, width, channels)
    labels: np.ndarray  # (p,)
    bases: np.ndarray  # the images before their pixels were changed
    group: np.ndarray  # vertex that each point pulls towards (p,)
    coordinates: np.ndarray  # of the gradients of their losses (p, k): deleting a point adds them to z

    def __len__(self) -> int:
        return len(self.images)

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels."""
        return self.images, self.labels

    @property
    def vertices(self) -> np.ndarray:
        """Of the simplex, of radius 1 (k + 1, k)."""
        return regular(self.coordinates.shape[1])


def _pull(c: Tensor, towards: Tensor, angle: float) -> Tensor:
    """What the module raises, for coordinates (..., k) and the unit vectors that go with them."""
    along = -(c * towards).sum(-1)
    length = torch.linalg.vector_norm(c, dim=-1).clamp(min=1e-12)
    return along * (along.abs() / length) ** angle if angle else along


def craft(
    subspace: Subspace,
    images: np.ndarray,
    labels: np.ndarray,
    prepare: Prepare,
    size: int,
    epsilon: int,
    dirty: bool,
    angle: float,
    steps: int,
) -> Poison:
    """Craft `size` points in k + 1 groups as equal as can be, by signed gradient ascent on pixels.

    Args:
        subspace: where, and at which models, gradients are matched.
        images, labels: the attacker's pool, uint8 (m, height, width, channels) and (m,); each is used once at most.
        prepare: from images to what the models take.
        size: points, from k + 1 to m; raises OptionError for others.
        epsilon: bound on the change of a pixel, of 255; 0 leaves the images as they are.
        dirty: whether labels may be any class.
        angle: exponent of the module's formula, 0 or more.
        steps: of ascent.
    """
    vertices = regular(subspace.k)
    if not len(vertices) <= size <= len(images):
        raise OptionError(
            f"{size} poisoned points were asked for; use {len(vertices)}, the groups, to {len(images)}, the images."
        )
    device = subspace.models.device
    towards = torch.from_numpy(vertices).float().to(device)
    base = torch.from_numpy(images).to(device).float() / 255
    with torch.no_grad():
        c = subspace.of_losses(prepare(base))  # (m, n_classes, k)
    scores = torch.stack([-_pull(c, u, angle) for u in towards]).cpu().numpy()  # (k + 1, m, n_classes)
    if not dirty:
        scores[:, np.arange(scores.shape[2]) != labels[:, None]] = np.inf
    chosen, given = _choose(scores, -c.cpu().numpy(), size)
    group = np.arange(size) % len(vertices)
    points, classes = torch.arange(size, device=device), torch.from_numpy(given).to(device)

    def coordinates(x: Tensor) -> Tensor:
        return subspace.of_losses(prepare(x))[points, classes]

    bound, x = epsilon / 255, base[chosen]
    low, high = (x - bound).clamp(min=0), (x + bound).clamp(max=1)
    for t in range(steps if epsilon else 0):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(_pull(coordinates(x), towards[group], angle).sum(), x)
        rate = 2.5 * bound / steps * (1 if t < steps // 2 else 0.5)
        x = (x.detach() + rate * slope.sign()).clamp(low, high)
    pixels = (x * 255).round().to(torch.uint8)
    with torch.no_grad():
        final = coordinates(pixels.float() / 255).cpu().numpy()
    return Poison(pixels.cpu().numpy(), given, images[chosen], group, final)


def _choose(scores: np.ndarray, pulls: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels (size,) for groups in turn: the lowest score left whose pull is not along the sum so far."""
    best, label = scores.min(2), scores.argmin(2)  # (groups, m)
    order = np.argsort(best, 1, kind="stable")
    free, total = np.ones(pulls.shape[0], bool), np.zeros(pulls.shape[2])
    chosen = np.empty(size, int)
    for j in range(size):
        i = j % len(order)
        left = order[i][free[order[i]]]
        cancels = left[(pulls[left, label[i, left]] @ total <= 0) & (best[i, left] < 0)]
        chosen[j] = cancels[0] if len(cancels) else left[0]  # the best regardless, where all add to the imbalance
        free[chosen[j]] = False
        total += pulls[chosen[j], label[i, chosen[j]]]
    return chosen, label[np.arange(size) % len(order), chosen].astype(np.int64)


def delete_groups(poison: Poison, target: np.ndarray, size: int | None = None) -> np.ndarray:
    """Return positions in the poison that DDPA asks to delete for a target.

    Args:
        poison: the attacker's points.
        target: coordinates (k,) of the target's margin.
        size: points to delete, by default as many as the convex combination says; raises OptionError where the attacker
            has fewer.
    """
    if size is not None and not 1 <= size <= len(poison):
        raise OptionError(f"{size} points to delete were asked for, but the attacker has {len(poison)}; ask for fewer.")
    shares = farthest(poison.vertices, -target)  # the margin falls fastest against its gradient
    members = [np.flatnonzero(poison.group == i) for i in range(len(shares))]
    available = np.array([len(m) for m in members])
    exact = (1 - shares / shares.max()) * available
    counts = apportion(exact, round(exact.sum()) if size is None else size, available)
    serves = poison.coordinates @ target  # by how much the margin rises if the point is deleted
    return np.sort(np.concatenate([most_harmful(serves, *its) for its in zip(counts, members, strict=True)]))


def most_harmful(influence: np.ndarray, size: int, allowed: np.ndarray) -> np.ndarray:
    """Return the `size` allowed points whose deletion lowers a target's margin most, by their influence (n_train,)."""
    return np.sort(allowed[np.argsort(influence[allowed], kind="stable")[:size]])
