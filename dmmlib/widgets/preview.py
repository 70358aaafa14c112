"""What forgetting a set would do, predicted before anything is unlearned, and how far to trust that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import softmax

from dmmlib import forget_sets, metrics, unlearn
from dmmlib.datamodels import Attributor, Indices, retrained
from dmmlib.errors import DmmError
from dmmlib.forget_sets import ForgetSet, check_forget_indices
from dmmlib.study import Study

SHARES = (0.01, 0.05, 0.2, 0.5)  # of S: sizes of the random sets on which predictions are measured
N_ORACLES = 20  # of each
N_ORIGINALS = 10  # a preview averages over the first so many originals
TRUSTED = 0.5  # error on forgotten points, relative to the change that really happens there
WORDS = {
    "retain": "answers on images that stay",
    "validation": "answers on validation images",
    "leverage": "leverage on the parameters",
}


@dataclass(frozen=True)
class Preview:
    """Predicted consequences of forgetting a set.

    Attributes:
        size: of F.
        before, after: `outcomes` of the originals, and those predicted for oracles.
        old, new: class that each point's mean probability favours before and after (n_points,).
        distance: total variation between each point's mean probabilities before and after, in [0, 1] (n_points,).
        reach: "retain" and "validation" -> mean distance on images that stay and on validation images; "leverage" ->
            length of the predicted displacement of the parameters, absent where the attributor does not know it.
        told: split -> share of its points whose predicted change of margin is more than twice its uncertainty; empty
            where the attributor knows none.
    """

    size: int
    before: pd.DataFrame
    after: pd.DataFrame
    old: np.ndarray
    new: np.ndarray
    distance: np.ndarray
    reach: dict[str, float]
    told: dict[str, float]

    def most_changed(self, n: int, among: np.ndarray) -> np.ndarray:
        """Return the n points of `among` whose answers change most, in that order."""
        return among[np.argsort(-self.distance[among], kind="stable")[:n]]


def outcomes(margins: np.ndarray, correct: np.ndarray, splits: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Average mean margins and shares of correct answers (n_points,): a row per split, columns accuracy and margin."""
    columns = {"accuracy": correct, "margin": margins}
    return pd.DataFrame({name: {s: values[i].mean() for s, i in splits.items()} for name, values in columns.items()})


class Previewer:
    """Previews forget sets with an attributor, from the logits of some originals.

    Args:
        logits: (n_models, n_points, n_classes), training points first; of points with the labels (n_points,).
    """

    def __init__(self, attributor: Attributor, logits: np.ndarray, labels: np.ndarray, n_train: int) -> None:
        self._attributor, self._logits, self._labels, self._n_train = attributor, logits, labels, n_train
        self._before = self._read(logits)

    def _read(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean margin and share of correct answers (n_points,), mean probability (n_points, n_classes)."""
        margins, correct = metrics.margins(logits, self._labels), metrics.correct(logits, self._labels)
        return margins.mean(0), correct.mean(0), softmax(logits, axis=2).mean(0)

    def usual(self, shares: Sequence[float] = SHARES, n_sets: int = 8, seed: int = 0) -> pd.DataFrame:
        """Summarise `Preview.reach` of random sets: a row per size, columns (part, "mean" or "std" over the sets)."""
        rng = np.random.default_rng(seed)
        sizes = np.repeat(sorted({max(1, round(share * self._n_train)) for share in shares}), n_sets)
        sets = [np.sort(rng.choice(self._n_train, size, replace=False)) for size in sizes]
        found = [self.preview(*pair).reach for pair in zip(sets, self._attributor.effects(sets), strict=True)]
        return pd.DataFrame(found).groupby(sizes).agg(["mean", "std"])

    def preview(self, forget: Indices, effect: np.ndarray | None = None) -> Preview:
        """Predict what retraining without `forget` would do, whose effect may be known; raises ForgetSetError."""
        indices = check_forget_indices(forget, self._n_train)
        effect = self._attributor.effect(indices) if effect is None else effect
        splits = ForgetSet("", indices).splits(self._n_train, len(self._labels) - self._n_train)
        margins, correct, probability = self._read(retrained(self._logits, effect, self._labels))
        margins_before, correct_before, probability_before = self._before
        distance = 0.5 * np.abs(probability - probability_before).sum(1)
        reach = {split: float(distance[splits[split]].mean()) for split in ("retain", "validation")}
        length, sd = self._attributor.leverage(indices), self._attributor.sd(indices)
        clear = None if sd is None else np.abs(metrics.right_logits(effect, self._labels)) > 2 * sd
        return Preview(
            len(indices),
            outcomes(margins_before, correct_before, splits),
            outcomes(margins, correct, splits),
            probability_before.argmax(1),
            probability.argmax(1),
            distance,
            reach if length is None else reach | {"leverage": length},
            {} if clear is None else {split: float(clear[i].mean()) for split, i in splits.items()},
        )


def beyond_usual(usual: pd.DataFrame | None, preview: Preview) -> str:
    """Say what a request would do beyond what random requests of its size do; nothing where `usual` is not known.

    The score (notebook 08) is the mean over the parts of `Preview.reach`, each in standard deviations; these and the
    means are interpolated between the measured sizes, all in logarithms. Requests that act together stand out.
    """
    if usual is None:
        return ""
    size, sizes = np.log(preview.size), np.log(usual.index)
    at = {key: np.exp(np.interp(size, sizes, np.log(column.clip(lower=1e-9)))) for key, column in usual.items()}
    scores = {part: (value - at[part, "mean"]) / at[part, "std"] for part, value in preview.reach.items()}
    score = float(np.mean(list(scores.values())))
    verdict = "it stands out: look who asks" if score > 3 else "it does not stand out"
    each = ", ".join(f"{WORDS[part]} {z:+.1f}" for part, z in scores.items())
    missing = "" if "leverage" in scores else " The attributor knows no gradients, so leverage does not count."
    return (
        f"Beyond random requests of this size, in standard deviations: {each}; mean {score:+.1f}, so "
        f"{verdict}.{missing} {preview.reach['validation']:.1%} of validation answers would change."
    )


def uncertainty(preview: Preview) -> str:
    """Say where the prediction tells something, and where it can't; nothing where no uncertainty is known."""
    said = ", ".join(f"{share:.0%} of {split}" for split, share in preview.told.items())
    told = f"Change of margin larger than twice its predicted uncertainty: {said} images; for the others it can't tell."
    return told if said else ""


# --- how far to trust it --------------------------------------------------------------------------------


def saved_sets(study: Study) -> list[ForgetSet]:
    """Read the forget sets in the run's directory, but for those that cannot be read or are of other data."""
    found = []
    for path in sorted((study.directory / "forget_sets").glob("*.json")):
        with suppress(DmmError):
            found.append(forget_sets.load(path, study.data))
    return found


def measure(study: Study, shares: Sequence[float] = SHARES, n_oracles: int = N_ORACLES) -> pd.DataFrame:
    """Measure the attributor's error on random sets from small to half of S, and on sets whose oracles are there.

    The random sets' oracles are trained once and kept; they choose nothing and are no reported forget sets.
    A random set's effects partly cancel; saved sets may hold points that act together.

    Returns:
        A row per set, by size: its name and size; "true change" and "error" (predicted minus true), root mean squares
        over F of the change of mean margin, without the sampling variance of oracles and originals; "ratio" of the two,
        where 1 is no better than predicting no change.
    """
    data, few = study.data, {}
    for size in (max(1, round(share * data.n_train)) for share in shares):
        rng = np.random.default_rng(study.seeds(f"trust:{size}", 1)[0])
        few[f"random {size:,}"] = forget_sets.make(f"trust_{size}", forget_sets.random(data, size, rng), data)
    saved = {f.name: f for f in saved_sets(study) if study.has_oracles(f)}
    originals, rows = metrics.margins(study.original_logits(), data.y), []
    for name, f in (few | saved).items():
        oracles = metrics.margins(study.oracles(f, n=n_oracles if name in few else None), data.y)
        true = (oracles.mean(0) - originals.mean(0))[f.indices]
        noise = sum(m.var(0, ddof=1) / len(m) for m in (oracles, originals))[f.indices]
        error = metrics.right_logits(study.attributor().effect(f.indices), data.y)[f.indices] - true
        change, wrong = (float(np.sqrt(max(0.0, (v**2 - noise).mean()))) for v in (true, error))
        ratio = wrong / max(change, 1e-9)
        rows.append({"set": name, "|F|": len(f), "true change": change, "error": wrong, "ratio": ratio})
    return pd.DataFrame(rows).sort_values("|F|", kind="stable", ignore_index=True)


def warning(measured: pd.DataFrame | None, size: int) -> str:
    """Say why a prediction for a set of this size is not to be trusted; nothing where it is, or nothing was measured.

    The error to expect is that of the measured sets, averaged for each size and interpolated linearly in log size.
    """
    if measured is None:
        return ""
    ratios = measured.groupby("|F|")["ratio"].mean()
    expected, largest = np.interp(np.log(size), np.log(ratios.index), ratios), measured["|F|"].max()
    if size > largest:
        measured_on = f"more than in any set on which predictions were measured ({largest:,})"
        return f"{size:,} images are {measured_on}; read these as a guess."
    if expected <= TRUSTED:
        return ""
    return (
        f"Sets of about {size:,} images: measured against retraining, predicted changes of the forgotten images' "
        f"margins are off by {expected:.0%} of the true change; trust their direction, not their size."
    )


def cost(study: Study, size: int) -> str:
    """Say what unlearning a set of `size` with DMM would take, and what checking it would."""
    retraining = study.preset.training.epochs * (study.data.n_train - size)
    shares = unlearn.get("dmm").space["cost"]
    ends = sorted({min(shares), max(shares)})
    gradients, parts = (" to ".join(f"{x * s:{form}}" for s in ends) for x, form in ((retraining, ",.0f"), (1, ".0%")))
    return (
        f"Unlearning with DMM: {gradients} sample gradients per model, {parts} of a retraining. "
        f"Checking it: 2 × {study.preset.ensembles.n_models} retrainings, once for this set."
    )
