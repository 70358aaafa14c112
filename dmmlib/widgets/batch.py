"""From eye to batch: the panels that save a choice under a name, and try it on the smoke preset in the background."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd
import yaml

from dmmlib import data, forget_sets, presets
from dmmlib.analysis import tables, verdict
from dmmlib.analysis.looks import label
from dmmlib.errors import DmmError, ForgetSetError, StoreError
from dmmlib.files import OWN, folded, load_json, read_json, read_table, write_bytes
from dmmlib.forget_sets import ForgetSet
from dmmlib.models import MODELS
from dmmlib.progress import PROGRESS_FILE, duration
from dmmlib.study import Study
from dmmlib.widgets.selection import Selection
from dmmlib.widgets.views import Gallery, Message, labelled, row, text

PATIENCE = 5.0  # seconds that a cancelled run is given to end by itself


class Saving(w.VBox):
    """Saves the selection in the run's `forget_sets` directory; `saved` is the last file."""

    def __init__(
        self, study: Study, selection: Selection, message: Message, name: str, on_save: Callable[[], None]
    ) -> None:
        self._study, self._selection, self._on_save = study, selection, on_save
        self.saved: Path | None = None
        self.name = labelled(w.Text, "Name", value=name)
        self.button = message.button("Save", self.save, "Write this set to disk", icon="save", button_style="primary")
        self.overwrite = message.button("Overwrite", self._overwrite, "Replace the other set", button_style="danger")
        self.keep = message.button("Keep the other", self.ask_nothing, "Save nothing")
        self.confirm, self.command = row(self.overwrite, self.keep), w.HTML()
        super().__init__([row(self.name, self.button, self.confirm, message, kind="footer"), self.command])
        self.name.observe(lambda _: self.ask_nothing(), names="value")
        self.ask_nothing()

    def ask_nothing(self) -> None:
        """Take back the question whether to overwrite, and what was said of an earlier choice."""
        self.confirm.layout.display, self.command.value = "none", ""

    def save(self) -> Path:
        """Write the choice under its name and return the file; raises ForgetSetError where that cannot be."""
        self.ask_nothing()
        name, preset = self.name.value.strip(), self._study.preset
        if not re.fullmatch(r"[\w+-][\w+.-]{0,49}", name):  # it becomes a path
            raise ForgetSetError(f"{name!r:.60} is no name for a forget set; give up to 50 letters, digits, _ or -.")
        chosen = forget_sets.make(name, self._selection.indices, self._study.data, kind="chosen", preset=preset.name)
        if folded(name) in (folded(part.name) for part in (*preset.forget_sets, *preset.tuning.forget_sets)):
            raise ForgetSetError(f"{name!r} is a forget set of the preset itself; save yours under another name.")
        path = self._study.directory / "forget_sets" / f"{name}.json"
        if self._is_another(path, chosen):
            self._waiting, self.confirm.layout.display = (chosen, path), ""
            raise ForgetSetError(f"There is another forget set {name!r} already; overwrite it?")
        return self._write(chosen, path)

    def _is_another(self, path: Path, chosen: ForgetSet) -> bool:
        try:
            return not np.array_equal(forget_sets.load(path, self._study.data).indices, chosen.indices)
        except (DmmError, OSError, ValueError):  # damaged, or of other data: another set all the same
            return path.exists()

    def _overwrite(self) -> None:
        self.ask_nothing()
        self._write(*self._waiting)

    def _write(self, chosen: ForgetSet, path: Path) -> Path:
        chosen.save(path)
        self.saved = path
        there = f"<code>{html.escape(f'forget_set = {str(path.resolve())!r}')}</code>"
        if ours := _only_here(self._study.preset):
            known = html.escape(", ".join(f"{kind} {name!r}" for kind, name in ours.items()))
            how = f" by a Study in this process, which alone knows {known}, with {there}"
        else:
            how = f", from any folder, with <code>{html.escape(self._typed(path))}</code> (add <code>--beside</code> to"
            how += f" keep the preset’s own sets), or in notebooks 04 and 05 with {there}"
        said = f"Saved {len(chosen):,} images. Unlearn them{how}"
        self.command.value = f'<div class="dmm-saved" role="status">{said}</div>'
        self._on_save()
        return path

    def _typed(self, path: Path) -> str:
        """The command that unlearns a set, which works wherever it is pasted."""
        beside = Path(sys.executable).with_name("dmm")
        here = [str(beside)] if beside.exists() else [sys.executable, "-m", "dmmlib.app.cli"]
        words = ["dmm"] if shutil.which("dmm") else here
        runs = self._study.runs.resolve()
        words += ["run", self._preset(), "--stage", "04", "--forget-set", str(path.resolve())]
        return shlex.join(words if runs == OWN / "runs" else [*words, "--runs", str(runs)])

    def _preset(self) -> str:
        """How `dmm run` finds this study's preset: by name, or in a file that is written for it."""
        ours = self._study.preset
        where = {"device": ours.device, "threads": ours.threads}
        if ours.name in presets.names() and presets.load(ours.name, where) == ours:
            return ours.name
        path = self._study.directory / "preset.yaml"
        write_bytes(path, yaml.safe_dump({"preset": ours.model_dump(mode="json")}).encode())
        return str(path.resolve())


def _only_here(preset: presets.Preset) -> dict[str, str]:
    """Names of a preset's data and model that only this process knows: registered, but not by the library."""
    named: tuple[Any, ...] = ("data", data.DATASETS, preset.data.name), ("model", MODELS, preset.model.name)
    return {kind: name for kind, registry, name in named if name in registry and not registry.ours(name)}


class Trial(w.VBox):
    """Unlearns a saved choice with the smoke preset on this study's data, in a process that ends with the kernel."""

    def __init__(self, study: Study, message: Message, save: Callable[[], Path], on_end: Callable[[], None]) -> None:
        self._study, self._save, self._on_end = study, save, on_end
        ours, smoke = (preset.data.model_dump(mode="json") for preset in (study.preset, presets.load("smoke")))
        self._overrides = {f"data.{key}": value for key, value in ours.items() if value != smoke[key]}
        self._watch = message.guarded(self._follow)
        self.button = message.button("Try on smoke preset", self.run, "Save; unlearn with small models", icon="play")
        self.cancel = message.button("Cancel", self.end, "End the run; what is trained is kept", icon="stop")
        self.bar, self.line, self.outcome = w.FloatProgress(max=1), w.HTML(), w.HTML()
        self.images = Gallery(study.data.x, self._caption, rows=1, selectable=False, label="To be forgotten")
        self.price, self.progress = w.HTML(self._price()), row(self.bar, self.line, self.cancel)
        super().__init__([row(self.button, self.price, self.progress, message), self.outcome, self.images])
        self.progress.layout.display = self.images.layout.display = "none"

    def _caption(self, point: int) -> tuple[str, str]:
        return self._study.data.class_names[self._study.data.y[point]], f"#{point}"

    def _price(self) -> str:
        """What a run takes, in HTML: models, and time where one ran here before, or else sample gradients."""
        if name := _only_here(self._study.preset).get("data"):
            return text("quiet", f"Not with data {name!r}, which only this process knows; load them from an .npz file")
        smoke = presets.load("smoke", self._overrides)
        n, part, runs = smoke.ensembles.n_models, smoke.attribution, self._study.runs / smoke.name
        gradients = smoke.training.epochs * self._study.data.n_train * (3 * n + part.fraction * part.n_subsets)
        said = f", the first time {n + part.n_subsets} more: {gradients:,.0f} sample gradients in all"
        with suppress(StoreError, LookupError, TypeError, ValueError):  # no record of one, or none that can be read
            took = max(float(read_json(path)["seconds"]) for path in runs.glob("forget_set-*/notebooks/.04_*.json"))
            said = f" and unlearns with them: about {duration(took)}, as before"
        return text("quiet", f"Trains {2 * n} small models{said}")

    def run(self) -> None:
        """Save, then unlearn the choice in the background; raises DmmError if a run is under way."""
        if self.button.disabled:
            raise DmmError("A run is under way; cancel it first.")
        path, study = self._save(), self._study
        settings = [part for key, value in self._overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        command = ["run", "smoke", "--stage", "04", "--forget-set", str(path), "--device", str(study.device), *settings]
        table = study.runs / presets.load("smoke", self._overrides).name / f"forget_set-{path.stem}" / "results.csv"
        self._folder = tempfile.TemporaryDirectory()
        self._progress, log = (Path(self._folder.name) / name for name in ("progress.json", "log.txt"))
        places = {"DMM_RUNS": study.runs, "DMM_FIGURES": study.figures, PROGRESS_FILE: self._progress}
        with open(log, "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dmmlib.app.cli", *command], stdin=subprocess.DEVNULL, stdout=said,
                stderr=subprocess.STDOUT, env=os.environ | {name: str(place) for name, place in places.items()},
            )  # fmt: skip
        self.button.disabled, self.cancel.disabled, self.bar.value, self.line.value = True, False, 0, "starting"
        self.progress.layout.display = self.price.value = ""

        def watch() -> None:
            self._watch(log, table, path)
            self.price.value, self.button.disabled = self._price(), False

        threading.Thread(target=watch, daemon=True).start()

    def end(self) -> None:
        """Cancel the run; what it has trained so far is kept."""
        self.cancel.disabled, self.line.value = True, "cancelling"
        self._process.send_signal(signal.SIGINT)
        last_resort = threading.Timer(PATIENCE, self._process.kill)
        last_resort.daemon = True
        last_resort.start()

    def _follow(self, log: Path, table: Path, path: Path) -> None:
        while self._process.poll() is None:
            time.sleep(0.3)
            with suppress(StoreError):  # nothing said yet, or caught half-written
                told = load_json(self._progress)
                self.bar.value = told["done"] / max(told["total"], 1)
                self.line.value = "cancelling" if self.cancel.disabled else html.escape(told["line"])
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        self._folder.cleanup()
        self.progress.layout.display = "none"
        if self.cancel.disabled:
            self.outcome.value = text("saved", "Cancelled; what was trained is kept.")
        elif self._process.returncode:
            raise DmmError(f"The run failed: {said.splitlines()[-1] if said else self._process.returncode}")
        else:
            self.outcome.value = _results(read_table(table), path.stem)
            self.images.set_order(forget_sets.load(path, self._study.data).indices)
            self.images.layout.display = ""
            self._on_end()


def _results(results: pd.DataFrame, name: str) -> str:
    """The verdict on a finished run's set, and KLoM and cost of each method, best first, in HTML."""
    judged, n = verdict.judge(results, name), results["n_models"].max()
    said = "".join(text("quiet", line, "p") for line in (judged.forgotten, judged.paid, judged.price))
    order = results[(results["statistic"] == "klom_p95") & (results["split"] == "forget")].sort_values("value")
    table = tables.main_table(results).droplevel("forget set").loc[[label(m) for m in order["method"]]]
    return (
        f'<div class="dmm-saved dmm-outcome" role="status"><b>Smoke run done. {html.escape(judged.headline)}</b>{said}'
        f"<details><summary>Every method; N = {n:.0f} small models of each kind, a first look</summary>"
        f"{table.to_html(border=0, index_names=False)}</details></div>"
    )
