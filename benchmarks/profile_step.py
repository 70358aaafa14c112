"""Where the time of a compiled training step goes: products, fused elementwise kernels, everything else.

    python benchmarks/profile_step.py [--chunk 16] [--precision float32]

One thread, the mlp of the laptop preset, in processor time, which other processes disturb less than time. Under the
profiler a step takes somewhat longer than without. Saved in results/step.json.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from pathlib import Path

import engine  # the script beside this one
import torch

from dmmlib.execution import Execution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--precision", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = engine.ours("mlp", torch.device("cpu"), Execution(arguments.chunk, 1, compile=True), arguments.precision)
    steps(40)  # compiles
    start = time.process_time()
    n = steps(400) / arguments.chunk
    plain = time.process_time() - start
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    steps(400)
    profile.disable()
    groups = {
        "products (bmm)": 0.0,
        "fused elementwise kernels": 0.0,
        "guards and dispatch": 0.0,
        "everything else": 0.0,
    }
    for (file, _, function), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if "bmm" in function:
            groups["products (bmm)"] += own
        elif "kernel.kernel" in function:
            groups["fused elementwise kernels"] += own
        elif "_dynamo" in file or "_functorch" in file or "_inductor" in file or "torchinductor" in file:
            groups["guards and dispatch"] += own
        else:
            groups["everything else"] += own
    total = sum(groups.values())
    print(f"{plain / n * 1e3:.2f} ms per step of {arguments.chunk} models, {total / n * 1e3:.2f} ms when profiled:")
    for name, seconds in groups.items():
        print(f"  {name:28s} {seconds / n * 1e3:6.3f} ms  {seconds / total:5.0%}")
    rate = engine.products(arguments.chunk, torch.device("cpu"), time.process_time)["of the mlp, float32"]
    out = Path(__file__).parent / "results" / "step.json"
    every = json.loads(out.read_text()) if out.exists() else {}
    every[f"mlp, {arguments.chunk} a step, {arguments.precision}"] = {
        "milliseconds": plain / n * 1e3,
        "products_flops": rate,
        "profiled_milliseconds": {name: seconds / n * 1e3 for name, seconds in groups.items()},
    }
    out.write_text(json.dumps(every, indent=1))
    print(f"float32 products of the step at their own rate ({rate / 1e9:.0f} GFLOP/s): "
          f"{arguments.chunk * engine.step_flop('mlp') / rate * 1e3:.3f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
