"""Ridge and logistic regression on images."""

from __future__ import annotations

import numpy as np
from torch.nn.functional import adaptive_avg_pool2d

from dmmlib.data import Dataset
from dmmlib.errors import DataError
from dmmlib.models import normalise
from dmmlib.studies.convex.logistic import Logistic
from dmmlib.studies.convex.ridge import Ridge


def image_features(data: Dataset, x: np.ndarray, side: int) -> np.ndarray:
    """Pool images to side x side, flatten them and append a column of ones: (n, features + 1).

    Pooling has no fitted part, so the features know nothing of F. Features of other data pass unchanged.
    """
    images = normalise(data, x)
    if images.ndim == 4:
        images = adaptive_avg_pool2d(images, side)
    flat = images.flatten(1).double().numpy()
    return np.column_stack([flat, np.ones(len(flat))])


def image_problems(data: Dataset, n: int, side: int, ridge: float) -> tuple[Ridge, Logistic]:
    """Make ridge and logistic regression onto labels of the first n training images; DataError if there are fewer."""
    if not 1 < n <= data.n_train:
        raise DataError(f"{n} images were asked of {data.name!r}, which has {data.n_train}; ask for at most that.")
    x, y = image_features(data, data.x_train[:n], side), np.eye(data.n_classes)[data.y_train[:n]]
    return Ridge(x, y, ridge), Logistic(x, y, ridge)
