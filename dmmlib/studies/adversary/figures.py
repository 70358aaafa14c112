"""The figures of notebook 08; titles are the caller's, who knows the finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from dmmlib.analysis import looks
from dmmlib.analysis.looks import PALETTE, label, titled
from dmmlib.studies.adversary.crafting import Poison
from dmmlib.studies.adversary.experiments import ATTACKS

LOOKS = {a: (PALETTE[i], mark) for a, i, mark in zip(ATTACKS, (0, 3, 9, 6, 7, 1, 2, 4, 5), "os<>vD^PX", strict=True)}
SPLITS = {"forget": "deleted points", "retain": "points that stay", "validation": "validation points"}
QUANTITIES = {
    "share": "attacker's share of S",
    "bound": "bound on pixels, of 255",
    "k": "dimension k",
    "points deleted": "points deleted",
}


def _panels(n_rows: int, n_columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """Panels (n_rows, n_columns) on a figure of that size in inches."""
    return plt.subplots(n_rows, n_columns, figsize=(width, height), layout="constrained", squeeze=False, **options)


def poison(poisons: Mapping[str, Poison], names: Sequence[str], title: str, caption: str, n: int = 10) -> Figure:
    """Draw the first points of each poison, below the images that they were made from, with their labels."""
    figure, axes = _panels(2 * len(poisons), n, 1.05 * n, 2.5 * len(poisons) + 0.5)
    rows = [images for p in poisons.values() for images in (p.bases, p.images)]
    for row, images in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
    for (own, made), (attack, p) in zip(axes.reshape(-1, 2, n), poisons.items(), strict=True):
        for axis, its in zip(made, p.labels, strict=False):
            axis.set_xlabel(names[its], fontsize=7)
        own[0].set_ylabel("own image", fontsize=8)
        made[0].set_ylabel(f"poison:\n{ATTACKS[attack].split(', ')[1]}", fontsize=8)
    return titled(figure, title, caption)


def success(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw what retraining makes of each attack's requests: errors on targets, and change of their margins."""
    figure, ((left, right),) = _panels(1, 2, 11, 3.8, sharey=True)
    table = table[table["method"] == "retrain"].reset_index(drop=True)
    for i, attack in enumerate(table["attack"]):
        (tint, mark), row = LOOKS[attack], table[i : i + 1]
        for axis, name in ((left, "success"), (right, "change")):
            axis.errorbar(row[name], [i], xerr=looks.bars(row, name), color=tint, marker=mark, capsize=3, ms=7)
    left.plot(table["before"], table.index, "|", color="black", ms=12, label="before the request")
    names = [f"{ATTACKS[a]} ({n:.0f})" for a, n in zip(table["attack"], table["size"], strict=True)]
    looks.rows((left, right), names)
    left.set(xlabel="share of models that err on the target", xlim=(-0.02, 1.0))
    right.set(xlabel="change of the target's margin")
    right.axvline(0, color="0.7", lw=0.8)
    looks.legend(figure, left)
    return titled(figure, title, caption)


def _grid(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column as attacks x methods, in the order of their rows, retraining and doing nothing first."""
    methods = dict.fromkeys([*("retrain", "do_nothing"), *table["method"]])
    values = table.pivot(index="attack", columns="method", values=column).loc[table["attack"].unique(), list(methods)]
    return values.rename(index=ATTACKS | {"album": "honest, images alike"}, columns=label)


def _heatmap(axis: Axes, values: pd.DataFrame, unit: str, extend: str = "neither", **options: Any) -> None:
    """Attacks x methods, and a line beside retraining."""
    bar = {"label": unit, "extend": extend}
    sns.heatmap(values, cmap="cividis", ax=axis, linewidths=0.5, cbar_kws=bar, **options)
    axis.axvline(1, color="white", lw=4)
    axis.set(xlabel="", ylabel="")
    plt.setp(axis.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")


def methods(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw success of each attack against each method, retraining first."""
    values = 100 * _grid(table, "success")
    figure, ((axis,),) = _panels(1, 1, 10.5, 0.5 * len(values) + 1.9)
    _heatmap(axis, values, "models that err on the target, %", annot=True, fmt=".0f", vmin=0, vmax=100)
    return titled(figure, title, caption)


def distances(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw mean gaps of `serving.distances` after each attack and method, a panel for each split, numbers on F's."""
    table = table[table["statistic"] == "mean_gap"]
    most = table["value"].quantile(0.98)  # beyond, numbers say more than colours
    figure, axes = _panels(len(SPLITS), 1, 10.5, 0.36 * table["attack"].nunique() * len(SPLITS) + 2.2, sharex=True)
    for axis, (split, name) in zip(axes[:, 0], SPLITS.items(), strict=True):
        values = _grid(table[table["split"] == split], "value")
        _heatmap(axis, values, "mean gap, sd", "max", annot=split == "forget", fmt=".1f", vmin=0, vmax=most)
        axis.set_title(name, fontsize=10)
    return titled(figure, title, caption)


def sweep(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw success after retraining (top) and change of margin (bottom), in one column for each quantity."""
    figure, axes = _panels(2, len(QUANTITIES), 12.5, 5.6, sharey="row", sharex="col")
    for column, (varies, name) in zip(axes.T, QUANTITIES.items(), strict=True):
        shown = table[table["varies"] == varies]
        values = sorted(shown["value"].unique())
        for i, attack in enumerate(shown["attack"].unique()):
            (tint, mark), part = LOOKS[attack], shown[shown["attack"] == attack]
            place = np.searchsorted(values, part["value"]) + 0.08 * (i - 0.5)
            for axis, key in zip(column, ("success", "change"), strict=True):
                look = {"color": tint, "marker": mark, "capsize": 2, "label": ATTACKS[attack]}
                axis.errorbar(place, part[key], looks.bars(part, key), **look)
                axis.set_xticks(range(len(values)), [f"{v:g}" for v in values])
                axis.grid(axis="y", color="0.93")
        column[1].axhline(0, color="0.6", lw=0.8)
        column[1].set_xlabel(name)
    axes[0, 0].set(ylabel="models that err\non the target", ylim=(0, max(0.2, 1.1 * table["success high"].max())))
    axes[1, 0].set_ylabel("change of the\ntarget's margin")
    looks.legend(figure, axes[0, -1])
    return titled(figure, title, caption)


def roc(scores: pd.DataFrame, found: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw detections against false alarms of `defence.scores`, and areas, for each kind of honest request."""
    kinds, malicious = found["against"].unique(), scores[scores["malicious"]].drop_duplicates("request")
    attacks = dict(zip(malicious["request"], malicious["site"], strict=True))
    figure, (axes,) = _panels(1, len(kinds), 6.2 * len(kinds), 5.0, sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        areas = found[found["against"] == kind].set_index("attack")
        for attack, site in attacks.items():
            both = scores[(scores["site"] == site) & scores["request"].isin([kind, attack])]
            false, true, _ = roc_curve(both["malicious"], both["score"])
            a = areas.loc[attack]
            ends = f"{a['score']:.2f} [{a['score low']:.2f}, {a['score high']:.2f}]"
            name = f"{ATTACKS[attack]}: " + (f"1, all {a['n']} x {a['n_honest']} apart" if a["score"] == 1 else ends)
            line = "--" if attack.startswith("surrogate") else "-"
            axis.step(false, true, line, where="post", color=LOOKS[attack][0], label=name)
        axis.plot([0, 1], [0, 1], color="0.7", lw=0.8, ls=":")
        axis.set(xlabel="false alarms", xlim=(-0.01, 1), ylim=(0, 1.02))
        axis.set_title(f"against {kind}", fontsize=10)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9, title="area, 95 % interval")
    axes[0].set_ylabel("attacks detected")
    return titled(figure, title, caption)
