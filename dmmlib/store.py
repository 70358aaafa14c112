"""Outputs of trained models on disk: zarr arrays, one chunk per shard of models, resumable and checked.

A store belongs to one configuration, whose hash it carries, and lies in a directory or at any fsspec address
(s3://..., gs://..., memory://...). A shard counts as done when its flag is set, which happens after all its chunks are
in place and have been read back; chunks and flags appear under their names only when complete, and every chunk carries
a CRC32C. So a run that dies at any moment loses at most the shards in flight, and damage is found when it is read. Runs
at the same time write the same content, so they do no harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError, ContainsGroupError, GroupNotFoundError
from zarr.storage import FsspecStore, LocalStore

from dmmlib.errors import DamageError, StoreError
from dmmlib.files import config_hash

FORMAT = 1
FOREIGN: tuple[type[Exception], ...] = (
    KeyError,
    ValueError,
    TypeError,
    GroupNotFoundError,
)  # what reading something that is no store raises
DAMAGED = (ValueError, OSError, RuntimeError)  # what reading a damaged chunk raises


class Store:
    """Arrays with one row per model, written one shard of models at a time.

    Open or create one with `Store.open`; then `missing()`, `write(shard, arrays)` and `read(name)`.
    """

    def __init__(self, address: str, group: zarr.Group) -> None:
        self.address = address
        self._group = group
        self._attributes: dict[str, Any] = dict(group.attrs)
        self.n_models = int(self._attributes["n_models"])
        self.shard_size = int(self._attributes["shard_size"])

    @classmethod
    def open(
        cls,
        place: str | Path,
        config: Mapping[str, Any],
        n_models: int,
        arrays: Mapping[str, tuple[Sequence[int], str]],
        shard_size: int = 100,
    ) -> Store:
        """Open the store at `place`, a directory or an fsspec address, or create it there.

        Args:
            config: everything that the content depends on, JSON-serialisable.
            arrays: name -> (shape of a row, dtype).
            shard_size: models per shard; only used on creation.

        Raises:
            StoreError: if the store is of another configuration (both hashes are named), is no store, or
                cannot be reached or written.
        """
        address, wanted = str(place), config_hash(config)
        files = _files(address)
        attributes = {"format": FORMAT, "config_hash": wanted, "config": dict(config)}
        try:
            store = cls(address, _opened(files, attributes | {"n_models": n_models, "shard_size": shard_size}))
            if store._attributes.get("config_hash") == wanted:
                store._complete(arrays)
        except PermissionError as error:
            raise StoreError(f"The store {address} cannot be created ({error}); choose another place.") from error
        except (*FOREIGN, *_failures(files)) as error:
            if isinstance(files, FsspecStore) and not isinstance(error, FOREIGN):
                raise _unreachable(address, error) from error
            raise StoreError(
                f"{address} is no store of this library, or its description is damaged ({error}); choose another "
                "directory, or delete it to train again."
            ) from error
        version, found = (store._attributes.get(key) for key in ("format", "config_hash"))
        if version != FORMAT:
            raise StoreError(
                f"The store {address} has format {version}, this version reads {FORMAT}; delete it to train again."
            )
        if found != wanted:
            raise StoreError(
                f"The store {address} was made with configuration {found}, but this run has {wanted}; choose "
                "another directory, or delete the store to train again."
            )
        return store

    @classmethod
    def existing(cls, place: str | Path) -> Store | None:
        """The store at `place`, of whatever configuration, to be looked at; None if there is none that can be read."""
        with suppress(*FOREIGN, OSError):
            return cls(str(place), zarr.open_group(_files(str(place)), mode="r"))
        return None

    @property
    def config(self) -> dict[str, Any]:
        """What the content depends on."""
        return dict(self._attributes["config"])

    def _complete(self, arrays: Mapping[str, tuple[Sequence[int], str]]) -> None:
        """Add the arrays that a new store, or one whose creation was interrupted, lacks; the flags come last."""
        if "done" in self._group:
            return
        for name, (row, dtype) in arrays.items():
            with suppress(ContainsArrayError):
                self._group.create_array(
                    name,
                    shape=(self.n_models, *row),
                    chunks=(min(self.shard_size, self.n_models), *row),
                    dtype=dtype,
                    compressors=[Crc32cCodec()],  # logits are noise to a compressor; damage must not pass
                    fill_value=0,
                )
        with suppress(ContainsArrayError):
            self._group.create_array("done", shape=(self.n_shards,), chunks=(1,), dtype="uint8", fill_value=0)

    @property
    def n_shards(self) -> int:
        return -(-self.n_models // self.shard_size)

    def models(self, shard: int) -> range:
        """Number the models of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.n_models))

    def count(self, shards: Sequence[int]) -> int:
        """How many models some shards have."""
        return sum(len(self.models(shard)) for shard in shards)

    def missing(self) -> list[int]:
        """List the shards that are not done."""
        return np.flatnonzero(self._array("done")[:] == 0).tolist()

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a shard's rows of every array, read them back, and set its flag.

        Raises:
            StoreError: if the disk is full or read-only, or does not give back what was written; earlier
                shards are untouched.
        """
        rows = self.models(shard)
        try:
            with zarr.config.set({"array.write_empty_chunks": True}):  # a missing chunk must mean damage
                for name, values in arrays.items():
                    self._array(name)[rows.start : rows.stop] = values
            for name, values in arrays.items():
                with suppress(ValueError, RuntimeError):
                    if np.array_equal(self._array(name)[rows.start : rows.stop], values, equal_nan=True):
                        continue
                raise OSError(f"{name} does not read back as it was written")
            self._array("done")[shard] = 1
        except _failures(self._group.store) as error:
            raise StoreError(
                f"Shard {shard} of {self.address} cannot be written ({getattr(error, 'strerror', None) or error}); "
                "free space and run again: finished shards are kept."
            ) from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows `start` to `stop` of an array: (models, ...).

        Raises:
            StoreError: if the array is unknown, or a shard of these rows is not done.
            DamageError: if a shard is damaged; it holds the numbers of all that are.
        """
        stop = self.n_models if stop is None else stop
        shards, array = range(start // self.shard_size, -(-stop // self.shard_size)), self._array(name)
        undone = [shard for shard in self.missing() if shard in shards]
        if undone:
            raise StoreError(
                f"{self.address} lacks {len(undone)} of {self.n_shards} shards (first: {undone[0]}); train again "
                "to complete it."
            )
        with suppress(*DAMAGED):  # what is wrong is said below
            values = array[start:stop]
            if all(self._exists(name, shard) for shard in shards):
                return values
        damaged = self.damaged()
        raise DamageError(
            f"{self.address} is damaged in shards {damaged}; train again to replace just these, after "
            "`Store.drop`, or delete the store.",
            damaged,
        )

    def damaged(self) -> list[int]:
        """List the shards that are marked done but cannot be read back whole."""
        names = [name for name in self._group.array_keys() if name != "done"]
        done = np.flatnonzero(self._array("done")[:]).tolist()
        return [shard for shard in done if not all(self._is_whole(name, shard) for name in names)]

    def drop(self, shard: int) -> None:
        """Mark a shard as not done, so that the next run trains it again."""
        self._array("done")[shard] = 0

    def _array(self, name: str) -> Any:  # zarr's own types do not say that an array indexes to numpy
        if name not in self._group:
            raise StoreError(f"{self.address} holds no array {name!r}; it has {sorted(self._group.array_keys())}.")
        return self._group[name]

    def _is_whole(self, name: str, shard: int) -> bool:
        """Whether an array's chunk is there and can be read."""
        rows = self.models(shard)
        with suppress(*DAMAGED):
            self._array(name)[rows.start : rows.stop]
            return self._exists(name, shard)
        return False

    def _exists(self, name: str, shard: int) -> bool:
        """Whether an array's chunk is there: zarr would read one that is not as zeros."""
        row_chunks = "/0" * (self._array(name).ndim - 1)
        return sync(self._group.store.exists(f"{name}/c/{shard}{row_chunks}"))


class Outputs:
    """Logits of a model set's models, read from its store as they are needed: slicing the first axis reads those.

    Attributes:
        shape: (n_models, n_points, n_classes).
        step: models that are read at a time, straight into place, so that little is in memory twice.
    """

    def __init__(self, read: Callable[[int, int], np.ndarray], shape: tuple[int, int, int], step: int = 100) -> None:
        self._read, self.shape, self.step = read, shape, step

    def __len__(self) -> int:
        return self.shape[0]

    def first(self, n: int) -> Outputs:
        """Take the outputs of the first n models, unread."""
        return Outputs(self._read, (min(n, len(self)), *self.shape[1:]), self.step)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        found = np.empty((max(0, stop - start), *self.shape[1:]), np.float32)
        for first in range(start, stop, self.step):
            last = min(first + self.step, stop)
            found[first - start : last - start] = self._read(first, last)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.float32, copy=False)


def _files(address: str) -> LocalStore | FsspecStore:
    """The place where a store's files are."""
    remote = "://" in address and not address.startswith("file://")
    try:
        return FsspecStore.from_url(address) if remote else LocalStore(address.removeprefix("file://"))
    except (ImportError, ValueError, OSError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> StoreError:
    return StoreError(f"The store {address} cannot be reached ({error}); try again, or give another place.")


def _opened(files: LocalStore | FsspecStore, attributes: dict[str, Any]) -> zarr.Group:
    """The group, made where there is nothing; another run may be making it at this moment."""
    for seconds in (0.0, 0.1, 0.3, 1.0):
        time.sleep(seconds)
        try:
            return zarr.open_group(files, mode="r+")
        except GroupNotFoundError:
            if sync(files.is_empty("")):
                with suppress(ContainsGroupError):
                    return zarr.create_group(files, attributes=attributes)
    return zarr.open_group(files, mode="r+")


def _failures(files: Any) -> tuple[type[Exception], ...]:
    """What writing and reaching raise: each kind of remote address has errors of its own."""
    return (Exception,) if isinstance(files, FsspecStore) else (OSError,)
