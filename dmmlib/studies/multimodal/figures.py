"""The figures of notebook 09; titles are the caller's, who knows the finding."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dmmlib.analysis.plots import titled
from dmmlib.studies.multimodal.bench import TASKS
from dmmlib.studies.multimodal.experiments import METHODS, SETS
from dmmlib.studies.multimodal.methods import GRADIENT
from dmmlib.studies.multimodal.people import IMAGE, TEXT
from dmmlib.studies.multimodal.world import World

_PALETTE = sns.color_palette("colorblind", 10)
_NAMES = {"ga": "GA", "grad_diff": "GradDiff", "kl_min": "KL-min", "npo": "NPO", "all": "mean of the four"}
_DATA = {"image": "image + text", "text": "text"}
LABELS = {
    "do_nothing": "do nothing",
    "retrain": "retrain",
    "prompting": "prompting",
    "oracle_matching": "oracle matching",
    "dm_direct": "DM-direct",
    "dmm": "DMM",
} | {f"{m}:{d}": f"{_NAMES[m]}, {_DATA[d]}" for m in GRADIENT for d in _DATA}
COLOURS = {
    "do_nothing": (0.5, 0.5, 0.5),
    "retrain": (0.0, 0.0, 0.0),
    "prompting": _PALETTE[7],
    "oracle_matching": _PALETTE[9],
    "dm_direct": _PALETTE[2],
    "dmm": _PALETTE[3],
} | {f"{m}:{d}": _PALETTE[0 if d == "image" else 1] for m in GRADIENT for d in _DATA}
SET_NAMES = {"forget": "forget", "test": "test (same people)", "retain": "retain", "public": "public figures"}
MODALITY = {IMAGE: "image + text", TEXT: "text"}


def label(method: str) -> str:
    return LABELS.get(method, method)


def portraits(world: World, title: str, caption: str, n: int = 8) -> Figure:
    """Some people as their profile and as the Test set shows them."""
    shown = [
        [world.images[next(q.image for q in world.questions if q.person == name and q.split == split and q.image >= 0)]
         for name in world.people[:n]]
        for split in ("train", "test")
    ]  # fmt: skip
    figure, axes = plt.subplots(2, n, figsize=(1.15 * n, 2.7), layout="constrained")
    for row, images, name in zip(axes, shown, ("profile", "test set"), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    return titled(figure, title, caption)


def grid(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Score minus retraining's: a panel a set, a column a task and modality, a row a method."""
    columns = [(task, modality) for task in TASKS for modality in (IMAGE, TEXT)]
    names = [f"{task}, {'portrait' if modality == IMAGE else 'name'}" for task, modality in columns]
    score = table.set_index(["method", "set", "task", "modality"])["value"]
    methods = [m for m in METHODS if m != "retrain"]
    figure, axes = plt.subplots(1, 4, figsize=(16, 0.36 * len(methods) + 2.0), layout="constrained", sharey=True)
    for axis, split in zip(axes, SETS, strict=True):
        floor, *rows = (np.array([score[m, split, *c] for c in columns]) for m in ("retrain", *methods))
        here = np.stack(rows)
        values = here - floor
        shown = axis.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(here):
            text = "–" if np.isnan(value) else f"{value:.2f}"
            axis.text(
                j, i, text, ha="center", va="center", fontsize=8, color="white" if abs(values[i, j]) > 0.6 else "black"
            )
        ticks = [f"{name} ({value:.2f})" for name, value in zip(names, floor, strict=True)]
        axis.set_xticks(range(len(columns)), ticks, fontsize=8, rotation=90)
        axis.set_title(SET_NAMES[split])
    axes[0].set_yticks(range(len(methods)), [label(m) for m in methods])
    figure.colorbar(shown, ax=axes, label="score minus retraining's", shrink=0.8)
    return titled(figure, title, caption)


def distances(klom: pd.DataFrame, title: str, caption: str) -> Figure:
    """Mean KLoM of every method from retrained models, a panel a set; the band is the floor."""
    methods = [m for m in METHODS if m != "retrain"]
    figure, axes = plt.subplots(
        1, 4, figsize=(14, 0.32 * len(methods) + 1.6), layout="constrained", sharey=True, sharex=True
    )
    for axis, split in zip(axes, SETS, strict=True):
        here = klom[klom["split"] == split].set_index("method")
        floor = here.loc["retrain"]
        axis.axvspan(floor["low"], floor["high"], color="0.88", zorder=0)
        axis.axvline(floor["value"], color="0.5", lw=1, zorder=0)
        for y, method in enumerate(methods):
            e = here.loc[method]
            error = [[e["value"] - e["low"]], [e["high"] - e["value"]]]
            axis.errorbar(e["value"], y, xerr=error, fmt="o", color=COLOURS[method], capsize=2, ms=5)
        axis.set(title=SET_NAMES[split], xlabel="KLoM, mean over questions")
        axis.grid(axis="x", color="0.93")
    axes[0].set_yticks(range(len(methods)), [label(m) for m in methods])
    axes[0].invert_yaxis()
    return titled(figure, title, caption)


def unimodal(gaps: pd.DataFrame, title: str, caption: str) -> Figure:
    """Score after unlearning on text minus after image + text, on questions about forgotten people."""
    order = [
        ("classification", IMAGE),
        ("classification", TEXT),
        ("generation", IMAGE),
        ("generation", TEXT),
        ("cloze", IMAGE),
        ("cloze", TEXT),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True, sharex=True)
    methods = [*GRADIENT, "all"]
    for axis, split in zip(axes, ("forget", "test"), strict=True):
        for k, method in enumerate(methods):
            part = gaps[(gaps["set"] == split) & (gaps["method"] == method)].set_index(["task", "modality"])
            part = part.loc[[o for o in order if o in part.index]]
            y = np.array([order.index(i) for i in part.index]) + 0.14 * (k - 2)
            error = [part["value"] - part["low"], part["high"] - part["value"]]
            look = {
                "color": "black" if method == "all" else _PALETTE[k],
                "fmt": "sD^vo"[k],
                "ms": 6 if method == "all" else 4,
            }
            axis.errorbar(part["value"], y, xerr=error, label=_NAMES[method], capsize=2, **look)
        axis.axvline(0, color="0.6", lw=0.8, zorder=0)
        axis.set_title(SET_NAMES[split])
        axis.grid(axis="x", color="0.93")
    figure.supxlabel(
        "score after text minus after image + text:  ← text forgets more   ·   image + text forgets more →", fontsize=10
    )
    axes[0].set_yticks(range(len(order)), [f"{task},\nasked with {MODALITY[m]}" for task, m in order])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, title="unlearned by")
    return titled(figure, title, caption)


def trade_off(gap: pd.DataFrame, klom: pd.DataFrame, title: str, caption: str) -> Figure:
    """Distance from retraining on forgotten people against loss of score on everybody else."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    columns = ["value", "low", "high"]
    distance = klom[klom["split"] == "forget"].set_index("method")[columns].astype(float).T.to_dict("list")
    lost = gap[columns].astype(float).T.to_dict("list")
    axis.axhspan(*distance["retrain"][1:], color="0.9", zorder=0)
    axis.axvline(0, color="0.8", lw=0.8, zorder=0)
    marks = dict(zip(GRADIENT, "^svD", strict=True))
    for method in map(str, lost):
        (x, x_low, x_high), (y, y_low, y_high) = lost[method], distance[method]
        look = {"fmt": marks.get(method.partition(":")[0], "o"), "color": COLOURS[method], "label": label(method)}
        axis.errorbar(x, y, xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]], capsize=2, **look)
    axis.set(
        xlabel="score on retained people and public figures, minus retraining's",
        ylabel="KLoM on forgotten people, mean",
    )
    figure.legend(loc="outside right center", fontsize=8)
    return titled(figure, title, caption)


def effects(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Predicted against true change of each question's mean margin when its person is left out."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.9), layout="constrained", sharex=True, sharey=True)
    low, high = (f(table[["predicted", "true"]].to_numpy()) for f in (np.min, np.max))
    for axis, (split, name) in zip(axes, {"train": "forget", "test": SET_NAMES["test"]}.items(), strict=True):
        for modality, tint, mark in ((IMAGE, _PALETTE[0], "o"), (TEXT, _PALETTE[1], "^")):
            part = table[(table["set"] == split) & (table["modality"] == modality)]
            axis.plot(part["true"], part["predicted"], mark, color=tint, ms=4, alpha=0.6, label=MODALITY[modality])
        axis.plot([low, high], [low, high], color="0.6", lw=0.8, zorder=0)
        axis.set(title=name, xlabel="true change of margin")
    axes[0].set_ylabel("predicted by the datamodel")
    axes[0].legend(fontsize=9, title="asked with")
    return titled(figure, title, caption)
