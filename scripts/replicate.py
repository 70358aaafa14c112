"""The main table and cheap attribution on other data, models and seeds; notebooks 04 and 07 read what this writes.

    python scripts/replicate.py [SEED ...] [--pair PAIR]

Appends to figures/laptop/04_replication.csv and 07_replication.csv what is not in them yet.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dmmlib import presets
from dmmlib.analysis.tables import klom_p95
from dmmlib.files import home, replacing
from dmmlib.studies.cheap.experiments import PAIRS, replicate
from dmmlib.study import Study

TABLES: dict[str, Callable[[Study], pd.DataFrame]] = {
    "07_replication.csv": replicate,
    "04_replication.csv": lambda study: klom_p95(study.results()),
}


LAPTOP = home() / "figures" / "laptop"


def main(seeds: list[int], pairs: list[str], folder: Path = LAPTOP) -> None:
    """Replicate every pair with every seed, and every method, that a table lacks."""
    for seed, pair in itertools.product(seeds, pairs):
        methods = [*presets.load("replicate").unlearning.methods, *["ct"] * ("convnet" in pair)]  # it turns kernels
        studies: dict[tuple[str, ...], Study] = {}  # tables that lack the same methods share one
        for name, measure in TABLES.items():
            path = folder / name
            done = pd.read_csv(path) if path.exists() else pd.DataFrame({"pair": [], "seed": []})
            known = done[(done["pair"] == pair) & (done["seed"] == seed)]
            lacking = tuple(m for m in methods if known.empty or m not in set(known.get("method", methods)))
            if not lacking:
                continue
            if lacking not in studies:
                changed = {**PAIRS[pair], "seed": seed, "data.seed": seed, "unlearning.methods": lacking}
                studies[lacking] = Study("replicate", changed)
            found = measure(studies[lacking]).assign(pair=pair, seed=seed)
            if not known.empty:
                found = found[found["method"].isin(lacking)]
            done = pd.concat([done, found], ignore_index=True).astype({"seed": int})
            with replacing(path) as temporary:
                done.to_csv(temporary, index=False, float_format="%.6g")
            sys.stdout.write(f"{name}, {pair}, seed {seed}: {', '.join(lacking)}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pair", choices=PAIRS, action="append")
    given = parser.parse_args()
    main(given.seeds, given.pair or list(PAIRS))
