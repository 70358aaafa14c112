"""Stochastic iterations on least squares: runs, and their exact mean and second moment.

Rows x_i of X are drawn with probability p_i = ||x_i||^2 / ||X||_F^2, one per step, and

    theta <- theta - relax x_i (x_i theta - y_i) / ||x_i||^2.

This is the randomised Kaczmarz method (Strohmer and Vershynin, 2009), i.e. SGD with importance sampling (Needell,
Srebro and Ward, 2014). With G = X^T X / ||X||_F^2, u_i = x_i / ||x_i|| and residuals e_i = y_i - x_i theta_R, where
theta_R solves the least-squares problem (so that X^T e = 0), the moments m = E delta and M = E delta delta^T follow

    m <- (I - relax G) m
    M <- M - relax (G M + M G)
           + relax^2 sum_i (x_i^T M x_i - 2 e_i x_i^T m + e_i^2) u_i u_i^T / ||X||_F^2,

a linear map of (M, m, 1), whose powers give any number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dmmlib.errors import PresetError
from dmmlib.studies.convex.synthetic import Synthetic


@dataclass(frozen=True)
class Stochastic:
    """SGD from the original, as in the module's formula; raises PresetError for a step out of range."""

    name: str
    case: Synthetic
    x: np.ndarray  # rows (q, d)
    y: np.ndarray  # targets (q,)
    relax: float = 1.0  # step size relative to the full projection, in (0, 1]

    def __post_init__(self) -> None:
        if not 0 < self.relax <= 1:
            raise PresetError(f"{self.name} was given relax={self.relax}; give a share of the full step in (0, 1].")

    def simulate(self, steps: np.ndarray, n_chains: int, rng: np.random.Generator) -> np.ndarray:
        """Run independent chains and keep delta after each number of steps: (n_steps, n_chains, d)."""
        norms = np.sum(self.x**2, axis=1)
        units, levels = self.x / np.sqrt(norms)[:, None], self.y / np.sqrt(norms)
        cumulative = np.cumsum(norms / norms.sum())
        chains = np.tile(self.case.problem.theta[:, 0], (n_chains, 1))
        path = []
        for ahead in np.diff(steps, prepend=0):
            draws = rng.random((ahead, n_chains)) * cumulative[-1]
            for chosen in np.searchsorted(cumulative, draws, side="right"):
                u = units[chosen]
                gap = levels[chosen] - np.einsum("ij,ij->i", u, chains)
                chains += (self.relax * gap)[:, None] * u
            path.append(chains.copy())
        return np.stack(path) - self.case.oracle[:, 0]

    def expected(self, log2_steps: int) -> np.ndarray:
        """Compute sqrt(E||delta_t||^2) relative to the first, at `checkpoints(log2_steps)`."""
        states = [self._start] + [self._after(k, self._start) for k in range(log2_steps + 1)]
        return np.sqrt([self._squared(state) for state in states])

    def floor(self) -> float:
        """Return where sqrt(E||delta_t||^2) ends, relative to the first."""
        step, dd = self._powers[0], self.x.shape[1] ** 2
        stationary = np.linalg.solve(np.eye(dd) - step[:dd, :dd], step[:dd, -1])
        return math.sqrt(max(0.0, self._squared(stationary)))

    def steps_to(self, fraction: float = 0.01) -> float:
        """Count steps until sqrt(E||delta||^2) is `fraction` of the first; inf beyond 2^45."""
        state, steps = self._start, 0
        if self._squared(self._after(45, state)) > fraction**2:
            return math.inf
        for k in reversed(range(45)):
            later = self._after(k, state)
            if self._squared(later) > fraction**2:
                state, steps = later, steps + 2**k
        return steps + 1

    @cached_property
    def _start(self) -> np.ndarray:
        """(M, m, 1) of the original."""
        delta = self.case.delta[:, 0]
        return np.concatenate([np.outer(delta, delta).ravel(), delta, [1.0]])

    @cached_property
    def _powers(self) -> list[np.ndarray]:
        """The linear map of (M, m, 1) in one step, and in 2, 4, ... steps as far as they were needed."""
        x, relax, d = self.x, self.relax, self.x.shape[1]
        dd, norms, identity = d * d, np.sum(x**2, axis=1), np.eye(d)
        e = self.y - (x @ self.case.oracle)[:, 0]
        gram = x.T @ x / norms.sum()
        outer = (x[:, :, None] * x[:, None]).reshape(-1, dd)
        scaled = outer * (relax**2 / (norms.sum() * norms))[:, None]
        step = np.zeros((dd + d + 1, dd + d + 1))
        step[:dd, :dd] = np.eye(dd) - relax * (np.kron(gram, identity) + np.kron(identity, gram)) + scaled.T @ outer
        step[:dd, dd:-1] = -2 * scaled.T @ (e[:, None] * x)
        step[:dd, -1] = scaled.T @ e**2
        step[dd:-1, dd:-1] = identity - relax * gram
        step[-1, -1] = 1
        return [step]

    def _after(self, k: int, state: np.ndarray) -> np.ndarray:
        """The state 2^k steps later."""
        while len(self._powers) <= k:
            self._powers.append(self._powers[-1] @ self._powers[-1])
        return self._powers[k] @ state

    def _squared(self, state: np.ndarray) -> float:
        """E||delta||^2 relative to the first."""
        d = self.x.shape[1]
        diagonal = slice(0, d * d, d + 1)
        return float(state[diagonal].sum() / self._start[diagonal].sum())


def sgd(case: Synthetic, relax: float = 1.0) -> Stochastic:
    """Make SGD on R's loss. The ridge is d more examples sqrt(ridge) e_j with target 0."""
    rest, d = case.retain, len(case.oracle)
    x = np.concatenate([rest.x, math.sqrt(rest.ridge) * np.eye(d)])
    return Stochastic("SGD on R", case, x, np.concatenate([rest.y[:, 0], np.zeros(d)]), relax)


def match_sgd(case: Synthetic, relax: float = 1.0) -> Stochastic:
    """Make SGD on matching the oracle's outputs on S."""
    return Stochastic("OM on S, SGD", case, case.problem.x, (case.problem.x @ case.oracle)[:, 0], relax)


def sgd_cost(case: Synthetic, fraction: float = 0.01) -> float:
    """Count sample gradients after which SGD on R is `fraction` from the oracle, in root mean square.

    With a constant step SGD ends at a floor. Its square is proportional to small steps, which gives a first guess;
    from there the step is halved until the floor is below half of the goal.
    """
    small = 1e-3
    relax = min(1.0, small * (0.6 * fraction / sgd(case, small).floor()) ** 2)
    while relax > 1e-12:
        method = sgd(case, relax)
        if method.floor() < fraction / 2:
            return method.steps_to(fraction)
        relax /= 2
    return math.inf
