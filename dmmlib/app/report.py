"""A run as one self-contained page, and two runs side by side; from what lies on disk, nothing computed anew.

A run's directory holds tidy tables (.csv) and the record that `dmm run` leaves (run.json: settings, versions, hash of
the data); its figures lie under figures/<run>, or beside the tables.
"""

from __future__ import annotations

import base64
import io
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import jinja2
import numpy as np
import pandas as pd

from dmmlib.analysis import claims, tables, verdict
from dmmlib.analysis.looks import STATISTICS, label
from dmmlib.errors import PresetError
from dmmlib.files import figures_of, load_json, place, read_json, read_table, write_bytes, write_json

if TYPE_CHECKING:
    from dmmlib.study import Study

RECORD, IMAGES = "run.json", "forget_set.webp"
MOST_ROWS, WIDEST = 150, 1100  # of a table that is shown; of a figure, in pixels
N_IMAGES = 50  # of a set of one's own that are shown
PACKAGES = ("dmmlib", "torch", "numpy", "scipy", "scikit-learn", "pandas", "zarr")
KEY = ["forget_set", "method", "split", "statistic"]
COLUMNS = [*KEY, "value", "low", "high", "n_models"]  # of results.csv
SHOWN_OTHERWISE = ("results", "trajectories", "confirm")


def record(study: Study, directory: Path) -> Path:
    """Write down what a run is made of, as a stage is executed: settings, hash of the data, versions, device."""
    content = {
        "preset": study.preset.model_dump(mode="json"),
        "data": {name: getattr(study.data, name) for name in ("name", "sha256", "n_train", "n_val", "n_classes")},
        "n_parameters": sum(p.numel() for p in study.module().parameters()),
        "device": study.device.type,
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}},
    }
    if study.own is not None:
        content["forget_set"] = {"name": study.own.name, "size": len(study.own), "images": _seen(study)}
        if study.data.x_train.dtype == np.uint8:
            write_bytes(directory / IMAGES, _mosaic(study.data.x_train[study.own.indices[:N_IMAGES]]))
    write_json(directory / RECORD, content)
    return directory / RECORD


def _seen(study: Study) -> str:
    """What the images of a set of one's own are, in words."""
    assert study.own is not None
    counts = np.bincount(study.data.y_train[study.own.indices], minlength=study.data.n_classes)
    kinds = [f"{counts[c]} {study.data.class_names[c]}" for c in np.argsort(-counts, kind="stable") if counts[c]]
    first = f"; the first {N_IMAGES} are shown" if len(study.own) > N_IMAGES else ""
    return f"{', '.join(kinds)}{first}"


def _mosaic(images: np.ndarray) -> bytes:
    """Images (n, height, width, channels) side by side, enlarged to about 64 pixels: a WebP."""
    from PIL import Image

    columns, (n, height, width, channels) = min(10, len(images)), images.shape
    page = np.full((math.ceil(n / columns), columns, height + 2, width + 2, 3), 255, np.uint8)
    for k, image in enumerate(images):
        page[k // columns, k % columns, 1:-1, 1:-1] = image if channels == 3 else image.mean(-1, keepdims=True)
    flat = page.transpose(0, 2, 1, 3, 4).reshape(len(page) * (height + 2), -1, 3)
    scale, buffer = max(1, round(64 / height)), io.BytesIO()
    Image.fromarray(flat.repeat(scale, 0).repeat(scale, 1)).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    name: str  # the preset's, with what was overridden
    directory: Path
    tables: Mapping[str, pd.DataFrame]  # file name without .csv -> table
    record: Mapping[str, Any]  # what `record` wrote, or {} where a run has none
    figures: Sequence[Path]  # PNG files, in the order of the notebooks

    @property
    def results(self) -> pd.DataFrame:
        """The main table; raises PresetError where the run has none, or another."""
        if "results" not in self.tables:
            raise PresetError(f"Run {self.name!r} has no results.csv in {self.directory}; `dmm run` it, stage 04.")
        if lacking := [name for name in COLUMNS if name not in self.tables["results"]]:
            where = self.directory / "results.csv"
            raise PresetError(f"{where} has no column {lacking[0]!r}; give the folder of a run.")
        return self.tables["results"]

    @property
    def settings(self) -> dict[str, str]:
        """Dotted key -> value as text, of the preset as it was run, or {} if that was not recorded."""
        return dict(_flat(self.record.get("preset", {})))


def open_run(name: str | Path, runs: Path | None = None) -> Run:
    """Open a run by the name of its directory under runs/, or by the path of a directory.

    Raises PresetError if there is no such run, StoreError if one of its files cannot be read.
    """
    root = runs or place("runs")
    directory = root / str(name) if (root / str(name)).is_dir() else Path(name).expanduser()
    if not any(directory.glob("*.csv")):
        have = sorted(str(p.parent.relative_to(root)) for p in root.rglob("results.csv"))
        there = f"there are {', '.join(have)}" if have else "there are none yet"
        raise PresetError(f"No run {str(name)!r} with tables under {root} ({there}); use `dmm run {name}` first.")
    path, whole, root = directory / RECORD, directory.absolute(), root.absolute()
    figures = figures_of(runs) / whole.relative_to(root) if whole.is_relative_to(root) else directory
    return Run(
        directory.name,
        directory,
        {p.stem: read_table(p) for p in sorted(directory.glob("*.csv"))},
        read_json(path) if path.exists() else {},
        sorted((figures if figures.is_dir() else directory).glob("*.png")),
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of nested mappings, and values as text; named parts of a list go by their names."""
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
            value = {v["name"]: {k: x for k, x in v.items() if k != "name"} for v in value}
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def compare(a: Run, b: Run) -> pd.DataFrame:
    """Set side by side what both runs measured; raises PresetError if they have no row in common.

    The interval of a difference takes the runs as independent: its half-width is the root of the sum of squares of
    theirs; of mean gaps also of what their unit, a standard deviation of N oracles, may be off, at most. Runs that
    share models (a setting changed that training does not depend on) differ by less than it says.

    Returns:
        Columns forget_set, method, split, statistic, a, b, difference (b - a), low, high, clear: whether the interval
        leaves out 0.
    """
    both = a.results.merge(b.results, on=KEY, suffixes=("_a", "_b"))
    if both.empty:
        raise PresetError(
            f"Runs {a.name!r} and {b.name!r} share no forget set, method and statistic; compare runs of the same sets."
        )
    # not value - low, which may be cut off at 0
    half = np.hypot(both["high_a"] - both["value_a"], both["high_b"] - both["value_b"])
    for side, run in (("a", a), ("b", b)):
        n = run.record.get("preset", {}).get("ensembles", {}).get("n_models", np.inf)
        unit = 1.96 / np.sqrt(2 * (n - 1)) * both[f"value_{side}"]
        half = np.where(both["statistic"] == "mean_gap", np.hypot(half, unit), half)
    table = both[KEY].assign(a=both["value_a"], b=both["value_b"], difference=both["value_b"] - both["value_a"])
    table["low"], table["high"] = table["difference"] - half, table["difference"] + half
    table["clear"] = (table["low"] > 0) | (table["high"] < 0)
    return table


def _points(run: Run, forget_set: str) -> list[Any]:
    """A forget set's points, and what data they are of, where the run keeps it."""
    paths = (folder / "forget_sets" / f"{forget_set}.json" for folder in (run.directory, run.directory.parent))
    return [[load_json(path)[key] for key in ("indices", "data_sha256")] for path in paths if path.exists()][:1]


def differing(a: Run, b: Run) -> pd.DataFrame:
    """List settings, versions and data that differ, where both runs recorded them: columns what, a, b."""
    recorded = {}
    for name, run in (("a", a), ("b", b)):
        rest = {"data.sha256": run.record.get("data", {}).get("sha256"), "device": run.record.get("device")}
        versions = {f"version of {k}": v for k, v in run.record.get("versions", {}).items()}
        recorded[name] = run.settings | rest | versions
    table = pd.DataFrame(recorded, dtype=object).drop("name", errors="ignore").fillna("—")
    return table[table["a"] != table["b"]].rename_axis("what").reset_index()


def comparison_text(a: Run, b: Run, statistic: str = "klom_p95") -> str:
    """Write the comparison for a terminal: what differs, then a statistic's differences, clear ones marked."""
    table, settings = compare(a, b), differing(a, b)
    here = table[table["statistic"] == statistic]
    if here.empty:
        known = ", ".join(table["statistic"].unique())
        raise PresetError(f"Unknown statistic {statistic!r}; these runs share {known}.")
    lines = [f"a: {a.name}    b: {b.name}", ""]
    for run in (a, b):
        if not run.record:
            lines += [f"{run.name} recorded no settings (no {RECORD}); only its numbers can be compared.", ""]
    if len(settings):
        lines += [settings.to_string(index=False), ""]
    shown = here[["forget_set", "method", "split"]].rename(columns={"forget_set": "forget set"})
    shown["method"] = shown["method"].map(label)
    shown[["a", "b"]] = here[["a", "b"]].map("{:.2f}".format)
    differences = here[["difference", "low", "high"]].itertuples(index=False)
    shown["b - a"] = [f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" for value, low, high in differences]
    shown[""] = np.where(here["clear"], "*", "")
    lines += [f"{statistic}, b - a with 95 % interval over models; * leaves out 0", shown.to_string(index=False), ""]
    if others := [name for name in here["forget_set"].unique() if _points(a, name) != _points(b, name)]:
        lines += [f"not the same points in both: {', '.join(others)}", ""]
    counts = here.groupby("split", sort=False)["clear"].agg(["sum", "size"])
    lines.append("clear differences: " + ", ".join(f"{s} {n} of {m}" for s, (n, m) in counts.iterrows()))
    return "\n".join(lines)


class Table(NamedTuple):
    """A table of a page; `open` shows it unfolded."""

    title: str
    frame: pd.DataFrame
    caption: str = ""
    open: bool = False


def html(run: Run) -> str:
    """Write the page of a run; of one's own forget set it says whether it was forgotten, not what a paper claims."""
    results = run.results if "results" in run.tables else None
    data, settings = run.record.get("data"), run.settings
    if results is not None and "seed" in results:  # of several runs, as `make confirm` makes them
        results = results.assign(forget_set=results["forget_set"] + ", seed " + results["seed"].astype(str))
    summary, shown, n_models = {}, list[Table](), 0
    if data:
        summary["data"] = f"{data['name']}, {data['n_train']:,} training and {data['n_val']:,} validation points"
    if settings:
        summary["model"] = f"{settings['model.name']}, {run.record['n_parameters']:,} parameters"
        few, many = (int(settings[f"{section}.n_subsets"]) for section in ("attribution", "datamodels"))
        summary["subset models"] = f"{few:,}; of ridge datamodels {many:,}"
    if results is not None:
        n_models, n_sets = int(results["n_models"].max()), results["forget_set"].nunique()
        summary |= {"models of each kind N": f"{n_models:,}", "forget sets": str(n_sets)}
        summary["methods"] = str(results["method"].nunique())
        over = f"{n_sets} forget set{'s' * (n_sets > 1)}, N = {n_models} models of each kind"
        medians = tables.medians(results).reset_index()
        shown.append(Table("Medians over forget sets", medians, f"{over}. Cost is in retrainings.", open=True))
        for statistic, title in STATISTICS.items():
            if (results["statistic"] == statistic).any():
                frame = tables.main_table(results, statistic).reset_index()
                shown.append(Table(title, frame, f"{over}; 95 % intervals."))
    if "confirm" in run.tables:
        rule = "Written down before the run, with the rules that judge them; intervals are at the level of all claims."
        shown.insert(
            0, Table("Claims, judged on seeds that nothing was chosen on", run.tables["confirm"], rule, open=True)
        )
    for name, table in run.tables.items():
        if name not in SHOWN_OTHERWISE:
            caption = f"The first {MOST_ROWS} of {len(table):,} rows; the file holds all." * (len(table) > MOST_ROWS)
            shown.append(Table(f"{name}.csv", table[:MOST_ROWS], caption))
    own, images = run.record.get("forget_set"), run.directory / IMAGES
    judged = [] if own or "confirm" in run.tables else claims.judge(run.tables)
    sets = [] if results is None else [s for s in results["forget_set"].unique() if not own or s == own["name"]]
    try:
        answers = [] if results is None else [verdict.judge(results, s) for s in sets]
    except KeyError:  # a run of which not all is there
        answers = []
    return _page(
        "report.html",
        title=own["name"] if own else run.name,
        own=own,
        images=_embedded(images.read_bytes(), "webp") if own and images.is_file() else "",
        answers=answers,
        answered=[(a, n) for a in get_args(verdict.Answer) if (n := sum(v.answer == a for v in answers))],
        rule=verdict.RULE,
        method=label(answers[0].method) if answers else "",
        summary=summary,
        claims=judged,
        counts=[(v, n) for v in get_args(claims.Verdict) if (n := sum(c.verdict == v for c in judged))],
        few=n_models if n_models < 50 else 0,
        tables=shown,
        figures=[_figure(path) for path in run.figures],
        settings=settings,
        record=run.record,
    )


def comparison_html(a: Run, b: Run) -> str:
    """Write the page of a comparison."""
    table = compare(a, b)
    table["method"] = table["method"].map(label)
    caption = "b − a, with the interval of two independent runs; clear: it leaves out 0."
    shown = [
        Table(str(statistic), here.drop(columns="statistic"), caption, open=statistic == "klom_p95")
        for statistic, here in table.groupby("statistic", sort=False)
    ]
    return _page(
        "compare.html",
        title=f"{a.name} and {b.name}",
        a=a,
        b=b,
        differences=Table("What differs", differing(a, b), open=True),
        tables=shown,
        judged=list(zip(claims.judge(a.tables), claims.judge(b.tables), strict=True)),
    )


def write(page: str, path: Path) -> Path:
    """Write a page atomically."""
    write_bytes(path, page.encode())
    return path


def _page(template: str, **content: Any) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    environment.tests["numeric"] = lambda text: re.match(r"-?(inf|\d[\d.,]*(e[+-]\d+)?)( \[|$)", text) is not None
    return environment.get_template(template).render(content)


def _cell(value: Any) -> str:
    """A number with three digits or so, or a text, as a table shows it."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else ""
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        shown = f"{value:.2f}" if 0.1 <= abs(float(value)) < 1000 else f"{value:.3g}"
        return "" if np.isnan(value) else shown
    return str(value)


def _figure(path: Path) -> dict[str, str]:
    """A figure as WebP, a third of the PNG; its text is what the figure says of itself."""
    from PIL import Image

    stage, _, name = path.stem.partition("_")
    buffer = io.BytesIO()
    with Image.open(path) as image:
        words = str(getattr(image, "text", {}).get("Description", ""))
        drawn = image.convert("RGB")
        drawn.thumbnail((WIDEST, WIDEST))
        drawn.save(buffer, "WEBP", quality=50, method=4)
    name = name.replace("_", " ")
    return {"stage": stage, "name": name, "alt": words or name, "source": _embedded(buffer.getvalue(), "webp")}


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
