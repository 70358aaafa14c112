"""Outputs of trained models on disk: zarr arrays, one chunk per shard of models, resumable and checked.

A store belongs to one configuration, whose hash it carries, and lies in a directory or at any fsspec address
(s3://..., gs://..., memory://...). Every chunk carries a CRC32C. A shard counts as done when its seals are set, which
happens after all its chunks are in place and have been read back; a seal binds a chunk's checksum to the array, the
shard and the configuration, so that damage and chunks that changed places are found when they are read. Descriptions
follow from the configuration, and damaged ones are written anew. Files appear under their names only when complete. So
a run that dies at any moment loses at most the shards in flight. Runs at the same time write the same content, so they
do no harm.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import SuffixByteRequest
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from dmmlib.errors import DamageError, DmmError, StoreError
from dmmlib.files import FORMAT, config_hash, short

ROOT = "zarr.json"  # the description of a store, and of each array in it
DAMAGED = (ValueError, OSError, RuntimeError)  # what reading a damaged chunk raises


class Store:
    """Arrays with one row per model, written one shard of models at a time.

    Open or create one with `Store.open`; then `missing()`, `write(shard, arrays)` and `read(name)`.
    """

    def __init__(self, address: str, files: LocalStore | FsspecStore, attributes: Mapping[str, Any]) -> None:
        self.address, self._files, self._hash = address, files, attributes["config_hash"]
        self._group = zarr.open_group(files, mode="r+")
        self._opened = dict[str, Any]()  # arrays by name, each of which takes reading its description
        self._names = [name for name in attributes["descriptions"] if name != "done"]
        self.config: dict[str, Any] = attributes["config"]  # what the content depends on
        self.n_models, self.shard_size = int(attributes["n_models"]), int(attributes["shard_size"])
        self.n_shards = -(-self.n_models // self.shard_size)

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
        with reaching(address):
            root = _root(files)
            found = _attributes(root)
            if found and found["config_hash"] != wanted:
                raise StoreError(
                    f"The store {address} was made with configuration {found['config_hash']}, but this run has "
                    f"{wanted}; choose another directory, or delete the store to train again."
                )
            described = _described(config, n_models, found["shard_size"] if found else shard_size, arrays)
            if not found and root != b"" and _get(files, f"done/{ROOT}") != described[f"done/{ROOT}"]:
                raise StoreError(
                    f"{address} is no store of this library, or of another version, or its descriptions ({ROOT}) are "
                    "damaged; choose another directory, or delete it to train again."
                )
            for key, content in described.items():
                if _get(files, key) != content:  # new, half made, or damaged
                    sync(files.set(key, cpu.Buffer.from_bytes(content)))
            return cls(address, files, json.loads(described[ROOT])["attributes"])

    @classmethod
    def existing(cls, place: str | Path) -> Store | None:
        """Find the store at `place`, of whatever configuration; None if there is none of this version.

        Raises:
            DamageError: if one of its descriptions is damaged.
        """
        address, files = str(place), _files(str(place))
        root = _get(files, ROOT)
        found = _attributes(root)
        if found is None:
            if root is None or (b'"format": 1,' in root and b'"checksum"' not in root):
                return None
            raise DamageError(f"{address}/{ROOT} is damaged; a run writes it anew.")
        for name, expected in found["descriptions"].items():
            if short(_get(files, f"{name}/{ROOT}") or b"") != expected:
                raise DamageError(f"{address}/{name}/{ROOT} is damaged; a run writes it anew.")
        return cls(address, files, found)

    def models(self, shard: int) -> range:
        """Number the models of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.n_models))

    def shards(self, start: int = 0, stop: int | None = None) -> range:
        """Number the shards that models `start` to `stop` lie in."""
        return range(start // self.shard_size, -(-(self.n_models if stop is None else stop) // self.shard_size))

    def count(self, shards: Sequence[int]) -> int:
        """How many models some shards have."""
        return sum(len(self.models(shard)) for shard in shards)

    def missing(self) -> list[int]:
        """List the shards that are not done."""
        return np.flatnonzero(~self._seals().any(1)).tolist()

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a shard's rows of every array, read them back, and seal it.

        Raises:
            StoreError: if the disk is full or read-only, or does not give back what was written; earlier
                shards are untouched.
        """
        rows = self.models(shard)

        def read_back(name: str) -> bool:
            with suppress(ValueError, RuntimeError):
                return np.array_equal(self._array(name)[rows.start : rows.stop], arrays[name], equal_nan=True)
            return False

        try:
            for _ in range(2):  # another run may write the same shard, trained elsewhere to other last bits
                with zarr.config.set({"array.write_empty_chunks": True}):  # a missing chunk must mean damage
                    for name, values in arrays.items():
                        self._array(name)[rows.start : rows.stop] = values
                if not (wrong := [name for name in arrays if not read_back(name)]):
                    self._array("done")[shard] = [self._seal(name, shard) for name in self._names]
                    return
                if self._intact(shard, self._seals()):  # the other run's
                    return
            raise OSError(f"{wrong[0]} does not read back as it was written")
        except Exception as error:  # each kind of address has errors of its own
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
        shards, seals = self.shards(start, stop), self._seals()
        self._array(name)  # raises for an unknown one
        if undone := [shard for shard in shards if not seals[shard].any()]:
            raise StoreError(
                f"{self.address} lacks {len(undone)} of {self.n_shards} shards (first: {undone[0]}); train again "
                "to complete it."
            )
        if (values := self._whole(name, range(start, stop), shards, seals)) is not None:
            return values
        damaged = self.damaged()
        raise DamageError(f"{self.address} is damaged in shards {damaged}; a run trains just these again.", damaged)

    def damaged(self) -> list[int]:
        """List the shards that are marked done but cannot be read back whole."""
        seals = self._seals()
        return [i for i in np.flatnonzero(seals.any(1)).tolist() if not self._intact(i, seals)]

    def drop(self, shard: int) -> None:
        """Mark a shard as not done, so that the next run trains it again."""
        self._array("done")[shard] = 0

    def _array(self, name: str) -> Any:  # zarr's own types do not say that an array indexes to numpy
        if name not in self._opened:
            if name not in self._group:
                raise StoreError(f"{self.address} holds no array {name!r}; it has {sorted(self._group.array_keys())}.")
            self._opened[name] = self._group[name]
        return self._opened[name]

    def _whole(self, name: str, rows: range, shards: Sequence[int], seals: np.ndarray) -> np.ndarray | None:
        """Rows of an array; None unless the chunks of their shards can be read and are what the seals say."""
        with suppress(*DAMAGED):
            values = self._array(name)[rows.start : rows.stop]
            if all(self._seal(name, shard) == seals[shard, self._names.index(name)] for shard in shards):
                return values
        return None

    def _intact(self, shard: int, seals: np.ndarray) -> bool:
        """Whether a shard is done and can be read."""
        rows, done = self.models(shard), bool(seals[shard].any())
        return done and all(self._whole(name, rows, [shard], seals) is not None for name in self._names)

    def _seals(self) -> np.ndarray:
        """The seals of all shards (n_shards, n_arrays), 0 where a shard is not done, 1 where one cannot be read."""
        done = self._array("done")
        with suppress(*DAMAGED):
            return np.asarray(done[:])
        seals = np.ones(done.shape, np.uint64)
        for shard in range(self.n_shards):
            with suppress(*DAMAGED):
                seals[shard] = done[shard]
        return seals

    def _seal(self, name: str, shard: int) -> int:
        """Bind the checksum that a chunk ends with to its place, so that no other chunk can stand there; 0 if none."""
        key = f"{name}/c/{shard}" + "/0" * (self._array(name).ndim - 1)
        checksum = _get(self._files, key, SuffixByteRequest(4))
        place = f"{self._hash} {self.n_models} {self.shard_size} {name} {shard} "
        return 0 if checksum is None else int(short(place.encode() + checksum), 16)


class Outputs:
    """Logits of a model set's models, read from its store as they are needed: slicing the first axis reads those.

    Their shape is (n_models, n_points, n_classes). `step` models are read at a time, so that little is in memory twice.
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
    with reaching(address):
        return FsspecStore.from_url(address) if remote else LocalStore(address.removeprefix("file://"))


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Raise StoreError for whatever is raised on the way to an address: each kind has errors of its own."""
    try:
        yield
    except DmmError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(
            f"The store {address} cannot be reached ({said:.200}); try again, or give another place."
        ) from error


def _get(
    files: LocalStore | FsspecStore | MemoryStore, key: str, part: SuffixByteRequest | None = None
) -> bytes | None:
    """The bytes of a file, or a part of them; None if there is none."""
    found = sync(files.get(key, default_buffer_prototype(), part))
    return None if found is None else found.to_bytes()


def _root(files: LocalStore | FsspecStore) -> bytes | None:
    """The description of a store; empty where there is nothing, None where there is something else."""
    for seconds in (0.0, 0.1, 0.3, 1.0):  # another run may be making it at this moment
        time.sleep(seconds)
        if (root := _get(files, ROOT)) is not None:
            return root
        if sync(_is_empty(files)):
            return b""
    return None


async def _is_empty(files: LocalStore | FsspecStore) -> bool:
    """Whether there is nothing, but perhaps what a run left that was killed as it wrote the first description."""
    async for key in files.list_prefix(""):
        if not key.endswith(".partial"):
            return False
    return True


def _attributes(root: bytes | None) -> dict[str, Any] | None:
    """What a store's description says, if it is whole."""
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        found = json.loads(root or b"")["attributes"]
        if found.pop("checksum") == config_hash(found):
            return dict(found)
    return None


def _described(
    config: Mapping[str, Any], n_models: int, shard_size: int, arrays: Mapping[str, tuple[Sequence[int], str]]
) -> dict[str, bytes]:
    """The descriptions of a store and its arrays, by key, the store's own first."""
    made = MemoryStore()
    for name, (row, dtype) in arrays.items():
        zarr.create_array(
            made,
            name=name,
            shape=(n_models, *row),
            chunks=(min(shard_size, n_models), *row),
            dtype=dtype,
            compressors=[Crc32cCodec()],  # logits are noise to a compressor; damage must not pass
            fill_value=0,
        )
    seals = (-(-n_models // shard_size), len(arrays))
    zarr.create_array(
        made, name="done", shape=seals, chunks=(1, seals[1]), dtype="uint64", compressors=None, fill_value=0
    )
    described = {f"{name}/{ROOT}": _get(made, f"{name}/{ROOT}") or b"" for name in (*sorted(arrays), "done")}
    attributes: dict[str, Any] = {
        "format": FORMAT,
        "config_hash": config_hash(config),
        "config": dict(config),
        "n_models": n_models,
        "shard_size": shard_size,
        "descriptions": {key.removesuffix(f"/{ROOT}"): short(content) for key, content in described.items()},
    }
    own = MemoryStore()
    zarr.create_group(own, attributes=attributes | {"checksum": config_hash(attributes)})
    return {ROOT: _get(own, ROOT) or b""} | described
