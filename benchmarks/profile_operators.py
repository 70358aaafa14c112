"""Where the time of a model-step goes, by torch's operators: one thread, the plain loop beside dmmlib's compiled step.

    python benchmarks/profile_operators.py convnet [--steps 200] [--chunks 1 4] [--precision float32 bfloat16]

Milliseconds of a model-step in processor time, then those of its largest operators under torch's profiler.
"""

from __future__ import annotations

import argparse
import time

import engine  # the script beside this one
import torch
from torch.profiler import ProfilerActivity, profile

from dmmlib.execution import Execution


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
    for name, steps in ways.items():
        steps(arguments.steps)  # compiles
        start = time.process_time()
        n = steps(arguments.steps)
        print(f"{name}: {1000 * (time.process_time() - start) / n:.2f} ms a model-step")
        with profile(activities=[ProfilerActivity.CPU]) as kept:
            n = steps(arguments.steps)
        for event in sorted(kept.key_averages(), key=lambda e: -e.self_cpu_time_total)[:8]:
            print(f"  {event.key[:60]:60s} {event.self_cpu_time_total / n / 1000:7.3f} ms")


if __name__ == "__main__":
    main()
