"""How training is carried out on a machine: models a step, threads, compiled or not.

On CPU cores one thread a core steps its own few models through one compiled function: products stay in a
core's cache, and the elementwise work between them is fused. Threads still share Python's interpreter lock.
Compiling costs seconds, so small jobs do without; which is faster for a job is measured.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True)
class Execution:
    """A way to carry training out.

    Attributes:
        chunk: models that share a step.
        workers: chunks in progress at a time, each in a thread with its share of torch's CPU threads.
        compile: run steps through torch.compile (needs a C++ compiler on CPU).
    """

    chunk: int = 32
    workers: int = 1
    compile: bool = False

    def run(self, work: Callable[[C], R], chunks: Sequence[C]) -> Iterator[R]:
        """The results of `work` on every chunk, in their order, as they are done."""
        workers = min(self.workers, len(chunks))
        if workers <= 1:
            yield from map(work, chunks)
            return
        threads = torch.get_num_threads()
        share = max(1, threads // workers)
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
        try:
            yield from pool.map(work, chunks)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def candidates(device: torch.device, chunk: int | None = None, compile: bool | None = None) -> tuple[Execution, ...]:
    """What is worth trying on a device, small chunks first, given what is settled already."""
    cuda = device.type == "cuda"
    chunks = (chunk,) if chunk else (4, 32, 128) if cuda else (1, 32)
    larger = (chunk,) if chunk else (4, 32, 128) if cuda else (1, 16)  # a compiled step has less to share
    workers = 1 if cuda else torch.get_num_threads()
    plain = tuple(Execution(c, workers) for c in chunks if compile is not True)
    return plain + tuple(Execution(c, workers, compile=True) for c in larger if compile is not False)


def machine(device: torch.device) -> dict[str, Any]:
    """What a measured rate holds for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {os.cpu_count()}"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def measure(tried: Sequence[Execution], steps: Callable[[Execution, int], None]) -> dict[Execution, float]:
    """Model-steps a second of one thread under each execution.

    What would take over two seconds a step, going by a smaller chunk, is not tried: nothing is gained by
    sharing steps as long as that.

    Args:
        tried: what to compare, small chunks first.
        steps: (execution, n) -> None takes n steps of `execution.chunk` models.
    """
    rates: dict[Execution, float] = {}
    for execution in tried:
        if execution.chunk > 1 and any(execution.chunk / rate > 2 for rate in rates.values()):
            continue
        steps(execution, 2)  # compiles, and warms caches
        times = []
        for _ in range(3):
            start = time.perf_counter()
            steps(execution, 5)
            times.append(time.perf_counter() - start)
        rates[execution] = 5 * execution.chunk / sorted(times)[1]
    return rates


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile, for batches and numbers of models of any size.

    To be asked for in the thread that calls it: one step serves every model and loss, which is more kinds than
    torch allows unless told, and torch keeps that setting for each thread.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return _compile(function)


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile works here: it needs a C++ compiler on CPU, Triton on CUDA."""
    try:
        torch.compile(_double)(torch.ones(2))
    except Exception:  # whatever the reason, the answer is no
        return False
    return True


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
