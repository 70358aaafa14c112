"""KLoM beside other evaluators: do they rank methods alike, where do they disagree, and how many models decide?

Every evaluator is a distance of unlearned models from oracles on F: 0 (or the floor, of finitely many models) where
they cannot be told apart, larger where they can, so that ranks compare.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, mannwhitneyu, spearmanr

from dmmlib import metrics
from dmmlib.analysis.intervals import wilson
from dmmlib.analysis.looks import label
from dmmlib.errors import DataError
from dmmlib.forget_sets import ForgetSet
from dmmlib.metrics import Convention, Estimate
from dmmlib.study import Study

EVALUATORS = {
    "klom_p95": "KLoM p95",
    "klom_mean": "KLoM mean",
    "u_lira": "U-LiRA accuracy",
    "ks": "KS",
    "accuracy_gap": "accuracy gap",
    "membership": "membership AUC gap",
}
Answers = tuple[np.ndarray, np.ndarray]
COLUMNS = ["forget_set", "method", "evaluator", "value", "low", "high", "n_models"]


# --- distances -------------------------------------------------------------------------------------------


def membership_auc(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute the AUC (n_models,) of an attacker who takes points of low loss for members; 0.5 tells nothing.

    The cross-entropy of a point is log(1 + exp(-margin)), so a threshold on one is a threshold on the other; the
    attack is that of Yeom et al., CSF 2018, at every threshold. The AUC is the probability that a member has the larger
    margin; ties count half.

    Takes margins (n_models, n_members), e.g. on F, and (n_models, n_others), e.g. on validation points. Raises
    DataError for numbers of models that differ, or no points.
    """
    if members.ndim != 2 or others.ndim != 2 or len(members) != len(others) or 0 in (*members.shape, *others.shape):
        raise DataError(
            f"The membership attack got margins of shape {members.shape} and {others.shape}; give (n_models, n_points) "
            "for the same models, at least one point each."
        )
    u = mannwhitneyu(members, others, axis=1, method="asymptotic").statistic
    return np.asarray(u) / (members.shape[1] * others.shape[1])


def distances(
    unlearned: Answers, oracle: Answers, forget: np.ndarray, n_train: int, n_bootstrap: int = 30
) -> dict[str, Estimate]:
    """Measure all of `EVALUATORS`, and "auc" of the membership attack itself, with 95 % intervals over models.

    U-LiRA's value is the larger of its mean accuracy on F and 0.5. The accuracy gap and the membership attack are
    absolute differences of unlearned models' and oracles' accuracies on F, and AUCs of F against validation points: the
    attack succeeds on oracles too where F is easier than validation points, without their having seen it. Models are
    resampled within the halves that U-LiRA fits and tests on, so that no model is in both.

    Args:
        unlearned, oracle: margins (n_models, n_points), training points first, and whether answers are correct.
        forget: indices of F.
    """
    u, o = (margins[:, forget] for margins, _ in (unlearned, oracle))
    summary = metrics.klom_summary(u, o, {"F": np.arange(len(forget))})["F"]
    found = {"klom_p95": summary["p95"], "klom_mean": summary["mean"]}
    rng = np.random.default_rng(0)
    draws = [(_within_halves(len(u), rng), _within_halves(len(o), rng)) for _ in range(n_bootstrap)]
    for name, evaluator, least in (("u_lira", metrics.u_lira, 0.5), ("ks", metrics.ks, 0.0)):
        sampled = [max(least, evaluator(u[one], o[other]).mean()) for one, other in draws]
        value = max(least, float(evaluator(u, o).mean()))
        found[name] = Estimate.normal(value, np.std(sampled, ddof=1), least=0)
    accuracies = [correct[:, forget].mean(1) for _, correct in (unlearned, oracle)]
    attacks = [membership_auc(margins[:, forget], margins[:, n_train:]) for margins, _ in (unlearned, oracle)]
    for name, (a, b) in (("accuracy_gap", accuracies), ("membership", attacks)):
        error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
        found[name] = Estimate.normal(abs(float(a.mean() - b.mean())), error, least=0)
    return found | {"auc": Estimate.of(attacks[0])}


def _within_halves(n: int, rng: np.random.Generator) -> np.ndarray:
    """n row numbers drawn with replacement, even ones in even places and odd ones in odd places."""
    drawn = np.zeros(n, int)
    for half in (0, 1):
        rows = np.arange(half, n, 2)
        drawn[half::2] = rng.choice(rows, len(rows))
    return drawn


def table(study: Study) -> pd.DataFrame:
    """Measure `distances` of every method on every forget set, and the oracles' own "auc": columns `COLUMNS`."""
    rows: list[list[Any]] = []
    n_train, n_models = study.data.n_train, study.preset.ensembles.n_models
    for f in study.forget_sets().values():
        oracle = study.reference(f)
        found = {"oracles": {"auc": Estimate.of(membership_auc(oracle[0][:, f.indices], oracle[0][:, n_train:]))}}
        for method in study.methods:
            u = study.unlearned(method, f)
            found[method] = distances((u.margins, u.correct), oracle, f.indices, n_train)
        rows += [
            [f.name, m, key, *astuple(e), n_models] for m, measured in found.items() for key, e in measured.items()
        ]
    return pd.DataFrame(rows, columns=COLUMNS)


# --- agreement and disagreement --------------------------------------------------------------------------


def agreement(measured: pd.DataFrame, n_bootstrap: int = 500) -> pd.DataFrame:
    """Compute the rank agreement of KLoM p95 with every other evaluator of `table`, over methods and forget sets.

    Intervals (95 %, percentiles) resample methods and forget sets, each with replacement: pairs that share either are
    not independent.

    Returns:
        Columns evaluator, statistic (kendall: tau-b, spearman), value, low, high, n_pairs.

    Raises DataError for fewer than two methods.
    """
    wide = measured[measured["method"] != "oracles"].pivot_table(
        index="method", columns=["evaluator", "forget_set"], values="value", sort=False
    )
    cube = {evaluator: wide[evaluator].to_numpy() for evaluator in EVALUATORS}
    base = cube.pop("klom_p95")
    n_methods, n_sets = len(base), base.size // len(base)
    if n_methods < 2:
        raise DataError(f"Rank agreement got {n_methods} method; give at least two.")
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(n_methods, size=n_methods), rng.integers(n_sets, size=n_sets)) for _ in range(n_bootstrap)]
    draws = [np.ix_(m, s) for m, s in pairs if len(np.unique(m)) > 2]  # of two methods a rank says nothing
    rows = []
    for evaluator, other in cube.items():
        for name, correlate in (("kendall", kendalltau), ("spearman", spearmanr)):
            sampled = [_correlation(correlate, base[at], other[at]) for at in draws]
            ends = np.nanpercentile(sampled, [2.5, 97.5]) if np.isfinite(sampled).any() else (np.nan, np.nan)
            rows.append([evaluator, name, _correlation(correlate, base, other), *ends, base.size])
    return pd.DataFrame(rows, columns=["evaluator", "statistic", "value", "low", "high", "n_pairs"])


def _correlation(correlate: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> float:
    return float(correlate(a.ravel(), b.ravel()).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def _ends(measured: pd.DataFrame) -> pd.DataFrame:
    """Rows (forget_set, method), columns (value, low or high; evaluator)."""
    methods = measured[measured["method"] != "oracles"]
    return methods.pivot_table(["value", "low", "high"], ["forget_set", "method"], "evaluator", sort=False)


def disagreements(measured: pd.DataFrame) -> pd.DataFrame:
    """List pairs of methods that KLoM p95 and another evaluator order oppositely, intervals apart on both.

    Columns forget_set, evaluator, nearer_by_klom, nearer_by_other, klom (of the two, in that order), other (likewise).
    """
    rows = []
    for forget_set, here in _ends(measured).groupby("forget_set", sort=False):
        at = here.droplevel("forget_set").swaplevel(axis=1)
        for evaluator in (y for y in EVALUATORS if not y.startswith("klom")):
            a, b = at["klom_p95"], at[evaluator]
            for one, two in itertools.permutations(at.index, 2):
                if a.loc[one, "high"] < a.loc[two, "low"] and b.loc[two, "high"] < b.loc[one, "low"]:
                    texts = [" / ".join(f"{t.loc[m, 'value']:.2f}" for m in (one, two)) for t in (a, b)]
                    rows.append([forget_set, evaluator, one, two, *texts])
    return pd.DataFrame(rows, columns=["forget_set", "evaluator", "nearer_by_klom", "nearer_by_other", "klom", "other"])


def named(pairs: pd.DataFrame) -> pd.DataFrame:
    """Shorten `disagreements`: for each method, which others an evaluator puts nearer to retraining, against KLoM."""
    keys = ["forget_set", "evaluator", "nearer_by_klom"]
    written = pairs.replace({"evaluator": EVALUATORS}).assign(
        **{column: pairs[column].map(label) for column in ("nearer_by_klom", "nearer_by_other")}
    )
    table = written.groupby(keys, sort=False)["nearer_by_other"].agg("; ".join).reset_index()
    return table.rename(columns=lambda name: name.replace("_", " "))


def told_apart(measured: pd.DataFrame) -> pd.DataFrame:
    """Say whether each evaluator tells each method from retraining: intervals apart, the method's above.

    Columns forget_set, method, then one bool for each evaluator; retraining itself is left out.
    """
    ends = _ends(measured)
    floor = ends["high"].xs("retrain", level="method").reindex(ends.index, level="forget_set")
    return (ends["low"] > floor)[list(EVALUATORS)].drop("retrain", level="method").reset_index()


# --- power -----------------------------------------------------------------------------------------------


def power(
    methods: Mapping[str, np.ndarray],
    retrained: np.ndarray,
    sizes: Sequence[int],
    *,
    n_bins: int = metrics.N_BINS,
    convention: Convention = "closed",
    n_draws: int = 100,
    level: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how often KLoM's 95th percentile tells a method from retraining, with N models of each.

    Under the null hypothesis unlearned models are further retrained ones: N and N of the retrained models, drawn
    without replacement and disjoint, give the floor for this N, and its quantile 1 - `level` the threshold. Power is
    the share of draws (N of the method's models, N retrained ones) that lie above it. Draws from the models at hand
    overlap, the more so the nearer N is to their number: power is of these models, and the interval (Wilson's, 95 %)
    of the draws alone.

    Args:
        methods: name -> margins (n_unlearned, n_points).
        retrained: margins (n_retrained, n_points) of every model trained on R, at least twice as many as a size.
        sizes: numbers of models N.

    Returns:
        One row for each method and size, and one of the floor (method "retrain"), whose power is `level` up to chance:
        columns method, n_models, n_bins, convention, median, low, high (KLoM p95 over draws, central 95 % of them),
        threshold, power, power_low, power_high.

    Raises DataError for sizes that the models at hand do not allow.
    """
    most = min([len(retrained) // 2, *(len(m) for m in methods.values())])
    if not sizes or not 2 <= min(sizes) <= max(sizes) <= most:
        raise DataError(
            f"Power was asked for at N = {', '.join(map(str, sizes)) or 'nothing'}; with these models use 2 to {most}."
        )
    rng = np.random.default_rng(seed)

    def p95(margins: np.ndarray | None, n: int) -> np.ndarray:
        """KLoM's 95th percentile of each draw; points of all draws go through KLoM together."""
        unlearned, oracle = [], []
        for _ in range(n_draws):
            drawn = None if margins is None else margins[rng.permutation(len(margins))[:n]]
            order = rng.permutation(len(retrained))
            unlearned.append(retrained[order[:n]] if drawn is None else drawn)
            oracle.append(retrained[order[n : 2 * n]])
        klom = metrics.klom(np.concatenate(unlearned, axis=1), np.concatenate(oracle, axis=1), convention, n_bins)
        return np.percentile(klom.reshape(n_draws, -1), 95, axis=1)

    rows = []
    for n in sizes:
        threshold = float(np.quantile(p95(None, n), 1 - level, method="higher"))
        for name, margins in {"retrain": None, **methods}.items():
            values = p95(margins, n)
            share = wilson(int((values > threshold).sum()), n_draws)
            ends = np.percentile(values, [50, 2.5, 97.5])
            rows.append([name, n, n_bins, convention, *ends, threshold, *astuple(share)])
    columns = ["method", "n_models", "n_bins", "convention", "median", "low", "high", "threshold"]
    return pd.DataFrame(rows, columns=[*columns, "power", "power_low", "power_high"])


def retrained(study: Study, forget_set: ForgetSet) -> np.ndarray:
    """Return margins (2 N, n_forget) on F of all models retrained without it: the reference, then the floor's."""
    here = forget_set.indices
    floor = metrics.margins(study.oracles(forget_set, floor=True)[:, here], study.data.y[here])
    return np.concatenate([study.reference(forget_set)[0][:, here], floor])


def enough(powers: pd.DataFrame, wanted: float = 0.8) -> pd.Series:
    """Find the smallest N at which each method is told apart in `wanted` of draws, whose interval is of draws alone."""
    told = powers[(powers["power"] >= wanted) & (powers["method"] != "retrain")]
    methods = [m for m in powers["method"].unique() if m != "retrain"]
    return told.groupby("method")["n_models"].min().reindex(methods)
