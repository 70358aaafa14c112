"""Sizes of the multimodal study; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dmmlib.presets import Fraction, Section, Some, study


@study("multimodal")
class MultimodalSettings(Section):
    """Every number of notebook 09."""

    benchmark: str | None = None  # directory or hub name of MLLMU-Bench; None generates a benchmark like it
    checkpoint: str | None = None  # directory or hub name of a LLaVA to fine-tune by LoRA; None trains a small one
    n_people: PositiveInt = 100  # private profiles
    n_public: PositiveInt = 6  # public figures, known from pretraining and never to be forgotten
    n_generic: NonNegativeInt = 80  # further people that only pretraining sees
    forget_shares: Some[Fraction] = (0.05, 0.10, 0.15)  # of the profiles, per set
    n_tuning: PositiveInt = 10  # people that hyperparameters are chosen on; they are in no forget set
    image_side: PositiveInt = 32  # of a portrait, in pixels
    patch: PositiveInt = 16  # side of a patch, in pixels
    hidden: PositiveInt = 48  # width of the small model
    layers: PositiveInt = 2  # of the small model's decoder
    heads: PositiveInt = 2  # attention heads of each layer
    pretrain_epochs: PositiveInt = 5  # of the small model, on generic people and public figures
    pretrain_lr: PositiveFloat = 2e-3
    rank: PositiveInt = 16  # of LoRA, for a published checkpoint
    letters: bool = False  # list the options in the prompt and ask for a letter, as published models are asked
    epochs: PositiveInt = 5  # of fine-tuning on the profiles
    batch_size: int = Field(default=20, ge=2)  # questions per step; half of them, or fewer, about the forgotten
    lr: PositiveFloat = 3.5e-3
    n_models: int = Field(default=20, ge=4)  # N, models of each kind
    n_subsets: int = Field(default=40, ge=3)  # models that are fine-tuned on random subsets of the profiles
    fraction: Fraction = 0.75  # of the profiles in a subset
    # Logits that are kept per token: the correct one's and the likeliest others', the rest summed up in one more. None
    # keeps all, of which a published vocabulary has too many.
    kept: Annotated[int, Field(ge=4)] | None = 16
    lams: Some[PositiveFloat] = (1e-4, 1e-3, 1e-2)  # penalties of the ridge datamodels that are compared
    tuning_models: int = Field(default=8, ge=4)  # originals that each setting is tried on
    sample: PositiveInt = 6  # retained people, and public figures, of whom questions are asked
    lrs: Some[PositiveFloat] = (1e-4, 3e-4, 1e-3)  # tried with the gradient methods
    match_lrs: Some[PositiveFloat] = (1e-3, 2e-3)  # tried with matching
    unlearn_epochs: PositiveInt = 3  # passes of a gradient method over the forget questions
    costs: Some[PositiveFloat] = (0.2, 0.4)  # shares of a retraining that matching is tried with
    chunk: PositiveInt = 20  # models that share a training step
    seed: NonNegativeInt = 0

    @property
    def percents(self) -> tuple[int, ...]:
        """The forget shares as the benchmark names its splits."""
        return tuple(round(100 * share) for share in self.forget_shares)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.tuning_models > self.n_models:
            raise ValueError(f"tuning_models={self.tuning_models} of {self.n_models} originals; give at most n_models")
        if self.image_side % self.patch:
            raise ValueError(f"image_side={self.image_side} is no multiple of patch={self.patch}; give one that is")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden={self.hidden} is no multiple of twice heads={self.heads}; give one that is")
        if min(self.percents) < 1 or len(set(self.percents)) < len(self.percents):
            raise ValueError(
                f"forget_shares={self.forget_shares} are not different whole percentages; give such shares"
            )
        return self
