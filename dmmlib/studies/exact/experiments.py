"""What notebook 06 runs: exactness, price, and the comparison, each a table or arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from dmmlib import ensemble
from dmmlib.data import Dataset
from dmmlib.errors import PresetError
from dmmlib.studies.exact import compare
from dmmlib.studies.exact.chains import SGD, delete, insert, learn, recomputation_bound, tv_bound
from dmmlib.studies.exact.evidence import Verdict, keep_refused, never_refuse, redraw_refused, same_law
from dmmlib.studies.exact.problem import Problem, from_images, optimum
from dmmlib.studies.exact.settings import ExactSettings

BROKEN = {"no rejection": never_refuse, "no reflection": keep_refused, "redrawn, not reflected": redraw_refused}


@dataclass(frozen=True)
class Exactness:
    """Chains on few points, where one point matters much, after every way of treating it.

    Attributes:
        problem, sgd, point: what was trained, and the point that was deleted.
        runs: name -> iterates w_2 .. w_{T+1} (n_runs, T, d); "retrained" is what the others must be like.
        verdicts: name -> the test against "retrained".
        recomputed: share of runs in which deletion recomputed anything.
    """

    problem: Problem
    sgd: SGD
    point: int
    runs: dict[str, np.ndarray]
    verdicts: dict[str, Verdict]
    recomputed: float


def small(data: Dataset, s: ExactSettings) -> tuple[Problem, SGD, int]:
    """A problem of few points, its chain, and the point whose gradient at 0 is furthest from the others' mean."""
    train, _ = from_images(data, s.small_side, s.positive)
    problem = train.part(np.arange(s.small_n))
    gradients = -problem.y[:, None] * problem.x
    point = int(np.linalg.norm(gradients - gradients.mean(0), axis=1).argmax())
    return problem, SGD(s.small_steps, s.small_batch, s.small_lr, s.radius, s.small_noise), point


def exactness(data: Dataset, s: ExactSettings) -> Exactness:
    """Delete, insert and stream, right and wrong, `n_runs` times each; retrain as often; compare whole paths."""
    problem, sgd, point = small(data, s)
    rng = np.random.default_rng([s.seed, 0])
    without = np.ones((s.n_runs, problem.n), bool)
    without[:, point] = False
    other = (point + 1) % problem.n
    noiseless = replace(sgd, noise=0.0, variant="subsample")

    originals = learn(problem, sgd, s.n_runs, rng)
    unlearned, receipt = delete(problem, originals, point, rng)
    stream, _ = delete(problem, unlearned, other, rng)
    stream, _ = insert(problem, stream, point, rng)
    stream, _ = delete(problem, stream, point, rng)
    stream, _ = insert(problem, stream, other, rng)
    runs = {
        "retrained": learn(problem, sgd, without, rng),
        "retrained again": learn(problem, sgd, without, rng),
        "deleted": unlearned,
        "inserted": insert(problem, learn(problem, sgd, without, rng), point, rng)[0],
        "after 5 requests": stream,
        "deleted, subsample": delete(problem, learn(problem, noiseless, s.n_runs, rng), point, rng)[0],
        **{name: delete(problem, originals, point, rng, wrong)[0] for name, wrong in BROKEN.items()},
    }
    references = {
        "inserted": learn(problem, sgd, s.n_runs, rng),
        "deleted, subsample": learn(problem, noiseless, without, rng),
    }
    paths = {name: chains.iterates[:, 1:] for name, chains in runs.items()}
    verdicts = {
        name: same_law(path, references.get(name, runs["retrained"]).iterates[:, 1:], rng, s.n_permutations)
        for name, path in paths.items()
        if name != "retrained"
    }
    return Exactness(problem, sgd, point, paths, verdicts, float(receipt.recomputed.mean()))


def _recomputed(problem: Problem, sgd: SGD, n_runs: int, rng: np.random.Generator) -> dict[str, float]:
    """Delete another random point in every run: how often anything is recomputed, with a 95 % interval and bounds."""
    chains = learn(problem, sgd, n_runs, rng)
    _, receipt = delete(problem, chains, rng.integers(0, problem.n, (n_runs, 1)), rng)
    interval = binomtest(int(receipt.recomputed.sum()), n_runs).proportion_ci(method="wilson")
    return {
        "measured": float(receipt.recomputed.mean()),
        "low": interval.low,
        "high": interval.high,
        "bound": recomputation_bound(sgd, problem.n, problem.lipschitz),
        "rho": tv_bound(sgd, problem.n, problem.lipschitz),
        "cost": float(receipt.cost.mean()) / sgd.work,
        "n_runs": n_runs,
    }


def price(data: Dataset, s: ExactSettings) -> pd.DataFrame:
    """Probability of recomputation while noise, batch size, n or steps vary, one at a time, a row a setting."""
    train, _ = from_images(data, s.small_side, s.positive)
    sizes = tuple(n for n in s.price_n if n <= train.n) or (train.n,)
    sweeps = {"noise": s.price_noise, "batch": s.price_batch, "n": sizes, "steps": s.price_steps}
    middle = {key: values[len(values) // 2] for key, values in sweeps.items()}
    rng = np.random.default_rng([s.seed, 1])

    def rows() -> Iterator[dict[str, object]]:
        for key, values in sweeps.items():
            for value in values:
                at = middle | {key: value}
                problem = train.part(np.arange(int(at["n"])))
                for variant in ("noisy", "subsample") if key != "noise" else ("noisy",):
                    noise = float(at["noise"]) if variant == "noisy" else 0.0
                    sgd = SGD(int(at["steps"]), int(at["batch"]), s.lr, s.radius, noise, variant)
                    yield {"varies": key, "value": value, "variant": variant} | _recomputed(
                        problem, sgd, s.price_runs, rng
                    )

    return pd.DataFrame(rows())


def risk(data: Dataset, s: ExactSettings) -> pd.DataFrame:
    """Excess empirical risk of the averaged iterate and the price of a deletion, a row a noise.

    Theory: projected SGD from 0 on a loss of smoothness 1/4, with lr < 4 and gradients whose variance is at most
    s^2 = L^2 / m + d sigma^2, has an expected excess risk of at most ||w*||^2 / (2 lr T) + lr s^2 / (2 - lr / 2).
    """
    if not s.lr < 4:
        raise PresetError(f"exact.lr={s.lr:g}, but the bound on the risk needs a step below 4; lower it.")
    problem, _ = from_images(data, s.side, s.positive)
    best = optimum(problem, s.radius)
    lowest = float(problem.risk(best)[0])
    rng = np.random.default_rng([s.seed, 2])
    rows = []
    for noise in s.price_noise:
        sgd = SGD(s.steps, s.batch, s.lr, s.radius, noise)
        excess = problem.risk(learn(problem, sgd, s.n_models, rng).average) - lowest
        variance = problem.lipschitz**2 / s.batch + problem.dim * noise**2
        theory = float((best**2).sum()) / (2 * s.lr * s.steps) + s.lr * variance / (2 - s.lr / 2)
        half = 1.96 * float(excess.std(ddof=1)) / np.sqrt(len(excess))
        rows.append(
            {"noise": noise, "excess": float(excess.mean()), "half": half, "theory": theory}
            | _recomputed(problem, sgd, s.price_runs // 2, rng)
        )
    return pd.DataFrame(rows)


def comparison(data: Dataset, s: ExactSettings) -> pd.DataFrame:
    """Every method on one forget set of images alike; a row a method and setting (`compare.Outcome.row`)."""
    train, val = from_images(data, s.side, s.positive)
    same = np.flatnonzero(train.y == train.y[0])
    alike = same[np.argsort(-train.x[same] @ train.x[0], kind="stable")[: s.forget_size]]
    task = compare.Task(train, val, alike, s.n_models)
    rng = np.random.default_rng([s.seed, 3])
    quiet = SGD(s.steps, s.batch, s.lr, s.radius, variant="subsample")
    training = ensemble.Training(s.dmm_epochs, s.dmm_batch, s.dmm_lr, momentum=0.0, weight_decay=0.0)
    outcomes = [
        compare.tv_stable(task, quiet, rng),
        *(compare.tv_stable(task, replace(quiet, noise=v, variant="noisy"), rng) for v in s.noises),
        *(compare.sisa(task, quiet, k, rng) for k in s.shards),
        *(compare.certified_newton(task, v, s.ridge, s.delta, quiet.work, rng) for v in s.newton_noises),
        *compare.dmm(task, training, s.n_subsets, s.ridge_datamodel, s.dmm_costs, s.matching_lr, s.seed),
    ]
    return pd.DataFrame([outcome.row(task) for outcome in outcomes])
