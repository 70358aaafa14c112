"""Sizes of the multimodal study; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from dmmlib.presets import Section, study


@study("multimodal")
class MultimodalSettings(Section):
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
        kernel_models: subset models at which gradients are taken, for the datamodel's prior.
        lams: penalties of ridge datamodels over profiles, which that datamodel is compared with.
        tuning_models: originals that a setting is tried on.
        sample: people of whom questions are asked, a set (retained, public).
        lrs: rates that gradient methods are tried with; `match_lrs` those of matching.
        unlearn_epochs: passes over the forget questions of a gradient method.
        costs: shares of a retraining that matching is tried with.
        chunk: models that share a step.
        seed: of everything random.
    """

    benchmark: str | None = None
    checkpoint: str | None = None
    n_people: int = 100
    n_public: int = 6
    n_generic: int = 80
    forget_shares: tuple[float, ...] = (0.05, 0.10, 0.15)
    n_tuning: int = 10
    image_side: int = 32
    patch: int = 16
    hidden: int = 48
    layers: int = 2
    heads: int = 2
    pretrain_epochs: int = 5
    pretrain_lr: float = 2e-3
    rank: int = 16
    letters: bool = False
    epochs: int = 5
    batch_size: int = 20
    lr: float = 3.5e-3
    n_models: int = 20
    n_subsets: int = 40
    fraction: float = 0.75
    kept: int | None = 16
    kernel_models: int = 2
    lams: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    tuning_models: int = 8
    sample: int = 6
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    match_lrs: tuple[float, ...] = (1e-3, 2e-3)
    unlearn_epochs: int = 3
    costs: tuple[float, ...] = (0.2, 0.4)
    chunk: int = 20
    seed: int = 0
