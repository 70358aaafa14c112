"""From a bad number to the image behind it: the points of a finished run, sorted by KLoM."""

from __future__ import annotations

import base64
from typing import Any

import ipywidgets as w
import numpy as np

from dmmlib import metrics
from dmmlib.analysis import plots
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study
from dmmlib.widgets.views import Gallery


class Results(w.VBox):
    """A gallery of a forget set's points, worst KLoM first, and the current point's margins over models.

    Args:
        study: with the set's results; what is not there yet is computed.
        forget_set: whose results.
    """

    def __init__(self, study: Study, forget_set: ForgetSet) -> None:
        self.study, self.forget_set = study, forget_set
        methods = ["do_nothing", *(m for m in study.preset.unlearning.methods if m not in ("do_nothing", "retrain"))]
        self._oracles = study.reference(forget_set)[0]
        self._margins = {m: study.unlearned(m, forget_set).margins for m in methods}
        self.kloms = {m: metrics.klom(margins, self._oracles) for m, margins in self._margins.items()}
        self._splits = forget_set.splits(study.data.n_train, study.data.n_val)

        options: dict[str, Any] = {"style": {"description_width": "initial"}}
        first = "dmm" if "dmm" in methods else methods[0]
        self.method = w.Dropdown(
            options=[(plots.label(m), m) for m in methods], value=first, description="KLoM of", **options
        )
        self.split = w.Dropdown(options=plots.SPLITS, description="Points", **options)
        self.order = w.Dropdown(options=[("worst first", True), ("best first", False)], description="Sort", **options)
        self.gallery = Gallery(study.data.x, self._caption, rows=2, selectable=False)
        self.histogram = w.HTML()
        controls = w.Box([self.method, self.split, self.order])
        controls.add_class("dmm-row")
        super().__init__([controls, self.gallery, self.histogram])
        self.add_class("dmm-widget")
        for control in (self.method, self.split, self.order):
            control.observe(self._sort, names="value")
        self.gallery.observe(self._draw, names="focus")
        self._sort()

    def _caption(self, point: int) -> tuple[str, str]:
        data = self.study.data
        return data.class_names[data.y[point]], f"#{point} · {self.kloms[self.method.value][point]:.1f}"

    def ranked(self) -> np.ndarray:
        """Positions of the points of the split, by KLoM of the method."""
        points = self._splits[self.split.value]
        values = self.kloms[self.method.value][points]
        return points[np.argsort(-values if self.order.value else values, kind="stable")]

    def _sort(self, _: object = None) -> None:
        points = self.ranked()
        self.gallery.recaption(self._caption)
        self.gallery.set_order(points)
        self.gallery.label = (
            f"{len(points)} {self.split.value} images by KLoM of {plots.label(self.method.value)}, "
            f"{'worst' if self.order.value else 'best'} first"
        )
        self.gallery.focus = int(points[0])
        self._draw()

    def _draw(self, _: object = None) -> None:
        point = self.gallery.focus
        image = base64.b64encode(self.picture(point)).decode()
        text = ", ".join(f"{plots.label(m)} {k[point]:.1f}" for m, k in self.kloms.items())
        self.histogram.value = f'<img class="dmm-figure" src="data:image/png;base64,{image}" alt="KLoM: {text}">'

    def picture(self, point: int) -> bytes:
        """A PNG of the histograms of one point's margins: oracles, originals and a method a panel."""
        data = self.study.data
        panels = []
        for m in sorted(self.kloms, key=lambda m: (m != "do_nothing", self.kloms[m][point])):  # then the best first
            values = self._margins[m]
            title = f"{plots.label(m)}: KLoM {self.kloms[m][point]:.1f}"
            groups = {"retrain": self._oracles, "do_nothing": self._margins["do_nothing"], m: values}
            panels.append((title, {name: margins[:, point] for name, margins in groups.items()}))
        best = min(self.kloms, key=lambda m: self.kloms[m][point])
        figure = plots.margin_histograms(
            panels,
            f"#{point} {data.class_names[data.y[point]]}: {plots.label(best)} comes nearest to retraining",
            f"{self.forget_set.name}; margins over N = {len(self._oracles)} models of each kind; filled: oracles, grey "
            "line: originals.",
        )
        return plots.png(figure, dpi=80)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        image = base64.b64encode(self.picture(self.gallery.focus)).decode()
        return {**super()._repr_mimebundle_(**options), "image/png": image}
