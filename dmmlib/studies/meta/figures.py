"""The figures of notebook 10; titles are the caller's, who knows the finding."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmmlib.analysis.looks import PALETTE, bars, log_axis, rows, titled
from dmmlib.studies.meta.experiments import SYMBOLS

REPLACED: dict[str, dict[str, Any]] = {
    "task": {"label": "a task", "color": PALETTE[0], "marker": "o"},
    "example": {"label": "one example of a task", "color": PALETTE[1], "marker": "s"},
    "adaptation": {"label": "one example of the new task", "color": PALETTE[2], "marker": "^"},
    "meta": {"label": "a task, and one example of the new one", "color": PALETTE[3], "marker": "D"},
}
_CHANGE = "largest change of loss"


def _logarithmic(axis: Axes, values: pd.Series, name: str) -> None:
    axis.set(yscale="log", xlabel=name)
    log_axis(axis, "x", tuple(np.unique(values)))
    axis.grid(axis="y", color="0.93")


def _measured(axis: Axes, part: pd.DataFrame, name: str, **look: Any) -> None:
    axis.errorbar(part["value"], part[name], bars(part, name), capsize=2, ms=5, **look)


def _panels(table: pd.DataFrame, by: str, width: float, ylabel: str, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure, and an axis of it for each part of the table, with the part's name and rows."""
    parts = table.groupby(by, sort=False)
    size = (width * parts.ngroups, 3.5)
    figure, axes = plt.subplots(1, parts.ngroups, figsize=size, layout="constrained", **shared)
    axes[0].set_ylabel(ylabel)
    return figure, [(axis, name, part) for axis, (name, part) in zip(axes, parts, strict=True)]


def _finished(figure: Figure, title: str, caption: str, more: Mapping[str, Any], heading: str = "") -> Figure:
    """Explain at the right what the first panel has, and more: label -> look of a line; then add the title."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], **{"color": "0.3", **look}) for look in more.values()]
    wrapped = [textwrap.fill(text, 22) for text in (*labels, *more)]
    figure.legend(handles, wrapped, loc="outside right center", fontsize=9, title=heading)
    return titled(figure, title, caption)


def sweeps(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw measured stability (marks) and its bounds (dashed), a panel for each quantity that varies."""
    figure, panels = _panels(table, "varies", 2.9, _CHANGE, sharey=True)
    for axis, name, here in panels:
        for kind, look in REPLACED.items():
            part = here[here["kind"] == kind]
            _measured(axis, part, "measured", **look)
            axis.plot(part["value"], part["bound"], color=look["color"], ls="--", lw=1.2)
        _logarithmic(axis, here["value"], SYMBOLS[name])
    return _finished(figure, title, caption, {"bounds": {"ls": "--"}}, "replaced")


def slopes(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw log-log slopes, measured with intervals (marks) and of the bound (bars), a panel for each replacement."""
    names = [v for v in SYMBOLS.values() if v in set(table["varies"])]
    cases = table.groupby(["tasks", "inner"], sort=False)
    size, bar = (12.5, 0.5 * len(names) + 1.8), {"color": "black", "marker": "|", "ls": "", "ms": 9, "mew": 1.4}
    figure, axes = plt.subplots(1, 3, figsize=size, sharey=True, sharex=True, layout="constrained")
    for axis, kind in zip(axes, ("task", "example", "adaptation"), strict=True):
        for k, ((tasks, inner), case) in enumerate(cases):
            part = case[case["replaced"] == kind]
            row = part["varies"].map(names.index) + 0.14 * (k - (cases.ngroups - 1) / 2)
            look = {"color": PALETTE[k], "fmt": "osD^v"[k], "ms": 4.5, "label": f"{tasks}, {inner}"}
            axis.errorbar(part["slope"], row, xerr=bars(part, "slope"), **look)
            axis.plot(part["bound's slope"], row, **bar)
        axis.axvline(0, color="0.8", lw=0.8, zorder=0)
        axis.set(title=f"replaced: {REPLACED[kind]['label']}", xlabel="log-log slope", xlim=(-3, 1.5))
    rows(axes, names)
    return _finished(figure, title, caption, {"slope of the bound": bar})


def gaps(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw transfer minus empirical risk (marks), stability (lines) and bound (dashed), a panel for each quantity."""
    figure, panels = _panels(table, "varies", 4.1, "loss", sharey=True)
    for axis, name, here in panels:
        for (tasks, part), tint, mark in zip(here.groupby("tasks", sort=False), PALETTE, "osD", strict=False):
            _measured(axis, part[part["low"] > 0], "gap", color=tint, fmt=mark, label=f"gap: {tasks}")
            axis.plot(part["value"], part["stability"], color=tint, lw=1.4)
            axis.plot(part["value"], part["bound"], color=tint, ls="--", lw=1.2)
        _logarithmic(axis, here["value"], SYMBOLS[name])
    return _finished(figure, title, caption, {"measured stability": {}, "its bound": {"ls": "--"}})


def forgetting(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw KLoM of doing nothing (left) and stability (middle) against lambda, and one against the other (right)."""
    room = {"wspace": 0.06}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", gridspec_kw=room)
    supports: dict[str, dict[str, Any]] = {
        "do nothing": {"label": "do nothing, same support", "color": PALETTE[4], "marker": "o"},
        "do nothing, own support": {"label": "do nothing, own support", "color": PALETTE[5], "marker": "s"},
        "floor": {"label": "floor, same support", "color": "black", "marker": "_"},
    }
    kinds = {kind: REPLACED[kind] for kind in ("task", "adaptation", "meta")}
    for axis, looks in ((left, supports), (middle, kinds)):
        for name, look in looks.items():
            axis.errorbar(table["lam"], table[name], bars(table, name), capsize=2, **look)
        _logarithmic(axis, table["lam"], "regularisation λ")
    for kind, shifts in {"task": ((-8, -14), (-40, 2)), "meta": ((-8, -14), (10, 2))}.items():
        reach, look = bars(table, kind), kinds[kind]
        right.errorbar(table[kind], table["do nothing"], xerr=reach, capsize=2, **look)
        for (_, row), shift in zip(table.iloc[[0, -1]].iterrows(), shifts, strict=True):
            place = {"xytext": shift, "textcoords": "offset points", "fontsize": 8, "color": look["color"]}
            right.annotate(f"λ = {row['lam']:g}", (row[kind], row["do nothing"]), **place)
    left.set(yscale="linear", ylim=(0, 1.3 * table["do nothing high"].max()), ylabel="forget KLoM, p95")
    middle.set_ylabel(_CHANGE)
    right.set(xscale="log", xlabel="measured stability (left: more stable)", ylabel="forget KLoM of doing nothing, p95")
    right.set_ylim(0, 1.4 * table["do nothing"].max())
    for axis, heading in ((left, ""), (middle, "what is replaced, here and at the right")):
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.2), title=heading)
    return titled(figure, title, caption)
