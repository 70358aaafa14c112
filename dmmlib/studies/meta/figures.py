"""The figures of notebook 10; titles are the caller's, who knows the finding."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmmlib.analysis.plots import titled
from dmmlib.studies.meta.experiments import SYMBOLS

_PALETTE = sns.color_palette("colorblind", 10)
LOOKS = {
    "task": ("a task", _PALETTE[0], "o"),
    "example": ("one example of a task", _PALETTE[1], "s"),
    "adaptation": ("one example of the new task", _PALETTE[2], "^"),
    "meta": ("a task, and one example of the new one", _PALETTE[3], "D"),
}
_TINTS = dict(zip(("logistic regression", "linear regression", "fashion-mnist, class pairs"), _PALETTE, strict=False))


def _log(axis: Axes, values: np.ndarray) -> None:
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(values, [f"{v:g}" for v in values])
    axis.minorticks_off()
    axis.grid(axis="y", color="0.93")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 22)


def _measured(axis: Axes, part: pd.DataFrame, x: str, y: str, **look: object) -> None:
    low, high = (np.clip(np.abs(part[y] - part[end]), 0, None) for end in ("low", "high"))
    axis.errorbar(part[x], part[y], [low, high], capsize=2, ms=5, **look)  # type: ignore[arg-type]


def sweeps(table: pd.DataFrame, title: str, caption: str, columns: int = 4) -> Figure:
    """A panel for each quantity that varies: measured stability (marks) and its bounds (dashed)."""
    names = list(dict.fromkeys(table["varies"]))
    n_rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=(2.9 * columns, 3.1 * n_rows + 0.4), sharey=True, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        here = table[table["varies"] == name]
        for kind, (text, tint, mark) in LOOKS.items():
            part = here[here["kind"] == kind]
            _measured(axis, part, "value", "measured", color=tint, marker=mark, label=text)
            axis.plot(part["value"], part["bound"], color=tint, ls="--", lw=1.2)
        _log(axis, np.unique(here["value"]))
        axis.set_xlabel(SYMBOLS[name])
    for axis in axes[:, 0]:
        axis.set_ylabel("largest change of loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="0.3", ls="--"))
    figure.legend(
        handles,
        [*(_wrapped(text) for text in labels), "bounds"],
        loc="outside right center",
        fontsize=9,
        title="replaced",
    )
    return titled(figure, title, caption)


def slopes(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Log-log slopes, measured with intervals (marks) and of the bound (bars), a panel a replacement."""
    kinds = ("task", "example", "adaptation")
    cases = list(dict.fromkeys(zip(table["tasks"], table["inner"], strict=True)))
    names = [v for v in SYMBOLS.values() if v in set(table["varies"])]
    figure, axes = plt.subplots(
        1, 3, figsize=(12.5, 0.5 * len(names) + 1.8), sharey=True, sharex=True, layout="constrained"
    )
    for axis, kind in zip(axes, kinds, strict=True):
        for k, (tasks, inner) in enumerate(cases):
            part = table[(table["tasks"] == tasks) & (table["inner"] == inner) & (table["replaced"] == kind)]
            row = np.array([names.index(v) for v in part["varies"]]) + 0.14 * (k - (len(cases) - 1) / 2)
            error = [part["slope"] - part["low"], part["high"] - part["slope"]]
            look = {"color": _PALETTE[k], "fmt": "osD^v"[k], "ms": 4.5}
            axis.errorbar(part["slope"], row, xerr=error, label=f"{tasks}, {inner}", **look)
            axis.plot(part["bound's slope"], row, "|", color="black", ms=9, mew=1.4)
        axis.axvline(0, color="0.8", lw=0.8, zorder=0)
        axis.set(title=f"replaced: {LOOKS[kind][0]}", xlabel="log-log slope", xlim=(-3, 1.5))
        axis.grid(axis="x", color="0.93")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="black", marker="|", ls="", ms=9, mew=1.4))
    figure.legend(
        handles, [*(_wrapped(text) for text in labels), "slope of the bound"], loc="outside right center", fontsize=9
    )
    return titled(figure, title, caption)


def gaps(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Transfer minus empirical risk (marks), measured stability (lines) and its bound (dashed), a panel a quantity."""
    names = list(dict.fromkeys(table["varies"]))
    figure, axes = plt.subplots(1, len(names), figsize=(4.1 * len(names), 3.5), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for (tasks, part), mark in zip(
            table[table["varies"] == name].groupby("tasks", sort=False), "osD", strict=False
        ):
            tint = _TINTS.get(str(tasks), _PALETTE[4])
            shown = part[part["low"] > 0]
            _measured(axis, shown, "value", "gap", color=tint, fmt=mark, label=str(tasks))
            axis.plot(part["value"], part["stability"], color=tint, lw=1.4)
            axis.plot(part["value"], part["bound"], color=tint, ls="--", lw=1.2)
        _log(axis, np.unique(table[table["varies"] == name]["value"]))
        axis.set_xlabel(SYMBOLS[name])
    axes[0].set_ylabel("loss")
    handles, labels = axes[0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], color="0.3", ls=ls) for ls in ("-", "--")]
    names_ = [*(_wrapped(f"gap: {label}") for label in labels), "measured stability", "its bound"]
    figure.legend(handles, names_, loc="outside right center", fontsize=9)
    return titled(figure, title, caption)


def robust(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Left: stability, gap and bound against the adversary's norm; right: robust transfer risk."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
    for (case, part), tint, mark in zip(table.groupby("case", sort=False), _PALETTE, "os", strict=False):
        shown = part[part["stability"] > 1e-6]
        left.plot(shown["eps"], shown["stability"], color=tint, marker=mark, label=f"{case}: stability")
        left.plot(part["eps"], part["bound"], color=tint, ls="--", lw=1.2, label=f"{case}: bound")
        risk = part["transfer"] / part["transfer"].iloc[0]
        right.plot(part["eps"], risk, color=tint, marker=mark, label=str(case))
    left.set(yscale="log", xlabel="adversary ε (data have norm 1)", ylabel="largest change of loss")
    right.set(xlabel="adversary ε", ylabel="robust transfer risk / that at ε = 0")
    right.legend(fontsize=9)
    left.legend(fontsize=8)
    return titled(figure, title, caption)


def broken(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """A panel a broken assumption: measured stability against the bound as if it held; where it fails in red."""
    quantities = {
        "step": "task-step ηλ (allowed: ≤ 1 / (1 + β/λ))",
        "Lipschitz": "size of adverse labels (assumed: ≤ 1)",
        "convexity": "examples n (λ below the modulus)",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.5), layout="constrained")
    for axis, (case, name) in zip(axes, quantities.items(), strict=True):
        part = table[table["case"] == case]
        fails = part["low"] > part["bound"]
        axis.plot(part["value"], part["bound"], color="0.25", ls="--", label="bound, if the assumption held")
        _measured(axis, part[~fails], "value", "measured", color=_PALETTE[0], fmt="o", label="measured, below it")
        _measured(axis, part[fails], "value", "measured", color=_PALETTE[3], fmt="X", label="measured, above it")
        values = np.unique(part["value"])
        _log(axis, values[np.r_[True, np.diff(np.log(values)) > 0.25]])
        axis.set(xlabel=name, title=f"{part['tasks'].iloc[0]}: {case}")
    axes[0].set_ylabel("largest change of loss")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, [_wrapped(text) for text in labels], loc="outside right center", fontsize=9)
    return titled(figure, title, caption)


def forgetting(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Left: KLoM of doing nothing, middle: stability, against lambda; right: one against the other."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.2), layout="constrained", gridspec_kw={"wspace": 0.06}
    )
    supports = {
        "do nothing": ("do nothing, same support", _PALETTE[3], "o"),
        "do nothing, own support": ("do nothing, own support", _PALETTE[1], "s"),
        "floor": ("floor, same support", "black", "_"),
    }
    kinds = ("task", "adaptation", "meta")

    def bars(name: str) -> list[pd.Series]:
        return [table[name] - table[f"{name} low"], table[f"{name} high"] - table[name]]

    for name, (text, tint, mark) in supports.items():
        left.errorbar(table["lam"], table[name], bars(name), color=tint, marker=mark, capsize=2, label=text)
    for kind in kinds:
        text, tint, mark = LOOKS[kind]
        middle.errorbar(table["lam"], table[kind], bars(kind), color=tint, marker=mark, capsize=2, label=text)
    for kind in ("task", "meta"):
        text, tint, mark = LOOKS[kind]
        right.errorbar(
            table[kind], table["do nothing"], xerr=bars(kind), color=tint, marker=mark, capsize=2, label=text
        )
        for row in (0, -1):
            lam, x, y = (float(table[key].iloc[row]) for key in ("lam", kind, "do nothing"))
            shift = (-8, -14) if row == 0 else (-40, 2) if kind == "task" else (10, 2)
            place = {"xytext": shift, "textcoords": "offset points", "fontsize": 8, "color": tint}
            right.annotate(f"λ = {lam:g}", (x, y), **place)
    for axis in (left, middle):
        _log(axis, table["lam"].to_numpy())
        axis.set_xlabel("regularisation λ")
    left.set(yscale="linear", ylim=(0, 1.3 * table["do nothing high"].max()), ylabel="forget KLoM, p95")
    middle.set_ylabel("largest change of loss")
    right.set(xscale="log", xlabel="measured stability (left: more stable)", ylabel="forget KLoM of doing nothing, p95")
    right.set_ylim(0, 1.4 * table["do nothing"].max())
    left.legend(fontsize=8, loc="upper left")
    middle.legend(fontsize=8, loc="best", title="what is replaced", title_fontsize=8)
    right.legend(fontsize=8, loc="upper left", title="what is replaced", title_fontsize=8)
    return titled(figure, title, caption)
