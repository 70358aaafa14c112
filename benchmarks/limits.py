"""What keeps DM-direct from the floor: ways of knowing more than it can, and what they leave.

Development data and sets as in `benchmarks.prediction`, N = 60 models of each kind. Beside DM-direct as it is,

- best size: its predictions for each set and split, scaled to fit the truth best;
- true features: the linearised models are of networks that were retrained *without the forget set*, whose answers are
  what is to be predicted, and are taken as they are, without a scale. The correction by subset models stays;
- both: these, scaled to fit the truth best.

    python -m benchmarks.limits 501 502                        # seeds; digits and fashion-mnist, mlp
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.matching import arguments, study_of, update
from benchmarks.prediction import compared, factor, mean, truth, with_groups
from dmmlib import metrics
from dmmlib.attribution import Context
from dmmlib.attributors import bayesian
from dmmlib.attributors.linearised import linearised_response
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study
from dmmlib.trainer import ModelSet

K = 20  # linearised models


def rows(kind: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row for each set, way and split."""
    study = study_of(kind, seed, runs)
    sets, context = with_groups(study, kind), study.context()
    response = linearised_response(context, n_models=K)
    fitted = bayesian.fit(context, response)
    found: dict[str, list[np.ndarray]] = {way: [] for way in ("DM-direct", "best size", "true features", "both")}
    for forget_set in sets.values():
        kept = np.ones((1, study.data.n_train), bool)
        kept[0, forget_set.indices] = False
        direct = metrics.right_logits(fitted.effects([forget_set.indices]), study.data.y)[0]
        correction = direct - fitted.scale * response.change(kept)[0][0]
        there = correction + linearised_response(without(study, forget_set), n_models=K).change(kept)[0][0]
        _, _, true, sd = truth(study, forget_set)
        splits = forget_set.splits(study.data.n_train, study.data.n_val)
        made = (direct, scaled(direct, true, sd, splits), there, scaled(there, true, sd, splits))
        for changes, change in zip(found.values(), made, strict=True):
            changes.append(change)
    for row in compared(study, sets, {way: np.stack(changes) for way, changes in found.items()}):
        yield {"kind": kind, "set": row["set"], "seed": seed, **row}


def without(study: Study, forget_set: ForgetSet) -> Context:
    """K models that were trained without a forget set and one further point, another one for each."""
    rest = np.setdiff1d(np.arange(study.data.n_train), forget_set.indices)
    masks = np.ones((K, study.data.n_train), bool)
    masks[:, forget_set.indices] = False
    masks[np.arange(K), rest[np.linspace(0, len(rest) - 1, K).astype(int)]] = False
    return study.context_of(ModelSet("limits", masks, keep_models=True))


def scaled(change: np.ndarray, true: np.ndarray, sd: np.ndarray, splits: Mapping[str, np.ndarray]) -> np.ndarray:
    """A predicted change of margins (n_points,), each split's by the factor that fits the true one best."""
    result = change.copy()
    for points in splits.values():
        result[points] *= factor(change[points] / sd[points], true[points] / sd[points])
    return result


def text_of(table: pd.DataFrame) -> str:
    """p95 KLoM over the floor's, geometric mean over seeds, for each set and for all."""
    seeds = {kind: sorted(map(int, part["seed"].unique())) for kind, part in table.groupby("kind", sort=False)}
    each = table[table["split"] == "forget"].pivot_table(
        index=["kind", "set"], columns="way", values="klom", aggfunc=mean, sort=False
    )
    every = table.groupby(["kind", "split", "way"], sort=False).agg(
        klom=("klom", mean), worst=("klom", "max"), gap=("gap", "mean"), slope=("slope", "mean")
    )
    return (
        f"Seeds {seeds}. p95 KLoM over the floor's, geometric mean over seeds.\n\nOn forgotten points:\n\n"
        f"{each.round(2).to_string()}\n\nOver sets and seeds; gap in sd, slope of the true on the predicted change:\n\n"
        f"{every.round(2).to_string()}\n"
    )


if __name__ == "__main__":
    update(arguments(__doc__, "limits"), rows, text_of)
