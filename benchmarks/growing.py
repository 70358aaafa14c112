"""Could matching leave less on retained points at the same cost? Steps that grow, and steps that remember.

`match` takes equal steps, each of which forgets what the others saw. Here, with perfect targets on the development data
of `matching.py`: steps that each see twice or three times the points of the one before, so that the last one sees most
of R; and steps that keep the gradients, at the weights of their time, of all points of R that earlier steps saw, whose
margins are told by the linear model. p95 KLoM over the floor's, for each split, and seconds, the steps' linear algebra
included, which the cost in sample gradients leaves out.

    python -m benchmarks.growing fashion-mnist:501 fashion-mnist:502 digits:501 digits:502 digits:503
    python -m benchmarks.growing convnet:501 --costs 0.05 --sets half_class    # adds to results/growing.json
"""

from __future__ import annotations

import argparse
import json
import time
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from benchmarks.matching import development_sets, study_of
from dmmlib import metrics
from dmmlib.matching.gauss_newton import Jacobian, separable_weights
from dmmlib.matching.match import RIDGE_FORGET, RIDGE_RETAIN, oracle_targets
from dmmlib.unlearn.base import Moved, Problem, Unlearned, collect, draw_batches

RESULTS = Path(__file__).parent / "results"
FARTHEST, LARGEST = 8.0, 2000


class Way(NamedTuple):
    """How many steps, how many times the points of the one before each sees, and whether it remembers them."""

    steps: int
    growth: float
    remembers: bool

    def __str__(self) -> str:
        said = f"{self.steps} steps, " + ("equal" if self.growth == 1 else f"growing {self.growth:g} times")
        return said + (", remembering" if self.remembers else "")

    def sizes(self, budget: int) -> list[int]:
        """Points in each step, at most `LARGEST`."""
        shares = self.growth ** np.arange(self.steps)
        ends = np.round(budget * np.cumsum(shares) / shares.sum()).astype(int)
        return np.diff(ends, prepend=0).clip(max=LARGEST).tolist()


WAYS = (Way(4, 1, False), Way(3, 2, False), Way(3, 3, False), Way(3, 2, True))


def joined(seen: list[Jacobian], retained: list[int]) -> Jacobian:
    """The last step's Jacobian, with the points of R of all steps before it, the latest first."""
    last = seen[-1]

    def all_of(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensors[-1]] + [t[-n:] for t, n in zip(tensors[-2::-1], retained[-2::-1], strict=True)])

    whole = copy(last)
    whole._parts = []
    for parts in zip(*(jacobian._parts for jacobian in seen), strict=True):
        layers = [part.layer for part in parts]
        layer = replace(layers[-1], inputs=all_of([p.inputs for p in layers]), d=all_of([p.d for p in layers]))
        whole._parts.append(type(parts[-1])(layer, sum(retained)))
    n = len(last.margins) + sum(retained[:-1])
    whole.kernel = sum((part.kernel for part in whole._parts), torch.zeros(n, n, dtype=torch.double))
    if last._others:
        whole._explicit = all_of([jacobian._explicit for jacobian in seen])
        whole.kernel = whole.kernel + (whole._explicit @ whole._explicit.T).double()
    return whole


def match(problem: Problem, targets: np.ndarray, sizes: list[int], remembers: bool) -> Unlearned:
    """`matching.match` with steps of given sizes, and a memory."""
    originals, x, y = problem.originals, problem.x, problem.y
    goal, known = torch.from_numpy(np.asarray(targets, np.float32)), separable_weights(originals, x, y)[0]
    counts = [min(len(problem.forget), size // 2) for size in sizes]
    retained = [min(len(problem.retain), size - n) for size, n in zip(sizes, counts, strict=True)]
    drawn = [
        np.split(draw_batches(problem, pool, 1, sum(some))[0], np.cumsum(some)[:-1], axis=1)
        for pool, some in ((problem.forget, counts), (problem.retain, retained))
    ]

    def move(members: np.ndarray) -> Moved:
        models = originals[members.tolist()].clone()
        models.module.eval()
        for i, member in enumerate(members):
            params, buffers = models.state_of(i)
            before, left = list[Jacobian](), torch.zeros(0)
            for step, (f, r) in enumerate(zip(*drawn, strict=True), 1):
                points = torch.from_numpy(np.concatenate([f[member], r[member]]))
                seen = Jacobian(models.module, params, buffers, x[points], y[points], r.shape[1], known)
                far = (goal[member, points] - seen.margins).clamp(-FARTHEST, FARTHEST)
                if remembers:
                    before.append(seen)
                    seen, far = joined(before, retained[:step]), torch.cat([far, left])
                n_retained = len(far) - f.shape[1]
                ridge = torch.tensor([RIDGE_FORGET] * f.shape[1] + [RIDGE_RETAIN] * n_retained)
                k = seen.kernel.clone()
                k.diagonal().add_(ridge * k.diagonal().mean())
                left = (far - (seen.kernel @ torch.linalg.solve(k, far.double())).float())[-n_retained:]
                for name, moved in seen.solve(far, ridge).items():
                    params[name] += moved
        return models.logits(x).numpy(), [], models.state()

    parts = problem.execution.run(move, problem.execution.split(np.arange(problem.n_models)))
    return collect(problem, parts, np.cumsum(np.add(counts, retained)))


def measured(kind: str, seed: int, costs: list[float], sets: list[str], runs: Path) -> list[dict[str, object]]:
    """One row for each set, cost and way."""
    study, rows = study_of(kind, seed, runs), list[dict[str, object]]()
    for name, f in development_sets(study, kind).items():
        if sets and name not in sets:
            continue
        splits, labels = f.splits(study.data.n_train, study.data.n_val), study.data.y
        truth, floor = (metrics.margins(study.oracles(f, floor=again), labels) for again in (False, True))
        problem = study.problem(f, "oracle_matching")
        targets, least = oracle_targets(problem), metrics.klom(floor, truth)
        for cost in costs:
            for way in WAYS:
                start = time.perf_counter()
                found = match(problem, targets, way.sizes(round(cost * problem.retraining)), way.remembers)
                took, klom = time.perf_counter() - start, metrics.klom(found.margins, truth)
                ratio = {s: float(np.percentile(klom[i], 95) / np.percentile(least[i], 95)) for s, i in splits.items()}
                row = {"kind": kind, "seed": seed, "set": name, "cost": cost, "way": str(way), **ratio, "seconds": took}
                rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def summary(table: pd.DataFrame) -> str:
    """Ratios in the mean over sets and seeds, in words."""
    groups = table.groupby(["kind", "cost", "way"], sort=False)
    said = groups[["forget", "retain", "validation"]].agg(lambda values: np.exp(np.log(values).mean())).round(2)
    said["worst retain"], said["seconds"] = groups["retain"].max().round(2), groups["seconds"].median().round(1)
    said["sets"] = groups.size()
    title = "p95 KLoM over the floor's with perfect targets, geometric mean over sets and seeds; seconds for 60 models"
    return f"{title}\n\n{said.to_string()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", help="KIND:SEED")
    parser.add_argument("--costs", type=float, nargs="+", default=[0.02, 0.03, 0.05, 0.1])
    parser.add_argument("--sets", nargs="+", default=[])
    parser.add_argument("--runs", type=Path, default=Path("runs/growing"))
    given, path = parser.parse_args(), RESULTS / "growing.json"
    for case in given.cases:
        kind, _, seed = case.partition(":")
        found = measured(kind, int(seed), given.costs, given.sets, given.runs)
        old = json.loads(path.read_text()) if path.exists() else []
        key = lambda row: tuple(row[k] for k in ("kind", "seed", "set", "cost", "way"))  # noqa: E731
        rows = list({key(row): row for row in [*old, *found]}.values())
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    told = summary(pd.DataFrame(rows))
    (RESULTS / "growing.txt").write_text(told + "\n")
    print(told)
