"""Where a loss is convex to a tolerance: Jensen's gap on polyhedra sampled around a point.

A function f is convex on a convex region if and only if f(sum_i w_i p_i) <= sum_i w_i f(p_i) for all points p_i of it
and weights w_i >= 0 that sum to 1; by Caratheodory's theorem k + 1 points are enough in k dimensions. So polyhedra of
k + 1 vertices are drawn inside a ball, of all sizes and places, and the largest gap f(sum_i w_i p_i) - sum_i w_i f(p_i)
over them is compared with how far f rises in that ball. Sampling can only miss violations: the radius found is an
upper estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dmmlib.errors import OptionError
from dmmlib.studies.adversary.simplex import in_ball, unit

Function = Callable[[np.ndarray], np.ndarray]
"""Values (n,) at points (n, k)."""


@dataclass(frozen=True)
class Region:
    """Gaps against radii."""

    radii: np.ndarray  # that were tried, increasing (n_radii,)
    gaps: np.ndarray  # `jensen_gap` in the ball of each radius (n_radii,); <= 0 where no violation was met
    radius: float  # the largest of them up to which no gap exceeds the tolerance; 0 if the first one does already
    tolerance: float  # of the gap


def jensen_gap(f: Function, k: int, radius: float, n: int, rng: np.random.Generator) -> float:
    """The largest gap over n polyhedra in the ball of that radius, relative to the mean rise of f to its sphere.

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
    """The radius around 0 within which a function of k variables is convex to a tolerance, by n polyhedra at each.

    Raises OptionError for radii that do not increase, or a tolerance that is not positive: curvature is never exactly
    measured.
    """
    tried = np.asarray(radii, float)
    if len(tried) == 0 or not (np.diff(tried, prepend=0.0) > 0).all():
        raise OptionError(f"Radii {list(radii)} were given; give increasing positive numbers.")
    if not tolerance > 0:
        raise OptionError(f"The tolerance {tolerance} was given; use a positive number, such as 0.01.")
    gaps = np.array([jensen_gap(f, k, r, n, rng) for r in tried])
    bad = np.flatnonzero(gaps > tolerance)
    last = len(tried) if len(bad) == 0 else bad[0]
    return Region(tried, gaps, float(tried[last - 1]) if last else 0.0, tolerance)
