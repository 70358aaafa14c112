"""Forgetting a task: meta-learners that never saw it as oracles, and what unlearning leaves of it in adapted models.

Tasks are pairs of image classes, no image in two tasks; the loss is the squared one, labels are -1 and 1, and
adaptation is prox. Then the score of an example x by a model adapted from w to a support set is affine in w,

    s = x . (P w + c) = a . w + b,    a = P^T x, b = x . c,

so that a "point" is the pair (a, b), a meta-model is a linear model of it, and everything of `dmmlib.unlearn` and
`dmmlib.datamodels` applies as it stands: margins are y s, and attribution is to tasks.

What is random in a model: its initialisation, and which tasks its meta-steps see. There are N models of each kind.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dmmlib import metrics, unlearn
from dmmlib.data import Dataset
from dmmlib.datamodels import Attributor, RidgeDatamodel
from dmmlib.ensemble import Ensemble, Training
from dmmlib.errors import DataError
from dmmlib.studies.meta.learner import SQUARED, Learner, affine
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
        """Return logits (..., n_points, 2) of points (..., n_points, dim + 1)."""
        s = points[..., :-1] @ self.weight + points[..., -1]
        return torch.stack([-s / 2, s / 2], -1)


def as_ensemble(w: Tensor) -> Ensemble:
    """Return meta-models (n_models, d) as an ensemble of `Adapted`."""
    return Ensemble(Adapted(w.shape[1]).to("meta"), {"weight": w.float()}, {})


@dataclass(frozen=True)
class Setting:
    """Meta-training tasks, and the points that models are judged on: m tasks to train on, then v to validate on."""

    s: MetaSettings
    learner: Learner  # how models are trained
    x: Tensor  # examples (m + v, n, d) that adapted models are asked about; those of the first m tasks are trained on
    y: Tensor  # their labels (m + v, n), -1 or 1
    support_x: Tensor  # fresh examples of the same tasks (m + v, n, d) to adapt to
    support_y: Tensor  # their labels (m + v, n)

    @property
    def labels(self) -> np.ndarray:
        """Labels 1 or 0 (n_points,)."""
        return (self.y.flatten() > 0).long().numpy()

    def points(self, n_models: int = 0, rng: torch.Generator | None = None) -> Tensor:
        """Return (a, b) of each point (n_points, d + 1), float32, all models adapting to the same support sets.

        With `rng` each of n_models has its own, half of either class: (n_models, n_points, d + 1).
        """
        x, y = self.support_x, self.support_y
        if rng is not None:
            task, half = torch.arange(len(y))[:, None], self.s.shots // 2
            pick = 2 * torch.randint(half, (n_models, len(y), half, 2), generator=rng) + torch.tensor([0, 1])
            x, y = x[task, pick.flatten(2)], y[task, pick.flatten(2)]
        matrix, offset = affine(self.learner.lam, x, y)
        return torch.cat([self.x @ matrix, self.x @ offset[..., None]], -1).flatten(-3, -2).float()

    def train(self, masks: Tensor, *stream: int, start: Tensor | None = None, learner: Learner | None = None) -> Tensor:
        """Train meta-models (n_models, d) on the tasks of masks (n_models, m), from `start` or afresh."""
        seed = np.random.SeedSequence([self.s.seed, *stream]).generate_state(1, np.uint64)[0]
        rng, m = torch.Generator().manual_seed(int(seed >> 1)), self.s.tasks
        if start is None:
            start = self.s.init * torch.randn(len(masks), self.x.shape[-1], generator=rng, dtype=torch.float64)
        return (learner or self.learner).learn(self.x[:m], self.y[:m], start, rng, masks=masks)[0]

    def originals(self) -> Tensor:
        """Train meta-models (N, d) on all training tasks."""
        return self.train(torch.ones(self.s.n_models, self.s.tasks, dtype=torch.bool), 5)

    def without(self, task: int) -> Tensor:
        """Return masks (N, m) of models that never see a task."""
        return (torch.arange(self.s.tasks) != task).expand(self.s.n_models, -1)

    def oracles(self, task: int, floor: bool = False) -> Tensor:
        """Train meta-models (N, d) without a task; for the floor others than those measured against."""
        return self.train(self.without(task), 3, task, int(floor))

    def logits(self, w: Tensor) -> np.ndarray:
        """Return logits (n_models, n_points, 2) of adapted models."""
        return as_ensemble(w).logits(self.points()).numpy()

    def margins(self, w: Tensor, own: torch.Generator | None = None) -> np.ndarray:
        """Return margins (n_models, n_points) of adapted models; with `own`, each has its own support sets."""
        logits = self.logits(w) if own is None else as_ensemble(w).forward(self.points(len(w), own)).numpy()
        return metrics.margins(logits, self.labels)

    def splits(self, task: int) -> dict[str, np.ndarray]:
        """Return points of the forgotten task, of the other training tasks, and of validation tasks."""
        of, m = np.arange(len(self.y)).repeat(self.s.shots), self.s.tasks
        parts = {"forget": of == task, "retain": (of != task) & (of < m), "validation": of >= m}
        return {split: np.flatnonzero(part) for split, part in parts.items()}


def setting(data: Dataset, s: MetaSettings, lam: float) -> Setting:
    """Make the forgetting study's tasks, which do not depend on lambda, and its learner.

    Raises DataError or PresetError for too few images or pairs of classes, or unstable steps.
    """
    learner = Learner(SQUARED, lam, step=s.forget_step, n_steps=s.forget_steps, tasks_per_step=s.tasks_per_step)
    learner.check()
    x, y = disjoint_tasks(data, s.side, s.shots, torch.Generator().manual_seed(s.seed))
    if s.tasks >= len(x):
        raise DataError(f"tasks={s.tasks} of {len(x)} class pairs are to be trained on; leave some to validate on.")
    return Setting(s, learner, x[:, : s.shots], y[:, : s.shots], x[:, s.shots :], y[:, s.shots :])


def attribute(at: Setting) -> RidgeDatamodel:
    """Train meta-models on random subsets of tasks, and regress adapted models' logits on the masks.

    The masks are over points, in or out with their task: n equal columns at the penalty n lambda are one at lambda.
    """
    s = at.s
    size = min(s.tasks - 1, max(1, round(s.fraction * s.tasks)))
    masks = np.random.default_rng([s.seed, 1]).random((s.n_subsets, s.tasks)).argsort(1).argsort(1) < size
    logits = metrics.margin_gauge(at.logits(at.train(torch.from_numpy(masks), 2)), at.labels)
    return RidgeDatamodel.fit(np.repeat(masks, s.shots, axis=1), logits, s.ridge * s.shots)


def forget(at: Setting, task: int, originals: Tensor, attributor: Attributor) -> pd.DataFrame:
    """Forget one task by each of `METHODS`: a row for each method, split and statistic of KLoM.

    "gd" goes on meta-training without the task for the share `cost` of the steps. Matching spends as many sample
    gradients on points of adapted models.
    """
    s, splits, n_steps = at.s, at.splits(task), at.learner.n_steps
    work, n_train = n_steps * s.tasks_per_step * s.shots, s.tasks * s.shots
    problem = unlearn.Problem(
        as_ensemble(originals),
        at.logits(originals),
        at.points(),
        torch.from_numpy(at.labels),
        n_train,
        splits["forget"],
        Training(epochs=max(1, round(work / n_train))),
        attributor,
        at.logits(at.oracles(task, floor=True)),
        seed=s.seed,
    )
    reference = at.margins(at.oracles(task))
    rows = []
    for method in METHODS:
        if method == "gd":
            fewer = replace(at.learner, n_steps=max(1, round(s.cost * n_steps)))
            margins = at.margins(at.train(at.without(task), 4, task, start=originals, learner=fewer))
            cost = fewer.n_steps / n_steps
        else:
            done = unlearn.get(method)(problem, **{"cost": s.cost} if method in MATCHING else {})
            margins, cost = done.margins, done.cost * (problem.retraining / work if method in MATCHING else 1)
        names = {"forget_set": f"task {task}", "method": method}
        rows += [
            names | {"split": split, "statistic": f"klom_{name}"} | asdict(e) | {"cost": cost}
            for split, statistics in metrics.klom_summary(margins, reference, splits, seed=s.seed).items()
            for name, e in statistics.items()
        ]
    return pd.DataFrame(rows)


def compare(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """Run every method on every reported task at `forget_lam`: rows as of `forget`."""
    at = setting(data, s, s.forget_lam)
    models = at.originals(), attribute(at)
    return pd.concat([forget(at, k, *models) for k in range(s.n_forget)], ignore_index=True)


def nothing(at: Setting) -> pd.DataFrame:
    """Compute KLoM p95 of doing nothing on the forgotten task's points, and its floor: a row for each reported task.

    Columns "do nothing" and "floor": everyone adapts to the same support sets, or with ", own support" to their own.
    "shift": absolute change of a point's mean score on leaving out its task; "spread": its standard deviation.
    """
    rng, originals, rows = torch.Generator().manual_seed(at.s.seed), at.originals(), []
    for task in range(at.s.n_forget):
        here, models = at.splits(task)["forget"], (originals, at.oracles(task), at.oracles(task, floor=True))
        row = {}
        for own, suffix in ((None, ""), (rng, ", own support")):
            o, q, f = (at.margins(w, own)[:, here] for w in models)
            for name, value in (("do nothing", o), ("floor", f)):
                row[name + suffix] = float(metrics.STATISTICS["p95"](metrics.klom(value, q)))
            if own is None:
                row |= {"shift": np.abs(o.mean(0) - q.mean(0)).mean(), "spread": q.std(0, ddof=1).mean()}
        rows.append(row)
    return pd.DataFrame(rows)
