"""LLaVA, small and trained here, or published and fine-tuned through LoRA; both answer through one module.

The vision tower is frozen once a model is pretrained, as in LLaVA's own second stage, so a portrait is encoded once and
its patches are constants. What is fine-tuned, retrained and unlearned is the projector and the language model (of a
published model, LoRA's adapters in the latter). A question is a row of tokens, padded on the left so that all answers
begin at one place:

    x = [number of the portrait, or 0; prompt (P tokens); answer (A tokens, ended by EOS, padded)].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError
from dmmlib.execution import one_thread
from dmmlib.progress import Progress, silent
from dmmlib.studies.multimodal.bench import Question, pixels
from dmmlib.studies.multimodal.extra import require
from dmmlib.studies.multimodal.settings import MultimodalSettings

PAD, UNKNOWN, EOS, PORTRAIT, BLANK = SPECIAL = ("[PAD]", "[UNK]", "[EOS]", "<image>", "[Blank]")
CLIP_MEAN, CLIP_STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)


@dataclass(frozen=True)
class Codec:
    """Turns questions into tokens and back."""

    tokenizer: Any  # of transformers
    template: str  # a prompt, with {image} and {prompt} to be filled in
    n_patches: int  # tokens that a portrait takes
    answer_length: int  # A

    @classmethod
    def of(cls, tokenizer: Any, template: str, n_patches: int, questions: Sequence[Question]) -> Codec:
        """Make a codec whose answers are as long as the longest of the questions' and EOS."""
        codec = cls(tokenizer, template, n_patches, 0)
        return replace(codec, answer_length=1 + max(len(codec.tokens(q.answer)) for q in questions))

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def image_token(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(PORTRAIT))

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, questions: Sequence[Question]) -> Tensor:
        """Encode questions as rows x (n, 1 + P + A), int64; DataError for answers of over A - 1 tokens, or none."""
        prompts, answers = [], []
        for q in questions:
            image = PORTRAIT * self.n_patches if q.image >= 0 else ""
            prompts.append(self.tokens(self.template.format(image=image, prompt=q.prompt.strip())))
            answers.append([*self.tokens(q.answer), self.eos])
            if not 2 <= len(answers[-1]) <= self.answer_length:
                raise DataError(
                    f"The answer {q.answer!r} takes {len(answers[-1]) - 1} tokens; this model answers in 1 to "
                    f"{self.answer_length - 1}."
                )
        left, right = max(map(len, prompts)), self.answer_length
        rows = [
            [q.image + 1, *[self.pad] * (left - len(prompt)), *prompt, *answer, *[self.pad] * (right - len(answer))]
            for q, prompt, answer in zip(questions, prompts, answers, strict=True)
        ]
        return torch.tensor(rows)

    def answers(self, x: Tensor) -> Tensor:
        """Return the answers' tokens (..., A) of rows x."""
        return x[..., -self.answer_length :]

    def options(self, questions: Sequence[Question]) -> Tensor:
        """Return the first token of each option (n, n_options); DataError where two of a question begin alike."""
        found = [[self.tokens(option)[0] for option in q.options] for q in questions]
        for q, first in zip(questions, found, strict=True):
            if len(set(first)) < len(first):
                raise DataError(
                    f"Options {', '.join(q.options)} of {q.prompt!r} begin with the same token; ask for letters "
                    "(multimodal.letters) instead."
                )
        return torch.tensor(found)

    def decode(self, tokens: Tensor) -> list[str]:
        """Turn answers (n, A) into texts, up to EOS."""
        said = [row[: row.index(self.eos)] if self.eos in row else row for row in tokens.tolist()]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in said]


class Answerer(nn.Module):
    """Projector and language model of a LLaVA, which answer rows of tokens.

    Written so that `torch.func.vmap` can map it: masks and positions are explicit, attention is eager.
    """

    features: Tensor

    def __init__(self, llava: Any, codec: Codec, features: Tensor) -> None:
        """Take the parts of a LlavaForConditionalGeneration without copying them, and a codec for its tokens.

        `features` are the patches of every portrait (n_images, n_patches, d), as the vision tower gives them.
        """
        super().__init__()
        self.projector = llava.model.multi_modal_projector
        self.language_model = llava.model.language_model
        tied = llava.lm_head.weight is llava.get_input_embeddings().weight
        self.head = None if tied else llava.lm_head
        self.image_token, self.pad, self.answer_length = codec.image_token, codec.pad, codec.answer_length
        none = torch.zeros(1, *features.shape[1:], dtype=features.dtype, device=features.device)
        self.register_buffer("features", torch.cat([none, features]), persistent=False)

    def forward(self, x: Tensor, features: Tensor | None = None, generate: bool = False) -> Tensor:
        """Return logits (batch, A, vocabulary) of answers' tokens given all before them, for x (batch, 1 + P + A).

        Args:
            features: patches of each row's portrait (batch, n_patches, d), in place of those that it numbers.
            generate: give greedy answers (batch, A) instead, int64, without looking at those in x.
        """
        patches = self.projector(self.features[x[:, 0]] if features is None else features)
        past = require("transformers").DynamicCache()
        if not generate:
            return self._logits(x[:, 1:-1], patches, self.answer_length, past)
        tokens = x[:, 1 : -self.answer_length]
        for _ in range(self.answer_length):
            said = self._logits(tokens, patches, 1, past).argmax(-1)
            tokens, patches = torch.cat([tokens, said], 1), patches[:, -1:]
        return tokens[:, -self.answer_length :]

    def _logits(self, tokens: Tensor, patches: Tensor, n: int, past: Any) -> Tensor:
        """Logits (batch, n, vocabulary) after each of the last n of all `tokens` so far, of which `past` knows some.

        In the last layer earlier tokens need only keys and values, which saves most of its work.
        """
        decoder, places = self.language_model, torch.arange(tokens.shape[1], device=tokens.device)
        before = past.get_seq_length()
        now = places[before:]
        hidden = self._embedded(tokens[:, before:], patches)
        allowed = (places < now[:, None]) & (tokens != self.pad)[:, None] | (places == now[:, None])
        mask = torch.where(allowed, 0.0, torch.finfo(hidden.dtype).min / 2)[:, None].to(hidden.dtype)
        cos, sin = decoder.rotary_emb(hidden, now[None])
        for layer in decoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=past)
        last = decoder.layers[-1]
        if n < len(now):
            earlier, attention = last.input_layernorm(hidden[:, :-n]), last.self_attn
            keys, values = (
                part(earlier).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for part in (attention.k_proj, attention.v_proj)
            )
            rotate = require("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
            past.update(rotate(keys, keys, cos[:, :-n], sin[:, :-n])[1], values, attention.layer_idx)
        ends = (cos[:, -n:], sin[:, -n:])
        hidden = last(hidden[:, -n:], attention_mask=mask[:, :, -n:], position_embeddings=ends, past_key_values=past)
        hidden = decoder.norm(hidden)
        return hidden @ decoder.embed_tokens.weight.T if self.head is None else self.head(hidden)

    def _embedded(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """Tokens (batch, n) embedded, with patches in the places of those that stand for a portrait."""
        # Not the layer itself: vmap gives its padding a gradient, and models would then be run one by one.
        embedded = F.embedding(tokens, self.language_model.embed_tokens.weight)
        shown = tokens == self.image_token
        which = (shown.long().cumsum(1) - 1).clamp(0, patches.shape[1] - 1)  # a model may say the token itself
        placed = patches.gather(1, which[..., None].expand(-1, -1, patches.shape[-1]))
        return torch.where(shown[..., None], placed.to(embedded.dtype), embedded)


def tokenizer_of(texts: Sequence[str]) -> Any:
    """Make a word-level tokenizer with the words of some texts, in lower case."""
    tokenizers, transformers = require("tokenizers"), require("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=list(SPECIAL), show_progress=False)
    words.train_from_iterator(texts, trainer)
    named = {"pad_token": PAD, "unk_token": UNKNOWN, "eos_token": EOS, "additional_special_tokens": [PORTRAIT, BLANK]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named)


def small(s: MultimodalSettings, tokenizer: Any) -> Any:
    """Make an untrained LLaVA of the settings' size: CLIP-style encoder, projector, Llama-style decoder."""
    transformers = require("transformers")
    width = {"hidden_size": s.hidden, "intermediate_size": 2 * s.hidden, "num_attention_heads": s.heads}
    vision = {"image_size": s.image_side, "patch_size": s.patch, "num_hidden_layers": 1, "projection_dim": s.hidden}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    layers = {"num_hidden_layers": s.layers, "num_key_value_heads": s.heads, "max_position_embeddings": 128}
    text = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **layers, **special}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**width, **vision, initializer_range=0.1),
        text_config=transformers.LlamaConfig(**width, **text, initializer_range=0.1),
        image_token_index=tokenizer.convert_tokens_to_ids(PORTRAIT),
        image_seq_length=(s.image_side // s.patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        llava = transformers.LlavaForConditionalGeneration(config)
    llava.set_attn_implementation("eager")
    return llava


def patches(llava: Any, pictures: Tensor) -> Tensor:
    """Return what the vision tower makes of images (n, 3, side, side), before the projector: (n, n_patches, d)."""
    config = llava.config
    seen = llava.model.vision_tower(pixel_values=pictures, output_hidden_states=True)
    chosen = seen.hidden_states[config.vision_feature_layer]
    return chosen[:, 1:] if config.vision_feature_select_strategy == "default" else chosen


def pretrain(
    llava: Any, codec: Codec, x: Tensor, pictures: Tensor, s: MultimodalSettings, progress: Progress = silent
) -> None:
    """Train the whole small LLaVA in place, vision included, on rows x that number the pictures."""
    module = Answerer(llava, codec, torch.zeros(0, codec.n_patches, s.hidden))
    optimizer = torch.optim.AdamW(llava.parameters(), lr=s.pretrain_lr, weight_decay=0.0)
    rng = torch.Generator().manual_seed(s.seed)
    n_steps = s.pretrain_epochs * -(-len(x) // s.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.pretrain_lr, total_steps=n_steps, pct_start=0.1)
    llava.train()
    with one_thread():  # products this small only wait for one another
        for epoch in range(s.pretrain_epochs):
            for batch in torch.randperm(len(x), generator=rng).split(s.batch_size):
                rows = x[batch]
                shown = patches(llava, pictures[(rows[:, 0] - 1).clamp(min=0)])
                loss = token_loss(module(rows, shown)[None], codec.answers(rows)[None], codec.pad).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress("pretrain", epoch + 1, s.pretrain_epochs)
    llava.eval()


def published(
    s: MultimodalSettings, questions: Sequence[Question], device: torch.device | str = "cpu"
) -> tuple[Any, Codec]:
    """Load a published LLaVA, frozen but for LoRA adapters in its decoder, and its codec for some questions.

    Raises DataError if it cannot be loaded or is no LLaVA, and ExtraError without the extra's packages.
    """
    transformers, _ = require("transformers"), require("peft")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(s.checkpoint)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        llava = transformers.LlavaForConditionalGeneration.from_pretrained(
            s.checkpoint, dtype=dtype, attn_implementation="eager"
        ).to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"The checkpoint {s.checkpoint!r} cannot be loaded as a LLaVA ({str(error).splitlines()[0]}); give a "
            "directory, or a name on the hub where that can be reached."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token
    adapt(llava, s.rank)
    vision = llava.config.vision_config
    n_patches = (vision.image_size // vision.patch_size) ** 2
    return llava.eval(), Codec.of(tokenizer, "USER: {image}\n{prompt} ASSISTANT:", n_patches, questions)


def adapt(llava: Any, rank: int) -> None:
    """Freeze a LLaVA, and put LoRA adapters into its decoder, in place."""
    peft = require("peft")
    llava.requires_grad_(False)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
    peft.inject_adapter_in_model(config, llava.model.language_model)


@torch.no_grad()
def encode_portraits(llava: Any, images: Sequence[Any]) -> Tensor:
    """Encode every portrait as patches (n_images, n_patches, d)."""
    side, some = llava.config.vision_config.image_size, next(llava.parameters())
    pictures = torch.from_numpy(pixels(images, side, CLIP_MEAN, CLIP_STD)).to(some.device, some.dtype)
    return torch.cat([patches(llava, part) for part in pictures.split(64)])


def begin(module: Answerer, seeds: Sequence[int]) -> Ensemble:
    """Copy what is trainable in a module once for each seed; what is frozen stays in it, shared.

    LoRA's first factors are drawn anew by seed, as it begins with them random and the second factors zero.
    """
    trainable = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    params = {name: value[None].repeat(len(seeds), *[1] * value.dim()) for name, value in trainable.items()}
    for name in (name for name in params if "lora_A" in name):
        for copy, seed in zip(params[name], seeds, strict=True):
            rng = torch.Generator().manual_seed(seed)
            copy.copy_(float(copy.shape[1]) ** -0.5 * (2 * torch.rand(copy.shape, generator=rng) - 1))
    return Ensemble(module, params, {})


def token_loss(logits: Tensor, answers: Tensor, pad: int) -> Tensor:
    """Average the cross-entropy of each answer over its tokens: (k, b) of logits (k, b, A, V) and tokens (k, b, A)."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), answers.flatten(), reduction="none").view(answers.shape)
    counts = (answers != pad).to(losses.dtype)
    return (losses * counts).sum(-1) / counts.sum(-1)


def gauged(logits: Tensor, truth: Tensor) -> Tensor:
    """Shift logits (..., V) to the margin gauge (`metrics.margin_gauge`), differentiably; `truth` (...) as there."""
    wrong = logits.scatter(-1, truth.expand(logits.shape[:-1])[..., None], -torch.inf)
    return logits - wrong.logsumexp(-1, keepdim=True)
