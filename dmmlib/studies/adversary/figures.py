"""The figures of notebook 08; titles are the caller's, who knows the finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmmlib.analysis.plots import label, titled
from dmmlib.metrics import FLOOR
from dmmlib.studies.adversary import service
from dmmlib.studies.adversary.crafting import Poison
from dmmlib.studies.adversary.experiments import ATTACKS
from dmmlib.studies.adversary.stable_region import Region

_PALETTE = sns.color_palette("colorblind", 10)
LOOKS = {
    "ddpa_clean": (_PALETTE[0], "o"),
    "ddpa_dirty": (_PALETTE[3], "s"),
    "surrogate_clean": (_PALETTE[9], "<"),
    "surrogate_dirty": (_PALETTE[6], ">"),
    "random": (_PALETTE[7], "v"),
    "camouflage": (_PALETTE[1], "D"),
    "honest_datamodel": (_PALETTE[2], "^"),
    "honest_gradient": (_PALETTE[4], "P"),
    "never_trained": (_PALETTE[5], "X"),
}
LABELS = {"tv_stable": "TV-stable (exact)"}


def regions(
    known: Region, radius: float, found: Mapping[str, Region], reach: float, title: str, caption: str
) -> Figure:
    """Left: gap against radius of a function whose convex radius is known; right: of trained models' loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
    left.plot(known.radii / radius, known.gaps, color=_PALETTE[0], marker="o", label="largest gap found")
    left.axvline(1, color="black", lw=1, ls=":", label="convex up to here")
    left.set(xlabel="radius / the known convex radius", ylabel="Jensen gap / rise of the function")
    left.set_title("1 − exp(−‖z‖²/2)", fontsize=10)
    for i, (name, region) in enumerate(found.items()):
        right.plot(region.radii / reach, region.gaps, color=_PALETTE[i + 1], marker="so^D"[i % 4], label=name)
    right.axvline(1, color="black", lw=1, ls=":", label="reach of the poison")
    right.set(xlabel="radius / reach of the poison", ylabel="Jensen gap / rise of the loss", xscale="log")
    first = next(iter(found.values()))
    right.set_xticks(first.radii / reach, [f"{r:g}" for r in first.radii / reach])
    right.minorticks_off()
    right.set_title("training loss of the service's models", fontsize=10)
    for axis, tolerance in ((left, known.tolerance), (right, first.tolerance)):
        axis.axhline(tolerance, color="0.5", lw=1, ls="--", label="tolerance")
        axis.legend(fontsize=8)
        axis.grid(color="0.93")
    return titled(figure, title, caption)


def covered(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Share of the ball that the regular simplex covers, in closed form and by sampling."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    axis.plot(table["k"], table["theory"], color="black", lw=1.2, label="closed form")
    shown = table[table["sampled"] > 0]
    axis.errorbar(
        shown["k"],
        shown["sampled"],
        shown["error"],
        color=_PALETTE[3],
        fmt="o",
        capsize=3,
        label="sampled, 95 % interval",
    )
    axis.set(yscale="log", xlabel="dimension k of the subspace", ylabel="simplex / ball, volume", xticks=table["k"])
    axis.grid(color="0.93")
    axis.legend(fontsize=9)
    return titled(figure, title, caption)


def poison(poisons: Mapping[str, Poison], names: Sequence[str], title: str, caption: str, n: int = 10) -> Figure:
    """The first points of each poison, below the images that they were made from; labels in the panels' titles."""
    figure, axes = plt.subplots(2 * len(poisons), n, figsize=(1.05 * n, 2.5 * len(poisons) + 0.5), layout="constrained")
    for row, (attack, p) in enumerate(poisons.items()):
        for j in range(n):
            for k, images in enumerate((p.bases, p.images)):
                axis = axes[2 * row + k, j]
                axis.imshow(images[j, ..., 0] if images.shape[-1] == 1 else images[j], cmap="gray", vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
            axes[2 * row + 1, j].set_xlabel(names[int(p.labels[j])], fontsize=7)
        axes[2 * row, 0].set_ylabel("own image", fontsize=8)
        axes[2 * row + 1, 0].set_ylabel(f"poison:\n{ATTACKS[attack].split(', ')[1]}", fontsize=8)
    return titled(figure, title, caption)


def success(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Retraining after each attack's requests: left the share of errors on targets, right the change of margins."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
    part = table[table["method"] == "retrain"].reset_index(drop=True)
    for i, row in part.iterrows():
        tint, mark = LOOKS[row["attack"]]
        for axis, name in ((left, "success"), (right, "change")):
            error = [[row[name] - row[f"{name} low"]], [row[f"{name} high"] - row[name]]]
            axis.errorbar(row[name], i, xerr=error, color=tint, marker=mark, capsize=3, ms=7)
        left.plot(row["before"], i, "|", color="black", ms=12, label="before the request" if i == 0 else None)
    left.set_yticks(
        range(len(part)), [f"{ATTACKS[a]} ({n:.0f})" for a, n in zip(part["attack"], part["size"], strict=True)]
    )
    left.invert_yaxis()
    left.set(xlabel="share of models that err on the target", xlim=(-0.02, 1.0))
    right.set(xlabel="change of the target's margin")
    right.axvline(0, color="0.7", lw=0.8)
    for axis in (left, right):
        axis.grid(axis="x", color="0.93")
    left.legend(fontsize=9)
    return titled(figure, title, caption)


def _grid(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column as attacks x methods, in the order of their rows, retraining and doing nothing first."""
    order = [m for m in ("retrain", "do_nothing") if m in set(table["method"])]
    order += [m for m in dict.fromkeys(table["method"]) if m not in order]
    values = table.pivot(index="attack", columns="method", values=column)
    values = values.loc[list(dict.fromkeys(table["attack"])), order]
    return values.rename(index=ATTACKS | {"album": "honest, images alike"}, columns=lambda m: LABELS.get(m, label(m)))


def _lines(axis: Axes) -> None:
    """What all heat maps of attacks x methods share: a line beside retraining, slanted names."""
    axis.axvline(1, color="white", lw=4)
    axis.set(xlabel="", ylabel="")
    plt.setp(axis.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")


def methods(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Success of each attack against each method: a heat map with the numbers, retraining first."""
    values = _grid(table, "success")
    figure, axis = plt.subplots(figsize=(10.5, 0.5 * len(values) + 1.9), layout="constrained")
    sns.heatmap(
        100 * values, annot=True, fmt=".0f", cmap="cividis", vmin=0, vmax=100, ax=axis, linewidths=0.5,
        cbar_kws={"label": "models that err on the target, %"},
    )  # fmt: skip
    _lines(axis)
    return titled(figure, title, caption)


SPLITS = {"forget": "deleted points", "retain": "points that stay", "validation": "validation points"}


def klom(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """KLoM of each attack's requests after each method, with half intervals: a heat map a split."""
    parts = dict(tuple(table.groupby("split", sort=False)))
    n = table["attack"].nunique()
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(10.5, 0.36 * n * len(parts) + 2.2), sharex=True, layout="constrained"
    )
    for axis, (split, part) in zip(axes, parts.items(), strict=True):
        values, error = _grid(part, "value"), _grid(part, "error")
        text = values.map("{:.1f}".format) + error.map(" ±{:.1f}".format)
        sns.heatmap(
            values, annot=text, fmt="", annot_kws={"fontsize": 8}, cmap="cividis", ax=axis, linewidths=0.5,
            vmin=table["value"].min(), vmax=-np.log(FLOOR), cbar_kws={"label": "KLoM, p95"},
        )  # fmt: skip
        _lines(axis)
        axis.set_title(SPLITS[str(split)], fontsize=10)
    return titled(figure, title, caption)


EXACT = {
    "retrain": (_PALETTE[0], "o", "retrained"),
    "tv_stable": (_PALETTE[1], "D", "TV-stable deletion"),
    "do_nothing": ("0.45", "v", "nothing done"),
}


def exact(results: pd.DataFrame, table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Served exactly, retrained and not served, an attack a row: change of the target's margin, KLoM's p95 by split.

    Args:
        results: `serving.summary` of `convex.study`.
        table: `convex.klom`.
        title, caption: of the figure.
    """
    changes = results.rename(columns={"change": "value", "change low": "low", "change high": "high"})
    panels = {"change of the target's margin": changes[changes["method"] != "do_nothing"]}
    panels |= {f"KLoM, p95: {name}": table[table["split"] == split] for split, name in SPLITS.items()}
    names = list(dict.fromkeys(results["attack"]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(12.5, 0.38 * len(names) + 1.8), sharey=True, layout="constrained"
    )
    for axis, (quantity, part) in zip(axes, panels.items(), strict=True):
        for i, (method, (tint, mark, told)) in enumerate(EXACT.items()):
            its = part[part["method"] == method]
            place = [names.index(a) + 0.2 * (i - 1) for a in its["attack"]]
            error = [its["value"] - its["low"], its["high"] - its["value"]]
            axis.errorbar(its["value"], place, xerr=error, fmt=mark, color=tint, ms=5, capsize=2, label=told)
        axis.set_xlabel(quantity)
        axis.grid(axis="x", color="0.93")
    axes[0].set_yticks(range(len(names)), [ATTACKS[a] for a in names])
    axes[0].invert_yaxis()
    axes[0].axvline(0, color="0.7", lw=0.8)
    for axis in axes[2:]:
        axis.sharex(axes[1])
    axes[-1].legend(fontsize=8)
    return titled(figure, title, caption)


QUANTITIES = {
    "share": "attacker's share of S",
    "bound": "bound on pixels, of 255",
    "k": "dimension k",
    "points deleted": "points deleted",
}


def sweep(table: pd.DataFrame, title: str, caption: str) -> Figure:
    """Top: success after retraining, bottom: change of margin, a column a quantity, a line an attack."""
    figure, axes = plt.subplots(
        2, len(QUANTITIES), figsize=(12.5, 5.6), sharey="row", sharex="col", layout="constrained"
    )
    for column, (varies, name) in enumerate(QUANTITIES.items()):
        shown = table[table["varies"] == varies]
        values = sorted(shown["value"].unique())
        for i, (attack, part) in enumerate(shown.groupby("attack", sort=False)):
            tint, mark = LOOKS[str(attack)]
            place = np.searchsorted(values, part["value"]) + 0.08 * (i - 0.5)
            for axis, key in zip(axes[:, column], ("success", "change"), strict=True):
                error = [part[key] - part[f"{key} low"], part[f"{key} high"] - part[key]]
                axis.errorbar(place, part[key], error, color=tint, marker=mark, capsize=2, label=ATTACKS[str(attack)])
                axis.set_xticks(range(len(values)), [f"{v:g}" for v in values])
                axis.grid(axis="y", color="0.93")
        axes[1, column].axhline(0, color="0.6", lw=0.8)
        axes[1, column].set_xlabel(name)
    axes[0, 0].set_ylabel("models that err\non the target")
    axes[0, 0].set_ylim(0, max(0.2, 1.1 * table["success high"].max()))
    axes[1, 0].set_ylabel("change of the\ntarget's margin")
    axes[0, -1].legend(fontsize=8)
    return titled(figure, title, caption)


def roc(scores: pd.DataFrame, found: pd.DataFrame, title: str, caption: str) -> Figure:
    """Detections against false alarms of the score, a panel a kind of honest request, a curve an attack.

    Args:
        scores: a row a request (`defence.scores`).
        found: areas (`defence.detection`).
        title, caption: of the figure.
    """
    areas = found.set_index(["attack", "against"])
    kinds = list(found["against"].unique())
    figure, axes = plt.subplots(1, len(kinds), figsize=(6.2 * len(kinds), 5.0), sharey=True, layout="constrained")
    for axis, kind in zip(np.atleast_1d(axes), kinds, strict=True):
        for (place, attack), part in scores[scores["malicious"]].groupby(["site", "request"], sort=False):
            honest = scores[(scores["site"] == place) & (scores["request"] == kind)]["score"].to_numpy()
            false, true = service.roc(honest, part["score"].to_numpy())
            a = areas.loc[(str(attack), kind)]
            name = f"{ATTACKS[str(attack)]}: {a['score']:.2f} [{a['score low']:.2f}, {a['score high']:.2f}]"
            line = "--" if str(attack).startswith("surrogate") else "-"
            axis.step(false, true, line, where="post", color=LOOKS[str(attack)][0], label=name)
        axis.plot([0, 1], [0, 1], color="0.7", lw=0.8, ls=":")
        axis.set(xlabel="false alarms", xlim=(-0.01, 1), ylim=(0, 1.02))
        axis.set_title(f"against {kind}", fontsize=10)
        axis.legend(fontsize=7.5, title="area under the curve, 95 % interval", title_fontsize=8, loc="lower right")
    np.atleast_1d(axes)[0].set_ylabel("attacks detected")
    return titled(figure, title, caption)
