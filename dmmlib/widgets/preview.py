"""What forgetting a set would do, predicted before anything is unlearned, and how far to trust that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from dmmlib import forget_sets, metrics, unlearn
from dmmlib.datamodels import Attributor, retrained
from dmmlib.forget_sets import ForgetSet, check_forget_indices
from dmmlib.study import Study

SHARES = (0.01, 0.05, 0.2, 0.5)  # of S: sizes of the random sets on which predictions are measured
N_ORACLES = 20  # of each
N_ORIGINALS = 10  # a preview averages over the first so many originals
TRUSTED = 0.5  # error on forgotten points, relative to the change that really happens there


@dataclass(frozen=True)
class Outcome:
    """Means over models and the points of one split.

    Attributes:
        margin: mean margin.
        accuracy: share of right answers.
    """

    margin: float
    accuracy: float


@dataclass(frozen=True)
class Change:
    """One point's answer before and after.

    Attributes:
        point: position among all points, training first.
        old, new: class that the mean probability favours.
        distance: total variation between the mean probabilities before and after, in [0, 1].
    """

    point: int
    old: int
    new: int
    distance: float


@dataclass(frozen=True)
class Changes:
    """How much each point's answer changes; `top` reads it off as `Change`s.

    Attributes:
        old, new: favoured class (n_points,).
        distance: total variation (n_points,).
    """

    old: np.ndarray
    new: np.ndarray
    distance: np.ndarray

    def top(self, n: int, among: np.ndarray | None = None) -> list[Change]:
        """The n most changed points, of those in `among`."""
        pool = np.arange(len(self.distance)) if among is None else among
        order = pool[np.argsort(-self.distance[pool], kind="stable")[:n]]
        return [Change(int(i), int(self.old[i]), int(self.new[i]), float(self.distance[i])) for i in order]


@dataclass(frozen=True)
class Preview:
    """Predicted consequences of forgetting a set.

    Attributes:
        size: of F.
        before, after: split (forget, retain, validation) -> outcome of the originals, and predicted for oracles.
        changes: every point, the most changed first.
        reach: how far it reaches beyond the set: "retain" and "validation" -> mean change of answers on images that
            stay and on validation images, a total variation; "leverage" -> length of the predicted displacement of the
            parameters, absent where the attributor knows no gradients (`leverage`).
        told: split -> share of its points whose predicted change of margin is more than twice its uncertainty; empty
            where the attributor knows none.
    """

    size: int
    before: dict[str, Outcome]
    after: dict[str, Outcome]
    changes: Changes
    reach: dict[str, float]
    told: dict[str, float]


@dataclass(frozen=True)
class Usual:
    """What random sets of one size do: mean and spread of each part of `Preview.reach`."""

    size: int
    mean: dict[str, float]
    spread: dict[str, float]


def leverage(attributor: Attributor, forget: np.ndarray) -> float | None:
    """Length of the parameters' displacement that forgetting amounts to, up to a constant; None if it isn't known."""
    response = getattr(getattr(attributor, "prior", attributor), "response", None)
    length = getattr(response, "leverage", None)
    return None if length is None else float(length(forget))


WORDS = {
    "retain": "answers on images that stay",
    "validation": "answers on validation images",
    "leverage": "leverage on the parameters",
}


def beyond_usual(usual: Sequence[Usual], preview: Preview) -> str:
    """What a request would do beyond what random requests of its size do, as a sentence; empty where nothing is known.

    The score is that of `adversary.service`: the mean over the parts of `Preview.reach`, each in standard deviations.
    Means and spreads are interpolated between the measured sizes, all in logarithms. An attack by deletion has to act
    together, and so stands out; so do honest requests for images alike (notebook 08).
    """
    if not usual:
        return ""
    sizes = np.log([u.size for u in usual])

    def at(values: Sequence[float]) -> float:
        return float(np.exp(np.interp(np.log(preview.size), sizes, np.log(np.maximum(values, 1e-9)))))

    scores = {
        part: (value - at([u.mean[part] for u in usual])) / at([u.spread[part] for u in usual])
        for part, value in preview.reach.items()
    }
    score = float(np.mean(list(scores.values())))
    verdict = "it stands out: look who asks" if score > 3 else "it does not stand out"
    each = ", ".join(f"{WORDS[part]} {z:+.1f}" for part, z in scores.items())
    missing = "" if "leverage" in scores else " The attributor knows no gradients, so leverage does not count."
    return (
        f"Beyond random requests of this size, in standard deviations: {each}; mean {score:+.1f}, so "
        f"{verdict}.{missing} {preview.reach['validation']:.1%} of validation answers would change."
    )


def uncertainty(preview: Preview) -> str:
    """Where the prediction says something, and where it can't tell, as a sentence; empty where nothing is known."""
    if not preview.told:
        return ""
    said = ", ".join(f"{share:.0%} of {split}" for split, share in preview.told.items())
    return f"Change of margin larger than twice its predicted uncertainty: {said} images; for the others it can't tell."


class Previewer:
    """Previews forget sets of one study.

    Args:
        attributor: anything with `effect(forget)`, the predicted change of logits (n_points, n_classes).
        logits: of some originals (n_models, n_points, n_classes), training points first.
        labels: (n_points,).
        n_train: size of S.
    """

    def __init__(self, attributor: Attributor, logits: np.ndarray, labels: np.ndarray, n_train: int) -> None:
        self._attributor, self._logits, self._labels, self._n_train = attributor, logits, labels, n_train
        self._margins, self._right, self._probability = self._read(logits)

    def _read(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean margin and share of right answers (n_points,), mean probability (n_points, n_classes)."""
        return (
            metrics.margins(logits, self._labels).mean(0),
            metrics.correct(logits, self._labels).mean(0),
            softmax(logits, axis=2).mean(0),
        )

    def preview(self, forget: Sequence[int] | np.ndarray) -> Preview:
        """What the attributor expects of retraining without `forget`.

        Raises:
            ForgetSetError: for indices that are no proper part of the training set.
        """
        indices = check_forget_indices(forget, self._n_train)
        return self._preview(indices, self._attributor.effect(indices))

    def usual(self, shares: Sequence[float] = SHARES, n_sets: int = 8, seed: int = 0) -> list[Usual]:
        """What random sets of so many sizes do, by size; all of them in one pass where the attributor can."""
        rng = np.random.default_rng(seed)
        sizes = sorted({max(1, round(share * self._n_train)) for share in shares})
        sets = [np.sort(rng.choice(self._n_train, size, replace=False)) for size in sizes for _ in range(n_sets)]
        effects = getattr(self._attributor, "effects", None)
        predicted = effects(sets) if effects else [self._attributor.effect(forget) for forget in sets]
        found = [self._preview(*pair).reach for pair in zip(sets, predicted, strict=True)]
        by_part = {part: np.reshape([reach[part] for reach in found], (len(sizes), n_sets)) for part in found[0]}
        return [
            Usual(
                size,
                {part: float(values[k].mean()) for part, values in by_part.items()},
                {part: float(values[k].std(ddof=1)) for part, values in by_part.items()},
            )
            for k, size in enumerate(sizes)
        ]

    def _preview(self, indices: np.ndarray, effect: np.ndarray) -> Preview:
        margins, right, probability = self._read(retrained(self._logits, effect, self._labels))
        splits = ForgetSet("", indices).splits(self._n_train, len(self._labels) - self._n_train)
        changes = Changes(
            self._probability.argmax(1), probability.argmax(1), 0.5 * np.abs(probability - self._probability).sum(1)
        )
        return Preview(
            len(indices),
            outcomes(self._margins, self._right, splits),
            outcomes(margins, right, splits),
            changes,
            self._reach(indices, changes, splits),
            self._told(indices, effect, splits),
        )

    def _reach(self, indices: np.ndarray, changes: Changes, splits: Mapping[str, np.ndarray]) -> dict[str, float]:
        reach = {split: float(changes.distance[splits[split]].mean()) for split in ("retain", "validation")}
        length = leverage(self._attributor, indices)
        return reach if length is None else reach | {"leverage": length}

    def _told(self, indices: np.ndarray, effect: np.ndarray, splits: Mapping[str, np.ndarray]) -> dict[str, float]:
        sd = getattr(self._attributor, "sd", None)
        if sd is None:
            return {}
        clear = np.abs(metrics.right_logits(effect, self._labels)) > 2 * sd(indices)
        return {split: float(clear[i].mean()) for split, i in splits.items()}


def outcomes(margins: np.ndarray, right: np.ndarray, splits: Mapping[str, np.ndarray]) -> dict[str, Outcome]:
    """Split -> mean over its points, of mean margins (n_points,) and shares of right answers (n_points,)."""
    return {name: Outcome(float(margins[i].mean()), float(right[i].mean())) for name, i in splits.items()}


# --- how far to trust it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Predictions against oracles, on one forget set.

    Attributes:
        name, size: of the set.
        error: split -> root mean square, over its points, of predicted minus true change of mean margin.
        change: split -> root mean square of the true change. Both squares are without what the oracles' and
            originals' finite numbers add to them, their sampling variance.
    """

    name: str
    size: int
    error: dict[str, float]
    change: dict[str, float]

    @property
    def relative(self) -> float:
        """Error on the forgotten points as a share of what really changes there; 1 is no better than nothing."""
        return self.error["forget"] / max(self.change["forget"], 1e-9)


def measure(study: Study, shares: Sequence[float] = SHARES, n_oracles: int = N_ORACLES) -> list[Measured]:
    """The attributor's error on random sets from small to half of S, and on sets whose oracles are there already.

    The random sets' oracles are trained once and kept; they choose nothing and are no reported forget sets.
    A random set is the easy case, since effects partly cancel; the tuning sets hold points that act together.

    Returns:
        By size.
    """
    n = study.data.n_train
    sets = dict(study.tuning_sets())
    for share in shares:
        size = max(1, round(share * n))
        rng = np.random.default_rng(study.seeds(f"trust:{size}", 1)[0])
        name = f"random {size:,}"
        sets[name] = forget_sets.make(f"trust_{size}", forget_sets.random(study.data, size, rng), study.data)
    sets |= {name: f for name, f in study.forget_sets().items() if study.has_oracles(f)}
    originals = metrics.margins(study.original_logits(), study.data.y)
    measured = []
    for name, forget_set in sets.items():
        if name in study.forget_sets():
            oracles = study.oracles(forget_set)
        else:
            oracles = study.oracles(forget_set, n=None if name in study.tuning_sets() else n_oracles)
        retrained = metrics.margins(oracles, study.data.y)
        true = retrained.mean(0) - originals.mean(0)
        variance = retrained.var(0, ddof=1) / len(retrained) + originals.var(0, ddof=1) / len(originals)
        predicted = metrics.right_logits(study.attributor().effect(forget_set.indices), study.data.y)
        splits = forget_set.splits(n, study.data.n_val)
        measured.append(
            Measured(
                name,
                len(forget_set),
                {split: _rms(predicted[i] - true[i], variance[i]) for split, i in splits.items()},
                {split: _rms(true[i], variance[i]) for split, i in splits.items()},
            )
        )
    return sorted(measured, key=lambda m: m.size)


def _rms(values: np.ndarray, variance: np.ndarray) -> float:
    """Root mean square of values that carry noise of known variance, without it."""
    return float(np.sqrt(max(0.0, (values**2 - variance).mean())))


def relative_error(measured: Sequence[Measured], size: int) -> float:
    """Relative error on forgotten points to expect of a set of `size`: the measured sets', linear in log size.

    Sets of one size count with their mean; beyond the smallest and the largest, theirs is taken.
    """
    sizes = np.unique([m.size for m in measured])
    means = [np.mean([m.relative for m in measured if m.size == s]) for s in sizes]
    return float(np.interp(np.log(size), np.log(sizes), means))


def warning(measured: Sequence[Measured], size: int) -> str:
    """Why a prediction for a set of this size is not to be trusted; empty where it is."""
    if not measured:
        return ""
    largest = max(m.size for m in measured)
    if size > largest:
        return (
            f"{size:,} images are more than in any set on which predictions were measured ({largest:,}); read these "
            "as a guess."
        )
    expected = relative_error(measured, size)
    if expected <= TRUSTED:
        return ""
    return (
        f"Sets of about {size:,} images: measured against retraining, predicted changes of the forgotten images' "
        f"margins are off by {expected:.0%} of the true change; trust their direction, not their size."
    )


# --- what it would cost ---------------------------------------------------------------------------------


def cost(study: Study, size: int) -> str:
    """What unlearning a set of `size` would take with DMM, and what checking it would: a sentence."""
    retraining = study.preset.training.epochs * (study.data.n_train - size)
    shares = unlearn.registered("dmm").space["cost"]
    low, high = (f"{share * retraining:,.0f}" for share in (min(shares), max(shares)))
    return (
        f"Unlearning with DMM: {low} to {high} sample gradients a model, {min(shares):.0%} to {max(shares):.0%} of "
        f"a retraining. Checking it: 2 × {study.preset.ensembles.n_models} retrainings, once for this set."
    )
