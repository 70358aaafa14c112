"""The figures of notebook 07, and of 02's comparison; titles are the caller's, who knows the finding."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from dmmlib.analysis.plots import label, titled
from dmmlib.studies.cheap.experiments import SPLITS

_PALETTE = sns.color_palette("colorblind", 10)
LOOKS = {"bayesian": ("Bayesian", _PALETTE[3], "o"), "ridge": ("ridge, margin gauge", _PALETTE[0], "s"),
         "ridge, raw logits": ("ridge, raw logits", _PALETTE[2], "D")}  # fmt: skip
LINES = {
    "do nothing": ("do nothing", "0.35", ":"),
    "floor": ("retraining again (floor)", "black", "-"),
    "true mean shift": ("true mean shift", "0.55", "--"),
}
TINTS = {"forget": _PALETTE[3], "retain": "0.6", "validation": _PALETTE[0]}


def _bars(part: pd.DataFrame, value: str = "value") -> np.ndarray:
    return np.clip(np.stack([part[value] - part["low"], part["high"] - part[value]]), 0, None)


def _log_klom(axis: Axes, high: float) -> None:
    ticks = [0.5, 1, 2, 5, 10]
    axis.set(yscale="log", ylim=(0.4, max(2.0, 1.15 * high)))
    axis.set_yticks(ticks, [f"{v:g}" for v in ticks])
    axis.yaxis.set_minor_formatter(NullFormatter())


def curve(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """p95 KLoM a split, and LDS, against the number of subset models, from `experiments.summary`."""
    figure, axes = plt.subplots(1, 4, figsize=(15.5, 3.6), layout="constrained")
    sizes = np.unique(table.loc[table["attributor"].isin(LOOKS), "n_models"])
    for axis, split in zip(axes, (*SPLITS, "all"), strict=True):
        here = table[(table["split"] == split) & (table["statistic"] == ("lds" if split == "all" else "klom_p95"))]
        for name, (text, tint, ls) in LINES.items():
            line = here[here["attributor"] == name]
            if len(line):
                axis.axhline(line["value"].iloc[0], color=tint, ls=ls, lw=1.4, label=text)
        for name, (text, tint, mark) in LOOKS.items():
            part = here[here["attributor"] == name]
            axis.errorbar(part["n_models"], part["value"], _bars(part), color=tint, marker=mark, capsize=3, label=text)
        axis.set(xscale="log", xlabel="subset models, all counted", xlim=(0.8 * sizes[0], 1.25 * sizes[-1]))
        axis.set_xticks(sizes, [f"{s:,}" for s in sizes], rotation=60)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", color="0.93")
        if split == "all":
            axis.set(title="rank of effects", ylabel="LDS, mean over points", ylim=(0, None))
        else:
            _log_klom(axis, float(here["value"].max()))
            axis.set(title=f"{split} points", ylabel="p95 KLoM of DM-direct")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=10)
    return titled(figure, title, caption)


def ablation(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Each change's p95 KLoM over the default's a split, and LDS minus its, from `experiments.against_default`."""
    shown = table[table["group"] != "default"]
    names = list(dict.fromkeys(zip(shown["group"], shown["name"], strict=True)))
    figure, (klom, rank) = plt.subplots(
        1, 2, figsize=(12.5, 0.42 * len(names) + 1.6), sharey=True, layout="constrained",
        gridspec_kw={"width_ratios": [2, 1]},
    )  # fmt: skip
    for j, split in enumerate((*SPLITS, "lds")):
        part = shown[shown["split"] == split].set_index(["group", "name"]).loc[names]
        axis, offset = (rank, 0.0) if split == "lds" else (klom, 0.24 * (j - 1))
        tint, mark = ("black", "o") if split == "lds" else (TINTS[split], "os^"[j])
        bars = _bars(part, "ratio")
        row = np.arange(len(names)) + offset
        axis.errorbar(part["ratio"], row, xerr=bars, color=tint, fmt=mark, ms=4.5, lw=1.1, label=split)
    groups = [group for group, _ in names]
    for axis in (klom, rank):
        for i in range(1, len(names)):
            if groups[i] != groups[i - 1]:
                axis.axhline(i - 0.5, color="0.85", lw=0.8)
        axis.grid(axis="x", color="0.93")
    low, high = shown[shown["split"] != "lds"]["ratio"].agg(["min", "max"])
    klom.set(xscale="log", xlabel="p95 KLoM / the default's", xlim=(min(0.6, 0.8 * low), 1.4 * high))
    ticks = [v for v in (0.5, 0.7, 1, 1.5, 2, 3, 5, 8) if min(0.6, 0.8 * low) <= v <= 1.4 * high]
    klom.set_xticks(ticks, [f"{v:g}" for v in ticks])
    klom.xaxis.set_minor_formatter(NullFormatter())
    klom.axvline(1, color="black", lw=0.8)
    rank.axvline(0, color="black", lw=0.8)
    ranks = shown[shown["split"] == "lds"]["ratio"]
    span = max(0.02, float(ranks.max() - ranks.min()))
    rank.set(xlabel="LDS − the default's", xlim=(ranks.min() - 0.15 * span, max(0.0, ranks.max()) + 0.15 * span))
    klom.set_yticks(range(len(names)), [f"{group}: {name}" for group, name in names])
    klom.invert_yaxis()
    klom.legend(fontsize=9, loc="lower right")
    return titled(figure, title, caption)


def uncertainty(points: pd.DataFrame, sets: pd.DataFrame, title: str, caption: str, n_bins: int = 8) -> Figure:
    """Error against predicted sd, coverage a forget set, and what groups do beyond the sum of their points.

    Args:
        points: `experiments.uncertainty`; sets: `experiments.calibration`.
    """
    figure, (error, coverage, slope) = plt.subplots(1, 3, figsize=(13, 4.0), layout="constrained")
    for split in SPLITS:
        part = points[points["split"] == split]
        part = part.assign(expected=np.sqrt(part["sd"] ** 2 + part["se"] ** 2), error=part["true"] - part["predicted"])
        bins = pd.qcut(part["expected"], min(n_bins, len(part)), duplicates="drop")
        grouped = part.groupby(bins, observed=True)
        rms = grouped["error"].apply(lambda e: float(np.sqrt((e**2).mean())))
        error.plot(grouped["expected"].mean(), rms, color=TINTS[split], marker="o", ms=4, label=split)
    ends = np.array([error.get_xlim()[0], error.get_xlim()[1]])
    error.plot(ends, ends, color="black", lw=0.8, ls="--", zorder=0)
    error.set(xlabel="expected error: √(sd² + se²)", ylabel="root mean square error", title="error in bins of its size")
    error.legend(fontsize=9)
    for j, split in enumerate(SPLITS):
        for kind, mark, shift in (("random", "o", -0.13), ("group", "D", 0.13)):
            part = sets[(sets["split"] == split) & (sets["kind"] == kind)]
            x = j + shift + np.linspace(-0.06, 0.06, len(part)) if len(part) > 1 else np.full(len(part), j + shift)
            look = {"color": TINTS[split], "ls": "", "marker": mark, "ms": 5}
            coverage.plot(x, part["coverage"], **look)
            slope.plot(x, part["slope"], **look)
    for axis, level in ((coverage, 0.95), (slope, 1.0)):
        axis.axhline(level, color="black", lw=0.8, ls="--", zorder=0)
        axis.set_xticks(range(len(SPLITS)), SPLITS)
    coverage.set(ylim=(0, 1.03), ylabel="share of points", title="inside the 95 % interval")
    slope.set(ylabel="slope of true on predicted", title="above 1: the effect is understated")
    marks = [plt.Line2D([], [], color="0.3", ls="", marker=m) for m in "oD"]
    slope.legend(marks, ["random forget set", "group of alike points"], fontsize=9)
    return titled(figure, title, caption)


def replication(table: pd.DataFrame, each: pd.DataFrame, title: str, caption: str) -> Figure:
    """Bayesian over ridge a data / model pair, kind of forget set and split, with every seed beside its mean.

    Args:
        table: `experiments.over_seeds`; each: `experiments.ratios`.
    """
    pairs = list(dict.fromkeys(table["pair"]))
    figure, axes = plt.subplots(
        1, len(pairs) + 1, figsize=(3.6 * (len(pairs) + 1), 3.8), layout="constrained",
        gridspec_kw={"width_ratios": [*[1.0] * len(pairs), 0.6]},
    )  # fmt: skip
    klom = table[table["split"] != "all"]
    top = max(1.5, 1.1 * float(each[each["split"] != "all"]["value"].max()))
    bottom = min(0.5, 0.9 * float(each[each["split"] != "all"]["value"].min()))
    for axis, pair in zip(axes, pairs, strict=False):
        for j, split in enumerate(SPLITS):
            for kind, mark, shift in (("random", "o", -0.16), ("group", "D", 0.16)):
                part = klom[(klom["pair"] == pair) & (klom["split"] == split) & (klom["kind"] == kind)]
                dots = each[(each["pair"] == pair) & (each["split"] == split) & (each["kind"] == kind)]["value"]
                axis.plot(np.full(len(dots), j + shift + 0.1), dots, ".", color="0.55", ms=5)
                axis.errorbar(
                    np.full(len(part), j + shift), part["value"], _bars(part), fmt=mark, color=TINTS[split], capsize=3
                )
        axis.axhline(1, color="black", lw=0.8)
        axis.axhline(1.25, color="black", lw=0.8, ls=":")
        axis.set(yscale="log", ylim=(bottom, top), title=pair)
        ticks = [v for v in (0.25, 0.33, 0.5, 0.7, 1, 1.25, 2, 3) if bottom <= v <= top]
        axis.set_yticks(ticks, [f"{v:g}" for v in ticks])
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(range(len(SPLITS)), SPLITS)
    axes[0].set_ylabel("p95 KLoM, Bayesian / ridge")
    rank = table[table["split"] == "all"].set_index("pair").loc[pairs]
    axes[-1].errorbar(range(len(pairs)), rank["value"], _bars(rank), fmt="o", color="black", capsize=3)
    axes[-1].axhline(0, color="black", lw=0.8)
    axes[-1].set_xticks(range(len(pairs)), [p.replace(", ", ",\n") for p in pairs], fontsize=8)
    axes[-1].set(ylabel="LDS, Bayesian − ridge", title="rank of effects", xlim=(-0.5, len(pairs) - 0.5))
    marks = [plt.Line2D([], [], color="0.3", ls="", marker=m) for m in "oD"]
    axes[0].legend(marks, ["random", "principal component"], fontsize=8, loc="lower left")
    return titled(figure, title, caption)


def totals(table: pd.DataFrame, requests: Sequence[int], title: str, caption: str) -> Figure:
    """Total cost against the number of requests, from `experiments.costs`."""
    figure, axis = plt.subplots(figsize=(6.8, 4.0), layout="constrained")
    looks = {"retrain": "black", "ridge": _PALETTE[0], "Bayesian": _PALETTE[3]}
    k = np.asarray(requests, float)
    for _, row in table.iterrows():
        tint = next(c for start, c in looks.items() if str(row["way"]).startswith(start))
        ls = "--" if "DMM" in str(row["way"]) else "-"
        axis.plot(k, row["once"] + row["request"] * k, color=tint, ls=ls, label=row["way"])
    axis.set(xscale="log", yscale="log", xlabel="requests", ylabel="retrainings' worth of gradients")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axis.grid(color="0.93")
    axis.legend(fontsize=9)
    return titled(figure, title, caption)


def side_by_side(medians: pd.DataFrame, title: str, caption: str) -> Figure:
    """LDS, and p95 KLoM of DM-direct and DMM on forget and retain points: a row an attributor.

    Args:
        medians: `side_by_side.over_sets`.
    """
    known = medians[medians["statistic"] == "lds"]
    names = list(known["attributor"])
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 0.36 * len(names) + 1.4), sharey=True, layout="constrained")
    rows = np.arange(len(names))
    axes[0].errorbar(known["value"], rows, xerr=_bars(known), fmt="o", color="black", capsize=2)
    axes[0].axvline(0, color="0.6", lw=0.8)
    axes[0].set(xlabel="LDS, mean over points", title="rank of effects")
    klom = medians[medians["statistic"] == "klom_p95"]
    for axis, split in zip(axes[1:], ("forget", "retain"), strict=True):
        here = klom[klom["split"] == split].set_index("attributor")
        for method, shift, tint, mark in (("dm_direct", -0.14, _PALETTE[2], "D"), ("dmm", 0.14, _PALETTE[3], "o")):
            part = here[here["method"] == method].loc[names]
            look = {"fmt": mark, "color": tint, "ms": 5, "capsize": 2}
            axis.errorbar(part["value"], rows + shift, xerr=_bars(part), label=label(method), **look)
        for name, ls in (("do nothing", ":"), ("retrain (floor)", "-")):
            axis.axvline(here.loc[name, "value"], color="0.35", ls=ls, lw=1.2, label=name)
        axis.set(xscale="log", xlabel="p95 KLoM", title=f"{split} points")
        axis.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        axis.xaxis.set_minor_formatter(NullFormatter())
    for axis in axes:
        axis.grid(axis="x", color="0.93")
    axes[0].set_yticks(rows, names)
    axes[0].invert_yaxis()
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    return titled(figure, title, caption)
