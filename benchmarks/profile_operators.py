"""Where the time of a model-step goes, by torch's operators: one thread, the plain loop beside dmmlib's compiled step.

    python benchmarks/profile_operators.py convnet [--steps 200] [--chunks 1 4] [--precision float32 bfloat16]

Milliseconds of one model's step in processor time, then those of its largest operators under torch's profiler; and the
GFLOP/s that large products reach on one core, beside those of the step's convolutions. Saved, model by model, in
results/operators.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import engine  # the script beside this one
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dmmlib.execution import Execution

OUT = Path(__file__).parent / "results" / "operators.json"
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::convolution_backward")


def convolution_flop(name: str) -> float:
    """FLOP of a model-step in its convolutions, forward and backward."""
    factory, x, _ = engine.task(name, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        factory()(x[: engine.BATCH]).sum().backward()
    return sum(n for operator, n in counter.get_flop_counts()["Global"].items() if "conv" in str(operator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(engine.OPTIONS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    ways: dict[str, engine.Contender] = {"plain loop": engine.loop(arguments.model, cpu, 1)}
    for chunk in arguments.chunks:
        for precision in arguments.precision:
            way = Execution(chunk, 1, compile=True)
            ways[f"compiled, {chunk} a step, {precision}"] = engine.ours(arguments.model, cpu, way, precision)
    rates = engine.products(engine.CHUNK["mlp"], cpu, time.process_time, 10)
    flop = convolution_flop(arguments.model)
    report: dict = {"products_flops": rates, "convolution_flop_a_step": flop, "ways": {}}
    for name, steps in ways.items():
        steps(arguments.steps)  # compiles
        start = time.process_time()
        n = steps(arguments.steps)
        row = {"milliseconds": 1000 * (time.process_time() - start) / n}
        with profile(activities=[ProfilerActivity.CPU]) as kept:
            n = steps(arguments.steps)
        times = {e.key[:60]: e.self_cpu_time_total / n / 1000 for e in kept.key_averages()}
        largest = dict(sorted(times.items(), key=lambda item: -item[1])[:8])
        row["convolutions"] = sum(times.get(operator, 0.0) for operator in CONVOLUTIONS)
        report["ways"][name] = row | {"operators": largest}
        rate = flop / row["convolutions"] / 1e6
        print(f"{name}: {row['milliseconds']:.2f} ms per step, {row['convolutions']:.2f} ms convolutions at "
              f"{rate:.0f} GFLOP/s")  # fmt: skip
        for operator, milliseconds in largest.items():
            print(f"  {operator:60s} {milliseconds:7.3f} ms")
    every = json.loads(OUT.read_text()) if OUT.exists() else {}
    OUT.write_text(json.dumps(every | {arguments.model: report}, indent=1))
    print(f"products: {', '.join(f'{what} {rate / 1e9:.0f} GFLOP/s' for what, rate in rates.items())}; saved: {OUT}")


if __name__ == "__main__":
    main()
