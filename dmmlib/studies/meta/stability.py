"""Stability and generalisation, measured: the same meta-training with one thing replaced, and on fresh tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dmmlib.errors import DataError
from dmmlib.metrics import Estimate
from dmmlib.studies.meta.bounds import KINDS, Bounds
from dmmlib.studies.meta.learner import Learner, adapt, largest_norm, learn
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.tasks import Environment


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean with a 95 % t interval over independent values (k,); raises DataError for fewer than two."""
    if len(values) < 2:
        raise DataError(f"An interval over {len(values)} value was asked for; repeat at least twice.")
    centre = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(centre, centre - half, centre + half)


def slope(x: np.ndarray, rows: np.ndarray) -> Estimate:
    """Fit the log-log slope of each row of rows (k, len(x)) against x: their mean with a 95 % interval."""
    centred = np.log(x) - np.log(x).mean()
    return mean_estimate(np.log(rows) @ centred / (centred**2).sum())


@dataclass(frozen=True)
class Stability:
    """Worst changes of loss, and what they may be, for each kind of replacement (`bounds.KINDS`)."""

    worst: dict[str, np.ndarray]  # largest change over probes, for each meta-sample (repeats,)
    bound: dict[str, float]  # with G on the ball that held every model; NaN for an unchecked learner
    radius: float  # of that ball


def measure(env: Environment, learner: Learner, m: int, n: int, s: MetaSettings, seed: int) -> Stability:
    """Train on S and on S with one task, or one example, replaced, with the same randomness; compare losses.

    Each of `repeats` meta-samples gets `probes` replacements, by fresh draws in turn with adverse ones (labels as
    far from the drawn ones as can be). Each is judged on a new task of its own, at `queries` points with the drawn
    label and with the adverse one; the largest change counts. The loss of a stochastic learner is averaged over
    `seeds` runs first. The supremum over all replacements, which a bound speaks of, is at least what is found.

    Raises:
        DataError, PresetError: as `Learner.check`.
    """
    learner.check(env.loss, m, n)
    rng = torch.Generator().manual_seed(seed)
    repeats, probes, flip = s.repeats, s.probes, env.loss.flip
    rows, columns = torch.arange(repeats)[:, None], torch.arange(probes)
    adverse = columns % 2 == 1

    x, y = env.draw((repeats, m), n + 1, rng)  # the last example of each task is spare
    other_x, other_y = env.draw((repeats, probes), n, rng)
    task = torch.randint(m, (repeats, probes), generator=rng)
    place = torch.randint(n, (repeats, probes), generator=rng)
    spare = y[rows, task, n]

    # Runs on the meta-sample itself, then with a task replaced for each probe, then with an example replaced.
    run_x = x[:, None, :, :n].repeat(1, 1 + 2 * probes, 1, 1, 1)
    run_y = y[:, None, :, :n].repeat(1, 1 + 2 * probes, 1, 1)
    whole, single = (rows, 1 + columns, task), (rows, 1 + probes + columns, task, place)
    run_x[whole], run_y[whole] = other_x, torch.where(adverse[:, None], flip(other_y), other_y)
    run_x[single], run_y[single] = x[rows, task, n], torch.where(adverse, flip(spare), spare)

    seeds = s.seeds if learner.stochastic else 1
    shared = (seeds, repeats, 1) if learner.stochastic else None
    w, radius = learn(learner, env.loss, run_x, run_y, env.start, rng, shared)
    base, task_w, example_w = w.expand(seeds, *w.shape[-3:]).split([1, probes, probes], 2)

    new_x, new_y = env.draw((repeats, probes), n + 1 + s.queries, rng)
    support, query = (new_x[:, :, :n], new_y[:, :, :n]), (new_x[:, :, n + 1 :], new_y[:, :, n + 1 :])
    changed = support[0].clone(), support[1].clone()
    changed[0][rows, columns, place] = new_x[:, :, n]
    changed[1][rows, columns, place] = torch.where(adverse, flip(new_y[:, :, n]), new_y[:, :, n])
    both = torch.cat([query[0], query[0]], 2), torch.cat([query[1], flip(query[1])], 2)
    state, radii = rng.get_state(), [radius]

    def losses(which: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        rng.set_state(state)  # the same examples are drawn for both of a pair
        u = adapt(learner, env.loss, which.expand(seeds, repeats, probes, -1), *data, rng=rng)
        radii.append(largest_norm(u))
        return env.loss.at(u, *both, learner.eps).mean(0)

    before = losses(base, support)
    after = {
        "task": losses(task_w, support),
        "example": losses(example_w, support),
        "adaptation": losses(base, changed),
        "meta": losses(task_w, changed),
    }
    worst = {kind: (after[kind] - before).abs().amax((1, 2)).numpy() for kind in KINDS}
    bound = dict.fromkeys(KINDS, float("nan"))
    if not learner.unchecked:
        bound = Bounds.of(env.loss, learner, m, n, max(radii)).changes()
    return Stability(worst, bound, max(radii))


def gap(
    env: Environment, learner: Learner, m: int, n: int, s: MetaSettings, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Transfer risk and average empirical risk of `gap_repeats` meta-samples, and the radius visited.

    Transfer risk: loss at `queries` fresh examples of each of `gap_tasks` fresh tasks, after adapting to n others;
    empirical risk: loss of the models adapted to the training tasks on those very examples.

    Returns:
        transfer (gap_repeats,), empirical (gap_repeats,), radius.
    """
    rng = torch.Generator().manual_seed(seed)
    x, y = env.draw((s.gap_repeats, m), n, rng)
    w, radius = learn(learner, env.loss, x, y, env.start, rng)
    own = adapt(learner, env.loss, w[:, None], x, y, rng=rng)
    empirical = env.loss.at(own, x, y, learner.eps).mean((1, 2))
    new_x, new_y = env.draw((s.gap_repeats, s.gap_tasks), n + s.queries, rng)
    u = adapt(learner, env.loss, w[:, None], new_x[:, :, :n], new_y[:, :, :n], rng=rng)
    transfer = env.loss.at(u, new_x[:, :, n:], new_y[:, :, n:], learner.eps).mean((1, 2))
    return transfer.numpy(), empirical.numpy(), max(radius, largest_norm(u))
