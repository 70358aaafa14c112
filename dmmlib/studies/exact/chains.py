"""Noisy mini-batch SGD that can be unlearned exactly, thousands of independent chains at once.

Ullah, Mai, Rao, Rossi, Arora, "Machine Unlearning via Algorithmic Stability", COLT 2021. With S the points that
are present, a chain draws at each step t = 1 .. T a batch of m *slots*, each uniform on S and independent of
the others, and

    mu_t = average gradient of the batch at w_t,    v_t ~ N(mu_t, sigma^2 I),    w_{t+1} = project(w_t - lr v_t).

The state is all of it: batches, means mu, noisy steps v (before the projection) and iterates w.

**Deleting F** turns a chain on S (n points) into one on S' = S \\ F (n - f), changing as little as it can:

1. *Batches.* Every slot that holds a point of F gets a uniform point of S'. A slot then holds i in S' with
   probability 1/n + (f/n) / (n - f) = 1/(n - f): uniform on S', and still independent of all else. (Inserting
   F: every slot is handed, with probability f/(n + f), to a uniform point of F: i of S stays with probability
   (1/n) n/(n + f).)
2. *Steps.* Walk the chain. Where the batch changed, mu became mu'. Keep v with probability
   min(1, N(v; mu') / N(v; mu)). Kept values at y have density min(N(y; mu), N(y; mu')). Otherwise take
   v' = mu + mu' - v: that map swaps the two densities, so refused values arrive at y with density
   max(0, N(y; mu') - N(y; mu)). Together N(y; mu'), exactly. No coupling keeps more: the chance of refusal is
   the total variation distance 2 Phi(||mu - mu'|| / 2 sigma) - 1.
3. *The rest.* Up to the first refusal the iterates stand, so the next step meets the same w_t in both chains;
   after it, draw the rest afresh on S'.

Given a prefix with the law of training on S', each step extends it by the correct conditional law whatever
happened before (uniforms of acceptance are independent of all else), so by induction the *whole state* has the
law of training on S', not only the last iterate; the next request meets a state as good as new, and a sequence
of any length stays exact. Two conditions: the requests must not depend on the chain's randomness (someone who
picks them by looking at the models is not covered), and a generator must not be used again from the
seed that made the state.

The *subsample* variant has sigma = 0: a changed batch is always refused, with v' = mu'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy.stats import binom, norm

from dmmlib.ensemble import check_masks
from dmmlib.errors import ForgetSetError, PresetError
from dmmlib.forget_sets import check_forget_indices
from dmmlib.studies.exact.problem import LIPSCHITZ, Problem, project

Points = int | Sequence[int] | np.ndarray
"""The points of a request: one, several, or each run's own (n_runs, k)."""


@dataclass(frozen=True)
class SGD:
    """How a chain is trained; raises PresetError for numbers out of range."""

    n_steps: int  # T
    batch_size: int  # m, slots per step
    lr: float
    radius: float  # of the ball around 0 that iterates are projected onto
    noise: float = 0.0  # sigma, standard deviation of each coordinate of the noise on the averaged gradient

    def __post_init__(self) -> None:
        for key in ("n_steps", "batch_size", "lr", "radius"):
            value, whole = getattr(self, key), key in ("n_steps", "batch_size")
            if not 0 < value < np.inf or (whole and value != int(value)):
                raise PresetError(f"SGD has {key}={value}; give a positive {'whole ' * whole}number.")
        if not 0 <= self.noise < np.inf:
            raise PresetError(f"SGD has noise={self.noise}; give a standard deviation, or 0 for no noise.")

    @property
    def variant(self) -> str:
        return "noisy" if self.noise else "subsample"

    @property
    def work(self) -> int:
        """Sample gradients of one training."""
        return self.n_steps * self.batch_size


@dataclass(frozen=True)
class Chains:
    """The state of `n_runs` chains: all that a later request needs."""

    sgd: SGD  # how they were trained
    present: np.ndarray  # S of each run, bool (n_runs, n)
    batches: np.ndarray  # points (n_runs, T, m), int32
    means: np.ndarray  # mu, average gradients (n_runs, T, d)
    steps: np.ndarray  # v, the noisy gradients that were taken (n_runs, T, d)
    iterates: np.ndarray  # w (n_runs, T + 1, d), the first one 0

    @property
    def n_runs(self) -> int:
        return len(self.iterates)

    @property
    def average(self) -> np.ndarray:
        """Mean of the iterates w_2 .. w_{T+1} (n_runs, d): the model whose risk SGD theory bounds."""
        return self.iterates[:, 1:].mean(1)


class Receipt(NamedTuple):
    """What a request did in each run, arrays (n_runs,)."""

    since: np.ndarray  # step of the first refusal, from 0, or T where every step was kept
    cost: np.ndarray  # sample gradients computed
    recomputed: np.ndarray  # whether anything was drawn again


Array = np.ndarray
Coupling = Callable[[Array, Array, Array, float, Generator], tuple[Array, Array]]
"""(steps, old means, new means (k, d), noise, generator) -> the new steps (k, d), and which were refused (k,)."""


def reflection(step: Array, old: Array, new: Array, noise: float, rng: Generator) -> tuple[Array, Array]:
    """Draw from the maximal coupling of N(old, noise^2) and N(new, noise^2): see "Steps" above."""
    if not noise:
        return new, np.ones(len(step), bool)
    log_ratio = (((step - old) ** 2).sum(1) - ((step - new) ** 2).sum(1)) / (2 * noise**2)
    refused = -rng.standard_exponential(len(step)) > log_ratio
    return np.where(refused[:, None], old + new - step, step), refused


def learn(problem: Problem, sgd: SGD, runs: int | np.ndarray, rng: Generator) -> Chains:
    """Train independent chains: a number of `runs` on all points, or on those present in each, bool (n_runs, n).

    Raises DataError for a run without a point, or a shape that does not fit.
    """
    present = np.ones((runs, problem.n), bool) if isinstance(runs, int) else runs.copy()
    check_masks(present, problem.n)
    n_runs, t = len(present), sgd.n_steps
    batches = np.zeros((n_runs, t, sgd.batch_size), np.int32)
    chains = Chains(sgd, present, batches, *(np.zeros((n_runs, steps, problem.dim)) for steps in (t, t, t + 1)))
    _draw_rest(problem, chains, np.zeros(n_runs, int), rng)
    return chains


def delete(
    problem: Problem, chains: Chains, points: Points, rng: Generator, coupling: Coupling = reflection
) -> tuple[Chains, Receipt]:
    """Make the state of training without some points, exactly in law, in one walk; see the module.

    The chains that are given, trained on `problem`, stay as they are. Couplings other than the default are wrong and
    there to be caught by a test. Raises ForgetSetError for points that are not present, or all that are.
    """
    gone = _requested(problem, chains, points)
    _check(gone & ~chains.present, "not in the training set: deleted before, or never inserted. Leave it out")
    after = deepcopy(chains)
    after.present[gone] = False
    _check(gone & ~after.present.any(1, keepdims=True), "the last one. Leave a point to train on")
    flat = chains.batches.reshape(chains.n_runs, -1)
    changed = np.nonzero(np.take_along_axis(gone, flat, 1).reshape(chains.batches.shape))
    return _walk(problem, chains, after, changed, _Pools(after.present).draw(changed[0], 1, rng)[:, 0], rng, coupling)


def insert(problem: Problem, chains: Chains, points: Points, rng: Generator) -> tuple[Chains, Receipt]:
    """Make the state of training with some points more, exactly in law; raises ForgetSetError if one is present."""
    new = _requested(problem, chains, points)
    _check(new & chains.present, "in the training set already. Leave it out")
    after = deepcopy(chains)
    after.present[new] = True
    share = new.sum(1) / after.present.sum(1)
    changed = np.nonzero(rng.random(chains.batches.shape) < share[:, None, None])
    return _walk(problem, chains, after, changed, _Pools(new).draw(changed[0], 1, rng)[:, 0], rng, reflection)


def _walk(
    problem: Problem, before: Chains, after: Chains, changed: tuple[Array, ...], fresh: Array, rng: Generator,
    coupling: Coupling,
) -> tuple[Chains, Receipt]:  # fmt: skip
    """Couple the chains to batches whose `changed` slots (runs, steps, slots) hold `fresh` points."""
    # All changed steps are coupled at once: until the first refusal, which alone counts, each of them meets the stored
    # iterate, whatever the others do.
    sgd, t_end = before.sgd, before.sgd.n_steps
    runs, times, _ = changed
    w = before.iterates[runs, times]
    (x_old, s_old), (x_new, s_new) = (problem.slopes(w, p[:, None]) for p in (before.batches[changed], fresh))
    shift = (s_new[..., None] * x_new - s_old[..., None] * x_old)[:, 0] / sgd.batch_size

    hits, which, n_slots = np.unique(runs * t_end + times, return_inverse=True, return_counts=True)
    hit = run, time = np.divmod(hits, t_end)
    means = before.means[hit]
    np.add.at(means, which, shift)
    steps, refused = coupling(before.steps[hit], before.means[hit], means, sgd.noise, rng)

    since = np.full(before.n_runs, t_end)
    np.minimum.at(since, run[refused], time[refused])
    after.batches[changed] = fresh  # what lies behind a refusal is drawn again below
    after.means[hit] = means
    first = refused & (time == since[run])
    here = run[first], time[first]
    after.steps[here] = steps[first]
    after.iterates[here[0], here[1] + 1] = project(after.iterates[here] - sgd.lr * steps[first], sgd.radius)
    _draw_rest(problem, after, since + 1, rng)

    seen = time <= since[run]
    cost = 2.0 * np.bincount(run[seen], n_slots[seen], minlength=before.n_runs)
    cost += sgd.batch_size * np.maximum(t_end - since - 1, 0)
    return after, Receipt(since, cost, since < t_end)


def _draw_rest(problem: Problem, chains: Chains, since: np.ndarray, rng: Generator) -> None:
    """Draw the steps from `since` (n_runs,) on, in place."""
    sgd, pools = chains.sgd, _Pools(chains.present)
    for t in range(int(since.min()), sgd.n_steps):
        runs = np.flatnonzero(since <= t)
        batch = pools.draw(runs, sgd.batch_size, rng)
        w = chains.iterates[runs, t]
        mean = problem.mean_gradient(w, batch)
        step = mean + sgd.noise * rng.standard_normal(mean.shape) if sgd.noise else mean
        chains.batches[runs, t], chains.means[runs, t], chains.steps[runs, t] = batch, mean, step
        chains.iterates[runs, t + 1] = project(w - sgd.lr * step, sgd.radius)


class _Pools:
    """Uniform draws from each run's own set of points."""

    def __init__(self, members: np.ndarray) -> None:
        self.order = np.argsort(~members, axis=1, kind="stable").astype(np.int32)  # members first
        self.sizes = members.sum(1)

    def draw(self, runs: np.ndarray, k: int, rng: Generator) -> np.ndarray:
        """k points, with replacement, for each of the runs: (len(runs), k)."""
        places = (rng.random((len(runs), k)) * self.sizes[runs, None]).astype(np.int64)
        return self.order[runs[:, None], places]


def _requested(problem: Problem, chains: Chains, points: Points) -> np.ndarray:
    """The points of a request as bool (n_runs, n), checked."""
    asked = np.atleast_2d(np.asarray(points))
    if asked.ndim != 2 or len(asked) not in (1, chains.n_runs):
        raise ForgetSetError(f"The request has shape {asked.shape}; give one row of points, or one for each run.")
    for row in np.unique(asked, axis=0):
        check_forget_indices(row, problem.n)
    mask = np.zeros((chains.n_runs, problem.n), bool)
    np.put_along_axis(mask, np.broadcast_to(asked, (chains.n_runs, asked.shape[1])), True, 1)
    return mask


def _check(wrong: np.ndarray, what: str) -> None:
    if wrong.any():
        raise ForgetSetError(f"Point {int(wrong.any(0).argmax())} of the request is {what}.")


def recomputation_bound(sgd: SGD, n: int, lipschitz: float = LIPSCHITZ) -> float:
    """Bound the probability that deleting one of n points recomputes anything.

    A step has k ~ Bin(m, 1/n) slots to replace whatever happened before it, each of which moves the mean by
    at most 2 L / m, so it is refused with probability at most q = E[2 Phi(L k / (m sigma)) - 1], and the walk
    with at most 1 - (1 - q)^T. Without noise q = P(k > 0), and the bound is attained.
    """
    k = np.arange(sgd.batch_size + 1)
    refusal = 2 * norm.cdf(lipschitz * k / (sgd.batch_size * sgd.noise)) - 1 if sgd.noise else (k > 0).astype(float)
    q = float(binom.pmf(k, sgd.batch_size, 1 / n) @ refusal)
    return float(-np.expm1(sgd.n_steps * np.log1p(-q))) if q < 1 else 1.0


def tv_bound(sgd: SGD, n: int, lipschitz: float = LIPSCHITZ) -> float:
    """Bound the total variation distance rho between training on n points and on n - 1 of them.

    No exact unlearning can leave the model as it is with a higher probability than 1 minus that distance. Given
    k <= K slots to replace, a step's law on S is (1 - p) C + p A where C is its law on S', p = P(k > 0 | k <= K)
    and chi^2(A || C) <= E[exp((2 L k / (m sigma))^2) - 1 | 0 < k <= K]; so a step's KL is at most
    log(1 + p^2 chi^2). Sum over steps, Pinsker, add T P(k > K), take the best K. To first order
    rho = sqrt(2 T) L / (n sigma), sqrt(T) below the coupling's bound, as in the paper.
    """
    bound = recomputation_bound(sgd, n, lipschitz)
    if not sgd.noise:
        return bound
    k = np.arange(sgd.batch_size + 1)
    weight = binom.pmf(k, sgd.batch_size, 1 / n)
    growth = np.expm1(np.minimum((2 * lipschitz * k / (sgd.batch_size * sgd.noise)) ** 2, 600.0))
    inside = np.cumsum(weight)
    kl = np.log1p((1 - weight[0] / inside) * np.cumsum(weight * growth) / inside)
    tail = binom.sf(k, sgd.batch_size, 1 / n)
    return min(bound, float((sgd.n_steps * tail + np.sqrt(sgd.n_steps * kl / 2))[1:].min()))
