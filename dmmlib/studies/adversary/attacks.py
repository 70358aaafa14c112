"""Which points to ask a service to delete, so that a target chosen after training is answered wrongly.

All requests are indices of training points. The attacker's own come from `Poison`: to move the parameters along d, the
direction in which the target's margin falls fastest in the subspace, take the convex coordinates lambda of the point
where d leaves the simplex, keep of group i the share lambda_i / max lambda and delete the rest: what is kept pulls to
sum_i lambda_i v_i / max lambda, a multiple of d, as the whole simplex pulled nowhere.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dmmlib.datamodels import Attributor
from dmmlib.errors import OptionError
from dmmlib.metrics import right_logits
from dmmlib.studies.adversary.crafting import Poison
from dmmlib.studies.adversary.simplex import apportion, farthest


class Datamodel(Attributor, Protocol):
    """An attributor that answers any number of requests at a time."""

    def change(self, masks: np.ndarray) -> np.ndarray:
        """Change of logits, in the margin gauge, (k, n_points, n_classes) of models trained on each of some masks."""
        ...


def wanted(target: np.ndarray) -> np.ndarray:
    """d (k,), of length 1, for the coordinates (k,) of the target's margin."""
    return -target / max(float(np.linalg.norm(target)), 1e-12)


def delete_groups(
    poison: Poison, target: np.ndarray, size: int | None = None, left: np.ndarray | None = None
) -> np.ndarray:
    """Positions in the poison that DDPA asks to delete for a target.

    Args:
        poison: the attacker's points.
        target: coordinates (k,) of the target's margin.
        size: points to delete, by default as many as the convex combination says; raises OptionError where the attacker
            has fewer.
        left: which points are still there, bool (p,); all by default.
    """
    there = np.ones(len(poison), bool) if left is None else left
    if size is not None and not 1 <= size <= there.sum():
        raise OptionError(f"{size} points to delete were asked for, but the attacker has {there.sum()}; ask for fewer.")
    shares = farthest(poison.vertices, wanted(target))
    members = [np.flatnonzero(there & (poison.group == i)) for i in range(len(shares))]
    available = np.array([len(m) for m in members])
    exact = (1 - shares / shares.max()) * available
    counts = apportion(exact, round(exact.sum()) if size is None else size, available)
    serves = poison.coordinates @ target  # by how much the margin rises if the point is deleted
    return np.sort(np.concatenate([most_harmful(serves, *its) for its in zip(counts, members, strict=True)]))


def most_harmful(influence: np.ndarray, size: int, allowed: np.ndarray) -> np.ndarray:
    """The `size` allowed points that lower a target's margin most when deleted, by the influence (n_train,) of each."""
    return np.sort(allowed[np.argsort(influence[allowed], kind="stable")[:size]])


def datamodel_influence(model: Datamodel, labels: np.ndarray, n_train: int, points: np.ndarray) -> np.ndarray:
    """Change of the margins of some points (t,) on deletion of each training point (t, n_train), by a datamodel."""
    without = np.array_split(~np.eye(n_train, dtype=bool), -(-n_train // 100))
    return np.concatenate([right_logits(model.change(masks), labels)[:, points] for masks in without]).T
