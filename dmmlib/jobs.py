"""Which models a preset asks for, and which of them lie in stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from fsspec.core import url_to_fs

from dmmlib.files import short
from dmmlib.presets import Preset
from dmmlib.store import Store


@dataclass(frozen=True)
class Job:
    """Models of one kind that a preset asks for.

    Attributes:
        what: which models, in words.
        name: of their model set, up to a hash that it may end with.
        n_models: how many.
        size: how many points each is trained on.
        masks: makes their masks; None where these are not known before other models are trained.
        keep_models: as in `ModelSet`.
    """

    what: str
    name: str
    n_models: int
    size: int
    masks: Callable[[], np.ndarray] | None = None
    keep_models: bool = False


def jobs(
    preset: Preset, n_train: int, n_classes: int, draw: Callable[[str, int, float], np.ndarray] | None = None
) -> list[Job]:
    """All models that a preset's main story trains.

    Args:
        preset: what asks for them.
        n_train, n_classes: of the data.
        draw: `Trainer.random_masks`, where the data are at hand.
    """
    n, d, a, t = preset.ensembles.n_models, preset.datamodels, preset.attribution, preset.tuning
    m = d.n_subsets + d.n_held_out
    made = [
        Job("originals", "originals", n, n_train, lambda: np.ones((n, n_train), bool), True),
        Job("subset models", "subsets", m, round(d.fraction * n_train), draw and partial(draw, "masks", m, d.fraction)),
        Job(
            "attribution models",
            "attribution",
            a.n_subsets,
            round(a.fraction * n_train),
            draw and partial(draw, "attribution masks", a.n_subsets, a.fraction),
            True,
        ),
    ]
    for sections, n_floor, kind in ((preset.forget_sets, n, ""), (t.forget_sets, t.n_models, "tuning: ")):
        for part in sections:
            size = n_train - (part.size or round(part.share * n_train / n_classes))
            made += [
                Job(f"{kind}oracles, {part.name}", f"oracles:{part.name}", n, size),
                Job(f"{kind}floor, {part.name}", f"floor:{part.name}", n_floor, size),
            ]
    return made


def status(jobs: Sequence[Job], root: str, identity: dict[str, Any]) -> pd.DataFrame:
    """Look which models are trained; nothing is trained, fitted or written.

    Args:
        jobs: what is looked for.
        root: where stores lie, a directory or fsspec address.
        identity: what all models depend on; see `Trainer.identity`.

    Returns:
        One row per job: models, planned, done, missing, damaged.
    """
    stores, rows = list(_stores(root, identity)), []
    for job in jobs:
        done = damaged = 0
        for store in _of(stores, job):
            bad = sum(len(store.models(shard)) for shard in store.damaged())
            whole = store.n_models - bad - sum(len(store.models(shard)) for shard in store.missing())
            done, damaged = max((done, damaged), (whole, bad))
        rows.append((job.what, job.n_models, done, job.n_models - done - damaged, damaged))
    return pd.DataFrame(rows, columns=["models", "planned", "done", "missing", "damaged"])


def _stores(root: str, identity: dict[str, Any]) -> Iterator[Store]:
    """The stores of this identity that can be read."""
    files, path = url_to_fs(root)
    for place in sorted(files.glob(f"{path}/*.zarr")):
        store = Store.existing(files.unstrip_protocol(place))
        if store is not None and all(store.config.get(key) == value for key, value in identity.items()):
            yield store


def _of(stores: Sequence[Store], job: Job) -> Iterator[Store]:
    """Those stores that hold a job's models; masks are compared where they are known."""
    named = [s for s in stores if s.n_models == job.n_models and _is(s.config["set"], job.name)]
    masks = short(np.packbits(job.masks()).tobytes()) if named and job.masks else None
    return (store for store in named if masks in (None, store.config["masks"]))


def _is(name: str, wanted: str) -> bool:
    """Whether a model set is the wanted one; an oracle set's name goes on with a hash."""
    return name == wanted or (":" in wanted and name.rpartition(":")[0] == wanted)
