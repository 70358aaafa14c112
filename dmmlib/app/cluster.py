"""Train shards of models on the workers of a Dask scheduler.

A worker makes the trainer anew from its preset, so it needs the data (embedded, or at the same path) but not the store:
it sends back what it trained, and the process that asked writes it. Workers may come, go and die: Dask gives what a
dead one had in hand to another. A worker trains one shard at a time, with all its threads.
"""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dmmlib.errors import PresetError, SchedulerError
from dmmlib.progress import silent
from dmmlib.trainer import WORKERS, Trainer

T = TypeVar("T")
Arguments = tuple[np.ndarray, list[int], bool]
Arrays = dict[str, np.ndarray]
# Dask has its workers give freed memory back at once, and training then waits for it at every step.
UNTRIMMED = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}
CLUSTERS = ("distributed", "dask_jobqueue", "dask_cuda", "dask_kubernetes")
ONE_SHARD = threading.Lock()


def connect(trainer: Trainer) -> Dask:
    """Connect to the workers that a preset names: `local-cluster`, `cluster`, or a scheduler's address.

    Raises:
        SchedulerError: if Dask is not installed, or the scheduler cannot be reached.
        PresetError: for an unknown cluster class.
    """
    scheduler = trainer.preset.scheduler
    try:
        import dask
        import distributed
    except ImportError:
        raise SchedulerError(
            f"Scheduler {scheduler!r} needs Dask, which is absent; pip install 'dmmlib[cluster]', or use 'local'."
        ) from None
    address: Any = scheduler
    with dask.config.set(UNTRIMMED):
        if scheduler == "local-cluster":
            n = trainer.preset.threads
            address = distributed.LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=None)
        elif scheduler == "cluster":
            address = _start(**trainer.preset.cluster.model_dump())
    try:
        client = distributed.Client(address, timeout="20s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise SchedulerError(
            f"No Dask scheduler answers at {scheduler!r} ({error}); start one with `dask scheduler`, or use 'local'."
        ) from error
    return Dask(client, trainer)


def _start(type: str, options: dict[str, Any], jobs: int) -> Any:
    """A cluster of that class whose workers are there or, in a queue, asked for."""
    package, _, kind = type.rpartition(".")
    if package.split(".")[0] not in CLUSTERS:
        raise PresetError(f"cluster.type is {type!r}; give a class of {', '.join(CLUSTERS)}.")
    cluster = None
    try:
        cluster = getattr(importlib.import_module(package), kind)(**options)
        cluster.scale(**{"jobs" if package.startswith("dask_jobqueue") else "n": jobs})
        cluster.sync(_asked_for, cluster)
    except Exception as error:  # whatever a class objects to, or a queue's commands say
        with suppress(Exception):  # what has not started cannot always be ended
            cluster.close()  # type: ignore[union-attr]
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        raise SchedulerError(
            f"The cluster {type} cannot be started ({said[-1]}); correct the preset's cluster, or run where its "
            "commands are."
        ) from error
    return cluster


async def _asked_for(cluster: Any) -> None:
    """Wait for what starts workers, whose failure would only be logged otherwise."""
    await cluster
    for worker in getattr(cluster, "workers", {}).values():
        await worker


class Dask:
    """Train shards on the workers of a Dask scheduler, which are told the preset and need nothing else of the study."""

    def __init__(self, client: Any, trainer: Trainer) -> None:
        self.client = client
        self._progress = trainer.progress
        self._preset = trainer.preset.model_copy(update={"scheduler": "local", "threads": None}).model_dump_json()

    def map(self, arguments: Callable[[T], Arguments], tasks: Sequence[T]) -> Iterator[tuple[T, Arrays]]:
        from distributed import KilledWorker, as_completed

        if not self.client.scheduler_info()["workers"]:  # jobs may wait in a queue for hours
            self._progress("wait for a worker", 0, 1)
            self.client.wait_for_workers(1)
            self._progress("wait for a worker", 1, 1)
        futures = {}
        for task in tasks:
            masks, seeds, keep = arguments(task)
            packed = np.packbits(masks, axis=1)  # an eighth of the bytes
            futures[self.client.submit(train_shard, self._preset, packed, seeds, keep, pure=False)] = task
        try:
            for future in as_completed(futures, loop=self.client.loop):
                yield futures.pop(future), future.result()
                future.release()  # its arrays are on disk now
        except KilledWorker as error:
            raise SchedulerError(
                f"Workers died again and again over one shard ({error}); give them more memory or smaller "
                "ensembles.shard. Finished shards are kept."
            ) from error
        finally:
            self.client.cancel(list(futures))


def train_shard(preset: str, packed: np.ndarray, seeds: list[int], keep_models: bool) -> Arrays:
    """Run `Trainer.train_shard` in a worker, for a preset as JSON and masks as bits."""
    from distributed import get_worker

    with ONE_SHARD:
        torch.set_num_threads(get_worker().state.nthreads)  # of this one of the worker's threads
        trainer = _trainer(preset)
        masks = np.unpackbits(packed, axis=1, count=trainer.data.n_train).astype(bool)
        return trainer.train_shard(masks, seeds, keep_models)


@functools.lru_cache(maxsize=2)
def _trainer(preset: str) -> Trainer:
    return Trainer(json.loads(preset), runs=Path(tempfile.gettempdir()) / "dmmlib-worker", progress=silent)


WORKERS.add("dask", connect)
