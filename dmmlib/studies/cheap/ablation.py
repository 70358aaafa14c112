"""What won and why: the Bayesian datamodel taken apart, a part at a time, and compared draw by draw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from dmmlib.attributors import bayesian
from dmmlib.attributors.linearised import LinearisedResponse
from dmmlib.attributors.margins import Linear, calibrated
from dmmlib.datamodels import Attributor, lds
from dmmlib.metrics import LEVEL
from dmmlib.studies.cheap.evaluator import Evaluator, held_out_margins, label_logits
from dmmlib.studies.cheap.experiments import Cache, averaged, draws, pool
from dmmlib.study import Study


class Unexpected(Linear):
    """Knows how large effects are, for the covariance of a posterior, and expects none."""

    def change(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        none = np.zeros(self.weights.shape[1], np.float32)
        return np.zeros((len(masks), 1), np.float32) + none, none


def variants(study: Study, cache: Cache, draw: int) -> Iterator[tuple[str, str, Attributor]]:
    """Fit the default to a draw of subset models, and each change of it: what is changed, how, and the attributor."""
    cheap, section = study.preset.studies["cheap"], study.preset.attribution
    m, start, k = section.n_subsets, draws(study.preset, section.n_subsets)[draw], cheap.n_kernel

    context = pool(study, start, start + m)
    response = cache(f"draw {start}", context, k)
    yield "default", f"{m} subsets of {section.fraction:.0%}, {k} linearised models", bayesian.fit(context, response)
    for n in cheap.linearised:
        yield "linearised models", f"{n} of them", bayesian.fit(context, cache(f"draw {start}", context, n))
    for name, first in (("all retrained from nothing", 0), ("all from their own margins", 1)):
        half = LinearisedResponse(response.models[first::2])
        yield "linearised models", name, bayesian.fit(context, half)
    margins = cache(f"draw {start}", context, k, n_logits=1)
    yield "linearised models", "margins linear, not logits", bayesian.fit(context, margins)
    yield "linearised models", "effects of points add up", bayesian.fit(context, response.weights)
    yield "parts", "linearised models alone", calibrated(context, response)
    yield "parts", "subset models alone", bayesian.fit(context, Unexpected(response.weights))


def ablate(study: Study, cache: Cache) -> pd.DataFrame:
    """Measure every variant on the tuning sets, with independent draws of the preset's number of subset models.

    Returns:
        Columns group, name, draw, split ("forget", "retain", "validation": p95 KLoM, geometric mean over the tuning
        sets; "lds": on the held-out subsets that may choose), value.
    """
    evaluator, rows = Evaluator.tuning(study), list[tuple[Any, ...]]()
    masks, actual = held_out_margins(study, chosen=True)
    for draw in range(len(draws(study.preset, study.preset.attribution.n_subsets))):
        for group, name, model in variants(study, cache, draw):
            found = pd.DataFrame(evaluator.klom(evaluator.gauged(model)))
            scores = np.exp(np.log(found["value"]).groupby(found["split"]).mean()).to_dict()
            scores["lds"] = float(lds(label_logits(study, model.predict(masks)), actual).mean())
            rows += [(group, name, draw, split, value) for split, value in scores.items()]
    return pd.DataFrame(rows, columns=["group", "name", "draw", "split", "value"])


def against_default(table: pd.DataFrame) -> pd.DataFrame:
    """Divide each variant's value by the default's (LDS: subtract), draw by draw: "ratio", `averaged` over draws.

    Intervals hold together: each is at the level .05 over the number of comparisons (Bonferroni); "clear" is whether
    one leaves no change out.
    """
    default = table.loc[table["group"] == "default", ["draw", "split", "value"]]
    paired = table.merge(default, on=["draw", "split"], suffixes=("", "_of_default"))
    value, of = paired["value"], paired["value_of_default"]
    paired["ratio"] = (value / of).where(paired["split"] != "lds", value - of)
    compared = paired.loc[paired["group"] != "default", ["group", "name", "split"]].drop_duplicates()
    found = averaged(paired, ["group", "name", "split"], "ratio", LEVEL / max(1, len(compared)))
    same = np.where(found["split"] == "lds", 0, 1)
    return found.assign(clear=(found["low"] > same) | (found["high"] < same))
