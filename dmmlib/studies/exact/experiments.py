"""What notebook 06 runs: exactness, price, and the comparison, each a table or arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from dmmlib import ensemble
from dmmlib.analysis.intervals import wilson
from dmmlib.data import Dataset
from dmmlib.studies.exact import compare
from dmmlib.studies.exact.chains import SGD, delete, insert, learn, recomputation_bound, tv_bound
from dmmlib.studies.exact.evidence import BROKEN, same_law
from dmmlib.studies.exact.problem import LIPSCHITZ, Problem, from_images, optimum
from dmmlib.studies.exact.settings import ExactSettings


@dataclass(frozen=True)
class Exactness:
    """Chains on few points, where one point matters much, after every way of treating it."""

    runs: dict[str, np.ndarray]  # iterates w_2 .. w_{T+1} (n_runs, T, d); "retrained" is what others must be like
    p_values: pd.DataFrame  # of the tests against "retrained" (`evidence.same_law`), a row for each way
    recomputed: float  # share of runs in which deletion recomputed anything


def small(data: Dataset, s: ExactSettings) -> tuple[Problem, SGD, int]:
    """Make a problem of few points and its chain, and find the point whose gradient at 0 is most unlike the others'."""
    train, _ = from_images(data, s.small_side, s.positive)
    problem = train.part(np.arange(s.small_n))
    gradients = -problem.y[:, None] * problem.x
    point = int(np.linalg.norm(gradients - gradients.mean(0), axis=1).argmax())
    return problem, SGD(s.small_steps, s.small_batch, s.small_lr, s.radius, s.small_noise), point


def exactness(data: Dataset, s: ExactSettings) -> Exactness:
    """Delete, insert and serve a sequence, correctly and wrongly, `n_runs` times each; retrain as often."""
    problem, sgd, point = small(data, s)
    rng = np.random.default_rng([s.seed, 0])
    without = np.ones((s.n_runs, problem.n), bool)
    without[:, point] = False
    other = (point + 1) % problem.n
    noiseless = replace(sgd, noise=0.0)

    originals = learn(problem, sgd, s.n_runs, rng)
    unlearned, receipt = delete(problem, originals, point, rng)
    stream = unlearned
    for change, at in ((delete, other), (insert, point), (delete, point), (insert, other)):
        stream, _ = change(problem, stream, at, rng)
    chains = {
        "retrained": learn(problem, sgd, without, rng),
        "retrained again": learn(problem, sgd, without, rng),
        "deleted": unlearned,
        "inserted": insert(problem, learn(problem, sgd, without, rng), point, rng)[0],
        "after 5 requests": stream,
        "deleted, subsample": delete(problem, learn(problem, noiseless, s.n_runs, rng), point, rng)[0],
        **{name: delete(problem, originals, point, rng, wrong)[0] for name, wrong in BROKEN.items()},
    }
    references = {"inserted": learn(problem, sgd, s.n_runs, rng)}
    references["deleted, subsample"] = learn(problem, noiseless, without, rng)
    runs = {name: state.iterates[:, 1:] for name, state in chains.items()}
    p_values = {
        name: same_law(path, references.get(name, chains["retrained"]).iterates[:, 1:], rng, s.n_permutations)
        for name, path in runs.items()
        if name != "retrained"
    }
    return Exactness(runs, pd.DataFrame(p_values).T, float(receipt.recomputed.mean()))


def _recomputed(problem: Problem, sgd: SGD, n_runs: int, rng: np.random.Generator) -> dict[str, float]:
    """Delete another random point in every run: how often anything is recomputed, with a 95 % interval and bounds."""
    chains = learn(problem, sgd, n_runs, rng)
    _, receipt = delete(problem, chains, rng.integers(0, problem.n, (n_runs, 1)), rng)
    measured = wilson(int(receipt.recomputed.sum()), n_runs)
    return {
        "measured": measured.value,
        "low": measured.low,
        "high": measured.high,
        "bound": recomputation_bound(sgd, problem.n),
        "rho": tv_bound(sgd, problem.n),
        "cost": float(receipt.cost.mean()) / sgd.work,
        "n_runs": n_runs,
    }


def price(data: Dataset, s: ExactSettings) -> pd.DataFrame:
    """Measure the probability of recomputation while noise, batch size, n or steps vary: a row for each setting."""
    train, _ = from_images(data, s.small_side, s.positive)
    sizes = tuple(n for n in s.price_n if n <= train.n) or (train.n,)
    sweeps = {"noise": s.price_noise, "batch": s.price_batch, "n": sizes, "steps": s.price_steps}
    middle = {key: values[len(values) // 2] for key, values in sweeps.items()}
    rng = np.random.default_rng([s.seed, 1])
    rows = []
    for key, value in ((key, value) for key, values in sweeps.items() for value in values):
        at = middle | {key: value}
        problem = train.part(np.arange(int(at["n"])))
        for noise in (at["noise"],) if key == "noise" else (at["noise"], 0.0):
            sgd = SGD(int(at["steps"]), int(at["batch"]), s.lr, s.radius, noise)
            names = {"varies": key, "value": value, "variant": sgd.variant}
            rows.append(names | _recomputed(problem, sgd, s.price_runs, rng))
    return pd.DataFrame(rows)


def risk(data: Dataset, s: ExactSettings) -> pd.DataFrame:
    """Measure excess empirical risk of the averaged iterate and the price of a deletion: a row for each noise.

    Theory: projected SGD from 0 on a loss of smoothness 1/4, with lr < 4 and gradients whose variance is at most
    s^2 = L^2 / m + d sigma^2, has an expected excess risk of at most ||w*||^2 / (2 lr T) + lr s^2 / (2 - lr / 2).
    """
    problem, _ = from_images(data, s.side, s.positive)
    best = optimum(problem, s.radius)
    lowest = float(problem.risk(best)[0])
    rng = np.random.default_rng([s.seed, 2])
    rows = []
    for noise in s.price_noise:
        sgd = SGD(s.steps, s.batch, s.lr, s.radius, noise)
        excess = problem.risk(learn(problem, sgd, s.n_models, rng).average) - lowest
        variance = LIPSCHITZ**2 / s.batch + problem.dim * noise**2
        theory = float((best**2).sum()) / (2 * s.lr * s.steps) + s.lr * variance / (2 - s.lr / 2)
        half = 1.96 * float(excess.std(ddof=1)) / np.sqrt(len(excess))
        found = {"noise": noise, "excess": float(excess.mean()), "half": half, "theory": theory}
        rows.append(found | _recomputed(problem, sgd, s.price_runs // 2, rng))
    return pd.DataFrame(rows)


def comparison(data: Dataset, s: ExactSettings) -> pd.DataFrame:
    """Compare every method on one forget set of images alike: a row for each (`compare.Task.row`)."""
    train, val = from_images(data, s.side, s.positive)
    same = np.flatnonzero(train.y == train.y[0])
    alike = same[np.argsort(-train.x[same] @ train.x[0], kind="stable")[: s.forget_size]]
    task = compare.Task(train, val, alike, s.n_models)
    rng = np.random.default_rng([s.seed, 3])
    quiet = SGD(s.steps, s.batch, s.lr, s.radius)
    training = ensemble.Training(s.dmm_epochs, s.dmm_batch, s.dmm_lr, momentum=0.0, weight_decay=0.0)
    rows = [
        *(compare.tv_stable(task, replace(quiet, noise=noise), rng) for noise in (0.0, *s.noises)),
        *(compare.sisa(task, quiet, k, rng) for k in s.shards),
        *(compare.certified_newton(task, noise, s.ridge, s.delta, quiet.work, rng) for noise in s.newton_noises),
        *compare.dmm(task, training, s.n_subsets, s.ridge_datamodel, s.dmm_costs, s.seed),
    ]
    return pd.DataFrame(rows)
