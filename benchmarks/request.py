"""What people wait for: short commands, a study's start, and a request of one's own, here and in another checkout.

    python benchmarks/request.py [--preset laptop] [--forget-set mine.json] [--before ../older] [--only study status]

Seconds of processor time (children's included) and of the wall clock. Commands run in turn in both checkouts, so that
other work on the machine meets both; what counts is their ratio. The store (DMM_RUNS) must hold trained models. A
request, and one tried on the preset smoke as the widget does, train oracles in a first round, which is not counted.
`study` makes a study in a new process, `attributor` also reads its attributor.
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

from dmmlib import presets

HERE = Path(__file__).resolve().parents[1]


def seconds(checkout: Path, arguments: list[str]) -> tuple[float, float]:
    """Processor and wall seconds of a Python process."""
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, *arguments]
    runs = os.path.abspath(os.environ.get("DMM_RUNS", HERE / "runs"))  # one store for both
    environment = os.environ | {"PYTHONPATH": str(checkout), "DMM_RUNS": runs}
    subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return spent, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--forget-set", type=Path)
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", help="names of what is measured; what else is in the table stays")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "benchmarks" / "results" / "request.json")
    given = parser.parse_args()
    commands = {"help": ["--help"], "version": ["--version"], "status": ["status", given.preset]}
    if given.forget_set:
        again = ["--stage", "04", "--force", "--forget-set", str(given.forget_set.resolve())]
        commands["request"] = ["run", given.preset, *again]
        ours, smoke = (presets.load(name).data.model_dump(mode="json") for name in (given.preset, "smoke"))
        changes = (f"data.{key}={json.dumps(value)}" for key, value in ours.items() if value != smoke[key])
        commands["try"] = ["run", "smoke", *again, *(part for change in changes for part in ("--set", change))]
    commands = {name: ["-m", "dmmlib.app.cli", *arguments] for name, arguments in commands.items()}
    study = f"from dmmlib.study import Study; study = Study({given.preset!r})"
    commands |= {"study": ["-c", study], "attributor": ["-c", f"{study}; study.attributor()"]}
    checkouts = {"after": HERE, **({"before": given.before.resolve()} if given.before else {})}
    report: dict[str, dict[str, float]] = (
        json.loads(given.out.read_text(encoding="utf-8")) if given.only and given.out.exists() else {}
    )
    for name, arguments in commands.items():
        if name not in (given.only or commands):
            continue
        rounds = [
            {which: seconds(path, arguments) for which, path in checkouts.items()} for _ in range(given.rounds + 1)
        ]
        found = {}
        for which in checkouts:
            for i, kind in enumerate(("processor", "wall")):
                found[f"{kind} seconds, {which}"] = round(statistics.median(r[which][i] for r in rounds[1:]), 2)
        if given.before:
            found["processor ratio"] = round(found["processor seconds, after"] / found["processor seconds, before"], 3)
        report[name] = found
        print(name, found, flush=True)
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
