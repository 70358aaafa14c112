"""What was tried to predict better, and left: each lead beside DM-direct as it is, on development data.

Data and sets as in `benchmarks.prediction`, N = 60 models of each kind, seeds that neither it nor `matching` has:

- mixed shares: the hundred subset models have a half, three quarters and nine tenths of the points, a third of each;
- ridge of 1,000: ridge on the margins of a thousand models of halves, and the mean of that and DM-direct;
- pairs: the datamodel's random effects hold pairs of points, too, w ~ N(0, rho_2 sigma^2 C_i C_j) for each pair, rho_2
  by the evidence as rho is (0 among the choices);
- its spread: margins of each point are spread as those of the subset models that lack it are, relative to those that
  have it, the ratio of standard deviations shrunk by half towards 1; with DM-direct's means and with true ones.

p95 KLoM over the floor's, and the mean gap of means in the oracles' sd.

    python -m benchmarks.leads 506 507                         # seeds; digits and fashion-mnist, mlp
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.matching import arguments, study_of, update
from benchmarks.prediction import mean, truth, with_groups
from dmmlib import metrics
from dmmlib.attributors import bayesian
from dmmlib.attributors.bayesian import RHOS, BayesianDatamodel
from dmmlib.attributors.linearised import LinearisedResponse, linearised_response
from dmmlib.datamodels import RidgeDatamodel, choose_lambda
from dmmlib.study import Study
from dmmlib.trainer import ModelSet

MANY, HELD_OUT, SHRUNK = 1000, 60, 0.5
LAMBDAS = [0.05, 0.1, 0.2, 0.5, 1.0]


def rows(kind: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row for each set, way and split."""
    study = study_of(kind, seed, runs)
    y, sets, context = study.data.y, with_groups(study, kind), study.context()
    n, forgotten = study.data.n_train, [f.indices for f in sets.values()]
    response = linearised_response(context)
    fitted = bayesian.fit(context, response)
    mixed = [study.random_masks(f"mixed {share}", k, share) for share, k in ((0.5, 33), (0.75, 34), (0.9, 33))]
    of_mixed = study.context_of(ModelSet("mixed", np.concatenate(mixed), keep_models=True))
    kept = np.ones((len(sets), n), bool)
    for row, indices in zip(kept, forgotten, strict=True):
        row[indices] = False
    direct = metrics.right_logits(fitted.effects(forgotten), y)
    by_ridge = ridge(study).effects(forgotten)[..., 0]
    changes = {
        "do nothing": np.zeros_like(direct),
        "DM-direct": direct,
        "mixed shares": metrics.right_logits(
            bayesian.fit(of_mixed, linearised_response(of_mixed)).effects(forgotten), y
        ),
        "ridge of 1,000": by_ridge,
        "mean with ridge": (direct + by_ridge) / 2,
        "pairs": pairs(fitted, response, kept, y),
    }
    originals, spread = metrics.margins(study.original_logits(), y), spreads(context.masks, context.margins, n)
    for j, (name, f) in enumerate(sets.items()):
        oracles, floor, true, sd = truth(study, f)
        of_floor, own = metrics.klom(floor, oracles), np.ones(len(y), np.float32)
        own[f.indices] = spread[f.indices]
        wider = originals.mean(0) + (originals - originals.mean(0)) * own
        ways = {way: originals + change[j] for way, change in changes.items()}
        ways |= {"DM-direct, its spread": wider + direct[j], "true means": originals + true}
        ways |= {"true means, its spread": wider + true}
        for way, margins in ways.items():
            klom, gap = metrics.klom(margins, oracles), np.abs(margins.mean(0) - originals.mean(0) - true) / sd
            for split, points in f.splits(n, study.data.n_val).items():
                ratio = np.percentile(klom[points], 95) / np.percentile(of_floor[points], 95)
                found = {"klom": round(float(ratio), 3), "gap": round(float(gap[points].mean()), 3)}
                yield {"kind": kind, "seed": seed, "set": name, "way": way, "split": split, **found}


def ridge(study: Study) -> RidgeDatamodel:
    """Ridge on the margins of `MANY` models of halves, its penalty by the LDS on further ones."""
    masks = study.random_masks("many", MANY + HELD_OUT, 0.5)
    outputs = study.outputs(ModelSet("many", masks))[:]
    margins = metrics.margins(outputs, study.data.y)[:, :, None]
    held_out = masks[MANY:], margins[MANY:]
    zeros = np.zeros(margins.shape[1], int)
    lam, _ = choose_lambda(masks[:MANY], margins[:MANY], *held_out, zeros, LAMBDAS, study.device)
    return RidgeDatamodel.fit(masks[:MANY], margins[:MANY], lam, study.device)


def pairs(fitted: BayesianDatamodel, response: LinearisedResponse, kept: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Changes of margins (k, n_points) on masks (k, n_train), of the datamodel with random effects of pairs."""
    c, a, unit = np.diagonal(fitted.covariance), fitted.masks, np.eye(len(fitted.masks))

    def kernels(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of single points and of pairs, each of some masks with the models', whose mean takes the constant."""
        one = (u * c) @ a.T
        two = (one**2 - (u**2 * c**2) @ (a**2).T) / 2
        return fitted.rho * one, two - two.mean(1, keepdims=True)

    one, two = kernels(a)
    two -= two.mean(0)
    size = np.trace(two) / len(a)
    e = (one + unit) @ metrics.right_logits(fitted.coefficients, y).astype(float) / fitted.rho

    def solved(rho: float) -> tuple[float, float, np.ndarray]:
        r = one + rho / size * two + unit
        w = np.linalg.solve(r, e)
        return -len(a) * np.log((e * w).sum(0)).sum() - e.shape[1] * np.linalg.slogdet(r)[1], rho, w

    _, rho, w = max((solved(rho) for rho in (0.0, *RHOS)), key=lambda found: found[0])
    every = np.ones((1, kept.shape[1])) - fitted.mean_mask
    (first, second), (first_all, second_all) = kernels(kept - fitted.mean_mask), kernels(every)
    change = (first - first_all + rho / size * (second - second_all)) @ w + fitted.scale * response.change(kept)[0]
    change[:, : kept.shape[1]] -= ~kept * metrics.right_logits(fitted.own[None], y[: kept.shape[1]])[0]
    return np.asarray(change, np.float32)


def spreads(masks: np.ndarray, margins: np.ndarray, n: int) -> np.ndarray:
    """By how much margins of training points (n,) are wider in models that lack the point; see the head."""
    of = margins[:, :n]
    lacks, has = (np.nanstd(np.where(part, of, np.nan), 0, ddof=1) for part in (~masks, masks))
    return (lacks / has) ** SHRUNK


def text_of(table: pd.DataFrame) -> str:
    """Geometric means over seeds and sets, of each set and of all."""
    shown = table[table["way"] != "do nothing"]
    seeds = {kind: sorted(map(int, part["seed"].unique())) for kind, part in table.groupby("kind", sort=False)}
    each = shown[shown["split"] == "forget"].pivot_table(
        index=["kind", "set"], columns="way", values="klom", aggfunc=mean, sort=False
    )
    every = shown.groupby(["kind", "split", "way"], sort=False).agg(
        klom=("klom", mean), worst=("klom", "max"), gap=("gap", "mean")
    )
    return (
        f"Seeds {seeds}. p95 KLoM over the floor's, geometric mean over seeds.\n\nOn forgotten points:\n\n"
        f"{each.round(2).to_string()}\n\nOver sets and seeds; gap in sd:\n\n{every.round(2).to_string()}\n"
    )


if __name__ == "__main__":
    update(arguments(__doc__, "leads"), rows, text_of)
