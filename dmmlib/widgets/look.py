"""The panel to choose in: filters, gallery, scatter, and ways to take many images at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as w
import numpy as np

from dmmlib import forget_sets
from dmmlib.errors import ForgetSetError
from dmmlib.study import Study
from dmmlib.widgets.controls import Message, labelled, row, text
from dmmlib.widgets.selection import Selection, read_indices, shown
from dmmlib.widgets.views import Gallery, Scatter

Known = Mapping[str, np.ndarray]


class Look(w.VBox):
    """Shows points by what is known of them, and changes the selection; `settled` is called when the user pauses."""

    def __init__(
        self, study: Study, known: Known, selection: Selection, message: Message, settled: Callable[[], None]
    ) -> None:
        self._study, self._known, self._selection, data = study, known, selection, study.data
        self._settled, self._change = settled, message.guarded(self._carry_out)
        self.gallery = Gallery(data.x, self.caption, self._hear)
        self.scatter = Scatter(data, self.caption, self._hear)

        self.part = labelled(w.Dropdown, "Show", options=["training", "chosen", "validation"])
        classes = [("all classes", -1), *((name, c) for c, name in enumerate(data.class_names))]
        self.label = labelled(w.Dropdown, "Class", options=classes)
        columns = [name for name in known if name != "confidence"]
        sortable, ways = ["memorisation", "margin", "confidence", "loss", "index"], ["high to low", "low to high"]
        orders = [(f"{name}, {way}", (name, way == ways[0])) for name in sortable for way in ways]
        self.sort = labelled(w.Dropdown, "Sort", options=orders)
        self.ranges = {name: _slider(name, known[name]) for name in ("margin", "memorisation", "loss")}
        self.take_shown = message.button("", self._take_shown, "Add every image that passes the filters")
        self.across = labelled(w.Dropdown, "Across", options=columns, value="PC 1")
        self.up = labelled(w.Dropdown, "Up", options=columns, value="PC 2")
        self.lasso = w.ToggleButtons(options=["lasso +", "lasso −"], tooltips=["A lasso adds", "A lasso takes out"])

        self.target = w.HTML()
        self.k = labelled(w.BoundedIntText, "Add", value=10, min=1, max=data.n_train - 1)
        picks = {
            "most helpful": (self._helpful, "Images that hold the current image's answer up"),
            "most harmful": (self._harmful, "Images that pull the current image's answer down"),
            "nearest": (self._nearest, "The current image and those most like it, pixel by pixel"),
            "random": (self._random, "At random, of those not chosen"),
        }
        self.picks = {name: message.button(name, do, tip) for name, (do, tip) in picks.items()}
        self.paste = labelled(w.Text, "Indices", placeholder="indices, e.g. 3, 14, 15")
        self.include = message.button("Include", self._paste, "Add these indices")
        files = {"accept": ".json,.txt,.csv", "multiple": True, "tooltip": "A saved set, or indices"}
        self.upload = w.FileUpload(description="Upload", **files)

        for control in (self.part, self.label, self.sort, *self.ranges.values()):
            control.observe(self._refilter, names="value")
        for axis in (self.across, self.up):
            axis.observe(self._replot, names="value")
        self.upload.observe(message.guarded(self._uploaded), names="value")
        sure = w.HTML(text("quiet", "%: how sure the originals are", "span"))
        images = w.VBox([self.gallery, row(self.take_shown, sure)])
        plane = w.VBox([self.scatter, row(self.across, self.up, self.lasso)])
        super().__init__(
            [
                row(self.part, self.label, self.sort),
                row(*self.ranges.values()),
                row(images, plane, kind="columns"),
                row(self.target, self.k, *self.picks.values()),
                row(self.paste, self.include, self.upload),
            ]
        )
        self._replot()

    def caption(self, point: int) -> tuple[str, str]:
        """Title and detail of a point: its class, its index, and how sure the originals are of it."""
        data = self._study.data
        return data.class_names[data.y[point]], f"#{point} · {self._known['confidence'][point]:.0%}"

    # --- what the user does ----------------------------------------------------------------------------

    def _hear(self, said: dict[str, Any]) -> None:
        """Carry out a message of the browser; see `View`."""
        self._settled() if said["kind"] == "settled" else self._change(said)

    def _carry_out(self, said: dict[str, Any]) -> None:
        if said["kind"] == "toggle":
            self._selection.toggle(said["index"])
        elif said["kind"] == "lasso":
            remove = said["remove"] or self.lasso.value == "lasso −"
            (self._selection.remove if remove else self._selection.add)(said["indices"])
        elif said["kind"] == "undo":
            self._selection.undo()

    def _take_shown(self) -> None:
        positions = self._positions()
        self._selection.add(positions[positions < self._study.data.n_train])

    def _current(self) -> int:
        if self.gallery.focus < 0:
            raise ForgetSetError("No image is current; click one, or move to it with the arrow keys, first.")
        return self.gallery.focus

    def _helpful(self, sign: int = 1) -> None:
        scores = sign * self._study.influences(self._current())
        skip = np.append(self._selection.indices, self._current())
        self._selection.add(forget_sets.highest(scores, self.k.value, skip))

    def _harmful(self) -> None:
        self._helpful(-1)

    def _nearest(self) -> None:
        features = self._study.features
        skip = np.append(self._selection.indices, np.arange(self._study.data.n_train, len(features)))
        self._selection.add(forget_sets.nearest(features, self._current(), self.k.value, skip))

    def _random(self) -> None:
        rng = np.random.default_rng()
        self._selection.add(forget_sets.random(self._study.data, self.k.value, rng, self._selection.indices))

    def _paste(self) -> None:
        self._selection.add(read_indices(self.paste.value, self._study.data))
        self.paste.value = ""

    def _uploaded(self, change: Any) -> None:
        for file in change["new"]:
            content = bytes(file["content"]).decode("utf-8", errors="replace")
            self._selection.add(read_indices(content, self._study.data, file["name"]))

    # --- what is shown ---------------------------------------------------------------------------------

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
        label = None if self.label.value < 0 else self.label.value
        filters = (self.part.value, label, ranges, *self.sort.value)
        return shown(self._known, self._study.data.y, self._selection.mask, *filters)

    def _refilter(self, _: object = None) -> None:
        positions = self._positions()
        self.gallery.set_order(positions)
        self.gallery.label = f"{len(positions)} {self.part.value} images"
        passing = np.isin(np.arange(self._study.data.n_train), positions)
        self.scatter.shown = passing.astype(np.uint8).tobytes()
        self.take_shown.description = f"Include all {passing.sum():,} shown"
        self.take_shown.disabled = not passing.any()

    def _replot(self, _: object = None) -> None:
        names = (self.across.value, self.up.value)
        self.scatter.set_columns(*(self._known[name][: self._study.data.n_train] for name in names), names)


def _slider(name: str, values: np.ndarray) -> w.FloatRangeSlider:
    low = float(np.floor(np.nanmin(values) * 10) / 10)
    high = max(float(np.ceil(np.nanmax(values) * 10) / 10), low + 0.1)
    looks = {"step": 0.1, "readout_format": ".1f", "continuous_update": False}
    return labelled(w.FloatRangeSlider, name.capitalize(), value=(low, high), min=low, max=high, **looks)
