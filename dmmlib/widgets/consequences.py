"""What forgetting the choice would do: accuracies and margins, and the images whose answers change most."""

from __future__ import annotations

from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd

from dmmlib.errors import DmmError
from dmmlib.study import Study
from dmmlib.widgets import preview as previews
from dmmlib.widgets.selection import Selection
from dmmlib.widgets.views import Gallery, row, text

N_CHANGES = 24  # changed answers shown


class Consequences(w.VBox):
    """Predicted accuracies and margins, and the images whose answers change most; `preview` is the prediction."""

    def __init__(self, study: Study, selection: Selection, measured: pd.DataFrame | None) -> None:
        self._study, self._selection, self.measured, data = study, selection, measured, study.data
        logits = study.original_logits()[: previews.N_ORIGINALS]
        self._previewer = previews.Previewer(study.attributor(), logits, data.y, data.n_train)
        self._usual = None if measured is None else self._previewer.usual()
        self.preview: previews.Preview | None = None
        self.outcome, self.notes = w.HTML(), w.HTML()
        self.which = w.ToggleButtons(options=["images that stay", "forgotten images"])
        self.which.observe(self._show_changes, names="value")
        self.changed = Gallery(data.x, self._change, rows=2, width=104, selectable=False)
        self.changed.label, self.changed.empty = "Answers that change most", "No answer changes."
        heads = ("If these images had never been seen", self.changed.label)
        first, second = (w.HTML(text("heading", head, "h4")) for head in heads)
        share = w.HTML(text("quiet", "Δ: share of an image's probability that moves to other classes", "span"))
        super().__init__([first, self.outcome, row(second, self.which), self.changed, share, self.notes])
        self.add_class("dmm-consequences")

    def refresh(self) -> previews.Preview | None:
        """Predict what forgetting the choice would do, and show it, beside what retraining did where that is known."""
        indices, self.notes.value = self._selection.indices, ""
        try:
            self.preview = self._previewer.preview(indices)
        except DmmError as error:
            self.preview = None
            words = str(error) if len(indices) else "Choose images to see what forgetting them would do."
            self.outcome.value = text("outcome dmm-quiet", words)
        else:
            self.outcome.value = self._said(self.preview, self._retrained(indices))
        self._show_changes()
        return self.preview

    def _retrained(self, indices: np.ndarray) -> pd.DataFrame | None:
        """What retraining really gives, if the choice is a set whose oracles are there."""
        for known in previews.saved_sets(self._study):
            if np.array_equal(known.indices, indices) and self._study.has_oracles(known):
                margins, correct = (values.mean(0) for values in self._study.reference(known))
                return previews.outcomes(
                    margins, correct, known.splits(self._study.data.n_train, self._study.data.n_val)
                )
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
        said = "".join(text("quiet", line, "p") for line in lines if line)
        self.notes.value = f"<details><summary>How sure, how unusual, at what cost</summary>{said}</details>"
        return f'<div class="dmm-outcome">{shown}{text("notice", warning, role="note") if warning else ""}</div>'

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
