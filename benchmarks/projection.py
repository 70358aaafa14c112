"""What sketching gradients costs in accuracy: attributors on sketches of several sizes beside one on exact gradients.

    python -m benchmarks.projection 601 602 603        # seeds that no preset has

ResNet-9 of width 8 (35,000 weights, few enough for exact gradients) on 600 Fashion-MNIST images; `linearised` on 6 of
40 subset models. Errors are of the kernel, relative to its norm; correlations, of the effects of ten forget sets of 30
points on all points, are with those of the exact kernel; the LDS is on 20 subset models held out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import attribution, datamodels
from dmmlib.attributors import kernel
from dmmlib.files import write_bytes
from dmmlib.study import Study

RESULTS = Path(__file__).parent / "results"
SIZES = (512, 2048, 8192)
N_MODELS = 6
PRESET = {
    "name": "projection",
    "data": {"name": "fashion-mnist", "n_train": 600, "n_val": 150},
    "model": {"name": "resnet9", "options": {"width": 8}},
    "training": {"epochs": 8, "batch_size": 50, "lr": 0.2},
    "ensembles": {"n_models": 4, "chunk": 1, "compile": False},
    "datamodels": {"n_subsets": 10, "n_held_out": 40, "sizes": [10]},
    "attribution": {"name": "linearised", "n_subsets": 40},
    "forget_sets": [{"name": "none", "kind": "random", "size": 1}],
    "tuning": {"forget_sets": [{"name": "tune", "kind": "random", "size": 1}], "n_models": 4},
}


def rows(seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row for the exact kernel and each sketch."""
    study = Study(PRESET, {"seed": seed, "data.seed": seed}, runs=runs)
    context, rng = study.context(), np.random.default_rng(seed)
    sets = [rng.permutation(context.n_train)[:30] for _ in range(10)]
    sets[5:] = [np.flatnonzero(study.data.y_train == label)[:30] for label in range(5)]
    kernel.FEATURES = 10**9  # explicit gradients stay as they are
    exact, truth = kernel.gram(context.subset_models(), 0, context.x, context.y), None
    for project in (None, *SIZES):
        found = kernel.gram(context.subset_models(), 0, context.x, context.y, seed, project)
        fitted = attribution.fit("linearised", context, n_models=N_MODELS, project=project)
        effects = np.stack([fitted.effect(forget).sum(-1) for forget in sets])
        truth = effects if truth is None else truth
        yield {
            "seed": seed,
            "features": project,
            "kernel error": float((found - exact).norm() / exact.norm()),
            "correlation of effects": float(np.corrcoef(effects.ravel(), truth.ravel())[0, 1]),
            "lds": float(np.mean(datamodels.lds(*study.lds(fitted)))),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    found = list[dict[str, Any]]()
    for row in (row for seed in asked.seeds for row in rows(seed, asked.runs)):
        found.append(row)
        table = pd.DataFrame(found)
        table["lds ratio"] = table["lds"] / table.groupby("seed")["lds"].transform("first")
        lines = ",\n".join(json.dumps(row) for row in table.round(5).to_dict("records"))
        write_bytes(RESULTS / "projection.json", f"[\n{lines}\n]\n".replace("NaN", "null").encode())
    print(table.to_string(index=False, float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
