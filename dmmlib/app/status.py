"""What lies on disk: which models are trained, and which files are damaged (`dmm status PRESET`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fsspec.core import url_to_fs

from dmmlib.errors import DamageError
from dmmlib.files import load_json, read_arrays, read_json, read_table
from dmmlib.jobs import Job
from dmmlib.store import Store, reaching
from dmmlib.studies.cheap import settings as cheap
from dmmlib.study import Study

Found = tuple[dict[Store, list[int]], list[str]]
READERS: dict[str, Callable[[Path], Any]] = {".json": read_json, ".npz": read_arrays, ".csv": read_table}


def stores(study: Study) -> Found:
    """Find the stores of a study's models, each with its damaged shards, and say which stores cannot be read."""
    found, unread = dict[Store, list[int]](), list[str]()
    with reaching(study.root):
        files, place = url_to_fs(study.root)
        paths = sorted(files.glob(f"{place}/*.zarr"))
    for path in paths:
        try:
            store = Store.existing(files.unstrip_protocol(path))
        except DamageError as error:
            unread.append(str(error))
        else:
            if store is not None and all(store.config.get(k) == v for k, v in study.identity.items()):
                found[store] = store.damaged()
    return found, unread


def trained(study: Study, asked: Sequence[Job] | None = None, found: Found | None = None) -> pd.DataFrame:
    """Look which models are trained; nothing is trained, fitted or written.

    Args:
        asked: what is looked for; all that the study and notebook 07 ask for if None.
        found: what `stores` found, if it was asked before, since it reads every number.

    Returns:
        One row per job: models, planned, done, missing, damaged.
    """
    if asked is None:
        asked = [*study.jobs(), *cheap.jobs(study.preset, study.data.n_train)]
    there, rows = (found or stores(study))[0], []
    exact = [] if study.own is None else [study.oracle_set(study.own, floor).name for floor in (False, True)]
    own = {name.rpartition(":")[0]: name for name in exact}  # not those of another set that had its name
    for job in asked:
        done = damaged = 0
        for name, n in job.sets.items():
            of_set = [store for store in there if _holds(store, own.get(name, name), n, job)]
            for store in sorted(of_set, key=lambda store: len(store.missing()))[:1]:  # the fullest
                bad = store.count(there[store])
                damaged += bad
                done += n - store.count(store.missing()) - bad
        rows.append((job.what, job.n_models, done, job.n_models - done - damaged, damaged))
    return pd.DataFrame(rows, columns=["models", "planned", "done", "missing", "damaged"])


def _holds(store: Store, name: str, n: int, job: Job) -> bool:
    """Whether some of a job's model set lie in a store: n models, whose name a hash may follow."""
    found, until = store.config["set"], store.config.get("until", 1.0)
    named = found == name or (":" in name and found.rpartition(":")[0] == name)
    if not named or store.n_models != n or until != job.until:
        return False
    if not (done := set(range(store.n_shards)).difference(store.missing())):
        return False
    first = store.models(min(done)).start
    with suppress(DamageError):
        return int(store.read("masks", first, first + 1).sum()) == job.size
    return True


def damage(study: Study, repair: bool = False, found: Found | None = None) -> list[str]:
    """Name each file that is damaged: of the study's runs, and of all that runs share; trains nothing.

    With `repair` what is damaged goes, so that it is missing, and a run makes it anew. A description of a store is
    left, as the run that needs it writes it anew and finds the models. `found` is as of `trained`.
    """
    there, unread = found or stores(study)
    said = [*unread]
    for store, damaged in there.items():
        for shard in damaged:
            said.append(f"{store.address}, shard {shard}, is damaged; a run trains it again.")
            if repair:
                store.drop(shard)
    kinds = ("run.json", "*.csv", ".*.csv.json", "notebooks/.*.json")
    own = [path for kind in kinds for path in study.directory.glob(f"**/{kind}")]
    shared = [path for kind in ("*.json", "*.npz") for path in (study.runs / "store").glob(kind)]
    for path in sorted({*shared, *own}):
        try:
            READERS[path.suffix](path)
        except OSError as error:  # a StoreError is one
            if _older(path):
                continue
            said.append(str(error))
            if repair and isinstance(error, DamageError):
                path.unlink()
    return said


def _older(path: Path) -> bool:
    """Whether a file without a hash can be read all the same: an older version left it."""
    with suppress(Exception):  # of a dozen kinds
        _ = load_json(path) if path.suffix == ".json" else dict(np.load(path))
        return b"sha256" not in path.read_bytes()
    return False
