"""The settings of the study of malicious deletion requests (notebook 08)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dmmlib.presets import Fraction, Section, Several, Some, study

Share = Annotated[float, Field(gt=0, le=0.5)]
Bound = Annotated[int, Field(ge=0, le=255)]


@study("adversary")
class AdversarySettings(Section):
    """Every number of notebook 08."""

    # the service
    n: PositiveInt = 1000  # training points, the attacker's among them; all others of the preset are the attacker's
    hidden: PositiveInt = 32  # units of the service's models
    epochs: PositiveInt = 10
    batch: PositiveInt = 50
    lr: PositiveFloat = 0.2
    n_models: Several = 5  # originals, and models retrained for each request of the main table
    n_subsets: Annotated[int, Field(ge=3)] = 100  # subset models behind the service's datamodel
    fraction: Fraction = 0.75  # of the training points, in each subset
    camouflage_subsets: Several = 10  # subset models behind the gradient kernel of each camouflaged training set
    n_honest: Several = 100  # honest requests of each kind that the defence compares attacks with
    # the attacker
    share: Share = 0.05  # of the training points
    n_known: PositiveInt = 4  # models at which the attacker takes gradients
    n_candidates: PositiveInt = 300  # candidate targets that span the subspace
    k: PositiveInt = 9  # dimension of the subspace
    damping: PositiveFloat = 0.3  # of the metric, relative to the mean squared gradient, where it is not chosen
    dampings: Some[PositiveFloat] = (0.3, 30.0)  # to choose from on the tuning targets
    angles: Some[NonNegativeFloat] = (0.0, 3.0)  # exponents of `crafting`, chosen likewise
    epsilon: Bound = 32  # largest change of a pixel, of 255
    craft_steps: PositiveInt = 10  # steps of signed ascent on pixels
    n_targets: Several = 50  # targets that results are reported on
    n_tuning: PositiveInt = 40  # other targets, on which the attacker's settings are chosen
    # what the attack depends on: values tried in place of those above, one at a time
    shares: tuple[Share, ...] = (0.02, 0.2)
    epsilons: tuple[Bound, ...] = (0, 96)
    ks: tuple[PositiveInt, ...] = (3, 18)
    sizes: Some[PositiveInt] = (6, 12)  # points deleted, fewer than half of the attacker's
    # distances from retraining
    n_compared: PositiveInt = 20  # originals, retrained models, and others for the floor
    n_requests: Several = 5  # requests of each attack there, and honest ones on which methods' settings are chosen
    seed: NonNegativeInt = 0

    @property
    def half(self) -> int:
        """Points in a request: half of the attacker's, as many as one of two groups that cancel."""
        return max(1, round(self.share * self.n) // 2)

    @model_validator(mode="after")
    def _sizes_fit(self) -> AdversarySettings:
        if max(self.sizes) >= self.half:
            raise ValueError(f"sizes go up to {max(self.sizes)}, but the attacker's half is {self.half}; use fewer")
        if max(self.k, *self.ks) > self.n_candidates:
            raise ValueError(f"n_candidates={self.n_candidates} span fewer directions than k asks for; use more")
        if self.n_requests > self.n_targets:
            raise ValueError(f"n_targets={self.n_targets} is below n_requests={self.n_requests}; use at least as many")
        return self
