"""Settings of the study of exact unlearning, notebook 06."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dmmlib.presets import Fraction, Section, Several, Side, Some, study

Floats = Some[PositiveFloat]
Ints = Some[PositiveInt]
Share = Annotated[float, Field(gt=0, le=1)]


@study("exact")
class ExactSettings(Section):
    """Sizes of the tests, the sweeps and the comparison of notebook 06."""

    positive: Some[NonNegativeInt] = (0, 1, 2, 3, 4)  # classes labelled +1, others are -1

    # tests of exactness
    n_runs: int = Field(2000, ge=10)  # independent chains on each side
    n_permutations: PositiveInt = 499  # of the energy distance's test
    small_n: int = Field(5, ge=3)  # points
    small_side: Side = 2  # side of an image after average pooling
    small_steps: PositiveInt = 4  # SGD of these chains
    small_batch: PositiveInt = 8
    small_lr: PositiveFloat = 2.0
    small_noise: PositiveFloat = 0.3

    # sweeps of the price; the middle value stays where another varies
    price_runs: Several = 1000  # chains per setting
    price_noise: Floats = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    price_batch: Ints = (1, 4, 16, 64)
    price_n: Ints = (125, 250, 500, 1000, 2000)
    price_steps: Ints = (25, 50, 100, 200, 400)

    # comparison of methods
    side: Side = 5  # side of an image after average pooling
    n_models: Several = 100  # N, models of each kind
    forget_size: PositiveInt = 20  # |F|, images alike
    steps: PositiveInt = 100  # SGD of every first-order learner
    batch: PositiveInt = 100
    lr: float = Field(2.0, gt=0, lt=4)  # the bound on the risk holds below 4
    radius: PositiveFloat = 10.0
    noises: Floats = (0.02, 0.05, 0.1, 0.2, 0.5)  # standard deviation of each coordinate of a noisy averaged gradient
    shards: Ints = (2, 5, 10, 20)  # of SISA
    newton_noises: Floats = (0.3, 1.0, 3.0, 10.0)  # standard deviation of the linear term of the certified Newton step
    ridge: PositiveFloat = 1e-2  # lambda there, per point
    delta: Fraction = 1e-4  # of its (epsilon, delta) certificate
    n_subsets: int = Field(2000, ge=10)  # subset models behind DMM's predictions
    ridge_datamodel: PositiveFloat = 0.05  # ridge penalty of these predictions
    dmm_epochs: PositiveInt = 5  # SGD of DMM's models; by default as many sample gradients as the chains'
    dmm_batch: PositiveInt = 20
    dmm_lr: PositiveFloat = 8.0
    dmm_costs: Some[Share] = (0.02, 0.05, 0.1, 0.2, 0.4)  # shares of a retraining it spends

    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _noises_grow(self) -> ExactSettings:
        for name in ("price_noise", "noises"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}; give noises that grow")
        return self
