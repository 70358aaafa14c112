"""The study's figures. Each function draws arrays and returns a matplotlib Figure; titles are the caller's,
who knows the finding.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmmlib.data import Dataset
from dmmlib.metrics import Estimate

LABELS = {
    "do_nothing": "do nothing",
    "retrain": "retrain (floor)",
    "gd": "GD on R",
    "ga": "GA on F",
    "ga_gd": "GA, then GD",
    "neggrad_plus": "NegGrad+",
    "scrub": "SCRUB",
    "random_labels": "random labels",
    "salun": "SalUn",
    "bad_teacher": "bad teacher",
    "l1_sparse": "L1-sparse",
    "cf_k": "CF-k",
    "eu_k": "EU-k",
    "ssd": "SSD",
    "newton": "Newton step",
    "oracle_matching": "oracle matching",
    "dm_direct": "DM-direct",
    "dmm": "DMM",
}
_PALETTE = sns.color_palette("colorblind", 10)
COLOURS = {
    "do_nothing": (0.35, 0.35, 0.35),
    "retrain": (0.0, 0.0, 0.0),
    "gd": _PALETTE[0],
    "ga": _PALETTE[1],
    "ga_gd": _PALETTE[4],
    "scrub": _PALETTE[5],
    "oracle_matching": _PALETTE[9],
    "dm_direct": _PALETTE[2],
    "dmm": _PALETTE[3],
    "neggrad_plus": _PALETTE[6],
    "random_labels": _PALETTE[8],
    "salun": _PALETTE[8],
    "bad_teacher": (0.55, 0.65, 0.75),
    "l1_sparse": (0.45, 0.30, 0.60),
    "cf_k": (0.30, 0.45, 0.30),
    "eu_k": (0.30, 0.45, 0.30),
    "ssd": _PALETTE[7],
    "newton": (0.65, 0.05, 0.25),
}
MARKERS = {
    "gd": "s",
    "ga": "^",
    "ga_gd": "v",
    "scrub": "D",
    "oracle_matching": "P",
    "dmm": "o",
    "dm_direct": "*",
    "neggrad_plus": "X",
    "random_labels": "<",
    "salun": ">",
    "bad_teacher": "d",
    "l1_sparse": "8",
    "cf_k": "p",
    "eu_k": "h",
    "ssd": "H",
    "newton": "o",
}
SPLITS = ("forget", "retain", "validation")


def label(method: str) -> str:
    """How a method is written in figures and tables."""
    base, _, attributor = method.partition("@")
    return LABELS.get(base, base.replace("_", " ")) + (f" ({attributor})" if attributor else "")


def colour(method: str) -> tuple[float, float, float]:
    """The colour of a method, the same in every figure; a user's own gets one by its name."""
    base, _, attributor = method.partition("@")
    own = COLOURS.get(base) or _PALETTE[sum(base.encode()) % len(_PALETTE)]
    return tuple(0.5 + 0.5 * c for c in own) if attributor else own


def style() -> None:
    """Set matplotlib's defaults for the study."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "normal",
            "figure.titlesize": 13,
            "legend.frameon": False,
            "savefig.facecolor": "white",
        }
    )


def titled(figure: Figure, title: str, caption: str) -> Figure:
    """Title above, caption (what, n) below, both outside the axes and wrapped to the figure's width."""
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(title, int(9 * width)), x=0.01, ha="left", y=1.02, va="bottom", fontweight="bold")
    figure.text(0.01, -0.01, textwrap.fill(caption, int(15 * width)), ha="left", va="top", fontsize=9, color="0.35")
    return figure


def png(figure: Figure, dpi: int = 90) -> bytes:
    """A figure as the PNG that stands for a widget where none can be shown; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def lds_curve(sizes: Sequence[int], scores: Mapping[str, Sequence[Estimate]], title: str, caption: str) -> Figure:
    """LDS against the number of subset models, a line a split."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (name, estimates), mark in zip(scores.items(), "os^", strict=False):
        value = np.array([e.value for e in estimates])
        error = [value - [e.low for e in estimates], [e.high for e in estimates] - value]
        axes.errorbar(sizes, value, yerr=error, marker=mark, capsize=3, label=name)
    axes.set(xscale="log", xlabel="subset models M", ylabel="LDS (Spearman, mean over points)")
    axes.set_xticks(list(sizes), [f"{s:,}" for s in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend()
    return titled(figure, title, caption)


def predicted_vs_true(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], title: str, caption: str
) -> Figure:
    """Predicted against true change of margin, a panel a forget set.

    Args:
        panels: forget set -> split -> (true, predicted) mean change of margin (n_points,).
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels), 4.2), layout="constrained", squeeze=False)
    looks = {"retain": ("0.75", 4), "validation": (_PALETTE[0], 9), "forget": (_PALETTE[3], 22)}
    for axis, (name, splits) in zip(axes[0], panels.items(), strict=True):
        for split in ("retain", "validation", "forget"):
            true, predicted = splits[split]
            tint, size = looks[split]
            axis.scatter(true, predicted, s=size, color=tint, label=split, linewidths=0, alpha=0.8)
        ends = [np.concatenate([np.concatenate(pair) for pair in splits.values()]).min(), 0.0]
        ends[1] = max(0.0, float(np.max([np.max(np.concatenate(pair)) for pair in splits.values()])))
        axis.plot(ends, ends, color="black", lw=0.8, ls="--", zorder=0)
        true, predicted = splits["forget"]
        r = np.corrcoef(true, predicted)[0, 1]
        axis.set(
            title=f"{name}: correlation on F {r:.2f}",
            xlabel="true change of margin",
            ylabel="predicted change",
        )
    axes[0, 0].legend(markerscale=1.5)
    return titled(figure, title, caption)


def thumbnails(data: Dataset, rows: Mapping[str, np.ndarray], title: str, caption: str, n: int = 14) -> Figure:
    """The first images of each forget set, a row each."""
    figure, axes = plt.subplots(
        len(rows), n, figsize=(0.72 * n + 1.6, 0.78 * len(rows) + 0.2), squeeze=False, layout="constrained"
    )
    for row, (name, indices) in zip(axes, rows.items(), strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, i in zip(row, indices[:n], strict=False):
            image = data.x_train[i]
            axis.imshow(image.squeeze(), cmap="gray_r" if image.shape[-1] == 1 else None)
        row[0].text(
            -0.25,
            0.5,
            f"{name} ({len(indices)})",
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=9,
        )
    return titled(figure, title, caption)


def components(
    loadings: np.ndarray, labels: np.ndarray, class_names: Sequence[str], title: str, caption: str
) -> Figure:
    """Loadings of training points on the first two principal components of the datamodel matrix, by class."""
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    tints = sns.color_palette("colorblind", len(class_names))
    marks = "osD^v<>PX*"
    for c, name in enumerate(class_names):
        here = labels == c
        axis.scatter(
            loadings[here, 0],
            loadings[here, 1],
            s=14,
            color=tints[c],
            marker=marks[c % len(marks)],
            label=name,
            alpha=0.75,
            linewidths=0,
        )
    axis.set(xlabel="loading on PC 1", ylabel="loading on PC 2")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return titled(figure, title, caption)


def class_counts(counts: pd.DataFrame, title: str, caption: str) -> Figure:
    """How many points of each class (columns) each forget set (rows) holds."""
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(counts) + 1.2), layout="constrained")
    sns.heatmap(counts, annot=True, fmt="d", cmap="crest", cbar=False, ax=axis, linewidths=0.5)
    axis.set(xlabel="", ylabel="")
    axis.tick_params(axis="x", rotation=30)
    return titled(figure, title, caption)


def klom_against_cost(
    results: pd.DataFrame, trajectories: pd.DataFrame, title: str, caption: str, split: str = "forget"
) -> Figure:
    """The main result: KLoM's 95th percentile against cost, a panel a forget set.

    Args:
        results: `Study.results`.
        trajectories: `Study.trajectories`: forget_set, method, split, cost, p95.
    """
    names = list(results["forget_set"].unique())
    columns = min(5, len(names))
    n_rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        n_rows,
        columns,
        figsize=(2.5 * columns + 0.6, 2.6 * n_rows + 0.5),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    p95 = results[(results["statistic"] == "klom_p95") & (results["split"] == split)]
    p95 = p95.set_index(["forget_set", "method"])
    final_cost = results[results["statistic"] == "cost"].set_index(["forget_set", "method"])["value"]
    methods = [m for m in results["method"].unique() if m in trajectories["method"].unique()]
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        nothing = p95["value"].get((name, "do_nothing"))
        for method, ls in (("do_nothing", ":"), ("retrain", "-"), ("dm_direct", "--")):
            if (name, method) in p95.index:
                axis.axhline(p95.loc[(name, method), "value"], color=colour(method), ls=ls, lw=1.5, label=label(method))
        for method in methods:
            track = trajectories[
                (trajectories["forget_set"] == name)
                & (trajectories["method"] == method)
                & (trajectories["split"] == split)
            ]
            end = p95.loc[(name, method)]
            x = [0.0, *track["cost"]]
            y = [nothing, *track["p95"]]
            axis.plot(x, y, color=colour(method), lw=1.3, alpha=0.9)
            axis.errorbar(
                final_cost[(name, method)],
                end["value"],
                yerr=[[end["value"] - end["low"]], [end["high"] - end["value"]]],
                color=colour(method),
                marker=MARKERS.get(method, "o"),
                ms=6,
                capsize=2,
                ls="",
                label=label(method),
            )
        axis.set_title(name)
        axis.set_yscale("log")
        axis.set_ylim(0.25, 14)  # an interval may reach down to 0
        axis.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        axis.minorticks_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{split} KLoM, p95")
    for axis in axes[-1]:
        axis.set_xlabel("cost / retraining")
    _legend(figure, axes.flat[0])
    return titled(figure, title, caption)


def _legend(figure: Figure, axis: Axes) -> None:
    """An axis's legend at the figure's right, which is widened for as many columns as its height asks for."""
    handles, labels = axis.get_legend_handles_labels()
    columns = -(-len(labels) // max(1, int(figure.get_figheight() / 0.3)))
    figure.set_figwidth(figure.get_figwidth() + 2.1 * columns)
    figure.legend(handles, labels, loc="outside right center", ncols=columns)


def klom_by_method(results: pd.DataFrame, title: str, caption: str) -> Figure:
    """KLoM's 95th percentile of every method on every forget set, a panel a split."""
    p95 = results[results["statistic"] == "klom_p95"]
    methods = list(results["method"].unique())
    names = list(results["forget_set"].unique())
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 0.42 * len(methods) + 1.6), sharey=True, layout="constrained")
    for axis, split in zip(axes, SPLITS, strict=True):
        for row, method in enumerate(methods):
            here = p95[(p95["split"] == split) & (p95["method"] == method)]
            offsets = np.linspace(-0.28, 0.28, len(names)) if len(names) > 1 else np.zeros(1)
            value = here["value"].to_numpy()
            axis.errorbar(
                value,
                row + offsets,
                xerr=[value - here["low"], here["high"] - value],
                color=colour(method),
                fmt="o",
                ms=3.5,
                lw=1,
            )
            axis.plot(np.median(value), row, "|", color="black", ms=16, mew=2)
        axis.set_yticks(range(len(methods)), [label(m) for m in methods])
        axis.set(title=split, xlabel="KLoM, p95", xscale="log")
        axis.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        axis.minorticks_off()
        axis.grid(axis="x", color="0.9")
    axes[0].invert_yaxis()
    return titled(figure, title, caption)


def margin_histograms(
    points: Sequence[tuple[str, Mapping[str, np.ndarray]]], title: str, caption: str, columns: int = 4
) -> Figure:
    """Histograms of single points' margins over models.

    Args:
        points: (panel title, {method: margins (n_models,)}).
    """
    n_rows = -(-len(points) // columns)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=(3.1 * columns, 2.3 * n_rows + 0.6), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(points) :]:
        axis.set_visible(False)
    for axis, (name, groups) in zip(axes.flat, points, strict=False):
        bins = np.histogram_bin_edges(np.concatenate(list(groups.values())), 24)
        for method, values in groups.items():
            filled = method == "retrain"
            axis.hist(
                values,
                bins,
                density=True,
                histtype="stepfilled" if filled else "step",
                color=(0.7, 0.7, 0.7) if filled else colour(method),
                alpha=0.8 if filled else 1,
                lw=1.6,
                label="oracles" if filled else label(method),
            )
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("margin")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return titled(figure, title, caption)


def _log_klom(axis: Axes, which: str, *values: float) -> None:
    """A logarithmic axis ("x" or "y") of KLoM over the range of the values."""
    low, high = min(values) / 1.15, max(values) * 1.15
    ticks = [t for t in (0.2, 0.5, 1, 2, 3, 5, 7, 10) if low <= t <= high]
    axis.set(**{f"{which}scale": "log"})
    axis.set(**{f"{which}lim": (low, high), f"{which}ticks": ticks, f"{which}ticklabels": [f"{t:g}" for t in ticks]})
    axis.minorticks_off()


def _grid(n: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """n panels of that size (inches) in rows of at most `columns`, with a common y axis."""
    columns = min(columns, n)
    n_rows = -(-n // columns)
    figure, axes = plt.subplots(
        n_rows,
        columns,
        figsize=(size[0] * columns + 0.4, size[1] * n_rows + 0.4),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, axes


def point_trajectories(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, caption: str, band: float = 1.0
) -> Figure:
    """How single forget points approach, reach and overshoot the oracle's margin.

    Args:
        panels: method -> (costs (n_moments,), gaps (n_moments, n_forget)): mean margin minus the oracles',
            in the oracles' standard deviations; positive is under-unlearned.
        band: within so many standard deviations a point counts as unlearned.
    """
    figure, axes = _grid(len(panels), 5, (3.0, 2.9))
    for axis, (method, (costs, gaps)) in zip(axes.flat, panels.items(), strict=False):
        axis.axhspan(-band, band, color="0.9", zorder=0)
        axis.plot(costs, gaps, color=colour(method), lw=0.7, alpha=0.55)
        axis.axhline(0, color="black", lw=0.8)
        inside = (np.abs(gaps[-1]) <= band).mean()
        axis.set_title(f"{label(method)}: {inside:.0%} within ±{band:g} sd", fontsize=10)
        axis.set_xlabel("cost / retraining", fontsize=10)
        axis.set_yscale("symlog", linthresh=2)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean margin − oracles' (oracle sd)", fontsize=10)
    return titled(figure, title, caption)


def under_and_over(shares: pd.DataFrame, title: str, caption: str) -> Figure:
    """Share of F under-unlearned (up) and over-unlearned (down) as a method goes on, a panel a method.

    Args:
        shares: `stopping.shares`; a thin line a forget set, areas their mean.
    """
    methods = list(shares["method"].unique())
    figure, axes = _grid(len(methods), 5, (2.7, 2.4))
    for axis, method in zip(axes.flat, methods, strict=False):
        here = shares[shares["method"] == method]
        mean = here.groupby("moment")[["under", "over"]].mean()
        for column, sign, tint in (("under", 1, _PALETTE[0]), ("over", -1, _PALETTE[3])):
            axis.fill_between(mean.index, sign * mean[column], color=tint, alpha=0.35, linewidth=0, label=column)
            for _, track in here.groupby("forget_set"):
                axis.plot(track["moment"], sign * track[column], color=tint, lw=0.7, alpha=0.7)
        axis.axhline(0, color="black", lw=0.8)
        cost = here.groupby("forget_set")["cost"].max().median()
        axis.set_title(f"{label(method)} (cost {cost:.2g})", fontsize=10)
        axis.set_ylim(-1.05, 1.05)
        axis.set_yticks([-1, -0.5, 0, 0.5, 1], ["1", "0.5", "0", "0.5", "1"])
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis.set_xlabel("share of the method's run", fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("over ↓  share of F  ↑ under", fontsize=10)
    return titled(figure, title, caption)


def stopping_times(stops: pd.DataFrame, title: str, caption: str) -> Figure:
    """Forget KLoM p95 at a method's end, at its best common moment, and at points' own moments.

    Args:
        stops: `stopping.table`; a marker is the median over forget sets, its bar the range of half of them.
    """
    looks = {"end": ("o", "0.45", "at its end"), "common": ("s", _PALETTE[0], "best common moment")}
    looks["own"] = ("D", _PALETTE[1], "each point's own moment")
    methods = [m for m in stops["method"].unique() if m != "retrain"]
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(methods) + 1.4), layout="constrained")
    for row, method in enumerate(methods):
        for offset, (stop, (mark, tint, _)) in zip((-0.22, 0, 0.22), looks.items(), strict=True):
            values = stops[(stops["method"] == method) & (stops["stop"] == stop)]["value"]
            low, middle, high = np.percentile(values, [25, 50, 75])
            axis.plot([low, high], [row + offset] * 2, color=tint, lw=1.5)
            axis.plot(middle, row + offset, mark, color=tint, ms=6)
    floor = stops[(stops["method"] == "retrain") & (stops["stop"] == "end")]["value"]
    axis.axvspan(*np.percentile(floor, [25, 75]), color="0.85", zorder=0)
    axis.axvline(floor.median(), color="black", lw=1)
    for mark, tint, name in looks.values():
        axis.plot([], [], mark, color=tint, label=name)
    axis.plot([], [], color="black", lw=1, label="retrain (floor)")
    axis.set_yticks(range(len(methods)), [label(m) for m in methods])
    axis.invert_yaxis()
    axis.set_xlabel("forget KLoM, p95 (of N / 2 models)")
    _log_klom(
        axis,
        "x",
        *stops[stops["stop"].isin(looks)].groupby(["method", "stop"])["value"].quantile(np.array([0.25, 0.75])),
    )
    axis.grid(axis="x", color="0.92")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return titled(figure, title, caption)


def ablation(scores: pd.DataFrame, title: str, caption: str) -> Figure:
    """Score of every setting, a panel an option; the default is filled.

    Args:
        scores: `dmmlib.analysis.ablation.scores`.
    """
    options = list(scores["option"].unique())
    figure, axes = _grid(len(options), 3, (3.4, 2.6))
    for axis, option in zip(axes.flat, options, strict=False):
        here = scores[scores["option"] == option]
        numbers = pd.to_numeric(here["setting"], errors="coerce")
        if numbers.notna().all():
            here = here.iloc[numbers.argsort()]
        x = np.arange(len(here))
        axis.errorbar(
            x, here["value"], yerr=[here["value"] - here["low"], here["high"] - here["value"]], color=_PALETTE[3],
            marker="o", mfc="white", capsize=3, lw=1.2,
        )  # fmt: skip
        axis.plot(x[here["default"]], here["value"][here["default"]], "o", color=_PALETTE[3], ms=9, zorder=5)
        axis.set_xticks(x, here["setting"].str.replace(", ", "\n"), fontsize=9 if len(here) < 5 else 8)
        axis.set_title(option)
    axes[0, 0].set_ylim(bottom=0)  # all panels share it, so not before each has said what it needs
    for axis in axes[:, 0]:
        axis.set_ylabel("score (mean KLoM p95)")
    return titled(figure, title, caption)


def matching(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """KLoM p95 against the number of oracles matched, a panel a split, beside DMM, DM-direct and retraining.

    Args:
        table: `dmmlib.analysis.ablation.matching`; medians over forget sets, bars the range of half of them.
    """
    figure, axes = _grid(len(SPLITS), 3, (3.6, 3.2))
    lines = {"retrain": ("retrain", "-"), "DM-direct": ("dm_direct", "--"), "DMM": ("dmm", "-.")}
    kinds = {"oracle": ("mean of oracles", "oracle_matching", "o"), "shifted": ("shifted originals", "gd", "s")}
    for axis, split in zip(axes[0], SPLITS, strict=True):
        here = table[table["split"] == split]
        for variant, (method, ls) in lines.items():
            median = here[here["variant"] == variant]["value"].median()
            axis.axhline(median, color=colour(method), ls=ls, lw=1.5, label=label(method))
        for targets, (name, method, mark) in kinds.items():
            rows = here[here["targets"] == targets].groupby("n_oracles")["value"]
            low, middle, high = (rows.quantile(q) for q in (0.25, 0.5, 0.75))
            axis.errorbar(
                middle.index * (1.04 if targets == "shifted" else 1), middle, yerr=[middle - low, high - middle],
                color=colour(method), marker=mark, capsize=3, label=f"OM, {name}",
            )  # fmt: skip
        counts = sorted(set(here["n_oracles"]) - {0})
        axis.set(title=split, xlabel="oracles matched", xscale="log")
        _log_klom(axis, "y", *table.groupby(["variant", "split"])["value"].quantile(np.array([0.25, 0.75])))
        axis.set_xticks(counts, [str(c) for c in counts])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("KLoM, p95")
    _legend(figure, axes[0, 0])
    return titled(figure, title, caption)


def yardsticks(measured: pd.DataFrame, names: Mapping[str, str], title: str, caption: str) -> Figure:
    """Every other yardstick against KLoM p95, a marker a method and forget set, a panel a yardstick.

    Args:
        measured: `dmmlib.analysis.yardsticks.table`.
        names: yardstick -> how it is written; the first is the x axis.
    """
    (first, x_name), *others = names.items()
    figure, axes = plt.subplots(
        1, len(others), figsize=(2.6 * len(others) + 0.4, 3.4), sharex=True, layout="constrained", squeeze=False
    )
    wide = measured.pivot_table(index=["method", "forget_set"], columns="yardstick", values="value", sort=False)
    for axis, (yardstick, name) in zip(axes[0], others, strict=True):
        for method in (m for m in measured["method"].unique() if m != "oracles"):
            here = wide.loc[method]
            axis.plot(here[first], here[yardstick], MARKERS.get(method, "o"), color=colour(method), ms=5, alpha=0.85,
                      mew=0, label=label(method))  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(x_name)
        _log_klom(axis, "x", *wide[first].dropna())
    _legend(figure, axes[0, 0])
    return titled(figure, title, caption)


def power(powers: pd.DataFrame, title: str, caption: str, shown: Sequence[str] | None = None) -> Figure:
    """KLoM p95 with N models, and how often it tells a method from retraining.

    Args:
        powers: `dmmlib.analysis.yardsticks.power`.
        shown: which methods the left panel has; all if None.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for method, here in powers.groupby("method", sort=False):
        look = {"color": colour(str(method)), "marker": MARKERS.get(str(method), "o")}
        if shown is None or method in shown:
            axes[0].plot(here["n_models"], here["median"], **look)
            axes[0].fill_between(here["n_models"], here["low"], here["high"], color=look["color"], alpha=0.15, lw=0)
        bars = [here["power"] - here["power_low"], here["power_high"] - here["power"]]
        axes[1].errorbar(
            here["n_models"], here["power"], yerr=bars, capsize=2, lw=1.2, label=label(str(method)), **look
        )
    axes[0].plot(*powers.groupby("n_models")["threshold"].first().reset_index().to_numpy().T, color="black", ls=":")
    sizes = sorted(powers["n_models"].unique())
    axes[0].set_ylabel("forget KLoM, p95")
    _log_klom(axes[0], "y", *powers["low"], *powers["high"])
    axes[1].set(ylabel="share of draws told from retraining", ylim=(-0.03, 1.05))
    axes[1].axhline(0.05, color="0.6", lw=0.8)
    for axis in axes:
        axis.set(xlabel="models N", xscale="log")
        axis.set_xticks(sizes, [str(s) for s in sizes])
        axis.minorticks_off()
    _legend(figure, axes[1])
    return titled(figure, title, caption)


def klom_distribution(kloms: Mapping[str, np.ndarray], title: str, caption: str) -> Figure:
    """Share of points with at most so much KLoM, a line a method."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for method, values in kloms.items():
        ordered = np.sort(values)
        axis.step(
            ordered,
            np.arange(1, len(ordered) + 1) / len(ordered),
            color=colour(method),
            label=label(method),
            lw=2.2 if method in ("dmm", "retrain") else 1.3,
            ls=":" if method == "do_nothing" else "-",
            where="post",
        )
    axis.axhline(0.95, color="0.6", lw=0.8)
    axis.text(axis.get_xlim()[1], 0.95, " p95", va="center", fontsize=8, color="0.4")
    axis.set(xlabel="KLoM of a forget point", ylabel="share of forget points", ylim=(0, 1.02))
    axis.legend(loc="center left", bbox_to_anchor=(1.03, 0.5))
    return titled(figure, title, caption)


def agreement(
    klom_values: Mapping[str, np.ndarray], lira: Mapping[str, np.ndarray], title: str, caption: str
) -> Figure:
    """U-LiRA's accuracy against KLoM, a point a forget point, a panel a method."""
    figure, axes = plt.subplots(
        1,
        len(klom_values),
        figsize=(2.6 * len(klom_values), 3),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, method in zip(axes[0], klom_values, strict=True):
        axis.scatter(klom_values[method], lira[method], s=8, color=colour(method), alpha=0.6, linewidths=0)
        axis.axhline(0.5, color="black", lw=0.8, ls="--")
        _mean_line(axis, lira[method])
        axis.set(title=label(method), xlabel="KLoM")
    axes[0, 0].set_ylabel("U-LiRA accuracy")
    return titled(figure, title, caption)


def _mean_line(axis: Axes, values: np.ndarray) -> None:
    axis.text(0.97, 0.05, f"mean {values.mean():.2f}", transform=axis.transAxes, ha="right", fontsize=9)
