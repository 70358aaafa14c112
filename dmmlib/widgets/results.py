"""From a bad number to the image behind it: the points of a finished run, sorted by KLoM."""

from __future__ import annotations

import base64
import html
from typing import Any

import ipywidgets as w
import numpy as np

from dmmlib import metrics
from dmmlib.analysis import plots
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study
from dmmlib.widgets.views import Gallery, labelled, row


class Results(w.VBox):
    """A gallery of a forget set's points, worst KLoM first, and the current point's margins over models.

    Args:
        study: with the set's results; what is not there yet is computed.
        forget_set: whose results; `kloms` has the KLoM (n_points,) of each method.
    """

    def __init__(self, study: Study, forget_set: ForgetSet) -> None:
        self.study, self.forget_set = study, forget_set
        methods = ["do_nothing", *(m for m in study.preset.unlearning.methods if m not in ("do_nothing", "retrain"))]
        self._oracles = study.reference(forget_set)[0]
        self._margins = {m: study.unlearned(m, forget_set).margins for m in methods}
        self.kloms = {m: metrics.klom(margins, self._oracles) for m, margins in self._margins.items()}
        self._splits = forget_set.splits(study.data.n_train, study.data.n_val)

        names, first = [(plots.label(m), m) for m in methods], "dmm" if "dmm" in methods else methods[0]
        self.method = labelled(w.Dropdown, "KLoM of", options=names, value=first)
        self.split = labelled(w.Dropdown, "Points", options=plots.SPLITS)
        self.order = labelled(w.Dropdown, "Sort", options=[("worst first", True), ("best first", False)])
        self.gallery = Gallery(study.data.x, self._caption, rows=2, selectable=False)
        self.histogram = w.HTML()
        super().__init__([row(self.method, self.split, self.order), self.gallery, self.histogram])
        self.add_class("dmm-widget")
        for control in (self.method, self.split, self.order):
            control.observe(self._sort, names="value")
        self.gallery.observe(self._draw, names="focus")
        self._sort()

    def _caption(self, point: int) -> tuple[str, str]:
        data = self.study.data
        return data.class_names[data.y[point]], f"#{point} · {self.kloms[self.method.value][point]:.1f}"

    def ranked(self) -> np.ndarray:
        """Return the positions of the points of the split, by KLoM of the method."""
        points = self._splits[self.split.value]
        values = self.kloms[self.method.value][points]
        return points[np.argsort(-values if self.order.value else values, kind="stable")]

    def _sort(self, _: object = None) -> None:
        points, method = self.ranked(), plots.label(self.method.value)
        way = "worst" if self.order.value else "best"
        self.gallery.recaption()
        self.gallery.set_order(points)
        self.gallery.label = f"{len(points)} {self.split.value} images by KLoM of {method}, {way} first"
        self.gallery.focus = int(points[0])
        self._draw()

    def _draw(self, _: object = None) -> None:
        image = base64.b64encode(self.picture()).decode()
        kloms = ", ".join(f"{plots.label(m)} {values[self.gallery.focus]:.1f}" for m, values in self.kloms.items())
        source, alt = f"data:image/png;base64,{image}", html.escape(f"KLoM: {kloms}")
        self.histogram.value = f'<img class="dmm-figure" src="{source}" alt="{alt}">'

    def picture(self) -> bytes:
        """Draw the current point's margins over oracles, originals and, in a panel each, methods: a PNG."""
        data, point, n = self.study.data, self.gallery.focus, len(self._oracles)
        here = {m: margins[:, point] for m, margins in self._margins.items()}
        ranked = sorted(here, key=lambda m: self.kloms[m][point])
        panels = []
        for m in ("do_nothing", *(m for m in ranked if m != "do_nothing")):
            groups = {"retrain": self._oracles[:, point], "do_nothing": here["do_nothing"], m: here[m]}
            panels.append((f"{plots.label(m)}: KLoM {self.kloms[m][point]:.1f}", groups))
        title = f"#{point} {data.class_names[data.y[point]]}: {plots.label(ranked[0])} comes nearest to retraining"
        about = f"margins over N = {n} models of each kind; filled: oracles, grey line: originals."
        return plots.png(plots.margin_histograms(panels, title, f"{self.forget_set.name}; {about}"), dpi=80)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**options), "image/png": base64.b64encode(self.picture()).decode()}
