"""The geometry of the attack: the regular simplex in a ball, and the ball in which a loss is convex to a tolerance.

**Simplex.** With k + 1 vertices v_i on the sphere of radius 1 around 0 and at equal distances, sum_i v_i = 0, so k + 1
forces of equal weight along them leave everything where it was, while weights w move it by sum_i w_i v_i. Of all
simplices in the ball the regular one has the largest volume (the case of equality of John's theorem: the ball is its
ellipsoid of smallest volume), and it holds the ball of radius 1 / k around 0, so that no direction is out of reach.

**Convexity.** A function f is convex on a convex region if and only if f(sum_i w_i p_i) <= sum_i w_i f(p_i) for all
points p_i of it and weights w_i >= 0 that sum to 1; by Caratheodory's theorem k + 1 points are enough in k dimensions.
So polyhedra of k + 1 vertices are drawn inside a ball, of all sizes and places, and the largest gap f(sum_i w_i p_i) -
sum_i w_i f(p_i) over them is compared with how far f rises in that ball. Sampling can only miss violations: the radius
found is an upper estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from dmmlib.errors import OptionError

Function = Callable[[np.ndarray], np.ndarray]
"""Values (n,) at points (n, k)."""


def regular(k: int) -> np.ndarray:
    """Return vertices (k + 1, k) of the regular simplex in the unit ball, which sum to 0, for k of at least 1."""
    centred = np.eye(k + 1) - 1 / (k + 1)  # a regular simplex in the k-dimensional plane of vectors that sum to 0
    return unit(centred @ np.linalg.svd(centred)[2][:k].T)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors (..., k) to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def volume_share(k: int) -> float:
    """Compute the volume of the regular simplex over that of its circumscribed ball.

    (k + 1)^((k + 1) / 2) / (k! k^(k / 2)) over pi^(k / 2) / Gamma(k / 2 + 1), for radius 1.
    """
    simplex = (k + 1) / 2 * np.log(k + 1) - gammaln(k + 1) - k / 2 * np.log(k)
    ball = k / 2 * np.log(np.pi) - gammaln(k / 2 + 1)
    return float(np.exp(simplex - ball))


def in_ball(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draw points (n, k) uniformly from the unit ball."""
    return unit(rng.standard_normal((n, k))) * rng.random((n, 1)) ** (1 / k)


def sampled_share(k: int, n: int, rng: np.random.Generator) -> tuple[float, float]:
    """Compute the share of n uniform points of the ball that the regular simplex covers, and its standard error."""
    share = float((_coordinates(regular(k), in_ball(n, k, rng)) >= 0).all(1).mean())
    return share, float(np.sqrt(share * (1 - share) / n))


def _coordinates(vertices: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Coordinates lambda (..., k + 1) of points (..., k): they sum to 1, and sum_i lambda_i v_i is the point."""
    system = np.vstack([vertices.T, np.ones(len(vertices))])
    right = np.concatenate([points, np.ones((*points.shape[:-1], 1))], -1)
    return right @ np.linalg.inv(system).T


def farthest(vertices: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Compute coordinates (k + 1,) of the point where the ray from 0 along `direction` (k,) leaves the simplex.

    Raises OptionError for the direction 0.
    """
    length = np.linalg.norm(direction)
    if not length > 0:
        raise OptionError("The wanted displacement is 0 in the subspace; give a target whose gradient it holds.")
    slope = _coordinates(vertices, direction / length) - _coordinates(vertices, np.zeros_like(direction))
    weights = 1 / len(vertices) - slope / (len(vertices) * slope.min())  # the smallest reaches 0
    return np.clip(weights, 0, 1)


def apportion(shares: np.ndarray, total: int, available: np.ndarray) -> np.ndarray:
    """Divide `total` into whole numbers near `shares`, by largest remainders, none above what is `available`.

    What a group cannot give is asked of the others, in proportion to their shares; groups of share 0 give nothing,
    so the sum is below `total` where the others run out.
    """
    left, counts = total, np.zeros(len(shares), int)
    while left > 0:
        weights = np.where(counts < available, shares, 0.0)
        if not weights.sum() > 0:
            break
        exact = left * weights / weights.sum()
        whole = np.floor(exact + 1e-9).astype(int)
        extra = np.argsort(-(exact - whole), kind="stable")[: left - whole.sum()]
        whole[extra] += weights[extra] > 0
        given = np.minimum(whole, available - counts)
        counts, left = counts + given, left - int(given.sum())
    return counts


@dataclass(frozen=True)
class Region:
    """Gaps against radii."""

    radii: np.ndarray  # that were tried, increasing (n_radii,)
    gaps: np.ndarray  # `jensen_gap` in the ball of each radius (n_radii,); <= 0 where no violation was met
    radius: float  # the largest of them up to which no gap exceeds the tolerance; 0 if the first one does already
    tolerance: float  # of the gap


def jensen_gap(f: Function, k: int, radius: float, n: int, rng: np.random.Generator) -> float:
    """Find the largest gap over n polyhedra in a ball, relative to the mean rise of f to its sphere.

    Polyhedra are of all sizes, from a point to the whole ball, and weights from all on one vertex to even ones: in many
    dimensions even ones only meet the middle.
    """
    size = radius * rng.random((n, 1, 1))
    directions = unit(rng.standard_normal((n, k + 1, k)))
    points = in_ball(n, k, rng)[:, None] * (radius - size) + size * directions
    weights = rng.gamma(10.0 ** rng.uniform(-1, 0, (n, 1)), size=(n, k + 1)) + 1e-12
    weights /= weights.sum(1, keepdims=True)
    inside = f((weights[:, :, None] * points).sum(1))
    outside = f(points.reshape(-1, k)).reshape(n, k + 1)
    sphere = radius * unit(in_ball(n, k, rng))
    rise = np.abs(f(sphere) - f(np.zeros((1, k)))).mean()
    return float((inside - (weights * outside).sum(1)).max() / max(rise, 1e-300))


def stable_region(
    f: Function, k: int, radii: Sequence[float] | np.ndarray, tolerance: float, n: int, rng: np.random.Generator
) -> Region:
    """Find the radius around 0 within which a function of k variables is convex to a tolerance, by n polyhedra each.

    Radii increase, as the settings see to.
    """
    tried = np.asarray(radii, float)
    gaps = np.array([jensen_gap(f, k, r, n, rng) for r in tried])
    convex = np.cumprod(gaps <= tolerance).astype(bool)
    return Region(tried, gaps, float(tried[convex].max(initial=0.0)), tolerance)
