"""Requests one after the other: how far models drift from retraining, against one joint request for the same points.

Each request asks for 5 random points and starts from the models that the last one left; the datamodel is that of a
hundred subset models made before the first. After 1, 5, 20 and 100 requests: mean gap (in the oracles' standard
deviations) and share of points that a KS test tells from models retrained without all of them, N = 40 of each kind.

    python -m benchmarks.sequence 601 602 603        # seeds that nothing was chosen on; fashion-mnist and digits, mlp
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.matching import KINDS, arguments, update
from dmmlib import forget_sets, metrics, unlearn
from dmmlib.own.forget import Later
from dmmlib.study import Study

N, SIZE, AFTER = 40, 5, (1, 5, 20, 100)


def rows(kind: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row for each number of requests, way and split."""
    preset, changes = KINDS[kind]
    study = Study(
        preset, changes | {"seed": seed, "data.seed": seed, "ensembles.n_models": N, "tuning.n_models": N}, runs=runs
    )
    data, attributor = study.data, study.attributor()
    asked = np.random.default_rng(seed).permutation(data.n_train)[: SIZE * max(AFTER)]
    method, first = unlearn.get("dmm"), forget_sets.make("first", np.sort(asked[:SIZE]), data, preset="lab", kind="own")
    problem = replace(study.problem(first, "dmm"), oracle_logits=None)
    models, logits, cost = study.originals(), study.original_logits(), 0.0
    for k in range(1, max(AFTER) + 1):
        f = forget_sets.make(f"first_{k}", np.sort(asked[: SIZE * k]), data, preset="lab", kind="own")
        joint, gone = replace(problem, forget=f.indices), asked[: SIZE * (k - 1)]
        left = {"originals": models, "original_logits": logits, "attributor": Later(attributor, gone)}
        later = joint if k == 1 else replace(joint, **left)
        made = method(later)
        models, cost = made.models, cost + made.cost
        logits = models.logits(study.x).cpu().numpy()
        if k not in AFTER:
            continue
        oracles, floor = (metrics.margins(study.oracles(f, second), data.y) for second in (False, True))
        at_once, predicted = method(joint), unlearn.get("dm_direct")(joint)
        ways = {
            "retraining": (floor, 1.0),
            "do nothing": (metrics.margins(study.original_logits(), data.y), 0.0),
            "in sequence": (made.margins, cost),
            "at once": (at_once.margins, at_once.cost),
            "predicted": (predicted.margins, 0.0),
        }
        splits = f.splits(data.n_train, data.n_val)
        for way, (margins, spent) in ways.items():
            found = metrics.gap_summary(margins, oracles, splits)
            for split in splits:
                row = {"kind": kind, "seed": seed, "requests": k, "points": len(f), "way": way, "split": split}
                gap, share = (round(found[split][name].value, 4) for name in ("mean_gap", "ks_share"))
                yield row | {"gap": gap, "ks": share, "cost": round(spent, 4)}


def text_of(table: pd.DataFrame) -> str:
    """Mean over seeds, for people."""
    order = ["forget", "retain", "validation"]
    wide = table.groupby(["kind", "requests", "points", "way", "split"], sort=False)[["gap", "ks"]].mean().unstack()
    wide = wide.reindex(columns=[(s, split) for s in ("gap", "ks") for split in order])
    wide["cost"] = table.groupby(["kind", "requests", "points", "way"], sort=False)["cost"].mean()
    seeds = sorted(map(int, table["seed"].unique()))
    head = f"Seeds {seeds}, N = {N} models of each kind, means over seeds; cost in retrainings."
    return f"{head}\n\n{wide.round(3).to_string()}\n"


if __name__ == "__main__":
    update(arguments(__doc__, "sequence"), rows, text_of)
