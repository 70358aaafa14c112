"""Did it work? Answered by models that are there anyway: predictions, and subset models as an attacker's shadows.

Predictions are those of subset models, which are less sure of everything than one that was trained on all points; so
they are moved onto two lines, margin = a + b * predicted, that are fitted to what the original answered before: z, what
is predicted of F had it not been seen, by the line of validation points; u, what is predicted as it was, by that of
retained points. Where at least ten retrained models are given, z is their mean and u what the original answered. With
m the margins of the model that is judged, and s^2 the variance of a margin between models plus that of its prediction,

    remainder = sum_F (u - z) (m - z) / s^2  /  sum_F (u - z)^2 / s^2,    excess = (D - D_0) / (D_1 - D_0)

with D the mean over F of min((m - z)^2 / s^2, 10), which grows and saturates as KLoM does: how much of the way the
model has still to go, which has little noise but sees one direction; and how far off its answers are in any. Where
answers to validation points have moved further than predicted, D is theirs. What is left, as KLoM would have it, is

    left = (remainder^2 + excess) / 2,

of the remainder if it is positive, or below -1: a model that went past by more than the whole way is further off than
an untouched one, which D, capped, does not show. The model has forgotten if at most half is left. By how much subset
models differ from their own predictions says what models would be judged that never saw F, at z, and untouched ones, at
u: D_0 and D_1 are their mean D, so that 0 is left of the first and 1 of the second, whatever the sizes of F and of
effects. If more than half would be left of one in fifty of the first, or not of the original itself, F was hardly
remembered, and a verdict would be a guess. So it would be where all points of a class go: subset models have seen each.
`benchmarks/audit.py` says how often verdicts are right.

The attacker is LiRA (Carlini et al., "Membership inference attacks from first principles", S&P 2022): at each point of
F a Gaussian of the margins of subset models that saw it and one of those that did not; the score is their likelihood
ratio, and the false positives are subset models that did not see the point.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import softmax
from scipy.stats import kstest, mannwhitneyu
from torch import nn

from dmmlib import metrics
from dmmlib.attributors.gradients import margin
from dmmlib.errors import DataError
from dmmlib.forget_sets import ForgetSet
from dmmlib.own.weights import Model, answered, loaded, with_weights
from dmmlib.stacking import copied

if TYPE_CHECKING:
    from dmmlib.own.forget import Result

LEFT, CAP, DOUBT = 0.5, 10.0, 0.02  # chosen on sets that benchmarks/audit.py does not report
FPR = 0.01
BINS = 15  # of confidence, for the calibration error
LEAST = 10  # retrained models that distances are measured from
RELEARN_RATE, RELEARN_STEPS, SHADOWS = 1e-3, 300, 5
UNSEEN = (
    "Outputs do not show what weights still hold: a model can answer as if retrained, and relearn the points faster "
    "than one that never saw them."
)
HARDLY = (
    "The model hardly remembered these points: what it answers differs from a retrained one's answers by less than "
    "two such models differ by chance. Ask for more points at once, or let ten or more retrained models judge."
)
UNTOLD = (
    "The original itself would be judged to have forgotten: it hardly remembered these points, or what it is compared "
    "with has seen them, or is of another recipe."
)
EMPTIED = (
    "All points of a class go. Models that predictions are made of have seen each class, so what is predicted, and "
    "what methods match, falls short of a model without it. Let ten or more retrained models judge."
)
SAYS = {True: "forgotten", False: "NOT forgotten", None: "cannot be told"}


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    forgotten: bool | None  # None where that cannot be told
    left: float
    doubt: float  # share of models that never saw F of which more than half would be left, by chance
    remainder: float
    excess: float
    distances: dict[str, dict[str, float]]  # F, R, V -> mean and rms distance from predicted margins, and rms in sd
    attack: dict[str, dict[str, float]]  # before, after -> AUC and TPR at 1 % FPR of LiRA on F; NaN: cannot be told
    quality: dict[str, dict[str, dict[str, float]]]  # before, after -> R, V -> accuracy, calibration error
    relearning: dict[str, float]  # steps that bring F back, of the model and of models that never saw it
    retrained: dict[str, dict[str, float]]  # F, R, V -> KLoM, KS and mean gap, each with its floor; if any were given
    limits: str = UNSEEN
    emptied: tuple[int, ...] = ()  # classes of which no point stays, where no retrained models judge

    @property
    def says(self) -> str:
        """The verdict in words."""
        return SAYS[self.forgotten]

    def __str__(self) -> str:
        a, q, of = self.attack, self.quality, "retrained models" if self.retrained else "predicted of retraining"
        why = EMPTIED if self.emptied else HARDLY if self.doubt < 1 else UNTOLD
        lines = [
            f"{self.says}: {self.left:.2f} is left (at most {LEFT:g}; about 1 as before, about 0 as {of}"
            + (f", which {self.doubt:.0%} would miss by chance" if self.doubt < 1 else "")
            + f"), by a remainder of {self.remainder:.2f} and an excess of {self.excess:.2f}",
            *([why] if self.forgotten is None else []),
            "distance from what is predicted, rms in sd: "
            + ", ".join(f"{split} {found['rms in sd']:.2f}" for split, found in self.distances.items()),
            "attack on F (LiRA): "
            + (
                "cannot be told, as too few subset models lack the points, or have them"
                if np.isnan(a["before"]["auc"])
                else f"AUC {a['before']['auc']:.2f} before, {a['after']['auc']:.2f} after; TPR at 1 % FPR "
                f"{a['before']['tpr']:.2f} before, {a['after']['tpr']:.2f} after"
            ),
            *(
                f"{split} accuracy {q['before'][split]['accuracy']:.1%} before, {q['after'][split]['accuracy']:.1%} "
                f"after; calibration error {q['before'][split]['ece']:.3f} before, {q['after'][split]['ece']:.3f} after"
                for split in ("retain", "validation")
            ),
        ]
        if r := self.relearning:
            lines.append(f"relearning: {r['model']:.0f} steps, models that never saw the points {r['others']:.0f}")
        for split, found in self.retrained.items():
            said = ", ".join(f"{k} {found[k]:.2f} (floor {found[f'{k} floor']:.2f})" for k in ("klom", "ks", "gap"))
            lines.append(f"against retrained models, {split}: {said}")
        return "\n".join([*lines, self.limits])


def audit(result: Result, retrained: Sequence[Model] = (), *, relearn: bool = True) -> Audit:
    """Judge a result, or another model by `dataclasses.replace(result, model=...)`.

    Args:
        result: of `forget`.
        retrained: at least ten models retrained without the points, if there are any: modules, states or files.
        relearn: whether to count the steps that bring the points back.

    Raises DataError for fewer retrained models, or some that are alike or the judged one, ModelError for misfits.
    """
    if not isinstance(retrained, Iterable) or isinstance(retrained, (str, Mapping, nn.Module)):
        raise DataError(f"retrained is a {type(retrained).__name__}; give a list of models, at least {LEAST}, or none.")
    prepared, f, y = result.prepared, result.forgotten, result.prepared.data.y
    z = answers(modules := [loaded(m, prepared) for m in retrained], prepared, (result.original, result.model))
    others = metrics.margins(np.stack(z), y) if z else None
    splits = prepared.splits(ForgetSet(result.name, f), probes=False) | {"forget": result.forget}
    result = replace(result, after=answered(result.model, prepared))  # another's, where the model was replaced
    judged = verdict(result, (after := result.margins())[None], retrained=others)
    distances = {}
    for split, points in splits.items():
        gap = after[points] - result.predicted[points]
        rms = [float(np.sqrt((z**2).mean())) for z in (gap, gap / judged.spread[points])]
        distances[split] = {"mean": float(gap.mean()), "rms": rms[0], "rms in sd": rms[1]}
    stay = np.delete(y[: prepared.data.n_train], f)
    emptied = () if modules else tuple(np.setdiff1d(y[f], stay).tolist())
    return Audit(
        None if emptied else judged.forgotten(),
        float(judged.left[0]),
        float(judged.doubt[0]),
        float(judged.remainder[0]),
        float(judged.excess[0]),
        distances,
        {when: lira(result, result.margins(when)) for when in ("before", "after")},
        {
            when: {k: quality(getattr(result, when)[splits[k]], y[splits[k]]) for k in list(splits)[1:]}
            for when in ("before", "after")
        },
        _relearning(result, modules) if relearn else {},
        {} if others is None else _against(after, others, splits),
        emptied=emptied,
    )


def answers(retrained: Sequence[Model], prepared: Any, judged: Sequence[Model]) -> list[np.ndarray]:
    """Logits (n_points, n_classes) of retrained models; DataError for under ten, some alike, or one of the judged."""
    if 0 < len(retrained) < LEAST:
        raise DataError(f"{len(retrained)} retrained models were given; give at least {LEAST}, or none.")
    every = [answered(m, prepared) for m in retrained and (*retrained, *judged)]
    found, known = every[: len(retrained)], every[len(retrained) :]
    for i, z in enumerate(found):
        if any(np.array_equal(z, other) for other in found[:i]):
            raise DataError(f"Retrained model {i + 1} is one of those before it; give models of different seeds.")
    if any(np.allclose(z, own, atol=1e-4) for z in found for own in known):
        raise DataError("A retrained model is the original, or the one to be judged; give models that never saw F.")
    return found


@dataclass(frozen=True)
class Verdict:
    """What is seen of k models, as this module's head defines it."""

    remainder: np.ndarray  # (k,)
    excess: np.ndarray  # (k,)
    doubt: np.ndarray  # (k,): share of models that never saw F that would be judged wrongly; 1 if the original would
    most: np.ndarray  # (k,): what at most would be left of models that never saw F
    spread: np.ndarray  # (n_points,): standard deviation of a margin between models, and of its prediction

    @property
    def left(self) -> np.ndarray:
        """How much is left (k,), 1 of an untouched model and about 0 of a retrained one."""
        return left(self.remainder, self.excess)

    def forgotten(self, i: int = 0) -> bool | None:
        """Whether the i-th model has forgotten; None where the models at hand cannot tell."""
        if self.left[i] > max(LEFT, self.most[i]):
            return False
        return None if self.doubt[i] > DOUBT else bool(self.left[i] <= LEFT)


def left(remainder: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """What is left, of a remainder and an excess of the same shape."""
    return (np.where(remainder < -1, remainder, remainder.clip(0)) ** 2 + excess) / 2


def verdict(
    result: Result, margins: np.ndarray, before: np.ndarray | None = None, retrained: np.ndarray | None = None
) -> Verdict:
    """Judge margins (k, n_points) of models, whose originals had `before` (k, n_points), or the result's if None; by
    what is predicted, or by margins (at least 10, n_points) of retrained models."""
    f, prepared, context = result.forget, result.prepared, result.prepared.context()
    attributor, y = prepared.attributor(), prepared.data.y
    splits = prepared.splits(ForgetSet("", result.forgotten), probes=False)
    effect, validation = metrics.right_logits(attributor.effect(result.forgotten), y), splits["validation"]
    earlier = np.setdiff1d(result.forgotten, f)  # what the original had lost before
    lost = metrics.right_logits(attributor.effect(earlier), y) if len(earlier) else np.zeros(len(y), np.float32)
    effect = effect - lost
    before = np.broadcast_to(result.margins("before") if before is None else before, margins.shape)
    if (noise := attributor.left_out()) is None:
        noise = context.margins - metrics.right_logits(attributor.predict(context.masks), y)
    if retrained is None:
        sd = np.zeros(len(y)) if result.sd is None else result.sd
        level = metrics.right_logits(attributor.predict(np.ones((1, prepared.data.n_train), bool)), y)[0] + lost
        gone = _line(level, before, validation, (level + effect)[f])
        fall = _line(level, before, splits["retain"], level[f]) - gone
        moved = (margins - before - effect) / np.sqrt(2)  # two models' noise
    else:  # their noise is that of subset models in shape, and their own in size
        sd, of_mean = np.zeros(len(y)), 1 + 1 / len(retrained)
        noise = noise * np.sqrt(of_mean * retrained.var(0, ddof=1).mean() / noise.var(0, ddof=1).mean())
        gone = retrained[:, f].mean(0)
        fall, moved = before[:, f] - gone, margins - retrained.mean(0)
    spread = np.sqrt(noise.var(0, ddof=1) + sd**2).clip(1e-3)
    along = fall / spread[f] ** 2
    along = along / (along * fall).sum(1, keepdims=True).clip(1e-9)
    unseen, untouched = (_misfit((noise[:, f] + at * fall[:, None]) / spread[f]) for at in (0, 1))  # (k or 1, M)
    start, whole = unseen.mean(1), (untouched.mean(1) - unseen.mean(1)).clip(1e-3)
    by_chance = left(along @ noise[:, f].T, (unseen - start[:, None]) / whole[:, None])

    def seen(m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        away = m[:, f] - gone
        return (away * along).sum(1), _misfit(away / spread[f])

    (remainder, misfit), (remainder_before, misfit_before) = seen(margins), seen(before)
    excess = (np.maximum(misfit, _misfit((moved / spread)[:, validation])) - start) / whole
    told = left(remainder_before, (misfit_before - start) / whole) > LEFT  # or the original seems to have forgotten
    return Verdict(remainder, excess, np.where(told, (by_chance > LEFT).mean(1), 1.0), by_chance.max(1), spread)


def _misfit(z: np.ndarray) -> np.ndarray:
    """Mean square (...) of distances (..., points) in standard deviations, which counts none above its cap."""
    return np.minimum(z**2, CAP).mean(-1)


def _line(x: np.ndarray, y: np.ndarray, points: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What lines of y (k, n_points) on x (n_points,), fitted to some points, say (k, len(at)) at other values of x."""
    centred, mean = x[points] - x[points].mean(), y[:, points].mean(1, keepdims=True)
    length = float((centred**2).sum())
    slope = y[:, points] @ centred / length if length else np.ones(len(y))
    return mean + slope[:, None] * (at - x[points].mean())


def lira(result: Result, margins: np.ndarray) -> dict[str, float]:
    """AUC and TPR at 1 % FPR of a likelihood-ratio attack on F, of a model with margins (n_points,).

    A point's Gaussians share one variance. Each subset model that lacks it is left out of those by which it and the
    model are judged, once for each: so a model that never saw F has an AUC of .5 in the mean, of few models too.
    """
    context, f = result.prepared.context(), result.forget
    seen = context.masks[:, f]
    use = seen.any(0) & ((~seen).sum(0) > 1)
    f, seen, shadow = f[use], seen[:, use], context.margins[:, f[use]]
    if not len(f):
        return {"auc": float("nan"), "tpr": float("nan")}
    inside, outside = (np.where(part, shadow, 0).sum(0) / part.sum(0) for part in (seen, ~seen))
    away, lacking = shadow - outside, (~seen).sum(0)
    squares = np.where(seen, shadow - inside, away) ** 2
    kept = np.setdiff1d(np.arange(result.prepared.data.n_train), result.forgotten)
    count = context.masks[:, kept].sum(0).clip(1)
    usual = (np.where(context.masks[:, kept], context.margins[:, kept], 0).sum(0)) / count
    shift = np.median(margins[kept] - usual)  # what more data does to all answers
    outside, variance = outside - away / (lacking - 1), squares.sum(0) - squares * lacking / (lacking - 1)
    variance = variance / max(len(shadow) - 3, 1) + 1e-6  # each without one model that lacks the point

    def score(m: np.ndarray) -> np.ndarray:
        return (((m - outside) ** 2 - (m - inside) ** 2) / (2 * variance))[~seen]

    targets, negatives = score(margins[f] - shift), score(shadow)
    auc = mannwhitneyu(targets, negatives).statistic / (len(targets) * len(negatives))
    return {"auc": float(auc), "tpr": float((targets > np.quantile(negatives, 1 - FPR, method="higher")).mean())}


def quality(logits: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Accuracy, and the expected calibration error in 15 bins (Guo et al., ICML 2017), of logits (n, n_classes)."""
    p, right = softmax(logits, -1).max(1), logits.argmax(1) == y
    which = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [abs(p[which == b].mean() - right[which == b].mean()) * (which == b).mean() for b in np.unique(which)]
    return {"accuracy": float(right.mean()), "ece": float(sum(gaps))}


def steps_to(model: nn.Module, x: torch.Tensor, y: torch.Tensor, goal: float) -> int:
    """Count full-batch steps of Adam at 1e-3, at most 300, until the mean margin on points reaches a goal."""
    model = copied(model).eval()  # statistics of batches stay as they are
    moving = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.Adam(moving, RELEARN_RATE)
    for step in range(RELEARN_STEPS):
        logits = model(x.clone())
        if float(margin(logits.detach(), y).mean()) >= goal:
            return step
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
    return RELEARN_STEPS


def _relearning(result: Result, retrained: Sequence[nn.Module]) -> dict[str, float]:
    """Mean steps that bring points back to their margins before: of the model, and of models that never saw them.

    Those are retrained ones if there are any; else subset models, each with the points that it lacks.
    """
    prepared, before, counts = result.prepared, result.margins("before"), list[tuple[int, int]]()
    for points, other in _others(result, retrained):
        at = torch.from_numpy(points).to(prepared.device)
        few = (prepared.x[at], prepared.y[at], float(before[points].mean()))
        counts.append((steps_to(loaded(result.model, prepared), *few), steps_to(other, *few)))
    return dict(zip(("model", "others"), np.mean(counts, 0).tolist(), strict=True)) if counts else {}


def _others(result: Result, retrained: Sequence[nn.Module]) -> Iterator[tuple[np.ndarray, nn.Module]]:
    """Models that never saw points of F, with these."""
    if retrained:
        yield from ((result.forget, model) for model in retrained[:SHADOWS])
        return
    context = result.prepared.context()
    models = context.subset_models()
    lacks = ~context.masks[: models.n_models, result.forget]
    for i in np.argsort(-lacks.sum(1))[:SHADOWS]:
        if lacks[i].any():
            module = result.prepared.module().to(result.prepared.device)
            yield result.forget[lacks[i]], with_weights(module, models[[int(i)]])


def _against(model: np.ndarray, oracles: np.ndarray, splits: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean KLoM of one model's margins (n_points,) from those of k retrained models, KS of standardised margins, and
    mean gap; the floor is the same of each retrained model from the others, in the mean."""

    def distances(one: np.ndarray, many: np.ndarray, points: np.ndarray) -> tuple[float, float, float]:
        one, many = one[points], many[:, points]
        centre, spread = many.mean(0), many.std(0, ddof=1).clip(1e-6)
        between = ((many - centre) / spread).ravel()
        ks = kstest((one - centre) / spread, between).statistic
        return float(metrics.klom(one[None], many).mean()), float(ks), float(np.abs(one - centre).mean())

    found = {}
    for split, points in splits.items():
        own = distances(model, oracles, points)
        floor = [distances(o, np.delete(oracles, i, 0), points) for i, o in enumerate(oracles)]
        keys = ("klom", "ks", "gap")
        found[split] = dict(zip(keys, own, strict=True))
        found[split] |= dict(zip((f"{key} floor" for key in keys), np.mean(floor, 0).tolist(), strict=True))
    return found
