"""Sizes of the multimodal study; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MultimodalSettings:
    """Every number of notebook 09.

    Attributes:
        benchmark: a directory of MLLMU-Bench's parquet files, or its name on the hub; None generates one like it.
        checkpoint: directory or hub name of a published LLaVA, fine-tuned through LoRA; None trains a small one here.
        n_people: private profiles.
        n_public: public figures; known from pretraining, never to be forgotten.
        n_generic: further people that only pretraining sees.
        forget_shares: of the profiles, a forget set each.
        n_tuning: people that hyperparameters are tuned on, in no forget set.
        image_side, patch: portraits in pixels, and the side of a patch.
        hidden, layers, heads: width, depth and attention heads of the small model's decoder.
        pretrain_epochs, pretrain_lr: of the small model, on generic people and public figures.
        rank: of LoRA, for a published checkpoint.
        letters: list the options in the prompt and ask for a letter, as published models are asked; otherwise the
            option whose text is likeliest is the answer.
        epochs, batch_size, lr: of fine-tuning on the profiles.
        n_models: N, models of each kind.
        n_subsets, fraction: models fine-tuned on random subsets of the profiles, and the share of profiles in each.
        kept: logits kept of an answer's token, the right one's and the likeliest others', the rest summed up in one
            more; None keeps all. With a published vocabulary all answers' logits are too many.
        lam: ridge penalty of the datamodel over profiles.
        tuning_models: originals that a setting is tried on.
        sample: people a set (retained, public) that free generation is scored on.
        lrs: rates that gradient methods are tried with; `match_lrs` those of matching.
        unlearn_epochs: passes over the forget questions of a gradient method.
        cost: share of a retraining that matching may spend.
        chunk: models that share a step.
        seed: of everything random.
    """

    benchmark: str | None = None
    checkpoint: str | None = None
    n_people: int = 18
    n_public: int = 3
    n_generic: int = 18
    forget_shares: tuple[float, ...] = (0.10, 0.15)
    n_tuning: int = 2
    image_side: int = 32
    patch: int = 16
    hidden: int = 48
    layers: int = 2
    heads: int = 2
    pretrain_epochs: int = 7
    pretrain_lr: float = 2e-3
    rank: int = 16
    letters: bool = False
    epochs: int = 7
    batch_size: int = 12
    lr: float = 3e-3
    n_models: int = 20
    n_subsets: int = 40
    fraction: float = 0.75
    kept: int | None = None
    lam: float = 0.01
    tuning_models: int = 8
    sample: int = 4
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    match_lrs: tuple[float, ...] = (1e-3, 2e-3, 3e-3)
    unlearn_epochs: int = 5
    cost: float = 0.2
    chunk: int = 10
    seed: int = 0
