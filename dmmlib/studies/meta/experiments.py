"""What notebook 10 measures: stability, generalisation, and forgetting against both, each as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dmmlib.analysis.intervals import mean_over
from dmmlib.data import Dataset
from dmmlib.metrics import Estimate
from dmmlib.studies.meta import forgetting
from dmmlib.studies.meta.bounds import KINDS, Bounds
from dmmlib.studies.meta.learner import LOGISTIC, PHASE, SQUARED, Learner, largest_norm
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.tasks import Case, images, synthetic

SYMBOLS = {
    "m": "tasks m",
    "n": "examples n",
    "lam": "regularisation λ",
    "step": "meta-step γ",
    "n_steps": "meta-steps T",
    "inner_step": "task-step η",
    "inner_steps": "task-steps K",
}


def slope(x: np.ndarray, rows: np.ndarray) -> Estimate:
    """Fit the log-log slope of each row of rows (k, len(x)) against x: their mean with a 95 % interval."""
    centred = np.log(x) - np.log(x).mean()
    return mean_over(np.log(rows) @ centred / (centred**2).sum())


def measure(case: Case, s: MetaSettings, seed: int) -> pd.DataFrame:
    """Train on S and on S with one task, or one example, replaced, with the same randomness; compare losses.

    Each of `repeats` meta-samples gets `probes` replacements, by fresh draws in turn with adverse ones (labels as
    far from the drawn ones as can be). Each is judged on a new task of its own, at `queries` points with the drawn
    label and with the adverse one; the largest change counts. The loss of a stochastic learner is averaged over
    `seeds` runs first. The supremum over all replacements, which a bound speaks of, is at least what is found.

    Returns:
        A row for each kind of replacement (`bounds.KINDS`): `each`, the largest change over probes for each
        meta-sample (repeats,); `measured`, `low` and `high`, their mean and 95 % interval; `bound`, with G on
        the ball that held every model; `radius` of that ball. Raises as `Learner.check`.
    """
    learner, m, n, repeats, probes = case.learner, case.m, case.n, s.repeats, s.probes
    learner.check()
    rng = torch.Generator().manual_seed(seed)

    def draw(tasks: int, size: int) -> Tensor:
        """Examples (x, y) of tasks for each meta-sample: (repeats, tasks, size, d + 1)."""
        x, y = case.draw((repeats, tasks), size, rng)
        return torch.cat([x, y[..., None]], -1)

    def adverse(z: Tensor, which: slice = slice(1, None, 2)) -> Tensor:
        """The examples, with the opposite labels for every other probe, or for `which` ones."""
        z = z.clone()
        z[:, which, ..., -1] = learner.loss.flip(z[:, which, ..., -1])
        return z

    sample = draw(m, n + 1)  # the last example of each task is spare
    other = adverse(draw(probes, n))
    task = torch.randint(m, (repeats, probes), generator=rng)
    place = torch.randint(n, (repeats, probes), generator=rng)
    rows, columns = torch.arange(repeats)[:, None], torch.arange(probes)

    # Runs on the meta-sample itself, then with a task replaced for each probe, then with an example replaced.
    runs = sample[:, None, :, :n].repeat(1, 1 + 2 * probes, 1, 1, 1)
    runs[rows, 1 + columns, task] = other
    runs[rows, 1 + probes + columns, task, place] = adverse(sample[rows, task, n])
    seeds = s.seeds if learner.tasks_per_step else 1
    w, visited = learner.learn(runs[..., :-1], runs[..., -1], case.start.expand(seeds, 1, 1, -1), rng, shared=True)
    base, task_w, example_w = w.split([1, probes, probes], 2)

    new = draw(probes, n + 1 + s.queries)
    support, changed, queries = new[:, :, :n], new[:, :, :n].clone(), new[:, :, n + 1 :]
    changed[rows, columns, place] = adverse(new[:, :, n])
    queries = torch.cat([queries, adverse(queries, slice(None))], 2)
    radii = [visited]

    def losses(which: Tensor, z: Tensor) -> Tensor:
        u = learner.adapt(which.expand(seeds, repeats, probes, -1), z[..., :-1], z[..., -1])
        radii.append(largest_norm(u))
        return learner.loss.at(u, queries[..., :-1], queries[..., -1]).mean(0)

    before = losses(base, support)
    after = [losses(task_w, support), losses(example_w, support), losses(base, changed), losses(task_w, changed)]
    each = [(new - before).abs().amax((1, 2)).numpy() for new in after]
    table = pd.DataFrame([mean_over(v) for v in each], pd.Index(KINDS, name="kind")).clip(lower=0)
    bound = table.index.map(Bounds.of(case, max(radii)).changes())
    table["bound"], table["radius"], table["each"] = bound, max(radii), pd.Series(each, table.index)
    return table.rename(columns={"value": "measured"})


def gap(case: Case, s: MetaSettings, seed: int, radius: float = 0.0) -> dict[str, float]:
    """Measure transfer risk, its excess over average empirical risk with a 95 % interval, and the bound of that.

    Transfer risk: loss at `queries` fresh examples of each of `gap_tasks` fresh tasks, after adapting to n others;
    empirical risk: loss of the models adapted to the training tasks on those very examples; over `gap_repeats`
    meta-samples. The bound's G is that of the ball of `radius`, or of what is visited here if that is larger.
    """
    learner, n, rng = case.learner, case.n, torch.Generator().manual_seed(seed)
    x, y = case.draw((s.gap_repeats, case.m), n, rng)
    w, visited = learner.learn(x, y, case.start, rng)
    own = learner.adapt(w[:, None], x, y)
    empirical = learner.loss.at(own, x, y).mean((1, 2))
    new_x, new_y = case.draw((s.gap_repeats, s.gap_tasks), n + s.queries, rng)
    u = learner.adapt(w[:, None], new_x[:, :, :n], new_y[:, :, :n])
    transfer = learner.loss.at(u, new_x[:, :, n:], new_y[:, :, n:]).mean((1, 2))
    mean = mean_over((transfer - empirical).numpy())
    bound = Bounds.of(case, max(radius, visited, largest_norm(u))).changes()["meta"]
    return {"transfer": float(transfer.mean()), "gap": mean.value, "low": mean.low, "high": mean.high, "bound": bound}


def cases(s: MetaSettings) -> list[Case]:
    """Make synthetic logistic and linear regression and phase retrieval, by the learner where nothing varies."""
    base = Learner(LOGISTIC, s.lam, s.step, s.steps, "prox", s.inner_step, s.inner_steps)
    return [synthetic(replace(base, loss=loss), s.m, s.n, s.dim, s.spread) for loss in (LOGISTIC, SQUARED, PHASE)]


def families(data: Dataset, s: MetaSettings) -> list[Case]:
    """List every kind of task that is studied: these and images, with a lambda that weakly convex losses need."""
    logistic, squared, phase = cases(s)
    weak = phase.changed(lam=s.weak_lams[1], step=s.step / s.weak_lams[1])
    return [logistic, squared, images(data, s.side, logistic.learner, s.m, s.n), weak]


def sweeps(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """Measure stability and its bounds while one quantity varies: a row for each family, quantity, value and kind."""
    sizes, meta_level = {"m": s.ms, "n": s.ns}, {"step": s.gammas, "n_steps": s.ts}
    every = {**sizes, "lam": s.lams, **meta_level}
    logistic, squared, pictures, phase = families(data, s)
    varied: list[tuple[Case, Mapping[str, Sequence[float]]]] = [
        (logistic, every),
        (logistic.changed(inner="gd"), {**sizes, **meta_level, "inner_step": s.etas, "inner_steps": s.ks}),
        (squared, every),
        (pictures, {"m": s.ms[:4], "n": s.ns[:4], "lam": s.lams}),
        (phase, {"m": s.ms[:3], "n": s.ns[:3], "lam": s.weak_lams}),
    ]
    tables = []
    for case, quantities in varied:
        named = {"tasks": case.name, "inner": case.learner.inner}
        for name, values in quantities.items():
            for value in values:
                found = measure(case.changed(**{name: value}), s, s.seed)
                tables.append(found.assign(**named, varies=name, value=value))
    return pd.concat(tables).reset_index()


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Compute log-log slopes of the measured stability, with 95 % intervals, beside the bounds' over the same grid."""
    rows = []
    for (tasks, inner, varies, kind), part in table.groupby(["tasks", "inner", "varies", "kind"], sort=False):
        x, each, bound = part["value"].to_numpy(float), np.stack(part["each"].to_list(), 1), part["bound"].to_numpy()
        if (each <= 0).any():
            continue
        case = {"tasks": tasks, "inner": inner, "varies": SYMBOLS[str(varies)], "replaced": kind}
        its, looseness = slope(x, np.stack([bound] * 2)).value, (part["bound"] / part["measured"]).median()
        fitted = dict(zip(("slope", "low", "high"), astuple(slope(x, each)), strict=True))
        rows.append(case | fitted | {"bound's slope": its, "looseness": looseness})
    return pd.DataFrame(rows)


def gaps(data: Dataset, s: MetaSettings, measured: pd.DataFrame) -> pd.DataFrame:
    """Measure transfer minus empirical risk against m, n and lambda, beside the stability that `sweeps` measured."""
    known = {case.name: case for case in families(data, s) if case.learner.loss is not PHASE}
    chosen = measured.query("kind == 'meta' and inner == 'prox' and varies in ['m', 'n', 'lam'] and tasks in @known")
    rows = []
    for row in chosen[["tasks", "varies", "value", "measured", "radius"]].to_dict("records"):
        case = known[row["tasks"]].changed(**{row["varies"]: row["value"]})
        rows.append(row | gap(case, s, s.seed + 1, row["radius"]))
    return pd.DataFrame(rows).rename(columns={"measured": "stability"})


def assumptions(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """Check what the bounds assume against what the experiments do, on adapted models: a row for each task family.

    Curvature: (grad l(u') - grad l(u)) . (u' - u) / ||u' - u||^2 of single examples, negative where l is not convex.
    """
    rows = []
    for case in families(data, s):
        at, rng = case.learner, torch.Generator().manual_seed(s.seed)
        x, y = case.draw((256,), s.n, rng)
        u = at.adapt(case.start.expand(len(x), -1), x, y)
        moved = u + 0.1 * torch.randn(u.shape, generator=rng, dtype=u.dtype)
        radius, apart = largest_norm(torch.cat([u, moved])), moved - u
        g, g_moved = (at.loss.gradient(v[:, None], x[:, :, None], y[..., None]) for v in (u, moved))
        curvature = ((g_moved - g) * apart[:, None]).sum(-1) / (apart**2).sum(-1)[:, None]
        bounds = Bounds.of(case, radius)
        rows.append(
            {
                "tasks": case.name,
                "‖x‖ ≤ 1": largest_norm(x),
                "Lipschitz: largest gradient / G": largest_norm(g) / bounds.lipschitz,
                "G": bounds.lipschitz,
                "G holds": "everywhere" if at.loss is LOGISTIC else f"for ‖u‖ ≤ {radius:.2f}, as visited",
                "convex: lowest curvature": float(curvature.min()),
                "assumed": bounds.curvature,
                "smooth": "yes" if at.loss is not PHASE else "no",
                "λ + μ > 0": at.lam + bounds.curvature,
                "γλ ≤ 1": at.step * at.lam,
            }
        )
    return pd.DataFrame(rows).assign(**{"tasks i.i.d.": "yes", "loss bounded": "not needed in expectation"})


def forgetting_against_stability(data: Dataset, s: MetaSettings) -> pd.DataFrame:
    """Measure KLoM of doing nothing, and stability of the same learner: a row for each lambda."""
    rows = []
    for lam in s.forget_lams:
        at, row = forgetting.setting(data, s, lam), {"lam": lam}
        case = images(data, s.side, at.learner, s.tasks, s.shots)
        found = measure(case, s.model_copy(update={"seeds": 4}), s.seed)
        for name, values in {**forgetting.nothing(at), **found["each"]}.items():
            mean = mean_over(np.asarray(values))
            row |= {name: mean.value, f"{name} low": max(0.0, mean.low), f"{name} high": mean.high}
            if name in found.index:
                row[f"{name} bound"] = found.loc[name, "bound"]
        rows.append(row)
    return pd.DataFrame(rows)
