"""What a user brings: a module, data in whatever form they have it, and how models are trained."""

from __future__ import annotations

import re
import runpy
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from dmmlib import data as datasets
from dmmlib import models
from dmmlib.data import Dataset, from_arrays
from dmmlib.ensemble import Training
from dmmlib.errors import DataError, DmmError, ModelError
from dmmlib.loops import Loop

NAME = "recipe"  # under which its data and model are registered, for presets
ROLES = ("label", "id", "split")  # columns of a table that are no features
TABLES: dict[str, Callable[..., pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, converters={"id": str}),  # as it is written: 007 is not 7
    ".parquet": pd.read_parquet,
}
VALIDATION = 5  # one of so many rows of a table validates, by their hashes, where no column says which
ITEMS = "let its items be (x, y), or give arrays, (x_train, y_train, x_val, y_val)"
FORMS = "a Dataset, four arrays, two torch data sets, a mapping for `from_arrays`, or a path"


@dataclass(frozen=True)
class Recipe:
    """How models of one's own are made.

    >>> x, y = torch.randn(40, 4), torch.arange(40) % 2
    >>> Recipe(lambda: nn.Linear(4, 2), (x[:30], y[:30], x[30:], y[30:]), Training(epochs=2)).dataset.n_train
    30

    Args:
        model: makes a fresh module, which takes points (n, ...) to logits (n, n_classes).
        data: a `Dataset`; arrays (x_train, y_train, x_val, y_val); two torch data sets (train, validation), read once
            and in order; a mapping of arguments for `data.from_arrays`, such as ids; a registered name; or the path of
            an .npz, of a folder with train/<class>/ and val/<class>/ of images, or of a .csv or .parquet table with a
            column `label`, perhaps `id` and `split` (train, val), and features in all others.
        train: a `Training`, or a function train(model, x, y, seed) that returns the trained model.
        prepare: what turns the data's points into what the module takes, by default `models.normalise`: images become
            normalised (n, channels, height, width), all else stays as it is.
        seed: of the subset models.
        device: auto, cpu or cuda.
        scheduler: local, local-cluster, or the address of a Dask scheduler whose workers train the subset models.
    """

    model: Callable[[], nn.Module]
    data: Any
    train: Training | Loop = Training()  # noqa: RUF009 (it is frozen)
    prepare: models.Prepare = models.normalise
    seed: int = 0
    device: str = "auto"
    scheduler: str = "local"

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module) or not callable(self.model):
            raise ModelError(f"model is a {type(self.model).__name__}; give what makes a fresh one, such as its class.")
        if not isinstance(self.train, Training) and not callable(self.train):
            given = type(self.train).__name__
            raise ModelError(f"train is a {given}; give a Training, or a function train(model, x, y, seed) -> model.")
        if not callable(self.prepare):
            raise ModelError(f"prepare is a {type(self.prepare).__name__}; leave it out, or give a function (data, x).")

    @cached_property
    def dataset(self) -> Dataset:
        """The data as arrays; DataError, in one line, for what cannot be used."""
        return dataset(self.data)

    @property
    def loop(self) -> Loop | None:
        """The function that trains, if it is the user's own."""
        return None if isinstance(self.train, Training) else self.train

    def preset(self, n_subsets: int) -> dict[str, Any]:
        """Register data and model, and give the preset by which `Trainer` finds them."""

        def load() -> Dataset:
            return self.dataset

        def make(shape: tuple[int, ...], n_classes: int) -> nn.Module:
            return self.model()

        datasets.DATASETS.add(NAME, load)
        models.MODELS.add(NAME, models.ModelSpec(make, self.prepare, self.loop))
        unused = {"name": "unused", "kind": "random", "size": 1}  # a preset has forget sets
        return {
            "name": NAME,
            "seed": self.seed,
            "device": self.device,
            "scheduler": self.scheduler,
            "data": {"name": NAME, "n_train": None, "n_val": None},
            "model": {"name": NAME},
            "training": asdict(self.train) if isinstance(self.train, Training) else {},
            "ensembles": {"shard": 1 if self.loop else 10},
            "attribution": {"n_subsets": n_subsets},
            "forget_sets": [unused],
            "tuning": {"forget_sets": [unused | {"name": "tuning"}]},
        }


def load(path: Path) -> Recipe:
    """Run a Python file and give its `recipe`; raises ModelError, in one line, if it has none.

    Files beside it can be imported, later too, and in worker processes; each recipe has its own.
    """
    if not Path(path).is_file():
        raise ModelError(f"{path} is no file; give a Python file with `recipe = dmmlib.Recipe(model=..., data=...)`.")
    folder, known = Path(path).resolve().parent, set(sys.modules)
    sys.path.insert(0, str(folder))  # which worker processes are given, too
    try:
        found = runpy.run_path(str(path), run_name=NAME).get("recipe")
    except DmmError:
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(f"{path} fails ({said}); mend it.") from error
    finally:  # what is no module of this process goes to others whole
        for name in set(sys.modules) - known:
            if folder in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]
    if not isinstance(found, Recipe):
        raise ModelError(f"{path} defines no `recipe`; let it say `recipe = dmmlib.Recipe(model=..., data=...)`.")
    return found


def dataset(given: Any) -> Dataset:
    """Data in any of the forms that `Recipe` takes."""
    if isinstance(given, Dataset):
        return given
    if isinstance(given, Mapping):
        try:
            return from_arrays(**given)
        except TypeError as error:
            keys = ", ".join(map(str, given))
            raise DataError(f"data has keys {keys} ({error}); give those of from_arrays.") from None
    if isinstance(given, (str, Path)):
        return _at(Path(given))
    if isinstance(given, (tuple, list)) and len(given) == 4:
        return from_arrays(*given)
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(hasattr(part, "__getitem__") for part in given):
        (x, y), (x_val, y_val) = (_read(part) for part in given)
        return from_arrays(x, y, x_val, y_val, class_names=tuple(getattr(given[0], "classes", ())) or None)
    raise DataError(f"data is a {type(given).__name__}; give {FORMS}.")


def _at(path: Path) -> Dataset:
    if path.is_dir():
        return datasets.load("images", path=path)
    if path.suffix in TABLES and path.is_file():
        return _table(path)
    if path.suffix == ".npz" or (not path.exists() and str(path) in datasets.DATASETS):
        return datasets.load(str(path))
    what = "is no folder, .npz, .csv or .parquet" if path.exists() else "does not exist, nor is it a data set's name"
    raise DataError(f"{path} {what}; give {FORMS}.")


def _read(part: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points and labels of a torch data set."""
    try:
        items = [part[i] for i in range(len(part))]
        if items and isinstance(items[0], Mapping):
            raise TypeError(f"its items are mappings of {', '.join(map(str, items[0]))}")
        return np.stack([np.asarray(x) for x, _ in items]), np.stack([np.asarray(y) for _, y in items])
    except (Exception, SystemExit) as error:  # whatever a data set, its transforms or its shapes raise
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"A torch data set cannot be read as points and labels ({said}); {ITEMS}.") from error


def _table(path: Path) -> Dataset:
    try:
        table = TABLES[path.suffix](path)
    except Exception as error:  # pandas and pyarrow raise a dozen kinds, or are not there
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split()):.200}).") from error
    if "label" not in table:
        raise DataError(f"{path} has columns {', '.join(map(str, table.columns))}; call that of the classes `label`.")
    for name in map(str, table.columns):
        if name.startswith("Unnamed: "):
            raise DataError(f"A column of {path} has no name; write it without an index (index=False), or call it id.")
        if (known := re.sub(r"\.[0-9]+$", "", name.strip().lower())) in ROLES and name not in ROLES:
            raise DataError(f"{path} has a column {name!r}; call one column {known}, and no other like it.")
    names = sorted(table["label"].dropna().unique())
    features = table.drop(columns=list(ROLES), errors="ignore")
    if odd := [name for name in features if not pd.api.types.is_numeric_dtype(features[name])]:
        raise DataError(f"Column {odd[0]!r} of {path} holds {features[odd[0]].dtype}; give numbers, or drop it.")
    for column, what in (("label", "a label (an empty cell, NA and None are none)"), ("id", "an id")):
        if bad := int(table[column].isna().sum()) if column in table else 0:
            raise DataError(f"{path} has {bad} rows without {what}; give each one, or drop them.")
    if pd.api.types.is_float_dtype(table["label"]) and (table["label"] % 1).any():
        raise DataError(f"Column 'label' of {path} holds fractions, such as {names[0]:g}; give classes.")
    if "split" in table and (wrong := sorted(set(map(str, table["split"])) - {"train", "val"})):
        raise DataError(f"Column 'split' of {path} holds {wrong[0]!r}; give train or val, or leave such rows out.")
    x, y = features.to_numpy(np.float32), table["label"].map({name: i for i, name in enumerate(names)}).to_numpy()
    for i, whole in enumerate(features):
        exact = features[whole]
        if pd.api.types.is_integer_dtype(exact) and (rounded := (exact != x[:, i].astype(float))).any():
            large = f"Column {whole!r} of {path} is rounded in float32, as {exact[rounded].iloc[0]}"
            raise DataError(f"{large}; subtract a constant, or scale it.")
    rows = table["id"] if "id" in table else pd.Series(range(len(table)))  # an index counts training points only
    if "split" in table:
        held_out = (table["split"] == "val").to_numpy()
    else:  # whatever other rows there are: one that is deleted moves no other
        keys = [name.encode() for name in rows.astype(str)] if "id" in table else [row.tobytes() for row in x]
        held_out = np.array([zlib.crc32(key) % VALIDATION == 0 for key in keys])
        said = "say by a column `split` (train, val) which train"
        if idle := sorted(set(y) - set(y[~held_out])):
            n = (y == idle[0]).sum()
            raise DataError(f"Class {str(names[idle[0]])!r} of {path} has {n} rows, none of which trains; {said}.")
        if not held_out.any():
            raise DataError(f"None of the {len(y)} rows of {path} validates; {said}.")
    ids, val_ids = (rows[part].astype(str).tolist() for part in (~held_out, held_out))
    options: dict[str, Any] = {"name": path.stem, "class_names": tuple(map(str, names)), "ids": ids, "val_ids": val_ids}
    return from_arrays(x[~held_out], y[~held_out], x[held_out], y[held_out], **options)
