"""What it costs to give freed memory back at once, as Dask has its workers do (MALLOC_TRIM_THRESHOLD_=65536).

    python benchmarks/trimming.py [--rounds 3] [--out results/trimming.json]

Processor time of a step of the convnet in a plain loop on one core, in a process of its own each time, interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import engine  # the script beside this one
import torch

HERE, STEPS = Path(__file__), 300


def work() -> None:
    steps = engine.loop("convnet", torch.device("cpu"), threads=1)
    steps(20)
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    steps(STEPS)
    seconds = time.process_time() - start
    print(1000 * seconds / STEPS, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "trimming.json")
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    ways: dict[str, dict[str, str]] = {"glibc's default": {}, "trimmed": {"MALLOC_TRIM_THRESHOLD_": "65536"}}
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, more in ways.items():
            command = [sys.executable, str(HERE), "--work"]
            said = subprocess.run(command, env=os.environ | more, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[name].append([float(number) for number in said.split()])
    report = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for name, (milliseconds, faults) in report.items():
        print(f"{name}: {milliseconds:.2f} ms of processor time a step, {faults:,.0f} page faults")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    print(f"saved: {arguments.out}")


if __name__ == "__main__":
    main()
