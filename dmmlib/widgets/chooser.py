"""Choose a forget set by looking, see what forgetting it would do, save it, and run it."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd
import yaml

from dmmlib import forget_sets, metrics, presets
from dmmlib.analysis import plots
from dmmlib.errors import DmmError, ForgetSetError, StoreError
from dmmlib.files import home, replacing
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study
from dmmlib.widgets import preview as previews
from dmmlib.widgets.jobs import Job
from dmmlib.widgets.selection import Filters, Selection, measures, memorisation, read_indices, shown
from dmmlib.widgets.views import Gallery, Scatter

N_CHANGES = 24  # changed answers shown
N_STILL = 14  # images a row of the still picture
WARM = {"style": {"description_width": "initial"}}


class Chooser(w.VBox):
    """A forget set under construction.

    `selection` holds it and may be changed from code; `preview` is the last prediction, `saved` the last set saved.
    Where no widget can be shown, a picture of the choice remains.

    Args:
        study: trained as far as it has to be.
        start: chosen to begin with.
        trust: measure the prediction's error against the size of a set, once (trains 4 x 20 models).
    """

    def __init__(self, study: Study, start: ForgetSet | None = None, trust: bool = True) -> None:
        self.study, data = study, study.data
        margins = metrics.margins(study.original_logits(), data.y)
        masks, logits = study.subsets()
        right = metrics.correct(np.asarray(logits)[:, : data.n_train], data.y_train)
        self.known = measures(margins)
        self.known["memorisation"] = np.concatenate([memorisation(masks, right), np.full(data.n_val, np.nan)])
        self.known |= {f"PC {k + 1}": column for k, column in enumerate(study.loadings().T)}
        self.measured = previews.measure(study) if trust else []
        self._previewer = previews.Previewer(
            study.attributor(), study.original_logits()[: previews.N_ORIGINALS], data.y, data.n_train
        )
        self.usual = self._previewer.usual() if trust else []
        self.selection = Selection(data.n_train, start.indices if start else ())
        self.preview: previews.Preview | None = None
        self.saved: Path | None = None
        self.job: Job | None = None
        self._overwriting: ForgetSet | None = None
        self._retrained: dict[tuple[str, bytes], dict[str, previews.Outcome]] = {}

        images = data.x
        self.gallery = Gallery(images, self._caption, self._heard, rows=4)
        self.scatter = Scatter(data, self._caption, self._heard)
        self.changed = Gallery(
            images, self._caption, rows=2, width=104, selectable=False, label="Answers that change most",
            empty="No answer changes.",
        )  # fmt: skip
        self._build(start)
        self.selection.on_change.append(self._show_selection)
        for view in (self.gallery, self.changed, self.scatter):
            view.observe(self._focused, names="focus")
        self._replot()
        self._show_selection()
        self.refresh()

    # --- what there is on the screen -------------------------------------------------------------------

    def _build(self, start: ForgetSet | None) -> None:
        data = self.study.data
        self.message, self.status, self.outcome = w.HTML(), w.HTML(), w.HTML()
        self.undo = _button("Undo", self.selection.undo, "Take the last change back (Ctrl+Z)", icon="undo")
        self.clear = _button("Clear", self.selection.clear, "Choose nothing", icon="times")

        self.part = w.Dropdown(options=["training", "chosen", "validation"], description="Show", **WARM)
        classes = [(name, c) for c, name in enumerate(data.class_names)]
        self.label = w.Dropdown(options=[("all classes", -1), *classes], description="Class", **WARM)
        sortable = ["memorisation", "margin", "confidence", "loss", "index"]
        self.sort = w.Dropdown(
            options=[(f"{name}, {way}", (name, way == "high to low")) for name in sortable
                     for way in ("high to low", "low to high")],
            description="Sort", **WARM,
        )  # fmt: skip
        self.ranges = {name: _range(name, self.known[name]) for name in ("margin", "memorisation", "loss")}
        for control in (self.part, self.label, self.sort, *self.ranges.values()):
            control.observe(self._refilter, names="value")
        self.take_shown = _button("Include all shown", self._take_shown, "Add every image that passes the filters")

        columns = [name for name in self.known if name != "confidence"]
        self.axes = [
            w.Dropdown(options=columns, value=f"PC {k}", description=name, **WARM)
            for k, name in ((1, "Across"), (2, "Up"))
        ]
        self.lasso = w.ToggleButtons(
            options=[("lasso +", "include"), ("lasso −", "exclude")], tooltips=["A lasso adds", "A lasso takes out"]
        )
        for axis in self.axes:
            axis.observe(self._replot, names="value")

        self.target = w.HTML()
        self.k = w.BoundedIntText(10, min=1, max=data.n_train - 1, description="Add", **WARM)
        self.picks = [
            _button("most helpful", lambda: self._influential(1), "Images that hold the current image's answer up"),
            _button("most harmful", lambda: self._influential(-1), "Images that pull the current image's answer down"),
            _button("nearest", self._nearest, "The current image and those most like it, pixel by pixel"),
            _button("random", self._random, "At random, of those not chosen"),
        ]
        self.paste = w.Text(placeholder="indices, e.g. 3, 14, 15", description="Indices", **WARM)
        self.paste_button = _button("Include", self._paste, "Add these indices")
        self.upload = w.FileUpload(
            accept=".json,.txt,.csv", description="Upload", multiple=True, tooltip="A saved set, or indices"
        )
        self.upload.observe(self._uploaded, names="value")
        self.load = w.Dropdown(description="Start from", **WARM)
        self.load_button = _button("Load", self._load, "Put this set in the place of what is chosen")

        self.which = w.ToggleButtons(options=["images that stay", "forgotten images"], description="", **WARM)
        self.which.observe(self._show_changes, names="value")

        self.name = w.Text(value=start.name if start else "my_set", description="Name", **WARM)
        self.save_button = _button("Save", self.save, "Write this set to the run's forget_sets directory", icon="save",
                                   button_style="primary")  # fmt: skip
        self.overwrite = _button(
            "Overwrite", self._overwrite, "Put this set in the other's place", button_style="danger"
        )
        self.keep = _button("Keep the other", self._keep, "Save nothing")
        self.confirm = w.HBox([self.overwrite, self.keep])
        self.run_button = _button("Try on smoke preset", self.run, "Save, then unlearn it with few, small models",
                                  icon="play")  # fmt: skip
        self.bar = w.FloatProgress(min=0, max=1)
        self.line, self.command = w.HTML(), w.HTML()
        self.cancel = _button("Cancel", self._cancel, "End the run; what is trained is kept", icon="stop")
        self.progress = w.HBox([self.bar, self.line, self.cancel])
        self._hide(self.confirm, self.progress)

        def row(*children: w.Widget, name: str = "row") -> w.Box:
            return _classed(w.Box(children), name)

        self._list_sets()
        filters = [row(self.part, self.label, self.sort), row(*self.ranges.values())]
        look = row(
            w.VBox([self.gallery, row(self.take_shown, _note("%: how sure the originals are"))]),
            w.VBox([self.scatter, row(*self.axes, self.lasso)]),
            name="columns",
        )  # fmt: skip
        pick = row(self.target, self.k, *self.picks)
        bring = row(self.load, self.load_button, self.paste, self.paste_button, self.upload)
        consequences = row(
            w.VBox([_heading("If these images had never been seen"), self.outcome]),
            w.VBox(
                [
                    row(_heading("Answers that change most"), self.which),
                    self.changed,
                    _note("Δ: share of an image's probability that moves to other classes"),
                ]
            ),
            name="columns",
        )
        consequences.add_class("dmm-consequences")
        super().__init__(
            [
                row(self.status, self.undo, self.clear, name="header"),
                self.message,
                *filters,
                look,
                pick,
                bring,
                consequences,
                row(self.name, self.save_button, self.run_button, self.confirm, name="footer"),
                self.progress,
                self.command,
            ]
        )
        self.add_class("dmm-widget")

    def _caption(self, point: int) -> tuple[str, str]:
        data = self.study.data
        return data.class_names[data.y[point]], f"#{point} · {self.known['confidence'][point]:.0%}"

    @staticmethod
    def _hide(*boxes: w.Widget) -> None:
        for box in boxes:
            box.layout.display = "none"

    @contextmanager
    def _saying(self) -> Iterator[None]:
        """What goes wrong on purpose is said in the widget, and nothing is lost."""
        try:
            self.message.value = ""
            yield
        except DmmError as error:
            self.message.value = f'<div class="dmm-notice" role="alert">{html.escape(str(error))}</div>'

    # --- what the user does ----------------------------------------------------------------------------

    def _heard(self, message: dict[str, Any]) -> None:
        """A message of the browser; see `View`."""
        kind = message["kind"]
        if kind == "settled":
            self.refresh()
            return
        with self._saying():
            if kind == "toggle":
                self.selection.toggle(message["index"])
            elif kind == "lasso":
                remove = message["remove"] or self.lasso.value == "exclude"
                (self.selection.remove if remove else self.selection.add)(message["indices"])
            elif kind == "undo":
                self.selection.undo()

    def _focused(self, change: Any) -> None:
        for view in (self.gallery, self.changed, self.scatter):
            view.focus = change["new"]
        self._show_target()

    def _point(self) -> int:
        if self.gallery.focus < 0:
            raise ForgetSetError("No image is current; click one, or move to it with the arrow keys, first.")
        return self.gallery.focus

    def _influential(self, sign: int) -> None:
        with self._saying():
            scores = sign * self.study.influences(self._point())
            skip = np.append(self.selection.indices, self._point())
            self.selection.add(forget_sets.highest(scores, self.k.value, skip))

    def _nearest(self) -> None:
        with self._saying():
            n = self.study.data.n_train
            features = self.study.features
            distances = ((features[:n] - features[self._point()]) ** 2).sum(1)
            self.selection.add(forget_sets.highest(-distances, self.k.value, self.selection.indices))

    def _random(self) -> None:
        with self._saying():
            rng = np.random.default_rng()
            self.selection.add(forget_sets.random(self.study.data, self.k.value, rng, self.selection.indices))

    def _take_shown(self) -> None:
        with self._saying():
            positions = self._positions()
            self.selection.add(positions[positions < self.study.data.n_train])

    def _paste(self) -> None:
        with self._saying():
            self.selection.add(read_indices(self.paste.value, self.study.data))
            self.paste.value = ""

    def _uploaded(self, change: Any) -> None:
        with self._saying():
            for file in change["new"]:
                text = bytes(file["content"]).decode("utf-8", errors="replace")
                self.selection.add(read_indices(text, self.study.data, file["name"]))

    def _load(self) -> None:
        with self._saying():
            if not self.load.value:
                raise ForgetSetError("No forget set is saved yet; save one first.")
            loaded = forget_sets.load(self._path(self.load.value), self.study.data)
            self.selection.replace(loaded.indices)
            self.name.value = loaded.name

    # --- what is shown ---------------------------------------------------------------------------------

    def _positions(self) -> np.ndarray:
        filters = Filters(
            self.part.value,
            None if self.label.value < 0 else self.label.value,
            {name: r.value for name, r in self.ranges.items() if r.value != (r.min, r.max)},
            *self.sort.value,
        )
        return shown(filters, self.known, self.study.data.y, self.selection.mask)

    def _refilter(self, _: object = None) -> None:
        positions = self._positions()
        self.gallery.set_order(positions)
        self.gallery.label = f"{len(positions)} {self.part.value} images"
        passing = np.zeros(self.study.data.n_train, np.uint8)
        passing[positions[positions < len(passing)]] = 1
        self.scatter.shown = passing.tobytes()
        self.take_shown.description = f"Include all {int(passing.sum()):,} shown"
        self.take_shown.disabled = not passing.any()

    def _replot(self, _: object = None) -> None:
        n = self.study.data.n_train
        x, y = (self.known[axis.value][:n] for axis in self.axes)
        self.scatter.set_columns(x, y, (self.axes[0].value, self.axes[1].value))

    def _show_selection(self) -> None:
        data, mask = self.study.data, self.selection.mask
        self.gallery.outdated = True
        for view in (self.gallery, self.scatter, self.changed):
            view.set_chosen(mask)
        counts = self.selection.counts(data.y_train, data.n_classes)
        parts = " · ".join(f"{data.class_names[c]} {counts[c]}" for c in np.argsort(-counts) if counts[c])
        self.status.value = (
            f"<div><b>{len(self.selection):,}</b> of {data.n_train:,} images to be forgotten"
            f'<span class="dmm-quiet">{html.escape(f" · {parts}" if parts else "")}</span></div>'
        )
        self._hide(self.confirm)
        self.undo.disabled, self.clear.disabled = not self.selection.can_undo, not len(self.selection)
        if self.part.value == "chosen" or not self.gallery.order:
            self._refilter()
        self._show_target()
        if not len(self.selection):
            self.refresh()  # nothing to predict, so nothing to wait for

    def _show_target(self) -> None:
        point = self.gallery.focus
        text = "Click an image" if point < 0 else " ".join(self._caption(point))
        self.target.value = f'<span class="dmm-quiet">Current image:</span> <b>{html.escape(text)}</b>'
        for button in self.picks[:3]:
            button.disabled = point < 0

    def refresh(self) -> None:
        """Predict what forgetting the choice would do, and show it."""
        try:
            self.preview = self._previewer.preview(self.selection.indices)
        except DmmError as error:
            self.preview = None
            text = "Choose images to see what forgetting them would do." if not len(self.selection) else str(error)
            self.outcome.value = f'<div class="dmm-outcome dmm-quiet">{html.escape(text)}</div>'
        else:
            self.outcome.value = self._table(self.preview, self._actual())
        self._show_changes()
        self.gallery.outdated = False

    def _actual(self) -> dict[str, previews.Outcome] | None:
        """What retraining really gives, if the choice is a set whose oracles are there."""
        for name in [*self.study.forget_sets(), self.name.value]:
            known = self.study.forget_sets().get(name) or ForgetSet(name, self.selection.indices)
            if not np.array_equal(known.indices, self.selection.indices):
                continue
            key = (name, known.indices.tobytes())
            if key not in self._retrained and self.study.has_oracles(known):
                margins, right = self.study.reference(known)
                splits = known.splits(self.study.data.n_train, self.study.data.n_val)
                self._retrained[key] = previews.outcomes(margins.mean(0), right.mean(0), splits)
            if key in self._retrained:
                return self._retrained[key]
        return None

    def _table(self, preview: previews.Preview, actual: dict[str, previews.Outcome] | None) -> str:
        heads = ["now", "predicted", *(["retrained"] if actual else [])]
        columns = [preview.before, preview.after, *([actual] if actual else [])]
        rows = "".join(
            f'<tr><th scope="row">{split}</th>'
            + "".join(f"<td>{c[split].accuracy:.1%}</td>" for c in columns)
            + "<td></td>"
            + "".join(f"<td>{c[split].margin:.2f}</td>" for c in columns)
            + "</tr>"
            for split in plots.SPLITS
        )
        names = "<th></th>".join(["".join(f'<th scope="col">{head}</th>' for head in heads)] * 2)
        top = f'<th></th><th colspan="{len(heads)}">accuracy</th><th></th><th colspan="{len(heads)}">mean margin</th>'
        table = f"<table><thead><tr>{top}</tr><tr><th></th>{names}</tr></thead><tbody>{rows}</tbody></table>"
        warning = previews.warning(self.measured, preview.size)
        notice = f'<div class="dmm-notice" role="note">{html.escape(warning)}</div>' if warning else ""
        cost = html.escape(previews.cost(self.study, preview.size))
        unsure = html.escape(previews.uncertainty(preview))
        beyond = html.escape(previews.beyond_usual(self.usual, preview))
        said = "".join(f'<p class="dmm-quiet">{line}</p>' for line in (unsure, beyond, cost) if line)
        return f'<div class="dmm-outcome">{table}{notice}{said}</div>'

    def _show_changes(self, _: object = None) -> None:
        if self.preview is None:
            self.changed.set_order(np.zeros(0, int))
            return
        data, forget = self.study.data, self.selection.indices
        stay = np.setdiff1d(np.arange(len(data.y)), forget)
        top = self.preview.changes.top(N_CHANGES, stay if self.which.value == "images that stay" else forget)
        changes = {change.point: change for change in top}
        names = data.class_names

        def caption(point: int) -> tuple[str, str]:
            change = changes.get(point)
            if change is None:
                return self._caption(point)
            place = f"#{point}" if point < data.n_train else f"#{point} val"
            answer = names[change.old] if change.new == change.old else f"{names[change.old]} → {names[change.new]}"
            return answer, f"{place} · Δ {change.distance:.0%}"

        self.changed.recaption(caption)
        self.changed.set_order(np.array(list(changes), int))

    # --- from eye to batch -----------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self.study.directory / "forget_sets" / f"{name}.json"

    def _list_sets(self) -> None:
        files = sorted(path.stem for path in (self.study.directory / "forget_sets").glob("*.json"))
        self.load.options = [(name, name) for name in files] or [("nothing saved yet", "")]
        self.load.index = 0  # a dropdown that was empty would choose none

    def save(self) -> bool:
        """Write the choice under its name; whether that was done. Another set of that name is asked about first."""
        self._hide(self.confirm)
        with self._saying():
            name = self.name.value.strip()
            if not name or not all(c.isalnum() or c in "_+.-" for c in name) or name.startswith("."):
                raise ForgetSetError(f"{name!r} is no name for a forget set; use letters, digits and _ + . - only.")
            ours = [part.name for part in (*self.study.preset.forget_sets, *self.study.preset.tuning.forget_sets)]
            chosen = forget_sets.make(
                name, self.selection.indices, self.study.data, kind="chosen", preset=self.study.preset.name
            )
            if name in ours:
                raise ForgetSetError(f"{name!r} is a forget set of the preset itself; save yours under another name.")
            path = self._path(name)
            if path.exists() and not self._same(path, chosen):
                self._overwriting = chosen
                self.confirm.layout.display = ""
                raise ForgetSetError(f"There is another forget set {name!r} already; overwrite it?")
            self._write(chosen)
            return True
        return False

    def _same(self, path: Path, chosen: ForgetSet) -> bool:
        try:
            return np.array_equal(forget_sets.load(path, self.study.data).indices, chosen.indices)
        except DmmError:  # damaged, or of other data: another set all the same
            return False

    def _overwrite(self) -> None:
        self._hide(self.confirm)
        with self._saying():
            if self._overwriting is not None:
                self._write(self._overwriting)

    def _keep(self) -> None:
        self._hide(self.confirm)
        self.message.value = ""

    def _write(self, chosen: ForgetSet) -> None:
        path = self._path(chosen.name)
        chosen.save(path)
        self.saved = path
        self._list_sets()
        self.load.value = chosen.name
        notebook = html.escape(repr(str(_shown_path(path, of="notebooks"))))
        command = f"dmm run {self._preset()} --stage 04 --forget-set {_shown_path(path)}"
        self.command.value = (
            f'<div class="dmm-saved" role="status">Saved {len(chosen):,} images. Unlearn them with <code>'
            f"{html.escape(command)}</code> (add <code>--beside</code> to keep the preset’s own sets), or in notebooks "
            f"04 and 05 with <code>forget_set = {notebook}</code></div>"
        )
        self.refresh()

    def _preset(self) -> str:
        """How `dmm run` finds this study's preset: by name, or in a file that is written for it."""
        ours = self.study.preset
        where = {"device": ours.device, "threads": ours.threads}
        if ours.name in presets.names() and presets.load(ours.name, where) == ours:
            return ours.name
        path = self.study.directory / "preset.yaml"
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump({"preset": ours.model_dump(mode="json")}))
        return str(_shown_path(path))

    def run(self) -> None:
        """Save, then unlearn the choice on the smoke preset's few, small models of this data, in the background."""
        if self.job is not None and self.job.running:
            self.message.value = '<div class="dmm-notice">A run is under way; cancel it first.</div>'
            return
        if not self.save() or self.saved is None:
            return
        smoke, ours = (p.model_dump(mode="json")["data"] for p in (presets.load("smoke"), self.study.preset))
        differing = [
            f"data.{key}={'null' if ours[key] is None else ours[key]}" for key in ours if ours[key] != smoke[key]
        ]
        arguments = [
            "run",
            "smoke",
            "--stage",
            "04",
            "--forget-set",
            str(self.saved),
            "--device",
            str(self.study.device),
        ]
        arguments += [part for setting in differing for part in ("--set", setting)]
        places = {"DMM_RUNS": str(self.study.runs), "DMM_FIGURES": str(self.study.figures)}
        overrides = {key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in differing)}
        table = (
            self.study.runs / presets.load("smoke", overrides).name / f"forget_set-{self.saved.stem}" / "results.csv"
        )

        def progress(line: str, share: float) -> None:
            self.bar.value, self.line.value = share, html.escape(line)

        def ended(code: int, said: str) -> None:
            self._hide(self.progress)
            self.run_button.disabled = False
            with self._saying():
                if self.job is not None and self.job.cancelled:
                    self.command.value = '<div class="dmm-saved">Cancelled; what was trained is kept.</div>'
                elif code:
                    raise DmmError(f"The run failed: {said.splitlines()[-1] if said else f'code {code}'}")
                else:
                    self.command.value = _results(table)
                    self.refresh()

        self.bar.value, self.line.value, self.progress.layout.display = 0, "starting", ""
        self.cancel.disabled, self.run_button.disabled = False, True
        self.job = Job(arguments, places, progress, ended)

    def _cancel(self) -> None:
        if self.job is not None:
            self.line.value, self.cancel.disabled = "cancelling", True
            self.job.cancel()

    # --- where there is no browser ---------------------------------------------------------------------

    def picture(self) -> bytes:
        """A PNG of the choice and of what its forgetting would do."""
        if self.gallery.outdated:
            self.refresh()
        data, n = self.study.data, self.study.data.n_train
        rows = {"most memorised": np.argsort(-self.known["memorisation"][:n], kind="stable")[:N_STILL]}
        title, caption = f"{len(self.selection)} of {n:,} images chosen", "Nothing is predicted for this choice."
        if len(self.selection):
            rows = {"chosen": self.selection.indices} | rows
        if self.preview is not None:
            training = np.setdiff1d(np.arange(n), self.selection.indices)
            rows["changed most"] = np.array([c.point for c in self.preview.changes.top(N_STILL, training)])
            before, after = self.preview.before, self.preview.after
            title = (
                f"{len(self.selection)} of {n:,} images chosen: accuracy on them is predicted to go from "
                f"{before['forget'].accuracy:.0%} to {after['forget'].accuracy:.0%}"
            )
            caption = "Predicted mean margins: " + ", ".join(
                f"{split} {before[split].margin:.2f} → {after[split].margin:.2f}" for split in plots.SPLITS
            )
        caption = f"{caption}. A still of the widget, which needs a running kernel."
        return plots.png(plots.thumbnails(data, rows, title, caption))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**options), "image/png": base64.b64encode(self.picture()).decode()}


def _button(text: str, do: Any, tip: str, **options: Any) -> w.Button:
    button = w.Button(description=text, tooltip=tip, **options)
    button.on_click(lambda _: do())
    return button


def _range(name: str, values: np.ndarray) -> w.FloatRangeSlider:
    low, high = (float(v) for v in (np.floor(np.nanmin(values) * 10) / 10, np.ceil(np.nanmax(values) * 10) / 10))
    high = max(high, low + 0.1)
    return w.FloatRangeSlider(
        value=(low, high), min=low, max=high, step=0.1, description=name.capitalize(), readout_format=".1f",
        continuous_update=False, **WARM,
    )  # fmt: skip


def _classed(box: w.Box, name: str) -> w.Box:
    box.add_class(f"dmm-{name}")
    return box


def _heading(text: str) -> w.HTML:
    return w.HTML(f'<div class="dmm-heading" role="heading" aria-level="4">{html.escape(text)}</div>')


def _note(text: str) -> w.HTML:
    return w.HTML(f'<span class="dmm-quiet">{html.escape(text)}</span>')


def _shown_path(path: Path, of: str = ".") -> Path:
    """A path as it is typed in the repository's root, or in a directory of it; absolute where that is elsewhere."""
    path = path.resolve()
    return Path(os.path.relpath(path, home() / of)) if path.is_relative_to(home()) else path


def _results(table: Path) -> str:
    """KLoM and cost of each method, out of a finished run's table, in HTML."""
    try:
        results = pd.read_csv(table)
    except OSError as error:
        raise StoreError(f"{table} cannot be read ({error}); run again.") from error
    wide = results[results["statistic"] == "klom_p95"].pivot(index="method", columns="split", values="value")
    cost = results[results["statistic"] == "cost"].set_index("method")["value"]
    rows = "".join(
        f'<tr><th scope="row">{html.escape(plots.label(m))}</th><td>{cost[m]:.2f}</td>'
        + "".join(f"<td>{wide.loc[m, split]:.1f}</td>" for split in plots.SPLITS)
        + "</tr>"
        for m in results["method"].unique()
    )
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("method", "cost", *plots.SPLITS))
    return (
        f'<div class="dmm-saved dmm-outcome" role="status"><b>Smoke run done.</b> KLoM, 95th percentile, N = '
        f"{int(results['n_models'].max())} small models of each kind: a first look, not a result."
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
