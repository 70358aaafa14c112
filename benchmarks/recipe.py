"""What a recipe of training does to accuracy, to attribution, and to how near DM-direct comes to retraining.

Development data, seeds and sets as in `benchmarks.matching` (of the convnet 500 training points), N = 50 models of each
kind. A recipe is a number of epochs and a rate; the presets' is the first. Of each recipe, and of datamodels from M
subset models:

- accuracy: on validation points, mean over originals, in percent;
- lds: of predicted margins, on 60 subsets of half of the points, against one model of each; `of means`: against the
  mean of three, whose chance is a third; `ceiling`: what a prediction of subsets' true means would have against one,
  the root of the correlation between two models of a subset (Spearman, Am. J. Psychology 1904), mean over points;
- own features: the lds where the linearised models are of networks trained on the very subset that is asked about, of
  the presets' recipe (its models know what is to be predicted; the correction by the other subset models stays);
- memory, gap: mean distance of forgotten points' mean margins from those of retrained models, in sd, of originals and
  of DM-direct, over three sets; klom: DM-direct's p95 KLoM over the floor's, geometric mean over sets.

What training costs goes with epochs, whatever the rate.

    python -m benchmarks.recipe 506 507 508                    # seeds; fashion-mnist and digits, mlp
    python -m benchmarks.recipe 506 --kinds convnet            # slower
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.matching import KINDS, arguments, development_sets, update
from benchmarks.prediction import mean, truth
from dmmlib import attribution, metrics
from dmmlib.attributors import bayesian
from dmmlib.attributors.linearised import linearised_response
from dmmlib.datamodels import lds
from dmmlib.study import Study
from dmmlib.trainer import ModelSet

N, SUBSETS, COPIES, SIZES = 50, 60, 3, (25, 50, 100)
SETS = ("random", "half_class", "nearest")
RECIPES = {  # epochs and rates, of a data set's own rate
    "fashion-mnist": ((20, 1.0), (20, 0.25), (10, 1.0), (10, 2.0), (5, 2.0)),
    "digits": ((20, 1.0), (20, 0.25)),
    "convnet": ((20, 1.0), (20, 0.25), (10, 1.0), (10, 2.0)),
}
SMALL = {"convnet": {"data.n_train": 500}}


def rows(kind: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row for each recipe and number of subset models."""
    for epochs, times in RECIPES[kind]:
        preset, changes = KINDS[kind]
        own = {"seed": seed, "data.seed": seed, "ensembles.n_models": N, "training.epochs": epochs}
        rate = Study(preset, changes, runs=runs).preset.training.lr * times
        study = Study(preset, changes | SMALL.get(kind, {}) | own | {"training.lr": rate}, runs=runs)
        usual = {"kind": kind, "seed": seed, "epochs": epochs, "rate": rate}
        yield from (usual | row for row in measured(study, kind, (epochs, times) == RECIPES[kind][0]))


def measured(study: Study, kind: str, knowing: bool) -> Iterator[dict[str, Any]]:
    """Of each number of subset models; with `knowing`, by own features, too."""
    data, sets = study.data, {k: f for k, f in development_sets(study, kind).items() if k in SETS}
    logits = study.original_logits()
    right = logits[:, data.n_train :].argmax(2) == data.y_val
    masks = study.random_masks("recipe", SUBSETS, 0.5)
    copies = ModelSet("recipe", np.concatenate([np.repeat(masks, COPIES, 0), masks[:1]]), knowing)
    actual = metrics.margins(study.outputs(copies)[:-1], data.y).reshape(SUBSETS, COPIES, -1)
    pairs = [lds(actual[:, i], actual[:, j]) for i in range(COPIES) for j in range(i)]
    ceiling = np.sqrt(np.mean(pairs, 0).clip(0)).mean()
    known = {name: truth(study, f) for name, f in sets.items()}
    for m in SIZES:
        context = study.context_of(ModelSet("attribution", study.context().masks, True), 0, m)
        fitted = attribution.fit("bayesian", context)
        predicted = metrics.right_logits(fitted.predict(masks), data.y)
        found: dict[str, list[float]] = {}
        if knowing and m == max(SIZES):
            response = linearised_response(context)
            there = predicted - bayesian.fit(context, response).scale * response.change(masks)[0]
            for j, mask in enumerate(masks):
                its = study.context_of(copies, j * COPIES, (j + 1) * COPIES + 1)  # and one of another subset
                there[j] += linearised_response(its, n_models=COPIES).change(mask[None])[0][0]
            found["own features"] = [float(lds(there, actual[:, c]).mean()) for c in range(COPIES)]
        for name, f in sets.items():
            oracles, floor, true, sd = known[name]
            change, at = metrics.right_logits(fitted.effects([f.indices]), data.y)[0], f.indices
            found.setdefault("memory", []).append(float(np.abs(true / sd)[at].mean()))
            found.setdefault("gap", []).append(float(np.abs((change - true) / sd)[at].mean()))
            klom = metrics.klom(metrics.margins(logits, data.y) + change, oracles), metrics.klom(floor, oracles)
            for split, i in f.splits(data.n_train, data.n_val).items():
                ours, least = (float(np.percentile(z[i], 95)) for z in klom)
                found.setdefault(f"klom {split}", []).append(ours / least)
        yield {
            "models": m,
            "accuracy": round(100 * float(right.mean()), 2),
            "lds": round(float(np.mean([lds(predicted, actual[:, c]).mean() for c in range(COPIES)])), 4),
            "of means": round(float(lds(predicted, actual.mean(1)).mean()), 4),
            "ceiling": round(float(ceiling), 4),
            "own features": np.nan,
            **{k: round(mean(pd.Series(v)) if "klom" in k else float(np.mean(v)), 4) for k, v in found.items()},
        }


def text_of(table: pd.DataFrame) -> str:
    """Means over seeds, of ratios geometric."""
    keys, numbers = ["kind", "epochs", "rate", "models"], table.columns[5:]
    how = {"seed": "nunique"} | {k: mean if "klom" in k else "mean" for k in numbers}
    shown = table.groupby(keys, sort=False).agg(how).rename(columns={"seed": "seeds"})
    seeds = {kind: sorted(map(int, part["seed"].unique())) for kind, part in table.groupby("kind", sort=False)}
    return f"Seeds {seeds}. Means over seeds; gaps in sd, klom over the floor's.\n\n{shown.round(3).to_string()}\n"


if __name__ == "__main__":
    update(arguments(__doc__, "recipe"), rows, text_of)
