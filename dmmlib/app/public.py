"""Readers of public records: count KLoM and fit datamodels at full scale without training a model.

Nothing is downloaded or executed: files are read as plain arrays, and what does not fit its description is refused in
one sentence. EasyDUB (200 originals, 200 oracles for each of 10 forget sets) has one .npy of margins for each model:

    forget_sets/<data>/forget_set_<k>.npy                          indices into the training set
    margins/<data>/pretrain/{retain,val,forget_<k>}/<model>/id_<i>_epoch_<e>.npy
    margins/<data>/oracle/forget_<k>/{retain,val,forget}/<model>/id_<i>_epoch_<e>.npy

MadryLab's datamodel data (300,000 models of half of S, and 10,000 more to evaluate) has:

    train_masks_<percent>pct.npy               bool (M, n_train)
    {train,test}_margins_<percent>pct.npy      float16 (M, n_points)
    {train,test}_logits_<percent>pct.npy       float16 (M, n_points, 10), CIFAR-10 only
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from dmmlib.errors import DataError
from dmmlib.files import check_name
from dmmlib.forget_sets import check_forget_indices

EASYDUB = "https://huggingface.co/datasets/easydub/EasyDUB-dataset"
MADRYLAB = "https://github.com/MadryLab/datamodels-data"


def _array(path: Path, mmap: bool = False) -> np.ndarray:
    """An array of numbers or truth values."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; complete the download, or correct the directory.")
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
        if array.dtype.kind not in "biuf" or not array.size:
            raise ValueError(f"it holds {array.dtype} of shape {array.shape}, not numbers")
    except Exception as error:  # a damaged file makes numpy raise a dozen kinds
        raise DataError(f"{path} cannot be read as an .npy array ({error}); fetch it again.") from error
    return array


def _path(given: Any) -> Path:
    try:
        return Path(given).expanduser()
    except (TypeError, RuntimeError) as error:
        raise DataError(f"{given!r} is no path ({error}); give the one of what was fetched.") from error


@dataclass(frozen=True)
class UnlearningRecord:
    """Margins for one forget set: of its points, retain points in the order of the training set, validation points."""

    originals: np.ndarray  # (n_models, n_points)
    oracles: np.ndarray  # the same of models trained without the forget set
    forget: np.ndarray  # indices of the forget set in the training set (n_forget,), in the order of the file
    splits: Mapping[str, np.ndarray]  # forget, retain, validation -> columns, as `metrics.klom_summary` takes them


def easydub(
    root: str | Path,
    forget_set: int,
    n_models: int = 100,
    *,
    data: str = "cifar10",
    model: str = "resnet9",
    epoch: int = 23,
) -> UnlearningRecord:
    """Read a forget set of EasyDUB. Its originals' `retain` holds all of S; the forget set is taken out of it here.

    EasyDUB's README states the 95th percentiles of doing nothing on forget set 2, with 100 models: retain 0.3191,
    forget 9.2647, validation 0.2639. Its bins are open on the right:

        record = public.easydub("EasyDUB-dataset", 2)
        values = metrics.klom(record.originals, record.oracles, convention="easydub")
        {split: np.percentile(values[at], 95) for split, at in record.splits.items()}

    Args:
        root: the directory that holds `margins` and `forget_sets`.
        forget_set: its number, from 1.
        n_models: how many originals and as many oracles, those with the lowest ids.

    Raises DataError or ForgetSetError for another layout, missing or damaged files, or what does not fit.
    """
    root = _path(root)
    for name in (data, model, str(forget_set), str(epoch)):
        check_name(name, DataError)
    margins = root / "margins" / data
    if not margins.is_dir():
        raise DataError(f"{root} holds no margins/{data}; give the directory of the data set, fetched from {EASYDUB}.")
    if not isinstance(n_models, Integral) or n_models < 1:
        raise DataError(f"n_models={n_models!r} was asked for; ask for at least one model.")

    def read(*parts: str) -> np.ndarray:
        folder = margins.joinpath(*parts, model)
        rows = [_array(folder / f"id_{i}_epoch_{epoch}.npy") for i in range(n_models)]
        shapes = {row.shape for row in rows}
        if len(shapes) > 1 or rows[0].ndim != 1:
            raise DataError(f"{folder} holds margins of shapes {sorted(shapes)}; each model's must be (n_points,).")
        with np.errstate(over="ignore"):
            return np.stack(rows).astype(np.float32)

    known = _array(root / "forget_sets" / data / f"forget_set_{forget_set}.npy")
    own = f"forget_{forget_set}"
    folders = {"forget": (own, "forget"), "retain": ("retain", "retain"), "validation": ("val", "val")}
    pairs = {split: (read("pretrain", u), read("oracle", own, o)) for split, (u, o) in folders.items()}
    originals, oracles = pairs["retain"]
    if known.dtype.kind == "f" and (abs(known) < 2**31).all() and (known % 1 == 0).all():
        known = known.astype(np.int64)  # whole numbers, written as others
    forget = check_forget_indices(known, originals.shape[1])
    if oracles.shape == originals.shape:
        oracles = np.delete(oracles, forget, axis=1)
    pairs["retain"] = np.delete(originals, forget, axis=1), oracles
    for split, (u, o) in pairs.items():
        if u.shape != o.shape:
            both = f"originals have margins {u.shape} and oracles {o.shape}"
            raise DataError(f"Forget set {forget_set}, {split}: {both}; both must be for the same points.")
    u, o = (np.concatenate(part, axis=1) for part in zip(*pairs.values(), strict=True))
    ends = np.cumsum([before.shape[1] for before, _ in pairs.values()])
    return UnlearningRecord(u, o, forget, dict(zip(pairs, np.split(np.arange(ends[-1]), ends[:-1]), strict=True)))


@dataclass(frozen=True)
class SubsetRecord:
    """Outputs of models trained on random subsets, mapped from disk: slice them, each read is a copy."""

    masks: np.ndarray  # training sets, bool (M, n_train)
    outputs: np.ndarray  # float16 (M, n_points, n_outputs): margins (one output), or the logits of all classes


def datamodel_data(root: str | Path, split: str = "test", percent: int = 50, *, logits: bool = False) -> SubsetRecord:
    """Map MadryLab's training data for datamodels. A ridge datamodel of test margins on the first 20,000 models:

        record = public.datamodel_data("cifar/data", "test")
        model = RidgeDatamodel.fit(record.masks[:20_000], record.outputs[:20_000], lam=0.1)
        model.effect(forget)  # (n_points, 1): predicted change of the margins without the forget set

    Args:
        split: "train" or "test": whose outputs.
        percent: share of the training set in a subset: 10, 20, 50 or 75 are public.
        logits: all classes' logits in the place of margins.

    Raises DataError for a missing or damaged file, or arrays that do not fit each other.
    """
    if split not in ("train", "test"):
        raise DataError(f"split={split!r} was asked for; use 'train' or 'test'.")
    if not isinstance(percent, Integral) or not 0 < percent < 100:
        raise DataError(f"percent={percent!r} was asked for; use 10, 20, 50 or 75.")
    root = _path(root)
    masks = _array(root / f"train_masks_{percent}pct.npy", mmap=True)
    path = root / f"{split}_{'logits' if logits else 'margins'}_{percent}pct.npy"
    outputs = _array(path, mmap=True)
    if masks.dtype != bool or masks.ndim != 2:
        raise DataError(f"The masks are {masks.dtype} of shape {masks.shape}; they must be booleans (M, n_train).")
    if outputs.ndim != (3 if logits else 2) or len(outputs) != len(masks):
        expected = f"({len(masks)}, n_points{', n_classes' if logits else ''})"
        raise DataError(f"{path.name} has shape {outputs.shape} and there are {len(masks)} masks; expected {expected}.")
    if outputs.dtype.kind != "f":
        raise DataError(f"{path.name} holds {outputs.dtype}; expected floating-point numbers.")
    share = float(masks[:100].mean())
    if abs(share - percent / 100) > 0.05:
        raise DataError(f"The first masks hold {share:.0%} of the training set, not {percent} %; check percent.")
    return SubsetRecord(masks, outputs if logits else outputs[:, :, None])
