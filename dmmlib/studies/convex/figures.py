"""Figures of the convex study. Titles are the caller's, who knows the finding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dmmlib.analysis.plots import colour, titled
from dmmlib.studies.convex.compare import GroupErrors
from dmmlib.studies.convex.iterations import (
    Descent,
    checkpoints,
    closed_form,
    conjugate_gradients,
    distance,
    gd,
    iterate,
    matchers,
    unreachable,
)
from dmmlib.studies.convex.logistic import Trace
from dmmlib.studies.convex.stochastic import Moments, Stochastic, simulate
from dmmlib.studies.convex.synthetic import Synthetic

_PALETTE = seaborn.color_palette("colorblind")
STYLE: dict[str, dict[str, Any]] = {  # a family's colour is that of plots.COLOURS; dashes tell its members apart
    "GD on R": {"color": colour("gd")},
    "SGD on R": {"color": colour("gd"), "ls": "--"},
    "GD on R, linearised": {"color": "black", "ls": ":", "lw": 1},
    "GA on F": {"color": colour("ga")},
    "GA + GD": {"color": colour("ga_gd")},
    "OM on S": {"color": colour("oracle_matching")},
    "OM on S, SGD": {"color": colour("oracle_matching"), "ls": "--"},
    "OM on F": {"color": _PALETTE[5]},
    "OM on probes": {"color": _PALETTE[2]},
    "DMM, first order": {"color": colour("dmm"), "ls": "--"},
    "DMM, regression": {"color": colour("dmm"), "ls": ":"},
    "Newton (CG)": {"color": "black", "lw": 1},
    "Newton steps": {"color": "black", "lw": 1, "marker": "*", "ms": 9},
}


def _panels(
    rows: int, columns: int, size: tuple[float, float] = (3.6, 2.9), share: bool = True
) -> tuple[Figure, np.ndarray]:
    """A grid of axes; not pyplot's, so that sliders may draw one after another."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for ax in axes.flat:
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
    return figure, axes


def _finished(figure: Figure, title: str, caption: str, legend: Axes | None = None) -> Figure:
    """With title, caption, and the legend of one of the axes beside them all."""
    for ax in figure.axes:
        ax.minorticks_off()  # on logarithmic axes they take most of the time to draw
    if legend is not None:
        figure.legend(*legend.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    titled(figure, title, caption)
    return figure


def _step_axis(ax: Axes, steps: np.ndarray) -> None:
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks([0, *10 ** np.arange(0, math.floor(math.log10(steps[-1])) + 1, 2)])
    ax.set(xlim=(0, steps[-1]), yscale="log")


def group_effects(curves: Mapping[str, GroupErrors], title: str, caption: str) -> Figure:
    """A panel a problem: error against |F|. What is exact (leave-one-out of one point) is off the axis."""
    figure, axes = _panels(2, math.ceil(len(curves) / 2))
    for ax, (name, found) in zip(axes.flat, curves.items(), strict=False):
        for marker, (label, errors) in zip("osD", found.errors.items(), strict=False):
            ax.loglog(found.sizes, errors, marker=marker, ms=4, label=label)
        if found.bound is not None:
            ax.loglog(found.sizes, found.bound, "--", color="0.4", label="bound: largest leverage")
        ax.set(ylim=(1e-3, 2), title=f"{name} (n = {found.n:,})")
    for ax in axes[-1]:
        ax.set_xlabel("|F|, points forgotten")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error")
    for ax in (axes[0, 0], axes[-1, -1]):
        ax.legend(fontsize=8, loc="lower right")
    return _finished(figure, title, caption)


def directions(case: Synthetic, methods: Sequence[Descent], log2_steps: int, title: str, caption: str) -> Figure:
    """A panel a method: |delta| in each eigen-direction of A_R against steps, run and predicted."""
    figure, axes = _panels(2, math.ceil(len(methods) / 2))
    norm, colours = LogNorm(case.curvature[-1], case.curvature[0]), colormaps["cividis"]
    steps = checkpoints(log2_steps, 3)
    for ax, method in zip(axes.flat, methods, strict=True):
        run, theory = (
            np.abs(follow(method, case.problem.theta, steps) - case.oracle)[:, ::-1, 0] / np.linalg.norm(case.delta)
            for follow in (iterate, closed_form)
        )
        ax.set_prop_cycle(color=colours(norm(case.curvature[::-1])))
        ax.plot(steps, run, lw=2)
        ax.plot(steps, theory, ":", color="black", lw=0.8)
        _step_axis(ax, steps)
        ax.set(ylim=(1e-6, 30), title=method.name)
    for ax in axes[-1]:
        ax.set_xlabel("steps")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$|\delta|$ in a direction")
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="eigenvalue of $A_R$ in the direction", shrink=0.8)
    return _finished(figure, title, caption)


def distances(
    cases: Mapping[str, tuple[Synthetic, Sequence[Descent]]], log2_steps: int, title: str, caption: str
) -> Figure:
    """A row a case: distance to the oracle in parameters, predictions on F and on validation points."""
    figure, axes = _panels(len(cases), 3)
    steps = checkpoints(log2_steps, 3)
    for row, (name, (case, methods)) in zip(axes, cases.items(), strict=True):
        kinds = {"parameters": None, "predictions on F": case.x_forget, "predictions on new points": case.x_val}
        for method in methods:
            path = iterate(method, case.problem.theta, steps)
            for ax, x in zip(row, kinds.values(), strict=True):
                curve = distance(path, case.oracle, x)
                ax.plot(steps[1:] * method.cost, curve[1:], **STYLE[method.name], label=method.name)
        for ax, kind in zip(row, kinds, strict=True):
            ax.axhline(0.01, color="0.6", lw=0.8)
            ax.set(xscale="log", yscale="log", ylim=(1e-4, 30), title=kind)
        newton = case.retain.n * (1 + conjugate_gradients(case))
        row[0].plot(newton, 0.01, "*", ms=12, color="black", label="Newton (CG), to 1 %")
        row[0].set_ylabel(f"$\\bf{{{name.replace(' ', '~')}}}$\ndistance to the oracle\n(original = 1)")
    for ax in axes[-1]:
        ax.set_xlabel("sample gradients")
    return _finished(figure, title, caption, legend=axes[0, 0])


def stochastic(
    case: Synthetic, methods: Mapping[str, Stochastic], log2_steps: int, n_chains: int, title: str, caption: str
) -> Figure:
    """Root mean square distance of stochastic methods: runs (points), exact expectation (lines)."""
    figure, axes = _panels(1, 1, size=(7.5, 3.6))
    ax, steps = axes[0, 0], checkpoints(log2_steps)
    for marker, (name, method) in zip("osD^v", methods.items(), strict=False):
        runs = simulate(method, case.problem.theta[:, 0], steps, n_chains, np.random.default_rng(0))
        measured = np.sqrt(np.mean(np.sum((runs - case.oracle[:, 0]) ** 2, 2), 1))
        tint = STYLE[method.name]["color"]
        ax.plot(steps[1:], measured[1:] / measured[0], marker, ms=5, color=tint)
        ax.plot(steps[1:], Moments(method, case).expected(log2_steps)[1:], color=tint)
        ax.plot([], [], marker=marker, ms=5, color=tint, label=name)
    ax.plot([], [], "o", color="0.4", label=f"mean of {n_chains} runs")
    ax.plot([], [], color="0.4", label="exact expectation")
    ax.set(xscale="log", yscale="log", ylim=(3e-3, 30), xlabel="sample gradients, one a step")
    ax.set_ylabel("root mean square distance\nto the oracle (original = 1)")
    ax.legend(fontsize=9)
    return _finished(figure, title, caption)


def costs(tables: Mapping[str, Mapping[float, Mapping[str, float]]], title: str, caption: str) -> Figure:
    """A panel a case: sample gradients to 1 % against the condition number; what never arrives is on top."""
    figure, axes = _panels(1, len(tables), size=(5.0, 3.9))
    rows = [row for table in tables.values() for row in table.values()]
    top = 30 * max(cost for row in rows for cost in row.values() if math.isfinite(cost))
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        conditions = np.array(list(table))
        for marker, method in zip("osD^v<>pX", rows[0], strict=False):
            values = np.array([row[method] for row in table.values()])
            arrives = np.isfinite(values)
            style = {**STYLE[method], "marker": marker, "ms": 5}
            ax.plot(conditions[arrives], values[arrives], label=method, **style)
            ax.plot(conditions[~arrives], np.full((~arrives).sum(), top), **{**style, "ls": "", "mfc": "none"})
        ax.axhline(top, color="0.6", lw=0.8, ls=":")
        ax.text(conditions[0], top * 2.5, "never", fontsize=8, color="0.4")
        ax.set(xscale="log", yscale="log", xlabel="condition number of $A_R$", ylim=(None, top * 30), title=name)
    axes[0, 0].set_ylabel("sample gradients to 1 %\nof the first distance")
    return _finished(figure, title, caption, legend=axes[0, 0])


def tilts(cases: Mapping[float, Synthetic], log2_steps: int, title: str, caption: str) -> Figure:
    """Matching on F, matching on S and descent on R as F's points leave the weak eigen-directions."""
    figure, axes = _panels(1, 3, size=(3.7, 3.4))
    steps = checkpoints(log2_steps, 3)
    for i, (tilt, case) in enumerate(cases.items()):
        tint, theta = colormaps["cividis"](i / len(cases)), case.problem.theta
        for ax, method in zip(axes[0], [*matchers(case), gd(case)], strict=True):
            run, theory = (distance(follow(method, theta, steps), case.oracle) for follow in (iterate, closed_form))
            ax.plot(steps, run, color=tint, lw=2, label=f"{tilt:g}")
            ax.plot(steps, theory, ":", color="black", lw=0.8)
            ax.set_title(method.name)
        axes[0, 0].axhline(unreachable(case.x_forget, case.delta), color=tint, ls="--", lw=1)
    for ax in axes[0]:
        _step_axis(ax, steps)
        ax.set(ylim=(1e-4, 3), xlabel="steps")
    axes[0, 0].set_ylabel("distance to the oracle\n(original = 1)")
    axes[0, -1].legend(title="tilt of F", fontsize=8, title_fontsize=8, loc="lower left")
    return _finished(figure, title, caption)


def trade_off(points: Mapping[str, Sequence[tuple[float, float, float]]], title: str, caption: str) -> Figure:
    """Speed-up of matching and error of first-order influence against leverage, with their bounds."""
    figure, axes = _panels(1, 2, size=(4.8, 3.5), share=False)
    speed, loss = axes[0]
    remaining = np.logspace(-5, 0, 200)
    speed.plot(remaining, 1 / remaining, "--", color="0.4", label="bound 1 / (1 - h)")
    loss.plot(remaining, 1 - remaining, "--", color="0.4", label="bound h")
    for tint, marker, (name, rows) in zip(_PALETTE, "os", points.items(), strict=False):
        h, speed_up, error = np.array(rows).T
        speed.plot(1 - h, speed_up, marker, color=tint, label=name)
        loss.plot(1 - h, error, marker, color=tint, label=name)
    for ax in axes[0]:
        ax.set(xscale="log", xlabel="1 - h, where h is F's largest leverage")
        ax.set_xlim(2, remaining[0])  # harder sets to the right
    speed.legend(fontsize=9, loc="upper left")
    loss.legend(fontsize=9, loc="lower right")
    speed.set(yscale="log", ylabel="speed-up of OM on S over GD on R")
    loss.set(ylabel="error of first-order influence", ylim=(-0.02, 1.25))
    return _finished(figure, title, caption)


def logistic(
    traces: Mapping[str, Trace],
    truth: np.ndarray,
    points: Mapping[str, np.ndarray | None],
    title: str,
    caption: str,
) -> Figure:
    """A panel a kind of distance to the oracle `truth`: parameters (None), or logits at some points."""
    figure, axes = _panels(1, len(points), size=(3.8, 3.6))
    for ax, (kind, x) in zip(axes[0], points.items(), strict=True):
        for name, trace in traces.items():
            ax.plot(trace.cost[1:], distance(trace.path, truth, x)[1:], label=name, **STYLE[name])
        ax.set(xscale="log", yscale="log", ylim=(1e-3, 30), xlabel="sample gradients", title=kind)
    axes[0, 0].set_ylabel("distance to the oracle\n(original = 1)")
    return _finished(figure, title, caption, legend=axes[0, 0])


def explored(case: Synthetic, methods: Sequence[Descent], log2_steps: int, title: str, caption: str) -> Figure:
    """Distance to the oracle against steps, in closed form: parameters, predictions on F and on new points."""
    figure, axes = _panels(1, 3, size=(3.5, 3.0))
    steps = checkpoints(log2_steps, 4)
    kinds = {"parameters": None, "predictions on F": case.x_forget, "predictions on new points": case.x_val}
    paths = {method.name: closed_form(method, case.problem.theta, steps) for method in methods}
    for ax, (kind, x) in zip(axes[0], kinds.items(), strict=True):
        for name, path in paths.items():
            ax.plot(steps, distance(path, case.oracle, x), label=name, **STYLE[name])
        _step_axis(ax, steps)
        ax.set(ylim=(1e-4, 30), xlabel="steps", title=kind)
    axes[0, 0].set_ylabel("distance to the oracle\n(original = 1)")
    return _finished(figure, title, caption, legend=axes[0, 0])
