"""What notebook 07 measures: how good predictions are against how many subset models they cost.

Intervals are over forget sets, draws of subset models, or seeds, as each function says.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from dmmlib import metrics
from dmmlib.analysis.intervals import mean_over, median_over
from dmmlib.analysis.side_by_side import tuned_ridge
from dmmlib.attribution import Context
from dmmlib.attributors import bayesian
from dmmlib.attributors.bayesian import BayesianDatamodel
from dmmlib.attributors.linearised import LOGITS, Linearised, LinearisedResponse, linearised_response
from dmmlib.datamodels import Attributor, RidgeDatamodel
from dmmlib.forget_sets import ForgetSet
from dmmlib.metrics import Estimate
from dmmlib.presets import Preset
from dmmlib.studies.cheap.evaluator import Evaluator, Rows, label_logits
from dmmlib.study import Study
from dmmlib.trainer import ModelSet

LDS = ("all", "lds")  # what stands for a split where a value is an LDS


def sizes(preset: Preset) -> list[int]:
    """List numbers of subset models to fit Bayesian datamodels to; the preset's own is always one of them."""
    return sorted({*preset.studies["cheap"].sizes, preset.attribution.n_subsets})


def draws(preset: Preset, size: int) -> list[int]:
    """List where blocks of `size` models start: up to `n_draws` that share none."""
    n_draws, every = preset.studies["cheap"].n_draws, max(sizes(preset))
    apart = every // n_draws
    return [k * max(size, apart) for k in range(n_draws if size <= apart else max(1, every // size))]


def pool(study: Study, start: int, stop: int) -> Context:
    """Return subset models `start` to `stop` of the preset's attribution, and of more that are trained likewise.

    The weights are those of the first `n_kernel` of them.
    """
    own, section, parts = study.context(), study.preset.attribution, []
    n = len(own.masks)
    if start < n:
        models = own.subset_models()[start:stop]
        parts.append(replace(own, masks=own.masks[start:stop], outputs=own.outputs[start:stop], models=models))
    if stop > n:
        masks = study.random_masks("attribution masks", max(sizes(study.preset)), section.fraction)
        more = ModelSet("attribution:more", masks[n:], True)
        parts.append(study.context_of(more, max(0, start - n), stop - n))
    masks, outputs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("masks", "outputs"))
    models = parts[0].subset_models()[: study.preset.studies["cheap"].n_kernel]
    return replace(own, masks=masks, outputs=outputs, models=models)


@dataclass(frozen=True)
class Remembering(Linearised):
    """A linearised model that remembers what it said of each mask: many fits ask it for the same ones."""

    def change(self, masks: np.ndarray) -> np.ndarray:
        known, names = vars(self).setdefault("known", {}), [mask.tobytes() for mask in masks]
        if new := [i for i, name in enumerate(names) if name not in known]:
            known |= zip((names[i] for i in new), super().change(masks[new]), strict=True)
        return np.stack([known[name] for name in names])


class Cache:
    """Linearised models of contexts, each made once."""

    def __init__(self, study: Study) -> None:
        self._progress = study.progress
        self._models: dict[tuple[str, int], tuple[Linearised, ...]] = {}
        self._responses: dict[tuple[str, int, int], LinearisedResponse] = {}  # which remember their weights

    def __call__(self, name: str, context: Context, k: int, n_logits: int = LOGITS) -> LinearisedResponse:
        """The response of the first k models, or all if they are fewer, of the context that is known by this name."""
        models, known = context.subset_models()[:k], self._models.get((name, n_logits), ())
        if len(known) < models.n_models:
            self._progress(f"linearised models ({name})", len(known), k)
            some = replace(context, models=models)
            more = linearised_response(some, n_models=None, n_logits=n_logits, first=len(known))
            known += tuple(Remembering(*(getattr(m, f.name) for f in fields(m))) for m in more.models)
            self._models[name, n_logits] = known
            self._progress(f"linearised models ({name})", k, k)
        return self._responses.setdefault((name, n_logits, k), LinearisedResponse(known[:k]))


def ridge(study: Study, size: int, evaluator: Evaluator) -> Rows:
    """Compute p95 KLoM and LDS of ridge on margins with the first `size` subset models of halves.

    Penalty and share of it on own weights are those of `tuned_ridge`. The LDS is that of the penalty that has the best
    LDS on the first half of the held-out subsets, reported on the second.
    """
    masks, outputs = study.subsets()
    masks, margins = masks[:size], label_logits(study, outputs[:size])
    study.progress(f"ridge on {size} models", 0, 1)
    setting = tuned_ridge(study, masks, margins)
    model = RidgeDatamodel.fit(masks, margins[:, :, None], device=study.device, **setting)
    rows = evaluator.judged(model, study.datamodel_of(size)[0])
    study.progress(f"ridge on {size} models", 1, 1)
    return rows


def curve(study: Study, cache: Cache) -> pd.DataFrame:
    """Compute p95 KLoM of DM-direct on the reported forget sets, and LDS, against the number of subset models.

    Returns:
        Columns attributor ("bayesian", "ridge", "ridge, raw logits", "do nothing", "floor", "true mean shift": what no
        better prediction of means beats), n_models, draw, forget_set, split, statistic ("klom_p95", "lds"), value, low,
        high (of the LDS, over held-out subsets).
    """
    evaluator, parts, y = Evaluator.reported(study), list[pd.DataFrame](), study.data.y
    sets, before, n, m = evaluator.sets, evaluator.before, len(evaluator.before), study.preset.datamodels.n_subsets

    def add(attributor: str, rows: Rows, n_models: int = 0, draw: int = 0) -> None:
        parts.append(pd.DataFrame(rows).assign(attributor=attributor, n_models=n_models, draw=draw))

    add("do nothing", evaluator.rows(lambda _: before))
    add("floor", evaluator.rows(lambda name: metrics.margins(study.oracles(sets[name], floor=True, n=n), y)))
    add("true mean shift", evaluator.rows(lambda name: before + evaluator.oracles[name].mean(0) - before.mean(0)))
    for size in (size for size in study.preset.datamodels.sizes if size <= m):
        add("ridge", ridge(study, size, evaluator), size)
    logits, raw = study.original_logits()[:n], study.datamodel()
    bent = evaluator.rows(lambda name: metrics.margins(raw.retrained(logits, sets[name].indices, y), y))
    add("ridge, raw logits", bent, m)
    for size in sizes(study.preset):
        for draw, start in enumerate(draws(study.preset, size)):
            context = pool(study, start, start + size)
            model = bayesian.fit(context, cache(f"draw {start}", context, context.subset_models().n_models))
            add("bayesian", evaluator.judged(model), size, draw)
    columns = ["attributor", "n_models", "draw", "forget_set", "split", "statistic", "value", "low", "high"]
    return pd.concat(parts, ignore_index=True)[columns]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise `curve` by medians over forget sets (of each set's mean over draws) and 95 % intervals over sets.

    The LDS is the mean over draws; its interval is over draws where there are several, else over held-out subsets.
    """
    keys, rows = ["attributor", "n_models", "statistic", "split"], []
    for key, part in table.groupby(keys, sort=False):
        if key[2] == "klom_p95":
            e = median_over(part.groupby("forget_set", sort=False)["value"].mean())
        elif len(part) > 1:
            e = mean_over(part["value"].to_numpy())
        else:
            e = Estimate(*part[["value", "low", "high"]].iloc[0])
        rows.append((*key, *astuple(e), part["draw"].nunique()))
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high", "n_draws"])


def kind_of(forget_set: ForgetSet) -> str:
    """Return whether a forget set is "random", or a "group" of points that belong together."""
    return "random" if forget_set.made_by.get("kind") == "random" else "group"


def by_set(study: Study, model: Attributor) -> pd.Series:
    """Compute p95 KLoM of DM-direct on the reported forget sets, indexed by forget_set, kind and split."""
    evaluator = Evaluator.reported(study)
    found = pd.DataFrame(evaluator.klom(evaluator.gauged(model)))
    found["kind"] = found["forget_set"].map({name: kind_of(f) for name, f in evaluator.sets.items()})
    return found.set_index(["forget_set", "kind", "split"])["value"]


def uncertainty(study: Study, model: BayesianDatamodel, level: float = 0.95) -> pd.DataFrame:
    """Set predicted changes of mean margins, with the posterior's sd, beside true ones on the reported forget sets.

    Returns:
        For each forget set and point: forget_set, kind ("random" or "group"), split, predicted, true, sd (of the
        prediction), se (of the true change, from N originals and N oracles), z, covered (whether by the interval
        of that level).
    """
    evaluator, parts = Evaluator.reported(study), []
    for name, f in evaluator.sets.items():
        before, oracle = evaluator.before, evaluator.oracles[name]
        se = np.sqrt(before.var(0, ddof=1) / len(before) + oracle.var(0, ddof=1) / len(oracle))
        predicted, sd = label_logits(study, model.effects([f.indices])[0]), model.sd(f.indices)
        true = oracle.mean(0) - before.mean(0)
        z = (true - predicted) / np.sqrt(sd**2 + se**2)
        every = pd.DataFrame({"predicted": predicted, "true": true, "sd": sd, "se": se, "z": z})
        for split, at in study.splits(f, probes=False).items():
            parts.append(every.iloc[at].assign(forget_set=name, kind=kind_of(f), split=split))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(covered=table["z"].abs() <= norm.ppf(0.5 + level / 2))


def calibration(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise `uncertainty` by forget set and split: rms_z, coverage, slope of the true on the predicted change."""
    p, true, z = table["predicted"], table["true"], table["z"]
    products = table.assign(pp=p * p, pt=p * true, zz=z * z).groupby(["forget_set", "kind", "split"], sort=False)
    mean = products[["pp", "pt", "zz", "covered"]].mean()
    found = {"rms_z": np.sqrt(mean["zz"]), "coverage": mean["covered"], "slope": mean["pt"] / mean["pp"].clip(1e-12)}
    return pd.DataFrame(found).reset_index()


PAIRS: dict[str, dict[str, Any]] = {
    "fashion-mnist, mlp": {"data.name": "fashion-mnist", "model": {"name": "mlp"}},
    "digits, mlp": {"data.name": "digits", "model": {"name": "mlp", "options": {"hidden": 64}}},
    "fashion-mnist, convnet": {"data.name": "fashion-mnist", "training.lr": 0.05,
                               "model": {"name": "convnet", "options": {"width": 4}}},
}  # fmt: skip
"""Data / model pairs, as overrides of the preset `replicate`."""


def replicate(study: Study) -> pd.DataFrame:
    """Compare Bayesian from the preset's few subset models with ridge from its many, on the study's forget sets.

    Returns:
        Columns attributor ("bayesian", "ridge", "do nothing"), n_models, forget_set, kind, split, statistic, value.
    """
    evaluator, model, many = Evaluator.reported(study), study.attributor("bayesian"), study.preset.datamodels.n_subsets
    assert isinstance(model, BayesianDatamodel)
    found = {
        ("do nothing", 0): evaluator.rows(lambda _: evaluator.before),
        ("ridge", many): ridge(study, many, evaluator),
        ("bayesian", study.preset.attribution.n_subsets): evaluator.judged(model),
    }
    table = pd.concat([pd.DataFrame(rows).assign(attributor=name, n_models=n) for (name, n), rows in found.items()])
    table["kind"] = table["forget_set"].map({name: kind_of(f) for name, f in evaluator.sets.items()}).fillna("every")
    return table[["attributor", "n_models", "forget_set", "kind", "split", "statistic", "value"]]


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Divide p95 KLoM of Bayesian by ridge's (LDS: subtract), from `replicate` with columns pair and seed.

    Returns:
        Columns pair, seed, kind, split, value: the geometric mean over forget sets of that kind.
    """
    keys = ["pair", "seed", "kind", "split"]
    wide = table.pivot_table(index=[*keys, "forget_set"], columns="attributor", values="value", sort=False)
    is_lds = wide.index.get_level_values("split") == "all"
    logs = (wide["bayesian"] / wide["ridge"]).map(np.log).where(~is_lds, wide["bayesian"] - wide["ridge"])
    found = logs.groupby(keys, sort=False).mean().rename("value").reset_index()
    return found.assign(value=found["value"].where(found["split"] == "all", np.exp(found["value"])))


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Average `ratios` over seeds, as `averaged` does, for each pair, kind and split."""
    return averaged(table, ["pair", "kind", "split"], "value")


def averaged(table: pd.DataFrame, keys: list[str], column: str, level: float = metrics.LEVEL) -> pd.DataFrame:
    """Average ratios (geometrically) or differences of LDS over draws or seeds, for each combination of keys.

    Returns:
        Columns `keys`, of which the last is "split", `column`, low, high (t-interval of 1 - `level`, NaN of one
        value), n.
    """
    rows = []
    for key, part in table.groupby(keys, sort=False):
        e = Estimate(part[column].iloc[0], np.nan, np.nan)
        if len(part) > 1:
            e = mean_over(part[column].to_numpy(), log=key[-1] not in LDS, level=level)
        rows.append((*key, *astuple(e), len(part)))
    return pd.DataFrame(rows, columns=[*keys, column, "low", "high", "n"])


def costs(study: Study, dmm_cost: float) -> pd.DataFrame:
    """Count what each way costs, in retrainings of one model; `dmm_cost` is that of DMM on one model.

    Returns:
        Columns way, models, once, request (for each), beats (the number of requests from which on the total is below
        that of retraining one model at each).
    """
    rows = [("retrain", 0, 0.0, 1.0)]
    for name, section in (("ridge", study.preset.datamodels), ("Bayesian", study.preset.attribution)):
        for way, request in (("DM-direct", 0.0), ("DMM", dmm_cost)):
            rows.append((f"{name}, {way}", section.n_subsets, section.n_subsets * section.fraction, request))
    table = pd.DataFrame(rows, columns=["way", "models", "once", "request"])
    beats = (table["once"] / (1 - table["request"])).floordiv(1) + 1
    return table.assign(beats=beats.where(table["request"] < 1, np.inf))
