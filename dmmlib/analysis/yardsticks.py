"""KLoM beside other yardsticks: do they rank methods alike, where do they disagree, and how many models decide?

Every yardstick is a distance of unlearned models from oracles on F, 0 (or the floor, of finitely many models) where
they cannot be told apart, larger where they can, so that ranks compare.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, rankdata, spearmanr

from dmmlib import metrics
from dmmlib.analysis.plots import label
from dmmlib.errors import DataError
from dmmlib.metrics import Convention, Estimate

if TYPE_CHECKING:
    from dmmlib.forget_sets import ForgetSet
    from dmmlib.study import Study

YARDSTICKS = {
    "klom_p95": "KLoM p95",
    "klom_mean": "KLoM mean",
    "u_lira": "U-LiRA accuracy",
    "ks": "KS",
    "accuracy_gap": "accuracy gap",
    "membership": "membership AUC gap",
}
COLUMNS = ["forget_set", "method", "yardstick", "value", "low", "high", "n_models"]


# --- distances -------------------------------------------------------------------------------------------


def membership_auc(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """AUC of an attacker who takes points of low loss for members, a model at a time.

    The cross-entropy of a point is log(1 + exp(-margin)), so a threshold on one is a threshold on the other; the
    attack is that of Yeom et al., CSF 2018, at every threshold.

    Args:
        members: margins (n_models, n_members), e.g. on F.
        others: margins (n_models, n_others), e.g. on validation points.

    Returns:
        (n_models,), the probability that a member has the larger margin; ties count half; 0.5 tells nothing.

    Raises:
        DataError: for numbers of models that differ, or no points.
    """
    if members.ndim != 2 or others.ndim != 2 or len(members) != len(others) or 0 in (*members.shape, *others.shape):
        raise DataError(
            f"The membership attack got margins of shape {members.shape} and {others.shape}; give (n_models, n_points) "
            "for the same models, at least one point each."
        )
    n, m = members.shape[1], others.shape[1]
    ranks = rankdata(np.concatenate([members, others], axis=1), axis=1)[:, :n].sum(1)
    return (ranks - n * (n + 1) / 2) / (n * m)


def distances(
    unlearned: np.ndarray,
    oracle: np.ndarray,
    right: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    n_bootstrap: int = 30,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All of `YARDSTICKS`, with 95 % intervals over models.

    U-LiRA's value is the larger of its mean accuracy on F and 0.5. The accuracy gap and the membership attack are
    absolute differences of unlearned models' and oracles' accuracies on F, and AUCs of F against validation points: the
    attack succeeds on oracles too where F is easier than validation points, without their having seen it. Models are
    resampled within the halves that U-LiRA fits and tests on, so that no model is in both.

    Args:
        unlearned, oracle: margins on F, (n_models, n_forget).
        right: the same models' correctness on F, bool.
        validation: their margins on validation points, (n_models, n_val).
    """
    summary = metrics.klom_summary(unlearned, oracle, {"F": np.arange(unlearned.shape[1])})["F"]
    found = {"klom_p95": summary["p95"], "klom_mean": summary["mean"]}

    def lira(u: np.ndarray, o: np.ndarray) -> float:
        return max(0.5, float(metrics.u_lira(u, o).mean()))

    def ks(u: np.ndarray, o: np.ndarray) -> float:
        return float(metrics.ks(u, o).mean())

    rng = np.random.default_rng(seed)
    draws = [(_within_halves(len(unlearned), rng), _within_halves(len(oracle), rng)) for _ in range(n_bootstrap)]
    for name, yardstick in (("u_lira", lira), ("ks", ks)):
        value = yardstick(unlearned, oracle)
        error = 1.96 * float(np.std([yardstick(unlearned[u], oracle[o]) for u, o in draws], ddof=1))
        found[name] = Estimate(value, max(0.0, value - error), value + error)
    accuracies = right[0].mean(1), right[1].mean(1)
    attacks = membership_auc(unlearned, validation[0]), membership_auc(oracle, validation[1])
    for name, (u, o) in (("accuracy_gap", accuracies), ("membership", attacks)):
        value = abs(float(u.mean() - o.mean()))
        error = 1.96 * float(np.sqrt(u.var(ddof=1) / len(u) + o.var(ddof=1) / len(o)))
        found[name] = Estimate(value, max(0.0, value - error), value + error)
    return found


def _within_halves(n: int, rng: np.random.Generator) -> np.ndarray:
    """n row numbers drawn with replacement, even ones in even places and odd ones in odd places."""
    drawn = np.zeros(n, int)
    for half in (0, 1):
        rows = np.arange(half, n, 2)
        drawn[half::2] = rng.choice(rows, len(rows))
    return drawn


def table(study: Study) -> pd.DataFrame:
    """Every yardstick of every method on every forget set.

    Returns:
        Columns forget_set, method, yardstick, value, low, high, n_models. Beside `YARDSTICKS`, the row "auc" is the
        membership attack's AUC itself; the oracles' own is the one of method "oracles".
    """
    rows = []
    n_train = study.data.n_train
    for f in study.forget_sets().values():
        margins, right = study.reference(f)
        rows.append([f.name, "oracles", "auc", *_mean(membership_auc(margins[:, f.indices], margins[:, n_train:]))])
        for method in study.preset.unlearning.methods:
            u = study.unlearned(method, f)
            found = distances(
                u.margins[:, f.indices],
                margins[:, f.indices],
                (u.correct[:, f.indices], right[:, f.indices]),
                (u.margins[:, n_train:], margins[:, n_train:]),
            )
            for yardstick, e in found.items():
                rows.append([f.name, method, yardstick, e.value, e.low, e.high])
            auc = membership_auc(u.margins[:, f.indices], u.margins[:, n_train:])
            rows.append([f.name, method, "auc", *_mean(auc)])
    return pd.DataFrame([[*row, study.preset.ensembles.n_models] for row in rows], columns=COLUMNS)


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    value, error = float(values.mean()), 1.96 * float(values.std(ddof=1) / np.sqrt(len(values)))
    return value, value - error, value + error


# --- agreement and disagreement --------------------------------------------------------------------------


def agreement(
    measured: pd.DataFrame, reference: str = "klom_p95", n_bootstrap: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Rank agreement of KLoM with every other yardstick over pairs of method and forget set.

    Intervals (95 %, percentiles) resample methods and forget sets, each with replacement: pairs that share either are
    not independent.

    Args:
        measured: `table`.

    Returns:
        Columns yardstick, statistic (kendall: tau-b, spearman), value, low, high, n_pairs.

    Raises:
        DataError: for fewer than two methods.
    """
    cube = {y: _wide(measured, y) for y in YARDSTICKS}
    base = cube[reference]
    n_methods, n_sets = base.shape
    if n_methods < 2:
        raise DataError(f"Rank agreement got {n_methods} method; give at least two.")
    rng = np.random.default_rng(seed)
    draws = [(rng.integers(n_methods, size=n_methods), rng.integers(n_sets, size=n_sets)) for _ in range(n_bootstrap)]
    draws = [(m, s) for m, s in draws if len(np.unique(m)) > 2]  # of two methods a rank says nothing
    rows = []
    statistics: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "kendall": lambda a, b: float(kendalltau(a, b).statistic),
        "spearman": lambda a, b: float(spearmanr(a, b).statistic),
    }
    for yardstick in (y for y in YARDSTICKS if y != reference):
        other = cube[yardstick]
        for name, statistic in statistics.items():
            value = _defined(statistic, base.ravel(), other.ravel())
            sampled = [_defined(statistic, base[np.ix_(m, s)].ravel(), other[np.ix_(m, s)].ravel()) for m, s in draws]
            low, high = np.nanpercentile(sampled, [2.5, 97.5]) if np.isfinite(sampled).any() else (np.nan, np.nan)
            rows.append([yardstick, name, value, float(low), float(high), base.size])
    return pd.DataFrame(rows, columns=["yardstick", "statistic", "value", "low", "high", "n_pairs"])


def _defined(statistic: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> float:
    return statistic(a, b) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def _wide(measured: pd.DataFrame, yardstick: str, column: str = "value") -> np.ndarray:
    """Values (n_methods, n_forget_sets) of a yardstick."""
    rows = measured[(measured["yardstick"] == yardstick) & (measured["method"] != "oracles")]
    return rows.pivot_table(index="method", columns="forget_set", values=column, sort=False).to_numpy()


def disagreements(measured: pd.DataFrame, reference: str = "klom_p95") -> pd.DataFrame:
    """Pairs of methods that KLoM and another yardstick order oppositely, intervals apart on both.

    Returns:
        Columns forget_set, yardstick, nearer_by_klom, nearer_by_other, klom (of the two, in that order), other
        (likewise); text.
    """
    rows = []
    for forget_set, here in measured[measured["method"] != "oracles"].groupby("forget_set", sort=False):
        by = {y: part.set_index("method") for y, part in here.groupby("yardstick")}
        for yardstick in (y for y in YARDSTICKS if not y.startswith("klom")):
            a, b = by[reference], by[yardstick]
            for one, two in itertools.permutations(a.index, 2):
                if a.loc[one, "high"] < a.loc[two, "low"] and b.loc[two, "high"] < b.loc[one, "low"]:
                    texts = [" / ".join(f"{t.loc[m, 'value']:.2f}" for m in (one, two)) for t in (a, b)]
                    rows.append([forget_set, yardstick, one, two, *texts])
    return pd.DataFrame(rows, columns=["forget_set", "yardstick", "nearer_by_klom", "nearer_by_other", "klom", "other"])


def named(pairs: pd.DataFrame) -> pd.DataFrame:
    """`disagreements` in fewer lines: whom each yardstick puts, against KLoM, nearer to retraining than a method."""
    keys = ["forget_set", "yardstick", "nearer_by_klom"]
    grouped = pairs.assign(nearer_by_other=pairs["nearer_by_other"].map(label)).groupby(keys, sort=False)
    table = grouped["nearer_by_other"].agg("; ".join).reset_index()
    table["yardstick"], table["nearer_by_klom"] = table["yardstick"].map(YARDSTICKS), table["nearer_by_klom"].map(label)
    return table.rename(columns=lambda name: name.replace("_", " "))


def told_apart(measured: pd.DataFrame) -> pd.DataFrame:
    """Whether each yardstick tells each method from retraining: intervals apart, the method's above.

    Returns:
        Columns forget_set, method, then one bool a yardstick; retraining itself is left out.
    """
    rows = []
    for forget_set, here in measured.groupby("forget_set", sort=False):
        by = {y: part.set_index("method") for y, part in here.groupby("yardstick")}
        for method in by["klom_p95"].index.drop("retrain"):
            told = [by[y].loc[method, "low"] > by[y].loc["retrain", "high"] for y in YARDSTICKS]
            rows.append([forget_set, method, *told])
    return pd.DataFrame(rows, columns=["forget_set", "method", *YARDSTICKS])


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
    """How often KLoM's 95th percentile tells a method from retraining, with N models of each.

    Under the null hypothesis unlearned models are further retrained ones: N and N of the retrained models, drawn
    without replacement and disjoint, give the floor for this N, and its quantile 1 - `level` the threshold. Power is
    the share of draws (N of the method's models, N retrained ones) that lie above it. Draws from the models at hand
    overlap, the more so the nearer N is to their number: power is of these models, and the interval (Wilson's, 95 %)
    of the draws alone.

    Args:
        methods: name -> margins (n_unlearned, n_points).
        retrained: margins (n_retrained, n_points) of every model trained on R, at least twice as many as a size.
        sizes: numbers of models N.
        n_draws: how many draws of each kind.

    Returns:
        A row a method and size, and one of the floor (method "retrain"): columns method, n_models, n_bins, convention,
        median, low, high (KLoM p95 over draws, central 95 % of them), threshold, power, power_low, power_high. The
        floor's power is of fresh draws, and `level` up to chance.

    Raises:
        DataError: for sizes that the models at hand do not allow.
    """
    most = min([len(retrained) // 2, *(len(m) for m in methods.values())])
    if not sizes or not 2 <= min(sizes) <= max(sizes) <= most:
        raise DataError(
            f"Power was asked for at N = {', '.join(map(str, sizes)) or 'nothing'}; with these models use 2 to {most}."
        )
    rng = np.random.default_rng(seed)

    def p95(draws: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """KLoM's 95th percentile of each draw; points of all draws go through KLoM together."""
        u, o = (np.concatenate(side, axis=1) for side in zip(*draws, strict=True))
        return np.percentile(metrics.klom(u, o, convention, n_bins).reshape(len(draws), -1), 95, axis=1)

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(len(retrained))
        return retrained[order[:n]], retrained[order[n : 2 * n]]

    rows = []
    for n in sizes:
        threshold = float(np.quantile(p95([split(n) for _ in range(n_draws)]), 1 - level, method="higher"))
        for name, margins in {"retrain": None, **methods}.items():
            if margins is None:
                draws = [split(n) for _ in range(n_draws)]
            else:
                draws = [(margins[rng.permutation(len(margins))[:n]], split(n)[1]) for _ in range(n_draws)]
            values = p95(draws)
            low, high = np.percentile(values, [2.5, 97.5])
            share = wilson(int((values > threshold).sum()), n_draws)
            head = [name, n, n_bins, convention, float(np.median(values)), float(low), float(high), threshold]
            rows.append([*head, share.value, share.low, share.high])
    columns = ["method", "n_models", "n_bins", "convention", "median", "low", "high", "threshold"]
    return pd.DataFrame(rows, columns=[*columns, "power", "power_low", "power_high"])


def wilson(successes: int, n: int) -> Estimate:
    """A share with Wilson's 95 % interval."""
    z, share = 1.96, successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def retrained(study: Study, forget_set: ForgetSet) -> np.ndarray:
    """Margins (2 N, n_forget) on F of all models retrained without it: the reference, then the floor's."""
    here = forget_set.indices
    return np.concatenate(
        [
            study.reference(forget_set)[0][:, here],
            metrics.margins(study.oracles(forget_set, floor=True)[:, here], study.data.y[here]),
        ]
    )


def enough(powers: pd.DataFrame, wanted: float = 0.8) -> pd.Series:
    """The smallest N at which each method is told from retraining in `wanted` of draws, by its interval's low end."""
    told = powers[(powers["power_low"] >= wanted) & (powers["method"] != "retrain")]
    methods = [m for m in powers["method"].unique() if m != "retrain"]
    return told.groupby("method")["n_models"].min().reindex(methods)
