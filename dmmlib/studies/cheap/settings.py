"""Sizes of the study of cheap attribution; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from dmmlib.jobs import Job
from dmmlib.presets import Preset, Section, study

Size = Annotated[int, Field(ge=3)]  # fewer subset models cannot be fitted to


@study("cheap")
class CheapSettings(Section):
    """Every number of notebook 07 that the study's own sections do not have."""

    # subset models that Bayesian datamodels are fitted to; as many are trained as the largest number asks for
    sizes: tuple[Size, ...] = Field(default=(25, 50, 100, 250, 500), min_length=1)
    n_draws: int = Field(default=5, ge=2)  # independent draws of subset models: at most so many for each size
    n_kernel: int = Field(default=20, ge=2)  # linearised models: the first of a draw
    linearised: tuple[PositiveInt, ...] = (5, 10)  # other numbers of them that the ablation tries


def jobs(preset: Preset, n_train: int) -> Iterator[Job]:
    """List the further subset models that notebook 07 trains."""
    section = preset.attribution
    if (more := max(preset.studies["cheap"].sizes) - section.n_subsets) > 0:
        yield Job("stage 07: more of attribution", round(section.fraction * n_train), {"attribution:more": more})
