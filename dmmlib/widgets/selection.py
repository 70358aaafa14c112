"""What is chosen, what is known of each point, and which points are shown: no widget is needed for any of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from dmmlib.datamodels import Indices
from dmmlib.errors import ForgetSetError

Known = Mapping[str, np.ndarray]  # measure -> values (n_points,), training points first; NaN where it has none


def in_range(indices: Any, n_train: int) -> np.ndarray:
    """Return the indices as int64; raises ForgetSetError for the first that is no training point's."""
    given = np.asarray(indices).reshape(-1)
    if len(given) and not np.issubdtype(given.dtype, np.integer):
        raise ForgetSetError(f"Indices were given as {given.dtype}; give whole numbers from 0 to {n_train - 1}.")
    outside = given[(given < 0) | (given >= n_train)]
    if len(outside):
        raise ForgetSetError(f"{outside[0]} is no training image; only those can be forgotten: use 0 to {n_train - 1}.")
    return given.astype(np.int64)


class Selection:
    """Training points chosen to be forgotten. Every change can be undone and is told to the functions in `on_change`.

    `mask` says which points are chosen, bool (n_train,); a change puts another in its place, and the old one on `past`,
    as `undo` puts it on `future`.
    """

    def __init__(self, n_train: int, indices: Indices = ()) -> None:
        self.mask = np.zeros(n_train, bool)
        self.mask[in_range(indices, n_train)] = True
        self.past: list[np.ndarray] = []
        self.future: list[np.ndarray] = []
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
            self.future.append(self.mask)
            self._put(self.past.pop())

    def redo(self) -> None:
        """Make the change again that was taken back last; nothing happens if there is none."""
        if self.future:
            self.past.append(self.mask)
            self._put(self.future.pop())

    def _change(self, start: np.ndarray, indices: Indices, value: bool) -> None:
        chosen = start.copy()
        chosen[in_range(indices, len(chosen))] = value
        if not np.array_equal(chosen, self.mask):
            self.past.append(self.mask)
            self.future.clear()
            self._put(chosen)

    def _put(self, mask: np.ndarray) -> None:
        self.mask = mask
        for listener in self.on_change:
            listener()


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
