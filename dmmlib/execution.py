"""How training is carried out on a machine: models per step, threads or processes, compiled or not.

On a CPU, one process per core steps its own few models through one compiled function: products stay in a core's cache,
the elementwise work between them is fused, and no interpreter lock is shared. Processes and compiling cost seconds, so
small jobs do without; which is faster for a job is measured.
"""

from __future__ import annotations

import atexit
import functools
import io
import math
import multiprocessing
import os
import pickle
import platform
import signal
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any, ClassVar, TypeVar

import cloudpickle
import joblib
import numpy as np
import torch
from joblib.externals.loky.backend.process import LokyProcess

from dmmlib.errors import DeviceError, SchedulerError
from dmmlib.files import config_hash, kept, read_json, write_json
from dmmlib.progress import Progress

C = TypeVar("C")
R = TypeVar("R")
CACHE = "TORCHINDUCTOR_CACHE_DIR"
Steps = Callable[["Execution", int], None]
IDLE = 600  # seconds after which idle worker processes end


@dataclass(frozen=True)
class Execution:
    """A way to carry training out."""

    chunk: int = 32  # models that share a step
    workers: int = 1  # chunks in progress at a time, each with its share of torch's CPU threads
    compile: bool = False  # run steps through torch.compile
    processes: bool = False  # workers are processes, which are started once and kept, instead of threads

    def split(self, members: np.ndarray) -> list[np.ndarray]:
        """Split members into chunks whose sizes differ by at most one and that keep every worker busy to the end."""
        n_chunks = self.workers * -(-len(members) // (self.workers * self.chunk))
        return np.array_split(members, min(n_chunks, len(members)))

    def run(self, work: Callable[[C], R], chunks: Sequence[C]) -> Iterator[R]:
        """Yield the results of `work` on every chunk, in their order; raises SchedulerError if a process is killed."""
        threads, workers = torch.get_num_threads(), min(self.workers, len(chunks))
        if self.processes and self.workers > 1 and (packed := _pack(work)) is not None:
            yield from _in_processes(self.workers, max(1, threads // self.workers), packed, chunks)
        elif workers <= 1:
            yield from map(work, chunks)
        else:
            pool = ThreadPoolExecutor(
                workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
            )
            try:
                yield from pool.map(work, chunks)
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)


def one_per_core(device: torch.device) -> Execution:
    """One process for each CPU thread, as for what is small, or draws from generators that threads would share."""
    workers = 1 if device.type == "cuda" else torch.get_num_threads()
    return Execution(1, workers, processes=workers > 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Give torch one thread, as a worker has it, and afterwards as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pack(work: Callable[..., Any]) -> np.ndarray | None:
    """Pickle `work` and all that it refers to; None where processes cannot serve it."""
    if multiprocessing.current_process().daemon:  # e.g. a Dask worker: it may not have children
        return None
    try:
        return np.frombuffer(cloudpickle.dumps(work), np.uint8)
    except (TypeError, AttributeError, pickle.PicklingError):  # it holds a lock, an open file, ...
        return None


def _in_processes(workers: int, threads: int, packed: np.ndarray, chunks: Sequence[C]) -> Iterator[Any]:
    pool = joblib.Parallel(workers, "loky", batch_size=1, return_as="generator", idle_worker_timeout=IDLE)
    with _ctrl_c_ends_workers() as interrupted:
        try:  # joblib shares the large array `packed` instead of sending it with every chunk
            yield from pool(joblib.delayed(_apply)(packed, os.getpid(), threads, chunk) for chunk in chunks)
        except BrokenProcessPool as error:
            if interrupted.is_set():
                raise KeyboardInterrupt from error
            raise SchedulerError(
                "A training process was killed, perhaps for want of memory; lower ensembles.chunk or threads, or free "
                "memory, and run again. Finished shards are kept."
            ) from error
        except KeyboardInterrupt:
            _end_workers()  # joblib forgets those that just started; our exit would wait for them
            raise


def _end_workers() -> None:
    """End worker processes, those included that have only just started."""
    for child in multiprocessing.active_children():
        if isinstance(child, LokyProcess):
            child.terminate()


@contextmanager
def _ctrl_c_ends_workers() -> Iterator[threading.Event]:
    """Let Ctrl-C end workers and set the event before it is raised, as a callback may swallow what is raised."""
    interrupted, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield interrupted
        return

    def end(number: int, frame: types.FrameType | None) -> None:
        interrupted.set()
        _end_workers()
        before(number, frame)

    signal.signal(signal.SIGINT, end)
    try:
        yield interrupted
    finally:
        if threading.current_thread() is threading.main_thread():  # or a generator that nobody finished is collected
            signal.signal(signal.SIGINT, before)


def _apply(packed: np.ndarray, parent: int, threads: int, chunk: C) -> Any:
    """Do the packed work on a chunk, in a worker process."""
    _settle(parent, threads)
    return _unpack(packed.tobytes())(chunk)


@functools.cache
def _settle(parent: int, threads: int) -> None:
    """Make a worker process take its share of threads, leave Ctrl-C to its parent, and end when its parent has."""
    from joblib.externals.loky import process_executor

    process_executor._USE_PSUTIL = False  # or it takes compiled code for a leak, and ends the process
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # or it dies, or starts the next chunk, while its parent ends it
    if os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _unpack(packed: bytes) -> Callable[..., Any]:
    return _Unpickler(io.BytesIO(packed)).load()


class _Unpickler(pickle.Unpickler):
    """Unpickles equal functions from different pickles with one code object: torch compiles each of those anew."""

    codes: ClassVar[dict[types.CodeType, types.CodeType]] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if name != "_make_function":
            return found
        return lambda code, *rest: found(self.codes.setdefault(code, code), *rest)


def candidates(
    device: torch.device, chunk: int | None = None, compile: bool | None = None, many: bool = False
) -> tuple[Execution, ...]:
    """List what is worth trying on a device, small chunks first.

    A chunk or `compile` that is not None is settled already; with `many`, starting processes can pay.
    """
    cuda = device.type == "cuda"
    workers = 1 if cuda else torch.get_num_threads()
    plain = (1, 4, 32, 128) if cuda else (1, 16, 64)  # mapped convolutions can be slower than those of a model alone
    larger = (1, 4, 32, 128) if cuda else (1, 8)  # a compiled step has less to share, and should stay in cache
    made = [Execution(chunk or c, workers) for c in plain if compile is not True]
    made += [Execution(chunk or c, workers, compile=True) for c in larger if compile is not False]
    if many and workers > 1:  # which take time to start
        made += [replace(way, processes=True) for way in made if way.compile or way == made[0]]
    return tuple(dict.fromkeys(made))


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what a measured rate holds for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {os.cpu_count()}"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def fastest(
    options: Sequence[Execution],
    device: torch.device,
    steps: Steps,
    config: dict[str, Any],
    folder: Path,
    progress: Progress,
    planned: float,
) -> Execution:
    """Find the fastest of some executions (small chunks first) on this machine: `measure` it once, keep it in a folder.

    The rates kept are those of one `config`, which names what they depend on besides the machine.

    Raises:
        DeviceError: if all options are compiled, and compiling does not work here.
    """
    if all(option.compile for option in options) and not can_compile(device):
        raise DeviceError(
            "ensembles.compile is true, but torch.compile does not work here (it needs a C++ compiler, on a GPU "
            "Triton); install it, or set it to auto or false."
        )
    if len(options) == 1:
        return options[0]

    def rates() -> list[dict[str, Any]]:
        progress("measure how to train fastest", 0, 1)
        measured = measure([o for o in options if not o.compile or can_compile(device)], steps, planned)
        progress("measure how to train fastest", 1, 1)
        return [asdict(o) | {"model_steps_per_second": float(f"{rate:.5g}")} for o, rate in measured.items()]

    found = kept(place_of_rates(options, device, config, folder), rates, read_json, write_json)
    return Execution(**max(found, key=lambda row: row.pop("model_steps_per_second")))


def place_of_rates(options: Sequence[Execution], device: torch.device, config: dict[str, Any], folder: Path) -> Path:
    """Where `fastest` keeps the rates of some executions on this machine."""
    key = config | machine(device) | {"options": [asdict(option) for option in options]}
    return folder / f"execution-{config_hash(key)}.json"


def measure(tried: Sequence[Execution], steps: Steps, planned: float = math.inf) -> dict[Execution, float]:
    """Measure the model-steps per second of each execution (small chunks first), all its workers together.

    It tries no other once it has taken a quarter of the time that the `planned` model-steps will take. Left out also is
    what would take over two seconds per step, going by a smaller chunk; what compiles or starts processes,
    where the same uncompiled is less than half as fast as others, or in threads less than three quarters, or left out;
    and what a GPU's memory does not hold. `steps(execution, n)` takes n steps of `chunk` models in each worker; what it
    takes before the first, as it makes these models, is left out, or large chunks would seem slow.

    Raises:
        DeviceError: if not even the first, smallest chunk fits into the GPU's memory.
    """
    rates, begun = dict[Execution, float](), time.perf_counter()

    def seconds(execution: Execution, n: int) -> float:  # of three: the first may find a process still compiling
        return median(repeat(lambda: steps(execution, n), timer=time.perf_counter, repeat=3, number=1))

    for execution in tried:
        if rates and time.perf_counter() - begun > planned / max(rates.values()) / 4:
            break
        if execution.chunk > 1 and any(execution.chunk * execution.workers / rate > 2 for rate in rates.values()):
            continue
        threads, in_threads = {w: r for w, r in rates.items() if not w.processes}, replace(execution, processes=False)
        plain, uncompiled = {w: r for w, r in rates.items() if not w.compile}, replace(execution, compile=False)
        if execution.processes:
            if in_threads in tried and threads.get(in_threads, 0) < 0.75 * max(threads.values()):
                continue
        elif execution.compile and uncompiled in plain and plain[uncompiled] < 0.5 * max(plain.values()):
            continue
        try:
            steps(execution, 2)  # starts processes, compiles, and warms caches
        except torch.OutOfMemoryError as error:
            if rates:
                continue
            raise DeviceError(
                f"A step of {execution.chunk} models does not fit into the GPU's memory; lower ensembles.chunk or "
                "training.batch_size."
            ) from error
        models = execution.chunk * execution.workers
        n, start = max(5, round(rates.get(in_threads, 0) / models)), seconds(execution, 1)
        while (taken := seconds(execution, n) - start) < 0.2 and n < 500:  # too short to tell anything
            n *= 3
        rates[execution] = (n - 1) * models / max(taken, 1e-3)
    return rates


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with torch, once per process; see `vary_in_size`.

    To be called in the thread that calls the function, as torch keeps these settings per thread. One step serves every
    model and loss, more kinds than torch allows by default; and by default torch would take what differs between two
    architectures for sizes that vary, and make slower code for the second.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.automatic_dynamic_shapes = False
    _own_cache()
    return _compile(function)


_compile = functools.cache(torch.compile)


@functools.cache
def _own_cache() -> None:
    """Give torch a folder for what it compiles that lasts as long as this process, and serves its children.

    In the default folder, which all share, a process that is killed can leave half a library, and loading that kills.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE, default_cache_dir()) == default_cache_dir():  # torch sets it when it is imported
        folder = tempfile.TemporaryDirectory(prefix="dmm-compiled-", ignore_cleanup_errors=True)
        os.environ[CACHE] = folder.name
        atexit.register(folder.cleanup)


def vary_in_size(tensors: Iterable[torch.Tensor], *dims: int) -> None:
    """Let one compiled function serve any size of these dimensions: models, points, batches.

    The other sizes are the architecture's, and as constants make faster code than torch.compile(dynamic=True).
    """
    import torch._dynamo

    for tensor in tensors:
        if tensor.ndim > max(dims):
            torch._dynamo.maybe_mark_dynamic(tensor, dims)


@functools.cache
def can_compile(device: torch.device | str = "cpu") -> bool:
    """Whether torch.compile works on a device: it needs a C++ compiler on a CPU, Triton on a GPU."""
    _own_cache()
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(2, device=device))
    except Exception:  # whatever the reason, the answer is no
        return False
    return True
