"""Choose a forget set by looking, see what forgetting it would do, save it, and run it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import partial
from typing import Any

import ipywidgets as w
import numpy as np

from dmmlib import forget_sets
from dmmlib.analysis import plots
from dmmlib.analysis.one_image import single_effects
from dmmlib.datamodels import Indices
from dmmlib.errors import ForgetSetError
from dmmlib.forget_sets import ForgetSet
from dmmlib.own import requests
from dmmlib.study import Study
from dmmlib.widgets import preview as previews
from dmmlib.widgets.batch import Saving, Trial
from dmmlib.widgets.consequences import Consequences
from dmmlib.widgets.measures import measures
from dmmlib.widgets.selection import Known, Selection, shown
from dmmlib.widgets.views import Gallery, Message, Scatter, labelled, row, text

N_STILL = 14  # images in each row of the still picture
SORTABLE = ("memorisation", "margin", "confidence", "loss", "index")
FINDS = {
    "likely mislabelled first": ("unseen margin", False),
    "near-duplicates first": ("nearest", False),
    "outliers first": ("apart", True),
}
"""Starting points: their name, what they are sorted by, and whether the highest comes first."""


class Chooser(w.VBox):
    """A forget set under construction; where no widget can be shown, a picture of the choice remains.

    All it asks for are the originals and the attributor's subset models: a hundred, on the laptop preset.

    `selection` holds the choice and may be changed from code; `preview` is the last prediction, `measured` how far off
    predictions are (see `preview.measure`), `effects` what each point does (`one_image.single_effects`). The panels are
    `look`, `consequences`, `saving` and `trial`.

    Args:
        study: trained as far as it has to be.
        start: chosen to begin with.
        trust: measure the prediction's error against the size of a set, once (trains 4 x 20 models).
    """

    def __init__(self, study: Study, start: ForgetSet | None = None, trust: bool = True) -> None:
        self.study, data = study, study.data
        self.effects = single_effects(study)
        self.known = measures(study, self.effects)
        self.measured = previews.measure(study) if trust else None

        self.selection = selection = Selection(data.n_train, start.indices if start else ())
        self.message, self.status = Message(), w.HTML()
        self.undo = self.message.button("Undo", selection.undo, "Take the last change back (Ctrl+Z)", icon="undo")
        self.redo = self.message.button("Redo", selection.redo, "Make it again (Ctrl+Shift+Z)", icon="repeat")
        self.clear = self.message.button("Clear", selection.clear, "Choose nothing", icon="times")
        self.look = Look(study, self.known, self.effects, selection, self.message, self.refresh)
        self.consequences = Consequences(study, selection, self.measured)
        self.saving = Saving(study, selection, self.message.beside(), start.name if start else "my_set", self.refresh)
        self.trial = Trial(study, self.message.beside(), self.saving.save, self.refresh)
        header = row(self.status, self.undo, self.redo, self.clear, self.message, kind="header")
        screen = row(self.look.images, self.look.plane, self.consequences, kind="screen")
        super().__init__([header, self.look.filters, screen, self.look, self.saving, self.trial])
        self.add_class("dmm-widget")
        self._views = (self.look.gallery, self.look.scatter, self.consequences.changed)
        for view in self._views:
            view.observe(self._focus, names="focus")
        selection.on_change.append(self._show_selection)
        self._show_selection()
        self.refresh()

    def refresh(self) -> None:
        """Predict what forgetting the choice would do, and show it."""
        self.preview = self.consequences.refresh()
        self.look.gallery.outdated = False

    def _focus(self, change: Any) -> None:
        for view in self._views:
            view.focus = change["new"]
        self.look.refresh()

    def _show_selection(self) -> None:
        data, mask = self.study.data, self.selection.mask
        self.look.gallery.outdated = True
        for view in self._views:
            view.set_chosen(mask)
        counts = np.bincount(data.y_train[mask], minlength=data.n_classes)
        parts = [f"{data.class_names[c]} {counts[c]}" for c in np.argsort(-counts) if counts[c]]
        chosen = f"<b>{len(self.selection):,}</b> of {data.n_train:,} images to be forgotten"
        self.status.value = f"<div>{chosen}{text('quiet', ' · '.join(['', *parts]), 'span')}</div>"
        self.saving.ask_nothing()
        past, future = self.selection.past, self.selection.future
        self.undo.disabled, self.redo.disabled, self.clear.disabled = not past, not future, not len(self.selection)
        self.look.refresh()
        if not len(self.selection):
            self.refresh()  # nothing to predict, so nothing to wait for

    def picture(self) -> bytes:
        """Draw the choice and what its forgetting would do: a PNG."""
        if self.look.gallery.outdated:
            self.refresh()
        data, chosen, training = self.study.data, self.selection.indices, np.arange(self.study.data.n_train)
        title, caption = f"{len(chosen)} of {data.n_train:,} images chosen", "Nothing is predicted for this choice"
        rows = {"chosen": chosen} if len(chosen) else {}
        rows["most memorised"] = np.argsort(-self.known["memorisation"][training], kind="stable")[:N_STILL]
        if self.preview is not None:
            rows["changed most"] = self.preview.most_changed(N_STILL, np.setdiff1d(training, chosen))
            old, new = self.preview.before, self.preview.after
            moves = [f"{split} {old.margin[split]:.2f} → {new.margin[split]:.2f}" for split in plots.SPLITS]
            accuracy = f"{old.accuracy['forget']:.0%} to {new.accuracy['forget']:.0%}"
            title = f"{title}: accuracy on them is predicted to go from {accuracy}"
            caption = f"Predicted mean margins: {', '.join(moves)}"
        return plots.png(plots.thumbnails(data, rows, title, f"{caption}. A still: the widget needs a running kernel."))

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        still = {"image/png": base64.b64encode(self.picture()).decode()}
        alt = f"{len(self.selection)} chosen images, the most memorised ones, and those whose answers would change most"
        return {**super()._repr_mimebundle_(**options), **still}, {"image/png": {"alt": alt}}


class Look(w.VBox):
    """Shows points by what is known of them, and changes the selection; `settled` is called when the user pauses."""

    def __init__(
        self, study: Study, known: Known, effects: np.ndarray, selection: Selection, message: Message,
        settled: Callable[[], None],
    ) -> None:  # fmt: skip
        self._study, self._known, self._effects, self._selection = study, known, effects, selection
        self.seen, self.picked, self.listed = (message.beside() for _ in range(3))  # each beside its buttons
        data = study.data
        changes: tuple[tuple[str, Callable[..., None], Message], ...] = (
            ("toggle", selection.toggle, self.seen), ("take", selection.add, self.seen),
            ("lasso", self._lasso, self.seen), ("undo", selection.undo, message), ("redo", selection.redo, message),
            ("legend", self._legend, self.seen),
            ("dropped", lambda name, text: selection.add(requests.read(text, data, name)), self.listed),
        )  # fmt: skip
        hear = {"settled": settled} | {kind: beside.guarded(do) for kind, do, beside in changes}
        self.gallery, self.scatter = Gallery(data.x, self.caption, hear), Scatter(data, self.caption, hear)

        self.part = labelled(w.Dropdown, "Show", options=["training", "chosen", "validation"])
        classes = [("all classes", -1), *((name, c) for c, name in enumerate(data.class_names))]
        self.label = labelled(w.Dropdown, "Class", options=classes)
        columns = [name for name in known if name != "confidence"]
        ways = ["high to low", "low to high"]
        orders = [(f"{name}, {way}", (name, way == ways[0])) for name in SORTABLE for way in ways]
        self.sort = labelled(w.Dropdown, "Sort", options=[*FINDS.items(), *orders], value=("memorisation", True))
        self.ranges = {name: _slider(name, known[name]) for name in ("margin", "memorisation", "loss")}
        self.take_shown = self.seen.button("", self._take_shown, "Add every image that passes the filters")
        self.across = labelled(w.Dropdown, "Across", options=columns, value="PC 1")
        self.up = labelled(w.Dropdown, "Up", options=columns, value="PC 2")
        self.lasso = w.ToggleButtons(options=["lasso +", "lasso −"], tooltips=["A lasso adds", "A lasso takes out"])

        self.target = w.HTML()
        self.k = labelled(w.BoundedIntText, "Add", value=10, min=1, max=data.n_train - 1)
        picks: dict[str, tuple[Callable[[], None], str]] = {
            "most helpful": (partial(self._influential, 1), "Images that hold the current image's answer up"),
            "most harmful": (partial(self._influential, -1), "Images that pull the current image's answer down"),
            "nearest": (self._nearest, "The current image and those most like it, pixel by pixel"),
            "random": (self._random, "At random, of those not chosen"),
        }
        self.picks = {name: self.picked.button(name, do, tip) for name, (do, tip) in picks.items()}
        self.paste = labelled(w.Text, "List", placeholder="3, 14, 15, file names or a class")
        self.include, self.upload = self._lists("Include", "Upload", selection.add)
        self.replace, self.exchange = self._lists("Replace by", "Upload to replace", selection.replace)

        for control in (self.part, self.label, self.sort, *self.ranges.values()):
            control.observe(self._refilter, names="value")
        for axis in (self.across, self.up):
            axis.observe(self._replot, names="value")
        sure = w.HTML(text("quiet", "%: how sure the originals are", "span"))
        self.images = w.VBox([self.gallery, row(self.take_shown, sure, self.seen)])
        self.plane = w.VBox([self.scatter, row(self.across, self.up, self.lasso)])
        self.filters = row(self.part, self.label, self.sort, *self.ranges.values())
        picking = row(self.target, self.k, *self.picks.values(), self.picked)
        lists = row(self.paste, self.include, self.replace, self.upload, self.exchange, self.listed)
        super().__init__([picking, lists])
        self._replot()

    def caption(self, point: int) -> tuple[str, str]:
        """Return title and detail of a point: its class, its index, and how sure the originals are of it."""
        data = self._study.data
        return data.class_names[data.y[point]], f"#{point} · {self._known['confidence'][point]:.0%}"

    def _lasso(self, indices: Indices, remove: bool) -> None:
        takes_out = remove or self.lasso.value == "lasso −"
        (self._selection.remove if takes_out else self._selection.add)(indices)

    def _legend(self, group: int) -> None:
        self.label.value = -1 if self.label.value == group else group

    def _take_shown(self) -> None:
        positions = self._positions()
        self._selection.add(positions[positions < self._study.data.n_train])

    def _current(self) -> int:
        if self.gallery.focus < 0:
            raise ForgetSetError("No image is current; click one, or move to it with the arrow keys, first.")
        return self.gallery.focus

    def _influential(self, sign: int) -> None:
        scores = sign * self._effects[:, self._current()]
        skip = np.append(self._selection.indices, self._current())
        self._selection.add(forget_sets.highest(scores, self.k.value, skip))

    def _nearest(self) -> None:
        features = self._study.features
        skip = np.append(self._selection.indices, np.arange(self._study.data.n_train, len(features)))
        self._selection.add(forget_sets.nearest(features, self._current(), self.k.value, skip))

    def _random(self) -> None:
        rng = np.random.default_rng()
        self._selection.add(forget_sets.random(self._study.data, self.k.value, rng, self._selection.indices))

    def _lists(self, button: str, upload: str, take: Callable[[np.ndarray], None]) -> tuple[w.Button, w.FileUpload]:
        """A button and an upload that take lists in one way: a mode and a file would travel apart."""
        data = self._study.data

        def pasted() -> None:
            take(requests.read(self.paste.value, data, "The list"))
            self.paste.value = ""

        def uploaded(change: Any) -> None:
            if files := [(bytes(file["content"]).decode(errors="replace"), file["name"]) for file in change["new"]]:
                made.value = ()  # or the same file would be no change, and nothing would be heard of it again
                take(np.concatenate([requests.read(text, data, name) for text, name in files]))

        tip = f"{upload}: a saved set, JSON, or CSV with a header; what is dropped on the images is added"
        made = w.FileUpload(description=upload, accept=".json,.txt,.csv,.tsv", multiple=True, tooltip=tip)
        made.observe(self.listed.guarded(uploaded), names="value")
        return self.listed.button(button, pasted, f"{button} what this list names"), made

    def refresh(self) -> None:
        """Show what is chosen and which image is current."""
        if self.part.value == "chosen" or not self.gallery.order:
            self._refilter()
        point = self.gallery.focus
        current = "Click an image" if point < 0 else " ".join(self.caption(point))
        self.target.value = f"{text('quiet', 'Current image:', 'span')} {text('target', current, 'b')}"
        for name in ("most helpful", "most harmful", "nearest"):
            self.picks[name].disabled = point < 0

    def _positions(self) -> np.ndarray:
        ranges = {name: r.value for name, r in self.ranges.items() if r.value != (r.min, r.max)}
        filters = (self.part.value, self.label.value, ranges, *self.sort.value)
        return shown(self._known, self._study.data.y, self._selection.mask, *filters)

    def _refilter(self, _: object = None) -> None:
        positions = self._positions()
        self.gallery.set_order(positions)
        self.gallery.label = f"{len(positions)} {self.part.value} images"
        passing = np.isin(np.arange(self._study.data.n_train), positions)
        self.scatter.only = self.label.value
        self.scatter.shown = passing.astype(np.uint8).tobytes()
        self.take_shown.description = f"Include all {passing.sum():,} shown"
        self.take_shown.disabled = not passing.any()

    def _replot(self, _: object = None) -> None:
        across, up, n = self.across.value, self.up.value, self._study.data.n_train
        self.scatter.set_columns(self._known[across][:n], self._known[up][:n], (across, up))


def _slider(name: str, values: np.ndarray) -> w.FloatRangeSlider:
    low = float(np.floor(np.nanmin(values) * 10) / 10)
    high = max(float(np.ceil(np.nanmax(values) * 10) / 10), low + 0.1)
    looks = {"step": 0.1, "readout_format": ".1f", "continuous_update": False}
    return labelled(w.FloatRangeSlider, name.capitalize(), value=(low, high), min=low, max=high, **looks)
