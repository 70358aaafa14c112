"""The figures of notebook 07, and of 02's comparison; titles are the caller's, who knows the finding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from dmmlib.analysis.looks import PALETTE, SPLITS, bars, grid, label, legend, log_axis, titled

LOOKS = {"bayesian": ("Bayesian", PALETTE[3], "o"), "ridge": ("ridge, margin gauge", PALETTE[0], "s"),
         "ridge, raw logits": ("ridge, raw logits", PALETTE[2], "D")}  # fmt: skip
LINES = {"do nothing": ("do nothing", "0.35", ":"), "floor": ("retraining again (floor)", "black", "-"),
         "true mean shift": ("true mean shift", "0.55", "--")}  # fmt: skip
TINTS = {"forget": PALETTE[3], "retain": "0.6", "validation": PALETTE[0]}
KINDS = {"random": ("o", -0.15), "group": ("D", 0.15)}  # of forget sets: marker, and where it stands beside a split


def _places(axes: Sequence[Axes]) -> Iterator[tuple[float, str, str, str]]:
    """The place, split, kind and marker of every split and kind of forget set; the axes are labelled with splits."""
    for axis in axes:
        axis.set_xticks(range(len(SPLITS)), SPLITS)
    return ((j + shift, split, kind, m) for j, split in enumerate(SPLITS) for kind, (m, shift) in KINDS.items())


def _explain_kinds(axis: Axes, group: str) -> None:
    for (mark, _), name in zip(KINDS.values(), ("random forget set", group), strict=True):
        axis.plot([], [], mark, color="0.3", label=name)


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
            log_axis(axis, "y", (0.5, 1, 2, 5, 10), (0.4, max(2.0, 1.15 * here["value"].max())))
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
    low, high = shown.loc[~is_lds, "ratio"].agg(["min", "max"])
    log_axis(klom, "x", (0.5, 0.7, 1, 1.5, 2, 3, 5, 8), (min(0.6, 0.8 * low), 1.4 * high))
    low, high = shown.loc[is_lds, "ratio"].agg(["min", "max"])
    margin = 0.15 * max(0.02, high - low)
    rank.set(xlabel="LDS − the default's", xlim=(low - margin, max(0.0, high) + margin))
    klom.set(xlabel="p95 KLoM / the default's")
    klom.set_yticks(range(len(names)), [f"{group}: {name}" for group, name in names])
    klom.invert_yaxis()
    legend(figure, klom)
    return titled(figure, title, caption)


def uncertainty(points: pd.DataFrame, sets: pd.DataFrame, title: str, caption: str, n_bins: int = 8) -> Figure:
    """Draw error against predicted sd, coverage of each forget set, and what groups do beyond the sum of their points.

    Args:
        points: `experiments.uncertainty`; sets: `experiments.calibration`.
    """
    figure, ((error, coverage, slope),) = grid(3, 3, (4.2, 3.6), sharey=False)
    expected, square = np.hypot(points["sd"], points["se"]), (points["true"] - points["predicted"]) ** 2
    points = points.assign(expected=expected, square=square)
    for split in SPLITS:
        part = points[points["split"] == split]
        bins = pd.qcut(part["expected"], min(n_bins, len(part)), duplicates="drop")
        mean = part.groupby(bins, observed=True)[["expected", "square"]].mean()
        error.plot(mean["expected"], np.sqrt(mean["square"]), color=TINTS[split], marker="o", ms=4, label=split)
    ends = np.array(error.get_xlim())
    error.plot(ends, ends, color="black", lw=0.8, ls="--", zorder=0)
    error.set(xlabel="expected error: √(sd² + se²)", ylabel="root mean square error", title="error in bins of its size")
    for place, split, kind, mark in _places((coverage, slope)):
        part = sets[(sets["split"] == split) & (sets["kind"] == kind)]
        x = place + (np.linspace(-0.06, 0.06, len(part)) if len(part) > 1 else np.zeros(len(part)))
        for axis, column in ((coverage, "coverage"), (slope, "slope")):
            axis.plot(x, part[column], color=TINTS[split], ls="", marker=mark, ms=5)
    for axis, level in ((coverage, 0.95), (slope, 1.0)):
        axis.axhline(level, color="black", lw=0.8, ls="--", zorder=0)
    coverage.set(ylim=(0, 1.03), ylabel="share of points", title="inside the 95 % interval")
    slope.set(ylabel="slope of true on predicted", title="above 1: the effect is understated")
    _explain_kinds(slope, "group of alike points")
    legend(figure, error, slope)
    return titled(figure, title, caption)


def replication(table: pd.DataFrame, each: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw Bayesian over ridge for each pair of data and model, kind of forget set and split, with every seed.

    Args:
        table: `experiments.over_seeds`; each: `experiments.ratios`.
    """
    pairs = list(dict.fromkeys(table["pair"]))
    widths = [*[1.0] * len(pairs), 0.6]
    figure, (axes,) = grid(len(widths), len(widths), (3.5, 3.4), sharey=False, width_ratios=widths)
    low, high = each.loc[each["split"] != "all", "value"].agg(["min", "max"])
    for axis, pair in zip(axes, pairs, strict=False):
        for place, split, kind, mark in _places([axis]):
            dots, part = (t[(t["pair"] == pair) & (t["split"] == split) & (t["kind"] == kind)] for t in (each, table))
            axis.plot(np.full(len(dots), place + 0.1), dots["value"], ".", color="0.55", ms=5)
            look = {"fmt": mark, "color": TINTS[split], "capsize": 3}
            axis.errorbar(np.full(len(part), place), part["value"], bars(part), **look)
        axis.axhline(1, color="black", lw=0.8)
        axis.axhline(1.25, color="black", lw=0.8, ls=":")
        log_axis(axis, "y", (0.25, 0.33, 0.5, 0.7, 1, 1.25, 2, 3), (min(0.5, 0.9 * low), max(1.5, 1.1 * high)))
        axis.set_title(pair)
    axes[0].set_ylabel("p95 KLoM, Bayesian / ridge")
    rank = table[table["split"] == "all"].set_index("pair").loc[pairs]
    axes[-1].errorbar(range(len(pairs)), rank["value"], bars(rank), fmt="o", color="black", capsize=3)
    axes[-1].axhline(0, color="black", lw=0.8)
    axes[-1].set_xticks(range(len(pairs)), [p.replace(", ", ",\n") for p in pairs], fontsize=8)
    axes[-1].set(ylabel="LDS, Bayesian − ridge", title="rank of effects", xlim=(-0.5, len(pairs) - 0.5))
    _explain_kinds(axes[0], "principal component")
    legend(figure, axes[0])
    return titled(figure, title, caption)


def totals(table: pd.DataFrame, requests: Sequence[int], title: str, caption: str) -> Figure:
    """Draw total cost against the number of requests, from `experiments.costs`."""
    figure, axis = plt.subplots(figsize=(6.8, 4.0), layout="constrained")
    looks = {"retrain": "black", "ridge": PALETTE[0], "Bayesian": PALETTE[3]}
    k = np.asarray(requests, float)
    for way, once, request in table[["way", "once", "request"]].itertuples(index=False):
        look = {"color": looks[way.split(",")[0]], "ls": "--" if "DMM" in way else "-"}
        axis.plot(k, once + request * k, label=way, **look)
    axis.set(xscale="log", yscale="log", xlabel="requests", ylabel="retrainings' worth of gradients")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.grid(color="0.93")
    legend(figure, axis)
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
