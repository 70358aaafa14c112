"""The figures of notebook 10; titles are the caller's, who knows the finding."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmmlib.analysis.plots import titled
from dmmlib.studies.meta.experiments import SYMBOLS

_PALETTE = sns.color_palette("colorblind", 10)
REPLACED = {
    "task": {"label": "a task", "color": _PALETTE[0], "marker": "o"},
    "example": {"label": "one example of a task", "color": _PALETTE[1], "marker": "s"},
    "adaptation": {"label": "one example of the new task", "color": _PALETTE[2], "marker": "^"},
    "meta": {"label": "a task, and one example of the new one", "color": _PALETTE[3], "marker": "D"},
}
_BOUND = {"ls": "--", "lw": 1.2}


def _logarithmic(axis: Axes, values: pd.Series, name: str) -> None:
    ticks = np.unique(values)
    axis.set(xscale="log", yscale="log", xlabel=name)
    axis.set_xticks(ticks, [f"{v:g}" for v in ticks])
    axis.minorticks_off()
    axis.grid(axis="y", color="0.93")


def _bars(table: pd.DataFrame, name: str, low: str = "low", high: str = "high") -> list[pd.Series]:
    return [(table[name] - table[low]).clip(0), (table[high] - table[name]).clip(0)]


def _measured(axis: Axes, part: pd.DataFrame, name: str, **look: Any) -> None:
    axis.errorbar(part["value"], part[name], _bars(part, name), capsize=2, ms=5, **look)


def _finished(
    figure: Figure, title: str, caption: str, axes: Axes, heading: str = "", **lines: dict[str, Any]
) -> Figure:
    """Add a legend at the right, of what the first panel has and of further lines: label -> look; then the title."""
    handles, labels = axes[0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], **{"color": "0.3"} | look) for look in lines.values()]
    wrapped = [textwrap.fill(text, 22) for text in (*labels, *lines)]
    figure.legend(handles, wrapped, loc="outside right center", fontsize=9, title=heading)
    return titled(figure, title, caption)


def sweeps(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """A panel for each quantity that varies: measured stability (marks) and its bounds (dashed)."""
    names = table["varies"].unique()
    size = (2.9 * len(names), 3.5)
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, layout="constrained")
    for axis, (name, here) in zip(axes, table.groupby("varies", sort=False), strict=True):
        for kind, look in REPLACED.items():
            part = here[here["kind"] == kind]
            _measured(axis, part, "measured", **look)
            axis.plot(part["value"], part["bound"], color=look["color"], **_BOUND)
        _logarithmic(axis, here["value"], SYMBOLS[name])
    axes[0].set_ylabel("largest change of loss")
    return _finished(figure, title, caption, axes, "replaced", bounds={"ls": "--"})


def slopes(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """A panel for each replacement: log-log slopes, measured with intervals (marks) and of the bound (bars)."""
    kinds, names = ("task", "example", "adaptation"), [v for v in SYMBOLS.values() if v in set(table["varies"])]
    size = (12.5, 0.5 * len(names) + 1.8)
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, sharex=True, layout="constrained")
    for axis, kind in zip(axes, kinds, strict=True):
        cases = table.groupby(["tasks", "inner"], sort=False)
        for k, ((tasks, inner), case) in enumerate(cases):
            part = case[case["replaced"] == kind]
            row = part["varies"].map(names.index) + 0.14 * (k - (cases.ngroups - 1) / 2)
            look = {"color": _PALETTE[k], "fmt": "osD^v"[k], "ms": 4.5}
            axis.errorbar(part["slope"], row, xerr=_bars(part, "slope"), label=f"{tasks}, {inner}", **look)
            axis.plot(part["bound's slope"], row, "|", color="black", ms=9, mew=1.4)
        axis.axvline(0, color="0.8", lw=0.8, zorder=0)
        axis.set(title=f"replaced: {REPLACED[kind]['label']}", xlabel="log-log slope", xlim=(-3, 1.5))
        axis.grid(axis="x", color="0.93")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    bar = {"color": "black", "marker": "|", "ls": "", "ms": 9, "mew": 1.4}
    return _finished(figure, title, caption, axes, **{"slope of the bound": bar})


def gaps(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """A panel for each quantity: transfer minus empirical risk (marks), stability (lines) and its bound (dashed)."""
    names = table["varies"].unique()
    figure, axes = plt.subplots(1, len(names), figsize=(4.1 * len(names), 3.5), sharey=True, layout="constrained")
    for axis, (name, here) in zip(axes, table.groupby("varies", sort=False), strict=True):
        for (tasks, part), tint, mark in zip(here.groupby("tasks", sort=False), _PALETTE, "osD", strict=False):
            _measured(axis, part[part["low"] > 0], "gap", color=tint, fmt=mark, label=f"gap: {tasks}")
            axis.plot(part["value"], part["stability"], color=tint, lw=1.4)
            axis.plot(part["value"], part["bound"], color=tint, **_BOUND)
        _logarithmic(axis, here["value"], SYMBOLS[name])
    axes[0].set_ylabel("loss")
    return _finished(figure, title, caption, axes, **{"measured stability": {}, "its bound": {"ls": "--"}})


def robust(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Left: stability and bound against the adversary's norm; right: robust transfer risk."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
    for (case, part), tint, mark in zip(table.groupby("case", sort=False), _PALETTE, "os", strict=False):
        shown = part[part["stability"] > 1e-6]
        left.plot(shown["eps"], shown["stability"], color=tint, marker=mark, label=f"{case}: stability")
        left.plot(part["eps"], part["bound"], color=tint, label=f"{case}: bound", **_BOUND)
        right.plot(part["eps"], part["transfer"] / part["transfer"].iloc[0], color=tint, marker=mark, label=case)
    left.set(yscale="log", xlabel="adversary ε (data have norm 1)", ylabel="largest change of loss")
    right.set(xlabel="adversary ε", ylabel="robust transfer risk / that at ε = 0")
    right.legend(fontsize=9)
    left.legend(fontsize=8)
    return titled(figure, title, caption)


def broken(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """A panel for each broken assumption: measured stability against the bound as if it held; failures in red."""
    quantities = {
        "step": "task-step ηλ (allowed: ≤ 1 / (1 + β/λ))",
        "Lipschitz": "size of adverse labels (assumed: ≤ 1)",
        "convexity": "examples n (λ below the modulus)",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.5), layout="constrained")
    for axis, (case, part) in zip(axes, table.groupby("case", sort=False), strict=True):
        fails = part["low"] > part["bound"]
        axis.plot(part["value"], part["bound"], color="0.25", ls="--", label="bound, if the assumption held")
        _measured(axis, part[~fails], "measured", color=_PALETTE[0], fmt="o", label="measured, below it")
        _measured(axis, part[fails], "measured", color=_PALETTE[3], fmt="X", label="measured, above it")
        _logarithmic(axis, part["value"][np.log(part["value"]).diff().fillna(1) > 0.25], quantities[str(case)])
        axis.set_title(f"{part['tasks'].iloc[0]}: {case}")
    axes[0].set_ylabel("largest change of loss")
    return _finished(figure, title, caption, axes)


def forgetting(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Left: KLoM of doing nothing, middle: stability, against lambda; right: one against the other."""
    size = {"figsize": (13, 4.2), "gridspec_kw": {"wspace": 0.06}}
    figure, (left, middle, right) = plt.subplots(1, 3, layout="constrained", **size)
    supports = {
        "do nothing": {"label": "do nothing, same support", "color": _PALETTE[3], "marker": "o"},
        "do nothing, own support": {"label": "do nothing, own support", "color": _PALETTE[1], "marker": "s"},
        "floor": {"label": "floor, same support", "color": "black", "marker": "_"},
    }
    kinds = {kind: REPLACED[kind] for kind in ("task", "adaptation", "meta")}
    for axis, looks in ((left, supports), (middle, kinds)):
        for name, look in looks.items():
            axis.errorbar(
                table["lam"], table[name], _bars(table, name, f"{name} low", f"{name} high"), capsize=2, **look
            )
        _logarithmic(axis, table["lam"], "regularisation λ")
    for kind, ends in {"task": ((-8, -14), (-40, 2)), "meta": ((-8, -14), (10, 2))}.items():
        bars = _bars(table, kind, f"{kind} low", f"{kind} high")
        right.errorbar(table[kind], table["do nothing"], xerr=bars, capsize=2, **kinds[kind])
        for (_, row), shift in zip(table.iloc[[0, -1]].iterrows(), ends, strict=True):
            look = {"textcoords": "offset points", "fontsize": 8, "color": kinds[kind]["color"]}
            right.annotate(f"λ = {row['lam']:g}", (row[kind], row["do nothing"]), shift, **look)
    left.set(yscale="linear", ylim=(0, 1.3 * table["do nothing high"].max()), ylabel="forget KLoM, p95")
    middle.set_ylabel("largest change of loss")
    right.set(xscale="log", xlabel="measured stability (left: more stable)", ylabel="forget KLoM of doing nothing, p95")
    right.set_ylim(0, 1.4 * table["do nothing"].max())
    left.legend(fontsize=8, loc="upper left")
    middle.legend(fontsize=8, loc="best", title="what is replaced", title_fontsize=8)
    right.legend(fontsize=8, loc="upper left", title="what is replaced", title_fontsize=8)
    return titled(figure, title, caption)
