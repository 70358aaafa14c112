"""Sliders over the convex study's closed forms."""

from __future__ import annotations

import base64
from typing import Any, get_args

import ipywidgets as w
import numpy as np

from dmmlib.analysis.plots import png
from dmmlib.studies.convex import figures
from dmmlib.studies.convex.iterations import checkpoints, closed_form, descents, distance, match
from dmmlib.studies.convex.logistic import Trace
from dmmlib.studies.convex.settings import ConvexSettings
from dmmlib.studies.convex.synthetic import Span, synthetic_regression
from dmmlib.widgets.views import Curves, Message, labelled, row

STEPS, AXES = checkpoints(20, 8), ("steps", "distance to the oracle\n(original = 1)")


class Explorer(w.VBox):
    """Sliders, a line for what is wrong, and curves that a browser draws; where no widget can be shown, a picture."""

    def __init__(self, settings: ConvexSettings) -> None:
        self.settings, self.message = settings, Message()
        self.view = Curves(steps=STEPS.astype(np.float32).tobytes())
        size, largest = settings.forget_size, max(settings.forget_size, settings.n // 4)
        condition = {"value": settings.condition, "min": 1, "max": 6, "step": 0.25}
        self.controls: dict[str, Any] = {
            "condition": labelled(w.FloatLogSlider, "condition number", **condition),
            "forget_size": labelled(w.IntSlider, "|F|", value=size, min=1, max=largest),
            "relative_step": labelled(w.FloatSlider, "step, in 1 / L", value=1.0, min=0.1, max=2.1, step=0.1),
            "span": labelled(w.Dropdown, "F spans", value="weak", options=get_args(Span)),
        }
        self.redraw()
        for control in self.controls.values():
            control.observe(self.message.guarded(self.redraw), names="value")
        super().__init__([row(*self.controls.values()), self.message, self.view])
        self.add_class("dmm-widget")

    def redraw(self, _: object = None) -> None:
        """Show the distance to the oracle against steps, in closed form; the last stays where PresetError is raised."""
        condition, size, step, span = (control.value for control in self.controls.values())
        n, d = self.settings.n, self.settings.dim
        case = synthetic_regression(n, d, condition, size, span=span)
        problem = case.problem
        first_order = problem.theta + problem.effects(case.forget)["first-order influence"]
        methods = [*descents(case, step).values(), match("DMM, first order", problem.x, problem.x @ first_order, step)]
        traces = {method.name: Trace(STEPS, closed_form(method, problem.theta, STEPS)) for method in methods}
        lines = {
            panel: {name: distance(trace.path, case.oracle, x) for name, trace in traces.items()}
            for panel, x in figures.points(case).items()
        }
        title = f"F's largest leverage: {problem.leverage(case.forget):.3g}"
        caption = f"n = {n:,}, d = {d}, condition number {condition:,.0f}, |F| = {size} ({span} directions)"
        caption += f", step {step:g} / L"
        self.drawn = case, traces, title, caption
        self.view.show(lines, figures.STYLE, title=title, caption=caption, axes=AXES)

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        still = {"image/png": base64.b64encode(png(figures.explored(*self.drawn))).decode()}
        return {**super()._repr_mimebundle_(**options), **still}, {"image/png": {"alt": self.view.label}}
