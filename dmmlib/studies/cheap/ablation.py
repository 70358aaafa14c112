"""The Bayesian datamodel taken apart on the tuning sets; each change is compared with the default draw by draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from dmmlib import ensemble
from dmmlib.attribution import Context
from dmmlib.attributors.bayesian import RHOS, covariance
from dmmlib.attributors.bayesian import evidence as evidence_of_all
from dmmlib.attributors.kernel import kernel_response
from dmmlib.attributors.margins import Linear, Response, calibrated
from dmmlib.datamodels import RidgeDatamodel, lds
from dmmlib.errors import DataError
from dmmlib.studies.cheap.evaluator import Evaluator, Predict, held_out_margins, leaving_out
from dmmlib.studies.cheap.experiments import Cache, averaged, draws, pool
from dmmlib.study import Study
from dmmlib.trainer import ModelSet

Change = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""As `Response.change`: from masks to a change of margins and its noise."""


def posterior(
    context: Context,
    f: Change,
    c: np.ndarray,
    *,
    mean: bool = True,
    own: bool = True,
    each: bool = False,
    noisy: bool = False,
) -> Predict:
    """Compute the posterior mean of margins, for any mask; the defaults are those of `attributors.bayesian`.

    Args:
        f: the prior's mean, and c: covariance of what is wrong with it (n_train, n_train), both up to a scale.
        mean: whether f is there, or 0.
        own: whether each point's weight on its own margin is free.
        each: whether rho maximises the evidence of each margin on its own instead of that of all.
        noisy: whether s is fitted as if f were free of noise.
    """
    (m, n), masks, margins = context.masks.shape, context.masks, context.margins
    a = masks - masks.mean(0)
    gram = a @ c @ a.T
    values, vectors = np.linalg.eigh(gram + (1 + np.trace(gram)) / m)  # the constant comes last
    values, vectors = np.maximum(values[:-1], 0), vectors[:, :-1]
    change, noise = f(masks) if mean else (np.zeros_like(margins), np.zeros(margins.shape[1]))
    y, prior, points = (vectors.T @ z for z in (margins, change, a if own else np.zeros_like(a)))
    scale, common, _ = evidence_of_all(values, y, prior, points, 0 * noise if noisy else noise)
    e = y - scale * prior

    def left(rho: float) -> tuple[np.ndarray, np.ndarray]:
        """Own weights b (n_train,) at that rho, and what they leave of e (M - 1, n_points)."""
        w = 1 / (1 + rho * values)[:, None]
        b = (w * points * e[:, :n]).sum(0) / np.maximum((w * points**2).sum(0), 1e-9)
        rest = e.copy()
        rest[:, :n] -= points * b
        return b, rest

    def evidence(rho: float) -> np.ndarray:
        """Log evidence of each margin (n_points,) up to a constant, its variance profiled out."""
        square = (left(rho)[1] ** 2 / (1 + rho * values)[:, None]).sum(0)
        return -0.5 * len(values) * np.log(np.maximum(square, 1e-12)) - 0.5 * np.log1p(rho * values).sum()

    rhos = RHOS[np.argmax([evidence(rho) for rho in RHOS], 0)] if each else np.full(y.shape[1], common)
    combined, b_own = np.empty_like(e), np.empty(n)
    for rho in np.unique(rhos):
        here = rhos == rho
        b, rest = left(rho)
        combined[:, here] = rest[:, here] * (rho / (1 + rho * values))[:, None]
        b_own[here[:n]] = b[here[:n]]
    weights = c @ a.T @ (vectors @ combined)
    weights[:, :n] += np.diag(b_own)
    return lambda some: (some - masks.mean(0)) @ weights + (scale * f(some)[0] if mean else 0)


def antithetic_masks(masks: np.ndarray) -> np.ndarray:
    """Draw masks of half of S in pairs, each followed by its complement: (M, n_train)."""
    half = masks[: len(masks) // 2]
    return np.stack([half, ~half], 1).reshape(-1, masks.shape[1])


def clustered_masks(t: np.ndarray, n_masks: int, fraction: float, n_clusters: int, seed: int) -> np.ndarray:
    """Draw subsets that hold most of a cluster or little of it, so that groups' effects are seen: (n_masks, n_train).

    A cluster's probability is drawn from a beta distribution of mean `fraction`, then points are, to the exact size.
    Points are a cluster whose effects t (n_train, n_points) have alike directions; raises DataError for more clusters
    than training points.
    """
    n = len(t)
    if not 1 <= n_clusters <= n:
        raise DataError(f"n_clusters={n_clusters} was asked for among {n} training points; use 1 to {n}.")
    directions = t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-12)
    u, s, _ = np.linalg.svd(directions - directions.mean(0), full_matrices=False)
    clusters = KMeans(n_clusters, n_init=3, random_state=seed).fit_predict((u * s)[:, :60])
    rng = np.random.default_rng(seed)
    masks = np.zeros((n_masks, n), bool)
    for mask in masks:
        p = np.clip(rng.beta(2 * fraction, 2 * (1 - fraction), n_clusters), 1e-3, 1 - 1e-3)[clusters]
        key = np.log(p / (1 - p)) + rng.logistic(size=n)
        mask[np.argsort(-key)[: round(fraction * n)]] = True
    return masks


def _designs(study: Study, cache: Cache, draw: int) -> Iterator[tuple[str, Context]]:
    """Each design of subsets with its models, of one draw."""
    cheap, section = study.preset.studies["cheap"], study.preset.attribution
    m, fraction = section.n_subsets, section.fraction
    start = draws(study.preset, m)[draw]
    yield "default", pool(study, start, start + m)

    def trained(name: str, masks: np.ndarray) -> tuple[str, Context]:
        context = study.context_of(ModelSet(f"attribution:{name}:{draw}", masks, True))
        return name, replace(context, models=context.subset_models()[: cheap.n_ablation])

    for share in cheap.fractions:
        yield trained(f"{share:g}", study.random_masks(f"masks:{share:g}:{draw}", m, share))
    yield trained("antithetic", antithetic_masks(study.random_masks(f"masks:pairs:{draw}", m, 0.5)))
    yield trained("twice", np.repeat(study.random_masks(f"masks:twice:{draw}", -(-m // 2), fraction), 2, 0)[:m])
    at_originals = replace(study.context(), models=study.originals()[: cheap.n_ablation])
    t = cache("originals", at_originals, cheap.n_ablation).weights
    seed = study.seeds(f"masks:clustered:{draw}", 1)[0]
    yield trained("clustered", clustered_masks(t, m, fraction, cheap.n_clusters, seed))


@dataclass(frozen=True)
class Variant:
    """The default, with something changed."""

    group: str  # what is changed,
    name: str  # and how
    subsets: str = "default"  # a design of them
    linearised: Mapping[str, Any] = field(default_factory=dict)  # their number k, penalty lam and rank
    at: Literal["subsets", "originals", "half-way"] = "subsets"  # whose gradients; half-way through their training
    response: Literal["linearised", "linear", "kernel"] = "linearised"  # linear: single points' effects add up
    by_class: bool = False  # whether each target's class has a scale of its own
    delta: float = 1.0  # of the covariance
    parts: Mapping[str, bool] = field(default_factory=dict)  # of `posterior`
    prior_only: bool = False  # the response alone, scaled


def variants(study: Study) -> list[Variant]:
    """List the default, and one change of it at a time."""
    cheap, own = study.preset.studies["cheap"], f"{study.preset.attribution.fraction:.0%}"
    models = "linearised models"
    return [
        Variant("default", f"subsets of {own}, {cheap.n_ablation} {models}"),
        *(Variant("subsets", f"of {f:.0%}", subsets=f"{f:g}") for f in cheap.fractions),
        Variant("subsets", "of 50%, in antithetic pairs", subsets="antithetic"),
        Variant("subsets", f"of {own}, clustered", subsets="clustered"),
        Variant("subsets", f"of {own}, each twice", subsets="twice"),
        Variant("response", "kernel ridge, deletions exact", response="kernel"),
        Variant("response", "to first order: effects add up", response="linear"),
        *(Variant(models, f"{k} of them", linearised={"k": k}) for k in cheap.linearised),
        *(Variant(models, f"λ = {v:g}", linearised={"lam": v}) for v in cheap.penalties),
        *(Variant(models, f"rank {r}", linearised={"rank": r}) for r in cheap.ranks),
        Variant(models, f"at {cheap.n_ablation} originals", at="originals"),
        Variant(models, "half-way through training", at="half-way"),
        Variant("prior", "mean only: linearised models alone", prior_only=True),
        Variant("prior", "covariance only: no mean", parts={"mean": False}),
        Variant("prior", "correlated corrections (δ = 0.2)", delta=0.2),
        Variant("own weights", "not free", parts={"own": False}),
        Variant("scale", "ρ for each target", parts={"each": True}),
        Variant("scale", "s for each class", by_class=True),
        Variant("scale", "s as if f had no noise", parts={"noisy": True}),
    ]


def ablate(study: Study, cache: Cache) -> pd.DataFrame:
    """Measure every variant on the tuning sets, with independent draws of the preset's number of subset models.

    Returns:
        Columns group, name, draw, split ("forget", "retain", "validation": p95 KLoM, geometric mean over the tuning
        sets; "lds": on the held-out subsets that may choose), value.
    """
    evaluator, wanted, rows = Evaluator.tuning(study), variants(study), list[tuple[Any, ...]]()
    masks, actual = held_out_margins(study, chosen=True)
    for draw in range(len(draws(study.preset, study.preset.attribution.n_subsets))):
        for design, context in _designs(study, cache, draw):
            for v in (v for v in wanted if v.subsets == design):
                predict = _predicting(v, context, _response(study, cache, v, context, draw))
                found = pd.DataFrame(evaluator.klom(leaving_out(predict, study.data.n_train)))
                scores = np.exp(np.log(found["value"]).groupby(found["split"]).mean()).to_dict()
                scores["lds"] = float(lds(predict(masks), actual).mean())
                rows += [(v.group, v.name, draw, split, value) for split, value in scores.items()]
    order = [(v.group, v.name) for v in wanted]
    rows.sort(key=lambda row: (order.index(row[:2]), row[2]))
    return pd.DataFrame(rows, columns=["group", "name", "draw", "split", "value"])


def _half_way(study: Study, context: Context, k: int, draw: int) -> Context:
    """A context's first k models, trained for half as many epochs."""
    n, training = study.data.n_train, study.training
    training = replace(training, epochs=max(1, training.epochs // 2))
    masks, seeds = context.masks[:k], study.seeds(f"half-way:{draw}", k)
    models = ensemble.train(study.module, study.x[:n], study.y[:n], masks, seeds, training, study.execution())
    return replace(context, models=models)


def _response(study: Study, cache: Cache, v: Variant, context: Context, draw: int) -> Response:
    """What a variant takes for the prior's mean."""
    options = {"k": study.preset.studies["cheap"].n_ablation} | dict(v.linearised)
    name, k = f"{v.subsets}, draw {draw}", options["k"]
    if v.response == "kernel":
        return kernel_response(context, n_models=k)
    if v.at == "originals":
        name, context = "originals", replace(context, models=study.originals()[:k])
    elif v.at == "half-way":
        name, context = f"half-way, draw {draw}", _half_way(study, context, k, draw)
    elif v.subsets == "default":  # the curve's models
        name = f"draw {draws(study.preset, study.preset.attribution.n_subsets)[draw]}"
    found = cache(name, context, **options)
    return Linear(found.weights) if v.response == "linear" else found


def _predicting(v: Variant, context: Context, response: Response) -> Predict:
    if v.prior_only:
        scale = calibrated(context, response).scale
        return lambda masks: scale * response.change(masks)[0]
    f: Change = response.change
    weights = response.weights
    if v.by_class:
        s = _class_scales(context, response)
        f, weights = (lambda masks: (s * response.change(masks)[0], np.zeros(len(s)))), s * weights
    return posterior(context, f, covariance(weights, v.delta), **v.parts)


def _class_scales(context: Context, response: Response) -> np.ndarray:
    """The least-squares scale of a response on the margins of each target's class (n_points,)."""
    f, y = (z - z.mean(0) for z in (response.change(context.masks)[0], context.margins))
    of_class = context.labels == np.arange(context.n_classes)[:, None]
    fy, ff = (of_class @ (f * z).sum(0) for z in (y, f))
    return (fy / np.maximum(ff, 1e-12)).astype(np.float32)[context.labels]


def against_default(table: pd.DataFrame) -> pd.DataFrame:
    """Divide each variant's value by the default's (LDS: subtract), draw by draw: "ratio", `averaged` over draws."""
    default = table.loc[table["group"] == "default", ["draw", "split", "value"]]
    paired = table.merge(default, on=["draw", "split"], suffixes=("", "_of_default"))
    value, of = paired["value"], paired["value_of_default"]
    paired["ratio"] = (value / of).where(paired["split"] != "lds", value - of)
    return averaged(paired, ["group", "name", "split"], "ratio")


def gauges(study: Study) -> pd.DataFrame:
    """Measure ridge on all subset models, on raw logits and on logits in the margin gauge, on the tuning sets.

    Returns:
        Columns gauge, lam, forget_set, split, value (p95 KLoM).
    """
    evaluator, rows = Evaluator.tuning(study), list[dict[str, Any]]()
    masks, raw = study.subsets(raw=True)
    margins = study.subset_margins()[:, :, None]
    for lam in study.preset.datamodels.lambdas:
        bent = evaluator.bending(RidgeDatamodel.fit(masks, raw, lam, study.device))
        straight = evaluator.gauged(RidgeDatamodel.fit(masks, margins, lam, study.device))
        for gauge, effects in (("raw logits", bent), ("margin gauge", straight)):
            rows += [{"gauge": gauge, "lam": lam, **row} for row in evaluator.klom(effects)]
    return pd.DataFrame(rows)[["gauge", "lam", "forget_set", "split", "value"]]
