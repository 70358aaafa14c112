"""What is chosen and what is shown, without any widget: the state that `dmmlib.widgets` puts on the screen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.special import expit

from dmmlib import forget_sets
from dmmlib.data import Dataset
from dmmlib.errors import ForgetSetError

Indices = Sequence[int] | np.ndarray


class Selection:
    """Training points chosen to be forgotten. Every change can be undone; `on_change` hears of each.

    Args:
        n_train: size of S.
        indices: chosen to begin with.
    """

    def __init__(self, n_train: int, indices: Indices = ()) -> None:
        self._chosen = np.zeros(n_train, bool)
        self._chosen[self._checked(indices)] = True
        self._past: list[np.ndarray] = []
        self.on_change: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return int(self._chosen.sum())

    @property
    def mask(self) -> np.ndarray:
        """Which points are chosen: a copy, bool (n_train,)."""
        return self._chosen.copy()

    @property
    def indices(self) -> np.ndarray:
        """The chosen points, int64, sorted."""
        return np.flatnonzero(self._chosen)

    def counts(self, labels: np.ndarray, n_classes: int) -> np.ndarray:
        """How many points of each class are chosen: (n_classes,)."""
        return np.bincount(labels[self._chosen], minlength=n_classes)

    def add(self, indices: Indices) -> None:
        self._set(indices, True)

    def remove(self, indices: Indices) -> None:
        self._set(indices, False)

    def toggle(self, index: int) -> None:
        self._set([index], not self._chosen[self._checked([index])[0]])

    def replace(self, indices: Indices) -> None:
        chosen = np.zeros_like(self._chosen)
        chosen[self._checked(indices)] = True
        self._change(chosen)

    def clear(self) -> None:
        self._change(np.zeros_like(self._chosen))

    def undo(self) -> None:
        """Take the last change back; nothing happens if there is none."""
        if self._past:
            self._chosen = self._past.pop()
            self._tell()

    @property
    def can_undo(self) -> bool:
        return bool(self._past)

    def _set(self, indices: Indices, value: bool) -> None:
        chosen = self._chosen.copy()
        chosen[self._checked(indices)] = value
        self._change(chosen)

    def _change(self, chosen: np.ndarray) -> None:
        if not np.array_equal(chosen, self._chosen):
            self._past.append(self._chosen)
            self._chosen = chosen
            self._tell()

    def _tell(self) -> None:
        for listener in self.on_change:
            listener()

    def _checked(self, indices: Indices) -> np.ndarray:
        return in_range(np.asarray(indices, np.int64).reshape(-1), len(self._chosen))


def in_range(indices: np.ndarray, n_train: int) -> np.ndarray:
    """The indices, if all are of training points.

    Raises:
        ForgetSetError: naming the first that is not.
    """
    outside = indices[(indices < 0) | (indices >= n_train)]
    if len(outside):
        raise ForgetSetError(
            f"{outside[0]} is no training image; only training images can be forgotten: use 0 to {n_train - 1}."
        )
    return indices


def read_indices(text: str, data: Dataset, source: str = "The text") -> np.ndarray:
    """Indices out of what a user pastes or uploads: numbers in any separators, or a saved forget set's JSON.

    Raises:
        ForgetSetError: for anything but whole numbers, an index out of range, or a set made for other data.
    """
    if text.lstrip().startswith("{"):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ForgetSetError(f"{source} is no JSON ({error}); give a saved forget set or numbers.") from error
        return forget_sets.parse(content, data, source).indices
    words = [word for word in re.split(r"[\s,;\[\]()]+", text) if word]
    wrong = [word for word in words if not re.fullmatch(r"-?\d{1,18}", word)]
    if wrong or not words:
        given = f"holds {wrong[0]!r}" if wrong else "is empty"
        raise ForgetSetError(f"{source} {given}; give indices such as 3, 14, 15.")
    return in_range(np.array(words, np.int64), data.n_train)


# --- what is known of each point, and which points are shown ---------------------------------------------


def memorisation(masks: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """How much more often a training point is answered rightly by models that saw it (Feldman, STOC 2020).

    Args:
        masks: training sets of models of random subsets, bool (n_models, n_train).
        correct: whether they answer rightly on the training points, bool (n_models, n_train).

    Returns:
        (n_train,), share of right answers of models trained with the point minus that of those without; 0 where
        every model or none saw it.
    """
    seen = masks.sum(0)
    with_it = (masks & correct).sum(0) / np.maximum(seen, 1)
    without = (~masks & correct).sum(0) / np.maximum(len(masks) - seen, 1)
    return np.where((seen > 0) & (seen < len(masks)), with_it - without, 0.0)


def measures(margins: np.ndarray) -> dict[str, np.ndarray]:
    """Means over the originals, point by point, of what their margins say.

    Args:
        margins: (n_models, n_points), log odds of the right class.

    Returns:
        margin; confidence, the probability given to the right class; loss, its cross-entropy in nats: (n_points,).
    """
    return {
        "margin": margins.mean(0),
        "confidence": expit(margins).mean(0),
        "loss": np.logaddexp(0, -margins).mean(0),
    }


@dataclass(frozen=True)
class Filters:
    """Which points are shown, and in which order.

    Attributes:
        part: of which points.
        label: only this class; all if None.
        ranges: measure -> (lowest, highest) shown; a measure without a value at a point does not filter it.
        sort: the measure that orders the points, or "index".
        descending: from high to low.
    """

    part: Literal["training", "chosen", "validation"] = "training"
    label: int | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sort: str = "index"
    descending: bool = False


def shown(filters: Filters, known: Mapping[str, np.ndarray], labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Positions, in order, of the points that pass.

    Args:
        filters: what passes.
        known: measure -> values (n_points,), training points first; NaN where it has none.
        labels: (n_points,).
        chosen: bool (n_train,).
    """
    n_train = len(chosen)
    keep = np.zeros(len(labels), bool)
    if filters.part == "validation":
        keep[n_train:] = True
    else:
        keep[:n_train] = chosen if filters.part == "chosen" else True
    if filters.label is not None:
        keep &= labels == filters.label
    for name, (low, high) in filters.ranges.items():
        keep &= ~((known[name] < low) | (known[name] > high))
    positions = np.flatnonzero(keep)
    if filters.sort == "index":
        return positions[::-1] if filters.descending else positions
    values = known[filters.sort][positions]
    return positions[np.argsort(-values if filters.descending else values, kind="stable")]
