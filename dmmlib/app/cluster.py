"""Train shards of models on the workers of a Dask scheduler.

A worker makes the trainer anew from its preset, so it needs the data (embedded, or at the same path) but not the store:
it sends back what it trained, and the process that asked writes it. A model or data set that was registered outside
the library goes with the preset. Workers may come, go and die: Dask gives what a dead one had in hand to another. A
worker trains one shard at a time, with all its threads.
"""

from __future__ import annotations

import asyncio
import functools
import getpass
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import numpy as np
import torch

from dmmlib.errors import PresetError, SchedulerError
from dmmlib.presets import ClusterSection
from dmmlib.progress import silent
from dmmlib.registry import REGISTRIES
from dmmlib.trainer import WORKERS, Trainer

T = TypeVar("T")
Arguments = tuple[np.ndarray, list[int], bool]
Arrays = dict[str, np.ndarray]
# Dask has its workers give freed memory back at once, and training then waits for it at every step.
UNTRIMMED = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}
CLUSTERS = ("distributed", "dask_jobqueue", "dask_cuda", "dask_kubernetes")
OPTIONS = {
    *("account", "cores", "CUDA_VISIBLE_DEVICES", "dashboard_address", "death_timeout", "device_memory_limit", "host"),
    *("image", "interface", "job_cpu", "job_directives_skip", "job_extra_directives", "job_mem", "job_script_prologue"),
    *("local_directory", "log_directory", "memory", "memory_limit", "n_workers", "name", "namespace", "nanny", "port"),
    *("processes", "protocol", "queue", "resources", "rmm_pool_size", "scheduler_options", "security"),
    *("shared_temp_directory", "threads_per_worker", "walltime"),
}
"""Of a cluster's class, those that size and place it; others run Python, or load what does (docs/trust.md)."""
LOOPBACK = "127.0.0.1:0"
ONE_SHARD = threading.Lock()
LOOK, LOST = 2.0, 30.0  # seconds between two looks for workers, and after which one that is gone stays so


def connect(trainer: Trainer) -> Dask:
    """Connect to the workers that a preset names: `local-cluster`, `cluster`, or a scheduler's address.

    Raises:
        SchedulerError: if Dask is not installed, a cluster cannot be started, or the scheduler cannot be reached.
        PresetError: for a cluster class that is none, or options that are not in `OPTIONS`.
    """
    scheduler = trainer.preset.scheduler
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(1)  # a worker that runs its parent's script instead of importing it; the parent says so
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
            n = trainer.preset.threads or os.cpu_count() or 1
            options = {"n_workers": n, "threads_per_worker": 1}
            address = _start(ClusterSection(options=options, jobs=n), trainer.runs)
        elif scheduler == "cluster":
            address = _start(trainer.preset.cluster, trainer.runs)
    try:
        if isinstance(address, str):
            with ThreadPoolExecutor() as beside:  # the loop that a notebook runs in
                beside.submit(asyncio.run, _answer(address)).result()
        client = distributed.Client(address, timeout="20s", set_as_default=False)
    except Exception as error:  # each kind of address has errors of its own
        raise SchedulerError(
            f"No Dask scheduler answers at {scheduler!r} ({error}); start one with `dask scheduler`, or use 'local'."
        ) from error
    return Dask(client, trainer)


async def _answer(address: str) -> None:
    """Wait for somebody to answer: a client that could not be made would wait, and complain, when Python ends."""
    from distributed import Security
    from distributed.comm import connect

    await (await connect(address, timeout=20, **Security().get_connection_args("client"))).close()


def check(section: ClusterSection) -> None:
    """Raise PresetError unless a preset's cluster is of a known package, with options that size and place it."""
    if section.type.split(".")[0] not in CLUSTERS:
        raise PresetError(f"cluster.type is {section.type!r}; give a class of {', '.join(CLUSTERS)}.")
    inner = section.options.get("scheduler_options", {})
    given = [*section.options, *(inner if isinstance(inner, Mapping) else ["scheduler_options that are no mapping"])]
    if unknown := set(given) - OPTIONS:
        raise PresetError(
            f"cluster.options has {min(unknown)!r}, which presets may not set; use {', '.join(sorted(OPTIONS))}, or "
            "Dask's own configuration."
        )


def guarded(section: ClusterSection, runs: Path) -> dict[str, Any]:
    """The options, with pages of the dashboard for this machine alone, and encryption where jobs come from a network.

    Raises SchedulerError where encryption is due and the package that makes credentials is absent.
    """
    options = dict(section.options)
    if not section.type.startswith("dask_jobqueue"):
        return ({} if section.type.startswith("dask_kubernetes") else {"dashboard_address": LOOPBACK}) | options
    options["scheduler_options"] = {"dashboard_address": LOOPBACK} | options.get("scheduler_options", {})
    options["worker_extra_args"] = ["--no-dashboard"]
    if options.pop("security", True):
        options["security"] = True
        options.setdefault("shared_temp_directory", str(runs.resolve()))
        runs.mkdir(parents=True, exist_ok=True)
        if importlib.util.find_spec("cryptography") is None:
            raise SchedulerError(
                "Workers in a queue are reached over the network, with encryption that needs the package cryptography; "
                "pip install 'dmmlib[cluster]', or set cluster.options.security to false in a network that you trust."
            )
    return options


def _start(section: ClusterSection, runs: Path) -> Any:
    """A cluster of that class whose workers are there or, in a queue, asked for."""
    check(section)
    package, _, kind = section.type.rpartition(".")
    cluster: Any = None
    try:
        found: Any = getattr(importlib.import_module(package), kind)
        if not inspect.isclass(found) or not hasattr(found, "scale"):
            raise PresetError(f"cluster.type is {section.type!r}, which is no cluster; give a class of {package}.")
        cluster = found(**guarded(section, runs))
        cluster.scale(**{"jobs" if package.startswith("dask_jobqueue") else "n": section.jobs})
        cluster.sync(_asked_for, cluster)
    except (PresetError, SchedulerError):
        raise
    except Exception as error:  # whatever a class objects to, or a queue's commands say
        with suppress(Exception):  # what has not started cannot always be ended
            cluster.close()
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        todo = "correct the preset's cluster, or run where its commands are"
        if "Nanny" in said[-1] and hasattr(sys.modules["__main__"], "__file__"):
            todo = "workers import the script that starts them, so it must run what it does under `if __name__ == "
            todo += "'__main__':`"
        raise SchedulerError(f"The cluster {section.type} cannot be started ({said[-1]}); {todo}.") from None
    return cluster


async def _asked_for(cluster: Any) -> None:
    """Wait for what starts workers, whose failure would only be logged otherwise."""
    await cluster
    for worker in getattr(cluster, "workers", {}).values():
        await worker


class Dask:
    """Train shards on the workers of a Dask scheduler, which are told the preset and need nothing else of the study."""

    def __init__(self, client: Any, trainer: Trainer) -> None:
        self.client, self._connect = client, functools.partial(connect, trainer)
        self._seen: dict[str, float] = {}  # jobs, and when they last had a worker
        self._progress = trainer.progress
        self._preset = trainer.preset.model_copy(update={"scheduler": "local", "threads": None}).model_dump_json()
        self._own = _registered(trainer)

    def map(self, arguments: Callable[[T], Arguments], tasks: Sequence[T]) -> Iterator[tuple[T, Arrays]]:
        from distributed import CancelledError, KilledWorker

        if self.client.status == "closed":  # its scheduler died
            self.client = self._connect().client
        futures = {}
        try:
            for task in tasks:
                masks, seeds, *how = arguments(task)
                packed = np.packbits(masks, axis=1)  # an eighth of the bytes
                sent = self.client.submit(train_shard, self._preset, self._own, packed, seeds, *how, pure=False)
                futures[sent] = task
            for future in self._done(futures):
                yield futures.pop(future), future.result()
                future.release()  # its arrays are on disk now
        except KilledWorker as error:
            raise SchedulerError(
                f"Workers died again and again over one shard ({error}); give them more memory or smaller "
                "ensembles.shard. Finished shards are kept."
            ) from error
        except CancelledError as error:
            raise SchedulerError(
                "The Dask scheduler ended or was lost; start one and run again: finished shards are kept."
            ) from error
        finally:
            if self.client.status != "closed":
                self.client.cancel(list(futures))

    def _done(self, futures: Mapping[Any, Any]) -> Iterator[Any]:
        """Futures as they are done, with a look for workers now and then."""
        from distributed import as_completed

        done, due, waits = as_completed(futures, loop=self.client.loop), 0.0, False
        while not done.is_empty():
            if done.has_ready():
                yield next(done)
            elif time.monotonic() < due:
                time.sleep(0.05)
            else:
                if waits == (there := self._staffed()):  # jobs may wait in a queue for hours
                    self._progress("wait for a worker", int(there), 1)
                waits, due = not there, time.monotonic() + LOOK

    def _staffed(self) -> bool:
        """Whether there are workers; jobs of a queue that ended, as at their walltime, are asked for again."""
        from distributed import SpecCluster

        workers, cluster, now = self.client.scheduler_info()["workers"].values(), self.client.cluster, time.monotonic()
        if isinstance(cluster, SpecCluster):  # it notes the end of some, and asks for none
            names = {str(worker["name"]) for worker in workers}
            self._seen |= dict.fromkeys([*names, *(name.rpartition("-")[0] for name in names)], now)
            for name in [name for name, last in self._seen.items() if now - last > LOST]:
                del self._seen[name]
                cluster.workers.pop(name, None)
            if len(cluster.workers) < len(cluster.worker_spec):
                SpecCluster.scale(cluster, len(cluster.worker_spec))
        return bool(workers)


def _registered(trainer: Trainer) -> bytes:
    """The preset's model and data set, pickled, where they are registered outside the library: workers lack them."""
    own: dict[tuple[str, str], Any] = {}
    for kind, name in (("model", trainer.preset.model.name), ("data set", trainer.preset.data.name)):
        if not name.endswith(".npz") and not REGISTRIES[kind].ours(name):
            entry: Any = REGISTRIES[kind][name]
            own[kind, name] = entry
            module = getattr(entry, "factory", entry).__module__
            if module in sys.modules and module != "__main__" and not module.startswith("dmmlib."):
                cloudpickle.register_pickle_by_value(sys.modules[module])  # workers need not have the file
    try:
        return cloudpickle.dumps(own)
    except Exception as error:  # whatever a user's objects raise
        what = " and ".join(f"{kind} {name!r}" for kind, name in own)
        raise SchedulerError(
            f"The {what} cannot be sent to workers ({error}); make it of plain functions and arrays, or use 'local'."
        ) from error


def train_shard(preset: str, own: bytes, packed: np.ndarray, seeds: list[int], *how: Any) -> Arrays:
    """`Trainer.train_shard` in a worker, for a preset as JSON, what is registered for it, and masks as bits."""
    from distributed import get_worker

    with ONE_SHARD:
        torch.set_num_threads(get_worker().state.nthreads)  # of this one of the worker's threads
        trainer = _trainer(preset, own)
        masks = np.unpackbits(packed, axis=1, count=trainer.data.n_train).astype(bool)
        return trainer.train_shard(masks, seeds, *how)


@functools.lru_cache(maxsize=2)
def _trainer(preset: str, own: bytes) -> Trainer:
    try:
        for (kind, name), entry in pickle.loads(own).items():
            REGISTRIES[kind].add(name, entry)
    except ImportError as error:
        raise SchedulerError(f"A worker lacks what the model or data need ({error}); install it there.") from None
    user = getattr(os, "getuid", getpass.getuser)()  # others can use the same machine
    return Trainer(json.loads(preset), runs=Path(tempfile.gettempdir()) / f"dmmlib-worker-{user}", progress=silent)


WORKERS.add("dask", connect)
