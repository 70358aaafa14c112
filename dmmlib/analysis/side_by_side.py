"""Attributors side by side, fitted to the same models: what each makes of an equal training cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, astuple, replace
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics, unlearn
from dmmlib.analysis.intervals import median_over
from dmmlib.attribution import Context, fit, get
from dmmlib.data import SPLITS
from dmmlib.datamodels import Attributor, RidgeDatamodel, effects_of, lds, lds_estimate, together
from dmmlib.errors import DataError, MethodError, OptionError
from dmmlib.forget_sets import ForgetSet
from dmmlib.metrics import Estimate
from dmmlib.study import Study
from dmmlib.tuning import score

TRAK_PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FLOOR, NOTHING = "retrain (floor)", "do nothing"
COLUMNS = ["attributor", "n_models", "method", "forget_set", "split", "statistic", "value", "low", "high"]
Unlearn = Callable[[Attributor, ForgetSet], np.ndarray]
"""Margins (n_models, n_points) of models that forgot a set by what an attributor predicts."""


def compare(
    settings: Mapping[str, tuple[str, Mapping[str, Any]]],
    context: Context,
    held_out: tuple[np.ndarray, np.ndarray],
    oracles: Mapping[str, tuple[ForgetSet, np.ndarray]],
    methods: Mapping[str, Unlearn] | None = None,
) -> pd.DataFrame:
    """Fit each setting to the same context and measure it.

    Args:
        settings: label -> (registered name, options).
        context: what all of them are fitted to, with the originals' logits.
        held_out: masks (k, n_train) and logits (k, n_points, n_classes) of subset models that fitted nothing.
        oracles: name -> a forget set, and the logits (n_oracles, n_points, n_classes) of models retrained without it.
        methods: of unlearning by an attributor, besides DM-direct, e.g. DMM.

    Returns:
        Tidy, columns `COLUMNS`; n_models are the subset models spent. Statistics: "cost" of these (retrainings) and
        "seconds" of the fit; "lds" on held-out subsets (over all points), with a 95 % interval over subsets; for each
        method, forget set and split "klom_mean" and "klom_p95"; and of DM-direct also "slope" of the true on the
        predicted change of mean margins, through the origin (1 is calibrated; below 1 overstates).

    Raises:
        MethodError: for a name that is not registered, before anything is fitted.
        DataError: for a context without the originals' logits.
    """
    for name, _ in settings.values():
        get(name)
    if context.original_logits is None:
        raise DataError("DM-direct starts from the originals; give the context `original_logits`.")
    before = metrics.margins(context.original_logits, context.labels)
    true = {name: metrics.margins(logits, context.labels) for name, (_, logits) in oracles.items()}
    rows: list[tuple[Any, ...]] = []
    none = np.nan, np.nan  # no interval
    for label, (name, options) in settings.items():
        start = time.perf_counter()
        attributor = fit(name, context, **options)
        seconds = time.perf_counter() - start
        predicted = metrics.right_logits(attributor.predict(held_out[0]), context.labels)
        ranked = lds_estimate(predicted, metrics.margins(held_out[1], context.labels))
        spent = label, len(context.masks)
        rows.append((*spent, "", "", "all", "cost", float(context.masks.mean(1).sum()), *none))
        rows.append((*spent, "", "", "all", "seconds", seconds, *none))
        rows.append((*spent, "", "", "all", "lds", *astuple(ranked)))
        effects = attributor.effects([forget_set.indices for forget_set, _ in oracles.values()])
        for (forget, (forget_set, _)), effect in zip(oracles.items(), effects, strict=True):
            splits = forget_set.splits(context.n_train, len(context.x) - context.n_train)
            change = metrics.right_logits(effect, context.labels)
            answers = {"dm_direct": before + change}
            answers |= {method: unlearn(attributor, forget_set) for method, unlearn in (methods or {}).items()}
            for method, margins in answers.items():
                klom = metrics.klom(margins, true[forget])
                for (split, at), (statistic, measure) in itertools.product(splits.items(), metrics.STATISTICS.items()):
                    rows.append((*spent, method, forget, split, f"klom_{statistic}", float(measure(klom[at])), *none))
            said, happened = (m.mean(0) - before.mean(0) for m in (answers["dm_direct"], true[forget]))
            for split, at in splits.items():
                slope = float(said[at] @ happened[at]) / max(float(said[at] @ said[at]), 1e-12)
                rows.append((*spent, "dm_direct", forget, split, "slope", slope, *none))
    return pd.DataFrame(rows, columns=COLUMNS)


def side_by_side(
    study: Study,
    settings: Mapping[str, Mapping[str, Any]],
    forget_sets: Mapping[str, ForgetSet],
    sizes: Iterable[int] = (),
    n_models: int = 16,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """`compare` registered attributors (name -> options) on the study's own subset models, by DM-direct and DMM.

    Ridge has the setting of `tuned_ridge`, TRAK that of `tuned_trak`, DMM the one that was tuned with the study's own
    attributor. LDS is on the held-out subsets that report. `n_models` originals are unlearned, and compared with all
    oracles.

    Args:
        sizes: of the many subset models of halves, how many ridge is fitted to as well, for reference.

    Returns:
        The table of `compare`, with rows of doing nothing and of retraining again; and, of each attributor that cannot
        be fitted here, why.
    """
    masks, outputs = study.held_out()
    half, before = len(masks) // 2, study.original_logits()[:n_models]
    oracles = {name: (f, study.oracles(f)) for name, f in forget_sets.items()}
    methods = {"dmm": _dmm(study, len(before))}

    def run(label: str, name: str, options: Mapping[str, Any], context: Context) -> pd.DataFrame:
        study.progress(f"attributor {label}", 0, 1)
        if name == "ridge":
            options = tuned_ridge(study, context.masks, context.margins) | dict(options)
        elif name == "trak":
            options = tuned_trak(context, (masks[:half], outputs[:half])) | dict(options)
        context = replace(context, original_logits=before)
        table = compare({label: (name, options)}, context, (masks[half:], outputs[half:]), oracles, methods)
        study.progress(f"attributor {label}", 1, 1)
        return table

    parts, missing = [_ends(study, oracles, len(before))], {}
    for name, options in settings.items():
        try:
            parts.append(run(name, name, options, study.context()))
        except (MethodError, OptionError, DataError) as error:
            missing[name] = str(error)
    for size in sizes:
        many, answers = study.subsets()
        context = Context(study.x, study.y, many[:size], answers[:size])
        parts.append(run(f"ridge, {size:,} models", "ridge", {}, context))
    return pd.concat(parts, ignore_index=True), missing


def tuned_ridge(study: Study, masks: np.ndarray, margins: np.ndarray) -> dict[str, float]:
    """Choose ridge's penalty, and its share on own weights, by DM-direct's p95 KLoM on the tuning sets.

    Masks (M, n_train) and margins (M, n_points) are those of the subset models that it is fitted to.
    """
    y, n = study.data.y, study.preset.tuning.n_models
    before = metrics.margins(study.original_logits()[:n], y)
    sets = [(f, metrics.margins(study.oracles(f)[:n], y)) for f in study.tuning_sets().values()]

    scores, settings = list[float](), [(s["lam"], s["own_share"]) for s in study.preset.datamodels.grid]
    for some in together(settings, *masks.shape):
        models = RidgeDatamodel.fit_all(masks, margins[:, :, None], some, study.device)
        for changes in effects_of(models, [f.indices for f, _ in sets]):
            found = zip(before + changes[:, None, :, 0], sets, strict=True)
            each = [score(z, oracle, study.splits(f, probes=False))["score"] for z, (f, oracle) in found]
            scores.append(float(np.mean(each)))
    return study.preset.datamodels.grid[int(np.argmin(scores))]


def tuned_trak(context: Context, held_out: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Choose TRAK's penalty by the LDS on held-out subset models, with features of a single model."""
    margins = metrics.margins(held_out[1], context.labels)

    def score_of(regularization: float) -> float:
        found = fit("trak", context, n_models=1, regularization=regularization).predict(held_out[0])
        return lds(metrics.right_logits(found, context.labels), margins).mean()

    return {"regularization": max(TRAK_PENALTIES, key=score_of)}


def _dmm(study: Study, n_models: int) -> Unlearn:
    setting = study.tuned("dmm")

    def run(attributor: Attributor, forget_set: ForgetSet) -> np.ndarray:
        originals, logits = study.originals()[:n_models], study.original_logits()[:n_models]
        problem = replace(study.problem(forget_set), originals=originals, original_logits=logits, checkpoints=0)
        return unlearn.get("dmm")(replace(problem, attributor=attributor), **setting).margins

    return run


def _ends(study: Study, oracles: Mapping[str, tuple[ForgetSet, np.ndarray]], n_models: int) -> pd.DataFrame:
    """p95 KLoM of doing nothing, and of as many models retrained once more."""
    rows = []
    for name, (f, logits) in oracles.items():
        ends = {NOTHING: study.original_logits()[:n_models], FLOOR: study.oracles(f, floor=True)[:n_models]}
        reference = metrics.margins(logits, study.data.y)
        for attributor, answers in ends.items():
            found = score(metrics.margins(answers, study.data.y), reference, study.splits(f, probes=False))
            rows += [(attributor, 0, "", name, split, "klom_p95", found[split]) for split in SPLITS]
    return pd.DataFrame(rows, columns=COLUMNS[:-2])


def over_sets(table: pd.DataFrame) -> pd.DataFrame:
    """Take medians over forget sets, with 95 % bootstrap intervals; rows without a forget set stay as they are."""
    keys, ends = ["attributor", "n_models", "method", "split", "statistic"], ["value", "low", "high"]

    def row(part: pd.DataFrame) -> pd.Series:
        found = median_over(part["value"]) if part["forget_set"].iloc[0] else Estimate(*part[ends].iloc[0])
        return pd.Series(asdict(found))

    return table.groupby(keys, sort=False)[["forget_set", *ends]].apply(row).reset_index()


def best(table: pd.DataFrame, n_models: int) -> tuple[list[str], list[str]]:
    """Find the attributors that none is ahead of, from so many models: by LDS, and by DMM's p95 KLoM on forget points.

    The first of each has the best value. Others stay whose LDS has an interval that reaches it, or whose KLoM is not
    above the first's by the paired interval over forget sets (median of log ratios).
    """
    here = table[table["n_models"] == n_models]
    rank = here[here["statistic"] == "lds"].sort_values("value", ascending=False)
    tied = rank.loc[rank["high"] >= rank["low"].iloc[0], "attributor"]
    part = here[(here["method"] == "dmm") & (here["split"] == "forget") & (here["statistic"] == "klom_p95")]
    wide = part.pivot_table(index="forget_set", columns="attributor", values="value")
    logs = wide.apply(np.log)
    order = list(logs.median().sort_values().index)
    return list(tied), [name for name in order if median_over(logs[name] - logs[order[0]]).low <= 0]


def wide(medians: pd.DataFrame) -> pd.DataFrame:
    """Lay `over_sets` out for a reader: one line for each attributor."""
    rows: dict[str, dict[str, str]] = {}
    for name, here in medians.groupby("attributor", sort=False):
        at = here.set_index(["method", "split", "statistic"])
        value, row = at["value"], dict[str, str]()
        if ("", "all", "lds") in at.index:
            row["subset models"] = f"{at['n_models'].iloc[0]:,}"
            row["retrainings"] = f"{value['', 'all', 'cost']:,.0f}"
            row["fit, s"] = f"{value['', 'all', 'seconds']:.3g}"
            row["LDS"] = str(Estimate(*at.loc[("", "all", "lds"), ["value", "low", "high"]]))
            row["slope on F"] = f"{value['dm_direct', 'forget', 'slope']:.2f}"
        for split in SPLITS:
            found = [value.get((method, split, "klom_p95")) for method in ("dm_direct", "dmm", "")]
            row[split] = " / ".join(f"{v:.2f}" for v in found if v is not None)
        rows[str(name)] = row
    columns = max(rows.values(), key=len)
    return pd.DataFrame(rows).T.reindex(columns=list(columns)).fillna("").rename_axis("attributor")
