"""The figures of notebook 07, and of 02's comparison; titles are the caller's, who knows the finding."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dmmlib.analysis.looks import PALETTE, SPLITS, bars, grid, label, legend, log_axis, titled

LOOKS = {"bayesian": ("Bayesian", PALETTE[3], "o"), "ridge": ("ridge, margin gauge", PALETTE[0], "s"),
         "ridge, raw logits": ("ridge, raw logits", PALETTE[2], "D")}  # fmt: skip
LINES = {"do nothing": ("do nothing", "0.35", ":"), "floor": ("retraining again (floor)", "black", "-"),
         "true mean shift": ("true mean shift", "0.55", "--")}  # fmt: skip
TINTS = {"forget": PALETTE[3], "retain": "0.6", "validation": PALETTE[0]}


def curve(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw p95 KLoM on each split, and LDS, against the number of subset models, from `experiments.summary`."""
    figure, (axes,) = grid(4, 4, (3.8, 3.2), sharey=False)
    sizes = np.unique(table.loc[table["attributor"].isin(LOOKS), "n_models"])
    for axis, split in zip(axes, (*SPLITS, "all"), strict=True):
        here = table[(table["split"] == split) & (table["statistic"] == ("lds" if split == "all" else "klom_p95"))]
        for name, (text, tint, ls) in LINES.items():
            for value in here.loc[here["attributor"] == name, "value"]:
                axis.axhline(value, color=tint, ls=ls, lw=1.4, label=text)
        for name, (text, tint, mark) in LOOKS.items():
            part = here[here["attributor"] == name]
            axis.errorbar(part["n_models"], part["value"], bars(part), color=tint, marker=mark, capsize=3, label=text)
        log_axis(axis, "x", sizes.tolist(), (0.8 * sizes[0], 1.25 * sizes[-1]))
        axis.tick_params("x", rotation=60)
        axis.grid(axis="y", color="0.93")
        axis.set_xlabel("subset models, all counted")
        if split == "all":
            axis.set(title="rank of effects", ylabel="LDS, mean over points", ylim=(0, None))
        else:
            log_axis(axis, "y", (0.5, 1, 2, 5, 10), (0.4, max(2.0, 1.15 * here[["value", "high"]].max().max())))
            axis.set(title=f"{split} points", ylabel="p95 KLoM of DM-direct")
    legend(figure, axes[0])
    return titled(figure, title, caption)


def ablation(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw each change's p95 KLoM over the default's, and LDS minus its, from `ablation.against_default`."""
    shown = table[table["group"] != "default"]
    names = list(dict.fromkeys(zip(shown["group"], shown["name"], strict=True)))
    figure, ((klom, rank),) = grid(2, 2, (6.0, 0.42 * len(names) + 1.2), width_ratios=[2, 1])
    for j, split in enumerate((*SPLITS, "lds")):
        part = shown[shown["split"] == split].set_index(["group", "name"]).loc[names]
        axis, offset, tint = (rank, 0.0, "black") if split == "lds" else (klom, 0.24 * (j - 1), TINTS[split])
        look = {"color": tint, "fmt": "os^o"[j], "ms": 4.5, "lw": 1.1, "label": split}
        axis.errorbar(part["ratio"], np.arange(len(names)) + offset, xerr=bars(part, "ratio"), **look)
    for axis, default in ((klom, 1), (rank, 0)):
        for i in range(1, len(names)):
            if names[i][0] != names[i - 1][0]:
                axis.axhline(i - 0.5, color="0.85", lw=0.8)
        axis.grid(axis="x", color="0.93")
        axis.axvline(default, color="black", lw=0.8)
    is_lds = shown["split"] == "lds"
    ends = shown.loc[~is_lds, ["low", "ratio", "high"]].clip(0.2, 8)
    log_axis(klom, "x", (0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 8), (0.9 * ends.min().min(), 1.1 * ends.max().max()))
    low, high = shown.loc[is_lds, "ratio"].agg(["min", "max"])
    margin = 0.15 * max(0.02, high - low)
    rank.set(xlabel="LDS − the default's", xlim=(low - margin, max(0.0, high) + margin))
    klom.set(xlabel="p95 KLoM / the default's")
    klom.set_yticks(range(len(names)), [f"{group}: {name}" for group, name in names])
    klom.invert_yaxis()
    legend(figure, klom)
    return titled(figure, title, caption)


def groups(points: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw predicted against true change of the margins of forgotten points, from `experiments.uncertainty`.

    A panel for each kind of forget set; its column "attributor" has what is drawn.
    """
    shown = points[points["split"] == "forget"]
    figure, (axes,) = grid(2, 2, (4.6, 4.0), "true change of the mean margin", "predicted", sharex=True)
    ends = np.array([shown[["predicted", "true"]].min().min(), shown[["predicted", "true"]].max().max()])
    for axis, kind in zip(axes, ("random", "group"), strict=True):
        for name, tint, mark in zip(shown["attributor"].unique(), ("0.6", PALETTE[3]), "x.", strict=True):
            part = shown[(shown["kind"] == kind) & (shown["attributor"] == name)]
            axis.plot(part["true"], part["predicted"], mark, color=tint, ms=4, label=name)
        axis.plot(ends, ends, color="black", lw=0.8, zorder=0)
        axis.set_title("points drawn at random" if kind == "random" else "points that belong together")
    legend(figure, axes[0])
    return titled(figure, title, caption)


def side_by_side(medians: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw LDS, and p95 KLoM of DM-direct and DMM on forget and retain points: one row for each attributor.

    Args:
        medians: `side_by_side.over_sets`.
    """
    known = medians[medians["statistic"] == "lds"]
    names, rows = list(known["attributor"]), np.arange(len(known))
    figure, (axes,) = grid(3, 3, (3.7, 0.36 * len(names) + 1.0))
    axes[0].errorbar(known["value"], rows, xerr=bars(known), fmt="o", color="black", capsize=2)
    axes[0].axvline(0, color="0.6", lw=0.8)
    axes[0].set(xlabel="LDS, mean over points", title="rank of effects")
    klom = medians[medians["statistic"] == "klom_p95"]
    for axis, split in zip(axes[1:], ("forget", "retain"), strict=True):
        here = klom[klom["split"] == split].set_index("attributor")
        for method, shift, tint, mark in (("dm_direct", -0.14, PALETTE[2], "D"), ("dmm", 0.14, PALETTE[3], "o")):
            part = here[here["method"] == method].loc[names]
            look = {"fmt": mark, "color": tint, "ms": 5, "capsize": 2, "label": label(method)}
            axis.errorbar(part["value"], rows + shift, xerr=bars(part), **look)
        for name, ls in (("do nothing", ":"), ("retrain (floor)", "-")):
            axis.axvline(here.loc[name, "value"], color="0.35", ls=ls, lw=1.2, label=name)
        axis.set(xlabel="p95 KLoM", title=f"{split} points")
        log_axis(axis, "x", (0.5, 1, 2, 5, 10))
    for axis in axes:
        axis.grid(axis="x", color="0.93")
    axes[0].set_yticks(rows, names)
    axes[0].invert_yaxis()
    legend(figure, axes[1])
    return titled(figure, title, caption)
