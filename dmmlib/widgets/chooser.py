"""Choose a forget set by looking, see what forgetting it would do, save it, and run it."""

from __future__ import annotations

import base64
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd

from dmmlib import forget_sets, metrics
from dmmlib.analysis import plots
from dmmlib.errors import DmmError
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study
from dmmlib.widgets import preview as previews
from dmmlib.widgets.batch import Saving, Trial
from dmmlib.widgets.controls import Message, row, text
from dmmlib.widgets.look import Look
from dmmlib.widgets.selection import Selection, measures, memorisation
from dmmlib.widgets.views import Gallery

N_CHANGES = 24  # changed answers shown
N_STILL = 14  # images in each row of the still picture


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
        unknown = np.full(data.n_val, np.nan)
        self.known = measures(metrics.margins(study.original_logits(), data.y))
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

    @property
    def preview(self) -> previews.Preview | None:
        return self.consequences.preview

    def refresh(self) -> None:
        """Predict what forgetting the choice would do, and show it."""
        self.consequences.refresh(self.saving.name.value)
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
        self.undo.disabled, self.clear.disabled = not self.selection.can_undo, not len(self.selection)
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
            before, after = self.preview.before, self.preview.after
            moves = [f"{split} {margin:.2f} → {after.margin[split]:.2f}" for split, margin in before.margin.items()]
            title += (
                f": accuracy on them is predicted to go from {before.accuracy['forget']:.0%} to "
                f"{after.accuracy['forget']:.0%}"
            )
            caption = f"Predicted mean margins: {', '.join(moves)}"
        caption += ". A still of the widget, which needs a running kernel."
        return plots.png(plots.thumbnails(data, rows, title, caption))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**options), "image/png": base64.b64encode(self.picture()).decode()}


class Consequences(w.Box):
    """Predicted accuracies and margins, and the images whose answers change most; `preview` is the last prediction."""

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

    def refresh(self, name: str) -> None:
        """Predict what forgetting the choice would do, and show it; oracles of its `name` are looked for."""
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
        formats = ["{:.1%}".format] * len(columns) + ["{:.2f}".format] * len(columns)
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
        self.changed.recaption(self._change)
        self.changed.set_order(points[:0] if self.preview is None else self.preview.most_changed(N_CHANGES, among))
