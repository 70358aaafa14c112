"""Forgetting a task: meta-learners that never saw it as oracles, and what unlearning leaves of it in adapted models.

Tasks are pairs of image classes, no image in two tasks; the loss is the squared one, labels are -1 and 1, and
adaptation is prox. Then the score of an example x by a model adapted from w to a support set is affine in w,

    s = x . (P w + c) = a . w + b,    a = P^T x, b = x . c,

so that a "point" is the pair (a, b), a meta-model is a linear model of it, and everything of `dmmlib.unlearn` and
`dmmlib.datamodels` applies as it stands: margins are y s, and attribution is to tasks.

What is random in a model: its initialisation, and which tasks its meta-steps see. N models of each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dmmlib import metrics, unlearn
from dmmlib.data import Dataset
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.ensemble import Ensemble, Training
from dmmlib.errors import DataError
from dmmlib.studies.meta.learner import Learner, affine, learn
from dmmlib.studies.meta.losses import SQUARED
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.tasks import disjoint_tasks


class Adapted(nn.Module):
    """A meta-model w, asked for scores of points (a, b) by models adapted from it: logits (-s / 2, s / 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, points: Tensor) -> Tensor:
        """Logits (..., n_points, 2) of points (..., n_points, dim + 1)."""
        s = points[..., :-1] @ self.weight + points[..., -1]
        return torch.stack([-s / 2, s / 2], -1)


@dataclass(frozen=True)
class Setting:
    """Meta-training tasks, and the points that models are judged on.

    Attributes:
        learner: how models are trained.
        init: standard deviation of w_0's coordinates.
        x, y: the tasks' training examples (m, n, d), (m, n).
        asked_x, asked_y: examples (m + v, n, d), (m + v, n) that adapted models are asked about: the training
            examples of the m tasks, then those of v validation tasks.
        support_x, support_y: fresh examples of the same tasks (m + v, n, d), (m + v, n), to adapt to.
    """

    learner: Learner
    init: float
    x: Tensor
    y: Tensor
    asked_x: Tensor
    asked_y: Tensor
    support_x: Tensor
    support_y: Tensor

    @property
    def m(self) -> int:
        return self.x.shape[0]

    @property
    def n_train(self) -> int:
        """Points of training tasks; they come first."""
        return self.y.numel()

    @property
    def task_of(self) -> np.ndarray:
        """The task (n_points,) that each point belongs to."""
        return np.repeat(np.arange(len(self.asked_y)), self.asked_y.shape[1])

    @property
    def labels(self) -> np.ndarray:
        """1 or 0 (n_points,)."""
        return (self.asked_y.flatten() > 0).long().numpy()

    def points(self, resample: torch.Generator | None = None, n_models: int = 0) -> Tensor:
        """(a, b) of each point: (n_points, d + 1), float32.

        Args:
            resample: give each of `n_models` models its own support sets, drawn with replacement from the fresh
                examples, half of them of either class: (n_models, n_points, d + 1).
        """
        x, y = self.support_x, self.support_y
        if resample is not None:
            half = x.shape[1] // 2
            pick = 2 * torch.randint(half, (n_models, len(x), half, 2), generator=resample) + torch.tensor([0, 1])
            pick, task = pick.flatten(2), torch.arange(len(x))[:, None]
            x, y = x[task, pick], y[task, pick]
        matrix, offset = affine(self.learner.lam, x, y)
        a = self.asked_x @ matrix
        b = self.asked_x @ offset[..., None]
        return torch.cat([a, b], -1).flatten(-3, -2).float()

    def without(self, task: int, n_models: int) -> Tensor:
        """Masks (n_models, m) of models that never see a task."""
        masks = torch.ones(n_models, self.m, dtype=torch.bool)
        masks[:, task] = False
        return masks

    def train(
        self, masks: Tensor, seed: Sequence[int], start: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Meta-models (n_models, d), one a mask (n_models, m), from `start` or fresh initialisations."""
        rng = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        if start is None:
            start = self.init * torch.randn(len(masks), self.x.shape[-1], generator=rng, dtype=torch.float64)
        learner = replace(self.learner, n_steps=steps or self.learner.n_steps)
        return learn(learner, SQUARED, self.x, self.y, start, rng, masks=masks).w

    def logits(self, w: Tensor) -> np.ndarray:
        """Logits (n_models, n_points, 2) of adapted models."""
        return as_ensemble(w).logits(self.points()).numpy()

    def splits(self, task: int) -> dict[str, np.ndarray]:
        """Points of the forgotten task, of the other training tasks, and of validation tasks."""
        of = self.task_of
        return {
            "forget": np.flatnonzero(of == task),
            "retain": np.flatnonzero((of != task) & (of < self.m)),
            "validation": np.flatnonzero(of >= self.m),
        }


def as_ensemble(w: Tensor) -> Ensemble:
    """Meta-models (n_models, d) as an ensemble of `Adapted`."""
    return Ensemble(Adapted(w.shape[1]).to("meta"), {"weight": w.float()}, {})


def setting(data: Dataset, s: MetaSettings, lam: float) -> Setting:
    """The forgetting study's tasks and learner, for one lambda; tasks do not depend on it.

    Raises:
        DataError: if there are too few images or pairs of classes, or fewer tasks than are to be forgotten.
    """
    rng = torch.Generator().manual_seed(s.seed)
    x, y = disjoint_tasks(data, s.side, 2 * s.shots, rng)
    if not s.n_forget + s.n_tuning < s.tasks < len(x):
        raise DataError(
            f"{s.tasks} of {len(x)} class pairs are training tasks, {s.n_forget} + {s.n_tuning} of them to be "
            "forgotten; leave some to retain and some to validate on."
        )
    learner = Learner(lam=lam, step=s.forget_step, n_steps=s.forget_steps, tasks_per_step=s.tasks_per_step)
    learner.check(SQUARED, s.tasks, s.shots)
    n, m = s.shots, s.tasks
    return Setting(learner, s.init, x[:m, :n], y[:m, :n], x[:, :n], y[:, :n], x[:, n:], y[:, n:])


@dataclass(frozen=True)
class TaskAttributor:
    """Effect of leaving out the tasks that forget points belong to, by a ridge datamodel over task masks.

    Attributes:
        datamodel: fitted on masks over tasks (M, m).
        task_of: (n_points,).
    """

    datamodel: RidgeDatamodel
    task_of: np.ndarray

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted change of logits (n_points, 2) of adapted models."""
        return self.datamodel.effect(np.unique(self.task_of[np.asarray(forget)]))


def attribute(at: Setting, s: MetaSettings) -> TaskAttributor:
    """Train meta-models on random subsets of tasks, and regress adapted models' logits on the masks."""
    rng = np.random.default_rng([s.seed, 1])
    size = min(at.m - 1, max(1, round(s.fraction * at.m)))
    masks = np.argsort(rng.random((s.n_subsets, at.m)), 1).argsort(1) < size
    logits = metrics.margin_gauge(at.logits(at.train(torch.from_numpy(masks), [s.seed, 2])), at.labels)
    return TaskAttributor(RidgeDatamodel.fit(masks, logits, s.ridge), at.task_of)


METHODS = ("do_nothing", "retrain", "gd", "oracle_matching", "dm_direct", "dmm")


def forget(
    at: Setting, s: MetaSettings, task: int, attributor: TaskAttributor, originals: Tensor, lrs: dict[str, float]
) -> list[dict[str, Any]]:
    """Forget one task with every method: tidy rows as `Study.results` has them.

    "gd" goes on meta-training without the task for the share `cost` of the steps; matching spends as many sample
    gradients on points of adapted models.
    """
    keep = at.without(task, s.n_models)
    oracle, floor = (at.train(keep, [s.seed, 3, task, k]) for k in (0, 1))
    splits = at.splits(task)
    y = torch.from_numpy(at.labels)
    work = at.learner.n_steps * s.tasks_per_step * s.shots
    training = Training(epochs=max(1, round(work / at.n_train)))
    problem = unlearn.Problem(
        as_ensemble(originals),
        at.logits(originals),
        at.points(),
        y,
        at.n_train,
        splits["forget"],
        training,
        attributor,
        at.logits(floor),
        seed=s.seed,
    )
    reference = metrics.margins(at.logits(oracle), at.labels)
    rows = []
    for method in METHODS:
        if method not in lrs and method in ("oracle_matching", "dmm"):
            continue
        if method == "gd":
            steps = max(1, round(s.cost * at.learner.n_steps))
            moved = at.train(keep, [s.seed, 4, task], start=originals, steps=steps)
            margins, cost = metrics.margins(at.logits(moved), at.labels), steps / at.learner.n_steps
        else:
            options: dict[str, float] = {"cost": s.cost, "lr": lrs[method]} if method in lrs else {}
            done = unlearn.get(method)(problem, **options)
            spends = method in lrs
            margins, cost = done.margins, done.cost * problem.retraining / work if spends else done.cost
        found = metrics.klom_summary(margins, reference, splits, seed=s.seed)
        rows += [
            {
                "forget_set": f"task {task}",
                "method": method,
                "split": split,
                "statistic": f"klom_{name}",
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "cost": cost,
            }
            for split, statistics in found.items()
            for name, estimate in statistics.items()
        ]
    return rows


def choose_rates(at: Setting, s: MetaSettings, attributor: TaskAttributor, originals: Tensor) -> dict[str, float]:
    """Learning rates of matching with the lowest p95 KLoM over splits and tuning tasks, which are not reported."""
    tuning = range(s.n_forget, s.n_forget + s.n_tuning)
    scores: dict[tuple[str, float], float] = {}
    for lr in s.matching_lrs:
        rows = pd.DataFrame(
            [
                row
                for task in tuning
                for row in forget(at, s, task, attributor, originals, {"oracle_matching": lr, "dmm": lr})
            ]
        )
        p95 = rows[rows["statistic"] == "klom_p95"].groupby("method")["value"].mean()
        scores |= {(method, lr): float(p95[method]) for method in ("oracle_matching", "dmm")}
    return {method: min(s.matching_lrs, key=lambda lr: scores[method, lr]) for method in ("oracle_matching", "dmm")}


def compare(data: Dataset, s: MetaSettings) -> tuple[pd.DataFrame, dict[str, float]]:
    """Every method on every reported task at `forget_lam`; the rates that tuning tasks chose."""
    at = setting(data, s, s.forget_lam)
    originals = at.train(torch.ones(s.n_models, at.m, dtype=torch.bool), [s.seed, 5])
    attributor = attribute(at, s)
    rates = choose_rates(at, s, attributor, originals)
    rows = [row for task in range(s.n_forget) for row in forget(at, s, task, attributor, originals, rates)]
    return pd.DataFrame(rows), rates


def nothing(data: Dataset, s: MetaSettings, lam: float) -> dict[str, np.ndarray]:
    """KLoM p95 of doing nothing on the forgotten task's points, and its floor, a value a reported task.

    Keys: "do nothing", "floor": everyone adapts to the same support sets; with ", own support": each model to its
    own resample; "shift": how far leaving out a task moves the mean score of its points, in absolute terms.
    """
    at = setting(data, s, lam)
    everyone = torch.ones(s.n_models, at.m, dtype=torch.bool)
    originals = at.train(everyone, [s.seed, 5])
    sign = 2.0 * at.labels - 1
    rng = torch.Generator().manual_seed(s.seed)
    found: dict[str, list[float]] = {}

    def margins(w: Tensor, own: bool) -> np.ndarray:
        points = at.points(rng, len(w)) if own else at.points()
        s_ = torch.einsum("kpd,kd->kp", points[..., :-1].expand(len(w), -1, -1), w.float()) + points[..., -1]
        return s_.numpy() * sign

    for task in range(s.n_forget):
        keep, here = at.without(task, s.n_models), at.splits(task)["forget"]
        oracle, floor = (at.train(keep, [s.seed, 3, task, k]) for k in (0, 1))
        for own, suffix in ((False, ""), (True, ", own support")):
            o, q, f = (margins(w, own)[:, here] for w in (originals, oracle, floor))
            for name, value in (("do nothing", o), ("floor", f)):
                found.setdefault(name + suffix, []).append(float(np.percentile(metrics.klom(value, q), 95)))
            if not own:
                found.setdefault("shift", []).append(float(np.abs(o.mean(0) - q.mean(0)).mean()))
                found.setdefault("spread", []).append(float(q.std(0, ddof=1).mean()))
    return {name: np.array(values) for name, values in found.items()}
