"""Is the audit of `dmmlib.own` right? On models retrained for real, on untouched ones, and against KLoM's verdict.

    python benchmarks/audit.py development   # what its two limits were chosen on
    python benchmarks/audit.py report        # other points, on which nothing was chosen

Every case is a forget set and a method. The audit judges single models, ten of each case, and may say that it cannot
tell; KLoM judges the case by 40 models and 40 oracles: forgotten if its mean over F is nearer to the retrain floor than
to that of doing nothing.
"""

import sys
import tempfile
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from dmmlib import forget_sets, metrics, unlearn
from dmmlib.analysis.intervals import wilson
from dmmlib.own.audit import verdict
from dmmlib.progress import silent
from dmmlib.study import Study

RESULTS = Path(__file__).parent / "results"
MODELS = {"mlp": {"hidden": 48}, "convnet": {"width": 4}}
DATA = {
    "development": [("fashion-mnist", "mlp", 3), ("fashion-mnist", "convnet", 3), ("digits", "convnet", 4)],
    "report": [(name, model, seed) for seed, name in ((23, "fashion-mnist"), (24, "digits")) for model in MODELS],
}
N_MODELS, N_AUDITED = 40, 10
GA = [("ga", {"lr": lr, "epochs": e}) for lr in (1e-3, 3e-3, 1e-2, 3e-2) for e in (2.0, 5.0)]
GD = [("gd", {"lr": lr, "epochs": 5.0}) for lr in (1e-2, 5e-2, 2e-1)]
BOTH = [("ga_gd", {"lr": lr, "ascent_epochs": a, "descent_epochs": 5.0}) for lr in (3e-3, 1e-2) for a in (3.0, 6.0)]
METHODS = [*GA, *GD, *BOTH, ("newton", {}), ("dmm", {}), ("oracle_matching", {})]


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
            judged = SimpleNamespace(forgotten=f.indices, prepared=s, sd=s.attributor().sd(f.indices))
            found = verdict(
                judged,
                np.concatenate([m[:N_AUDITED] for m in margins.values()]),
                np.tile(before[:N_AUDITED], (len(margins), 1)),
            )
            for j, (key, m) in enumerate(margins.items()):
                klom = metrics.klom(m[:, f.indices], oracle[:, f.indices]).mean()
                for i in range(N_AUDITED):
                    k = j * N_AUDITED + i
                    numbers = (found.remainder[k], found.sd[k], found.misfit[k], found.score[k], found.forgotten(k))
                    rows.append((f"{name}-{model}-{seed}", label, len(f), key, i, klom, *numbers))
            print(name, model, seed, label, flush=True)
    columns = [
        "data",
        "forget_set",
        "size",
        "method",
        "model",
        "klom",
        "remainder",
        "sd",
        "misfit",
        "score",
        "by_audit",
    ]
    return pd.DataFrame(rows, columns=columns)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """Add what is left by KLoM, 0 at the retrain floor and 1 for doing nothing, and its verdict."""
    ends = table.groupby(["data", "forget_set", "method"])["klom"].first().unstack()
    ends = ends.loc[pd.MultiIndex.from_frame(table[["data", "forget_set"]])]
    floor, nothing = ends["retrain"].to_numpy(), ends["do_nothing"].to_numpy()
    return table.assign(left=(left := (table["klom"] - floor) / (nothing - floor)), by_klom=left <= 0.5)


def auc(score: pd.Series, by_klom: pd.Series) -> float:
    """How well a score ranks what KLoM calls not forgotten above what it calls forgotten."""
    out, back = score[~by_klom], score[by_klom]
    return float(mannwhitneyu(out, back).statistic / (len(out) * len(back))) if len(out) and len(back) else np.nan


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The shares and areas that the audit is held to, for each data set and over all."""
    parts = {**dict(list(table.groupby("data", sort=False))), "all": table}
    return pd.concat([_summary(part).assign(data=name) for name, part in parts.items()])[
        ["data", "statistic", "value", "low", "high", "n"]
    ]


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    of, rows = table["method"].str.split().str[0], list[tuple[object, ...]]()
    for name, words in (("retrain", "retrained"), ("do_nothing", "untouched")):
        said = table[of == name]["by_audit"]
        told = said.dropna().astype(bool)
        rows.append((f"{words}: can be told", *astuple(wilson(len(told), len(said))), len(said)))
        if len(told):
            share = wilson(int(told.sum()), len(told))
            rows.append((f"{words}, where told: called forgotten", *astuple(share), len(told)))
    known = table["by_audit"].notna().where(of == "do_nothing").groupby([table["data"], table["forget_set"]])
    tells = known.transform("mean") >= 0.5
    groups = {"GD and GA": of.isin(["ga", "gd", "ga_gd"]), "all methods": of.notna()}
    for words, which in groups.items():
        cases = table[which & tells].groupby(["data", "forget_set", "method"])
        by_klom = cases["by_klom"].first()
        if not len(by_klom):
            continue
        for name, score in (("one model", cases["score"].first()), ("median of ten", cases["score"].median())):
            draws = np.random.default_rng(0).integers(0, len(score), (1000, len(score)))
            low, high = np.nanpercentile([auc(score.iloc[d], by_klom.iloc[d]) for d in draws], [2.5, 97.5])
            rows.append((f"AUC against KLoM, {words}, {name}", auc(score, by_klom), low, high, len(score)))
        forgotten, halfway = int(by_klom.sum()), int((by_klom & (cases["left"].first() > 0.25)).sum())
        rows.append((f"{words}: called forgotten by KLoM", *astuple(wilson(forgotten, len(by_klom))), len(by_klom)))
        if forgotten:
            rows.append(
                (f"{words}: of these halfway, above a quarter", *astuple(wilson(halfway, forgotten)), forgotten)
            )
    return pd.DataFrame(rows, columns=["statistic", "value", "low", "high", "n"])


if __name__ == "__main__":
    which = sys.argv[1] if len(sys.argv) > 1 else "report"
    parts = list[pd.DataFrame]()
    for case in DATA[which]:
        parts.append(measured(*case))
        table = judged(pd.concat(parts, ignore_index=True))
        table.to_csv(RESULTS / f"audit-{which}.csv", index=False, float_format="%.4g")
    summary(table).to_csv(RESULTS / f"audit-{which}-summary.csv", index=False, float_format="%.4g")
    print(summary(table).to_string(index=False))
