"""What a run at the benchmark's own size would take, without running it (`dmm run mllmu --dry-run`).

A published LLaVA is laid out on torch's meta device, which allocates nothing, and its adapters are counted. Times are
not measured: they follow from the model's size and a stated speed.
"""

from __future__ import annotations

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


def scale(s: MultimodalSettings) -> str:
    """Describe the size of a run with these settings, in lines of text; a benchmark that is here is read and checked.

    Raises DataError for a directory that is no benchmark, or settings without a published checkpoint.
    """
    if s.checkpoint is None:
        raise DataError("The multimodal settings name no checkpoint; only published models are planned.")
    people, public, questions, source = PEOPLE, PUBLIC, (PEOPLE + PUBLIC) * QUESTIONS, "as published, at least"
    if s.benchmark and Path(s.benchmark).is_dir():
        counts = bench.validate(bench.read(s.benchmark, s.percents), s.percents).set_index("split")
        counts, source = counts.loc[["Full_Set", "Retain_Set"]], "counted here"
        people, public = counts["people"]
        questions = int(counts.filter(like=",").to_numpy().sum())
    config, parameters, adapters = laid_out(s.checkpoint, s.rank)
    models = _models(s, people, public, questions)
    gradients = sum(n * size for n, size in models.values())
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + PROMPT + ANSWER
    hours = 4 * parameters * tokens * gradients / SPEED / 3600  # 4: forward and backward through frozen weights
    logits = questions * ANSWER * (config.text_config.vocab_size if s.kept is None else s.kept + 1) * 4
    lines = [
        f"  multimodal: {people} + {public} people, {questions:,} training questions ({source})",
        f"    language model: {parameters / 1e9:.2f} G parameters, {adapters / 1e6:.1f} M of LoRA",
        *(f"    {what}: {n} models, {size:,} questions each" for what, (n, size) in models.items()),
        f"    about {hours:,.0f} hours on one accelerator at an assumed {SPEED / 1e12:.0f} TFLOP/s, "
        f"{sum(n for n, _ in models.values()) * adapters * 4 / 1e9:.0f} GB of adapters",
        f"    logits at all answers' tokens, which matching needs: {logits / 1e9:.2g} GB per model",
    ]
    return "\n".join(lines)


def _models(s: MultimodalSettings, people: int, public: int, questions: int) -> dict[str, tuple[int, int]]:
    """For each kind of model how many there are, and the training questions of each, epochs included."""
    each, taught = questions / (people + public), s.epochs * questions

    def left(n: float) -> float:
        return taught - s.epochs * each * n

    def unlearning(n: float, rates: int, costs: float) -> int:
        return round(3 * len(GRADIENT) * s.unlearn_epochs * each * n * rates + len(MATCHING) * left(n) * costs)

    tried = unlearning(s.n_tuning, len(s.lrs), len(s.match_lrs) * sum(s.costs))
    models = {
        "originals": (s.n_models, taught),
        "subset models": (s.n_subsets, round(s.epochs * each * (s.fraction * people + public))),
        "retrained on tuning": (s.n_models, round(left(s.n_tuning))),
        "unlearned on tuning, all settings": (s.tuning_models, tried),
    }
    for share in s.forget_shares:
        models[f"retrained without {share:.0%}, and floor"] = (2 * s.n_models, round(left(share * people)))
        models[f"unlearned {share:.0%}, all methods"] = (s.n_models, unlearning(share * people, 1, max(s.costs)))
    return models


def laid_out(checkpoint: str, rank: int) -> tuple[Any, int, int]:
    """Return a checkpoint's configuration, and the parameters of its language model and of LoRA's adapters.

    A name that is no directory here is taken for LLaVA-1.5-7b, whose architecture is transformers' default.
    """
    transformers = require("transformers")
    config = transformers.LlavaConfig
    config = config.from_pretrained(checkpoint) if Path(checkpoint).is_dir() else config()
    with torch.device("meta"):
        llava = transformers.LlavaForConditionalGeneration(config)
        model.adapt(llava, rank)
    sizes = {name: p.numel() for name, p in llava.model.language_model.named_parameters()}
    adapters = sum(size for name, size in sizes.items() if "lora_" in name)
    return llava.config, sum(sizes.values()) - adapters + llava.lm_head.weight.numel(), adapters
