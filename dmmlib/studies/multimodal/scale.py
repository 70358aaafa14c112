"""What a run at the benchmark's own size would take, without running it (`dmm run mllmu --dry-run`).

A published LLaVA is laid out on torch's meta device, which allocates nothing, and its adapters are counted. Times are
not measured: they follow from the model's size and a stated speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmmlib.errors import DataError
from dmmlib.studies.multimodal import bench, model
from dmmlib.studies.multimodal.extra import require
from dmmlib.studies.multimodal.methods import GRADIENT, MATCHING
from dmmlib.studies.multimodal.settings import MultimodalSettings

PEOPLE, PUBLIC, QUESTIONS = 500, 153, 14  # published: people, public figures, and at least so many questions each
PROMPT, ANSWER = 64, 32  # tokens, about
SPEED = 0.4 * 312e12  # floating-point operations per second: 40 % of an A100's bfloat16 peak


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
        """On one accelerator: forward and backward through frozen weights, 4 operations per parameter and token."""
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
            f"    logits at all answers' tokens, which matching needs: {self.logits / 1e9:.2g} GB per model",
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
    if s.benchmark and Path(s.benchmark).is_dir():
        splits = bench.read(s.benchmark, s.percents)
        bench.validate(splits, s.percents)
        people, public = len(splits["Full_Set"]), len(splits["Retain_Set"])
        questions, counted = sum(len(bench.asked(r)) for n in ("Full_Set", "Retain_Set") for r in splits[n]), True
    llava = _laid_out(s)
    vision, vocabulary = llava.config.vision_config, llava.config.text_config.vocab_size
    sizes = {name: p.numel() for name, p in llava.model.language_model.named_parameters()}
    adapters = sum(size for name, size in sizes.items() if "lora_" in name)
    each = questions / (people + public)
    taught, spent = s.epochs * questions, len(s.match_lrs) * sum(s.costs)

    def left(n: float) -> float:
        return taught - s.epochs * each * n

    def unlearning(n: float, rates: int, costs: float) -> int:
        return round(3 * len(GRADIENT) * s.unlearn_epochs * each * n * rates + len(MATCHING) * left(n) * costs)

    models = {
        "originals": (s.n_models, taught),
        "subset models": (s.n_subsets, round(s.epochs * each * (s.fraction * people + public))),
        "gradient kernels, one pass per token": (s.kernel_models, round(each * (2 * people + public)) * ANSWER),
        "retrained on tuning": (s.n_models, round(left(s.n_tuning))),
        "unlearned on tuning, all settings": (s.tuning_models, unlearning(s.n_tuning, len(s.lrs), spent)),
    }
    for share in s.forget_shares:
        n = share * people
        models[f"retrained without {share:.0%}, and floor"] = (2 * s.n_models, round(left(n)))
        models[f"unlearned {share:.0%}, all methods"] = (s.n_models, unlearning(n, 1, max(s.costs)))
    parameters = sum(sizes.values()) - adapters + llava.lm_head.weight.numel()
    tokens = (vision.image_size // vision.patch_size) ** 2 + PROMPT + ANSWER
    logits = questions * ANSWER * (vocabulary if s.kept is None else s.kept + 1) * 4
    return Scale(people, public, questions, counted, parameters, adapters, models, tokens, logits)


def _laid_out(s: MultimodalSettings) -> Any:
    """The checkpoint's architecture with adapters on the meta device; LLaVA-1.5-7b's for a name that is not here."""
    transformers = require("transformers")
    here = s.checkpoint is not None and Path(s.checkpoint).is_dir()
    config = transformers.LlavaConfig.from_pretrained(s.checkpoint) if here else transformers.LlavaConfig()
    with torch.device("meta"):
        llava = transformers.LlavaForConditionalGeneration(config)
        model.adapt(llava, s.rank)
    return llava
