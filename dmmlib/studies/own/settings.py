"""Sizes of the example of a model of one's own; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from dmmlib.presets import Section, study


@study("own")
class OwnSettings(Section):
    """Every number of notebook 11."""

    data: str = "shapes"  # a data set's name, or a path that `Recipe` takes
    n_train: PositiveInt = 2400  # images to train on
    n_val: PositiveInt = 600
    epochs: PositiveInt = 10
    n_subsets: int = Field(default=100, ge=10)  # subset models
    n_forget: PositiveInt = 30  # images that the first request names
    n_requests: PositiveInt = 4  # further requests, of five images each
    n_retrained: int = Field(default=10, ge=10)  # models retrained for comparison
