"""Stability and generalisation, measured: the same meta-training with one thing replaced, and on fresh tasks."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from dmmlib.errors import DataError
from dmmlib.metrics import Estimate
from dmmlib.studies.meta.bounds import KINDS, Bounds
from dmmlib.studies.meta.learner import largest_norm
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.tasks import Case


def mean_estimate(values: np.ndarray, least: float = -np.inf) -> Estimate:
    """Mean with a 95 % t interval, cut off at `least`, over independent values (k,); raises DataError for one value."""
    if len(values) < 2:
        raise DataError(f"An interval over {len(values)} value was asked for; repeat at least twice.")
    centre = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(centre, max(least, centre - half), centre + half)


def slope(x: np.ndarray, rows: np.ndarray) -> Estimate:
    """Fit the log-log slope of each row of rows (k, len(x)) against x: their mean with a 95 % interval."""
    centred = np.log(x) - np.log(x).mean()
    return mean_estimate(np.log(rows) @ centred / (centred**2).sum())


def measure(case: Case, s: MetaSettings, seed: int) -> pd.DataFrame:
    """Train on S and on S with one task, or one example, replaced, with the same randomness; compare losses.

    Each of `repeats` meta-samples gets `probes` replacements, by fresh draws in turn with adverse ones (labels as
    far from the drawn ones as can be). Each is judged on a new task of its own, at `queries` points with the drawn
    label and with the adverse one; the largest change counts. The loss of a stochastic learner is averaged over
    `seeds` runs first. The supremum over all replacements, which a bound speaks of, is at least what is found.

    Returns:
        A row for each kind of replacement (`bounds.KINDS`): `each`, the largest change over probes for each
        meta-sample (repeats,); `measured`, `low` and `high`, their mean and 95 % interval; `bound`, NaN for an
        unchecked learner, with G on the ball that held every model; `radius` of that ball.

    Raises:
        DataError, PresetError: as `Learner.check`.
    """
    env, learner, m, n = case.env, case.learner, case.m, case.n
    learner.check(m, n)
    rng = torch.Generator().manual_seed(seed)
    repeats, probes, flip = s.repeats, s.probes, learner.loss.flip
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

    stochastic = learner.tasks_per_step is not None or learner.examples_per_step is not None
    seeds, shared = (s.seeds, (s.seeds, repeats, 1)) if stochastic else (1, None)
    w, radius = learner.learn(run_x, run_y, env.start, rng, shared)
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
        u = learner.adapt(which.expand(seeds, repeats, probes, -1), *data, rng=rng)
        radii.append(largest_norm(u))
        return learner.loss.at(u, *both, learner.eps).mean(0)

    before = losses(base, support)
    after = [losses(task_w, support), losses(example_w, support), losses(base, changed), losses(task_w, changed)]
    each = [(losses_ - before).abs().amax((1, 2)).numpy() for losses_ in after]
    bound = dict.fromkeys(KINDS, np.nan) if learner.unchecked else Bounds.of(case, max(radii)).changes()
    table = pd.DataFrame([astuple(mean_estimate(v, least=0)) for v in each], KINDS, ["measured", "low", "high"])
    return table.rename_axis("kind").assign(bound=bound, radius=max(radii), each=each)


def gap(case: Case, s: MetaSettings, seed: int, radius: float = 0.0) -> dict[str, float]:
    """Transfer risk minus average empirical risk over `gap_repeats` meta-samples.

    Transfer risk: loss at `queries` fresh examples of each of `gap_tasks` fresh tasks, after adapting to n others;
    empirical risk: loss of the models adapted to the training tasks on those very examples.

    Args:
        radius: of the ball that the bound's G is taken on, where it is larger than what is visited here.

    Returns:
        transfer: the mean transfer risk; gap, low, high: the difference with its 95 % interval; bound: on it.
    """
    env, learner, n = case.env, case.learner, case.n
    rng = torch.Generator().manual_seed(seed)
    x, y = env.draw((s.gap_repeats, case.m), n, rng)
    w, visited = learner.learn(x, y, env.start, rng)
    own = learner.adapt(w[:, None], x, y, rng=rng)
    empirical = learner.loss.at(own, x, y, learner.eps).mean((1, 2))
    new_x, new_y = env.draw((s.gap_repeats, s.gap_tasks), n + s.queries, rng)
    u = learner.adapt(w[:, None], new_x[:, :, :n], new_y[:, :, :n], rng=rng)
    transfer = learner.loss.at(u, new_x[:, :, n:], new_y[:, :, n:], learner.eps).mean((1, 2))
    mean = mean_estimate((transfer - empirical).numpy())
    bound = Bounds.of(case, max(radius, visited, largest_norm(u))).changes()["meta"]
    return {"transfer": float(transfer.mean()), "gap": mean.value, "low": mean.low, "high": mean.high, "bound": bound}
