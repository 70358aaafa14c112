"""Does a budget of models say more as new training sets, or as several seeds of fewer ones?

Development data and seeds as in `benchmarks.matching`. For each seed and each number of seeds per training set, of 96
models in all:

- fit: LDS on training and validation points of the Bayesian attributor that is fitted on them;
- judge: the same LDS measured with 96 held-out models, their margins averaged over the seeds of a set; the half-width
  of its 95 % interval; and z, by how many standard errors it tells the Bayesian attributor from its own prior
  (`kernel`), resampling training sets in pairs.

    python -m benchmarks.repeated 501 502
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.matching import KINDS, N, arguments, save
from dmmlib import attribution, metrics
from dmmlib.datamodels import lds, lds_estimate
from dmmlib.study import Study
from dmmlib.trainer import ModelSet

BUDGET, SEEDS, N_BOOTSTRAP = 96, (1, 2, 4, 8), 100


def rows(kind: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row for each split, use and number of seeds per training set."""
    preset, changes = KINDS[kind]
    study = Study(preset, changes | {"seed": seed, "data.seed": seed, "ensembles.n_models": N}, runs=runs)
    n, section = study.data.n_train, study.preset.attribution
    splits = {"train": slice(n), "validation": slice(n, None)}
    masks = study.random_masks("repeated masks", BUDGET, section.fraction)
    new = ModelSet("repeated 1", masks, keep_models=True)
    attributors = {name: attribution.fit(name, study.context_of(new)) for name in ("bayesian", "kernel")}
    judges = study.random_masks("repeated judges", BUDGET, 0.5)
    for k in SEEDS:
        again = ModelSet(f"repeated {k}", np.repeat(masks[: BUDGET // k], k, axis=0), keep_models=True)
        fitted = attribution.fit("bayesian", study.context_of(again)) if k > 1 else attributors["bayesian"]
        both = study.lds(fitted)
        held = np.repeat(judges[: BUDGET // k], k, axis=0)
        actual = metrics.right_logits(study.outputs(ModelSet(f"repeated judges {k}", held))[:], study.data.y)
        actual = actual.reshape(BUDGET // k, k, -1).mean(1)
        said = {a: metrics.right_logits(m.predict(held[::k]), study.data.y) for a, m in attributors.items()}
        rng = np.random.default_rng(0)
        draws = [rng.integers(0, len(actual), len(actual)) for _ in range(N_BOOTSTRAP)]
        for split, points in splits.items():
            setting = {"kind": kind, "seed": seed, "split": split, "seeds": k}
            fit = lds_estimate(*both[:, :, points])
            yield setting | {"use": "fit", "lds": fit.value, "half": (fit.high - fit.low) / 2}
            judged = lds_estimate(said["bayesian"][:, points], actual[:, points])
            lead = [
                np.subtract(*(lds(s[d][:, points], actual[d][:, points]).mean() for s in said.values())) for d in draws
            ]
            whole = np.subtract(*(lds(s[:, points], actual[:, points]).mean() for s in said.values()))
            half = (judged.high - judged.low) / 2
            yield setting | {"use": "judge", "lds": judged.value, "half": half, "z": whole / np.std(lead, ddof=1)}


def text_of(table: pd.DataFrame) -> str:
    """Means over seeds, a line for each number of seeds per training set."""
    shown = table.groupby(["use", "kind", "split", "seeds"], sort=False)[["lds", "half", "z"]].mean().round(3)
    best = table[table["use"] == "fit"].pivot_table(index=["kind", "seed", "split"], columns="seeds", values="lds")
    ahead = (best.idxmax(axis=1) == 1).sum()
    said = f"Fitted on new sets alone is best in {ahead} of {len(best)} cases."
    return f"{shown.sort_index(level=[0, 1, 2], sort_remaining=False).to_string()}\n\n{said}\n"


def main() -> None:
    """Measure all kinds and seeds, and write the table and its text."""
    asked = arguments(__doc__, "repeated")
    table = pd.DataFrame([r for kind in asked.kinds for seed in asked.seeds for r in rows(kind, seed, asked.runs)])
    save(asked.out, table.round(4), text_of(table))
    print(text_of(table))


if __name__ == "__main__":
    main()
