"""How near Gauss-Newton matching comes to its targets, and at what cost, on development data that no preset reports.

With perfect targets (each original's margins, moved by the true change of mean margins, of oracles that nothing is
measured against) and with predicted ones: p95 KLoM on forgotten, retained and validation points, beside the floor.
Data: the presets' kinds with seeds of their own, digits with a tenth of the labels wrong; sets: random points, half of
a class, the nearest neighbours of a point, and mislabelled points, or the hardest where no label is wrong.

    python -m benchmarks.matching 501 502 503                  # seeds; fashion-mnist and digits, mlp
    python -m benchmarks.matching 501 --kinds convnet          # slower
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import data, forget_sets, metrics, unlearn
from dmmlib.forget_sets import ForgetSet
from dmmlib.matching.match import oracle_targets
from dmmlib.study import Study

RESULTS = Path(__file__).parent / "results"
N = 60  # models of each kind
COSTS = (0.01, 0.02, 0.03, 0.05, 0.1)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fashion-mnist": ("laptop", {}),
    "digits": ("digits", {"data.name": "noisy-digits"}),
    "convnet": ("laptop", {"model": {"name": "convnet"}, "training.lr": 0.1}),
}


@data.register("noisy-digits")
def noisy_digits() -> data.Dataset:
    """Digits of which a tenth have another label than their own."""
    d, rng = data.load("digits"), np.random.default_rng(77)
    labels = d.y_train.copy()
    wrong = rng.permutation(len(labels))[: len(labels) // 10]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return data.from_arrays(d.x_train, labels, d.x_val, d.y_val, name="noisy-digits")


def development_sets(study: Study, kind: str) -> dict[str, ForgetSet]:
    """Forget sets that no preset has."""
    d, rng, n = study.data, np.random.default_rng(9), study.data.n_train
    found = {"random": rng.permutation(n)[:60]}
    of_class = np.flatnonzero(d.y_train == (3 if kind == "digits" else 6))
    found["half_class"] = rng.permutation(of_class)[: len(of_class) // 2]
    found["nearest"] = forget_sets.nearest(study.features[:n], 17, 50, None)
    if kind == "digits":
        clean = data.load("digits", n, d.n_val, study.preset.data.seed)
        found["mislabelled"] = rng.permutation(np.flatnonzero(clean.y_train != d.y_train))[:60]
    else:
        found["hardest"] = np.argsort(metrics.margins(study.original_logits(), d.y)[:, :n].mean(0))[:50]
    return {name: forget_sets.make(name, i, d, preset="lab", kind="own") for name, i in found.items()}


def study_of(kind: str, seed: int, runs: Path) -> Study:
    """A kind's preset with development data and models of a seed, N of each kind of models."""
    preset, changes = KINDS[kind]
    return Study(preset, changes | {"seed": seed, "data.seed": seed, "ensembles.n_models": N}, runs=runs)


def rows(kind: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row per set and way: p95 KLoM on each split, and the cost."""
    study = study_of(kind, seed, runs)
    for name, f in development_sets(study, kind).items():
        splits, labels = f.splits(study.data.n_train, study.data.n_val), study.data.y
        truth = metrics.margins(study.oracles(f), labels)
        problem, predicted = study.problem(f, "oracle_matching"), study.problem(f, "dmm")

        def row(way: str, margins: np.ndarray, cost: float) -> dict[str, Any]:
            klom = metrics.klom(margins, truth)  # noqa: B023
            p95 = {s: round(float(np.percentile(klom[i], 95)), 3) for s, i in splits.items()}  # noqa: B023
            return {"kind": kind, "seed": seed, "set": name, "way": way, "cost": round(cost, 4), **p95}  # noqa: B023

        yield row("do nothing", metrics.margins(problem.original_logits, labels), 0)
        yield row("floor", metrics.margins(study.oracles(f, floor=True), labels), 1)
        yield row("perfect targets", oracle_targets(problem), 0)
        yield row("DM-direct", unlearn.get("dm_direct")(predicted).margins, 0)
        for cost in COSTS:
            found = unlearn.get("oracle_matching")(problem, cost=cost)
            yield row(f"perfect, cost {cost:g}", found.margins, found.cost)
        for cost in COSTS[2:3]:
            found = unlearn.get("dmm")(predicted, cost=cost)
            yield row(f"predicted, cost {cost:g}", found.margins, found.cost)


def arguments(about: str | None, out: str, kinds: bool = True) -> argparse.Namespace:
    """Read seeds, kinds of data if asked for, the runs' folder, and the name of the files that `save` writes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=int)
    if kinds:
        parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["fashion-mnist", "digits"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", default=out, help="name of the files under benchmarks/results")
    return parser.parse_args()


def save(name: str, table: pd.DataFrame, text: str) -> None:
    """Write a table, a row on each line, and what it says to people."""
    records = json.dumps(table.to_dict("records"), indent=0).replace(",\n", ", ").replace("}, {", "},\n{")
    (RESULTS / f"{name}.json").write_text(records.replace(": NaN", ": null") + "\n", encoding="utf-8")
    (RESULTS / f"{name}.txt").write_text(text, encoding="utf-8")


def update(
    asked: argparse.Namespace,
    rows: Callable[[str, int, Path], Iterator[dict[str, Any]]],
    text_of: Callable[[pd.DataFrame], str],
) -> None:
    """Put rows into a table of that name, after each kind and seed; those of other kinds and seeds stay in it."""
    path = RESULTS / f"{asked.out}.json"
    table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")) if path.exists() else [])
    for kind in asked.kinds:
        for seed in asked.seeds:
            known = table[(table["kind"] != kind) | (table["seed"] != seed)] if len(table) else table
            table = pd.concat([known, pd.DataFrame(rows(kind, seed, asked.runs))], ignore_index=True)
            save(asked.out, table, text_of(table))
    print(text_of(table))


def text_of(table: pd.DataFrame) -> str:
    """p95 KLoM over the floor's of each kind, set and way, over seeds."""
    wide = table.set_index(["kind", "set", "seed", "way"])[["forget", "retain", "validation"]]
    floor = wide.xs("floor", level="way")
    over = (wide / floor.reindex(wide.index.droplevel("way")).to_numpy()).groupby(["kind", "set", "way"], sort=False)
    shown = over.agg(lambda v: f"{np.exp(np.log(v).mean()):.2f} ({v.min():.2f} to {v.max():.2f})")
    about = "p95 KLoM over the floor's, geometric mean over seeds (lowest to highest)"
    return f"{about}\n\n{shown.drop('floor', level='way').to_string()}\n"


if __name__ == "__main__":
    update(arguments(__doc__, "matching"), rows, text_of)
