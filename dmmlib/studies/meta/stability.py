"""Stability and generalisation, measured: the same meta-training with one thing replaced, and on fresh tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from dmmlib.errors import DataError
from dmmlib.metrics import Estimate
from dmmlib.studies.meta.bounds import KINDS, constants, stability_bounds
from dmmlib.studies.meta.learner import Learner, adapt, learn
from dmmlib.studies.meta.tasks import Environment


@dataclass(frozen=True)
class Stability:
    """Worst changes of loss, and what they may be.

    Attributes:
        worst: kind of replacement (`bounds.KINDS`) -> largest change over probes, a meta-sample (repeats,).
        bound: kind -> bound, with G on the ball that held every model.
        radius: of that ball.
    """

    worst: dict[str, np.ndarray]
    bound: dict[str, float]
    radius: float


@dataclass(frozen=True)
class Sizes:
    """How much is measured: see `MetaSettings`."""

    repeats: int = 8
    probes: int = 16
    queries: int = 64
    seeds: int = 16


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean with a 95 % t interval over independent values (k,).

    Raises:
        DataError: for fewer than two.
    """
    if len(values) < 2:
        raise DataError(f"An interval over {len(values)} value was asked for; repeat at least twice.")
    centre = float(np.mean(values))
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Estimate(centre, centre - half, centre + half)


def measure(env: Environment, learner: Learner, m: int, n: int, sizes: Sizes, seed: int) -> Stability:
    """Train on S and on S with one task, or one example, replaced, with the same randomness; compare losses.

    Each of `repeats` meta-samples gets `probes` replacements, by fresh draws in turn with adverse ones (labels as
    far from the drawn ones as can be), each judged on a new task of its own, at `queries` points with the drawn
    label and with the adverse one; the largest change counts. The loss of a stochastic learner is averaged over
    `seeds` runs first. The supremum over all replacements, which a bound speaks of, is at least what is found.

    Raises:
        DataError, PresetError: as `Learner.check`.
    """
    learner.check(env.loss, m, n)
    rng = torch.Generator().manual_seed(seed)
    repeats, probes = sizes.repeats, sizes.probes
    adverse = (torch.arange(probes) % 2 == 1)[:, None]

    x, y = env.draw((repeats, m), n + 1, rng)  # the last example of each task is spare
    other_x, other_y = env.draw((repeats, probes), n, rng)
    other_y = torch.where(adverse, env.loss.flip(other_y), other_y)
    task = torch.randint(m, (repeats, probes), generator=rng)
    place = torch.randint(n, (repeats, probes), generator=rng)
    rows = torch.arange(repeats)[:, None]
    columns = torch.arange(probes)
    spare_x, spare_y = x[rows, task, n], y[rows, task, n]
    spare_y = torch.where(adverse[:, 0], env.loss.flip(spare_y), spare_y)

    runs_x = x[:, None, :, :n].repeat(1, 1 + 2 * probes, 1, 1, 1)
    runs_y = y[:, None, :, :n].repeat(1, 1 + 2 * probes, 1, 1)
    runs_x[rows, 1 + columns, task], runs_y[rows, 1 + columns, task] = other_x, other_y
    runs_x[rows, 1 + probes + columns, task, place] = spare_x
    runs_y[rows, 1 + probes + columns, task, place] = spare_y

    stochastic = learner.tasks_per_step is not None or learner.examples_per_step is not None
    seeds = sizes.seeds if stochastic else 1
    found = learn(learner, env.loss, runs_x, runs_y, env.start, rng, shared=(seeds, repeats, 1) if stochastic else None)
    w = found.w.expand(seeds, *found.w.shape[-3:])
    base, task_w, example_w = w[:, :, :1], w[:, :, 1 : 1 + probes], w[:, :, 1 + probes :]

    new_x, new_y = env.draw((repeats, probes), n + 1 + sizes.queries, rng)
    support, query = (new_x[:, :, :n], new_y[:, :, :n]), (new_x[:, :, n + 1 :], new_y[:, :, n + 1 :])
    changed = (support[0].clone(), support[1].clone())
    changed[0][rows, columns, place] = new_x[:, :, n]
    changed[1][rows, columns, place] = torch.where(adverse[:, 0], env.loss.flip(new_y[:, :, n]), new_y[:, :, n])
    both = torch.cat([query[0], query[0]], 2), torch.cat([query[1], env.loss.flip(query[1])], 2)
    radius = found.radius
    state = rng.get_state()

    def losses(which: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal radius
        rng.set_state(state)  # the same examples are drawn for both of a pair
        u = adapt(learner, env.loss, which.expand(seeds, repeats, probes, -1), *data, rng=rng)
        radius = max(radius, float(torch.linalg.vector_norm(u, dim=-1).max()))
        return env.loss.at(u, *both, learner.eps).mean(0)

    before = losses(base, support)
    after = {
        "task": losses(task_w, support),
        "example": losses(example_w, support),
        "adaptation": losses(base, changed),
        "meta": losses(task_w, changed),
    }
    worst = {kind: (after[kind] - before).abs().amax((1, 2)).numpy() for kind in KINDS}
    limit = {kind: float("nan") for kind in KINDS}
    if not learner.unchecked:
        limit = stability_bounds(constants(env.loss, learner, m, n, radius), learner)
    return Stability(worst, limit, radius)


def gap(
    env: Environment, learner: Learner, m: int, n: int, repeats: int, n_tasks: int, n_queries: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Transfer risk and average empirical risk of `repeats` meta-samples, and the radius visited.

    Transfer risk: loss on fresh examples of fresh tasks, after adapting to n examples of each; empirical risk: loss
    of the models adapted to the training tasks on those very examples.

    Returns:
        transfer (repeats,), empirical (repeats,), radius.
    """
    rng = torch.Generator().manual_seed(seed)
    x, y = env.draw((repeats, m), n, rng)
    found = learn(learner, env.loss, x, y, env.start, rng)
    own = adapt(learner, env.loss, found.w[:, None], x, y, rng=rng)
    empirical = env.loss.at(own, x, y, learner.eps).mean((1, 2))
    new_x, new_y = env.draw((repeats, n_tasks), n + n_queries, rng)
    u = adapt(learner, env.loss, found.w[:, None], new_x[:, :, :n], new_y[:, :, :n], rng=rng)
    transfer = env.loss.at(u, new_x[:, :, n:], new_y[:, :, n:], learner.eps).mean((1, 2))
    radius = max(found.radius, float(torch.linalg.vector_norm(u, dim=-1).max()))
    return transfer.numpy(), empirical.numpy(), radius


def slope(x: np.ndarray, rows: np.ndarray) -> Estimate:
    """Log-log slope of rows (k, len(x)) against x, fitted a row, with a 95 % interval over rows."""
    centred = np.log(x) - np.log(x).mean()
    return mean_estimate(np.log(rows) @ centred / (centred**2).sum())
