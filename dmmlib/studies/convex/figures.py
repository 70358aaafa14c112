"""Figures of the convex study. Titles are the caller's, who knows the finding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dmmlib.analysis.looks import PALETTE, colour, legend, titled
from dmmlib.studies.convex import iterations
from dmmlib.studies.convex.compare import BOUND
from dmmlib.studies.convex.iterations import Descent, checkpoints, distance
from dmmlib.studies.convex.logistic import Trace
from dmmlib.studies.convex.stochastic import Stochastic
from dmmlib.studies.convex.synthetic import Synthetic

Points = Mapping[str, np.ndarray | None]  # where distances are measured: parameters (None), or inputs (k, d)
_CIVIDIS = colormaps["cividis"]
_DISTANCE = "distance to the oracle\n(original = 1)"
STYLE: dict[str, dict[str, Any]] = {  # a family's colour is that of `looks.METHODS`; dashes tell its members apart
    "GD on R": {"color": colour("gd")},
    "SGD on R": {"color": colour("gd"), "ls": "--"},
    "GD on R, linearised": {"color": "black", "ls": ":", "lw": 1},
    "GA on F": {"color": colour("ga")},
    "GA + GD": {"color": colour("ga_gd")},
    "OM on S": {"color": colour("oracle_matching")},
    "OM on S, SGD": {"color": colour("oracle_matching"), "ls": "--"},
    "OM on F": {"color": PALETTE[5]},
    "OM on probes": {"color": PALETTE[2]},
    "DMM, first order": {"color": colour("dmm"), "ls": "--"},
    "DMM, regression": {"color": colour("dmm"), "ls": ":"},
    "Newton (CG)": {"color": "black", "lw": 1},
    "Newton steps": {"color": "black", "lw": 1, "marker": "*", "ms": 9},
}


def _panels(rows: int, columns: int, width: float = 3.6, height: float = 2.9) -> tuple[Figure, np.ndarray]:
    """A grid of axes; not pyplot's, so that sliders may draw one after another."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)


def _finished(figure: Figure, axes: np.ndarray, x: str, y: str, title: str, caption: str) -> Figure:
    """Add grids, labels of the outer axes, title, caption and a legend beside all panels."""
    for ax in axes.flat:
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.minorticks_off()  # on logarithmic axes they take most of the time to draw
    for ax in axes[-1]:
        ax.set_xlabel(x)
    for ax in axes[:, 0]:
        ax.set_ylabel(ax.get_ylabel() or y)
    if axes[0, 0].get_legend_handles_labels()[0]:
        legend(figure, *axes.flat)
    return titled(figure, title, caption, formulas=True)


def _step_axis(ax: Axes, steps: np.ndarray) -> None:
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks([0, *10 ** np.arange(0, math.floor(math.log10(steps[-1])) + 1, 2)])
    ax.set(xlim=(0, steps[-1]), yscale="log")


def _run_and_theory(ax: Axes, case: Synthetic, method: Descent, steps: np.ndarray, eigen: bool, **look: Any) -> None:
    """Distance to the oracle, or each eigen-direction's share of it, as run (solid) and predicted (dotted)."""
    for follow, own in ((iterations.iterate, look), (iterations.closed_form, {"ls": ":", "color": "black", "lw": 0.8})):
        path = follow(method, case.problem.theta, steps)
        size = np.abs(path - case.oracle)[:, ::-1, 0] / np.linalg.norm(case.delta)
        ax.plot(steps, size if eigen else distance(path, case.oracle), **own)
    _step_axis(ax, steps)
    ax.set_title(method.name)


def _distances(axes: Sequence[Axes], points: Points, oracle: np.ndarray, traces: Mapping[str, Trace]) -> None:
    """Distance to the oracle against cost, a panel for each of the points."""
    for ax, (kind, x) in zip(axes, points.items(), strict=True):
        for name, trace in traces.items():
            ax.plot(trace.cost, distance(trace.path, oracle, x), label=name, **STYLE[name])
        ax.set_xscale("log", nonpositive="mask")
        ax.set(yscale="log", ylim=(1e-4, 30), title=kind)


def points(case: Synthetic) -> Points:
    return {"parameters": None, "predictions on F": case.x_forget, "predictions on new points": case.x_val}


def group_effects(curves: Mapping[str, pd.DataFrame], title: str, caption: str) -> Figure:
    """Draw a panel for each of `compare.group_errors`; what is exact (leave-one-out of one point) is off the axis."""
    figure, axes = _panels(2, math.ceil(len(curves) / 2))
    for ax, (name, errors) in zip(axes.flat, curves.items(), strict=False):
        for marker, label in zip("osD", errors.columns.drop(BOUND, errors="ignore"), strict=False):
            ax.loglog(errors[label], marker=marker, ms=4, label=label)
        if BOUND in errors:
            ax.loglog(errors[BOUND], "--", color="0.4", label=BOUND)
        ax.set(ylim=(1e-3, 2), title=name)
    return _finished(figure, axes, "|F|, points forgotten", "relative error", title, caption)


def directions(case: Synthetic, methods: Iterable[Descent], log2_steps: int, title: str, caption: str) -> Figure:
    """Draw a panel for each method: |delta| in each eigen-direction of A_R against steps, run and predicted."""
    figure, axes = _panels(2, 3)
    norm = LogNorm(case.curvature[-1], case.curvature[0])
    for ax, method in zip(axes.flat, methods, strict=True):
        ax.set_prop_cycle(color=_CIVIDIS(norm(case.curvature[::-1])))
        _run_and_theory(ax, case, method, checkpoints(log2_steps, 3), eigen=True, lw=2)
        ax.set_ylim(1e-6, 30)
    figure.colorbar(ScalarMappable(norm, _CIVIDIS), ax=axes, label="eigenvalue of $A_R$ in the direction", shrink=0.8)
    return _finished(figure, axes, "steps", r"$|\delta|$ in a direction", title, caption)


def distances(
    cases: Mapping[str, tuple[Synthetic, Sequence[Descent]]], log2_steps: int, title: str, caption: str
) -> Figure:
    """Draw the distance to the oracle, a row for each case: parameters, predictions on F and on validation points."""
    figure, axes = _panels(len(cases), 3)
    steps = checkpoints(log2_steps, 3)
    for row, (name, (case, methods)) in zip(axes, cases.items(), strict=True):
        traces = {m.name: Trace(steps * m.cost, iterations.iterate(m, case.problem.theta, steps)) for m in methods}
        _distances(row, points(case), case.oracle, traces)
        for ax in row:
            ax.axhline(0.01, color="0.6", lw=0.8)
        newton = case.retain.n * (1 + iterations.conjugate_gradients(case))
        row[0].plot(newton, 0.01, "*", ms=12, color="black", label="Newton (CG), to 1 %")
        row[0].set_ylabel(f"$\\bf{{{name.replace(' ', '~')}}}$\n{_DISTANCE}")
    return _finished(figure, axes, "sample gradients", "", title, caption)


def stochastic(methods: Mapping[str, Stochastic], log2_steps: int, n_chains: int, title: str, caption: str) -> Figure:
    """Draw root mean square distance of stochastic methods: runs (points), exact expectation (lines)."""
    figure, axes = _panels(1, 1, 7.5, 3.6)
    ax, steps = axes[0, 0], checkpoints(log2_steps)
    for marker, (name, method) in zip("osD^v", methods.items(), strict=False):
        runs = method.simulate(steps, n_chains, np.random.default_rng(0))
        measured = np.sqrt(np.mean(np.sum(runs**2, 2), 1))
        tint = STYLE[method.name]["color"]
        ax.plot(steps[1:], measured[1:] / measured[0], marker, ms=5, color=tint, label=name)
        ax.plot(steps[1:], method.expected(log2_steps)[1:], color=tint)
    ax.plot([], [], color="0.4", label=f"exact expectation (markers: mean of {n_chains} runs)")
    ax.set(xscale="log", yscale="log", ylim=(3e-3, 30))
    y = "root mean square distance\nto the oracle (original = 1)"
    return _finished(figure, axes, "sample gradients, one per step", y, title, caption)


def costs(tables: Mapping[str, dict[float, dict[str, float]]], title: str, caption: str) -> Figure:
    """Draw sample gradients to 1 % against the condition number, a panel for each case; on top what never arrives."""
    figure, axes = _panels(1, len(tables), 5.0, 3.9)
    frames = {name: pd.DataFrame(table).T for name, table in tables.items()}
    top = 30 * max(frame.to_numpy()[frame < np.inf].max() for frame in frames.values())
    for ax, (name, frame) in zip(axes[0], frames.items(), strict=True):
        for marker, (method, cost) in zip("osD^v<>pX", frame.items(), strict=False):
            style = {**STYLE[str(method)], "marker": marker, "ms": 5}
            ax.plot(cost[cost < np.inf], label=method, **style)
            ax.plot(cost[cost == np.inf].clip(upper=top), **{**style, "ls": "", "mfc": "none"})
        ax.axhline(top, color="0.6", lw=0.8, ls=":")
        ax.text(min(frame.index), top * 2.5, "never", fontsize=8, color="0.4")
        ax.set(xscale="log", yscale="log", ylim=(None, top * 30), title=name)
    y = "sample gradients to 1 %\nof the first distance"
    return _finished(figure, axes, "condition number of $A_R$", y, title, caption)


def tilts(cases: Mapping[float, Synthetic], log2_steps: int, title: str, caption: str) -> Figure:
    """Draw matching on F, matching on S and descent on R as F's points leave the weak eigen-directions."""
    figure, axes = _panels(1, 3, 3.7, 3.4)
    for i, (tilt, case) in enumerate(cases.items()):
        look, methods = {"color": _CIVIDIS(i / len(cases)), "label": f"tilt {tilt:g}"}, iterations.descents(case)
        for ax, name in zip(axes[0], ("OM on F", "OM on S", "GD on R"), strict=True):
            _run_and_theory(ax, case, methods[name], checkpoints(log2_steps, 3), eigen=False, lw=2, **look)
            ax.set_ylim(1e-4, 3)
        short = iterations.unreachable(case.x_forget, case.delta)
        axes[0, 0].axhline(short, color=look["color"], ls="--", lw=1)
    return _finished(figure, axes, "steps", _DISTANCE, title, caption)


def trade_off(points: Mapping[str, Sequence[tuple[float, float, float]]], title: str, caption: str) -> Figure:
    """Draw speed-up of matching and error of first-order influence against leverage h, with their bounds."""
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, squeeze=False)
    (speed, loss), remaining = axes[0], np.logspace(-5, 0, 200)
    speed.plot(remaining, 1 / remaining, "--", color="0.4", label="bound 1 / (1 - h)")
    loss.plot(remaining, 1 - remaining, "--", color="0.4", label="bound h")
    for tint, marker, (name, rows) in zip(PALETTE, "os", points.items(), strict=False):
        h, speed_up, error = np.array(rows).T
        speed.plot(1 - h, speed_up, marker, color=tint, label=name)
        loss.plot(1 - h, error, marker, color=tint, label=name)
    speed.set(xscale="log", xlim=(2, 1e-5), yscale="log", ylabel="speed-up of OM on S over GD on R")
    loss.set(xscale="log", xlim=(2, 1e-5), ylim=(-0.02, 1.25), ylabel="error of first-order influence")
    return _finished(figure, axes, "1 - h, where h is F's largest leverage", "", title, caption)


def logistic(traces: Mapping[str, Trace], oracle: np.ndarray, points: Points, title: str, caption: str) -> Figure:
    """Draw distance to the oracle against sample gradients: of parameters (None), or of logits at some points."""
    figure, axes = _panels(1, len(points), 3.8, 3.6)
    _distances(axes[0], points, oracle, traces)
    axes[0, 0].set_ylim(1e-3, 30)
    return _finished(figure, axes, "sample gradients", _DISTANCE, title, caption)


def explored(case: Synthetic, traces: Mapping[str, Trace], title: str, caption: str) -> Figure:
    """Draw distance to the oracle against steps: parameters, predictions on F and on new points."""
    figure, axes = _panels(1, 3, 3.5, 3.0)
    _distances(axes[0], points(case), case.oracle, traces)
    for ax in axes[0]:
        _step_axis(ax, next(iter(traces.values())).cost)
    return _finished(figure, axes, "steps", _DISTANCE, title, caption)
