"""Cheap attribution on other data, models and seeds; notebook 07 reads what this writes.

    python scripts/replicate.py [SEED ...] [--pair PAIR]

Appends to figures/laptop/07_replication.csv what is not in it yet.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from dmmlib.attribution.experiments import PAIRS, replicate
from dmmlib.files import replacing
from dmmlib.study import ROOT, Study

TABLE = ROOT / "figures" / "laptop" / "07_replication.csv"


def main(seeds: list[int], pairs: list[str], table: Path = TABLE) -> int:
    """Replicate every pair with every seed that the table lacks."""
    done = pd.read_csv(table) if table.exists() else pd.DataFrame({"pair": [], "seed": []})
    for seed in seeds:
        for pair in pairs:
            if ((done["pair"] == pair) & (done["seed"] == seed)).any():
                continue
            study = Study("replicate", {**PAIRS[pair], "seed": seed, "data.seed": seed})
            found = replicate(study).assign(pair=pair, seed=seed)
            done = pd.concat([done, found], ignore_index=True).astype({"seed": int})
            with replacing(table) as temporary:
                done.to_csv(temporary, index=False, float_format="%.6g")
            sys.stdout.write(f"{pair}, seed {seed}: done\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pair", choices=PAIRS, action="append")
    given = parser.parse_args()
    sys.exit(main(given.seeds, given.pair or list(PAIRS)))
