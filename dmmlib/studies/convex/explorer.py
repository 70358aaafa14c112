"""Sliders over the closed forms."""

from __future__ import annotations

import base64
import html
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from dmmlib.analysis.plots import png
from dmmlib.errors import PresetError
from dmmlib.studies.convex import figures
from dmmlib.studies.convex.iterations import baselines, match, matchers
from dmmlib.studies.convex.ridge import effects, leverage
from dmmlib.studies.convex.settings import ConvexSettings
from dmmlib.studies.convex.synthetic import Span, synthetic


def draw(settings: ConvexSettings, condition: float, forget_size: int, relative_step: float, span: Span) -> Figure:
    """Distance to the oracle against steps for one synthetic problem, in closed form.

    Raises:
        PresetError: for values that make no problem, or a step beyond 2 / L.
    """
    case = synthetic(settings.n, settings.dim, condition, forget_size, span=span)
    problem = case.problem
    first_order = problem.theta + effects(problem, case.forget).first_order
    predicted = match("DMM, first order", problem.x, problem.x @ first_order, relative_step)
    methods = [*baselines(case, relative_step), *matchers(case, relative_step=relative_step), predicted]
    return figures.explored(
        case,
        methods,
        20,
        f"F's largest leverage: {leverage(problem, case.forget):.3g}",
        f"n = {settings.n:,}, d = {settings.dim}, condition number {condition:,.0f}, "
        f"|F| = {forget_size} ({span} directions), step {relative_step:g} / L",
    )


class Explorer(widgets.VBox):
    """Sliders, a line for what is wrong, and a picture. Where no widget can be shown, the picture remains."""

    def __init__(self, settings: ConvexSettings) -> None:
        style = {"style": {"description_width": "9em"}, "layout": {"width": "26em"}}
        self.controls = {
            "condition": widgets.FloatLogSlider(
                value=settings.condition, description="condition number", min=1, max=6, step=0.25, **style
            ),
            "forget_size": widgets.IntSlider(
                value=settings.forget_size, description="|F|", min=1, max=settings.n // 4, **style
            ),
            "relative_step": widgets.FloatSlider(
                value=1.0, description="step, in 1 / L", min=0.1, max=2.1, step=0.1, **style
            ),
            "span": widgets.Dropdown(
                value="weak", description="F spans", options=["weak", "random", "strong"], **style
            ),
        }
        self.settings = settings
        self.message, self.picture = widgets.HTML(), widgets.Image(format="png")
        for control in self.controls.values():
            control.observe(self.redraw, names="value")
        self.redraw()
        rows = [widgets.HBox(list(self.controls.values())[i : i + 2]) for i in (0, 2)]
        super().__init__([*rows, self.message, self.picture])

    def redraw(self, _: object = None) -> None:
        try:
            figure = draw(self.settings, **{name: control.value for name, control in self.controls.items()})
        except PresetError as error:  # the last good picture stays
            self.message.value = f"<b>{html.escape(str(error))}</b>"
        else:
            self.picture.value, self.message.value = png(figure), ""

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        image = base64.b64encode(self.picture.value).decode()
        return {**super()._repr_mimebundle_(**options), "image/png": image}
