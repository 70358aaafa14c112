"""The regular simplex, which the attack inscribes in a ball of parameters.

With k + 1 vertices v_i on the sphere of radius 1 around 0 and at equal distances, sum_i v_i = 0, so k + 1 forces of
equal weight along them leave everything where it was, while weights w move it by sum_i w_i v_i. Of all simplices in the
ball the regular one has the largest volume (the case of equality of John's theorem: the ball is its ellipsoid of
smallest volume), and it holds the ball of radius 1 / k around 0, so that no direction is out of reach.
"""

from __future__ import annotations

import numpy as np

from dmmlib.errors import OptionError


def regular(k: int) -> np.ndarray:
    """Return vertices (k + 1, k) of the regular simplex in the unit ball, which sum to 0, for k of at least 1."""
    centred = np.eye(k + 1) - 1 / (k + 1)  # a regular simplex in the k-dimensional plane of vectors that sum to 0
    vertices = centred @ np.linalg.svd(centred)[2][:k].T
    return vertices / np.linalg.norm(vertices, axis=1, keepdims=True)


def farthest(vertices: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Compute coordinates (k + 1,) of the point where the ray from 0 along `direction` (k,) leaves the simplex.

    Coordinates lambda are barycentric: they sum to 1, and sum_i lambda_i v_i is the point. Raises OptionError for the
    direction 0.
    """
    length = np.linalg.norm(direction)
    if not length > 0:
        raise OptionError("The wanted displacement is 0 in the subspace; give a target whose gradient it holds.")
    system = np.vstack([vertices.T, np.ones(len(vertices))])
    slope = np.linalg.solve(system, np.append(direction / length, 0))  # 0 itself has even coordinates
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
