"""How fast models train, against how peers do it and against the machine's own product rate.

    python benchmarks/engine.py [--models mlp convnet resnet9] [--rounds 5] [--one-core]

Everything is measured in one run, interleaved round by round; medians over rounds, and ratios to the plain
loop. A model is one of the laptop preset's subset models: 1,000 of 2,000 images, 20 epochs, batches of 50.
What is dmmlib's includes its set-up and the way of weights and data to worker processes and back. Beside each rate
stands how many cores other programs kept busy at the time. Results of models that are not asked for are kept.
On a GPU it prints the same (results/gpu.json), and models per hour of ResNet-9 (width 64, half of CIFAR-10's size, 24
epochs).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing as mp
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dmmlib import data, ensemble, execution, models
from dmmlib.app.cluster import UNTRIMMED
from dmmlib.execution import Execution
from dmmlib.models import resolve_device
from dmmlib.optim import Tensors
from dmmlib.zoo import architectures

BATCH, STEPS = 50, 400  # a half model takes 20 epochs of 20 steps
OPTIONS = {"mlp": {}, "convnet": {}, "resnet9": {"width": 16}}
SIZE = {"mlp": 400, "convnet": 400, "resnet9": 40}  # steps a measurement
MODELS = {"mlp": 192, "convnet": 8, "resnet9": 2}  # that dmmlib trains in a measurement
CHUNK = {"mlp": 8, "convnet": 1, "resnet9": 1}  # models a compiled step


def task(name: str, device: torch.device) -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """Factory, points and labels."""
    d = data.load("fashion-mnist", 2000, 500, 0)
    spec = models.get(name)
    x = spec.prepare(d, d.x)[:2000]
    if name == "resnet9":
        x = F.interpolate(x, size=32).expand(-1, 3, -1, -1)
    factory = lambda: spec.factory(tuple(x.shape[1:]), 10, **OPTIONS[name])  # noqa: E731
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    return factory, x.to(device), torch.from_numpy(d.y)[:2000].to(device)


Contender = Callable[[int], int]
"""Take n steps; returns the model-steps taken."""


def loop(name: str, device: torch.device, threads: int | None = None) -> Contender:
    """One model after the other, as any tutorial trains it."""
    if threads:
        torch.set_num_threads(threads)
    factory, x, y = task(name, device)
    model = factory().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)

    def steps(n: int) -> int:
        for indices in torch.randint(0, len(x), (n, BATCH), device=device):
            optimizer.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            optimizer.step()
        return n

    return steps


def _serve(name: str, pipe: mp.connection.Connection) -> None:
    steps = loop(name, torch.device("cpu"), threads=1)
    while (n := pipe.recv()) is not None:
        pipe.send(steps(n))


def two_processes(name: str) -> tuple[Contender, Callable[[], None]]:
    """The same loop in as many processes as there are cores, one thread each."""
    context, pipes = mp.get_context("spawn"), []
    for _ in range(torch.get_num_threads()):
        here, there = context.Pipe()
        context.Process(target=_serve, args=(name, there), daemon=True).start()
        pipes.append(here)

    def steps(n: int) -> int:
        for pipe in pipes:
            pipe.send(n)
        return sum(pipe.recv() for pipe in pipes)

    return steps, lambda: [pipe.send(None) for pipe in pipes] and None


def layers_by_hand(module: nn.Module, w: Tensors, h: Tensor, at: str = "") -> Tensor:
    """What the layers of many models answer in training, to images (batch, models * channels, ...) or features
    (models, batch, n).

    `w` holds parameters and buffers by name, one row per model; `module` says only which layers there are.
    """
    n = len(next(iter(w.values())))
    match module:
        case nn.Sequential():
            for name, layer in module.named_children():
                h = layers_by_hand(layer, w, h, f"{at}{name}.")
            return h
        case architectures.Residual():
            return h + layers_by_hand(module.block, w, h, f"{at}block.")
        case nn.Conv2d():
            bias = w[f"{at}bias"].flatten() if module.bias is not None else None
            return F.conv2d(h, w[f"{at}weight"].flatten(0, 1), bias, module.stride, module.padding, groups=n)
        case nn.BatchNorm2d():
            rows = (w[f"{at}{name}"].flatten() for name in ("running_mean", "running_var", "weight", "bias"))
            return F.batch_norm(h, *rows, training=True)
        case nn.Flatten():
            return h.unflatten(1, (n, -1)).transpose(0, 1).flatten(2)
        case nn.Linear() if module.bias is None:
            return torch.bmm(h, w[f"{at}weight"].mT)
        case nn.Linear():
            return torch.baddbmm(w[f"{at}bias"][:, None], h, w[f"{at}weight"].mT)
    return module(h)  # what has no weights and knows no models: ReLU, pooling, a factor


def by_hand(name: str, device: torch.device, chunk: int) -> Contender:
    """Layers written for many models: batched products for dense layers, grouped convolutions otherwise."""
    factory, x, y = task(name, device)
    stacked, module = ensemble.initialise(factory, range(chunk), device), factory()
    params = {k: v.clone().requires_grad_() for k, v in stacked.params.items()}
    optimizer = torch.optim.SGD(list(params.values()), 0.05, 0.9, weight_decay=5e-4, nesterov=True)

    def steps(n: int) -> int:
        for indices in torch.randint(0, len(x), (n, chunk, BATCH), device=device):
            batch = x[indices]
            optimizer.zero_grad()
            logits = layers_by_hand(
                module, params | stacked.buffers, batch.transpose(0, 1).flatten(1, 2) if batch.ndim == 5 else batch
            )
            F.cross_entropy(logits.flatten(0, 1), y[indices].flatten(), reduction="sum").div(BATCH).backward()
            optimizer.step()
        return n * chunk

    return steps


def ours(name: str, device: torch.device, way: Execution, precision: str = "float32") -> Contender:
    """`ensemble.train` on masks of one size, its set-up included."""
    factory, x, y = task(name, device)
    n_models = max(MODELS[name], way.chunk * way.workers) if way.workers > 1 else 4 * way.chunk

    def steps(n: int) -> int:
        an_epoch = min(n, len(x) // BATCH)
        masks = np.zeros((n_models, len(x)), bool)
        masks[:, : an_epoch * BATCH] = True
        training = ensemble.Training(epochs=n // an_epoch, precision=precision)
        ensemble.train(factory, x, y, masks, range(n_models), training, way)
        return training.steps(an_epoch * BATCH) * n_models

    return steps


@functools.lru_cache
def _far(name: str, chunk: int) -> Contender:
    return ours(name, torch.device("cpu"), Execution(chunk, 1, compile=True))


def _far_steps(name: str, chunk: int, n: int) -> int:
    return _far(name, chunk)(n)


def dask_processes(name: str, chunk: int, client: Any) -> Contender:
    """The same in Dask workers, one process per core, as `--scheduler local-cluster` does it."""
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])

    def steps(n: int) -> int:
        futures = [client.submit(_far_steps, name, chunk, n, workers=[a], pure=False) for a in addresses]
        return sum(client.gather(futures))

    return steps


def _shard() -> np.ndarray:
    return np.zeros((100, 2500, 10), np.float32)


def overhead_a_shard(client: Any, repeats: int = 20) -> float:
    """Seconds from sending a shard's task to holding its 10 MB of logits, the training left out."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        client.submit(_shard, pure=False).result()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def busy() -> tuple[float, float]:
    """Core-seconds that this program with all its processes, and the whole machine, have used so far."""
    ours = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            ours += sum(process.cpu_times()[:4])  # its own, and of children that have ended
        except psutil.NoSuchProcess:
            continue
    every = psutil.cpu_times()
    return ours, sum(every) - every.idle - getattr(every, "iowait", 0.0)


def measure(
    contenders: dict[str, Contender],
    size: int,
    rounds: int,
    beside: Callable[[], dict[str, float]],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Steps of one model per second for each: one number per round, cores that others kept busy then, and medians.

    The first round warms up and does not count.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    others: dict[str, list[float]] = {name: [] for name in contenders}
    also = []
    for number in range(rounds + 1):
        for name, steps in contenders.items():
            before, begun, start = busy(), time.perf_counter(), clock()
            done = steps(size)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, wall = clock() - start, time.perf_counter() - begun
            if number:
                rates[name].append(done / seconds)
                ours, every = (b - a for a, b in zip(before, busy(), strict=True))
                others[name].append(max(0.0, every - ours) / wall)
        also.append(beside())
    return rates, others, {k: statistics.median(numbers[k] for numbers in also) for k in also[0]}


def products(
    chunk: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 30,
    side: int = 2048,
) -> dict[str, float]:
    """FLOP/s of plain products: large ones, and the mlp's own at a batch, in all threads."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        shapes = {
            "large": ((1, side, side), (1, side, side)),
            "of the mlp": ((chunk, BATCH, 196), (chunk, 196, 128)),
        }
        for what, (left, right) in shapes.items():
            a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in (left, right))
            times = []
            for _ in range(repeats):
                start = clock()
                torch.bmm(a, b)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(clock() - start)
            flop = 2 * math.prod(left) * right[-1]
            rates[f"{what}, {str(dtype).removeprefix('torch.')}"] = flop / statistics.median(times)
    return rates


def cifar10(device: torch.device, width: int = 64, batch: int = 500, steps: int = 20) -> Iterator[tuple[str, float]]:
    """Models an hour of the paper's subset models, from some steps on random images, by way of training.

    Ways whose steps do not fit into the device's memory are left out; what is compiled comes last, as it takes long.
    """
    x = torch.randn(2_000, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (len(x),), device=device)
    loss, training = ensemble.classification(y), ensemble.Training()
    for way in (*execution.candidates(device, compile=False), Execution(1, compile=True)):
        stacked = ensemble.initialise(
            lambda: models.build("resnet9", (3, 32, 32), 10, width=width), range(way.chunk), device
        )
        batches = [
            np.random.default_rng(i).integers(0, len(x), (way.chunk, batch)) for i in range(max(3, steps // way.chunk))
        ]
        start = training.optimizer.start(stacked.params)
        take = functools.partial(ensemble.descend, stacked, x, batches, loss, training.optimizer, start)
        try:
            for _ in range(2):  # the first time compiles and warms up
                began = time.perf_counter()
                take(precision="bfloat16", compile=way.compile)
                float(next(iter(stacked.params.values())).sum())  # waits for the device
                seconds = time.perf_counter() - began
        except torch.OutOfMemoryError:
            continue
        a_model = 24 * 25_000 / batch
        yield f"{way.chunk} a step{', compiled' * way.compile}", 3600 * way.chunk * len(batches) / seconds / a_model


def step_flop(name: str) -> float:
    """FLOP of a model-step: products and convolutions, forward and backward."""
    factory, x, _ = task(name, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        factory()(x[:BATCH]).sum().backward()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="in each measurement; few, to see that it runs, not how fast")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one-core", action="store_true", help="one thread, in processor time: where others compute")
    parser.add_argument("--out", type=Path, help="default: results/engine.json, one_core.json or gpu.json")
    arguments = parser.parse_args()
    device = resolve_device("cpu" if arguments.one_core else arguments.device)
    name = "one_core" if arguments.one_core else "engine" if device.type == "cpu" else "gpu"
    out: Path = arguments.out or Path(__file__).parent / "results" / f"{name}.json"
    report: dict = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"models": {}, "products": {}}
    report["machine"] = execution.machine(device) | {"platform": platform.platform()}
    client: Any = None
    clock = time.perf_counter
    out.parent.mkdir(exist_ok=True)
    if device.type == "cuda":  # first, as a borrowed machine may not leave time for all
        rates = report["cifar10_models_an_hour"] = {}
        for way, rate in cifar10(device):
            rates[way] = rate
            print(f"ResNet-9 (width 64) on 25,000 images, 24 epochs, {way}: {rate:.0f} models per hour", flush=True)
            out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if arguments.one_core:
        torch.set_num_threads(1)
        clock = time.process_time
    elif device.type == "cpu":
        import dask
        import distributed

        dask.config.set(UNTRIMMED)
        workers = distributed.LocalCluster(torch.get_num_threads(), threads_per_worker=1, dashboard_address=None)
        client = distributed.Client(workers)
        folder = str(Path(__file__).parent)
        client.run(lambda: sys.path.insert(0, folder))
        report["dask_overhead_a_shard_seconds"] = overhead_a_shard(client)
        print(f"Dask: {1000 * report['dask_overhead_a_shard_seconds']:.0f} ms a shard of 100 models besides training")
    shared = 32 if device.type == "cuda" else CHUNK["mlp"]
    for name in arguments.models:
        many = 32 if name == "mlp" or device.type == "cuda" else 4
        chunk = many if device.type == "cuda" else CHUNK[name]
        cores = 1 if device.type == "cuda" else torch.get_num_threads()
        fast = Execution(chunk, cores, compile=True, processes=cores > 1)
        contenders: dict[str, Contender] = {"loop": loop(name, device)}
        stop = None
        if cores > 1:
            contenders["loop in a process a core"], stop = two_processes(name)
        contenders["layers by hand"] = by_hand(name, device, many)
        contenders["dmmlib, not compiled, threads"] = ours(name, device, Execution(many if chunk > 1 else 1, cores))
        if cores > 1:
            contenders["dmmlib, compiled, threads"] = ours(name, device, Execution(chunk, cores, compile=True))
        contenders["dmmlib"] = ours(name, device, fast)
        contenders["dmmlib, bfloat16"] = ours(name, device, fast, "bfloat16")
        if client and name == "mlp":
            contenders["dmmlib, a Dask process a core"] = dask_processes(name, chunk, client)
        rates, others, peak = measure(
            contenders,
            arguments.steps or SIZE[name],
            arguments.rounds,
            functools.partial(products, shared, device, clock, *((2, 256) if arguments.steps else ())),
            clock,
        )
        if stop:
            stop()
        medians = {k: statistics.median(v) for k, v in rates.items()}
        ratios = {k: statistics.median(a / b for a, b in zip(v, rates["loop"], strict=True)) for k, v in rates.items()}
        flop = step_flop(name)
        shape = "of the mlp, float32" if name == "mlp" else "large, float32"
        report["products"][name] = peak  # FLOP/s, measured between the rounds
        report["models"][name] = {
            k: {
                "models_per_second": medians[k] / STEPS,
                "ratio_to_loop": ratios[k],
                "flops": medians[k] * flop,
                "share_of_float32_products": medians[k] * flop / peak[shape],
                "rounds": len(v),
                "cores_busy_with_others": statistics.mean(others[k]),
            }
            for k, v in rates.items()
        }
        print(f"\n{name} ({arguments.rounds} rounds; models per second, half-size training)")
        for k, row in report["models"][name].items():
            print(
                f"  {k:30s} {row['models_per_second']:8.2f}   {row['ratio_to_loop']:5.1f} x loop   "
                f"{row['flops'] / 1e9:4.0f} GFLOP/s, {row['share_of_float32_products']:.2f} of products ({shape}), "
                f"others {row['cores_busy_with_others']:.2f} cores",
                flush=True,
            )
        for what, rate in peak.items():
            print(f"  products {what:24s} {rate / 1e9:8.0f} GFLOP/s")
        out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"\nsaved: {out}")


if __name__ == "__main__":
    import engine  # so that workers find its functions by name

    engine.main()
