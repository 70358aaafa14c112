"""From a bad number to the image behind it: the points of a finished run, sorted by KLoM, and their margins."""

from __future__ import annotations

import base64
from typing import Any

import ipywidgets as w
import numpy as np

from dmmlib import metrics
from dmmlib.analysis import plots
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study
from dmmlib.widgets.views import Gallery, Histograms, labelled, row, text


class Results(w.VBox):
    """A gallery of a forget set's points, worst KLoM first, and the current point's margins over models.

    The point's way stands first: the originals, models retrained without the forget set, what was predicted for them,
    and the unlearned models; then every method against retraining, in the preset's order.

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
        self._splits = study.splits(forget_set, probes=False)

        names, first = [(plots.label(m), m) for m in methods], "dmm" if "dmm" in methods else methods[0]
        self.method = labelled(w.Dropdown, "KLoM of", options=names, value=first)
        self.split = labelled(w.Dropdown, "Points", options=plots.SPLITS)
        self.order = labelled(w.Dropdown, "Sort", options=[("worst first", True), ("best first", False)])
        self.gallery = Gallery(study.data.x, self._caption, rows=2, selectable=False)
        self.title, self.histograms = w.HTML(), Histograms()
        super().__init__([row(self.method, self.split, self.order), self.gallery, self.title, self.histograms])
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
        point, here = self.gallery.focus, {m: margins[:, self.gallery.focus] for m, margins in self._margins.items()}
        kloms = {m: float(values[point]) for m, values in self.kloms.items()}
        own = [m for m in ("dm_direct", self.method.value) if m in here and m != "do_nothing"]
        names = {"do_nothing": "original", "retrain": "retrained", "dm_direct": "predicted"}
        way = [(names.get(m, plots.label(m)), m) for m in ("do_nothing", "retrain", *dict.fromkeys(own))]
        self.histograms.show(self._oracles[:, point], here, kloms, way)
        self.title.value = text("heading", self._title(), "h4")

    def _title(self) -> str:
        point, data = self.gallery.focus, self.study.data
        name, tried = f"#{point} {data.class_names[data.y[point]]}", [m for m in self.kloms if m != "do_nothing"]
        if not tried:
            return f"{name}: KLoM {self.kloms['do_nothing'][point]:.1f} if nothing is done"
        nearest = min(tried, key=lambda m: self.kloms[m][point])
        return f"{name}: {plots.label(nearest)} comes nearest to retraining"

    def picture(self) -> bytes:
        """Draw the current point's margins over oracles, originals and, in a panel each, methods: a PNG."""
        point, n = self.gallery.focus, len(self._oracles)
        groups = {"retrain": self._oracles[:, point], "do_nothing": self._margins["do_nothing"][:, point]}
        panels = [
            (f"{plots.label(m)}: KLoM {self.kloms[m][point]:.1f}", groups | {m: margins[:, point]})
            for m, margins in self._margins.items()
        ]
        about = f"margins over N = {n} models of each kind; filled: oracles, grey line: originals."
        return plots.png(plots.margin_histograms(panels, self._title(), f"{self.forget_set.name}; {about}"), dpi=80)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        still = {"image/png": base64.b64encode(self.picture()).decode()}
        return {**super()._repr_mimebundle_(**options), **still}, {"image/png": {"alt": self.histograms.label}}
