"""Forget sets: which training points are to be unlearned, how they are chosen, and for which data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmmlib.data import Dataset, huge
from dmmlib.errors import ForgetSetError
from dmmlib.files import check_alone, check_name, load_json, write_bytes

if TYPE_CHECKING:
    from dmmlib.presets import ForgetSetSection


def check_forget_indices(forget: Sequence[int] | np.ndarray, n_train: int | None = None) -> np.ndarray:
    """Forget indices as int64; raises ForgetSetError unless they are some but not all points, each given once.

    With n_train None they may be of a training set of any size.
    """
    expected = "0 upwards" if n_train is None else f"0 to {n_train - 1}"
    try:
        indices = np.asarray(forget)
    except ValueError as error:  # lists of different lengths
        raise ForgetSetError("Forget indices are lists of different lengths; give one list of integers.") from error
    if indices.ndim != 1:
        raise ForgetSetError(f"Forget indices have shape {indices.shape}; give one list of integers.")
    if len(indices) == 0:
        raise ForgetSetError("The forget set is empty; give at least one index of a training point.")
    outside = huge(indices.tolist())
    if not outside and not np.issubdtype(indices.dtype, np.integer):
        raise ForgetSetError(f"Forget indices are {indices.dtype}; give integers from {expected}.")
    most = 2**63 if n_train is None else n_train
    if outside := outside or indices[(indices < 0) | (indices >= most)].tolist():
        points = "any training set" if n_train is None else f"the training set of {n_train} points"
        raise ForgetSetError(f"Forget index {outside[0]} is outside {points}; use {expected}.")
    values, counts = np.unique(indices, return_counts=True)
    if len(twice := values[counts > 1]):
        raise ForgetSetError(f"Forget index {twice[0]} is given {counts.max()} times; give each point once.")
    if len(indices) == n_train:
        raise ForgetSetError(f"The forget set is all {n_train} training points; leave some to retain.")
    return indices.astype(np.int64)


def indicator(forget: Sequence[int] | np.ndarray, n_train: int) -> np.ndarray:
    """1_F (n_train,), float32; raises ForgetSetError for indices that are no proper part of the training set."""
    u = np.zeros(n_train, np.float32)
    u[check_forget_indices(forget, n_train)] = 1
    return u


@dataclass(frozen=True)
class ForgetSet:
    """A named forget set.

    >>> forget = ForgetSet("two", np.array([1, 3]))
    >>> forget.splits(n_train=5, n_val=2)["retain"]
    array([0, 2, 4])
    """

    name: str  # unique within a study; also a file's
    indices: np.ndarray  # the training points to forget, int64, sorted, of any list that is given
    made_by: dict[str, Any] = field(default_factory=dict)  # how it was chosen, JSON-serialisable
    data_sha256: str = ""  # the data set that the indices refer to

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", np.sort(check_forget_indices(self.indices)))

    def __len__(self) -> int:
        return len(self.indices)

    def splits(self, n_train: int, n_val: int) -> dict[str, np.ndarray]:
        """Positions of the forget, retain and validation points among all points (training first)."""
        retain = np.flatnonzero(self.mask(n_train))
        return {"forget": self.indices, "retain": retain, "validation": np.arange(n_train, n_train + n_val)}

    def mask(self, n_train: int) -> np.ndarray:
        """True for the retained points: bool (n_train,); ForgetSetError for a point beyond them."""
        return ~np.isin(np.arange(n_train), check_forget_indices(self.indices, n_train))

    def save(self, path: Path) -> None:
        """Write as JSON, atomically; ForgetSetError where another set's file has that name in other case."""
        check_alone(Path(path), ForgetSetError)
        write_bytes(path, (json.dumps({**vars(self), "indices": self.indices.tolist()}, indent=1) + "\n").encode())


def make(name: str, indices: Sequence[int] | np.ndarray, data: Dataset, **made_by: Any) -> ForgetSet:
    """A forget set of any indices; raises ForgetSetError for indices, or a name as a file, that cannot be used."""
    indices = check_forget_indices(indices, data.n_train)
    return ForgetSet(check_name(name, ForgetSetError), indices, made_by or {"kind": "indices"}, data.sha256)


def checked(forget_set: Any, data: Dataset) -> ForgetSet:
    """The forget set; raises ForgetSetError for anything else, such as a list, and for a set of other data."""
    if not isinstance(forget_set, ForgetSet):
        raise ForgetSetError(f"{forget_set!r:.60} is no forget set; make one by forget_sets.make(name, indices, data).")
    if forget_set.data_sha256:
        _check_data(f"Forget set {forget_set.name!r}", forget_set.data_sha256, data)
    check_forget_indices(forget_set.indices, data.n_train)
    return forget_set


def _check_data(what: str, sha256: Any, data: Dataset) -> None:
    if sha256 != data.sha256:
        made = f"{what} was made for data {sha256!s:.12}, but this is {data.name} {data.sha256:.12}"
        raise ForgetSetError(f"{made}; load the data set it was made for, or make it again.")


def chosen_on(tuning: dict[str, ForgetSet], own: ForgetSet | None) -> dict[str, ForgetSet]:
    """The tuning sets; warns where a set of one's own holds half of one, as hyperparameters are chosen on it."""
    for name, f in tuning.items():
        if own and (share := float(np.isin(f.indices, own.indices).mean())) >= 0.5:
            said = f"holds {share:.0%} of {name!r}, on which hyperparameters are chosen, so that its results flatter"
            warnings.warn(f"Forget set {own.name!r} {said}; choose other tuning sets for it.", stacklevel=3)
    return tuning


def load(path: Path, data: Dataset) -> ForgetSet:
    """Read a forget set; StoreError if there is no JSON, ForgetSetError if it is of other data or cannot be used."""
    return parse(load_json(path), data, str(path))


def parse(content: Any, data: Dataset, path: str) -> ForgetSet:
    """What `ForgetSet.save` wrote, checked as by `load`; `path` is named where it cannot be used."""
    if missing := {"name", "indices", "data_sha256"} - set(content if isinstance(content, dict) else {}):
        raise ForgetSetError(f"{path} lacks {', '.join(sorted(missing))}; save forget sets with ForgetSet.save.")
    _check_data(path, content["data_sha256"], data)
    made, made_by = make(content["name"], content["indices"], data), content.get("made_by", {"kind": "indices"})
    if not isinstance(made_by, dict):
        raise ForgetSetError(f"{path} has made_by {made_by!r}; give a mapping, such as {made.made_by}.")
    return replace(made, made_by=made_by)


# --- ways to choose ------------------------------------------------------------------------------------


def _pool(points: np.ndarray, size: int, exclude: np.ndarray | None, what: str = "the pool") -> np.ndarray:
    """The points, in their order, that are not in `exclude`; raises ForgetSetError if they are fewer than `size`."""
    left = points if exclude is None else points[~np.isin(points, exclude)]
    if len(left) == 0:
        raise ForgetSetError(f"{size} points were asked for, but {what} has none; choose others.")
    if not 0 < size <= len(left):
        raise ForgetSetError(f"{size} points were asked for, but {what} has {len(left)}; ask for 1 to {len(left)}.")
    return left


def random(data: Dataset, size: int, rng: np.random.Generator, exclude: np.ndarray | None = None) -> np.ndarray:
    """`size` training points drawn at random, none of them in `exclude`."""
    return rng.choice(_pool(np.arange(data.n_train), size, exclude), size, replace=False)


def highest(scores: np.ndarray, size: int, exclude: np.ndarray | None = None) -> np.ndarray:
    """The `size` points of highest score, none of them in `exclude`."""
    return _pool(np.argsort(-scores, kind="stable"), size, exclude)[:size]


def both_ends(scores: np.ndarray, size: int, exclude: np.ndarray | None = None) -> np.ndarray:
    """Half of `size` with the highest and half with the lowest scores."""
    top = highest(scores, size - size // 2, exclude)
    skip = top if exclude is None else np.concatenate([top, exclude])
    return np.concatenate([top, highest(-scores, size // 2, skip)])


def nearest(features: np.ndarray, point: int, size: int, exclude: np.ndarray | None = None) -> np.ndarray:
    """A training point and its nearest neighbours, `size` in all, by Euclidean distance; none of them in `exclude`."""
    if not 0 <= point < len(features):
        raise ForgetSetError(f"Point {point} is outside the {len(features)} training points; use one of them.")
    distances = ((features - features[point]) ** 2).sum(1)
    distances[point] = -1
    return highest(-distances, size, exclude)


def of_ids(
    data: Dataset, start: str, size: int | None, rng: np.random.Generator, exclude: np.ndarray | None = None
) -> np.ndarray:
    """The training points whose ids begin so, all or `size` at random, none of them in `exclude`."""
    members = np.flatnonzero(np.char.startswith(data.ids, start)) if data.ids is not None else np.empty(0, int)
    known = "has no ids" if data.ids is None else f"has ids such as {str(data.ids[0])!r}"
    if not len(members):
        raise ForgetSetError(f"No id of a training point begins with {start!r}; {data.name} {known}.")
    pool = _pool(members, size or 1, exclude, f"ids that begin with {start!r}, without points that other sets hold,")
    return pool if size is None else rng.choice(pool, size, replace=False)


def class_share(
    data: Dataset, label: int, share: float, rng: np.random.Generator, exclude: np.ndarray | None = None
) -> np.ndarray:
    """A random share, in (0, 1], of the training points of one class, none of them in `exclude`."""
    if not 0 <= label < data.n_classes:
        raise ForgetSetError(f"Class {label} is unknown; use 0 to {data.n_classes - 1}.")
    if not 0 < share <= 1:
        raise ForgetSetError(f"The share {share} of a class was asked for; use a number above 0 and at most 1.")
    members = np.flatnonzero(data.y_train == label)
    size = max(1, round(share * len(members)))
    pool = _pool(members, size, exclude, f"class {label}, without points that other sets hold,")
    return rng.choice(pool, size, replace=False)


def choose(
    part: ForgetSetSection,
    data: Dataset,
    features: Callable[[], np.ndarray],
    loadings: Callable[[], np.ndarray],
    rng: np.random.Generator,
    exclude: np.ndarray | None = None,
) -> np.ndarray:
    """The points that a preset asks for, with features and loadings (n_train, ...) where its kind needs them."""
    size = part.size or 1
    if part.kind == "random":
        return random(data, size, rng, exclude)
    if part.kind == "nearest":
        return nearest(features(), part.point, size, exclude)
    if part.kind == "ids":
        return of_ids(data, part.ids or "", part.size, rng, exclude)
    if part.kind == "class":
        return class_share(data, part.label, part.share, rng, exclude)
    return (highest if part.kind == "pc" else both_ends)(loadings()[:, part.component - 1], size, exclude)
