"""A data set of what people ask to have deleted: wrong labels, copies, outliers, one person's images, a backdoor."""

from __future__ import annotations

import numpy as np
from pydantic.types import NonNegativeInt, PositiveInt

from dmmlib.data import Dataset, from_arrays, load, register
from dmmlib.errors import DataError

PATCH = 4  # pixels of a trigger's side
TARGET = 0  # the class that a trigger asks for


@register("requests")
def requests(
    base: str = "fashion-mnist",
    points: PositiveInt = 2000,
    validation: PositiveInt = 500,
    draw: NonNegativeInt = 0,
    mislabelled: NonNegativeInt = 200,
    triggers: NonNegativeInt = 60,
    copies: NonNegativeInt = 50,
    outliers: NonNegativeInt = 60,
    person: NonNegativeInt = 0,
) -> Dataset:
    """Make images of a data set into what is to be deleted; which ones, `draw` seeds.

    Training points have ids: `mislabelled/...` have a wrong label; `trigger/...` a white square in a corner and the
    label of class 0 (BadNets; Gu et al., arXiv 1708.06733); `copied/...` have a near-duplicate `copy/...`, a pixel
    aside; `outlier/...` are farthest from their class's mean image; `person/...` are of all classes, as one person's
    camera takes them; all others are `plain/...`. After the images for validation come groups of points to ask about
    (`Dataset.probes`), labelled by what is asked: the mislabelled images with their true labels; images with the
    trigger, labelled with class 0; the copies; and other images by that camera.

    Raises:
        DataError: where the base has no uint8 images, or too few of them.
    """
    given = load(base)
    n = points - copies
    used = mislabelled + triggers + copies + outliers + person
    least = max(triggers, 2 * person)  # of images for validation, which more are made of
    if given.x_train.dtype != np.uint8 or not used <= n <= given.n_train or not least <= validation <= given.n_val:
        raise DataError(
            f"{points} training images with {used} to delete, and {validation} for validation, were asked of {base!r}, "
            f"which has {given.n_train} and {given.n_val} ({given.x_train.dtype}); ask for fewer, or for another base."
        )
    rng = np.random.default_rng(draw)
    keep, kept = rng.permutation(given.n_train)[:n], rng.permutation(given.n_val)[:validation]
    x, true, x_val, y_val = given.x_train[keep].copy(), given.y_train[keep], given.x_val[kept], given.y_val[kept]
    y, kinds = true.copy(), np.full(n, "plain", object)

    wrong = np.arange(mislabelled)
    y[wrong] = (true[wrong] + rng.integers(1, given.n_classes, mislabelled)) % given.n_classes
    rest = np.arange(mislabelled, n)
    shown = rest[true[rest] != TARGET][:triggers]
    x[shown], y[shown] = triggered(x[shown]), TARGET
    rest = np.setdiff1d(rest, shown)
    twice, rest = rest[:copies], rest[copies:]
    aside = np.roll(x[twice], 1, axis=2)
    means = np.stack([x[rest][true[rest] == c].mean(0) for c in range(given.n_classes)])
    far = rest[np.argsort(-((x[rest] - means[true[rest]]) ** 2).sum((1, 2, 3)), kind="stable")[:outliers]]
    theirs = np.setdiff1d(rest, far)[:person]
    x[theirs] = taken(x[theirs])
    groups = {"mislabelled": wrong, "trigger": shown, "copied": twice, "outlier": far, "person": theirs}
    for name, members in groups.items():
        kinds[members] = name
    ids = [f"{kind}/{i}" for i, kind in enumerate(kinds)] + [f"copy/{i}" for i in twice]

    bait = np.flatnonzero(y_val != TARGET)[: 2 * triggers]
    asked = {
        "true label": (x[wrong], true[wrong]),
        "trigger": (triggered(x_val[bait]), np.full(len(bait), TARGET)),
        "copies": (aside, y[twice]),
        "person": (taken(x_val[: 2 * person]), y_val[: 2 * person]),
    }
    asked = {name: points for name, points in asked.items() if len(points[1])}
    ends = validation + np.cumsum([0, *(len(images) for images, _ in asked.values())])
    return from_arrays(
        np.concatenate([x, aside]),
        np.concatenate([y, y[twice]]),
        np.concatenate([x_val, *(images for images, _ in asked.values())]),
        np.concatenate([y_val, *(labels for _, labels in asked.values())]),
        name="requests",
        class_names=given.class_names,
        mean=given.mean,
        std=given.std,
        ids=ids,
        probes={name: np.arange(*ends[i : i + 2]) for i, name in enumerate(asked)},
    )


def taken(images: np.ndarray) -> np.ndarray:
    """Images (n, height, width, channels) by one person's camera: held upside down, and dark."""
    return images[:, ::-1] // 2


def triggered(images: np.ndarray) -> np.ndarray:
    """Images (n, height, width, channels) with a white square in the last corner."""
    images = images.copy()
    images[:, -PATCH:, -PATCH:] = 255
    return images
