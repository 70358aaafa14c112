"""Exact, certified and approximate unlearning of one forget set, each against its own retraining.

Costs are sample gradients (forward and backward on one example, 2 d multiplications), relative to one training by SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from dmmlib import ensemble, metrics, unlearn
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.errors import DataError
from dmmlib.execution import Execution
from dmmlib.forget_sets import ForgetSet, check_forget_indices
from dmmlib.studies.exact.chains import SGD, delete, learn
from dmmlib.studies.exact.problem import Problem

CURVATURE_SLOPE = 1 / (6 * np.sqrt(3))  # the logistic loss's largest third derivative
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One forget set; raises ForgetSetError for indices that are no proper part of the training set."""

    train: Problem  # S
    val: Problem  # validation points
    forget: np.ndarray  # indices of F in S
    n_models: int  # N, models of each kind

    def __post_init__(self) -> None:
        object.__setattr__(self, "forget", check_forget_indices(self.forget, self.train.n))

    @property
    def retained(self) -> np.ndarray:
        """R of every model, bool (N, n_train)."""
        keep = np.ones((self.n_models, self.train.n), bool)
        keep[:, self.forget] = False
        return keep

    def margins(self, w: np.ndarray) -> np.ndarray:
        """Return margins (N, n_train + n_val), training points first."""
        return np.concatenate([self.train.margins(w), self.val.margins(w)], 1)

    def row(self, method: str, setting: str, guarantee: str, costs: tuple[float, float], *margins: np.ndarray) -> Row:
        """Make a row of the table: accuracy, and KLoM's p95 of each split, beside doing nothing and the retrain floor.

        Args:
            guarantee: what is proven.
            costs: of unlearning F, and of one random point (NaN if not asked).
            margins: (N, n_train + n_val) of models of S, of unlearned ones, and of models retrained without F, twice.
        """
        original, unlearned, oracle, floor = margins
        splits = ForgetSet("", self.forget).splits(n := self.train.n, self.val.n)
        found, again, nothing = (metrics.klom_summary(m, oracle, splits) for m in (unlearned, floor, original))
        return {
            "method": method,
            "setting": setting,
            "guarantee": guarantee,
            "cost": costs[0],
            "cost of one point": costs[1],
            "accuracy": float((unlearned[:, n:] > 0).mean()),
            "forget": found["forget"]["p95"].value,
            "forget low": found["forget"]["p95"].low,  # of its 95 % interval over models
            "retain": found["retain"]["p95"].value,
            "validation": found["validation"]["p95"].value,
            "do nothing": nothing["forget"]["p95"].value,
            "floor": again["forget"]["p95"].value,
            "floor high": again["forget"]["p95"].high,
        }


def tv_stable(task: Task, sgd: SGD, rng: np.random.Generator) -> Row:
    """Unlearn by the exact method of `chains`; the model is the averaged iterate."""
    originals = learn(task.train, sgd, task.n_models, rng)
    unlearned, receipt = delete(task.train, originals, task.forget, rng)
    singles = [delete(task.train, originals, rng.integers(0, task.train.n, (task.n_models, 1)), rng) for _ in range(5)]
    oracle, floor = (learn(task.train, sgd, task.retained, rng) for _ in range(2))
    costs = float(receipt.cost.mean()) / sgd.work, float(np.mean([one.cost for _, one in singles])) / sgd.work
    margins = (task.margins(chains.average) for chains in (originals, unlearned, oracle, floor))
    setting = f"noise {sgd.noise:g}" if sgd.noise else ""
    return task.row(f"TV-stable, {sgd.variant}", setting, "exact", costs, *margins)


def sisa(task: Task, sgd: SGD, n_shards: int, rng: np.random.Generator) -> Row:
    """Shard (Bourtoule et al., "Machine Unlearning", 2021): average one model per shard; retrain the shards hit.

    Each point's shard is drawn on its own, so that leaving points out leaves the others' shards as they were
    and the result is exact; a partition into equal parts would not be. A shard gets 1 / n_shards of the steps.
    """
    part = SGD(max(1, sgd.n_steps // n_shards), sgd.batch_size, sgd.lr, sgd.radius)
    n_models, n = task.n_models, task.train.n

    def shards() -> np.ndarray:
        members = rng.integers(0, n_shards, (n_models, 1, n)) == np.arange(n_shards)[:, None]
        return members.reshape(n_models * n_shards, n)

    def train(members: np.ndarray) -> np.ndarray:
        return learn(task.train, part, members, rng).average

    retained = np.repeat(task.retained, n_shards, 0)
    members = shards()
    hit = members[:, task.forget].any(1)
    original = train(members)
    unlearned = original.copy()
    unlearned[hit] = train((members & retained)[hit])
    weights = original, unlearned, train(shards() & retained), train(shards() & retained)
    margins = (task.margins(w.reshape(n_models, n_shards, -1).mean(1)) for w in weights)  # scores are linear in w
    share = part.n_steps / sgd.n_steps
    costs = float(hit.mean()) * n_shards * share, share
    return task.row("SISA", f"{n_shards} shards", "exact", costs, *margins)


def gradient(problem: Problem, ridge: float, b: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Compute the gradient (rows, d) of sum of losses + ridge n / 2 ||w||^2 + b . w, for each w and b (rows, d)."""
    return (-problem.y * expit(-problem.margins(w))) @ problem.x + ridge * problem.n * w + b


def newton(problem: Problem, ridge: float, b: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Compute what a Newton step on the same objective adds to each w (rows, d)."""
    margins = problem.margins(w)
    products = (problem.x[:, :, None] * problem.x[:, None, :]).reshape(problem.n, -1)
    hessian = ((expit(margins) * expit(-margins)) @ products).reshape(-1, problem.dim, problem.dim)
    hessian += ridge * problem.n * np.eye(problem.dim)
    return -np.linalg.solve(hessian, gradient(problem, ridge, b, w)[..., None])[..., 0]


def fit(problem: Problem, ridge: float, b: np.ndarray, n_steps: int = 30) -> np.ndarray:
    """Minimise the same objective by Newton's method, for each b (rows, d): (rows, d). DataError if it does not end."""
    w = np.zeros_like(b)
    for _ in range(n_steps):
        if np.abs(gradient(problem, ridge, b, w)).max() < 1e-9 * problem.n:
            return w
        w = w + newton(problem, ridge, b, w)
    raise DataError(f"Newton's method did not converge in {n_steps} steps with ridge {ridge:g}; raise the ridge.")


def newton_step(rest: Problem, ridge: float, b: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take one Newton step from models w (rows, d) of S towards those of R.

    Returns:
        The unlearned models (rows, d), and a bound (rows,) on the norm of the gradient they leave:
        gamma / 2 ||X||_2 ||move||_2 ||X move||_2 with gamma the largest third derivative (Guo et al.,
        "Certified Data Removal", ICML 2020, corollary 2, with the 1/2 that its integral gives).
    """
    move = newton(rest, ridge, b, w)
    spread = np.linalg.norm(rest.x, 2) * np.linalg.norm(move @ rest.x.T, axis=1)
    return w + move, CURVATURE_SLOPE / 2 * spread * np.linalg.norm(move, axis=1)


def certified_newton(task: Task, noise: float, ridge: float, delta: float, work: int, rng: np.random.Generator) -> Row:
    """Take one Newton step (Guo et al., 2020) on logistic regression with a random linear term b . w.

    With b ~ N(0, noise^2 I) and a residual gradient of norm at most beta, the step is (epsilon, delta)-certified
    with epsilon = beta sqrt(2 log(1.5 / delta)) / noise. The Hessian of S is taken as kept from training: F's
    share is subtracted (|F| d / 2 sample gradients), solved with (d^2 / 6), and the bound needs a pass (n / 2).
    """
    d = task.train.dim
    rest = task.train.part(np.flatnonzero(task.retained[0]))
    b, *others = (noise * rng.standard_normal((task.n_models, d)) for _ in range(3))
    original = fit(task.train, ridge, b)
    unlearned, beta = newton_step(rest, ridge, b, original)
    epsilon = float(beta.max()) * np.sqrt(2 * np.log(1.5 / delta)) / noise
    group, one = ((size * (1 + d / 2) + d**2 / 6 + rest.n / 2) / work for size in (len(task.forget), 1))
    margins = map(task.margins, (original, unlearned, *(fit(rest, ridge, other) for other in others)))
    guarantee = f"({epsilon:.2g}, {delta:g})"
    return task.row("certified Newton", f"noise {noise:g}", guarantee, (group, one), *margins)


def dmm(
    task: Task, training: ensemble.Training, n_subsets: int, lam: float, costs: Sequence[float], seed: int
) -> list[Row]:
    """Run the study's own method on the same points, with a ridge datamodel: a row for each cost."""
    n, n_models = task.train.n, task.n_models
    x = torch.from_numpy(np.concatenate([task.train.x, task.val.x])).float()
    labels = (np.concatenate([task.train.y, task.val.y]) > 0).astype(np.int64)
    y = torch.from_numpy(labels)
    rng = np.random.default_rng(seed)
    half = np.argsort(rng.random((n_subsets, n)), 1).argsort(1) < n // 2

    def train(masks: np.ndarray) -> tuple[ensemble.Ensemble, np.ndarray]:
        seeds = rng.integers(0, 2**31, len(masks)).tolist()
        models = ensemble.train(
            lambda: torch.nn.Linear(x.shape[1], 2), x[:n], y[:n], masks, seeds, training, Execution(100)
        )
        return models, models.logits(x).numpy()

    (originals, logits), (_, subsets) = train(np.ones((n_models, n), bool)), train(half)
    original, oracle, floor = (metrics.margins(z, labels) for z in (logits, *(train(task.retained)[1] for _ in "12")))
    attributor = RidgeDatamodel.fit(half, metrics.margin_gauge(subsets, labels), lam)
    problem = unlearn.Problem(originals, logits, x, y, n, task.forget, training, attributor, seed=seed)
    rows = []
    for cost in costs:
        done = unlearn.get("dmm")(problem, cost=cost)
        costs_here = done.cost * problem.retraining / (training.epochs * n), np.nan
        margins = original, done.margins, oracle, floor
        rows.append(task.row("DMM", f"{cost:.0%} of retraining", "none", costs_here, *margins))
    return rows
