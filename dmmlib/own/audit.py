"""Did it work? Answered by models that are there anyway: predictions, and subset models as an attacker's shadows.

Predictions are those of subset models, which are less sure of everything than one that was trained on all points; so
they are moved onto two lines, margin = a + b * predicted, that are fitted to what the original answered before: z, what
is predicted of F had it not been seen, by the line of validation points; u, what is predicted as it was, by that of
retained points. With m the margins of the model that is judged, and s^2 the variance of a margin between models plus
that of its prediction,

    remainder = sum_F (u - z) (m - z) / s^2  /  sum_F (u - z)^2 / s^2,        misfit = mean over F of (m - z)^2 / s^2:

how much of the way it has still to go, 1 for a model that saw F and 0 for one that did not, whatever the sizes of F and
of effects; and how far off its answers are in any direction, about 1 for retrained models; where those to
validation points have moved further than predicted, their misfit counts. It has forgotten if the remainder is
at most 1/2 and the misfit at most `MISFIT`. Its own standard deviation, and s, are measured on subset models, each
predicted from the others: if 1/2 is less than two of it, F was hardly remembered, and a verdict would be a guess.
`benchmarks/audit.py` says how often verdicts are right.

The attacker is LiRA (Carlini et al., "Membership inference attacks from first principles", S&P 2022): at each point of
F a Gaussian of the margins of subset models that saw it and one of those that did not; the score is their likelihood
ratio, and the false positives are subset models that did not see the point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import softmax
from scipy.stats import kstest, mannwhitneyu
from torch import nn

from dmmlib import metrics
from dmmlib.attributors.gradients import margin
from dmmlib.ensemble import initialise
from dmmlib.errors import DataError
from dmmlib.own.weights import Model, loaded
from dmmlib.stacking import copied

if TYPE_CHECKING:
    from dmmlib.own.forget import Result

REMAINDER, MISFIT, SURE = 0.5, 5.0, 2.0  # chosen on the development sets of benchmarks/audit.py
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
    "two such models differ by chance. Ask for more points at once."
)
SAYS = {True: "forgotten", False: "NOT forgotten", None: "cannot be told"}


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    forgotten: bool | None  # None where that cannot be told
    remainder: float
    sd: float  # of the remainder
    misfit: float
    distances: dict[str, dict[str, float]]  # F, R, V -> mean and rms distance from predicted margins, and rms in sd
    attack: dict[str, dict[str, float]]  # before, after -> AUC and TPR at 1 % FPR of LiRA on F
    quality: dict[str, dict[str, dict[str, float]]]  # before, after -> R, V -> accuracy, calibration error
    relearning: dict[str, float]  # steps that bring F back, of the model and of models that never saw it
    retrained: dict[str, dict[str, float]]  # F, R, V -> KLoM, KS and mean gap, each with its floor; if any were given
    limits: str = UNSEEN

    @property
    def says(self) -> str:
        """The verdict in words."""
        return SAYS[self.forgotten]

    def __str__(self) -> str:
        a, q = self.attack, self.quality
        lines = [
            f"{self.says}: remainder {self.remainder:.2f} +- {self.sd:.2f} (at most {REMAINDER:g}; 1 as before, 0 "
            f"as predicted of retraining), misfit {self.misfit:.1f} (at most {MISFIT:g})",
            *([HARDLY] if self.forgotten is None else []),
            "distance from what is predicted, rms in sd: "
            + ", ".join(f"{split} {found['rms in sd']:.2f}" for split, found in self.distances.items()),
            f"attack on F (LiRA): AUC {a['before']['auc']:.2f} before, {a['after']['auc']:.2f} after; TPR at 1 % FPR "
            f"{a['before']['tpr']:.2f} before, {a['after']['tpr']:.2f} after",
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

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def audit(result: Result, retrained: Sequence[Model] = (), *, relearn: bool = True) -> Audit:
    """Judge a result, or any model by `dataclasses.replace(result, ...)`.

    Args:
        result: of `forget`.
        retrained: at least ten models retrained without the points, if there are any: modules, states or files.
        relearn: whether to count the steps that bring the points back.

    Raises DataError for fewer retrained models or two that are alike, ModelError for some that do not fit.
    """
    prepared, f = result.prepared, result.forgotten
    n = prepared.data.n_train
    others = answers(retrained, prepared)
    splits = {"forget": f, "retain": np.setdiff1d(np.arange(n), f), "validation": np.arange(n, len(prepared.data.y))}
    judged = verdict(result, (after := result.margins())[None])
    distances = {}
    for split, points in splits.items():
        gap = after[points] - result.predicted[points]
        rms = [float(np.sqrt((z**2).mean())) for z in (gap, gap / judged.spread[points])]
        distances[split] = {"mean": float(gap.mean()), "rms": rms[0], "rms in sd": rms[1]}
    return Audit(
        judged.forgotten(),
        float(judged.remainder[0]),
        float(judged.sd[0]),
        float(judged.misfit[0]),
        distances,
        {when: lira(result, result.margins(when)) for when in ("before", "after")},
        {
            when: {k: quality(getattr(result, when)[splits[k]], prepared.data.y[splits[k]]) for k in list(splits)[1:]}
            for when in ("before", "after")
        },
        _relearning(result) if relearn else {},
        _against(after, metrics.margins(np.stack(others), prepared.data.y), splits) if others else {},
    )


def answers(retrained: Sequence[Model], prepared: Any) -> list[np.ndarray]:
    """Logits (n_points, n_classes) of retrained models; DataError for fewer than ten, or some that are alike."""
    if 0 < len(retrained) < LEAST:
        raise DataError(f"{len(retrained)} retrained models were given; give at least {LEAST}, or none.")
    found = [initialise(partial(loaded, m, prepared), [0]).logits(prepared.x).numpy()[0] for m in retrained]
    for i, z in enumerate(found):
        if any(np.array_equal(z, other) for other in found[:i]):
            raise DataError(f"Retrained model {i + 1} is one of those before it; give models of different seeds.")
    return found


@dataclass(frozen=True)
class Verdict:
    """What is seen of k models, as this module's head defines it."""

    remainder: np.ndarray  # (k,)
    sd: np.ndarray  # (k,), of the remainder, between models
    misfit: np.ndarray  # (k,)
    spread: np.ndarray  # (n_points,): standard deviation of a margin between models, and of its prediction

    @property
    def score(self) -> np.ndarray:
        """Above 1 is not forgotten."""
        return np.maximum(self.remainder / REMAINDER, self.misfit / MISFIT)

    def forgotten(self, i: int = 0) -> bool | None:
        """Whether the i-th model has forgotten; None where the models at hand cannot tell."""
        if self.misfit[i] <= MISFIT and SURE * self.sd[i] > REMAINDER:
            return None
        return bool(self.score[i] <= 1)


def verdict(result: Result, margins: np.ndarray, before: np.ndarray | None = None) -> Verdict:
    """Judge margins (k, n_points) of models, whose originals had `before` (k, n_points), or the result's if None."""
    f, prepared, context = result.forgotten, result.prepared, result.prepared.context()
    attributor, y, n = prepared.attributor(), prepared.data.y, prepared.data.n_train
    retain, validation = np.setdiff1d(np.arange(n), f), np.arange(n, len(y))
    level = metrics.right_logits(attributor.predict(np.ones((1, n), bool)), y)[0]
    effect = metrics.right_logits(attributor.effect(f), y)
    sd = np.zeros(len(y)) if result.sd is None else result.sd
    if (noise := attributor.left_out()) is None:
        noise = context.margins - metrics.right_logits(attributor.predict(context.masks), y)
    spread = np.sqrt(noise.var(0, ddof=1) + sd**2).clip(1e-3)
    before = np.broadcast_to(result.margins("before") if before is None else before, margins.shape)
    gone = _line(level, before, validation, (level + effect)[f])
    fall = _line(level, before, retain, level[f]) - gone
    away, along = margins[:, f] - gone, fall / spread[f] ** 2
    along = along / (along * fall).sum(1, keepdims=True).clip(1e-9)
    moved = (margins - before - effect)[:, validation] / spread[validation]
    return Verdict(
        (away * along).sum(1),
        np.sqrt((noise[:, f] @ along.T).var(0, ddof=1) + (along**2 * sd[f] ** 2).sum(1)),
        np.maximum(((away / spread[f]) ** 2).mean(1), (moved**2).mean(1) / 2),
        spread,
    )


def _line(x: np.ndarray, y: np.ndarray, points: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What lines of y (k, n_points) on x (n_points,), fitted to some points, say (k, len(at)) at other values of x."""
    centred, mean = x[points] - x[points].mean(), y[:, points].mean(1, keepdims=True)
    length = float((centred**2).sum())
    slope = y[:, points] @ centred / length if length else np.ones(len(y))
    return mean + slope[:, None] * (at - x[points].mean())


def lira(result: Result, margins: np.ndarray) -> dict[str, float]:
    """AUC and TPR at 1 % FPR of a likelihood-ratio attack on F, of a model with margins (n_points,)."""
    context, f = result.prepared.context(), result.forgotten
    seen = context.masks[:, f]
    use = seen.any(0) & ~seen.all(0)
    f, seen, shadow = f[use], seen[:, use], context.margins[:, f[use]]
    if not len(f):
        return {"auc": float("nan"), "tpr": float("nan")}
    inside, outside = (np.where(part, shadow, 0).sum(0) / part.sum(0) for part in (seen, ~seen))
    variance = (np.where(seen, shadow - inside, shadow - outside) ** 2).sum(0) / max(len(shadow) - 2, 1) + 1e-6
    kept = np.setdiff1d(np.arange(result.prepared.data.n_train), result.forgotten)
    count = context.masks[:, kept].sum(0).clip(1)
    usual = (np.where(context.masks[:, kept], context.margins[:, kept], 0).sum(0)) / count
    shift = np.median(margins[kept] - usual)  # what more data does to all answers

    def score(m: np.ndarray) -> np.ndarray:
        return ((m - outside) ** 2 - (m - inside) ** 2) / (2 * variance)

    targets, negatives = score(margins[f] - shift), score(shadow)[~seen]
    auc = mannwhitneyu(targets, negatives).statistic / (len(targets) * len(negatives))
    return {"auc": float(auc), "tpr": float((targets > np.quantile(negatives, 1 - FPR)).mean())}


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


def _relearning(result: Result) -> dict[str, float]:
    """Mean steps that bring points back to their margins before, of the model and of subset models that lack them."""
    prepared, context = result.prepared, result.prepared.context()
    counts: list[tuple[int, int]] = []
    models, before = context.subset_models(), result.margins("before")
    for i in np.argsort(context.masks[: models.n_models, result.forgotten].sum(1))[:SHADOWS]:
        points = result.forgotten[~context.masks[i, result.forgotten]]
        if len(points):
            module, (params, buffers) = prepared.module().to(prepared.device), models.state_of(int(i))
            module.load_state_dict(params | buffers, strict=False)
            at = torch.from_numpy(points).to(prepared.device)
            few = (prepared.x[at], prepared.y[at], float(before[points].mean()))
            ours = loaded(result.model, prepared)
            counts.append((steps_to(ours, *few), steps_to(module, *few)))
    return dict(zip(("model", "others"), np.mean(counts, 0).tolist(), strict=True)) if counts else {}


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
