"""How far unlearned models are from retrained ones: margins, KLoM and its bins, mean gaps, KS tests, U-LiRA, accuracy.

KLoM (KL divergence of margins): Georgiev et al., "Attribute-to-Delete", ICLR 2025, section 3. Everywhere,
models come first: logits are (n_models, n_points, n_classes), labels (n_points,), margins (n_models, n_points).
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import kolmogorov

from dmmlib.data import array
from dmmlib.errors import DataError

CLIP = 100.0
N_BINS = 20
FLOOR = 1e-5
BLOCK = 5000  # points whose histograms are counted together
LEVEL = 0.05  # of a KS test at one point, and of false discoveries among all

Convention = Literal["closed", "easydub"]


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Margin of the correct class, its log odds: m = z_y - logsumexp over c != y of z_c, float32; NaN where z is.

    >>> margins(np.array([[[2.0, 0.0], [0.0, 1.0]]]), np.array([0, 0]))
    array([[ 2., -1.]], dtype=float32)
    """
    logits, labels = array(logits), array(labels)
    if labels.shape != logits.shape[1:2] or logits.ndim != 3 or logits.shape[2] < 2 or logits.dtype.kind not in "iuf":
        raise DataError(
            f"Logits have shape {logits.shape} and labels {labels.shape}; give numbers (n_models, n_points, "
            "n_classes >= 2) and (n_points,)."
        )
    right = right_logits(logits, labels)
    others = logits.astype(np.float64 if logits.dtype.kind == "f" and logits.dtype.itemsize > 4 else np.float32)
    np.put_along_axis(others, np.broadcast_to(labels[:, None], (*logits.shape[:2], 1)), -np.inf, 2)
    wrong = torch.from_numpy(others).logsumexp(2).numpy()  # scipy's takes four times as long
    return (right - wrong).astype(np.float32)


def margin_gauge(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits, float32, shifted at each point so that logsumexp over the wrong classes is 0.

    A shift of all classes changes no probability. In this gauge the label's logit *is* the margin, and the others
    are log-probabilities given that the label is wrong. So what is linear in a training set is predicted of the
    margin itself, and not of raw logits whose logsumexp is then taken, which bends the prediction.
    """
    return (logits - (right_logits(logits, labels) - margins(logits, labels))[..., None]).astype(np.float32)


def right_logits(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label's logit (..., n_points) of logits (..., n_points, n_classes): in the margin gauge, the margin."""
    logits, labels = array(logits), array(labels)
    if labels.dtype.kind not in "iu" or labels.shape != logits.shape[-2:-1]:
        raise DataError(f"Labels are {labels.dtype}; give integers, one a point: {labels.shape} for {logits.shape}.")
    if len(labels) and (labels.min() < 0 or labels.max() >= logits.shape[-1]):
        raise DataError(f"Labels go from {labels.min()} to {labels.max()}; logits have {logits.shape[-1]} classes.")
    index = np.broadcast_to(labels[:, None], (*logits.shape[:-1], 1))
    return np.take_along_axis(logits, index, -1)[..., 0]


def correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the largest logit is the label's: bool (n_models, n_points), False where logits are NaN."""
    logits = array(logits)
    return (logits.argmax(2) == array(labels)) & ~np.isnan(right_logits(logits, labels))


def positions(splits: Mapping[str, np.ndarray], n_points: int) -> dict[str, np.ndarray]:
    """Splits as arrays; DataError unless each holds some positions of points, 0 to n_points - 1."""
    found = {name: np.asarray(indices) for name, indices in splits.items()}
    for name, at in found.items():
        if at.ndim != 1 or len(at) == 0 or at.dtype.kind not in "iu" or at.min() < 0 or at.max() >= n_points:
            given = "is empty" if at.size == 0 else f"holds {reprlib.repr(at.ravel().tolist())}"
            raise DataError(f"Split {name!r} {given}; give positions of points, 0 to {n_points - 1}, at least one.")
    return found


# --- KLoM ----------------------------------------------------------------------------------------------


def checked(unlearned: np.ndarray, oracle: np.ndarray, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; DataError unless they are finite margins of at least that many models at the same points."""
    unlearned, oracle = array(unlearned), array(oracle)
    for name, m in (("unlearned", unlearned), ("oracle", oracle)):
        if m.ndim != 2 or len(m) < least or m.dtype.kind not in "iuf":
            given = f"The {name} margins have shape {m.shape} and are {m.dtype}"
            raise DataError(f"{given}; give numbers (n_models >= {least}, n_points).")
        if bad := m.size - np.count_nonzero(np.isfinite(m)):
            raise DataError(
                f"The {name} margins hold {bad} NaN or infinite values; a model diverged: lower its learning rate "
                "or drop it."
            )
    if unlearned.shape[1] != oracle.shape[1]:
        raise DataError(
            f"Unlearned margins have {unlearned.shape[1]} points and oracle margins {oracle.shape[1]}; "
            "give both for the same points."
        )
    return unlearned, oracle


def _ranges(unlearned: np.ndarray, oracle: np.ndarray) -> Sequence[np.ndarray]:
    """Both clipped, and per point the greatest value and the range of the bins, low to high, in double precision.

    numpy.histogram widens a range of one value by a half on either side.
    """
    kind = np.result_type(unlearned, oracle, np.float32)
    u, o = (m.astype(kind, copy=False) for m in (unlearned, oracle))
    low = np.minimum(u.min(0), o.min(0)).astype(np.float64)
    top = np.maximum(u.max(0), o.max(0)).astype(np.float64)
    if max(-low.min(initial=0), top.max(initial=0)) > CLIP:
        u, o, low, top = (m.clip(-CLIP, CLIP) for m in (u, o, low, top))
    half = 0.5 * (low == top)
    return u, o, top, low - half, top + half


def _bins(margins: np.ndarray, low: np.ndarray, high: np.ndarray, n_bins: int) -> np.ndarray:
    """Bin numbers (n_models, n_points) by numpy.histogram's rule: half-open, the last one closed.

    Values are scaled to a point's range, a trifle too low, and cut off. Where a trifle more would lift one over an
    edge, or the range is too narrow for it, the point's values are compared with the edges, as numpy does with all.
    """
    kind, number = margins.dtype.type, np.min_scalar_type(n_bins)
    narrow = np.maximum(1e-30, 1e-6 * np.maximum(-low, high))  # there the edges themselves are rounded
    width = np.maximum(high - low, narrow)
    trifle = max(4 * np.finfo(kind).eps, n_bins * 1e-9)
    place = margins - low.astype(kind)
    place *= ((1 - trifle) * n_bins / width).astype(kind)
    numbers = place.astype(number)
    place += kind(2 * trifle * n_bins)
    others = place.astype(number)
    others -= others == n_bins  # the greatest value
    unsure = (numbers != others).any(0) | (low != low.astype(kind)) | (width == narrow)
    if len(at := np.flatnonzero(unsure)):
        edges = np.linspace(low[at], high[at], n_bins + 1)[1:-1]
        numbers[:, at] = (margins[:, at] >= edges[:, None]).sum(0, dtype=number)
    return numbers


def klom(
    unlearned: np.ndarray, oracle: np.ndarray, convention: Convention = "closed", n_bins: int = N_BINS
) -> np.ndarray:
    """KLoM of each point: KL(unlearned || oracle) of histograms of margins, in nats, from 0 to log(1e5) = 11.5.

    >>> oracle = np.arange(10.0)[:, None]
    >>> klom(oracle, oracle), klom(oracle + 50, oracle).round(1)
    (array([0.]), array([10.2]))

    Margins are clipped to +-100, the joint range of a point is cut into 20 equal bins, p and q are the
    shares of unlearned and oracle models in each bin, q is floored at 1e-5, and
    KLoM = sum over bins with p > 0 of p log(p / q).

    Args:
        convention: "closed" keeps values on the upper edge (the definition); "easydub" drops them and
            renormalises, as the public EasyDUB code does, to compare with numbers published with it.
        n_bins: into how many bins the range is cut; the definition has 20.

    Raises:
        DataError: for shapes that differ, NaN or infinite margins, or fewer than two bins.
    """
    if not isinstance(n_bins, Integral) or not 2 <= n_bins <= 10_000:
        raise DataError(f"KLoM was asked for with n_bins={n_bins!r}; use 2 to 10,000 (the definition has {N_BINS}).")
    if convention not in ("closed", "easydub"):
        raise DataError(f"Unknown KLoM convention {convention!r}; use 'closed' or 'easydub'.")
    unlearned, oracle = checked(unlearned, oracle)

    def of_block(first: int) -> np.ndarray:
        """Of few points, whose bin numbers, a byte each, stay in a core's cache while each bin is counted."""
        u, o, top, low, high = _ranges(unlearned[:, first : first + BLOCK], oracle[:, first : first + BLOCK])
        shares = []
        for m in (u, o):
            numbers = _bins(m, low, high, n_bins)
            if convention == "easydub":
                numbers[m >= top] = n_bins  # which is no bin
            counts = np.empty((n_bins, len(top)), np.min_scalar_type(len(m)))
            for k, count in enumerate(counts):
                np.add.reduce((numbers == k).view(np.uint8), 0, count.dtype, count)
            shares.append(counts / (np.maximum(counts.sum(0), FLOOR) if convention == "easydub" else len(m)))
        return _divergence(*shares).sum(0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy works outside the lock
        return np.concatenate(list(pool.map(of_block, range(0, max(1, unlearned.shape[1]), BLOCK))))


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Terms p log(p / q) of bins, with q floored; written over p and q, as new memory costs more than arithmetic."""
    np.divide(p, np.clip(q, FLOOR, 1, out=q), out=q)
    p *= np.log(np.clip(q, np.finfo(q.dtype).tiny, None, out=q), out=q)  # where p is 0, so is its term
    return p


@dataclass(frozen=True)
class Estimate:
    """A statistic with a 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def normal(cls, value: float, error: float | np.floating[Any], least: float = -np.inf) -> Estimate:
        """Give a value an interval of 1.96 standard errors on either side, cut off at the least possible value."""
        return cls(value, max(least, value - 1.96 * float(error)), value + 1.96 * float(error))

    @classmethod
    def of(cls, values: np.ndarray, least: float = -np.inf) -> Estimate:
        """The mean of at least two values, with the interval of its standard error."""
        return cls.normal(float(values.mean()), values.std(ddof=1) / np.sqrt(len(values)), least)

    def __str__(self) -> str:
        value, low, high = (f"{v:.2f}" for v in (self.value, self.low, self.high))
        return value if low == high else f"{value} [{low}, {high}]"


STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray | np.floating[Any]]] = {  # of values (..., n_points)
    "mean": lambda values: np.mean(values, -1),
    "p95": lambda values: np.percentile(values, 95, -1),
}


def klom_draws(
    unlearned: np.ndarray, oracle: np.ndarray, n_bootstrap: int = 50, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """KLoM of each point (n_points,), and the same with models resampled, bins fixed: (n_bootstrap, n_points).

    Both sets of models are resampled with replacement. A resample has fewer distinct models, so its KLoM is
    biased upwards: its spread is a standard error, its level is no estimate. Draws with the same numbers of models
    and the same seed resample alike, so that differences of two methods can be taken draw by draw.

    Raises DataError for fewer than two draws, which have no spread.
    """
    if not isinstance(n_bootstrap, Integral) or n_bootstrap < 2:
        raise DataError(
            f"n_bootstrap={n_bootstrap!r} draws were asked for; use at least 2, as they are to have a spread."
        )
    u, o, _, low, high = _ranges(*checked(unlearned, oracle))
    numbers = [_bins(m, low, high, N_BINS) for m in (u, o)]
    hot = [(of[..., None] == np.arange(N_BINS)).astype(np.float32).reshape(len(of), -1) for of in numbers]
    rng = np.random.default_rng(seed)
    counts = [[rng.multinomial(len(m), np.full(len(m), 1 / len(m))) for m in (u, o)] for _ in range(n_bootstrap)]

    def values(weights: Sequence[np.ndarray]) -> np.ndarray:
        shares = [(w @ h).reshape(*w.shape[:-1], -1, N_BINS) for w, h in zip(weights, hot, strict=True)]
        return _divergence(*shares).sum(-1)

    weights = [np.stack(drawn).astype(np.float32) / len(drawn[0]) for drawn in zip(*counts, strict=True)]
    parts = [values([w[first : first + 10] for w in weights]) for first in range(0, n_bootstrap, 10)]  # bounds memory
    return values([np.full(len(m), 1 / len(m)) for m in (u, o)]), np.concatenate(parts)


def klom_summary(
    unlearned: np.ndarray, oracle: np.ndarray, splits: Mapping[str, np.ndarray], n_bootstrap: int = 50, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """Mean and 95th percentile of KLoM over each split's points: split -> {"mean", "p95"} -> Estimate.

    The interval is the estimate +- 1.96 standard errors of `klom_draws`, whose percentiles would be biased. Points
    are not resampled: they are the population that is asked about. Splits are indices of points.
    """
    splits = positions(splits, np.asarray(oracle).shape[-1])
    point, resampled = klom_draws(unlearned, oracle, n_bootstrap, seed)

    return {
        split: {
            name: Estimate.normal(float(of(point[at])), of(resampled.take(at, 1)).std(ddof=1), least=0.0)
            for name, of in STATISTICS.items()
        }
        for split, at in splits.items()
    }


# --- other measures ------------------------------------------------------------------------------------


def gaps(unlearned: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Mean margin of unlearned models minus that of oracles at each point (n_points,), in the oracles' sd.

    It is above 0 where a point is not yet forgotten and below where it is overshot. Unlike KLoM it does not saturate.

    >>> gaps(np.array([[3.0], [5.0]]), np.array([[0.0], [2.0]])).round(2)
    array([2.12])
    """
    unlearned, oracle = (m.astype(np.float64) for m in checked(unlearned, oracle, least=2))
    return (unlearned.mean(0) - oracle.mean(0)) / np.maximum(oracle.std(0, ddof=1), 1e-6)


def ks(unlearned: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """The two-sample Kolmogorov-Smirnov statistic of the margins at each point: (n_points,), from 0 to 1."""
    unlearned, oracle = checked(unlearned, oracle)
    return _ks(*_sorted(unlearned, oracle), *(np.ones(len(m), int) for m in (unlearned, oracle)))


def _sorted(unlearned: np.ndarray, oracle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of all models at each point, and whether each is the last of those with its margin."""
    both = np.concatenate([unlearned, oracle])
    order = np.argsort(both, 0)
    ranked = np.take_along_axis(both, order, 0)
    return order, np.concatenate([ranked[1:] != ranked[:-1], np.ones((1, ranked.shape[1]), bool)])


def _ks(order: np.ndarray, last_of_tie: np.ndarray, of_unlearned: np.ndarray, of_oracles: np.ndarray) -> np.ndarray:
    """The statistic where each model counts so often; scipy's ks_2samp gives the same in thirty times the time."""
    n, m = of_unlearned.sum(), of_oracles.sum()
    counts = np.concatenate([m * of_unlearned, -n * of_oracles]).astype(np.int32 if n * m < 2**31 else np.int64)
    gap = np.cumsum(counts[order], 0, counts.dtype)
    return np.abs(gap, out=gap).max(0, where=last_of_tie, initial=0) / (n * m)


def ks_p_values(unlearned: np.ndarray, oracle: np.ndarray, statistic: np.ndarray | None = None) -> np.ndarray:
    """P-values (n_points,) of two-sample KS tests (asymptotic); `statistic` is `ks` of both, where it is known."""
    n, m = len(unlearned), len(oracle)
    return kolmogorov(np.sqrt(n * m / (n + m)) * (ks(unlearned, oracle) if statistic is None else statistic))


def gap_summary(
    unlearned: np.ndarray, oracle: np.ndarray, splits: Mapping[str, np.ndarray], n_bootstrap: int = 25, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """What does not saturate, over each split's points: split -> {"mean_gap", "ks_share", "ks_fdr"} -> Estimate.

    mean_gap is the mean of |`gaps`|; ks_share is the share of points at which a KS test of level .05 tells unlearned
    models from oracles (.05 on average, at most, if equal); ks_fdr the share with the false discovery rate among
    the split's points held at .05. Intervals are +- 1.96 standard errors over resampled models, as in `klom_summary`.
    Those of mean_gap take its unit, the oracles' sd, as it is: methods on the same oracles share its error, of a share
    1 / sqrt(2 (N - 1)) at each point, which comes on top where gaps from other oracles are compared (`report.compare`).

    Raises:
        DataError: as `klom`, and for fewer than two models of a kind.
    """
    from scipy.stats import false_discovery_control

    unlearned, oracle = checked(unlearned, oracle, least=2)
    sd = np.maximum(oracle.std(0, ddof=1, dtype=np.result_type(oracle, np.float32)), 1e-6)
    places, rng = _sorted(unlearned, oracle), np.random.default_rng(seed)
    once = [np.ones(len(m), int) for m in (unlearned, oracle)]
    draws = [once] + [[rng.multinomial(len(w), w / len(w)) for w in once] for _ in range(n_bootstrap)]
    gap = np.stack([np.abs(u / len(u) @ unlearned - o / len(o) @ oracle) / sd for u, o in draws])
    p = np.stack([ks_p_values(unlearned, oracle, _ks(*places, u, o)) for u, o in draws])

    def statistics(at: np.ndarray) -> Iterator[np.ndarray]:
        """Of each draw: the mean gap, and the shares of tests rejecting at `LEVEL`, alone and by Benjamini-Hochberg."""
        yield gap.take(at, 1).mean(1)
        yield (p.take(at, 1) <= LEVEL).mean(1)
        yield (false_discovery_control(p.take(at, 1), axis=1) <= LEVEL).mean(1)

    return {
        split: {
            name: Estimate.normal(float(values[0]), values[1:].std(ddof=1), least=0.0)
            for name, values in zip(("mean_gap", "ks_share", "ks_fdr"), statistics(indices), strict=True)
        }
        for split, indices in positions(splits, oracle.shape[1]).items()
    }


def u_lira(unlearned: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """U-LiRA: balanced accuracy (n_points,) of a likelihood-ratio attacker at each point (Hayes et al., 2024).

    The attacker fits a Gaussian to the margins of half of the unlearned models and one to half of the
    oracles, and says of each model of the other halves which of the two it comes from; then the halves
    change roles, so at least four models are needed on either side. 0.5 means that it cannot tell.
    """
    unlearned, oracle = (m.astype(np.float64) for m in checked(unlearned, oracle, least=4))
    huge = np.maximum(1, np.maximum(np.abs(unlearned).max(0), np.abs(oracle).max(0)) / 1e100)  # squares would overflow
    unlearned, oracle = unlearned / huge, oracle / huge
    low = np.minimum(unlearned.min(0), oracle.min(0))
    range_ = np.maximum(unlearned.max(0), oracle.max(0)) - low
    narrow = (range_ > 0) & (range_ < 1e-3)  # the least deviation would hide it
    unlearned, oracle = (np.where(narrow, (m - low) / np.where(narrow, range_, 1), m) for m in (unlearned, oracle))

    def log_density(m: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        scale = fitted.std(0, ddof=1) + 1e-6
        return -0.5 * ((m - fitted.mean(0)) / scale) ** 2 - np.log(scale)

    accuracies = []
    for fold in (0, 1):
        fit_u, fit_o = unlearned[fold::2], oracle[fold::2]
        for held_out, sign in ((unlearned[1 - fold :: 2], 1), (oracle[1 - fold :: 2], -1)):
            ratio = log_density(held_out, fit_u) - log_density(held_out, fit_o)
            accuracies.append(((sign * ratio > 0) + 0.5 * (ratio == 0)).mean(0))
    return np.mean(accuracies, axis=0)


def accuracy_gap(
    correct_unlearned: np.ndarray, correct_oracle: np.ndarray, splits: Mapping[str, np.ndarray]
) -> dict[str, Estimate]:
    """Mean accuracy of unlearned models minus that of oracles on each split, with a 95 % interval over models."""
    gaps = {}
    for split, indices in positions(splits, np.asarray(correct_oracle).shape[-1]).items():
        u, o = (c[:, indices].mean(1) for c in checked(1 * correct_unlearned, 1 * correct_oracle, 2))
        value = float(u.mean() - o.mean())
        gaps[split] = Estimate.normal(value, np.sqrt(u.var(ddof=1) / len(u) + o.var(ddof=1) / len(o)))
    return gaps
