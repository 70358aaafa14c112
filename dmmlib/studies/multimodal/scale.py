"""What a run at the benchmark's own size would take, without running it (`dmm run mllmu --dry-run`).

A published LLaVA is laid out on torch's meta device, which allocates nothing, and its adapters are counted. Rates are
not measured: they follow from the model's size and a stated speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmmlib.errors import DataError
from dmmlib.studies.multimodal import bench
from dmmlib.studies.multimodal.extra import require
from dmmlib.studies.multimodal.methods import GRADIENT, MATCHING
from dmmlib.studies.multimodal.settings import MultimodalSettings

PEOPLE, PUBLIC, QUESTIONS = 500, 153, 14  # published: people, public figures, and at least so many questions each
PROMPT, ANSWER = 64, 32  # tokens, about
SPEED = 0.4 * 312e12  # floating-point operations a second: 40 % of an A100's bfloat16 peak


@dataclass(frozen=True)
class Scale:
    """A run's size.

    Attributes:
        people, public, questions: private people, public figures, and training questions.
        counted: whether they were counted in a directory here, or are as published.
        parameters, adapters: of the language model, and LoRA's.
        models: what -> how many, and training questions of each, epochs included.
        tokens: of a question, portrait included.
        logits: bytes of one model's kept logits at all answers' tokens.
    """

    people: int
    public: int
    questions: int
    counted: bool
    parameters: int
    adapters: int
    models: dict[str, tuple[int, int]]
    tokens: int
    logits: int

    @property
    def hours(self) -> float:
        """On one accelerator: forward and backward through frozen weights, 4 operations a parameter and token."""
        gradients = sum(n * size for n, size in self.models.values())
        return 4 * self.parameters * self.tokens * gradients / SPEED / 3600

    def __str__(self) -> str:
        source = "counted here" if self.counted else "as published, at least"
        lines = [
            f"  multimodal: {self.people} + {self.public} people, {self.questions:,} training questions ({source})",
            f"    language model: {self.parameters / 1e9:.2f} G parameters, {self.adapters / 1e6:.1f} M of LoRA",
            *(f"    {what}: {n} models, {size:,} questions each" for what, (n, size) in self.models.items()),
            f"    about {self.hours:,.0f} hours on one accelerator at an assumed {SPEED / 1e12:.0f} TFLOP/s, "
            f"{sum(n for n, _ in self.models.values()) * self.adapters * 4 / 1e9:.0f} GB of adapters",
            f"    logits at all answers' tokens, which matching needs: {self.logits / 1e9:.2g} GB a model",
        ]
        return "\n".join(lines)


def scale(s: MultimodalSettings) -> Scale:
    """The size of a run with these settings; a benchmark that is here is read and checked.

    Raises:
        DataError: for a directory that is no benchmark, or settings without a published checkpoint.
        ExtraError: without the extra's packages.
    """
    if s.checkpoint is None:
        raise DataError("The multimodal settings name no checkpoint; only published models are planned.")
    people, public, questions, counted = PEOPLE, PUBLIC, (PEOPLE + PUBLIC) * QUESTIONS, False
    percents = [round(100 * share) for share in s.forget_shares]
    if s.benchmark and Path(s.benchmark).is_dir():
        splits = bench.read(s.benchmark, percents)
        bench.validate(splits, percents)
        people, public = len(splits["Full_Set"]), len(splits["Retain_Set"])
        questions, counted = sum(len(bench.asked(r)) for n in ("Full_Set", "Retain_Set") for r in splits[n]), True
    llava, adapters = _laid_out(s)
    vision, text = llava.config.vision_config, llava.config.text_config
    each = questions / (people + public)
    taught = s.epochs * questions
    models = {
        "originals": (s.n_models, taught),
        "subset models": (s.n_subsets, round(s.epochs * each * (s.fraction * people + public))),
        "gradient kernels, a pass a token": (s.kernel_models, round(each * (2 * people + public)) * ANSWER),
        "retrained on tuning": (s.n_models, round(taught - s.epochs * each * s.n_tuning)),
    }

    def unlearning(n: float, left: float, rates: int, spent: float) -> int:
        return round(3 * len(GRADIENT) * s.unlearn_epochs * each * n * rates + len(MATCHING) * left * spent)

    spent = len(s.match_lrs) * sum(s.costs)
    tried = unlearning(s.n_tuning, taught - s.epochs * each * s.n_tuning, len(s.lrs), spent)
    models["unlearned on tuning, all settings"] = (s.tuning_models, tried)
    for share in s.forget_shares:
        left = round(taught - s.epochs * each * share * people)
        models[f"retrained without {share:.0%}, and floor"] = (2 * s.n_models, left)
        all_methods = unlearning(share * people, left, 1, max(s.costs))
        models[f"unlearned {share:.0%}, all methods"] = (s.n_models, all_methods)
    return Scale(
        people, public, questions, counted,
        sum(p.numel() for p in llava.model.language_model.parameters()) - adapters + llava.lm_head.weight.numel(),
        adapters, models, (vision.image_size // vision.patch_size) ** 2 + PROMPT + ANSWER,
        questions * ANSWER * (text.vocab_size if s.kept is None else s.kept + 1) * 4,
    )  # fmt: skip


def _laid_out(s: MultimodalSettings) -> tuple[Any, int]:
    """The checkpoint's architecture with adapters, on the meta device, and how many parameters those have.

    A name that is no directory here is taken for LLaVA-1.5-7b, whose architecture is transformers' default.
    """
    transformers, peft = require("transformers"), require("peft")
    here = s.checkpoint is not None and Path(s.checkpoint).is_dir()
    config = transformers.LlavaConfig.from_pretrained(s.checkpoint) if here else transformers.LlavaConfig()
    with torch.device("meta"):
        llava = transformers.LlavaForConditionalGeneration(config)
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=s.rank, lora_alpha=2 * s.rank, target_modules=linear), llava.model.language_model
        )
    return llava, sum(p.numel() for n, p in llava.model.language_model.named_parameters() if "lora_" in n)
