"""The study's figures: each function draws arrays and returns a figure; the caller, who knows the finding, titles it.

Where more than seven methods share a plot, those that are `looks.prominent` are in colour and the others grey.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dmmlib.analysis import looks
from dmmlib.analysis.claims import is_baseline
from dmmlib.analysis.looks import AXES, SPLITS, STOPS, colour, label, png, style, titled
from dmmlib.data import Dataset
from dmmlib.metrics import Estimate

__all__ = ["AXES", "SPLITS", "colour", "label", "png", "style", "titled"]  # beside the figures

LINES = {"do_nothing": ":", "retrain": "-", "dm_direct": "--"}  # no model, or one known beforehand: a level
OTHER = ((0.72, 0.72, 0.72), "other methods")  # how a method is drawn that is not `looks.prominent`


# --- datamodels and forget sets --------------------------------------------------------------------------


def lds_curve(
    sizes: Sequence[int],
    scores: Mapping[str, Sequence[Estimate]],
    ceilings: Mapping[str, float],
    title: str,
    caption: str,
) -> Figure:
    """Draw LDS against the number of subset models, one line for each split, below what noise lets it reach."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (name, estimates), mark in zip(scores.items(), "os^", strict=False):
        rows = pd.DataFrame(estimates)
        (line, *_) = axis.errorbar(sizes, rows["value"], yerr=looks.bars(rows), marker=mark, capsize=3, label=name)
        axis.axhline(ceilings[name], color=line.get_color(), ls=":", label=f"ceiling, {name}")
    looks.log_axis(axis, "x", tuple(sizes))
    axis.set_xticklabels([f"{size:,}" for size in sizes])
    axis.set(xlabel="subset models M", ylabel="LDS (Spearman, mean over points)", ylim=(0, None))
    looks.legend(figure, axis)
    return titled(figure, title, caption)


def predicted_vs_true(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], title: str, caption: str
) -> Figure:
    """Draw predicted against true mean change of margin: forget set -> split -> (true, predicted), each (n_points,)."""
    figure, axes = looks.grid(
        len(panels), len(panels), (4.3, 4.0), "true change of margin", "predicted change", sharey=False
    )
    kinds = {"retain": ("0.75", 4), "validation": (looks.PALETTE[0], 9), "forget": (looks.PALETTE[3], 22)}
    for axis, (name, splits) in zip(axes[0], panels.items(), strict=True):
        for split, (tint, size) in kinds.items():
            axis.scatter(*splits[split], size, color=tint, label=split, linewidths=0, alpha=0.8)
        every = np.concatenate([np.concatenate(pair) for pair in splits.values()])
        ends = [every.min(), max(0.0, every.max())]
        axis.plot(ends, ends, color="black", lw=0.8, ls="--", zorder=0)
        axis.set_title(looks.plain(name) + f": correlation on F {np.corrcoef(*splits['forget'])[0, 1]:.2f}")
    looks.legend(figure, axes[0, 0], markerscale=1.5)
    return titled(figure, title, caption)


def thumbnails(data: Dataset, rows: Mapping[str, np.ndarray], title: str, caption: str) -> Figure:
    """Draw the first 14 points of each forget set as `looks.picture`, one row for each set."""
    figure, axes = looks.grid(14 * len(rows), 14, (0.79, 0.75))
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (name, indices) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, data.x_train[indices[:14]], strict=False):
            axis.imshow(looks.picture(image), cmap="gray_r")  # which colours leave aside
        place = {"transform": row[0].transAxes, "ha": "right", "va": "center", "fontsize": 9}
        row[0].text(-0.25, 0.5, looks.plain(f"{name} ({len(indices)})"), **place)
    return titled(figure, title, caption)


def components(
    loadings: np.ndarray, labels: np.ndarray, class_names: Sequence[str], title: str, caption: str
) -> Figure:
    """Draw loadings of training points on the first two principal components of their gradients, by class."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    classes = [looks.plain(name) for name in class_names]
    names = np.array(classes)[labels]
    order: dict[str, Any] = {"hue_order": classes, "style_order": classes, "palette": "colorblind"}
    sns.scatterplot(
        x=loadings[:, 0], y=loadings[:, 1], hue=names, style=names, **order, alpha=0.75, lw=0, s=18, ax=axis
    )
    axis.set(xlabel="loading on PC 1", ylabel="loading on PC 2")
    axis.legend().remove()
    looks.legend(figure, axis)
    return titled(figure, title, caption)


def class_counts(counts: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw how many points of each class (columns) each forget set (rows) holds; colour: their share of the set."""
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(counts) + 1.2), layout="constrained")
    counts = counts.rename(index=looks.plain, columns=looks.plain)
    sns.heatmap((counts.T / counts.T.sum()).T, annot=counts, fmt="d", cmap="crest", cbar=False, ax=axis, linewidths=0.5)
    axis.set(xlabel="", ylabel="")
    axis.tick_params(axis="x", rotation=30)
    return titled(figure, title, caption)


# --- methods ---------------------------------------------------------------------------------------------


def gap_against_cost(results: pd.DataFrame, trajectories: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw the main result: mean gap on F against cost, a panel for each forget set, a line for each trajectory."""
    names = list(results["forget_set"].unique())
    figure, axes = looks.grid(len(names), 5, (2.5, 2.6), "cost / retraining", AXES["mean_gap"], sharex=True)
    keys = ["forget_set", "method"]
    gap = results[(results["statistic"] == "mean_gap") & (results["split"] == "forget")].set_index(keys)
    cost = results[results["statistic"] == "cost"].set_index(keys)["value"]
    tracks = trajectories[trajectories["split"] == "forget"].groupby(keys)
    methods = [m for m in results["method"].unique() if m in trajectories["method"].unique()]
    shown = looks.prominent(gap["value"].groupby("method").median().reindex([*methods, *LINES]).dropna())
    for axis, name in zip(axes.flat, names, strict=False):
        nothing = gap["value"].get((name, "do_nothing"))
        for method, ls in LINES.items():
            if (name, method) in gap.index:
                axis.axhline(gap.loc[(name, method), "value"], color=colour(method), ls=ls, lw=1.5, label=label(method))
        for method in sorted(methods, key=shown.__contains__):  # those in colour last, on top
            track, end = tracks.get_group((name, method)), gap.loc[(name, method)]
            tint, name_of = (colour(method), label(method)) if method in shown else OTHER
            look = {"color": tint, "marker": looks.marker(method), "ms": 6, "capsize": 2, "ls": ""}
            axis.plot([0.0, *track["cost"]], [nothing, *track["gap"]], color=tint, lw=1.3, alpha=0.9)
            axis.errorbar(cost[(name, method)], end["value"], yerr=looks.bars(end), label=name_of, **look)
            axis.plot(cost[(name, method)], 0.04 if end["low"] < 0.04 else np.nan, "v", color=tint, ms=5, clip_on=False)
        axis.set_title(looks.plain(name))
        looks.log_axis(axis, "y", (0.1, 0.2, 0.5, 1, 2, 5, 10, 20), (0.04, 30))  # who diverged leaves the frame
    looks.legend(figure, axes.flat[0])
    return titled(figure, title, caption)


def by_method(results: pd.DataFrame, statistic: str, title: str, caption: str) -> Figure:
    """Draw a statistic of `looks.AXES` of every method on every forget set, one panel for each split."""
    here = results[results["statistic"] == statistic]
    methods, n_sets = list(results["method"].unique()), results["forget_set"].nunique()
    offsets = np.linspace(-0.28, 0.28, n_sets) if n_sets > 1 else np.zeros(1)
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 0.42 * len(methods) + 1.6), sharey=True, layout="constrained")
    for axis, split in zip(axes, SPLITS, strict=True):
        for row, method in enumerate(methods):
            rows = here[(here["split"] == split) & (here["method"] == method)]
            look = {"color": colour(method), "fmt": "o", "ms": 3.5, "lw": 1}
            axis.errorbar(rows["value"], row + offsets, xerr=looks.bars(rows), **look)
            axis.plot(rows["value"].median(), row, "|", color="black", ms=16, mew=2)
            if statistic != "ks_share":
                cut = np.where(rows["low"] < 0.1, 0.1, np.nan)
                axis.plot(cut, row + offsets, "<", color=colour(method), ms=4, clip_on=False)
                looks.log_axis(axis, "x", (0.1, 0.2, 0.5, 1, 2, 5, 10, 20), (0.1, 20))
        axis.set(title=split, xlabel=AXES[statistic])
    looks.rows(axes, [label(m) for m in methods])
    return titled(figure, title, caption)


def measures(results: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw medians over forget sets of what is measured, one panel for each of `looks.HEADLINE`, a mark for a split."""
    middle = results.groupby(["method", "statistic", "split"], sort=False)["value"].median()
    methods = list(results["method"].unique())
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 0.3 * len(methods) + 1.6), layout="constrained", sharey=True)
    marks = dict(zip(SPLITS, (("o", looks.PALETTE[3]), ("s", "0.55"), ("D", looks.PALETTE[0])), strict=True))
    for axis, statistic in zip(axes, looks.HEADLINE, strict=True):
        for split, (mark, tint) in marks.items():
            values = [middle[m, statistic, split] for m in methods]
            axis.plot(values, range(len(methods)), mark, color=tint, ms=6, label=split, alpha=0.9)
            axis.axvline(middle["retrain", statistic, split], color=tint, lw=0.8, ls=":")
        axis.set(xlabel=AXES[statistic])
        if statistic != "ks_share":
            looks.log_axis(axis, "x", (0.1, 0.2, 0.5, 1, 2, 5, 10, 20))
        axis.grid(axis="y", color="0.93")
    looks.rows(axes, [label(m) for m in methods])
    looks.legend(figure, axes[0])
    return titled(figure, title, caption)


def ablation(scores: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw every setting's score of `ablation.scores`, one panel for each option; the default is filled."""
    figure, axes = looks.grid(scores["option"].nunique(), 3, (3.4, 2.6), y="score (mean KLoM p95)")
    for axis, (option, here) in zip(axes.flat, scores.groupby("option", sort=False), strict=False):
        numbers = pd.to_numeric(here["setting"], errors="coerce")
        if numbers.notna().all():
            here = here.iloc[numbers.argsort()]
        x = np.arange(len(here))
        look = {"color": looks.PALETTE[3], "marker": "o", "mfc": "white", "capsize": 3, "lw": 1.2}
        axis.errorbar(x, here["value"], yerr=looks.bars(here), **look)
        axis.plot(x[here["default"]], here["value"][here["default"]], "o", color=looks.PALETTE[3], ms=9, zorder=5)
        axis.set_xticks(
            x, here["setting"].map(lambda words: textwrap.fill(words, 9)), fontsize=9 if len(here) < 5 else 8
        )
        axis.set_title(option)
    axes[0, 0].set_ylim(bottom=0)  # all panels share it, so not before each has said what it needs
    return titled(figure, title, caption)


def matching(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw KLoM p95 of `ablation.matching` against the number of oracles: medians and range over forget sets."""
    figure, axes = looks.grid(len(SPLITS), 3, (3.6, 3.2), "oracles matched", "KLoM, p95")
    lines = {"retrain": ("retrain", "-"), "DM-direct": ("dm_direct", "--"), "DMM": ("dmm", "-.")}
    kinds = {"oracle": ("mean of oracles", "oracle_matching", "o"), "shifted": ("shifted originals", "gd", "s")}
    for axis, split in zip(axes[0], SPLITS, strict=True):
        here = table[table["split"] == split]
        for variant, (method, ls) in lines.items():
            median = here[here["variant"] == variant]["value"].median()
            axis.axhline(median, color=colour(method), ls=ls, lw=1.5, label=label(method))
        for targets, (name, method, mark) in kinds.items():
            values = here[here["targets"] == targets].groupby("n_oracles")["value"]
            rows = values.agg(low="min", value="median", high="max")
            look = {"color": colour(method), "marker": mark, "capsize": 3, "label": f"OM, {name}"}
            axis.errorbar(rows.index * (1.04 if targets == "shifted" else 1), rows["value"], looks.bars(rows), **look)
        axis.set_title(split)
        looks.log_axis(axis, "x", tuple(sorted(set(here["n_oracles"]) - {0})))
        looks.klom_axis(axis, "y", *table["value"])
    looks.legend(figure, axes[0, 0])
    return titled(figure, title, caption)


# --- points and moments ----------------------------------------------------------------------------------


def margin_histograms(points: Sequence[tuple[str, Mapping[str, np.ndarray]]], title: str, caption: str) -> Figure:
    """Draw histograms of single points' margins: for each, the panel's title and method -> margins (n_models,)."""
    figure, axes = looks.grid(len(points), 4, (3.1, 2.3), "margin", sharey=False)
    for axis, (name, groups) in zip(axes.flat, points, strict=False):
        bins = np.histogram_bin_edges(np.concatenate(list(groups.values())), 24)
        for method, values in groups.items():
            look: dict[str, Any] = {"histtype": "step", "color": colour(method), "label": label(method)}
            if method == "retrain":
                look = {"histtype": "stepfilled", "color": (0.7, 0.7, 0.7), "alpha": 0.8, "label": "oracles"}
            axis.hist(values, bins, density=True, lw=1.6, **look)
        axis.set_title(looks.plain(name), fontsize=9)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    looks.legend(figure, axes.flat[0])
    return titled(figure, title, caption)


def point_trajectories(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, caption: str, marked: int = -1
) -> Figure:
    """Draw how single forget points approach, reach and overshoot the oracles' margin; within ±1 sd they are unlearned.

    Args:
        panels: method -> costs (n_moments,) and `stopping.gaps` (n_moments, n_forget).
        marked: position among the forget points of the one that is drawn in black; -1 for none.
    """
    figure, axes = looks.grid(len(panels), 5, (3.0, 2.9), "cost / retraining", "mean margin − oracles' (oracle sd)")
    for axis, (method, (costs, gaps)) in zip(axes.flat, panels.items(), strict=False):
        axis.axhspan(-1, 1, color="0.9", zorder=0)
        axis.plot(costs, gaps, color=looks.PALETTE[0 if is_baseline(method) else 3], lw=0.7, alpha=0.55)
        if marked >= 0:
            axis.plot(costs, gaps[:, marked], color="black", lw=1.8)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_title(f"{label(method)}: {(np.abs(gaps[-1]) <= 1).mean():.0%} within ±1 sd", fontsize=10)
        axis.set_yscale("symlog", linthresh=2)  # all panels share it
    low, high = axes[0, 0].get_ylim()
    ticks = [t for t in (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axes[0, 0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    return titled(figure, title, caption)


def under_and_over(shares: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw share of F under-unlearned (up) and over-unlearned (down) on each method's way, by `stopping.shares`.

    Thin lines are forget sets; areas are their mean, interpolated on the share of each set's cost.
    """
    words = "share of the method's run", "over ↓  share of F  ↑ under"
    figure, axes = looks.grid(shares["method"].nunique(), 5, (2.7, 2.4), *words)
    for axis, (method, here) in zip(axes.flat, shares.groupby("method", sort=False), strict=False):
        tracks = [track for _, track in here.groupby("forget_set")]
        moments = np.unique(here["moment"])
        for column, sign, tint in (("under", 1, looks.PALETTE[0]), ("over", -1, looks.PALETTE[3])):
            mean = np.mean([np.interp(moments, track["moment"], track[column]) for track in tracks], axis=0)
            axis.fill_between(moments, sign * mean, color=tint, alpha=0.35, linewidth=0, label=column)
            for track in tracks:
                axis.plot(track["moment"], sign * track[column], color=tint, lw=0.7, alpha=0.7)
        axis.axhline(0, color="black", lw=0.8)
        cost = here.groupby("forget_set")["cost"].max().median()
        axis.set_title(f"{label(str(method))} (cost {cost:.2g})", fontsize=10)
        axis.set(xticks=[0, 0.5, 1], ylim=(-1.05, 1.05))
        axis.set_yticks([-1, -0.5, 0, 0.5, 1], ["1", "0.5", "0", "0.5", "1"])
    return titled(figure, title, caption)


def stopping_times(stops: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw forget KLoM p95 of `stopping.table` for each way to stop: medians over forget sets, bars their quartiles."""
    kinds = dict(zip(STOPS, (("o", "0.45"), ("s", looks.PALETTE[0]), ("D", looks.PALETTE[1])), strict=True))
    found = looks.quartiles(stops[stops["stop"].isin(kinds)], "method", "stop")
    methods = [m for m in stops["method"].unique() if m != "retrain"]
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(methods) + 1.4), layout="constrained")
    for offset, (stop, (mark, tint)) in zip((-0.22, 0, 0.22), kinds.items(), strict=True):
        here, rows = found.xs(stop, level="stop").loc[methods], np.arange(len(methods)) + offset
        axis.errorbar(here["value"], rows, xerr=looks.bars(here), color=tint, fmt=mark, ms=6, lw=1.5, label=STOPS[stop])
    floor = found.loc[("retrain", "end"), :].astype(float).to_dict()
    axis.axvspan(floor["low"], floor["high"], color="0.85", zorder=0)
    axis.axvline(floor["value"], color="black", lw=1, label="retrain (floor)")
    axis.set_xlabel("forget KLoM, p95 (of N / 2 models)")
    looks.klom_axis(axis, "x", *found[["low", "high"]].to_numpy().ravel())
    looks.rows([axis], [label(m) for m in methods])
    looks.legend(figure, axis)
    return titled(figure, title, caption)


# --- evaluators ------------------------------------------------------------------------------------------


def klom_distribution(kloms: Mapping[str, np.ndarray], title: str, caption: str) -> Figure:
    """Draw the distribution function of points' KLoM, one line for each method."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    shown = looks.prominent(pd.Series({method: np.mean(values) for method, values in kloms.items()}))
    for method in sorted(kloms, key=lambda m: (m in shown) + (m == "dm_direct")):  # dashes, on DMM, which it is like
        width = 2.2 if method in ("dmm", "retrain") else 1.3
        tint, name = (colour(method), label(method)) if method in shown else OTHER
        axis.ecdf(kloms[method], color=tint, label=name, lw=width, ls=LINES.get(method, "-"))
    axis.axhline(0.95, color="0.6", lw=0.8)
    axis.text(axis.get_xlim()[1], 0.95, " p95", va="center", fontsize=8, color="0.4")
    axis.set(xlabel="KLoM of a forget point", ylabel="share of forget points", ylim=(0, 1.02))
    looks.legend(figure, axis)
    return titled(figure, title, caption)


def agreement(kloms: Mapping[str, np.ndarray], lira: Mapping[str, np.ndarray], title: str, caption: str) -> Figure:
    """Draw U-LiRA's accuracy against KLoM, one dot for each forget point, one panel for each method."""
    figure, axes = looks.grid(len(kloms), len(kloms), (2.6, 2.6), "KLoM", "U-LiRA accuracy", sharex=True)
    for axis, method in zip(axes[0], kloms, strict=True):
        axis.scatter(kloms[method], lira[method], s=8, color=colour(method), alpha=0.6, linewidths=0)
        axis.axhline(0.5, color="black", lw=0.8, ls="--")
        axis.text(0.97, 0.05, f"mean {lira[method].mean():.2f}", transform=axis.transAxes, ha="right", fontsize=9)
        axis.set_title(label(method))
    return titled(figure, title, caption)


def evaluators(measured: pd.DataFrame, names: Mapping[str, str], title: str, caption: str) -> Figure:
    """Draw other evaluators of `evaluators.table` against KLoM p95, one marker for each method and forget set.

    Args:
        names: evaluator -> how it is written; the first is the x axis, each other one has a panel.
    """
    (first, x), *others = names.items()
    figure, axes = looks.grid(len(others), len(others), (2.6, 3.0), x, sharex=True, sharey=False)
    wide = measured.pivot_table(index=["method", "forget_set"], columns="evaluator", values="value", sort=False)
    shown = looks.prominent(wide[first].groupby("method").median().drop("oracles", errors="ignore"))
    for axis, (evaluator, name) in zip(axes[0], others, strict=True):
        for method in (m for m in measured["method"].unique() if m != "oracles"):
            tint, name_of = (colour(method), label(method)) if method in shown else OTHER
            above = (method in shown) + (method == "dm_direct")  # its stars lie on DMM's dots
            look = {"color": tint, "ms": 5, "alpha": 0.85, "mew": 0, "label": name_of, "zorder": 2 + above}
            axis.plot(wide.loc[method, first], wide.loc[method, evaluator], looks.marker(method), **look)
        axis.set_title(name, fontsize=10)
        looks.klom_axis(axis, "x", *wide[first].dropna())
    looks.legend(figure, axes[0, 0])
    return titled(figure, title, caption)


def power(powers: pd.DataFrame, title: str, caption: str, shown: Sequence[str]) -> Figure:
    """Draw KLoM p95 with N models of the `shown` methods, and the `evaluators.power` to tell each from retraining."""
    figure, axes = looks.grid(2, 2, (4.3, 3.6), "models N", "forget KLoM, p95", sharey=False)
    left, right = axes[0]
    coloured = looks.prominent(powers.groupby("method")["power"].mean())
    for method, here in powers.groupby("method", sort=False):
        tint, name = (colour(str(method)), label(str(method))) if method in coloured else OTHER
        above = (method in coloured) + (method == "dm_direct")
        look = {"color": tint, "marker": looks.marker(str(method)), "zorder": 2 + above}
        if method in shown:
            left.plot(here["n_models"], here["median"], **look)
            left.fill_between(here["n_models"], here["low"], here["high"], color=look["color"], alpha=0.15, lw=0)
        reach = looks.bars(here, "power", "power_low", "power_high")
        right.errorbar(here["n_models"], here["power"], reach, capsize=2, lw=1.2, label=name, **look)
    threshold = powers.groupby("n_models")["threshold"].first()
    left.plot(threshold.index, threshold, color="black", ls=":")
    looks.klom_axis(left, "y", *powers["low"], *powers["high"])
    right.set(ylabel="share of draws told from retraining", ylim=(-0.03, 1.05))
    right.axhline(0.05, color="0.6", lw=0.8)
    for axis in (left, right):
        looks.log_axis(axis, "x", tuple(threshold.index))
    looks.legend(figure, right)
    return titled(figure, title, caption)
