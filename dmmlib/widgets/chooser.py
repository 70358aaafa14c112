"""Choose a forget set by looking, see what forgetting it would do, save it, and run it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import partial
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd
from scipy.special import expit

from dmmlib import forget_ids, forget_sets, metrics
from dmmlib.analysis import plots
from dmmlib.datamodels import Indices
from dmmlib.errors import DmmError, ForgetSetError
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study
from dmmlib.widgets import preview as previews
from dmmlib.widgets.batch import Saving, Trial
from dmmlib.widgets.selection import Known, Selection, memorisation, shown
from dmmlib.widgets.views import Gallery, Message, Scatter, labelled, row, text

N_CHANGES = 24  # changed answers shown
N_STILL = 14  # images in each row of the still picture


def influences(study: Study, point: int) -> np.ndarray:
    """Compute how every training point acts on the margin of one: its row (n_train,) of the datamodel matrix."""
    return study.plain_datamodel().adjoint(study.subset_margins([point]).T)[0]


class Chooser(w.VBox):
    """A forget set under construction; where no widget can be shown, a picture of the choice remains.

    `selection` holds it and may be changed from code; `preview` is the last prediction, `measured` how far off
    predictions are (see `preview.measure`). The panels are `look`, `consequences`, `saving` and `trial`.

    Args:
        study: trained as far as it has to be.
        start: chosen to begin with.
        trust: measure the prediction's error against the size of a set, once (trains 4 x 20 models).
    """

    def __init__(self, study: Study, start: ForgetSet | None = None, trust: bool = True) -> None:
        self.study, data = study, study.data
        masks, outputs = study.subsets()
        margins, unknown = metrics.margins(study.original_logits(), data.y), np.full(data.n_val, np.nan)
        each = {"margin": margins, "confidence": expit(margins), "loss": np.logaddexp(0, -margins)}
        self.known = {name: values.mean(0) for name, values in each.items()}
        self.known["memorisation"] = np.concatenate([memorisation(masks, outputs, data.y_train), unknown])
        self.known |= {f"PC {k + 1}": column for k, column in enumerate(study.loadings().T)}
        self.measured = previews.measure(study) if trust else None

        self.selection = selection = Selection(data.n_train, start.indices if start else ())
        self.message, self.status = Message(), w.HTML()
        self.undo = self.message.button("Undo", selection.undo, "Take the last change back (Ctrl+Z)", icon="undo")
        self.clear = self.message.button("Clear", selection.clear, "Choose nothing", icon="times")
        self.look = Look(study, self.known, selection, self.message, self.refresh)
        self.consequences = Consequences(study, selection, self.measured)
        self.saving = Saving(study, selection, self.message, start.name if start else "my_set", self.refresh)
        self.trial = Trial(study, self.message, self.saving.save, self.refresh)
        header = row(self.status, self.undo, self.clear, kind="header")
        super().__init__([header, self.message, self.look, self.consequences, self.saving, self.trial])
        self.add_class("dmm-widget")
        self._views = (self.look.gallery, self.look.scatter, self.consequences.changed)
        for view in self._views:
            view.observe(self._focus, names="focus")
        selection.on_change.append(self._show_selection)
        self._show_selection()
        self.refresh()

    def refresh(self) -> None:
        """Predict what forgetting the choice would do, and show it."""
        self.preview = self.consequences.refresh(self.saving.name.value)
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
        self.undo.disabled, self.clear.disabled = not self.selection.past, not len(self.selection)
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

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**options), "image/png": base64.b64encode(self.picture()).decode()}


class Look(w.VBox):
    """Shows points by what is known of them, and changes the selection; `settled` is called when the user pauses."""

    def __init__(
        self, study: Study, known: Known, selection: Selection, message: Message, settled: Callable[[], None]
    ) -> None:
        self._study, self._known, self._selection, data = study, known, selection, study.data
        changes = (("toggle", selection.toggle), ("lasso", self._lasso), ("undo", selection.undo))
        hear = {"settled": settled} | {kind: message.guarded(do) for kind, do in changes}
        self.gallery, self.scatter = Gallery(data.x, self.caption, hear), Scatter(data, self.caption, hear)

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
        picks: dict[str, tuple[Callable[[], None], str]] = {
            "most helpful": (partial(self._influential, 1), "Images that hold the current image's answer up"),
            "most harmful": (partial(self._influential, -1), "Images that pull the current image's answer down"),
            "nearest": (self._nearest, "The current image and those most like it, pixel by pixel"),
            "random": (self._random, "At random, of those not chosen"),
        }
        self.picks = {name: message.button(name, do, tip) for name, (do, tip) in picks.items()}
        self.paste = labelled(w.Text, "Indices", placeholder="indices, e.g. 3, 14, 15")
        self.include = message.button("Include", self._paste, "Add these indices")
        self.upload = w.FileUpload(
            description="Upload", accept=".json,.txt,.csv", multiple=True, tooltip="A set, indices"
        )

        for control in (self.part, self.label, self.sort, *self.ranges.values()):
            control.observe(self._refilter, names="value")
        for axis in (self.across, self.up):
            axis.observe(self._replot, names="value")
        self.upload.observe(message.guarded(self._uploaded), names="value")
        sure = w.HTML(text("quiet", "%: how sure the originals are", "span"))
        images = w.VBox([self.gallery, row(self.take_shown, sure)])
        plane = w.VBox([self.scatter, row(self.across, self.up, self.lasso)])
        filters = [row(self.part, self.label, self.sort), row(*self.ranges.values())]
        take = [row(self.target, self.k, *self.picks.values()), row(self.paste, self.include, self.upload)]
        super().__init__([*filters, row(images, plane, kind="columns"), *take])
        self._replot()

    def caption(self, point: int) -> tuple[str, str]:
        """Return title and detail of a point: its class, its index, and how sure the originals are of it."""
        data = self._study.data
        return data.class_names[data.y[point]], f"#{point} · {self._known['confidence'][point]:.0%}"

    def _lasso(self, indices: Indices, remove: bool) -> None:
        takes_out = remove or self.lasso.value == "lasso −"
        (self._selection.remove if takes_out else self._selection.add)(indices)

    def _take_shown(self) -> None:
        positions = self._positions()
        self._selection.add(positions[positions < self._study.data.n_train])

    def _current(self) -> int:
        if self.gallery.focus < 0:
            raise ForgetSetError("No image is current; click one, or move to it with the arrow keys, first.")
        return self.gallery.focus

    def _influential(self, sign: int) -> None:
        scores = sign * influences(self._study, self._current())
        skip = np.append(self._selection.indices, self._current())
        self._selection.add(forget_sets.highest(scores, self.k.value, skip))

    def _nearest(self) -> None:
        features = self._study.features
        skip = np.append(self._selection.indices, np.arange(self._study.data.n_train, len(features)))
        self._selection.add(forget_sets.nearest(features, self._current(), self.k.value, skip))

    def _random(self) -> None:
        rng = np.random.default_rng()
        self._selection.add(forget_sets.random(self._study.data, self.k.value, rng, self._selection.indices))

    def _paste(self) -> None:
        self._selection.add(forget_ids.read(self.paste.value, self._study.data))
        self.paste.value = ""

    def _uploaded(self, change: Any) -> None:
        for file in change["new"]:
            content = bytes(file["content"]).decode("utf-8", errors="replace")
            self._selection.add(forget_ids.read(content, self._study.data, file["name"]))

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


class Consequences(w.Box):
    """Predicted accuracies and margins, and the images whose answers change most; `preview` is the prediction."""

    def __init__(self, study: Study, selection: Selection, measured: pd.DataFrame | None) -> None:
        self._study, self._selection, self.measured, data = study, selection, measured, study.data
        logits = study.original_logits()[: previews.N_ORIGINALS]
        self._previewer = previews.Previewer(study.attributor(), logits, data.y, data.n_train)
        self._usual = None if measured is None else self._previewer.usual()
        self.preview: previews.Preview | None = None
        self.outcome = w.HTML()
        self.which = w.ToggleButtons(options=["images that stay", "forgotten images"])
        self.which.observe(self._show_changes, names="value")
        self.changed = Gallery(data.x, self._change, rows=2, width=104, selectable=False)
        self.changed.label, self.changed.empty = "Answers that change most", "No answer changes."
        heads = ("If these images had never been seen", self.changed.label)
        first, second = (w.HTML(text("heading", head, "h4")) for head in heads)
        share = w.HTML(text("quiet", "Δ: share of an image's probability that moves to other classes", "span"))
        super().__init__([w.VBox([first, self.outcome]), w.VBox([row(second, self.which), self.changed, share])])
        for kind in ("columns", "consequences"):
            self.add_class(f"dmm-{kind}")

    def refresh(self, name: str) -> previews.Preview | None:
        """Predict what forgetting the choice would do, and show it, beside what oracles of its name do."""
        indices = self._selection.indices
        try:
            self.preview = self._previewer.preview(indices)
        except DmmError as error:
            self.preview = None
            words = str(error) if len(indices) else "Choose images to see what forgetting them would do."
            self.outcome.value = text("outcome dmm-quiet", words)
        else:
            self.outcome.value = self._said(self.preview, self._retrained(indices, name))
        self._show_changes()
        return self.preview

    def _retrained(self, indices: np.ndarray, name: str) -> pd.DataFrame | None:
        """What retraining really gives, if the choice is a set whose oracles are there."""
        data = self._study.data
        for known in (*self._study.forget_sets().values(), forget_sets.make(name, indices, data)):
            if np.array_equal(known.indices, indices) and self._study.has_oracles(known):
                margins, correct = (values.mean(0) for values in self._study.reference(known))
                return previews.outcomes(margins, correct, known.splits(data.n_train, data.n_val))
        return None

    def _said(self, preview: previews.Preview, retrained: pd.DataFrame | None) -> str:
        columns = {"now": preview.before, "predicted": preview.after, "retrained": retrained}
        columns = {name: column for name, column in columns.items() if column is not None}
        table = pd.concat(columns, axis=1).swaplevel(axis=1)[["accuracy", "margin"]]
        formats: list[Any] = ["{:.1%}".format] * len(columns) + ["{:.2f}".format] * len(columns)
        shown = table.rename(columns={"margin": "mean margin"}).to_html(border=0, formatters=formats)
        warning = previews.warning(self.measured, preview.size)
        cost = previews.cost(self._study, preview.size)
        lines = (previews.uncertainty(preview), previews.beyond_usual(self._usual, preview), cost)
        said = [text("notice", warning, role="note")] if warning else []
        said += [text("quiet", line, "p") for line in lines if line]
        return f'<div class="dmm-outcome">{shown}{"".join(said)}</div>'

    def _change(self, point: int) -> tuple[str, str]:
        """Title and detail of a changed answer."""
        if self.preview is None:
            return "", f"#{point}"
        data, old, new = self._study.data, self.preview.old[point], self.preview.new[point]
        answer = " → ".join(data.class_names[c] for c in ([old] if old == new else [old, new]))
        return answer, f"#{point}{'' if point < data.n_train else ' val'} · Δ {self.preview.distance[point]:.0%}"

    def _show_changes(self, _: object = None) -> None:
        forget, points = self._selection.indices, np.arange(len(self._study.data.y))
        among = forget if self.which.value == "forgotten images" else np.setdiff1d(points, forget)
        self.changed.recaption()
        self.changed.set_order(points[:0] if self.preview is None else self.preview.most_changed(N_CHANGES, among))
