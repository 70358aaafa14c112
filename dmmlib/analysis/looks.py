"""What the study's figures share: how methods are written and drawn, panels, axes, legends, titles and captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmmlib import data

SPLITS = data.SPLITS
STATISTICS = {
    "mean_gap": "gap",
    "ks_share": "KS",
    "klom_p95": "KLoM",
    "ks_fdr": "KS, FDR",
    "klom_mean": "KLoM mean",
    "u_lira": "U-LiRA",
    "accuracy": "accuracy",
    "accuracy_gap": "accuracy gap",
}
AXES = {"mean_gap": "mean gap / oracle sd", "ks_share": "share of points told apart (KS)", "klom_p95": "KLoM, p95"}
HEADLINE = ("mean_gap", "ks_share", "klom_p95")
SHARP = (*HEADLINE, "u_lira")  # measures whose intervals may tell a method from retraining
STOPS = {"end": "at its end", "common": "best common moment", "own": "each point's own moment"}
PALETTE = sns.color_palette("colorblind", 10)
METHODS: dict[str, tuple[str, tuple[float, float, float], str]] = {  # label, colour, marker
    "do_nothing": ("do nothing", (0.35, 0.35, 0.35), "o"),
    "retrain": ("retrain (floor)", (0.0, 0.0, 0.0), "o"),
    "gd": ("GD on R", PALETTE[0], "s"),
    "ga": ("GA on F", PALETTE[1], "^"),
    "ga_gd": ("GA, then GD", PALETTE[4], "v"),
    "ga_gd_turns": ("GA and GD by turns", (0.78, 0.36, 0.62), "v"),
    "neggrad_plus": ("NegGrad+", (0.45, 0.05, 0.45), "X"),
    "scrub": ("SCRUB", PALETTE[5], "D"),
    "random_labels": ("random labels", (0.62, 0.58, 0.05), "<"),
    "salun": ("SalUn", (0.35, 0.22, 0.05), ">"),
    "bad_teacher": ("bad teacher", (0.45, 0.55, 0.68), "d"),
    "l1_sparse": ("L1-sparse", (0.42, 0.36, 0.78), "8"),
    "cf_k": ("CF-k", (0.10, 0.28, 0.12), "p"),
    "eu_k": ("EU-k", (0.48, 0.68, 0.25), "h"),
    "msg": ("MSG", (0.32, 0.56, 0.12), "h"),
    "ct": ("CT", (0.20, 0.45, 0.30), "h"),
    "short_retrain": ("short retraining", (0.72, 0.50, 0.10), "D"),
    "rewind": ("rewind (R2D)", (0.05, 0.50, 0.55), "s"),
    "ssd": ("SSD", (0.08, 0.16, 0.42), "H"),
    "newton": ("Newton step", (0.65, 0.05, 0.25), "o"),
    "oracle_matching": ("oracle matching", PALETTE[9], "P"),
    "oracle_matching_adam": ("oracle matching (Adam)", (0.05, 0.35, 0.50), "P"),
    "dmm_adam": ("DMM (Adam)", (0.45, 0.15, 0.05), "o"),
    "dm_direct": ("DM-direct", PALETTE[2], "*"),
    "dmm": ("DMM", PALETTE[3], "o"),
}


def label(method: str) -> str:
    """Return the name of a method as figures and tables write it."""
    base, _, attributor = method.partition("@")
    name = METHODS[base][0] if base in METHODS else base.replace("_", " ")
    return name + (f" ({attributor})" if attributor else "")


def colour(method: str) -> tuple[float, float, float]:
    """Return the colour of a method, the same in every figure; a user's own method gets one by its name."""
    base, _, attributor = method.partition("@")
    r, g, b = METHODS[base][1] if base in METHODS else PALETTE[sum(base.encode()) % len(PALETTE)]
    return (0.5 + 0.5 * r, 0.5 + 0.5 * g, 0.5 + 0.5 * b) if attributor else (r, g, b)


def marker(method: str) -> str:
    """Return the marker of a method; a dot for a user's own."""
    return METHODS[method][2] if method in METHODS else "o"


def prominent(scores: pd.Series, most: int = 7) -> list[str]:
    """Choose what a crowded figure draws in colour: references, matching, the best baseline, then the lowest scores."""
    key = [m for m in ("do_nothing", "retrain", "oracle_matching", "dm_direct", "dmm") if m in scores.index]
    rest = scores.drop(key).sort_values().index
    return list(dict.fromkeys([*key, *[m for m in rest if "@" not in m][:1], *rest]))[:most]


def style() -> None:
    """Set matplotlib's defaults for the study."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "normal"})
    plt.rcParams.update({"axes.titlesize": 11, "figure.titlesize": 13, "legend.frameon": False})


def grid(
    n: int, columns: int, size: tuple[float, float], x: str = "", y: str = "", **options: Any
) -> tuple[Figure, np.ndarray]:
    """Make n panels of a size in inches, in rows of at most `columns`, with a common y axis.

    Args:
        x, y: written below the last panel of each column, and left of each row.
        options: of `plt.subplots`.

    Returns:
        The figure and its axes (rows, columns).
    """
    columns = min(columns, n)
    n_rows = -(-n // columns)
    options = {"sharey": True, "layout": "constrained", "squeeze": False, **options}
    figsize = (size[0] * columns + 0.4, size[1] * n_rows + 0.4)
    figure, axes = plt.subplots(n_rows, columns, figsize=figsize, **options)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    for axis in axes.flat[n - columns : n]:
        axis.set_xlabel(x, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel(y, fontsize=10)
    return figure, axes


def bars(rows: pd.DataFrame | pd.Series, value: str = "value", low: str = "low", high: str = "high") -> np.ndarray:
    """Return how far intervals reach below and above their values (2, n_rows), as matplotlib's error bars take it.

    Ends that are named after their value ("change low", "change high") are found by it.
    """
    here = pd.DataFrame(rows).T if isinstance(rows, pd.Series) else rows
    low, high = (own if (own := f"{value} {end}") in here else end for end in (low, high))
    return np.stack([here[value] - here[low], here[high] - here[value]]).astype(float).clip(0)


def quartiles(table: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """Compute quartiles of the values of each group of a table's rows: columns low, value (the median) and high."""
    found = table.groupby(list(keys))["value"].quantile(np.array([0.25, 0.5, 0.75])).unstack()
    return found.set_axis(["low", "value", "high"], axis=1)


def log_axis(axis: Axes, which: str, ticks: tuple[float, ...], limits: tuple[float, float] | None = None) -> None:
    """Make an axis ("x" or "y") logarithmic, with the ticks that lie within the limits and no others."""
    shown = [tick for tick in ticks if limits is None or limits[0] <= tick <= limits[1]]
    axis.set(**{f"{which}scale": "log"})
    axis.set(**{f"{which}ticks": shown, f"{which}ticklabels": [f"{tick:g}" for tick in shown]})
    if limits:
        axis.set(**{f"{which}lim": limits})
    axis.minorticks_off()


def klom_axis(axis: Axes, which: str, *values: float) -> None:
    """Make an axis logarithmic, for KLoM over the range of the values."""
    log_axis(axis, which, (0.2, 0.5, 1, 2, 3, 5, 7, 10), (min(values) / 1.15, max(values) * 1.15))


def rows(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Name rows, the first on top, left of the first of some axes that share them, with faint lines across all."""
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(axis="x", color="0.93")


def legend(figure: Figure, *axes: Axes, **options: Any) -> None:
    """Put a legend of the axes at the figure's side, which is widened for it; each label is listed once."""
    listed = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.set_figwidth(figure.get_figwidth() + 2.1)
    figure.legend(listed.values(), listed, loc="outside right center", **{"fontsize": 10, **options})


def plain(text: str) -> str:
    """Escape what matplotlib takes for more than text: mathematics between dollars, and labels of no legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def titled(figure: Figure, title: str, caption: str, formulas: bool = False) -> Figure:
    """Put a title above and a caption below the axes, wrapped to the figure's width; both are its alternative text.

    Dollars mark formulas only where `formulas` says so.
    """
    figure.set_label(f"{title}. {caption}")
    width = figure.get_figwidth()
    title, caption = (title, caption) if formulas else (plain(title), plain(caption))
    figure.suptitle(textwrap.fill(title, int(9 * width)), x=0.01, ha="left", y=1.02, va="bottom", fontweight="bold")
    figure.text(0.01, -0.01, textwrap.fill(caption, int(15 * width)), ha="left", va="top", fontsize=9, color="0.35")
    return figure


def picture(point: np.ndarray) -> np.ndarray:
    """Show a point: an image (height, width, channels) as it is, of two channels or more than four their mean; features
    (d,) as a square of cells, padded with NaN."""
    if point.ndim == 1:
        side = int(np.ceil(np.sqrt(point.size)))
        return np.append(point, np.full(side**2 - point.size, np.nan)).reshape(side, side)
    if point.shape[-1] in (3, 4):
        return point
    return point.mean(-1)


def png(figure: Figure, dpi: int = 90) -> bytes:
    """Render a figure as the PNG that stands for a widget where none can be shown, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
