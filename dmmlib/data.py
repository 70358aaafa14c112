"""Image classification data that fits in memory, as plain arrays with a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from dmmlib.errors import DataError
from dmmlib.registry import Registry, check_call

SPLITS = ("forget", "retain", "validation")  # of all points, by a forget set; so, or "all", no probes may be called
MOST_CLASSES = 10_000  # that need no names


@dataclass(frozen=True)
class Dataset:
    """A training set S and a validation set V.

    >>> x, y = np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2
    >>> data = from_arrays(x[:4], y[:4], x[4:], y[4:], class_names=("cat", "dog"))
    >>> data.n_train, data.n_val, data.n_classes
    (4, 2, 2)

    Mean and std, of each channel on a scale where 255 is 1, are what `models` normalises images by. They are fixed
    for a data set and never computed from S, so that they know nothing of F.
    """

    name: str
    x_train: np.ndarray  # uint8 images (n, height, width, channels), float32 features (n, ...), int64 tokens (n, k)
    y_train: np.ndarray  # integer labels (n_train,)
    x_val: np.ndarray
    y_val: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    ids: np.ndarray | None = None  # how the training points are called elsewhere, text (n_train,), such as file names
    probes: Mapping[str, np.ndarray] = field(default_factory=dict)  # validation points that are asked about apart
    val_ids: tuple[str, ...] = ()  # as ids, of validation points if these are known

    @property
    def n_train(self) -> int:
        return len(self.x_train)

    @property
    def n_val(self) -> int:
        return len(self.x_val)

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def x(self) -> np.ndarray:
        """Training and validation points, in this order: (n_train + n_val, ...)."""
        return np.concatenate([self.x_train, self.x_val])

    @property
    def y(self) -> np.ndarray:
        """Labels of `x`: (n_train + n_val,)."""
        return np.concatenate([self.y_train, self.y_val])

    @cached_property
    def sha256(self) -> str:
        """Hash of the arrays: forget sets and stores are bound to it."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_val, self.y_val):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def huge(numbers: list[Any]) -> list[int | str]:
    """Those that no int64 holds, which numpy takes for other than integers."""
    large = [n for n in numbers if isinstance(n, (int, float)) and abs(n) >= 2**63]
    return [n if isinstance(n, int) else f"{n:.0f}" for n in large]


def array(values: Any) -> np.ndarray:
    """Values as an array, also those of a tensor with a gradient, on a GPU, or in bfloat16."""
    if hasattr(values, "toarray"):
        raise TypeError("it is sparse: call its toarray()")
    if hasattr(values, "detach"):
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).detach().cpu()
    return np.asarray(values)


def _checked(part: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and labels as a `Dataset` holds them; arrays on disk stay there."""
    try:
        x, y = (array(np.ma.filled(v, np.nan) if np.ma.is_masked(v) else v) for v in (x, y))
    except (TypeError, ValueError) as error:  # ragged lists, masked integers
        raise DataError(f"x_{part} or y_{part} is no array ({error}); give lists of the same length.") from error
    if y.ndim != 1 or len(y) == 0 or y.shape != x.shape[:1]:
        given = f"x_{part} has shape {x.shape} and y_{part} has shape {y.shape}"
        raise DataError(f"{given}; give as many labels as points, at least one, in one dimension.")
    if x.dtype == np.uint8:
        if x.ndim != 4:
            raise DataError(f"x_{part} has shape {x.shape}; give images as (n, height, width, channels), or floats.")
    elif np.issubdtype(x.dtype, np.integer) and x.ndim == 2:
        x = x.astype(np.int64)
    elif not np.issubdtype(x.dtype, np.floating):
        given = f"x_{part} is {x.dtype}"
        raise DataError(f"{given}; give uint8 images, floating-point features, or integer tokens (n, length).")
    else:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        if bad := x.size - np.count_nonzero(np.isfinite(x)):
            raise DataError(f"x_{part} holds {bad} NaN or infinite values in float32; remove or replace them.")
    if x.ndim < 2 or x.size == 0:
        raise DataError(f"x_{part} has shape {x.shape}; give points of at least one value, as (n, ...).")
    if large := huge(y.tolist()):
        raise DataError(f"y_{part} holds the label {large[0]}; use labels from 0 to one less than there are classes.")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"y_{part} is {y.dtype}; give integer class labels.")
    on_disk = isinstance(x.base, np.memmap)  # all else may be changed by whoever gave it
    return np.ascontiguousarray(x) if on_disk else np.array(x, order="C"), y.astype(np.int64)


def _constants(name: str, given: Any, low: float, high: float, channels: int) -> tuple[float, ...]:
    """One number, or one for each channel, as plain ones: tensors of other precisions would not mix."""
    try:
        values = np.asarray(given, np.float64).ravel()
    except (TypeError, ValueError):
        values = np.empty(0)
    if len(values) not in (1, channels) or not ((values >= low) & (values <= high)).all():
        scale = f"from {low:g} to {high:g}, on a scale where 255 is 1"
        raise DataError(f"{name} is {given!r:.100}; give one number, or one for each of {channels} channels, {scale}.")
    return tuple(values.tolist())


def from_arrays(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_val: np.ndarray,
    y_val: np.ndarray,
    *,
    name: str = "arrays",
    class_names: tuple[str, ...] | None = None,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.25,),
    ids: Sequence[object] | np.ndarray | None = None,
    probes: Mapping[str, np.ndarray] | None = None,
    val_ids: Sequence[object] = (),
) -> Dataset:
    """Make a `Dataset` of a user's own arrays; DataError for shapes, values, labels or ids that cannot be used.

    `ids` name the training points (n_train,), each by its own: `own.requests.read` finds them by these names, and
    refuses `val_ids`, those of validation points.
    `probes` are positions in `x_val`, by name, of points that tables list apart and do not count among validation ones.
    """
    x_train, y_train = _checked("train", x_train, y_train)
    x_val, y_val = _checked("val", x_val, y_val)
    if x_train.shape[1:] != x_val.shape[1:] or x_train.dtype != x_val.dtype:
        train, val = (f"{x.dtype} points of shape {x.shape[1:]}" for x in (x_train, x_val))
        raise DataError(f"x_train holds {train} and x_val {val}; give both the same shape and type.")
    if class_names is None or len(class_names) == 0:
        class_names = tuple(map(str, range(min(int(y_train.max()) + 1, MOST_CLASSES))))
    names = tuple(map(str, class_names))
    if isinstance(class_names, str) or len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"The classes are {class_names!r:.100}; give at least two, each with a name of its own.")
    for part, y in (("train", y_train), ("val", y_val)):
        if y.min() < 0 or y.max() >= len(names):
            given = f"y_{part} holds labels from {y.min()} to {y.max()}"
            raise DataError(f"{given}, but there are {len(names)} classes; use labels 0 to {len(names) - 1}.")
    channels = x_train.shape[-1]
    constants = _constants("mean", mean, -10, 10, channels), _constants("std", std, 1e-3, 1e3, channels)
    known = None if ids is None else np.array([str(i) for i in ids])
    if known is not None and not len(set(known)) == len(known) == len(x_train):
        given = f"{len(known)} ids were given, {len(set(known))} of them different"
        raise DataError(f"{given}, for {len(x_train)} training points; give each point one of its own.")
    asked, every = dict[str, np.ndarray](), np.empty(0)
    with suppress(AttributeError, TypeError, ValueError):  # no mapping, no lists of numbers
        asked = {str(key): np.asarray(value) for key, value in ({} if probes is None else probes).items()}
        every = np.concatenate([*asked.values(), np.empty(0, int)])
    if taken := sorted(asked.keys() & {*SPLITS, "all"}):
        raise DataError(f"probes are named {taken[0]!r}, as points are in tables; give them another name.")
    if every.dtype.kind not in "iu" or not ((every >= 0) & (every < len(x_val))).all() or len(every) >= len(x_val):
        expected = f"by name some, not all, of the positions 0 to {len(x_val) - 1}, as integers"
        raise DataError(f"probes are {probes!r:.100}; give {expected}.")
    return Dataset(name, x_train, y_train, x_val, y_val, names, *constants, known, asked, tuple(map(str, val_ids)))


# --- loaders -------------------------------------------------------------------------------------------

Loader = Callable[..., Dataset]
DATASETS: Registry[Loader] = Registry("data set", "dmmlib.zoo.datasets", "dmmlib.zoo.requests", "dmmlib.app.images")
register = DATASETS.register  # of a function of keyword options to a `Dataset`, which `load` and presets then find


def load(name: str, n_train: int | None = None, n_val: int | None = None, seed: int = 0, **options: Any) -> Dataset:
    """Load a data set, or a random subset of it.

    >>> load("digits", n_train=100, n_val=50).x_train.shape
    (100, 8, 8, 1)

    Args:
        name: a registered name, or the path of an .npz file that holds x_train, y_train and x_val, y_val (or
            x_test, y_test), and perhaps class_names and ids (n_train,).
        n_train, n_val: how many points to draw without replacement; all if None.
        options: passed to the loader, e.g. `path=` for cifar10.

    Raises:
        MethodError, DataError, ChecksumError: for an unknown name, unusable arrays or sizes, an altered file.
    """
    name, given = str(name), [Path(name)] if str(name).endswith(".npz") else []
    loader = DATASETS["npz" if given else name]
    check_call(f"data set {name!r}", loader, *given, **options)
    full = loader(*given, **options)
    if not isinstance(full, Dataset):
        raise DataError(f"The loader of {name!r} returned {type(full).__name__}; return `data.from_arrays(...)`.")
    if not isinstance(seed, Integral) or seed < 0:
        raise DataError(f"seed={seed!r} was asked for; use a whole number from 0.")
    rng = np.random.default_rng(int(seed))
    arrays, ids, probes = [], full.ids, full.probes
    for part, x, y, n in (("train", full.x_train, full.y_train, n_train), ("val", full.x_val, full.y_val, n_val)):
        if n is not None and not (isinstance(n, Integral) and 0 < n <= len(x)):
            raise DataError(f"n_{part}={n!r} was asked of {name!r}, which has {len(x)}; ask for 1 to {len(x)}.")
        keep = np.sort(rng.permutation(len(x))[:n])
        arrays += [x, y] if len(keep) == len(x) else [x[keep], y[keep]]  # arrays on disk stay there
        ids = ids[keep] if part == "train" and ids is not None else ids
        probes = {k: np.flatnonzero(np.isin(keep, v)) for k, v in probes.items()} if part == "val" else probes
    looks = {"class_names": full.class_names, "mean": full.mean, "std": full.std}
    return from_arrays(*arrays, name=full.name, **looks, ids=ids, probes=probes, val_ids=full.val_ids)
