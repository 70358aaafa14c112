"""Who trains the shards of models: this process, or the workers of a Dask scheduler.

A worker makes the study anew from its preset, so it needs the data (embedded, or at the same path) but not
the store: it sends back what it trained, and the one process that asked writes it. Workers may come, go and
die; what a dead one had in hand is given to another. A worker trains one shard at a time, with all its threads.
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
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from dmmlib.errors import PresetError, SchedulerError
from dmmlib.progress import silent

if TYPE_CHECKING:
    from dmmlib.study import Study

T = TypeVar("T")
Arguments = tuple[np.ndarray, list[int], bool]
Arrays = dict[str, np.ndarray]
# Dask has its workers give freed memory back at once, and training then waits for it at every step.
UNTRIMMED = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}
CLUSTERS = ("distributed", "dask_jobqueue", "dask_cuda", "dask_kubernetes")


class Workers(Protocol):
    """Train shards, in whatever order they are done."""

    def map(self, arguments: Callable[[T], Arguments], tasks: Sequence[T]) -> Iterator[tuple[T, Arrays]]:
        """Pairs of a task and what `Study.train_shard` gives for its arguments."""
        ...


def connect(study: Study) -> Workers:
    """The workers that the study's preset names: `local`, `local-cluster`, `cluster`, or an address.

    Raises:
        SchedulerError: if Dask is not installed, or the scheduler cannot be reached.
        PresetError: for a cluster class that is none.
    """
    scheduler = study.preset.scheduler
    if scheduler == "local":
        return _Here(study)
    try:
        import dask
        import distributed
    except ImportError:
        raise SchedulerError(
            f"Scheduler {scheduler!r} needs Dask, which is absent; pip install 'dmmlib[cluster]', or use 'local'."
        ) from None
    if scheduler == "local-cluster":
        options = {"n_workers": study.preset.threads, "threads_per_worker": 1, "dashboard_address": None}
        with dask.config.set(UNTRIMMED):
            address: Any = distributed.LocalCluster(**options)
    elif scheduler == "cluster":
        address = _start(study.preset.cluster.type, study.preset.cluster.options, study.preset.cluster.jobs)
    else:
        address = scheduler
    try:
        client = distributed.Client(address, timeout="20s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise SchedulerError(
            f"No Dask scheduler answers at {scheduler!r} ({error}); start one with `dask scheduler`, or use 'local'."
        ) from error
    return _Dask(client, study)


def _start(name: str, options: dict[str, Any], jobs: int) -> Any:
    package, _, kind = name.rpartition(".")
    if package.split(".")[0] not in CLUSTERS:
        raise PresetError(f"cluster.type is {name!r}; give a class of {', '.join(CLUSTERS)}.")
    try:
        made = getattr(importlib.import_module(package), kind)(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SchedulerError(
            f"The cluster {name} cannot be started ({error}); correct the preset's cluster."
        ) from error
    made.scale(**{"jobs" if package.startswith("dask_jobqueue") else "n": jobs})
    try:
        made.sync(_asked_for, made)
    except Exception as error:  # whatever the queue's commands say
        with suppress(Exception):  # what has not started cannot always be ended
            made.close()
        raise SchedulerError(
            f"The cluster {name} cannot start its workers ({_last_line(error)}); correct the preset's cluster, or "
            "run where its commands are."
        ) from error
    return made


async def _asked_for(cluster: Any) -> None:
    """Until every worker is there or, in a queue, asked for: what fails would only be logged otherwise."""
    await cluster
    for worker in getattr(cluster, "workers", {}).values():
        await worker


def _last_line(error: Exception) -> str:
    """Where a queue's command says what it objects to."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


class _Here:
    def __init__(self, study: Study) -> None:
        self._study = study

    def map(self, arguments: Callable[[T], Arguments], tasks: Sequence[T]) -> Iterator[tuple[T, Arrays]]:
        for task in tasks:
            yield task, self._study.train_shard(*arguments(task))


class _Dask:
    def __init__(self, client: Any, study: Study) -> None:
        self._client = client
        self._progress = study.progress
        local = study.preset.model_copy(update={"scheduler": "local", "threads": None})
        self._preset = json.dumps(local.model_dump(mode="json"))

    def map(self, arguments: Callable[[T], Arguments], tasks: Sequence[T]) -> Iterator[tuple[T, Arrays]]:
        from distributed import KilledWorker, as_completed

        if not self._client.scheduler_info()["workers"]:  # jobs may wait in a queue for hours
            self._progress("wait for a worker", 0, 1)
            self._client.wait_for_workers(1)
            self._progress("wait for a worker", 1, 1)
        futures = {}
        for task in tasks:
            masks, seeds, keep = arguments(task)
            sent = np.packbits(masks, axis=1)  # an eighth of the bytes
            futures[self._client.submit(train_shard, self._preset, sent, seeds, keep, pure=False)] = task
        try:
            for future in as_completed(futures, loop=self._client.loop):
                yield futures.pop(future), future.result()
                future.release()  # its arrays are on disk now
        except KilledWorker as error:
            raise SchedulerError(
                f"Workers died again and again over one shard ({error}); give them more memory or smaller "
                "ensembles.shard. Finished shards are kept."
            ) from error
        finally:
            self._client.cancel(list(futures))


def train_shard(preset: str, packed: np.ndarray, seeds: list[int], keep_models: bool) -> Arrays:
    """`Study.train_shard` in a worker, for a preset as JSON and masks as bits."""
    from distributed import get_worker

    with _ONE_SHARD:
        torch.set_num_threads(get_worker().state.nthreads)  # of this one of the worker's threads
        study = _study(preset)
        masks = np.unpackbits(packed, axis=1, count=study.data.n_train).astype(bool)
        return study.train_shard(masks, seeds, keep_models)


_ONE_SHARD = threading.Lock()


@functools.lru_cache(maxsize=2)
def _study(preset: str) -> Study:
    from dmmlib.study import Study

    return Study(json.loads(preset), runs=Path(tempfile.gettempdir()) / "dmmlib-worker", progress=silent)
