"""The figures of notebook 06; titles are the caller's, who knows the finding."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmmlib.analysis.looks import PALETTE, bars, legend, log_axis, titled
from dmmlib.studies.exact.evidence import BROKEN
from dmmlib.studies.exact.experiments import Exactness

_LOOKS = {
    "TV-stable, subsample": (PALETTE[9], "X"),
    "TV-stable, noisy": (PALETTE[0], "o"),
    "SISA": (PALETTE[2], "s"),
    "certified Newton": (PALETTE[1], "^"),
    "DMM": (PALETTE[3], "D"),
}
_WRONG = dict(zip(BROKEN, (PALETTE[3], PALETTE[1], PALETTE[4]), strict=True))
_SMALLEST = 1e-12  # p-values below are drawn here


def exactness(found: Exactness, title: str, caption: str, level: float) -> Figure:
    """Draw each way's distribution function minus retraining's, along one direction (left), and p-values (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1.1, 1))
    last = {name: found.runs[name][:, -1] for name in ("retrained", "deleted", *BROKEN)}
    direction = last["retrained"].mean(0) - last["no rejection"].mean(0)
    along = {name: np.sort(w @ direction / np.linalg.norm(direction)) for name, w in last.items()}
    reference = along.pop("retrained")
    grid, n = np.linspace(reference[0], reference[-1], 400), len(reference)
    for name, values in along.items():
        gap = (np.searchsorted(values, grid) - np.searchsorted(reference, grid)) / n
        left.plot(grid, gap, color=_WRONG.get(name, PALETTE[0]), lw=2.4 if name == "deleted" else 1.5, label=name)
    band = 1.358 * np.sqrt(2 / n)  # the 95 % point of Kolmogorov's distribution
    left.axhspan(-band, band, color="0.9", zorder=0, label="95 % band if equal")
    left.axhline(0, color="black", lw=0.8)
    left.margins(y=0.12)
    left.set(xlabel="last iterate, along one direction", ylabel="distribution function − retraining's")

    names = found.p_values.index[::-1]
    for row, name in enumerate(names):
        for test, mark, dy in (("KS, Holm", "o", 0.13), ("energy", "D", -0.13)):
            p = found.p_values.loc[name, test]
            shown = mark if p > _SMALLEST else "<"
            right.plot(max(p, _SMALLEST), row + dy, shown, color=_WRONG.get(name, PALETTE[0]), ms=6, clip_on=False)
    right.axvline(level / 2, color="black", lw=1, ls="--")
    right.set_title(f"one test left of {level / 2:g}, the line: the two together reject at {level:g}", fontsize=9)
    right.set(xscale="log", xlim=(_SMALLEST, 2), ylim=(-0.6, len(names) - 0.4))
    right.set_xlabel("p-value    ● Kolmogorov–Smirnov, Holm    ◆ energy distance    ◀ off scale", fontsize=10)
    right.set_yticks(range(len(names)), names)
    right.grid(axis="x", color="0.92")
    legend(figure, left)
    return titled(figure, title, caption)


def price(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw the measured probability of recomputation and its bounds, a panel for each thing that varies."""
    quantities = {"noise": "noise σ", "batch": "batch size m", "n": "training points n", "steps": "steps T"}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, (key, name) in zip(axes, quantities.items(), strict=True):
        here = table[table["varies"] == key]
        for (variant, part), tint, mark in zip(here.groupby("variant"), PALETTE, "oX", strict=False):
            look = {"color": tint, "ms": 6, "capsize": 2, "fmt": mark}
            axis.errorbar(part["value"], part["measured"], bars(part, "measured"), label=f"{variant}: measured", **look)
            axis.plot(part["value"], part["bound"], color=tint, lw=1.6, label=f"{variant}: bound")
            if variant == "noisy":
                axis.plot(part["value"], part["rho"], color=tint, lw=1.4, ls=":", label="noisy: TV bound ρ")
        axis.set(xlabel=name, ylim=(0, 1.04))
        log_axis(axis, "x", tuple(sorted(here["value"].unique())))
    axes[0].set_ylabel("probability of recomputation")
    legend(figure, axes[-1])
    return titled(figure, title, caption)


def risk(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw excess risk against noise, with theory (left), and against the cost of a deletion (right)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    look = {"color": PALETTE[0], "fmt": "o-", "capsize": 2}
    left.errorbar(table["noise"], table["excess"], table["half"], label="measured", **look)
    left.plot(table["noise"], table["theory"], color="0.4", ls="--", label="SGD's bound")
    left.set(xlabel="noise σ", ylabel="excess empirical risk")
    legend(figure, left)
    right.errorbar(table["cost"], table["excess"], table["half"], **look)
    place = {"xytext": (7, 4), "textcoords": "offset points", "fontsize": 8}
    for noise, cost, excess in table[["noise", "cost", "excess"]].to_numpy():
        right.annotate(f"σ = {noise:g}", (cost, excess), **place)
    right.set(xlabel="cost of deleting one random point / retraining", ylabel="excess empirical risk")
    for axis in (left, right):
        _plain_log(axis, "x", "y")
    return titled(figure, title, caption)


def trade_off(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Draw what is left of F (left) and accuracy (right) against the cost of unlearning F, and of one point."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.6), layout="constrained")
    kinds = {"none": "no guarantee", "exact": "exact"}
    for name, (tint, mark) in _LOOKS.items():
        part = table[table["method"] == name]
        kind = kinds.get(part["guarantee"].iloc[0], "(ε, δ)-certified")
        look = {"color": tint, "marker": mark, "lw": 1.2, "ms": 7}
        left.plot(part["cost"], part["forget"], label=f"{name}: {kind}", **look)
        left.vlines(part["cost"], part["forget"], part["do nothing"], color=tint, lw=0.8, alpha=0.6)
        left.plot(part["cost"], part["do nothing"], "_", color=tint, ms=8)
        right.plot(part["cost"], part["accuracy"], **look)
        right.plot(part["cost of one point"], part["accuracy"], mfc="white", ls=":", **(look | {"ms": 6}))
    left.axhspan(table["floor"].min(), table["floor"].max(), color="0.88", zorder=0, label="retrained twice (floor)")
    left.plot([], [], "_", color="0.3", ms=8, label="same models, do nothing")
    left.plot([], [], "o", color="0.3", mfc="white", label="right: one random point")
    left.set(ylabel="forget KLoM p95, to own retraining", xlim=(0, 1.05), xlabel="cost / retraining")
    log_axis(left, "y", (0.5, 1, 2, 5, 10))
    right.set(ylabel="validation accuracy, unlearned", xlabel="cost / retraining")
    _plain_log(right, "x")
    for axis in (left, right):
        axis.axvline(1, color="black", lw=0.8, zorder=0, label="retraining")
    legend(figure, left)
    return titled(figure, title, caption)


def _plain_log(axis: Axes, *which: str) -> None:
    """Logarithmic axes ("x", "y") with plain numbers at 1, 2 and 5."""
    for one in which:
        axis.set(**{f"{one}scale": "log"})
        ticks = getattr(axis, f"{one}axis")
        ticks.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(lambda v, _: f"{v:g}")
        ticks.set_minor_locator(plt.NullLocator())
