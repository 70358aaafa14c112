"""One forgotten image, followed from notebook 02 to 05: what its answer rests on, and what becomes of its margin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmmlib import metrics
from dmmlib.analysis import looks
from dmmlib.data import Dataset
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study

SINGLES = 100  # training points whose effects are predicted at a time


def followed(study: Study) -> tuple[ForgetSet, int]:
    """Choose the image: of the second forget set the point whose margin is predicted to fall most, oracles unasked."""
    sets = list(study.forget_sets().values())
    forget_set = sets[min(1, len(sets) - 1)]
    change = metrics.right_logits(study.attributor().effect(forget_set.indices), study.data.y)
    return forget_set, int(forget_set.indices[change[forget_set.indices].argmin()])


def single_effects(study: Study) -> np.ndarray:
    """Predict by how much each training point holds each margin up: (n_train, n_points), float32."""
    attributor, n = study.attributor(), study.data.n_train
    blocks = ([[i] for i in range(first, min(first + SINGLES, n))] for first in range(0, n, SINGLES))
    found = [-metrics.right_logits(attributor.effects(block), study.data.y) for block in blocks]
    return np.concatenate(found).astype(np.float32)


def held_up(data: Dataset, point: int, effects: np.ndarray, title: str, caption: str, n: int = 7) -> Figure:
    """Draw a training image and, by effects (n_train,) on its margin, the n that most help it and most harm it."""
    order = np.argsort(-np.where(np.arange(data.n_train) == point, 0, effects), kind="stable")
    rows = {"hold it up": order[:n], "speak against it": order[::-1][:n]}
    mosaic: list[Any] = [["own", *(f"{name} {k}" for k in range(n))] for name in rows]
    figure, axes = plt.subplot_mosaic(
        mosaic, figsize=(1.25 * n + 2.2, 3.9), width_ratios=[2, *[1] * n], layout="constrained"
    )
    _picture(
        axes["own"],
        data,
        point,
        f"#{point} {looks.plain(data.class_names[data.y[point]])}\nitself {effects[point]:+.2f}",
    )
    for name, points in rows.items():
        for k, other in enumerate(points):
            words = f"{looks.plain(data.class_names[data.y[other]])}\n{effects[other]:+.2f}"
            _picture(axes[f"{name} {k}"], data, int(other), words)
        axes[f"{name} 0"].text(
            -0.12, 0.5, name, transform=axes[f"{name} 0"].transAxes, rotation=90, ha="right", va="center"
        )
    return looks.titled(figure, title, caption)


def margins_of(data: Dataset, point: int, ways: Mapping[str, np.ndarray], title: str, caption: str) -> Figure:
    """Draw an image, and its margin in each model by method (n_models,): a tick per model, a dot at their mean."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.6, 0.42 * len(ways) + 1.5), width_ratios=[1, 4], layout="constrained"
    )
    _picture(left, data, point, f"#{point} {looks.plain(data.class_names[data.y[point]])}")
    for row, (method, values) in enumerate(ways.items()):
        right.plot(values, np.full(len(values), row), "|", color=looks.colour(method), ms=13, alpha=0.55)
        right.plot(values.mean(), row, "o", color=looks.colour(method), mec="white", ms=9, mew=1.5)
    right.set_yticks(range(len(ways)), [looks.label(method) for method in ways])
    right.invert_yaxis()
    right.set(xlabel="margin", ylim=(len(ways) - 0.4, -0.6))
    right.axvline(0, color="0.7", lw=0.8, zorder=0)
    return looks.titled(figure, title, caption)


def _picture(axis: Axes, data: Dataset, point: int, words: str) -> None:
    axis.imshow(looks.picture(data.x[point]), cmap="gray_r")
    axis.set_title(words, fontsize=9)
    axis.set_axis_off()
