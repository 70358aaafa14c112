"""How far may a step of matching ask a margin to move? On development data, given true targets that lie far away.

    python benchmarks/far_targets.py [--runs FOLDER]

The preset `requests` with draws and seeds that nothing reports (7 and 8; 9 with a convnet), 24 models of each kind:
mean gaps of oracle matching from retraining, in the oracles' sd, by the limit `farthest`; results/far_targets.csv.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from dmmlib import metrics, unlearn
from dmmlib.progress import silent
from dmmlib.study import Study

N, SETS, LIMITS = 24, ("trigger", "mislabelled_60", "random_60"), (4.0, 8.0, 16.0, 100.0)
CONVNET = {"model": {"name": "convnet", "options": {"width": 4}}, "training.lr": 0.05, "training.epochs": 10}
CASES = [(7, "mlp", {}), (8, "mlp", {}), (9, "convnet", CONVNET)]


def measured(seed: int, model: str, overrides: dict[str, object], runs: str) -> pd.DataFrame:
    """One row for each set, limit ("retrain" for the floor) and split: mean gap, and how far F's margins have to go."""
    sizes = {"ensembles.n_models": N, "tuning.n_models": N, "ensembles.compile": False}
    study = Study(
        "requests",
        {"seed": seed, "data.seed": seed, "data.options.draw": seed} | sizes | overrides,
        runs=runs,
        progress=silent,
    )
    y, rows = study.data.y, []
    for name in SETS:
        f = study.forget_sets()[name]
        oracles, originals = (metrics.margins(z, y) for z in (study.oracles(f), study.original_logits()))
        mean, sd = oracles.mean(0), oracles.std(0, ddof=1)
        asked = np.abs(mean - originals.mean(0))[f.indices].max()
        ways = {"retrain": metrics.margins(study.oracles(f, floor=True), y)}
        for limit in LIMITS:
            ways[f"{limit:g}"] = unlearn.get("oracle_matching")(
                study.problem(f, "oracle_matching"), farthest=limit
            ).margins
        for way, margins in ways.items():
            gap = np.abs((margins.mean(0) - mean) / sd)
            splits = f.splits(study.data.n_train, study.data.n_val)
            rows += [(model, seed, name, asked, way, split, gap[points].mean()) for split, points in splits.items()]
        print(seed, name, flush=True)
    return pd.DataFrame(rows, columns=["model", "seed", "forget_set", "farthest target", "limit", "split", "mean gap"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", help="where models are kept; by default nowhere")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = pd.concat([measured(*case, given.runs or folder) for case in CASES])
    table.to_csv(Path(__file__).parent / "results" / "far_targets.csv", index=False, float_format="%.3g")
    print(table.pivot_table("mean gap", ["model", "seed", "forget_set", "limit"], "split", sort=False).to_string())
