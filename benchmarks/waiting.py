"""How idle OpenMP threads should wait: programs that share the cores, with and without spinning.

    python benchmarks/waiting.py [--models mlp convnet] [--seconds 3] [--rounds 3] [--out results/waiting.json]

Steps per second of a plain PyTorch loop with one thread per core, alone and beside a second one, with OpenMP's own
waiting (threads spin a while before they sleep) and with OMP_WAIT_POLICY=PASSIVE (they sleep at once). Every program is
a process of its own, which reads the variable when it loads torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import engine  # the script beside this one
import torch

HERE = Path(__file__)


def work(name: str, start: float, seconds: float) -> None:
    """One program: its steps per second, from a moment on that all programs know."""
    steps = engine.loop(name, torch.device("cpu"))
    steps(50)
    time.sleep(max(0.0, start - time.time()))
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += steps(10)
    print(done / (time.perf_counter() - began))


def rate(name: str, policy: str | None, programs: int, seconds: float) -> float:
    """Steps per second of all programs together."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    command = [sys.executable, str(HERE), "--work", name, str(time.time() + 6), str(seconds)]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(programs)]
    return sum(float(process.communicate()[0]) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mlp", "convnet"], choices=list(engine.OPTIONS))
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "waiting.json")
    arguments = parser.parse_args()
    if arguments.work:
        name, start, seconds = arguments.work
        work(name, float(start), float(seconds))
        return
    report: dict[str, dict[str, float]] = {}
    for name in arguments.models:
        ways = [(policy, programs) for programs in (1, 2) for policy in (None, "PASSIVE")]
        rounds = [[rate(name, *way, arguments.seconds) for way in ways] for _ in range(arguments.rounds)]
        report[name] = {}
        for (policy, programs), rates in zip(ways, zip(*rounds, strict=True), strict=True):
            what = f"{programs} program{'s' * (programs > 1)}, {policy or 'OpenMP default'}"
            report[name][what] = statistics.median(rates)
            span = f"{min(rates):,.0f} to {max(rates):,.0f}"
            print(f"{name}: {what}: {report[name][what]:,.0f} steps/s in all, {span}", flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    print(f"saved: {arguments.out}")


if __name__ == "__main__":
    main()
