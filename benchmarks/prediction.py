"""How near DM-direct comes to retraining, by attributor and kind of set, and whether size or shape is what it misses.

Development data, seeds and sets as in `benchmarks.matching`, with the highest on the first two principal components.
For each set, attributor and split, N = 60 models of each kind:

- klom: p95 KLoM over the floor's;
- gap: root mean square over points of predicted minus true change of mean margins, in standard deviations of oracles
  (with N of each and twice as many oracles, .16 is noise);
- shape: the same with the prediction scaled as fits that set best, so that gap^2 - shape^2 is what its size adds;
- slope: that scale, r: the cosine between predicted and true change.

    python -m benchmarks.prediction 501 502 503 --out prediction          # seeds; digits and fashion-mnist, mlp
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.matching import arguments, development_sets, study_of, update
from dmmlib import attribution, forget_sets, metrics
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study

ATTRIBUTORS = {"linear margins": {"n_logits": 1}, "linear logits": {}}


def with_groups(study: Study, kind: str) -> dict[str, ForgetSet]:
    """Forget sets that no preset has, groups among them."""
    sets = development_sets(study, kind)
    for i in range(2):
        highest = forget_sets.highest(study.loadings()[:, i], 50)
        sets[f"pc{i + 1}"] = forget_sets.make(f"pc{i + 1}", highest, study.data, preset="lab", kind="own")
    return sets


def rows(kind: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row for each set, way and split."""
    study = study_of(kind, seed, runs)
    data, sets = study.data, with_groups(study, kind)
    changes_of: dict[str, np.ndarray] = {"do nothing": np.zeros((len(sets), data.n_train + data.n_val))}
    seconds = {"do nothing": 0.0}
    for name, options in ATTRIBUTORS.items():
        start = process_time()
        effects = attribution.fit("bayesian", study.context(), **options).effects([f.indices for f in sets.values()])
        changes_of[name], seconds[name] = metrics.right_logits(effects, data.y), process_time() - start
    for row in compared(study, sets, changes_of):
        yield {"kind": kind, "set": row["set"], "seed": seed, **row, "seconds": round(seconds[row["way"]], 3)}


def truth(study: Study, forget_set: ForgetSet) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Margins (N, n_points) of oracles and as many more, the true change of mean margins (n_points,), and their sd."""
    oracles, floor = (metrics.margins(study.oracles(forget_set, second), study.data.y) for second in (False, True))
    originals = metrics.margins(study.original_logits(), study.data.y)
    change = (oracles.mean(0) + floor.mean(0)) / 2 - originals.mean(0)
    return oracles, floor, change, (oracles.std(0) + floor.std(0)) / 2


def factor(predicted: np.ndarray, true: np.ndarray) -> float:
    """By what a prediction (n,) is to be scaled to fit the truth best."""
    return float(predicted @ true) / max(float(predicted @ predicted), 1e-12)


def compared(
    study: Study, sets: Mapping[str, ForgetSet], changes_of: Mapping[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """One row for each set, way and split, of changes of margins (n_sets, n_points) by way."""
    data, originals = study.data, metrics.margins(study.original_logits(), study.data.y)
    for j, (name, forget_set) in enumerate(sets.items()):
        oracles, floor, true, sd = truth(study, forget_set)
        of_floor = metrics.klom(floor, oracles)
        for way, change in changes_of.items():
            klom = metrics.klom(originals + change[j], oracles)
            for split, points in forget_set.splits(data.n_train, data.n_val).items():
                p, t = (z[points] / sd[points] for z in (change[j], true))
                slope = factor(p, t)
                found = {
                    "klom": np.percentile(klom[points], 95) / np.percentile(of_floor[points], 95),
                    "gap": np.sqrt(((p - t) ** 2).mean()),
                    "shape": np.sqrt(((slope * p - t) ** 2).mean()),
                    "slope": slope,
                    "r": float(p @ t) / max(float(np.sqrt((p @ p) * (t @ t))), 1e-12),
                }
                yield {"set": name, "way": way, "split": split, **{k: round(float(v), 3) for k, v in found.items()}}


def mean(ratios: pd.Series) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(ratios).mean()))


def text_of(table: pd.DataFrame) -> str:
    """The tables for people: each set over seeds, and all of them."""
    shown = table[table["way"] != "do nothing"]
    numbers = shown.groupby(["kind", "set", "split", "way"], sort=False).agg(
        klom=("klom", mean), worst=("klom", "max"), gap=("gap", "mean"), shape=("shape", "mean"),
        slope=("slope", "mean"), r=("r", "mean"),
    )  # fmt: skip
    wide = numbers.unstack("way").swaplevel(axis=1)[list(ATTRIBUTORS)].round(2)
    over = shown.groupby(["kind", "split", "way"], sort=False).agg(
        klom=("klom", mean), median=("klom", "median"), worst=("klom", "max"), gap=("gap", "mean"),
        shape=("shape", "mean"), lowest_slope=("slope", "min"), highest_slope=("slope", "max"),
    )  # fmt: skip
    seconds = shown.groupby(["kind", "way"], sort=False)["seconds"].mean().round(0)
    seeds = {kind: sorted(map(int, part["seed"].unique())) for kind, part in table.groupby("kind", sort=False)}
    return "\n\n".join(
        [
            f"Seeds {seeds}. klom: p95 KLoM over the floor's, geometric mean over seeds; worst: the highest.",
            wide.to_string(),
            "All sets and seeds:",
            over.round(2).to_string(),
            "Seconds on one core to fit, and to predict all sets:",
            seconds.to_string(),
        ]
    ) + "\n"  # fmt: skip


if __name__ == "__main__":
    update(arguments(__doc__, "prediction"), rows, text_of)
