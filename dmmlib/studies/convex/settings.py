"""Settings of the convex study, notebook 01."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dmmlib.presets import Section, Several, Side, study

Condition = Annotated[float, Field(ge=1)]
Doublings = Annotated[int, Field(ge=1, le=24)]


@study("convex")
class ConvexSettings(Section):
    """Sizes of the problems of notebook 01, and how far its methods are followed."""

    # synthetic regressions
    n: PositiveInt = 500  # training points
    dim: Several = 20  # features
    condition: Condition = 1e4  # condition number of the retain set's Hessian where it is not varied
    conditions: tuple[Condition, ...] = Field((1e1, 1e2, 1e3, 1e4, 1e5, 1e6), min_length=2)  # in the figure of costs
    forget_size: PositiveInt = 12  # |F| where it is not varied
    group_sizes: tuple[PositiveInt, ...] = Field((1, 2, 5, 10, 20, 50, 100, 200), min_length=2)  # |F| where it grows
    noise: NonNegativeFloat = 0.5  # standard deviation of the labels' noise
    log2_steps: Doublings = 17  # methods are followed for 2 ** log2_steps steps
    n_chains: PositiveInt = 64  # independent runs of each stochastic method
    n_subset_models: Several = 2000  # models behind the regression datamodel

    # regressions on images
    image_n: Several = 1000  # training images
    image_side: Side = 5  # side of an image after average pooling
    image_ridge: PositiveFloat = 1.0  # ridge of both regressions
    image_log2_steps: Doublings = 13  # methods are followed for 2 ** image_log2_steps steps

    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> ConvexSettings:
        largest = max(self.forget_size, *self.group_sizes)
        if largest > self.n - self.dim:
            raise ValueError(
                f"a forget set of {largest} of n={self.n} points leaves too few for dim={self.dim} features; "
                f"give forget_size and group_sizes of at most n - dim = {self.n - self.dim}"
            )
        if largest >= self.image_n:
            raise ValueError(
                f"a forget set of {largest} leaves none of image_n={self.image_n} images; give more images"
            )
        if list(self.group_sizes) != sorted(set(self.group_sizes)):
            raise ValueError(f"group_sizes are {self.group_sizes}; give sizes that grow")
        return self
