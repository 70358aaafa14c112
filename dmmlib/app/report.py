"""A run as one self-contained page, and two runs side by side; from what lies on disk, nothing computed anew.

A run's directory holds tidy tables (.csv), the record that `dmm run` leaves (run.json: settings, versions, hash of the
data), and its figures lie under figures/<run>, or beside the tables.
"""

from __future__ import annotations

import base64
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jinja2
import numpy as np
import pandas as pd

from dmmlib import presets
from dmmlib.analysis import claims, tables
from dmmlib.analysis.plots import label
from dmmlib.errors import PresetError, StoreError
from dmmlib.files import read_json, replacing, write_json

if TYPE_CHECKING:
    from dmmlib.study import Study

ROOT = Path(__file__).parents[2]
RECORD = "run.json"
PACKAGES = ("dmmlib", "torch", "numpy", "scipy", "scikit-learn", "pandas", "zarr")
KEY = ["forget_set", "method", "split", "statistic"]


# --- runs on disk ----------------------------------------------------------------------------------------


def record(study: Study, directory: Path) -> Path:
    """Write down what a run is made of: settings, hash of the data, versions, device."""
    path = directory / RECORD
    content = {
        "preset": study.preset.model_dump(mode="json"),
        "data": {
            "name": study.data.name,
            "sha256": study.data.sha256,
            "n_train": study.data.n_train,
            "n_val": study.data.n_val,
            "n_classes": study.data.n_classes,
        },
        "n_parameters": sum(p.numel() for p in study.module().parameters()),
        "device": study.device.type,
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}},
    }
    write_json(path, content)
    return path


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Attributes:
        name: the preset's, with what was overridden.
        tables: file name without .csv -> table.
        record: what `record` wrote, or {} where a run has none.
        figures: PNG files, in the order of the notebooks.
    """

    name: str
    directory: Path
    tables: Mapping[str, pd.DataFrame]
    record: Mapping[str, Any] = field(default_factory=dict)
    figures: Sequence[Path] = ()

    @property
    def results(self) -> pd.DataFrame:
        """The main table; raises PresetError where the run has none."""
        if "results" not in self.tables:
            raise PresetError(f"Run {self.name!r} has no results.csv in {self.directory}; `dmm run` it, stage 04.")
        return self.tables["results"]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value, of the preset as it was run, or {} if that was not recorded."""
        return dict(_flat(self.record.get("preset", {})))


def open_run(name: str | Path, runs: Path | None = None) -> Run:
    """A run by the name of its directory under runs/, or by the path of a directory.

    Raises:
        PresetError: if there is no such run.
        StoreError: if one of its files cannot be read.
    """
    root = runs or Path(os.environ.get("DMM_RUNS") or ROOT / "runs")
    directory = root / str(name) if (root / str(name)).is_dir() else Path(name).expanduser()
    if not directory.is_dir() or not any(directory.glob("*.csv")):
        have = sorted(p.parent.name for p in root.glob("*/results.csv"))
        there = f"there are {', '.join(have)}" if have else "there are none yet"
        raise PresetError(f"No run {str(name)!r} with tables under {root} ({there}); use `dmm run {name}` first.")
    path = directory / RECORD
    figures = Path(os.environ.get("DMM_FIGURES") or ROOT / "figures") / directory.name
    return Run(
        directory.name,
        directory,
        {p.stem: _read_table(p) for p in sorted(directory.glob("*.csv"))},
        read_json(path) if path.exists() else {},
        sorted((figures if figures.is_dir() else directory).glob("*.png")),
    )


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as a table ({error}); run its stage again.") from error


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings; named parts of a list go by their names."""
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
            value = {v["name"]: {k: x for k, x in v.items() if k != "name"} for v in value}
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- comparison ------------------------------------------------------------------------------------------


def compare(a: Run, b: Run) -> pd.DataFrame:
    """What both runs measured, side by side: a row a forget set, method, split and statistic.

    The interval of a difference takes the runs as independent: its half-width is the root of the sum of squares of
    theirs. Runs that share models (a setting changed that training does not depend on) differ by less than it says.

    Returns:
        Columns forget_set, method, split, statistic, a, b, difference (b - a), low, high, clear: whether the interval
        leaves out 0.

    Raises:
        PresetError: if they have no row in common.
    """
    left, right = (run.results.set_index(KEY) for run in (a, b))
    common = left.index.intersection(right.index, sort=False)
    if common.empty:
        raise PresetError(
            f"Runs {a.name!r} and {b.name!r} share no forget set, method and statistic; compare runs of the same sets."
        )
    left, right = left.loc[common], right.loc[common]
    widths = [run["high"] - run["value"] for run in (left, right)]  # not value - low, which may be cut off at 0
    half = np.hypot(widths[0], widths[1])
    difference = right["value"] - left["value"]
    table = pd.DataFrame(
        {
            "a": left["value"],
            "b": right["value"],
            "difference": difference,
            "low": difference - half,
            "high": difference + half,
        }
    )
    table["clear"] = (table["low"] > 0) | (table["high"] < 0)
    return table.reset_index()


def differing(a: Run, b: Run) -> pd.DataFrame:
    """Settings, versions and data that differ, or {} where a run recorded none: columns what, a, b."""
    parts = []
    for run in (a, b):
        rest = {"data.sha256": run.record.get("data", {}).get("sha256"), "device": run.record.get("device")}
        versions = {f"version of {k}": v for k, v in run.record.get("versions", {}).items()}
        parts.append({k: v for k, v in (run.settings | rest | versions).items() if v is not None and k != "name"})
    keys = [k for k in dict.fromkeys([*parts[0], *parts[1]]) if parts[0].get(k) != parts[1].get(k)]
    rows = [(k, *(_plain(part.get(k, "—")) for part in parts)) for k in keys]
    return pd.DataFrame(rows, columns=["what", "a", "b"])


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def comparison_text(a: Run, b: Run, statistic: str = "klom_p95") -> str:
    """The comparison for a terminal: what differs, then a statistic's differences, clear ones marked."""
    table, settings = compare(a, b), differing(a, b)
    lines = [f"a: {a.name}    b: {b.name}", ""]
    for run in (a, b):
        if not run.record:
            lines += [f"{run.name} recorded no settings (no {RECORD}); only its numbers can be compared.", ""]
    if len(settings):
        lines += [settings.to_string(index=False), ""]
    here = table[table["statistic"] == statistic]
    if here.empty:
        known = ", ".join(table["statistic"].unique())
        raise PresetError(f"Unknown statistic {statistic!r}; these runs share {known}.")
    shown = pd.DataFrame(
        {
            "forget set": here["forget_set"],
            "method": here["method"].map(label),
            "split": here["split"],
            "a": here["a"].map("{:.2f}".format),
            "b": here["b"].map("{:.2f}".format),
            "b - a": [
                f"{d:+.2f} [{lo:+.2f}, {hi:+.2f}]" for d, lo, hi in here[["difference", "low", "high"]].to_numpy()
            ],
            "": np.where(here["clear"], "*", ""),
        }
    )
    lines += [f"{statistic}, b - a with 95 % interval over models; * leaves out 0", shown.to_string(index=False), ""]
    counts = here.groupby("split", sort=False)["clear"].agg(["sum", "size"])
    lines.append("clear differences: " + ", ".join(f"{s} {n} of {m}" for s, (n, m) in counts.iterrows()))
    return "\n".join(lines)


# --- pages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Text, and the number to sort by if it has one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of a page; `open` shows it unfolded."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    open: bool = False


def _table(title: str, frame: pd.DataFrame, caption: str = "", open: bool = False) -> Table:
    rows = [[_cell(v) for v in row] for row in frame.itertuples(index=False, name=None)]
    return Table(title, [str(c) for c in frame.columns], rows, caption, open)


def _cell(value: Any) -> Cell:
    if isinstance(value, (bool, np.bool_)):
        return Cell("yes" if value else "", float(value))
    if isinstance(value, (int, np.integer)):
        return Cell(f"{value:,}", float(value))
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if np.isnan(number):
            return Cell("")
        return Cell(f"{number:.2f}" if 0.1 <= abs(number) < 1000 else f"{number:.3g}", number)
    text = str(value)
    leading = re.match(r"[+-]?\d+(\.\d+)?(?=$| \[)", text)
    return Cell(text, float(leading[0]) if leading else None)


def html(run: Run) -> str:
    """The page of a run."""
    results = run.tables.get("results")
    shown: list[Table] = []
    n_models = 0 if results is None else int(results["n_models"].max())
    if results is not None:
        n_sets = results["forget_set"].nunique()
        over = f"{n_sets} forget set{'s' * (n_sets > 1)}, N = {n_models} models of each kind"
        medians = tables.medians(results).reset_index()
        shown.append(_table("Medians over forget sets", medians, f"{over}. Cost is in retrainings.", open=True))
        names = {"klom_p95": "KLoM p95", "klom_mean": "KLoM mean", "accuracy_gap": "Accuracy gap", "u_lira": "U-LiRA"}
        for statistic, title in names.items():
            if (results["statistic"] == statistic).any():
                frame = tables.main_table(results, statistic).reset_index()
                shown.append(_table(title, frame, f"{over}; 95 % intervals."))
    others = [n for n in run.tables if n not in ("results", "trajectories")]
    shown += [_table(f"{name}.csv", run.tables[name]) for name in others]
    judged = claims.judge(run.tables)
    return _page(
        "report.html",
        title=run.name,
        summary=_summary(run),
        claims=judged,
        counts=[(v, n) for v in get_args(claims.Verdict) if (n := sum(c.verdict == v for c in judged))],
        few=n_models if 0 < n_models < 50 else 0,
        tables=shown,
        figures=[_figure(path) for path in run.figures],
        settings=[(k, _plain(v)) for k, v in run.settings.items()],
        record=run.record,
    )


def comparison_html(a: Run, b: Run) -> str:
    """The page of a comparison."""
    table = compare(a, b)
    table["method"] = table["method"].map(label)
    shown = []
    for statistic, here in table.groupby("statistic", sort=False):
        frame = here.drop(columns="statistic")
        caption = "b − a, with the interval of two independent runs; clear: it leaves out 0."
        shown.append(_table(str(statistic), frame, caption, open=statistic == "klom_p95"))
    judged = list(zip(claims.judge(a.tables), claims.judge(b.tables), strict=True))
    differences = _table("What differs", differing(a, b), open=True)
    return _page(
        "compare.html", title=f"{a.name} and {b.name}", a=a, b=b, differences=differences, tables=shown, judged=judged
    )


def write(page: str, path: Path) -> Path:
    """Write a page atomically."""
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _page(template: str, **content: Any) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(content)


def _summary(run: Run) -> list[tuple[str, str]]:
    """What was run, as (name, value)."""
    settings, data = run.settings, run.record.get("data", {})
    rows = []
    if data:
        rows.append(("data", f"{data['name']}, {data['n_train']:,} training and {data['n_val']:,} validation points"))
    if settings:
        rows.append(("model", f"{settings['model.name']}, {run.record['n_parameters']:,} parameters"))
        rows.append(("subset models M", f"{settings['datamodels.n_subsets']:,}"))
    if "results" in run.tables:
        results = run.tables["results"]
        rows.append(("models of each kind N", f"{int(results['n_models'].max()):,}"))
        rows.append(("forget sets", str(results["forget_set"].nunique())))
        rows.append(("methods", str(results["method"].nunique())))
    return rows


def _figure(path: Path) -> dict[str, str]:
    stage, _, name = path.stem.partition("_")
    source = base64.b64encode(path.read_bytes()).decode()
    return {"stage": stage, "name": name.replace("_", " "), "source": f"data:image/png;base64,{source}"}


def preset_name(preset: str, overrides: Mapping[str, Any]) -> str:
    """The run of a preset, from a file or with numbers replaced, as `presets.load` names it."""
    return presets.load(preset, overrides).name if overrides or preset.endswith((".yaml", ".yml")) else preset
