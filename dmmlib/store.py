"""Outputs of trained models on disk: zarr arrays, one chunk per shard of models, resumable and checked.

A store belongs to one configuration, whose hash it carries, and lies in a directory or at any fsspec address
(s3://..., gs://..., memory://...). A shard counts as done when its flag is set, which happens after all its
chunks are in place and have been read back; chunks and flags appear under their names only when complete,
and every chunk carries a CRC32C. A run that dies at any moment therefore loses at most the shards in flight,
and damage is found when it is read. Runs at the same time write the same content, so they do no harm.
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


class Store:
    """Arrays with one row a model, written a shard of models at a time.

    Open or create one with `Store.open`; then `missing()`, `write(shard, arrays)` and `read(name)`.
    """

    def __init__(self, address: str, group: zarr.Group) -> None:
        self.address = address
        self._group = group
        attributes: Any = group.attrs
        self.n_models = int(attributes["n_models"])
        self.shard_size = int(attributes["shard_size"])

    @classmethod
    def open(
        cls,
        place: str | Path,
        config: Mapping[str, Any],
        n_models: int,
        arrays: Mapping[str, tuple[Sequence[int], str]],
        shard_size: int = 100,
    ) -> Store:
        """Open the store at `place`, or create it there.

        Args:
            place: a directory, or an fsspec address.
            config: everything that the content depends on, JSON-serialisable.
            n_models: rows of every array.
            arrays: name -> (shape of a row, dtype).
            shard_size: models a shard; only used on creation.

        Raises:
            StoreError: if the store is of another configuration (both hashes are named), is no store, or
                cannot be reached or written.
        """
        address, wanted = str(place), config_hash(config)
        try:
            files = _files(address)
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"The store {address} cannot be reached ({error}); give another place.") from error
        unreadable: tuple[type[Exception], ...] = (KeyError, ValueError, TypeError, GroupNotFoundError)
        if isinstance(files, LocalStore):
            unreadable += (OSError,)
        try:
            group = cls._describe(files, config, n_models, arrays, shard_size)
            store = cls(address, group)
        except PermissionError as error:
            raise StoreError(f"The store {address} cannot be created ({error}); choose another place.") from error
        except unreadable as error:
            raise StoreError(
                f"{address} is no store of this library, or its description is damaged ({error}); choose another "
                "directory, or delete it to train again."
            ) from error
        except _failures(files) as error:
            raise StoreError(
                f"The store {address} cannot be reached ({error}); try again, or give another place."
            ) from error
        if group.attrs.get("format") != FORMAT:
            raise StoreError(
                f"The store {address} has format {group.attrs.get('format')}, this version reads {FORMAT}; "
                "delete it to train again."
            )
        found = group.attrs.get("config_hash")
        if found != wanted:
            raise StoreError(
                f"The store {address} was made with configuration {found}, but this run has {wanted}; choose "
                "another directory, or delete the store to train again."
            )
        return store

    @classmethod
    def existing(cls, place: str | Path) -> Store | None:
        """The store at `place`, of whatever configuration, to be looked at; None if there is none that can be read."""
        try:
            return cls(str(place), zarr.open_group(_files(str(place)), mode="r"))
        except (ImportError, KeyError, ValueError, TypeError, GroupNotFoundError, OSError):
            return None

    @property
    def config(self) -> dict[str, Any]:
        """What the content depends on."""
        attributes: Any = self._group.attrs
        return dict(attributes["config"])

    @staticmethod
    def _describe(
        files: LocalStore | FsspecStore,
        config: Mapping[str, Any],
        n_models: int,
        arrays: Mapping[str, tuple[Sequence[int], str]],
        shard_size: int,
    ) -> zarr.Group:
        """The group with all its arrays; what an interrupted creation left out is added."""
        attributes = {
            "format": FORMAT,
            "config_hash": config_hash(config),
            "config": dict(config),
            "n_models": n_models,
            "shard_size": shard_size,
        }
        group = _opened(files, attributes)
        if group.attrs.get("config_hash") != attributes["config_hash"] or "done" in group:
            return group
        for name, (row, dtype) in arrays.items():
            with suppress(ContainsArrayError):
                group.create_array(
                    name,
                    shape=(n_models, *row),
                    chunks=(min(shard_size, n_models), *row),
                    dtype=dtype,
                    compressors=[Crc32cCodec()],  # logits are noise to a compressor; damage must not pass
                    fill_value=0,
                )
        with suppress(ContainsArrayError):
            n_shards = -(-n_models // shard_size)
            group.create_array("done", shape=(n_shards,), chunks=(1,), dtype="uint8", fill_value=0)
        return group

    @property
    def n_shards(self) -> int:
        return -(-self.n_models // self.shard_size)

    def models(self, shard: int) -> range:
        """The models of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.n_models))

    def count(self, shards: Sequence[int]) -> int:
        """How many models some shards have."""
        return sum(len(self.models(shard)) for shard in shards)

    def missing(self) -> list[int]:
        """Shards that are not done."""
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
                try:
                    same = np.array_equal(self._array(name)[rows.start : rows.stop], values, equal_nan=True)
                except (ValueError, RuntimeError):
                    same = False
                if not same:
                    raise OSError(f"{name} does not read back as it was written")
            self._array("done")[shard] = 1
        except _failures(self._group.store) as error:
            raise StoreError(
                f"Shard {shard} of {self.address} cannot be written ({getattr(error, 'strerror', None) or error}); "
                "free space and run again: finished shards are kept."
            ) from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of an array: (models, ...).

        Raises:
            StoreError: if the array is unknown, or a shard of these rows is not done.
            DamageError: if a shard is damaged; it holds the numbers of all that are.
        """
        stop = self.n_models if stop is None else stop
        undone = [s for s in self.missing() if self.models(s).start < stop and self.models(s).stop > start]
        if undone:
            raise StoreError(
                f"{self.address} lacks {len(undone)} of {self.n_shards} shards (first: {undone[0]}); train again "
                "to complete it."
            )
        array = self._array(name)
        try:
            values = array[start:stop]
            if not any(self.models(s).start < stop and self.models(s).stop > start for s in self._absent(name)):
                return values
        except (ValueError, OSError, RuntimeError):
            pass  # what is wrong is said below
        damaged = self.damaged()
        raise DamageError(
            f"{self.address} is damaged in shards {damaged}; train again to replace just these, after "
            "`Store.drop`, or delete the store.",
            damaged,
        )

    def damaged(self) -> list[int]:
        """Shards that are marked done but cannot be read back whole."""
        names = [name for name in self._group.array_keys() if name != "done"]
        absent = {shard for name in names for shard in self._absent(name)}
        bad = []
        for shard in sorted(set(range(self.n_shards)) - set(self.missing())):
            rows = self.models(shard)
            try:
                for name in names:
                    self._array(name)[rows.start : rows.stop]
                readable = shard not in absent
            except (ValueError, OSError, RuntimeError):
                readable = False
            if not readable:
                bad.append(shard)
        return bad

    def drop(self, shard: int) -> None:
        """Mark a shard as not done, so that the next run trains it again."""
        self._array("done")[shard] = 0

    def _array(self, name: str) -> Any:  # zarr's own types do not say that an array indexes to numpy
        if name not in self._group:
            raise StoreError(f"{self.address} holds no array {name!r}; it has {sorted(self._group.array_keys())}.")
        return self._group[name]

    def _absent(self, name: str) -> list[int]:
        """Done shards whose chunk file is gone: zarr would read them as zeros."""
        row_chunks = "/0" * (self._array(name).ndim - 1)
        done = set(range(self.n_shards)) - set(self.missing())
        files = self._group.store
        return [s for s in sorted(done) if not sync(files.exists(f"{name}/c/{s}{row_chunks}"))]


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
        """The outputs of the first n models, unread."""
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
    remote = "://" in address and not address.startswith("file://")
    return FsspecStore.from_url(address) if remote else LocalStore(address.removeprefix("file://"))


def _failures(files: Any) -> tuple[type[Exception], ...]:
    """What writing and reaching raise: each kind of remote address has errors of its own."""
    return (Exception,) if isinstance(files, FsspecStore) else (OSError,)
