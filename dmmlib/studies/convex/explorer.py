"""Sliders over the closed forms."""

from __future__ import annotations

import base64
import html
from typing import Any, get_args

import ipywidgets as widgets
from matplotlib.figure import Figure

from dmmlib.analysis.plots import png
from dmmlib.errors import PresetError
from dmmlib.studies.convex import figures
from dmmlib.studies.convex.iterations import descents, match
from dmmlib.studies.convex.settings import ConvexSettings
from dmmlib.studies.convex.synthetic import Span, synthetic_regression


def draw(settings: ConvexSettings, condition: float, forget_size: int, relative_step: float, span: Span) -> Figure:
    """Draw the distance to the oracle against steps for one synthetic problem, in closed form.

    Raises:
        PresetError: for values that make no problem, or a step beyond 2 / L.
    """
    case = synthetic_regression(settings.n, settings.dim, condition, forget_size, span=span)
    problem = case.problem
    first_order = problem.theta + problem.effects(case.forget)["first-order influence"]
    predicted = match("DMM, first order", problem.x, problem.x @ first_order, relative_step)
    return figures.explored(
        case,
        [*descents(case, relative_step).values(), predicted],
        f"F's largest leverage: {problem.leverage(case.forget):.3g}",
        f"n = {settings.n:,}, d = {settings.dim}, condition number {condition:,.0f}, "
        f"|F| = {forget_size} ({span} directions), step {relative_step:g} / L",
    )


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
        """Draw the picture of what the sliders say, or say what is wrong with it."""
        try:
            figure = draw(self.settings, **{name: control.value for name, control in self.controls.items()})
        except PresetError as error:  # the last good picture stays
            self.message.value = f"<b>{html.escape(str(error))}</b>"
        else:
            self.picture.value, self.message.value = png(figure), ""

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        image = base64.b64encode(self.picture.value).decode()
        return {**super()._repr_mimebundle_(**options), "image/png": image}
