"""What notebook 07 measures: how good predictions are against how many subset models they cost, and why.

Everything is DM-direct, which needs no fine-tuning: a change of margins is predicted, and KLoM compares. Ablations run
on the tuning sets only; intervals are over forget sets, draws of subset models, or seeds, as each function says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from dmmlib import ensemble, metrics
from dmmlib.attribution.base import Context, Linear, Response, calibrated, foresee, indicator
from dmmlib.attribution.bayesian import BayesianDatamodel, covariance, fit
from dmmlib.attribution.linearised import LAM, RANK, Linearised, LinearisedResponse, linearise
from dmmlib.attributors.kernel import kernel_response
from dmmlib.datamodels import RidgeDatamodel, lds, lds_estimate
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError
from dmmlib.files import config_hash, read_json, write_json
from dmmlib.metrics import Estimate
from dmmlib.studies.cheap.ablation import Predict, antithetic_masks, clustered_masks, posterior
from dmmlib.study import Study
from dmmlib.trainer import ModelSet

if TYPE_CHECKING:
    from dmmlib.forget_sets import ForgetSet
    from dmmlib.presets import Preset

SPLITS = ("forget", "retain", "validation")
Effects = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray] | np.ndarray]
"""From forget sets, indices each, to the predicted changes of margins (n_points,), one a set."""


# --- intervals -----------------------------------------------------------------------------------------


def median_over(values: np.ndarray, n_bootstrap: int = 2000, seed: int = 0) -> Estimate:
    """Median with a 95 % bootstrap interval; `values` are one a forget set."""
    values = np.asarray(values, float)
    rows = np.random.default_rng(seed).integers(0, len(values), (n_bootstrap, len(values)))
    low, high = np.percentile(np.median(values[rows], 1), [2.5, 97.5])
    return Estimate(float(np.median(values)), float(low), float(high))


def mean_over(values: np.ndarray, log: bool = False) -> Estimate:
    """Mean (geometric, if `log`) with a 95 % t-interval; `values` are one a draw or seed, at least two."""
    v = np.log(values) if log else np.asarray(values, float)
    if len(v) < 2:
        raise DataError(f"An interval was asked for over {len(v)} value; give at least 2 draws or seeds.")
    error = float(t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v)))
    ends = (float(v.mean()), float(v.mean()) - error, float(v.mean()) + error)
    return Estimate(*(float(np.exp(e)) for e in ends)) if log else Estimate(*ends)


# --- measuring -----------------------------------------------------------------------------------------


@dataclass
class Yardstick:
    """KLoM of DM-direct on some forget sets of a study, and LDS, from predicted changes of margins alone.

    Attributes:
        sets: name -> forget set.
        n: originals and oracles a set.
    """

    study: Study
    sets: Mapping[str, ForgetSet]
    n: int
    _oracles: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def reported(cls, study: Study) -> Yardstick:
        return cls(study, study.forget_sets(), study.preset.ensembles.n_models)

    @classmethod
    def tuning(cls, study: Study) -> Yardstick:
        return cls(study, study.tuning_sets(), study.preset.tuning.n_models)

    @cached_property
    def before(self) -> np.ndarray:
        """Margins (n, n_points) of the originals."""
        return metrics.margins(self.study.original_logits()[: self.n], self.study.data.y)

    def oracles(self, name: str) -> np.ndarray:
        """Margins (n, n_points) of models retrained without a forget set."""
        if name not in self._oracles:
            logits = self.study.oracles(self.sets[name])[: self.n]
            self._oracles[name] = metrics.margins(logits, self.study.data.y)
        return self._oracles[name]

    def p95(self, answers: np.ndarray, name: str) -> dict[str, float]:
        """p95 KLoM on each split of a forget set, of margins (n, n_points)."""
        klom = metrics.klom(answers, self.oracles(name))
        splits = self.sets[name].splits(self.study.data.n_train, self.study.data.n_val)
        return {split: float(np.percentile(klom[at], 95)) for split, at in splits.items()}

    def rows(self, answers: Callable[[str], np.ndarray]) -> list[dict[str, Any]]:
        """`p95` of the margins (n, n_points) that answer each forget set, by its name: a row a set and split."""
        return [
            {"forget_set": name, "split": split, "statistic": "klom_p95", "value": value}
            for name in self.sets
            for split, value in self.p95(answers(name), name).items()
        ]

    def klom(self, effects: Effects) -> list[dict[str, Any]]:
        """`rows` of DM-direct."""
        changes = dict(zip(self.sets, effects([f.indices for f in self.sets.values()]), strict=True))
        return self.rows(lambda name: self.before + changes[name])

    def floor(self) -> list[dict[str, Any]]:
        """`rows` of a second, independent set of oracles."""
        study = self.study
        return self.rows(
            lambda name: metrics.margins(study.oracles(self.sets[name], floor=True, n=self.n), study.data.y)
        )

    def true_shift(self) -> list[dict[str, Any]]:
        """`rows` if every original moved by the true change of the mean margin: what no better prediction beats."""
        return self.rows(lambda name: self.before + self.oracles(name).mean(0) - self.before.mean(0))


def right(study: Study, effect: np.ndarray) -> np.ndarray:
    """The change of margins (..., n_points) in a change of logits in the margin gauge."""
    return metrics.right_logits(effect, study.data.y)


def held_out_margins(study: Study, chosen: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Masks and margins of held-out subset models: those that may choose something, or those that report."""
    half = study.preset.datamodels.n_held_out // 2
    rows = slice(None, half) if chosen else slice(half, None)
    masks, outputs = study.held_out()
    return masks[rows], right(study, outputs[rows])


# --- subset models -------------------------------------------------------------------------------------


def sizes(preset: Preset) -> list[int]:
    """Numbers of subset models that Bayesian datamodels are fitted to; the preset's own is always one of them."""
    return sorted({*preset.studies["cheap"].sizes, preset.attribution.n_subsets})


def pool(study: Study, start: int, stop: int) -> Context:
    """Subset models `start` to `stop` of the preset's attribution, and of more that are trained on the same lines.

    The weights are those of the first `n_kernel` of them.
    """
    section, here = study.preset.attribution, study.context()
    own = len(here.masks)
    masks = study.random_masks("attribution masks", max(sizes(study.preset)), section.fraction)
    more = ModelSet("attribution:more", masks[own:], True)
    few = replace(here, masks=here.masks[start:own], outputs=here.outputs[start:own], models=None)
    parts = [few] if start < own else []
    models = here.subset_models()[start:own] if start < own else None
    if stop > own:
        rest = study.context_of(more, max(0, start - own), stop - own)
        models = rest.subset_models() if models is None else models
        parts.append(rest)
    masks, outputs = (
        np.concatenate([getattr(p, name) for p in parts])[: stop - start] for name in ("masks", "outputs")
    )
    assert models is not None
    k = min(study.preset.studies["cheap"].n_kernel, models.n_models, stop - start)
    return replace(here, masks=masks, outputs=outputs, models=models[:k])


def draws(preset: Preset, size: int) -> list[int]:
    """Where blocks of `size` models start: up to `n_draws` that share none."""
    n_draws, every = preset.studies["cheap"].n_draws, max(sizes(preset))
    apart = every // n_draws
    n = n_draws if size <= apart else max(1, every // size)
    return [k * max(size, apart) for k in range(n)]


class Cache:
    """Linearised models of contexts, each made once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._known: dict[tuple[Any, ...], tuple[Linearised, ...]] = {}

    def __call__(
        self, name: str, context: Context, k: int, lam: float = LAM, rank: int = RANK, originals: bool = False
    ) -> LinearisedResponse:
        """The response of the first k models of a context that is known by this name, or of k originals."""
        models = context.originals if originals else context.subset_models()
        assert models is not None
        key = (name, lam, rank)
        known = self._known.get(key, ())
        if len(known) < k:
            self.study.progress(f"linearised models ({name})", len(known), k)
            initial = -float(np.log(context.n_classes - 1))
            some = models[len(known) : k]
            known += linearise(some, context.x, context.y, context.n_train, initial, lam, rank, context.seed)
            self._known[key] = known
            self.study.progress(f"linearised models ({name})", k, k)
        return LinearisedResponse(known[:k])


@dataclass(frozen=True)
class Remembered:
    """A response that predicts the same masks once."""

    response: Response
    _known: dict[bytes, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def n_train(self) -> int:
        return self.response.n_train

    @property
    def weights(self) -> np.ndarray:
        return self.response.weights

    def change(self, masks: np.ndarray) -> np.ndarray:
        return self.foresee(masks)[0]

    def foresee(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = np.packbits(np.asarray(masks, bool)).tobytes()
        if key not in self._known:
            self._known[key] = foresee(self.response, masks)
        return self._known[key]


# --- against the number of models ----------------------------------------------------------------------


def search(
    yardstick: Yardstick,
    fit: Callable[..., RidgeDatamodel],
    effects: Callable[[RidgeDatamodel], Effects],
    grid: Iterable[dict[str, float]],
) -> Iterator[tuple[dict[str, float], RidgeDatamodel, float]]:
    """Each setting of a grid, the datamodel fitted with it, and its score, of which the lowest is to be chosen.

    The score is the mean over forget sets and splits of p95 KLoM of DM-direct.
    """
    for setting in grid:
        model = fit(**setting)
        yield setting, model, float(np.mean([row["value"] for row in yardstick.klom(effects(model))]))


def ridge(study: Study, size: int, yardstick: Yardstick | None = None) -> tuple[Effects, dict[str, Any], Estimate]:
    """Ridge on margins with the first `size` subset models of halves.

    Penalty and share of it on own weights are those of the lowest score of `search` on the tuning sets. Its LDS is that
    of the penalty that has the best LDS on the first half of the held-out subsets, reported on the second.

    Returns:
        The predicted change of margins, the setting, and the LDS.
    """
    section = study.preset.datamodels
    masks, outputs = study.subsets()
    margins = right(study, outputs[:size])[:, :, None]
    chosen, reported = held_out_margins(study, True), held_out_margins(study)

    def fitted(lam: float, own_share: float = 1.0) -> RidgeDatamodel:
        return RidgeDatamodel.fit(masks[:size], margins, lam, study.device, own_share)

    sets = {name: f.indices.tolist() for name, f in study.tuning_sets().items()}
    config = {
        "subsets": section.model_dump(mode="json"),
        "size": size,
        "tuning": sets,
        "n": study.preset.tuning.n_models,
    }
    config |= {"data": study.data.sha256, "model": study.preset.model.model_dump(), "seed": study.preset.seed}
    config |= {"training": study.preset.training.model_dump(), "version": 1}
    path = study.runs / "store" / f"ridge-{config_hash(config)}.json"
    if not path.exists():
        yardstick = yardstick or Yardstick.tuning(study)
        rows: list[dict[str, float]] = []
        study.progress(f"ridge on {size} models", 0, len(section.grid))
        for setting, model, score in search(yardstick, fitted, first_class, section.grid):
            plain = setting["own_share"] == 1
            rank = float(lds(model.predict(chosen[0])[..., 0], chosen[1]).mean()) if plain else -1.0
            rows.append(setting | {"score": score, "lds": rank})
            study.progress(f"ridge on {size} models", len(rows), len(section.grid))
        write_json(path, rows)
    table = pd.DataFrame(read_json(path))
    best = table.iloc[int(table["score"].to_numpy().argmin())]
    setting = {"lam": float(best["lam"]), "own_share": float(best["own_share"])}
    model = fitted(**setting)
    ranker = fitted(float(table["lam"].to_numpy()[table["lds"].to_numpy().argmax()]))
    return first_class(model), setting, lds_estimate(ranker.predict(reported[0])[..., 0], reported[1])


def raw_ridge(study: Study, yardstick: Yardstick) -> list[dict[str, Any]]:
    """p95 KLoM, a row a forget set and split, of ridge as the paper and the study have it: raw logits change."""
    before = study.original_logits()[: yardstick.n]

    def answers(name: str) -> np.ndarray:
        return metrics.margins(study.datamodel().retrained(before, yardstick.sets[name].indices), study.data.y)

    return yardstick.rows(answers)


def more_ridge(study: Study, size: int) -> pd.DataFrame:
    """Ridge on raw logits with more subset models than the preset has: penalty as in `ridge`, on the tuning sets.

    Returns:
        Columns n_models, forget_set, split, statistic, value: p95 KLoM of DM-direct on the reported forget sets.
    """
    section = study.preset.datamodels
    more = ModelSet("subsets:more", study.random_masks("masks:more", size - section.n_subsets, section.fraction))
    masks = np.concatenate([study.subsets()[0], more.masks])
    logits = np.concatenate([study.raw_subset_logits(), study.logits_of(more)])
    fit = partial(RidgeDatamodel.fit, masks, logits, device=study.device)
    tuning, reported = Yardstick.tuning(study), Yardstick.reported(study)
    tried = search(tuning, fit, partial(bending, study, tuning), [{"lam": lam} for lam in section.lambdas])
    _, model, _ = min(tried, key=lambda found: found[2])
    return pd.DataFrame(reported.klom(bending(study, reported, model))).assign(n_models=size)


def bending(study: Study, yardstick: Yardstick, model: RidgeDatamodel) -> Effects:
    """Changes of margins (n, n_points) where a datamodel of raw logits moves each original's own."""

    def effects(sets: Sequence[np.ndarray]) -> list[np.ndarray]:
        logits = (study.original_logits()[: yardstick.n] + model.effect(f) for f in sets)
        return [metrics.margins(moved, study.data.y) - yardstick.before for moved in logits]

    return effects


def first_class(model: RidgeDatamodel) -> Effects:
    """The changes that a datamodel of margins alone predicts."""
    return lambda sets: [model.effect(f)[:, 0] for f in sets]


def margins_of(study: Study, model: BayesianDatamodel) -> Effects:
    """The changes of margins that a datamodel predicts."""
    return lambda sets: right(study, model.effects(sets))


def leaving_out(predict: Predict, n_train: int) -> Effects:
    """The changes of margins between masks: with everything, and without each set."""
    everything = np.ones((1, n_train), bool)
    return lambda sets: predict(np.stack([indicator(f, n_train) for f in sets]) == 0) - predict(everything)


def bayesian_lds(study: Study, model: BayesianDatamodel) -> Estimate:
    """LDS on the held-out subsets that chose nothing."""
    masks, actual = held_out_margins(study)
    return lds_estimate(right(study, model.predict(masks)), actual)


def curve(study: Study, cache: Cache) -> pd.DataFrame:
    """p95 KLoM of DM-direct on the reported forget sets, and LDS, against the number of subset models.

    Returns:
        Columns attributor ("bayesian", "ridge", "ridge, raw logits", "do nothing", "floor", "true mean shift"),
        n_models, draw, forget_set, split, statistic ("klom_p95", "lds"), value, low, high (of the LDS, over held-out
        subsets).
    """
    yardstick, rows = Yardstick.reported(study), list[dict[str, Any]]()

    def add(found: Sequence[dict[str, Any]], attributor: str, n_models: int = 0, draw: int = 0) -> None:
        rows.extend(row | {"attributor": attributor, "n_models": n_models, "draw": draw} for row in found)

    zero = np.zeros(len(study.data.y), np.float32)
    add(yardstick.klom(lambda sets: [zero] * len(sets)), "do nothing")
    add(yardstick.floor(), "floor")
    add(yardstick.true_shift(), "true mean shift")
    for size in (s for s in study.preset.datamodels.sizes if s <= study.preset.datamodels.n_subsets):
        effect, _, score = ridge(study, size)
        add([*yardstick.klom(effect), _lds_row(score)], "ridge", size)
    add(raw_ridge(study, yardstick), "ridge, raw logits", study.preset.datamodels.n_subsets)
    responses: dict[tuple[int, int], Remembered] = {}  # asked for the same held-out masks and sets at every size
    for size in sizes(study.preset):
        for draw, start in enumerate(draws(study.preset, size)):
            context = pool(study, start, start + size)
            k = context.subset_models().n_models
            if (start, k) not in responses:
                responses[start, k] = Remembered(cache(f"draw {start}", context, k))
            model = fit(context, responses[start, k])
            found = yardstick.klom(margins_of(study, model))
            add([*found, _lds_row(bayesian_lds(study, model))], "bayesian", size, draw)
    columns = ["attributor", "n_models", "draw", "forget_set", "split", "statistic", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def fine_tuned(study: Study, methods: Sequence[str]) -> pd.DataFrame:
    """p95 KLoM and cost of methods as the study tunes them, a row a method (as attributor), forget set and split."""
    yardstick, rows = Yardstick.reported(study), list[dict[str, Any]]()
    for method in methods:
        for name, f in yardstick.sets.items():
            result = study.unlearned(method, f)
            head = {"attributor": method, "n_models": 0, "draw": 0, "forget_set": name}
            for split, value in yardstick.p95(result.margins, name).items():
                rows.append(head | {"split": split, "statistic": "klom_p95", "value": value})
            rows.append(head | {"split": "all", "statistic": "cost", "value": result.cost})
    return pd.DataFrame(rows)


def _lds_row(score: Estimate) -> dict[str, Any]:
    numbers = {"value": score.value, "low": score.low, "high": score.high}
    return {"forget_set": "every", "split": "all", "statistic": "lds", **numbers}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """`curve`, with medians over forget sets (first the mean over draws of each): 95 % intervals over sets.

    The LDS is the mean over draws; its interval is over draws where there are several, else over held-out subsets.
    """
    rows = []
    for (attributor, n, statistic, split), part in table.groupby(
        ["attributor", "n_models", "statistic", "split"], sort=False
    ):
        if statistic == "lds":
            several = len(part) > 1
            e = mean_over(part["value"].to_numpy()) if several else Estimate(*part[["value", "low", "high"]].iloc[0])
        else:
            e = median_over(part.groupby("forget_set", sort=False)["value"].mean().to_numpy())
        rows.append((attributor, n, statistic, split, e.value, e.low, e.high, part["draw"].nunique()))
    columns = ["attributor", "n_models", "statistic", "split", "value", "low", "high", "n_draws"]
    return pd.DataFrame(rows, columns=columns)


# --- ablation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """The default, with something changed.

    Attributes:
        group, name: what is changed, and how.
        subsets: a design of `_designs`.
        k: linearised models; the preset's `n_ablation` if None.
        lam, rank: of them.
        at: whose gradients: of "subsets", of "originals", or of the subset models "half-way" through their training.
        response: the "linearised" models retrained, their single points' effects added up ("linear"), or the "kernel"
            with exact deletions and measured residuals.
        by_class: whether each target's class has a scale of its own.
        delta, mean, own, each, noisy: see `posterior`.
        prior_only: the response alone, scaled.
    """

    group: str
    name: str
    subsets: str = "default"
    k: int | None = None
    lam: float = LAM
    rank: int = RANK
    at: Literal["subsets", "originals", "half-way"] = "subsets"
    response: Literal["linearised", "linear", "kernel"] = "linearised"
    by_class: bool = False
    delta: float = 1.0
    mean: bool = True
    own: bool = True
    each: bool = False
    noisy: bool = False
    prior_only: bool = False


def variants(study: Study) -> list[Variant]:
    """The default, and one change at a time."""
    cheap, own = study.preset.studies["cheap"], study.preset.attribution.fraction
    return [
        Variant("default", f"subsets of {own:.0%}, {cheap.n_ablation} linearised models"),
        *(Variant("subsets", f"of {f:.0%}", subsets=f"{f:g}") for f in cheap.fractions),
        Variant("subsets", "of 50%, in antithetic pairs", subsets="antithetic"),
        Variant("subsets", f"of {own:.0%}, clustered", subsets="clustered"),
        Variant("subsets", f"of {own:.0%}, each twice", subsets="twice"),
        Variant("response", "kernel ridge, deletions exact", response="kernel"),
        Variant("response", "to first order: effects add up", response="linear"),
        *(Variant("linearised models", f"{k} of them", k=k) for k in cheap.linearised),
        *(Variant("linearised models", f"λ = {v:g}", lam=v) for v in cheap.penalties),
        *(Variant("linearised models", f"rank {r}", rank=r) for r in cheap.ranks),
        Variant("linearised models", f"at {cheap.n_ablation} originals", at="originals"),
        Variant("linearised models", "half-way through training", at="half-way"),
        Variant("prior", "mean only: linearised models alone", prior_only=True),
        Variant("prior", "covariance only: no mean", mean=False),
        Variant("prior", "correlated corrections (δ = 0.2)", delta=0.2),
        Variant("own weights", "not free", own=False),
        Variant("scale", "ρ for each target", each=True),
        Variant("scale", "s for each class", by_class=True),
        Variant("scale", "s as if f had no noise", noisy=True),
    ]


def _designs(study: Study, cache: Cache, draw: int) -> Iterator[tuple[str, Context]]:
    """Each design of subsets with its models, of one draw."""
    m, section, cheap = study.preset.attribution.n_subsets, study.preset.attribution, study.preset.studies["cheap"]
    start = draws(study.preset, m)[draw]
    yield "default", pool(study, start, start + m)

    def trained(name: str, masks: np.ndarray) -> Context:
        context = study.context_of(ModelSet(f"attribution:{name}:{draw}", masks, True))
        return replace(context, models=context.subset_models()[: cheap.n_ablation])

    for fraction in cheap.fractions:
        yield f"{fraction:g}", trained(f"{fraction:g}", study.random_masks(f"masks:{fraction:g}:{draw}", m, fraction))
    yield "antithetic", trained("antithetic", antithetic_masks(study.random_masks(f"masks:pairs:{draw}", m, 0.5)))
    twice = np.repeat(study.random_masks(f"masks:twice:{draw}", -(-m // 2), section.fraction), 2, 0)[:m]
    yield "twice", trained("twice", twice)
    at_originals = cache(
        "originals", study.context(), min(cheap.n_ablation, study.originals().n_models), originals=True
    )
    seed = study.seeds(f"masks:clustered:{draw}", 1)[0]
    masks = clustered_masks(at_originals.weights, m, section.fraction, cheap.n_clusters, seed)
    yield "clustered", trained("clustered", masks)


def ablate(study: Study, cache: Cache) -> pd.DataFrame:
    """Every variant on the tuning sets, with `n_draws` independent draws of the preset's number of subset models.

    Returns:
        Columns group, name, draw, split ("forget", "retain", "validation": p95 KLoM, geometric mean over the tuning
        sets; "lds": on the held-out subsets that may choose), value.
    """
    yardstick, wanted, rows = Yardstick.tuning(study), variants(study), list[tuple[Any, ...]]()
    masks, actual = held_out_margins(study, chosen=True)
    n_draws = len(draws(study.preset, study.preset.attribution.n_subsets))
    for draw in range(n_draws):
        for design, context in _designs(study, cache, draw):
            responses: dict[tuple[Any, ...], Remembered] = {}
            for v in (v for v in wanted if v.subsets == design):
                key = (v.response, v.k, v.lam, v.rank, v.at)
                if key not in responses:
                    responses[key] = Remembered(_response(study, cache, v, context, draw))
                predict = _predicting(v, context, responses[key])
                found = pd.DataFrame(yardstick.klom(leaving_out(predict, study.data.n_train)))
                scores = np.exp(np.log(found["value"]).groupby(found["split"]).mean()).to_dict()
                scores["lds"] = float(lds(predict(masks), actual).mean())
                rows += [(v.group, v.name, draw, split, value) for split, value in scores.items()]
    table = pd.DataFrame(rows, columns=["group", "name", "draw", "split", "value"])
    order = {(v.group, v.name): i for i, v in enumerate(wanted)}
    table["order"] = [order[key] for key in zip(table["group"], table["name"], strict=True)]
    return table.sort_values(["order", "draw"], kind="stable", ignore_index=True).drop(columns="order")


def _response(study: Study, cache: Cache, v: Variant, context: Context, draw: int) -> Response:
    """What a variant takes for the prior's mean."""
    k = v.k or study.preset.studies["cheap"].n_ablation
    if v.response == "kernel":
        return kernel_response(context, 0.1, "measured", "subsets", k)
    name = (
        f"draw {draws(study.preset, study.preset.attribution.n_subsets)[draw]}"
        if v.subsets == "default"
        else (f"{v.subsets}, draw {draw}")
    )
    if v.at == "originals":
        name, k = "originals", min(k, study.originals().n_models)
    elif v.at == "half-way":
        name, context = f"half-way, draw {draw}", replace(context, models=_half_way(study, context.masks[:k], draw))
    found = cache(name, context, k, v.lam, v.rank, v.at == "originals")
    return Linear(found.weights) if v.response == "linear" else found


def _half_way(study: Study, masks: np.ndarray, draw: int) -> Ensemble:
    """Models trained for half as many epochs."""
    n, training = study.data.n_train, study.training
    training = replace(training, epochs=max(1, training.epochs // 2))
    seeds = study.seeds(f"half-way:{draw}", len(masks))
    return ensemble.train(study.module, study.x[:n], study.y[:n], masks, seeds, training, study.execution())


@dataclass(frozen=True)
class ByClass:
    """A response times a factor for the class of each target (n_classes,)."""

    response: Response
    factors: np.ndarray
    labels: np.ndarray

    @classmethod
    def fit(cls, context: Context, response: Response) -> ByClass:
        """Factors of least squares on the margins of the context's subset models."""
        f, y = (z - z.mean(0) for z in (response.change(context.masks), context.margins))
        of_class = context.labels == np.arange(context.n_classes)[:, None]
        fy, ff = (of_class @ (f * z).sum(0) for z in (y, f))
        return cls(response, (fy / np.maximum(ff, 1e-12)).astype(np.float32), context.labels)

    @property
    def n_train(self) -> int:
        return self.response.n_train

    @property
    def weights(self) -> np.ndarray:
        return self.factors[self.labels] * self.response.weights

    def change(self, masks: np.ndarray) -> np.ndarray:
        return self.factors[self.labels] * self.response.change(masks)


def _predicting(v: Variant, context: Context, response: Response) -> Predict:
    if v.by_class:
        response = ByClass.fit(context, response)
    if v.prior_only:
        alone = calibrated(context, response)
        return lambda masks: alone.scale * response.change(masks)
    c = covariance(response.weights, v.delta)
    return posterior(context.masks, context.margins, response, c, mean=v.mean, own=v.own, each=v.each, noisy=v.noisy)


def against_default(table: pd.DataFrame) -> pd.DataFrame:
    """Each variant's value over the default's (LDS: minus), draw by draw: mean with a 95 % t-interval over draws.

    Returns:
        Columns group, name, split, value (mean over draws), ratio, low, high, n (draws).
    """
    is_default = table["group"] == "default"
    keys = ("draw", "split", "value")
    base = {(d, split): value for d, split, value in zip(*(table.loc[is_default, k] for k in keys), strict=True)}
    rows = []
    for (group, name, split), part in table.groupby(["group", "name", "split"], sort=False):
        of = np.array([base[d, str(split)] for d in part["draw"]])
        values = part["value"].to_numpy()
        e = mean_over(values - of) if split == "lds" else mean_over(values / of, log=True)
        rows.append((group, name, split, values.mean(), e.value, e.low, e.high, len(part)))
    return pd.DataFrame(rows, columns=["group", "name", "split", "value", "ratio", "low", "high", "n"])


def gauges(study: Study) -> pd.DataFrame:
    """Ridge on all subset models, regressed on raw logits and on logits in the margin gauge, on the tuning sets.

    Returns:
        Columns gauge, lam, forget_set, split, value (p95 KLoM).
    """
    yardstick, rows = Yardstick.tuning(study), list[dict[str, Any]]()
    masks, outputs = study.subsets()
    raw = study.raw_subset_logits()
    for lam in study.preset.datamodels.lambdas:
        for gauge, y in (("raw logits", raw), ("margin gauge", right(study, outputs)[:, :, None])):
            model = RidgeDatamodel.fit(masks, y, lam, study.device)
            effects = first_class(model) if gauge == "margin gauge" else bending(study, yardstick, model)
            rows += [{"gauge": gauge, "lam": lam, **row} for row in yardstick.klom(effects)]
    return pd.DataFrame(rows)[["gauge", "lam", "forget_set", "split", "value"]]


# --- uncertainty ---------------------------------------------------------------------------------------


def uncertainty(study: Study, model: BayesianDatamodel, level: float = 0.95) -> pd.DataFrame:
    """Predicted changes of mean margins beside true ones, with the posterior's sd, on the reported forget sets.

    Returns:
        A row a forget set and point: forget_set, kind ("random" or "group"), split, predicted, true, sd (of the
        prediction), se (of the true change, from N originals and N oracles), z, covered (whether by the interval
        of that level).
    """
    yardstick, parts = Yardstick.reported(study), []
    for name, f in yardstick.sets.items():
        before, oracle = yardstick.before, yardstick.oracles(name)
        true = oracle.mean(0) - before.mean(0)
        se = np.sqrt(before.var(0, ddof=1) / len(before) + oracle.var(0, ddof=1) / len(oracle))
        predicted, sd = right(study, model.effect(f.indices)), model.sd(f.indices)
        z = (true - predicted) / np.sqrt(sd**2 + se**2)
        kind = "random" if f.made_by.get("kind") == "random" else "group"
        for split, at in f.splits(study.data.n_train, study.data.n_val).items():
            part = pd.DataFrame({"predicted": predicted[at], "true": true[at], "sd": sd[at], "se": se[at], "z": z[at]})
            parts.append(part.assign(forget_set=name, kind=kind, split=split))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(covered=table["z"].abs() <= norm.ppf(0.5 + level / 2))


def calibration(table: pd.DataFrame) -> pd.DataFrame:
    """`uncertainty` by forget set and split: rms z, coverage, and slope of the true on the predicted change."""
    rows = []
    for (name, kind, split), part in table.groupby(["forget_set", "kind", "split"], sort=False):
        p, true = part["predicted"].to_numpy(), part["true"].to_numpy()
        slope = float(p @ true / max(float(p @ p), 1e-12))
        rows.append((name, kind, split, float(np.sqrt((part["z"] ** 2).mean())), part["covered"].mean(), slope))
    return pd.DataFrame(rows, columns=["forget_set", "kind", "split", "rms_z", "coverage", "slope"])


# --- replication ---------------------------------------------------------------------------------------

PAIRS: dict[str, dict[str, Any]] = {
    "fashion-mnist, mlp": {"data.name": "fashion-mnist", "model": {"name": "mlp"}},
    "digits, mlp": {"data.name": "digits", "model": {"name": "mlp", "options": {"hidden": 64}}},
    "fashion-mnist, convnet": {
        "data.name": "fashion-mnist",
        "model": {"name": "convnet", "options": {"width": 4}},
        "training.lr": 0.05,
    },
}
"""Data / model pairs, as overrides of the preset `replicate`."""


def replicate(study: Study) -> pd.DataFrame:
    """Bayesian from the preset's few subset models against ridge from its many, on the study's forget sets.

    Returns:
        Columns attributor ("bayesian", "ridge", "do nothing"), n_models, forget_set, kind, split, statistic, value.
    """
    yardstick, rows = Yardstick.reported(study), list[dict[str, Any]]()
    m, many = study.preset.attribution.n_subsets, study.preset.datamodels.n_subsets
    zero = np.zeros(len(study.data.y), np.float32)
    effect, _, score = ridge(study, many)
    model = study.attributor("bayesian")
    assert isinstance(model, BayesianDatamodel)
    found = {
        ("do nothing", 0): yardstick.klom(lambda sets: [zero] * len(sets)),
        ("ridge", many): [*yardstick.klom(effect), _lds_row(score)],
        ("bayesian", m): [
            *yardstick.klom(margins_of(study, model)),
            _lds_row(bayesian_lds(study, model)),
        ],
    }
    for (attributor, n_models), some in found.items():
        rows += [row | {"attributor": attributor, "n_models": n_models} for row in some]
    table = pd.DataFrame(rows)
    kinds = {name: "random" if f.made_by["kind"] == "random" else "group" for name, f in study.forget_sets().items()}
    table["kind"] = table["forget_set"].map(kinds).fillna("every")
    return table[["attributor", "n_models", "forget_set", "kind", "split", "statistic", "value"]]


def replications(study: Study, table: Path) -> pd.DataFrame:
    """The table that `make replicate` writes, or, where there is none, this study alone: one pair, one seed."""
    if table.exists():
        return pd.read_csv(table)
    return replicate(study).assign(pair=f"{study.data.name}, {study.preset.model.name}", seed=study.preset.seed)


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Bayesian over ridge, p95 KLoM (LDS: minus), a row a pair, seed, kind of forget set and split.

    Args:
        table: `replicate`, with columns pair and seed.

    Returns:
        Columns pair, seed, kind, split, value: the geometric mean over forget sets of that kind.
    """
    wide = table.pivot_table(
        index=["pair", "seed", "kind", "forget_set", "split", "statistic"], columns="attributor", values="value",
        sort=False,
    ).reset_index()  # fmt: skip
    is_lds = wide["statistic"] == "lds"
    wide["log"] = np.where(is_lds, wide["bayesian"] - wide["ridge"], np.log(wide["bayesian"] / wide["ridge"]))
    mean = wide.groupby(["pair", "seed", "kind", "split", "statistic"], sort=False)["log"].mean().reset_index()
    mean["value"] = np.where(mean["statistic"] == "lds", mean["log"], np.exp(mean["log"]))
    return mean[["pair", "seed", "kind", "split", "value"]]


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """`ratios` over seeds: mean, 95 % t-interval (NaN of one seed), n: pair, kind, split, value, low, high, n."""
    rows = []
    for (pair, kind, split), part in table.groupby(["pair", "kind", "split"], sort=False):
        values = part["value"].to_numpy()
        several = len(values) > 1
        e = mean_over(values, log=split != "all") if several else Estimate(float(values[0]), np.nan, np.nan)
        rows.append((pair, kind, split, e.value, e.low, e.high, len(part)))
    return pd.DataFrame(rows, columns=["pair", "kind", "split", "value", "low", "high", "n"])


# --- costs ---------------------------------------------------------------------------------------------


def costs(study: Study, dmm_cost: float) -> pd.DataFrame:
    """What each way costs, in retrainings of one model: once, a request, and from which request on it is cheaper.

    Args:
        dmm_cost: sample gradients of DMM on one model, relative to retraining one.

    Returns:
        Columns way, models, once, request, beats (the number of requests from which on the total is below that of
        retraining one model at each).
    """
    d, a = study.preset.datamodels, study.preset.attribution
    rows = []
    for way, n, fraction, request in (
        ("retrain", 0, 0.0, 1.0),
        ("ridge, DM-direct", d.n_subsets, d.fraction, 0.0),
        ("ridge, DMM", d.n_subsets, d.fraction, dmm_cost),
        ("Bayesian, DM-direct", a.n_subsets, a.fraction, 0.0),
        ("Bayesian, DMM", a.n_subsets, a.fraction, dmm_cost),
    ):
        once = n * fraction
        beats = float(np.floor(once / (1 - request)) + 1) if request < 1 else np.inf
        rows.append((way, n, once, request, beats))
    return pd.DataFrame(rows, columns=["way", "models", "once", "request", "beats"])


# --- the goal ------------------------------------------------------------------------------------------


def ratio_over_sets(
    table: pd.DataFrame, one: tuple[str, int], other: tuple[str, int], sets: Sequence[str], split: str
) -> Estimate:
    """Median over forget sets of p95 KLoM of one (attributor, n_models) over another's, mean over draws first."""
    shown = table[(table["statistic"] == "klom_p95") & (table["split"] == split)]
    means = shown.groupby(["attributor", "n_models", "forget_set"])["value"].mean().to_dict()
    return median_over(np.array([means[(*one, name)] / means[(*other, name)] for name in sets]))
