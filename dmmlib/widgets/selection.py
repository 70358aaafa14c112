"""What is chosen, what is known of each point, and which points are shown: no widget is needed for any of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from scipy.special import expit

from dmmlib import forget_sets, metrics
from dmmlib.data import Dataset
from dmmlib.datamodels import BLOCK, Indices
from dmmlib.errors import ForgetSetError


class Selection:
    """Training points chosen to be forgotten. Every change can be undone and is told to the functions in `on_change`.

    Args:
        n_train: size of S.
        indices: chosen to begin with.
    """

    def __init__(self, n_train: int, indices: Indices = ()) -> None:
        self._chosen = np.zeros(n_train, bool)
        self._chosen[in_range(indices, n_train)] = True
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

    def add(self, indices: Indices) -> None:
        self._change(self.mask, indices, True)

    def remove(self, indices: Indices) -> None:
        self._change(self.mask, indices, False)

    def toggle(self, index: int) -> None:
        self._change(self.mask, [index], index not in self.indices)

    def replace(self, indices: Indices) -> None:
        self._change(np.zeros_like(self._chosen), indices, True)

    def clear(self) -> None:
        self.replace(())

    def undo(self) -> None:
        """Take the last change back; nothing happens if there is none."""
        if self._past:
            self._chosen = self._past.pop()
            self._tell()

    @property
    def can_undo(self) -> bool:
        return bool(self._past)

    def _change(self, chosen: np.ndarray, indices: Indices, value: bool) -> None:
        chosen[in_range(indices, len(chosen))] = value
        if not np.array_equal(chosen, self._chosen):
            self._past.append(self._chosen)
            self._chosen = chosen
            self._tell()

    def _tell(self) -> None:
        for listener in self.on_change:
            listener()


def in_range(indices: Indices, n_train: int) -> np.ndarray:
    """Return the indices as int64 if all are of training points.

    Raises:
        ForgetSetError: for numbers that are not whole, or naming the first that is out of range.
    """
    given = np.asarray(indices).reshape(-1)
    if len(given) and not np.issubdtype(given.dtype, np.integer):
        raise ForgetSetError(f"Indices were given as {given.dtype}; give whole numbers from 0 to {n_train - 1}.")
    outside = given[(given < 0) | (given >= n_train)]
    if len(outside):
        raise ForgetSetError(
            f"{outside[0]} is no training image; only training images can be forgotten: use 0 to {n_train - 1}."
        )
    return given.astype(np.int64)


def read_indices(text: str, data: Dataset, source: str = "The text") -> np.ndarray:
    """Read indices that a user pastes or uploads: numbers in any separators, or a saved forget set's JSON.

    Raises:
        ForgetSetError: for anything but whole numbers, an index out of range, or a set made for other data.
    """
    if text.lstrip().startswith("{"):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ForgetSetError(f"{source} is no JSON ({error}); give a saved forget set or numbers.") from error
        return saved_indices(content, data, source)
    words = [word for word in re.split(r"[\s,;\[\]()]+", text) if word]
    wrong = [word for word in words if not re.fullmatch(r"-?\d{1,18}", word)]
    if wrong or not words:
        given = f"holds {wrong[0]!r}" if wrong else "is empty"
        raise ForgetSetError(f"{source} {given}; give indices such as 3, 14, 15.")
    return in_range(np.array(words, np.int64), data.n_train)


def saved_indices(content: Any, data: Dataset, source: str) -> np.ndarray:
    """Return the indices in the JSON of a saved forget set.

    Raises:
        ForgetSetError: for content of another form, or what `forget_sets.parse` refuses.
    """
    found = content if isinstance(content, dict) else {}
    forms = {"indices": (list, "a list of whole numbers"), "data_sha256": (str, "text"), "made_by": (dict, "a mapping")}
    for key, (kind, expected) in forms.items():
        if not isinstance(found.get(key, kind()), kind):
            raise ForgetSetError(f"{source} has {key} = {found[key]!r:.80}; give {expected}, as ForgetSet.save does.")
    for index in found.get("indices", ()):
        if type(index) is not int:
            raise ForgetSetError(f"{source} has {index!r:.80} among its indices; give whole numbers in one flat list.")
    return forget_sets.parse(found | {"made_by": {}}, data, source).indices


# --- what is known of each point, and which points are shown ---------------------------------------------


def memorisation(masks: np.ndarray, outputs: Any, labels: np.ndarray) -> np.ndarray:
    """How much more often models that saw a training point answer it correctly (Feldman, STOC 2020).

    Args:
        masks: training sets of models of random subsets, bool (n_models, n_train).
        outputs: their logits (n_models, n_points, n_classes), training points first; read some models at a time.
        labels: of the training points (n_train,).

    Returns:
        (n_train,), share of correct answers of models trained with the point minus that of those without; 0 where
        every model or none saw it.
    """
    n_models, n_train = masks.shape
    seen, hits = masks.sum(0), np.zeros((2, n_train), int)  # with the point, and without
    for first in range(0, n_models, BLOCK):
        rows = slice(first, first + BLOCK)
        correct = metrics.correct(outputs[rows, :n_train], labels)
        hits += [(correct & masks[rows]).sum(0), (correct & ~masks[rows]).sum(0)]
    shares = hits / np.maximum([seen, n_models - seen], 1)
    return np.where((seen > 0) & (seen < n_models), shares[0] - shares[1], 0.0)


def measures(margins: np.ndarray) -> dict[str, np.ndarray]:
    """Average each point's margin, probability of the correct class and loss in nats: margins (n_models, n_points)."""
    values = {"margin": margins, "confidence": expit(margins), "loss": np.logaddexp(0, -margins)}
    return {name: value.mean(0) for name, value in values.items()}


def shown(
    known: Mapping[str, np.ndarray],
    labels: np.ndarray,
    chosen: np.ndarray,
    part: Literal["training", "chosen", "validation"] = "training",
    label: int | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    sort: str = "index",
    descending: bool = False,
) -> np.ndarray:
    """Return the positions of the points that pass the filters, in order.

    Args:
        known: measure -> values (n_points,), training points first; NaN where it has none.
        labels: (n_points,).
        chosen: bool (n_train,).
        part: of which points.
        label: only this class; all if None.
        ranges: measure -> (lowest, highest) shown; a measure without a value at a point does not filter it.
        sort: the measure that orders the points, or "index".
        descending: from high to low.
    """
    n_train = len(chosen)
    parts = {"training": np.arange(n_train), "chosen": np.flatnonzero(chosen)}
    positions = parts.get(part, np.arange(n_train, len(labels)))
    if label is not None:
        positions = positions[labels[positions] == label]
    for name, (low, high) in (ranges or {}).items():
        values = known[name][positions]
        positions = positions[~((values < low) | (values > high))]
    values = positions if sort == "index" else known[sort][positions]
    return positions[np.argsort(-values if descending else values, kind="stable")]
