"""Forgetting a task: meta-learners that never saw it as oracles, and what unlearning leaves of it in adapted models.

Tasks are pairs of image classes, no image in two tasks; the loss is the squared one, labels are -1 and 1, and
adaptation is prox. Then the score of an example x by a model adapted from w to a support set is affine in w,

    s = x . (P w + c) = a . w + b,    a = P^T x, b = x . c,

so that a "point" is the pair (a, b), a meta-model is a linear model of it, and everything of `dmmlib.unlearn` and
`dmmlib.datamodels` applies as it stands: margins are y s, and attribution is to tasks.

What is random in a model: its initialisation, and which tasks its meta-steps see. There are N models of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dmmlib import metrics, unlearn
from dmmlib.data import Dataset
from dmmlib.datamodels import Attributor, RidgeDatamodel
from dmmlib.ensemble import Ensemble, Training
from dmmlib.errors import DataError
from dmmlib.studies.meta.learner import Learner, affine, learn
from dmmlib.studies.meta.losses import SQUARED
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.tasks import disjoint_tasks

MATCHING = ("oracle_matching", "dmm")
METHODS = ("do_nothing", "retrain", "gd", "oracle_matching", "dm_direct", "dmm")


class Adapted(nn.Module):
    """A meta-model w, asked for scores of points (a, b) by models adapted from it: logits (-s / 2, s / 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, points: Tensor) -> Tensor:
        """Logits (..., n_points, 2) of points (..., n_points, dim + 1)."""
        s = points[..., :-1] @ self.weight + points[..., -1]
        return torch.stack([-s / 2, s / 2], -1)


def as_ensemble(w: Tensor) -> Ensemble:
    """Meta-models (n_models, d) as an ensemble of `Adapted`."""
    return Ensemble(Adapted(w.shape[1]).to("meta"), {"weight": w.float()}, {})


@dataclass(frozen=True)
class Setting:
    """Meta-training tasks, and the points that models are judged on.

    Attributes:
        learner: how models are trained.
        init: standard deviation of w_0's coordinates.
        m: training tasks; they come first, v validation tasks after them.
        asked_x, asked_y: examples (m + v, n, d), (m + v, n) that adapted models are asked about; those of the first m
            tasks are trained on.
        support_x, support_y: fresh examples of the same tasks (m + v, n, d), (m + v, n), to adapt to.
    """

    learner: Learner
    init: float
    m: int
    asked_x: Tensor
    asked_y: Tensor
    support_x: Tensor
    support_y: Tensor

    @property
    def n_train(self) -> int:
        """Points of training tasks; they come first."""
        return self.m * self.asked_y.shape[1]

    @property
    def task_of(self) -> np.ndarray:
        """The task (n_points,) that each point belongs to."""
        return np.repeat(np.arange(len(self.asked_y)), self.asked_y.shape[1])

    @property
    def labels(self) -> np.ndarray:
        """Labels 1 or 0 (n_points,)."""
        return (self.asked_y.flatten() > 0).long().numpy()

    @cached_property
    def points(self) -> Tensor:
        """(a, b) of each point, all models adapting to the same support sets: (n_points, d + 1), float32."""
        return self._points(self.support_x, self.support_y)

    def own_points(self, n_models: int, rng: torch.Generator) -> Tensor:
        """The points where each model has its own support sets: (n_models, n_points, d + 1).

        They are drawn with replacement from the fresh examples, half of them of either class.
        """
        tasks, n = self.support_y.shape
        pick = 2 * torch.randint(n // 2, (n_models, tasks, n // 2, 2), generator=rng) + torch.tensor([0, 1])
        pick, task = pick.flatten(2), torch.arange(tasks)[:, None]
        return self._points(self.support_x[task, pick], self.support_y[task, pick])

    def _points(self, x: Tensor, y: Tensor) -> Tensor:
        matrix, offset = affine(self.learner.lam, x, y)
        both = torch.cat([self.asked_x @ matrix, self.asked_x @ offset[..., None]], -1)
        return both.flatten(-3, -2).float()

    def without(self, task: int, n_models: int) -> Tensor:
        """Masks (n_models, m) of models that never see a task."""
        return (torch.arange(self.m) != task).expand(n_models, -1)

    def train(
        self, masks: Tensor, seed: Sequence[int], start: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Train meta-models (n_models, d), one for each mask (n_models, m), from `start` or fresh initialisations."""
        rng = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        if start is None:
            start = self.init * torch.randn(len(masks), self.asked_x.shape[-1], generator=rng, dtype=torch.float64)
        learner = replace(self.learner, n_steps=steps or self.learner.n_steps)
        return learn(learner, SQUARED, self.asked_x[: self.m], self.asked_y[: self.m], start, rng, masks=masks)[0]

    def logits(self, w: Tensor) -> np.ndarray:
        """Logits (n_models, n_points, 2) of adapted models."""
        return as_ensemble(w).logits(self.points).numpy()

    def margins(self, w: Tensor, own: torch.Generator | None = None) -> np.ndarray:
        """Margins (n_models, n_points) of adapted models; with `own`, each has its own support sets."""
        logits = self.logits(w) if own is None else as_ensemble(w).forward(self.own_points(len(w), own)).numpy()
        return metrics.margins(logits, self.labels)

    def splits(self, task: int) -> dict[str, np.ndarray]:
        """Points of the forgotten task, of the other training tasks, and of validation tasks."""
        of = self.task_of
        parts = {"forget": of == task, "retain": (of != task) & (of < self.m), "validation": of >= self.m}
        return {split: np.flatnonzero(part) for split, part in parts.items()}


def setting(data: Dataset, s: MetaSettings, lam: float) -> Setting:
    """The forgetting study's tasks and learner, for one lambda; tasks do not depend on it.

    Raises:
        DataError: if there are too few images or pairs of classes.
        PresetError: if the learner's steps are unstable.
    """
    n, m = s.shots, s.tasks
    x, y = disjoint_tasks(data, s.side, 2 * n, torch.Generator().manual_seed(s.seed))
    if m >= len(x):
        raise DataError(f"tasks={m} of {len(x)} class pairs are to be trained on; leave some to validate on.")
    learner = Learner(lam=lam, step=s.forget_step, n_steps=s.forget_steps, tasks_per_step=s.tasks_per_step)
    learner.check(SQUARED, m, n)
    return Setting(learner, s.init, m, x[:, :n], y[:, :n], x[:, n:], y[:, n:])


@dataclass(frozen=True)
class TaskAttributor:
    """An attributor of points, by a ridge datamodel whose masks (M, m) are over tasks.

    Attributes:
        datamodel: of adapted models' logits.
        task_of: the task that each point belongs to (n_points,).
    """

    datamodel: RidgeDatamodel
    task_of: np.ndarray

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        """Predicted change of logits (n_points, 2) on leaving out the tasks of the forget points."""
        return self.datamodel.effect(np.unique(self.task_of[np.asarray(forget)]))


def attribute(at: Setting, s: MetaSettings) -> TaskAttributor:
    """Train meta-models on random subsets of tasks, and regress adapted models' logits on the masks."""
    size = min(at.m - 1, max(1, round(s.fraction * at.m)))
    masks = np.random.default_rng([s.seed, 1]).random((s.n_subsets, at.m)).argsort(1).argsort(1) < size
    logits = metrics.margin_gauge(at.logits(at.train(torch.from_numpy(masks), [s.seed, 2])), at.labels)
    return TaskAttributor(RidgeDatamodel.fit(masks, logits, s.ridge), at.task_of)


def trained(at: Setting, s: MetaSettings, task: int | None = None, stream: int = 0) -> Tensor:
    """Meta-models (N, d) of all tasks, or of all but one: oracles (stream 0), or others for the floor (stream 1)."""
    if task is None:
        return at.train(torch.ones(s.n_models, at.m, dtype=torch.bool), [s.seed, 5])
    return at.train(at.without(task, s.n_models), [s.seed, 3, task, stream])


def forget(
    at: Setting,
    s: MetaSettings,
    task: int,
    attributor: Attributor,
    originals: Tensor,
    rates: Mapping[str, float],
    methods: Sequence[str] = METHODS,
) -> pd.DataFrame:
    """Forget one task: for each method, split and statistic of KLoM its value, low and high end, and cost.

    "gd" goes on meta-training without the task for the share `cost` of the steps. Matching, at the learning rates
    `rates`, spends as many sample gradients on points of adapted models.
    """
    splits, work = at.splits(task), at.learner.n_steps * s.tasks_per_step * s.shots
    problem = unlearn.Problem(
        as_ensemble(originals),
        at.logits(originals),
        at.points,
        torch.from_numpy(at.labels),
        at.n_train,
        splits["forget"],
        Training(epochs=max(1, round(work / at.n_train))),
        attributor,
        at.logits(trained(at, s, task, stream=1)),
        seed=s.seed,
    )
    reference = at.margins(trained(at, s, task))
    rows = []
    for method in methods:
        if method == "gd":
            steps = max(1, round(s.cost * at.learner.n_steps))
            moved = at.train(at.without(task, s.n_models), [s.seed, 4, task], start=originals, steps=steps)
            margins, cost = at.margins(moved), steps / at.learner.n_steps
        else:
            options = {"cost": s.cost, "lr": rates[method]} if method in MATCHING else {}
            done = unlearn.get(method)(problem, **options)
            margins, cost = done.margins, done.cost * (problem.retraining / work if method in MATCHING else 1)
        rows += [
            [f"task {task}", method, split, f"klom_{name}", e.value, e.low, e.high, cost]
            for split, statistics in metrics.klom_summary(margins, reference, splits, seed=s.seed).items()
            for name, e in statistics.items()
        ]
    columns = ["forget_set", "method", "split", "statistic", "value", "low", "high", "cost"]
    return pd.DataFrame(rows, columns=columns)


def choose_rates(at: Setting, s: MetaSettings, attributor: Attributor, originals: Tensor) -> dict[str, float]:
    """Learning rates of matching with the lowest p95 KLoM over splits and tuning tasks, which are not reported."""
    tuning = range(s.n_forget, s.n_forget + s.n_tuning)
    table = pd.concat(
        forget(at, s, task, attributor, originals, dict.fromkeys(MATCHING, lr), MATCHING).assign(lr=lr)
        for lr in s.matching_lrs
        for task in tuning
    )
    scores = table[table["statistic"] == "klom_p95"].groupby(["method", "lr"], sort=False)["value"].mean()
    return {method: float(scores[method].idxmin()) for method in MATCHING}


def compare(data: Dataset, s: MetaSettings) -> tuple[pd.DataFrame, dict[str, float]]:
    """Every method on every reported task at `forget_lam`, as `forget`; the rates that tuning tasks chose."""
    at = setting(data, s, s.forget_lam)
    originals, attributor = trained(at, s), attribute(at, s)
    rates = choose_rates(at, s, attributor, originals)
    tables = [forget(at, s, task, attributor, originals, rates) for task in range(s.n_forget)]
    return pd.concat(tables, ignore_index=True), rates


def nothing(data: Dataset, s: MetaSettings, lam: float) -> pd.DataFrame:
    """KLoM p95 of doing nothing on the forgotten task's points, and its floor, a line for each reported task.

    Columns "do nothing" and "floor": everyone adapts to the same support sets; with ", own support": each model to its
    own resample. "shift": how far leaving out a task moves the mean score of its points, in absolute terms; "spread":
    standard deviation of a point's score over oracles.
    """
    at, rng = setting(data, s, lam), torch.Generator().manual_seed(s.seed)
    originals, rows = trained(at, s), []
    for task in range(s.n_forget):
        here, models = at.splits(task)["forget"], (originals, trained(at, s, task), trained(at, s, task, stream=1))
        row = {}
        for own, suffix in ((None, ""), (rng, ", own support")):
            o, q, f = (at.margins(w, own)[:, here] for w in models)
            for name, value in (("do nothing", o), ("floor", f)):
                row[name + suffix] = metrics.STATISTICS["p95"](metrics.klom(value, q))
            if own is None:
                row |= {"shift": np.abs(o.mean(0) - q.mean(0)).mean(), "spread": q.std(0, ddof=1).mean()}
        rows.append(row)
    return pd.DataFrame(rows)
