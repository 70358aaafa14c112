"""Is the audit of `dmmlib.own` right? On models retrained for real, on untouched ones, and against KLoM's verdict.

    python benchmarks/audit.py development   # what its two limits were chosen on
    python benchmarks/audit.py report        # other points and data, on which nothing was chosen

Every case is a forget set and a method. The audit judges single models, ten of each case; KLoM judges the case by 40
models and 40 oracles: forgotten if its mean over F is nearer to the retrain floor than to that of doing nothing.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from dmmlib import forget_sets, metrics, unlearn
from dmmlib.own.audit import MISFIT, REMAINDER, verdict
from dmmlib.progress import silent
from dmmlib.study import Study

RESULTS = Path(__file__).parent / "results"
DATA = {
    "development": [("fashion-mnist", 3)],
    "report": [("fashion-mnist", 11), ("digits", 12)],
}
N_MODELS, N_AUDITED = 40, 10
GA = [("ga", {"lr": lr, "epochs": e}) for lr in (1e-3, 3e-3, 1e-2, 3e-2) for e in (2.0, 5.0)]
GD = [("gd", {"lr": lr, "epochs": 5.0}) for lr in (1e-2, 5e-2, 2e-1)]
BOTH = [("ga_gd", {"lr": lr, "ascent_epochs": a, "descent_epochs": 5.0}) for lr in (3e-3, 1e-2) for a in (3.0, 6.0)]
METHODS = [*GA, *GD, *BOTH, ("newton", {}), ("dmm", {}), ("oracle_matching", {})]


def study(name: str, seed: int, runs: str) -> Study:
    one = {"kind": "random", "size": 1}
    preset = {
        "name": "audit",
        "seed": seed,
        "data": {"name": name, "n_train": 600, "n_val": 200, "seed": seed},
        "model": {"name": "mlp", "options": {"hidden": 48}},
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


def measured(name: str, seed: int) -> pd.DataFrame:
    """One row for each forget set, method and audited model."""
    rows = []
    with tempfile.TemporaryDirectory() as runs:
        s = study(name, seed, runs)
        for label, indices in sets(s, seed).items():
            f = forget_sets.make(label, indices, s.data)
            oracle, problem = s.reference(f)[0], s.problem(f, "dmm")
            retrained = metrics.margins(s.oracles(f, floor=True), s.data.y)
            margins = {"do_nothing": metrics.margins(s.original_logits(), s.data.y), "retrain": retrained}
            for method, options in METHODS:
                key = " ".join([method, *(f"{k}={v:g}" for k, v in options.items())])
                margins[key] = unlearn.get(method)(problem, **options).margins
            judged = SimpleNamespace(forgotten=f.indices, prepared=s, sd=s.attributor().sd(f.indices))
            for key, m in margins.items():
                klom = metrics.klom(m[:, f.indices], oracle[:, f.indices]).mean()
                for i, (remainder, misfit) in enumerate(zip(*verdict(judged, m[:N_AUDITED]), strict=True)):
                    rows.append((f"{name}-{seed}", label, len(f), key, i, klom, remainder, misfit))
            print(name, seed, label, flush=True)
    return pd.DataFrame(rows, columns=["data", "forget_set", "size", "method", "model", "klom", "remainder", "misfit"])


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """Add both verdicts, and the audit's score: above 1 is not forgotten."""
    ends = table.groupby(["data", "forget_set", "method"])["klom"].first().unstack()
    middle = (ends["retrain"] + ends["do_nothing"]) / 2
    table["by_klom"] = table["klom"] <= middle.loc[pd.MultiIndex.from_frame(table[["data", "forget_set"]])].to_numpy()
    table["score"] = np.maximum(table["remainder"] / REMAINDER, table["misfit"] / MISFIT)
    table["by_audit"] = (table["remainder"] <= REMAINDER) & (table["misfit"] <= MISFIT)
    return table


def auc(score: pd.Series, by_klom: pd.Series) -> float:
    """How well a score ranks what KLoM calls not forgotten above what it calls forgotten."""
    out, back = score[~by_klom], score[by_klom]
    return float(mannwhitneyu(out, back).statistic / (len(out) * len(back))) if len(out) and len(back) else np.nan


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The shares and areas that the audit is held to."""
    of = table["method"].str.split().str[0]
    gradient = table[of.isin(["ga", "gd", "ga_gd"])]
    first, cases = gradient[gradient["model"] == 0], gradient.groupby(["data", "forget_set", "method"])
    found = {
        "retrained called forgotten": (table[of == "retrain"]["by_audit"].mean(), (of == "retrain").sum()),
        "untouched called forgotten": (table[of == "do_nothing"]["by_audit"].mean(), (of == "do_nothing").sum()),
        "AUC against KLoM, GD and GA, one model": (auc(first["score"], first["by_klom"]), len(first)),
        "AUC against KLoM, GD and GA, median of ten models": (
            auc(cases["score"].median(), cases["by_klom"].first()),
            cases.ngroups,
        ),
        "of these called forgotten by KLoM": (first["by_klom"].mean(), len(first)),
    }
    return pd.DataFrame([(k, v, n) for k, (v, n) in found.items()], columns=["statistic", "value", "n"])


if __name__ == "__main__":
    which = sys.argv[1] if len(sys.argv) > 1 else "report"
    parts = list[pd.DataFrame]()
    for name, seed in DATA[which]:
        parts.append(measured(name, seed))
        table = judged(pd.concat(parts, ignore_index=True))
        table.to_csv(RESULTS / f"audit-{which}.csv", index=False, float_format="%.4g")
    summary(table).to_csv(RESULTS / f"audit-{which}-summary.csv", index=False, float_format="%.4g")
    print(summary(table).to_string(index=False))
