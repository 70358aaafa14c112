"""The figures of notebook 10; titles are the caller's, who knows the finding."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
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
REPLACED: dict[str, dict[str, Any]] = {
    "task": {"label": "a task", "color": _PALETTE[0], "marker": "o"},
    "example": {"label": "one example of a task", "color": _PALETTE[1], "marker": "s"},
    "adaptation": {"label": "one example of the new task", "color": _PALETTE[2], "marker": "^"},
    "meta": {"label": "a task, and one example of the new one", "color": _PALETTE[3], "marker": "D"},
}
_CHANGE = "largest change of loss"


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


def _bound(axis: Axes, x: pd.Series, bound: pd.Series, color: Any, **look: Any) -> None:
    axis.plot(x, bound, color=color, ls="--", lw=1.2, **look)


def _legend(figure: Figure, axis: Axes, more: Mapping[str, Mapping[str, Any]], heading: str | None = None) -> None:
    """Explain at the figure's right what one of its panels has, and more: label -> look of a line."""
    handles, labels = axis.get_legend_handles_labels()
    handles += [plt.Line2D([], [], **{"color": "0.3", **look}) for look in more.values()]
    wrapped = [textwrap.fill(text, 22) for text in (*labels, *more)]
    figure.legend(handles, wrapped, loc="outside right center", fontsize=9, title=heading)


def sweeps(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """A panel for each quantity that varies: measured stability (marks) and its bounds (dashed)."""
    parts = table.groupby("varies", sort=False)
    size = (2.9 * parts.ngroups, 3.5)
    figure, axes = plt.subplots(1, parts.ngroups, figsize=size, sharey=True, layout="constrained")
    for axis, (name, here) in zip(axes, parts, strict=True):
        for kind, look in REPLACED.items():
            part = here[here["kind"] == kind]
            _measured(axis, part, "measured", **look)
            _bound(axis, part["value"], part["bound"], look["color"])
        _logarithmic(axis, here["value"], SYMBOLS[str(name)])
    axes[0].set_ylabel(_CHANGE)
    _legend(figure, axes[0], {"bounds": {"ls": "--"}}, "replaced")
    return titled(figure, title, caption)


def slopes(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """A panel for each replacement: log-log slopes, measured with intervals (marks) and of the bound (bars)."""
    names, cases = (
        [v for v in SYMBOLS.values() if v in set(table["varies"])],
        table.groupby(["tasks", "inner"], sort=False),
    )
    size, bar = (12.5, 0.5 * len(names) + 1.8), {"color": "black", "marker": "|", "ls": "", "ms": 9, "mew": 1.4}
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, sharex=True, layout="constrained")
    for axis, kind in zip(axes, ("task", "example", "adaptation"), strict=True):
        for k, ((tasks, inner), case) in enumerate(cases):
            part = case[case["replaced"] == kind]
            row = part["varies"].map(names.index) + 0.14 * (k - (cases.ngroups - 1) / 2)
            look = {"color": _PALETTE[k], "fmt": "osD^v"[k], "ms": 4.5, "label": f"{tasks}, {inner}"}
            axis.errorbar(part["slope"], row, xerr=_bars(part, "slope"), **look)
            axis.plot(part["bound's slope"], row, **bar)
        axis.axvline(0, color="0.8", lw=0.8, zorder=0)
        axis.set(title=f"replaced: {REPLACED[kind]['label']}", xlabel="log-log slope", xlim=(-3, 1.5))
        axis.grid(axis="x", color="0.93")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    _legend(figure, axes[0], {"slope of the bound": bar})
    return titled(figure, title, caption)


def gaps(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """A panel for each quantity: transfer minus empirical risk (marks), stability (lines) and its bound (dashed)."""
    parts = table.groupby("varies", sort=False)
    size = (4.1 * parts.ngroups, 3.5)
    figure, axes = plt.subplots(1, parts.ngroups, figsize=size, sharey=True, layout="constrained")
    for axis, (name, here) in zip(axes, parts, strict=True):
        for (tasks, part), tint, mark in zip(here.groupby("tasks", sort=False), _PALETTE, "osD", strict=False):
            _measured(axis, part[part["low"] > 0], "gap", color=tint, fmt=mark, label=f"gap: {tasks}")
            axis.plot(part["value"], part["stability"], color=tint, lw=1.4)
            _bound(axis, part["value"], part["bound"], tint)
        _logarithmic(axis, here["value"], SYMBOLS[str(name)])
    axes[0].set_ylabel("loss")
    _legend(figure, axes[0], {"measured stability": {}, "its bound": {"ls": "--"}})
    return titled(figure, title, caption)


def robust(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Left: stability and bound against the adversary's norm; right: robust transfer risk."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
    for (case, part), tint, mark in zip(table.groupby("case", sort=False), _PALETTE, "os", strict=False):
        shown = part[part["stability"] > 1e-6]
        left.plot(shown["eps"], shown["stability"], color=tint, marker=mark, label=f"{case}: stability")
        _bound(left, part["eps"], part["bound"], tint, label=f"{case}: bound")
        right.plot(part["eps"], part["transfer"] / part["transfer"].iloc[0], color=tint, marker=mark, label=str(case))
    left.set(yscale="log", xlabel="adversary ε (data have norm 1)", ylabel=_CHANGE)
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
    axes[0].set_ylabel(_CHANGE)
    _legend(figure, axes[0], {})
    return titled(figure, title, caption)


def forgetting(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Left: KLoM of doing nothing, middle: stability, against lambda; right: one against the other."""
    room = {"wspace": 0.06}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", gridspec_kw=room)
    supports: dict[str, dict[str, Any]] = {
        "do nothing": {"label": "do nothing, same support", "color": _PALETTE[3], "marker": "o"},
        "do nothing, own support": {"label": "do nothing, own support", "color": _PALETTE[1], "marker": "s"},
        "floor": {"label": "floor, same support", "color": "black", "marker": "_"},
    }
    kinds = {kind: REPLACED[kind] for kind in ("task", "adaptation", "meta")}
    for axis, looks in ((left, supports), (middle, kinds)):
        for name, look in looks.items():
            bars = _bars(table, name, f"{name} low", f"{name} high")
            axis.errorbar(table["lam"], table[name], bars, capsize=2, **look)
        _logarithmic(axis, table["lam"], "regularisation λ")
    for kind, shifts in {"task": ((-8, -14), (-40, 2)), "meta": ((-8, -14), (10, 2))}.items():
        bars, look = _bars(table, kind, f"{kind} low", f"{kind} high"), kinds[kind]
        right.errorbar(table[kind], table["do nothing"], xerr=bars, capsize=2, **look)
        for (_, row), shift in zip(table.iloc[[0, -1]].iterrows(), shifts, strict=True):
            place = {"xytext": shift, "textcoords": "offset points", "fontsize": 8, "color": look["color"]}
            right.annotate(f"λ = {row['lam']:g}", (row[kind], row["do nothing"]), **place)
    left.set(yscale="linear", ylim=(0, 1.3 * table["do nothing high"].max()), ylabel="forget KLoM, p95")
    middle.set_ylabel(_CHANGE)
    right.set(xscale="log", xlabel="measured stability (left: more stable)", ylabel="forget KLoM of doing nothing, p95")
    right.set_ylim(0, 1.4 * table["do nothing"].max())
    left.legend(fontsize=8, loc="upper left")
    for axis, corner in ((middle, "best"), (right, "upper left")):
        axis.legend(fontsize=8, loc=corner, title="what is replaced", title_fontsize=8)
    return titled(figure, title, caption)
