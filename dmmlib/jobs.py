"""Which models a preset asks for, and which of them lie in stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd
from fsspec.core import url_to_fs

from dmmlib.errors import DamageError
from dmmlib.presets import Preset
from dmmlib.store import Store


@dataclass(frozen=True)
class Job:
    """Models of one kind.

    Attributes:
        what: which models, in words.
        size: how many points each is trained on.
        sets: name of each model set -> how many models it has; an oracle set's name goes on with a hash.
        weights: whether weights are kept, too.
    """

    what: str
    size: int
    sets: Mapping[str, int]
    weights: bool = True

    @property
    def n_models(self) -> int:
        return sum(self.sets.values())


def jobs(preset: Preset, n_train: int, n_classes: int) -> Iterator[Job]:
    """All models that a preset's main story trains, on data of that size."""
    n, d, t, a = preset.ensembles.n_models, preset.datamodels, preset.tuning, preset.attribution
    yield Job("originals", n_train, {"originals": n})
    yield Job("subset models", round(d.fraction * n_train), {"subsets": d.n_subsets + d.n_held_out}, False)
    yield Job("attribution models", round(a.fraction * n_train), {"attribution": a.n_subsets})
    for parts, n_floor, kind in ((preset.forget_sets, n, ""), (t.forget_sets, t.n_models, "tuning: ")):
        for f in parts:
            size = n_train - (f.size or round(f.share * n_train / n_classes))
            sets = {f"oracles:{f.name}": n, f"floor:{f.name}": n_floor}
            yield Job(f"{kind}oracles and floor, {f.name}", size, sets, False)


def stores(root: str, identity: Mapping[str, Any]) -> tuple[list[Store], list[str]]:
    """Find the stores under a root whose models depend on `identity`, and say which cannot be read."""
    files, place = url_to_fs(root)
    found, damaged = list[Store](), list[str]()
    for path in sorted(files.glob(f"{place}/*.zarr")):
        try:
            store = Store.existing(files.unstrip_protocol(path))
        except DamageError as error:
            damaged.append(str(error))
        else:
            if store is not None and all(store.config.get(k) == v for k, v in identity.items()):
                found.append(store)
    return found, damaged


def status(asked: Sequence[Job], root: str, identity: Mapping[str, Any]) -> pd.DataFrame:
    """Look which models are trained; nothing is trained, fitted or written.

    Args:
        asked: what is looked for.
        root: where stores lie, a directory or fsspec address.
        identity: what all models depend on; see `Trainer.identity`.

    Returns:
        One row per job: models, planned, done, missing, damaged.
    """
    there, rows = stores(root, identity)[0], []
    for job in asked:
        done = damaged = 0
        for name, n in job.sets.items():
            of_set = [store for store in there if _holds(store, name, n, job.size)]
            for store in sorted(of_set, key=lambda store: len(store.missing()))[:1]:  # the fullest
                bad = store.count(store.damaged())
                damaged += bad
                done += n - store.count(store.missing()) - bad
        rows.append((job.what, job.n_models, done, job.n_models - done - damaged, damaged))
    return pd.DataFrame(rows, columns=["models", "planned", "done", "missing", "damaged"])


def _holds(store: Store, name: str, n: int, size: int) -> bool:
    """Whether some of a model set lie in a store: n models of `size` points, whose name a hash may follow."""
    found, done = store.config["set"], set(range(store.n_shards)).difference(store.missing())
    if not done or store.n_models != n or (found != name and (":" not in name or found.rpartition(":")[0] != name)):
        return False
    first = store.models(min(done)).start
    with suppress(DamageError):
        return int(store.read("masks", first, first + 1).sum()) == size
    return True
