"""What a service that unlearns does with a request before it serves it: check it, and score what it would do.

**Check.** A request names points by content. Each must be in the training set, and the requester's own; what was never
trained on cannot be unlearned, and a method that descends or ascends on it is only being steered ("unlearn and burn").

**Score.** Three numbers that a datamodel and the service's own gradients give, each in standard deviations above
requests of random training points of the same size; their mean is the score.

- *validation*, *retain*: root mean square of the predicted change of margins on those points. One request that acts
  together moves answers in proportion to its size, random points by its root.
- *leverage*: length of the predicted displacement of the parameters, in their own metric: with r the residuals 1 - p of
  the request's points and phi their margins' gradients, (r_F . Phi_F A^-1 Phi_F^T r_F)^(1/2) (`subspace`). The matrix
  Phi A^-1 Phi^T is the gradient kernel's T between training points (`attributors.kernel`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dmmlib.data import Dataset
from dmmlib.datamodels import Attributor
from dmmlib.errors import DataError, ForgetSetError
from dmmlib.forget_sets import indicator
from dmmlib.metrics import Estimate, right_logits

N_RANDOM = 100  # requests of random points, for each size, that scores are relative to
COMPONENTS = ("validation", "retain", "leverage")


def _contents(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[bytes, int]]:
    return ((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def resolve(
    data: Dataset, images: np.ndarray, labels: np.ndarray | Sequence[int], own: np.ndarray | None = None
) -> np.ndarray:
    """Find the indices (k,) of the training points that a request names by content.

    Args:
        data: what was trained on.
        images, labels: of the request, uint8 (k, height, width, channels) and (k,); raises DataError for others.
        own: indices of the requester's points; everybody's if None.

    Raises ForgetSetError for a point that was never trained on, is named twice, or is not the requester's.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != data.x_train.dtype or images.shape[1:] != data.x_train.shape[1:] or len(images) != len(labels):
        raise DataError(
            f"The request has {images.dtype} images of shape {images.shape} and {len(labels)} labels; give "
            f"{data.x_train.dtype} images of shape {data.x_train.shape[1:]} and one label for each."
        )
    places: dict[tuple[bytes, int], list[int]] = {}
    for i, content in enumerate(_contents(data.x_train, data.y_train)):
        places.setdefault(content, []).append(i)
    found = []
    for j, content in enumerate(_contents(images, labels)):
        if content not in places:
            raise ForgetSetError(
                f"Point {j} of the request was never in the training set, so there is nothing to unlearn; ask for "
                "points as they were contributed."
            )
        if not places[content]:
            raise ForgetSetError(f"Point {j} of the request is named more often than it is held; name it once.")
        found.append(places[content].pop(0))
    if own is not None and len(others := np.setdiff1d(found, own)):
        raise ForgetSetError(
            f"Point {others[0]} is not the requester's, nor are {len(others) - 1} others; ask for your own points."
        )
    return np.array(found, np.int64)


@dataclass(frozen=True)
class Monitor:
    """Scores requests before they are served."""

    datamodel: Attributor  # of the training set
    labels: np.ndarray  # of all points
    gram: np.ndarray  # T_ij r_i r_j (n_train, n_train), the energy of displacements that deletions add up to

    def change(self, requests: Sequence[np.ndarray]) -> np.ndarray:
        """Predict the change of margins (k, n_points) on deletion of each of some requests."""
        return right_logits(self.datamodel.effects(requests), self.labels)

    def influence(self, points: np.ndarray) -> np.ndarray:
        """Predict the change of the margins of points (t,) on deletion of each training point: (t, n_train)."""
        n = len(self.gram)
        alone = np.array_split(np.arange(n)[:, None], -(-n // 100))
        return np.concatenate([self.change(list(block))[:, points] for block in alone]).T

    def components(self, requests: Sequence[np.ndarray]) -> np.ndarray:
        """Compute the three numbers (k, 3) of each request, in margins and in lengths."""
        n = len(self.gram)
        gone = np.stack([indicator(forget, n) for forget in requests])
        square = self.change(requests) ** 2
        retain = (square[:, :n] * (1 - gone)).sum(1) / (1 - gone).sum(1)
        energy = np.maximum(((gone @ self.gram) * gone).sum(1), 0)
        return np.sqrt(np.stack([square[:, n:].mean(1), retain, energy], 1))

    def scores(self, requests: Sequence[np.ndarray]) -> np.ndarray:
        """Score requests in standard deviations above random ones of their size: (k, 4), last the mean of three.

        Raises ForgetSetError for indices that are no proper part of the training set.
        """
        z = self.components(requests)
        sizes = np.array([len(r) for r in requests])
        for size in np.unique(sizes):
            rng = np.random.default_rng([0, int(size)])
            usual = self.components([rng.choice(len(self.gram), size, replace=False) for _ in range(N_RANDOM)])
            z[sizes == size] -= usual.mean(0)
            z[sizes == size] /= np.maximum(usual.std(0, ddof=1), 1e-12)
        return np.column_stack([z, z.mean(1)])


def area(honest: np.ndarray, malicious: np.ndarray) -> float:
    """Compute the area under the ROC: how often an attack's score is above an honest request's, ties counting half."""
    return float((malicious[:, None] > honest).mean() + 0.5 * (malicious[:, None] == honest).mean())


def detected(honest: np.ndarray, malicious: np.ndarray, alarms: float = 0.05) -> float:
    """Compute the share of attacks whose score is above all but the share `alarms` of the honest ones'."""
    return float((malicious > np.sort(honest)[::-1][int(alarms * len(honest))]).mean())


def resampled(
    statistic: Callable[[np.ndarray, np.ndarray], float], honest: np.ndarray, malicious: np.ndarray
) -> Estimate:
    """Compute a statistic of scores with a 95 % interval that resamples honest and malicious requests."""
    rng = np.random.default_rng(0)
    draws = [statistic(rng.choice(honest, len(honest)), rng.choice(malicious, len(malicious))) for _ in range(500)]
    return Estimate(statistic(honest, malicious), *np.percentile(draws, [2.5, 97.5]).tolist())
