"""Sliders over the closed forms."""

from __future__ import annotations

import base64
import html
from typing import Any, get_args

import ipywidgets as widgets

from dmmlib.analysis.plots import png
from dmmlib.errors import PresetError
from dmmlib.studies.convex import figures
from dmmlib.studies.convex.iterations import descents, match
from dmmlib.studies.convex.settings import ConvexSettings
from dmmlib.studies.convex.synthetic import Span, synthetic_regression


class Explorer(widgets.VBox):
    """Sliders, a line for what is wrong, and a picture. Where no widget can be shown, the picture remains."""

    def __init__(self, settings: ConvexSettings) -> None:
        self.settings = settings
        largest = max(settings.forget_size, settings.n // 4)
        self.controls: dict[str, Any] = {
            "condition": widgets.FloatLogSlider(settings.condition, min=1, max=6, step=0.25),
            "forget_size": widgets.IntSlider(settings.forget_size, min=1, max=largest),
            "relative_step": widgets.FloatSlider(1.0, min=0.1, max=2.1, step=0.1),
            "span": widgets.Dropdown(value="weak", options=get_args(Span)),
        }
        descriptions = ("condition number", "|F|", "step, in 1 / L", "F spans")
        for control, description in zip(self.controls.values(), descriptions, strict=True):
            control.description = description
            control.style, control.layout = {"description_width": "9em"}, {"width": "26em"}
            control.observe(self.redraw, names="value")
        self.message, self.picture = widgets.HTML(), widgets.Image(format="png")
        self.redraw()
        rows = [widgets.HBox(list(self.controls.values())[i : i + 2]) for i in (0, 2)]
        super().__init__([*rows, self.message, self.picture])

    def redraw(self, _: object = None) -> None:
        """Draw the distance to the oracle against steps, in closed form, or say what is wrong with the sliders."""
        condition, forget_size, step, span = (control.value for control in self.controls.values())
        n, d = self.settings.n, self.settings.dim
        try:
            case = synthetic_regression(n, d, condition, forget_size, span=span)
            methods = descents(case, step)
        except PresetError as error:  # the last good picture stays
            self.message.value = f"<b>{html.escape(str(error))}</b>"
            return
        problem = case.problem
        first_order = problem.theta + problem.effects(case.forget)["first-order influence"]
        figure = figures.explored(
            case,
            [*methods.values(), match("DMM, first order", problem.x, problem.x @ first_order, step)],
            f"F's largest leverage: {problem.leverage(case.forget):.3g}",
            f"n = {n:,}, d = {d}, condition number {condition:,.0f}, |F| = {forget_size} ({span} directions), "
            f"step {step:g} / L",
        )
        self.picture.value, self.message.value = png(figure), ""

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        image, alt = (
            base64.b64encode(self.picture.value).decode(),
            "Distance to the oracle against steps, for each method",
        )
        return {**super()._repr_mimebundle_(**options), "image/png": image}, {"image/png": {"alt": alt}}
