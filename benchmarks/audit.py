"""Is the audit of `dmmlib.own` right? On models retrained for real, on untouched ones, and against KLoM's verdict.

    python benchmarks/audit.py development   # what its score and its cap were chosen on
    python benchmarks/audit.py report        # other points, on which nothing was chosen (33 to 54 were seen)

Every case is a forget set and a method. The audit judges single models, ten of each case, by predictions and by ten
retrained models, and may say that it cannot tell; KLoM judges the case by 40 models and 40 oracles: forgotten if its
mean over F is nearer to the retrain floor than to that of doing nothing, clearly so if not within .15 of the middle.
Where doing nothing is not above the floor, it cannot judge. How far it can be agreed with is seen by its own halves:
KLoM of 20 models and oracles against the verdict of the 20 others. Intervals resample forget sets, as models of one
set are told, or not, together.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from dmmlib import forget_sets, metrics, unlearn
from dmmlib.analysis.evaluators import membership_auc
from dmmlib.analysis.intervals import certain
from dmmlib.own.audit import verdict
from dmmlib.progress import silent
from dmmlib.study import Study

RESULTS = Path(__file__).parent / "results"
MODELS = {"mlp": {"hidden": 48}, "convnet": {"width": 4}}
DATA = {
    "development": [
        *(("fashion-mnist", model, seed) for model, seed in (("mlp", 3), ("mlp", 6), ("convnet", 3))),
        *(("digits", "mlp", seed) for seed in (4, 8)),
    ],
    "report": [(name, model, seed) for seed, name in ((63, "fashion-mnist"), (64, "digits")) for model in MODELS],
}
N_MODELS, N_AUDITED = 40, 10
GA = [("ga", {"lr": lr, "epochs": e}) for lr in (3e-3, 1e-2, 3e-2) for e in (2.0, 3.0, 5.0, 7.0, 10.0)]
GD = [("gd", {"lr": lr, "epochs": e}) for lr in (5e-2, 1e-1, 2e-1) for e in (5.0, 10.0)]
BOTH = [
    ("ga_gd", {"lr": lr, "ascent_epochs": a, "descent_epochs": d})
    for lr, a, d in itertools.product((3e-3, 1e-2, 3e-2), (3.0, 6.0), (3.0, 10.0))
]
METHODS = [*GA, *GD, *BOTH, ("newton", {}), ("dmm", {}), ("oracle_matching", {})]
HALF, CLEAR = 0.5, 0.15
HALVES = (slice(None), slice(0, N_MODELS // 2), slice(N_MODELS // 2, None))  # of the models and oracles
KLOMS = ("klom", "klom_first_half", "klom_second_half")
WAYS = {"predictions": "", "ten retrained models": "_by_retrained"}


def study(name: str, model: str, seed: int, runs: str) -> Study:
    one = {"kind": "random", "size": 1}
    preset = {
        "name": "audit",
        "seed": seed,
        "data": {"name": name, "n_train": 600, "n_val": 200, "seed": seed},
        "model": {"name": model, "options": MODELS[model]},
        "training": {"epochs": 15, "batch_size": 50, "lr": 0.1},
        "ensembles": {"n_models": N_MODELS, "compile": False, "chunk": 32},
        "attribution": {"n_subsets": 100},
        "forget_sets": [{"name": "unused", **one}],
        "tuning": {"forget_sets": [{"name": "tuning", **one}], "n_models": N_MODELS},
        "unlearning": {"checkpoints": 0},
    }
    return Study(preset, runs=runs, progress=silent)


def sets(s: Study, seed: int) -> dict[str, np.ndarray]:
    """Eight forget sets: random ones, neighbours, and halves of classes."""
    rng, features = np.random.default_rng(seed), s.features[: s.data.n_train]
    near = {
        f"nearest_{k}_{i}": forget_sets.nearest(features, int(rng.integers(600)), k) for i, k in enumerate((10, 30, 30))
    }
    classes = rng.permutation(s.data.n_classes)[:2]
    halves = {f"class_{c}": forget_sets.class_share(s.data, int(c), 0.5, rng) for c in classes}
    return {f"random_{k}": forget_sets.random(s.data, k, rng) for k in (5, 20, 50)} | near | halves


def measured(name: str, model: str, seed: int) -> pd.DataFrame:
    """One row for each forget set, method and audited model."""
    rows = []
    with tempfile.TemporaryDirectory() as runs:
        s = study(name, model, seed, runs)
        for label, indices in sets(s, seed).items():
            f = forget_sets.make(label, indices, s.data)
            oracle, problem = s.reference(f)[0], s.problem(f, "dmm")
            retrained = metrics.margins(s.oracles(f, floor=True), s.data.y)
            before = metrics.margins(s.original_logits(), s.data.y)
            margins = {"do_nothing": before, "retrain": retrained}
            for method, options in METHODS:
                key = " ".join([method, *(f"{k}={v:g}" for k, v in options.items())])
                margins[key] = unlearn.get(method)(problem, **options).margins
            margins = {key: m for key, m in margins.items() if np.isfinite(m).all()}  # all others diverged
            sd = s.attributor().sd(f.indices)
            judged = SimpleNamespace(forget=f.indices, forgotten=f.indices, prepared=s, sd=sd)
            audited = np.concatenate([m[:N_AUDITED] for m in margins.values()])
            start = np.tile(before[:N_AUDITED], (len(margins), 1))
            found = [verdict(judged, audited, start, given) for given in (None, oracle[:N_AUDITED])]
            kloms = {
                key: [metrics.klom(m[h][:, f.indices], oracle[h][:, f.indices]).mean() for h in HALVES]
                for key, m in margins.items()
            }
            for k, (key, i) in enumerate(itertools.product(margins, range(N_AUDITED))):
                said = [v for way in found for v in (way.left[k], way.doubt[k], way.forgotten(k))]
                rows.append((f"{name}-{model}-{seed}", label, len(f), key, i, *kloms[key], *said))
            print(name, model, seed, label, flush=True)
    by = [f"{what}{way}" for way in WAYS.values() for what in ("left", "doubt", "forgotten")]
    return pd.DataFrame(rows, columns=["data", "forget_set", "size", "method", "model", *KLOMS, *by])


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """Add what is left by KLoM, 0 at the retrain floor and 1 for doing nothing, of all models and of halves of them."""
    found = table.copy()
    for column in KLOMS:
        ends = table.groupby(["data", "forget_set", "method"])[column].first().unstack()
        ends = ends.loc[pd.MultiIndex.from_frame(table[["data", "forget_set"]])]
        floor, nothing = ends["retrain"].to_numpy(), ends["do_nothing"].to_numpy()
        found[f"left_by_{column}"] = np.where(nothing > floor, (table[column] - floor) / (nothing - floor), np.nan)
    return found.assign(by_klom=found["left_by_klom"] <= HALF)


def auc(score: np.ndarray, by_klom: np.ndarray) -> float:
    """How well a score ranks what KLoM calls not forgotten above what it calls forgotten."""
    out, back = score[~by_klom], score[by_klom]
    return float(membership_auc(out[None], back[None])[0]) if len(out) and len(back) else np.nan


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The shares and areas that the audit is held to, for each data set and over all."""
    parts = {**dict(list(table.groupby("data", sort=False))), "all": table}
    return pd.concat([_summary(part).assign(data=name) for name, part in parts.items()])[
        ["data", "statistic", "value", "low", "high", "n", "sets"]
    ]


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    table = table.set_index(["data", "forget_set"])
    of, rows = table["method"].str.split().str[0], list[tuple[object, ...]]()
    for way, column in WAYS.items():
        says = table[f"forgotten{column}"]
        for name, words in (("retrain", "retrained"), ("do_nothing", "untouched")):
            said = says[of == name]
            told = said.dropna().astype(bool)
            rows.append((f"by {way}, {words}: can be told", *interval(np.mean, said.notna())))
            if len(told):
                rows.append((f"by {way}, {words}, where told: called forgotten", *interval(np.mean, told)))
        tells = says.notna().where(of == "do_nothing").groupby(["data", "forget_set"])
        tells = tells.transform("mean") >= HALF
        for words, which in {"GD and GA": of.isin(["ga", "gd", "ga_gd"]), "all methods": of.notna()}.items():
            cases = table[which & tells & table["left_by_klom"].notna()].groupby(["data", "forget_set", "method"])
            score, by_klom, far = cases[f"left{column}"], cases["by_klom"].first(), cases["left_by_klom"].first()
            if not len(by_klom):
                continue
            of_cases = {"one model": score.first(), "median of ten": score.median()}
            for name, found in of_cases.items():
                rows.append((f"by {way}, AUC against KLoM, {words}, {name}", *interval(auc, found, by_klom)))
            clear = (far - HALF).abs() > CLEAR
            found = interval(auc, of_cases["median of ten"][clear], by_klom[clear])
            rows.append((f"by {way}, AUC against KLoM, {words}, clear cases, median of ten", *found))
            halves = cases[["left_by_klom_first_half", "left_by_klom_second_half"]].first().dropna()
            found = interval(auc, halves.iloc[:, 0], halves.iloc[:, 1] <= HALF)
            rows.append((f"by {way}, AUC of KLoM itself, by half of the models, {words}", *found))
            rows.append((f"by {way}, {words}: called forgotten by KLoM", *interval(np.mean, by_klom)))
    return pd.DataFrame(rows, columns=["statistic", "value", "low", "high", "n", "sets"])


def interval(statistic: Callable[..., float], *columns: pd.Series) -> tuple[float, float, float, int, int]:
    """A statistic of some columns, a 95 % interval that resamples forget sets, and how many rows and sets there are.

    No resample of a share of 0 or 1 differs from it: there it is Wilson's, over sets.
    """
    values, by_set = [column.to_numpy() for column in columns], columns[0].groupby(["data", "forget_set"])
    sets = list(by_set.indices.values())
    picks = np.random.default_rng(0).integers(0, len(sets), (1000, len(sets)))
    rows = (np.concatenate([sets[i] for i in pick]) for pick in picks)
    low, high = np.nanpercentile([statistic(*(v[at] for v in values)) for at in rows], [2.5, 97.5])
    found = metrics.Estimate(float(statistic(*values)), float(low), float(high))
    found = certain(found, len(sets)) if statistic is np.mean else found
    return *astuple(found), len(values[0]), len(sets)


if __name__ == "__main__":
    which = sys.argv[1] if len(sys.argv) > 1 else "report"
    wanted = Parallel(2)(delayed(measured)(*case) for case in DATA[which])  # a core each
    table = judged(pd.concat(wanted, ignore_index=True))
    table.to_csv(RESULTS / f"audit-{which}.csv.gz", index=False, float_format="%.4g")
    summary(table).to_csv(RESULTS / f"audit-{which}-summary.csv", index=False, float_format="%.4g")
    print(summary(table).to_string(index=False))
