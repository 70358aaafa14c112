"""Sizes of the study of cheap attribution; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from dmmlib.presets import Section, study

Size = Annotated[int, Field(ge=3)]  # fewer subset models cannot be fitted to
Share = Annotated[float, Field(gt=0, lt=1)]


@study("cheap")
class CheapSettings(Section):
    """Every number of notebook 07 that the study's own sections do not have."""

    # subset models that Bayesian datamodels are fitted to; as many are trained as the largest number asks for
    sizes: tuple[Size, ...] = Field(default=(25, 50, 100, 250, 1000), min_length=1)
    n_draws: int = Field(default=3, ge=2)  # independent draws of subset models: at most so many for each size
    n_kernel: PositiveInt = 20  # linearised models: the first of a draw
    n_ablation: PositiveInt = 10  # linearised models in the ablation
    linearised: tuple[PositiveInt, ...] = (5, 20)  # other numbers of them that the ablation tries
    penalties: tuple[PositiveFloat, ...] = (0.002, 0.02)  # and other penalties,
    ranks: tuple[PositiveInt, ...] = (100,)  # and ranks
    fractions: tuple[Share, ...] = (0.5, 0.9)  # of S in a subset: what the ablation tries besides the preset's
    n_clusters: PositiveInt = 50  # of training points whose effects are alike, for clustered subsets
