"""What is chosen, what is known of each point, and which points are shown: no widget is needed for any of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from dmmlib import forget_sets, metrics
from dmmlib.data import Dataset
from dmmlib.datamodels import BLOCK, Indices
from dmmlib.errors import ForgetSetError

Known = Mapping[str, np.ndarray]  # measure -> values (n_points,), training points first; NaN where it has none


class Selection:
    """Training points chosen to be forgotten. Every change can be undone and is told to the functions in `on_change`.

    `mask` says which points are chosen, bool (n_train,); a change puts another in its place, and the old one on `past`.
    """

    def __init__(self, n_train: int, indices: Indices = ()) -> None:
        self.mask = np.zeros(n_train, bool)
        self.mask[in_range(indices, n_train)] = True
        self.past: list[np.ndarray] = []
        self.on_change: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return int(self.mask.sum())

    @property
    def indices(self) -> np.ndarray:
        """The chosen points, int64, sorted."""
        return np.flatnonzero(self.mask)

    def add(self, indices: Indices) -> None:
        self._change(self.mask, indices, True)

    def remove(self, indices: Indices) -> None:
        self._change(self.mask, indices, False)

    def toggle(self, index: int) -> None:
        self._change(self.mask, [index], index not in self.indices)

    def replace(self, indices: Indices) -> None:
        self._change(np.zeros_like(self.mask), indices, True)

    def clear(self) -> None:
        self.replace(())

    def undo(self) -> None:
        """Take the last change back; nothing happens if there is none."""
        if self.past:
            self._put(self.past.pop())

    def _change(self, start: np.ndarray, indices: Indices, value: bool) -> None:
        chosen = start.copy()
        chosen[in_range(indices, len(chosen))] = value
        if not np.array_equal(chosen, self.mask):
            self.past.append(self.mask)
            self._put(chosen)

    def _put(self, mask: np.ndarray) -> None:
        self.mask = mask
        for listener in self.on_change:
            listener()


def in_range(indices: Indices, n_train: int) -> np.ndarray:
    """Return the indices as int64; raises ForgetSetError for the first that is no training point's."""
    given = np.asarray(indices).reshape(-1)
    if len(given) and not np.issubdtype(given.dtype, np.integer):
        raise ForgetSetError(f"Indices were given as {given.dtype}; give whole numbers from 0 to {n_train - 1}.")
    outside = given[(given < 0) | (given >= n_train)]
    if len(outside):
        raise ForgetSetError(f"{outside[0]} is no training image; only those can be forgotten: use 0 to {n_train - 1}.")
    return given.astype(np.int64)


def read_indices(text: str, data: Dataset, source: str = "The text") -> np.ndarray:
    """Read indices that a user pastes or uploads: numbers in any separators, or a saved forget set's JSON.

    Raises ForgetSetError for anything but whole numbers, an index out of range, or a set made for other data.
    """
    if text.lstrip().startswith("{"):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ForgetSetError(f"{source} is no JSON ({error}); give a saved forget set or numbers.") from error
        _check_form(content, source)
        return forget_sets.parse(content | {"made_by": {}}, data, source).indices
    words = [word for word in re.split(r"[\s,;\[\]()]+", text) if word]
    wrong = [word for word in words if not re.fullmatch(r"-?\d{1,18}", word)]
    if wrong or not words:
        given = f"holds {wrong[0]!r}" if wrong else "is empty"
        raise ForgetSetError(f"{source} {given}; give indices such as 3, 14, 15.")
    return in_range(np.array(words, np.int64), data.n_train)


def _check_form(saved: dict[str, Any], source: str) -> None:
    forms = {"indices": (list, "a list of whole numbers"), "data_sha256": (str, "text"), "made_by": (dict, "a mapping")}
    for key, (kind, expected) in forms.items():
        if not isinstance(saved.get(key, kind()), kind):
            raise ForgetSetError(f"{source} has {key} = {saved[key]!r:.80}; give {expected}, as ForgetSet.save does.")
    for index in saved.get("indices", ()):
        if type(index) is not int:
            raise ForgetSetError(f"{source} has {index!r:.80} among its indices; give whole numbers in one flat list.")


def memorisation(masks: np.ndarray, outputs: Any, labels: np.ndarray) -> np.ndarray:
    """Return by how much more often each point is answered correctly if it was trained on (Feldman, STOC 2020).

    Args:
        masks: training sets of models of random subsets, bool (n_models, n_train).
        outputs: their logits (n_models, n_points, n_classes), training points first; read some models at a time.
        labels: of the training points (n_train,), as is the answer; it is 0 where all models saw the point, or none.
    """
    n_models, n_train = masks.shape
    seen, hits = masks.sum(0), np.zeros((2, n_train), int)  # with the point, and without
    for first in range(0, n_models, BLOCK):
        rows = slice(first, first + BLOCK)
        correct = metrics.correct(outputs[rows][:, :n_train], labels)
        hits += [(correct & masks[rows]).sum(0), (correct & ~masks[rows]).sum(0)]
    shares = hits / np.maximum([seen, n_models - seen], 1)
    return np.where((seen > 0) & (seen < n_models), shares[0] - shares[1], 0.0)


def shown(
    known: Known,
    labels: np.ndarray,
    chosen: np.ndarray,
    part: Literal["training", "chosen", "validation"] = "training",
    label: int = -1,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    sort: str = "index",
    descending: bool = False,
) -> np.ndarray:
    """Return the positions of the points that pass the filters, in order.

    Args:
        labels, chosen: (n_points,), of which only `label` passes, unless it is negative; bool (n_train,).
        ranges: measure -> (lowest, highest) shown; a point of which it is not known passes.
        sort: the measure that orders the points, or "index".
    """
    n_train = len(chosen)
    parts = {"training": np.arange(n_train), "chosen": np.flatnonzero(chosen)}
    positions = parts.get(part, np.arange(n_train, len(labels)))
    if label >= 0:
        positions = positions[labels[positions] == label]
    for name, (low, high) in (ranges or {}).items():
        values = known[name][positions]
        positions = positions[~((values < low) | (values > high))]
    values = positions if sort == "index" else known[sort][positions]
    return positions[np.argsort(-values if descending else values, kind="stable")]
