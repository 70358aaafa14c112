"""The figures of notebook 09; titles are the caller's, who knows the finding."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dmmlib.analysis import looks
from dmmlib.analysis.looks import PALETTE, titled
from dmmlib.studies.multimodal.bench import TASKS
from dmmlib.studies.multimodal.experiments import METHODS, SETS
from dmmlib.studies.multimodal.methods import GRADIENT
from dmmlib.studies.multimodal.people import IMAGE, TEXT
from dmmlib.studies.multimodal.world import World

_NAMES = {"ga": "GA", "grad_diff": "GradDiff", "kl_min": "KL-min", "npo": "NPO", "all": "mean of the four"}
_DATA = {"image": ("image + text", PALETTE[0]), "text": ("text", PALETTE[1])}
SET_NAMES = {"forget": "forget", "test": "test (same people)", "retain": "retain", "public": "public figures"}
MODALITY = {IMAGE: "image + text", TEXT: "text"}
KINDS = [(task, modality) for task in TASKS for modality in MODALITY]
OTHERS = [m for m in METHODS if m != "retrain"]


def label(method: str) -> str:
    """Return the name of a method as figures and tables write it."""
    base, _, data = method.partition(":")
    if data:
        return f"{_NAMES[base]}, {_DATA[data][0]}"
    return "retrain" if base == "retrain" else looks.label(base)


def colour(method: str) -> tuple[float, float, float]:
    """Return the colour of a method: gradient methods have that of what they are given."""
    base, _, data = method.partition(":")
    if data:
        return _DATA[data][1]
    return PALETTE[7] if base == "prompting" else looks.colour(base)


def portraits(world: World, title: str, caption: str, n: int = 8) -> Figure:
    """Draw some people as their profile and as the Test set shows them."""
    figure, axes = plt.subplots(2, n, figsize=(1.15 * n, 2.7), layout="constrained")
    for row, (split, name) in zip(axes, {"train": "profile", "test": "test set"}.items(), strict=True):
        shown = {q.person: q.image for q in world.questions if q.split == split and q.image >= 0}
        for axis, person in zip(row, world.people, strict=False):
            axis.imshow(world.images[shown[person]])
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    return titled(figure, title, caption)


def grid(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Score minus retraining's: a panel for each set, a column for each task and modality, a row for each method."""
    figure, axes = looks.grid(4, 4, (3.9, 0.36 * len(OTHERS) + 1.6))
    for axis, split in zip(axes[0], SETS, strict=True):
        score = table[table["set"] == split].pivot(index="method", columns=["task", "modality"], values="value")[KINDS]
        floor, here = score.loc["retrain"], score.loc[OTHERS]
        ticks = [f"{t}, {'portrait' if m == IMAGE else 'name'} ({floor[t, m]:.2f})" for t, m in KINDS]
        shown = here.map(lambda value: "–" if np.isnan(value) else f"{value:.2f}")
        look = {"cmap": plt.get_cmap("PuOr_r", 21), "vmin": -1, "vmax": 1, "cbar": False, "annot_kws": {"fontsize": 8}}
        here = (here - floor).fillna(0).set_axis(ticks, axis=1).rename(index=label)
        sns.heatmap(here, annot=shown, fmt="", ax=axis, **look)
        axis.tick_params(axis="x", labelsize=8)
        axis.set(title=SET_NAMES[split], xlabel="", ylabel="")
    figure.colorbar(axes[0, 0].collections[0], ax=axes, label="score minus retraining's", shrink=0.8)
    return titled(figure, title, caption)


def distances(gaps: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw mean gaps of every method from retrained models, a panel for each set; the band is the floor."""
    figure, axes = looks.grid(4, 4, (3.4, 0.32 * len(OTHERS) + 1.2), sharex=True)
    for axis, split in zip(axes[0], SETS, strict=True):
        here = gaps[gaps["split"] == split].set_index("method")
        floor = here.loc["retrain"]
        axis.axvspan(floor["low"], floor["high"], color="0.88", zorder=0)
        axis.axvline(floor["value"], color="0.5", lw=1, zorder=0)
        for y, method in enumerate(OTHERS):
            e = here.loc[method]
            axis.errorbar(e["value"], y, xerr=looks.bars(e), fmt="o", color=colour(method), capsize=2, ms=5)
        axis.set(title=SET_NAMES[split], xlabel="mean gap of margins, sd")
    looks.rows(axes[0], [label(m) for m in OTHERS])
    return titled(figure, title, caption)


def unimodal(gaps: pd.DataFrame, title: str, caption: str) -> Figure:
    """Score after unlearning on text minus after image + text, on questions about forgotten people."""
    look = {m: {"color": PALETTE[(4, 5, 6, 8)[k]], "fmt": "sD^v"[k], "ms": 4} for k, m in enumerate(GRADIENT)}
    look["all"] = {"color": "black", "fmt": "o", "ms": 6}
    figure, axes = looks.grid(2, 2, (5.3, 3.8), sharex=True)
    for axis, split in zip(axes[0], ("forget", "test"), strict=True):
        for k, method in enumerate(look):
            part = gaps[(gaps["set"] == split) & (gaps["method"] == method)].set_index(["task", "modality"])
            y = np.array([KINDS.index(kind) for kind in part.index]) + 0.14 * (k - 2)
            axis.errorbar(part["value"], y, xerr=looks.bars(part), label=_NAMES[method], capsize=2, **look[method])
        axis.axvline(0, color="0.6", lw=0.8, zorder=0)
        axis.set_title(SET_NAMES[split])
    words = "score after text minus after image + text:  ← text forgets more   ·   image + text forgets more →"
    figure.supxlabel(words, fontsize=10)
    looks.rows(axes[0], [f"{task},\nasked with {MODALITY[m]}" for task, m in KINDS])
    looks.legend(figure, axes[0, 0], title="unlearned by")
    return titled(figure, title, caption)


def effects(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw predicted against true change of each question's mean margin when its person is left out."""
    figure, axes = looks.grid(2, 2, (4.0, 3.5), sharex=True)
    ends = [f(table[["predicted", "true"]].to_numpy()) for f in (np.min, np.max)]
    for axis, split in zip(axes[0], ("forget", "test"), strict=True):
        for (modality, name), tint, mark in zip(MODALITY.items(), PALETTE, "o^", strict=False):
            part = table[(table["set"] == split) & (table["modality"] == modality)]
            axis.plot(part["true"], part["predicted"], mark, color=tint, ms=4, alpha=0.6, label=name)
        axis.plot(ends, ends, color="0.6", lw=0.8, zorder=0)
        axis.set(title=SET_NAMES[split], xlabel="true change of margin")
    axes[0, 0].set_ylabel("predicted by contrast")
    looks.legend(figure, axes[0, 0], title="asked with")
    return titled(figure, title, caption)
