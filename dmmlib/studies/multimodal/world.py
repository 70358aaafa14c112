"""What notebook 09 works on: a benchmark's questions as tokens, a pretrained model, and ensembles fine-tuned from it.

Models of a kind start from the same pretrained model, as the benchmark's do, and differ by the order of what they are
taught. A retrained model is fine-tuned without some people, from that same start. Public figures are taught along:
so small a model would otherwise lose them.
"""

from __future__ import annotations

import copy
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call

from dmmlib.ensemble import Ensemble, Training, concatenate, descend, epoch_batches
from dmmlib.errors import DataError
from dmmlib.execution import Execution
from dmmlib.files import config_hash, replacing, short
from dmmlib.optim import Adam, Tensors
from dmmlib.progress import Progress, silent
from dmmlib.studies.multimodal import bench, model, people
from dmmlib.studies.multimodal.bench import Question
from dmmlib.studies.multimodal.model import Answerer, Codec
from dmmlib.studies.multimodal.settings import MultimodalSettings

VERSION = 2  # of what lies in the cache: raise it when the same settings give other weights


@dataclass(frozen=True)
class World:
    """Everything but the ensembles.

    Attributes:
        s: the settings.
        counts: questions a split, as `bench.validate` counts them.
        questions: training questions (private, then public), then those of the Test set.
        images: the portraits that they number.
        people: IDs of the private people; masks are over these.
        forget_sets: name -> indices of people.
        tuning: indices of the people that hyperparameters are tuned on.
        codec: questions as tokens.
        module: the pretrained model.
        place: where fine-tuned weights are kept; nowhere if None.
        progress: hook that is told of progress.
    """

    s: MultimodalSettings
    counts: pd.DataFrame
    questions: tuple[Question, ...]
    images: tuple[Any, ...]
    people: tuple[str, ...]
    forget_sets: dict[str, np.ndarray]
    tuning: np.ndarray
    codec: Codec
    module: Answerer
    place: Path | None = None
    progress: Progress = silent

    @cached_property
    def x(self) -> Tensor:
        """Rows of tokens (n_questions, 1 + P + A), on the model's device."""
        return self.codec.encode(self.questions).to(self.module.features.device)

    @cached_property
    def answers(self) -> Tensor:
        """Tokens (n_questions, A) of the right answers."""
        return self.codec.answers(self.x)

    @cached_property
    def split(self) -> np.ndarray:
        """ "train", "public" or "test" (n_questions,)."""
        return np.array([q.split for q in self.questions])

    @cached_property
    def modality(self) -> np.ndarray:
        return np.array([q.modality for q in self.questions])

    @cached_property
    def task(self) -> np.ndarray:
        return np.array([q.task for q in self.questions])

    @cached_property
    def person(self) -> np.ndarray:
        """Index into `people` (n_questions,), -1 for public figures."""
        number = {name: i for i, name in enumerate(self.people)}
        return np.array([-1 if q.split == "public" else number[q.person] for q in self.questions])

    @property
    def n_taught(self) -> int:
        """Questions that models are fine-tuned on; they come first."""
        return int((self.split != "test").sum())

    def sets(self, forget: np.ndarray) -> dict[str, np.ndarray]:
        """Questions of the four sets of a forget set; of retained and public people a sample, the same for all.

        Retained people are sampled among those that no forget set and no tuning touches.
        """
        used = np.concatenate([*self.forget_sets.values(), self.tuning])
        kept = np.setdiff1d(np.arange(len(self.people)), used)[: self.s.sample]
        known = list(dict.fromkeys(q.person for q in self.questions if q.split == "public"))[: self.s.sample]
        ours = np.isin(self.person, forget)
        return {
            "forget": np.flatnonzero(ours & (self.split == "train")),
            "test": np.flatnonzero(ours & (self.split == "test")),
            "retain": np.flatnonzero(np.isin(self.person, kept) & (self.split == "train")),
            "public": np.array([i for i, q in enumerate(self.questions) if q.split == "public" and q.person in known]),
        }

    def taught(self, mask: np.ndarray) -> np.ndarray:
        """Training questions of the people that a mask (n_people,) keeps, and of public figures."""
        return np.flatnonzero((self.split == "public") | ((self.split == "train") & mask[self.person]))

    def without(self, forget: np.ndarray, n: int) -> np.ndarray:
        """Masks (n, n_people) that leave some people out."""
        masks = np.ones((n, len(self.people)), bool)
        masks[:, forget] = False
        return masks

    # --- ensembles -------------------------------------------------------------------------------------

    @cached_property
    def execution(self) -> Execution:
        """Settled once, before threads change how many threads torch says there are."""
        return Execution(self.s.chunk, workers=1 if self.x.is_cuda else torch.get_num_threads())

    def own(self, models: Ensemble) -> Ensemble:
        """The same models with a module of their own: two threads cannot call one module with different weights."""
        module = copy.deepcopy(models.module) if self.execution.workers > 1 else models.module
        return Ensemble(module, models.params, {})

    def chunks(self, n: int) -> list[np.ndarray]:
        """Numbers of n models, cut so that no chunk is larger than the settings' and every worker has one."""
        size = max(1, min(self.s.chunk, -(-n // self.execution.workers)))
        return np.array_split(np.arange(n), -(-n // size))

    def seeds(self, stream: str, n: int) -> list[int]:
        return np.random.SeedSequence([self.s.seed, zlib.crc32(stream.encode())]).generate_state(n).tolist()

    def fine_tuned(self, stream: str, masks: np.ndarray) -> Ensemble:
        """Models taught what masks (n, n_people) keep, which must be equally many people each; kept on disk."""
        path, weights = self._path(stream, masks), None
        if path is not None and path.exists():
            weights = _read(path)
        if weights is not None:
            device = self.module.features.device
            return Ensemble(self.module, {k: torch.from_numpy(v).to(device) for k, v in weights.items()}, {})
        models = self._train(stream, masks)
        if path is not None:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **{k: v.float().cpu().numpy() for k, v in models.params.items()})  # type: ignore[arg-type]
        return models

    @cached_property
    def _data(self) -> str:
        """Hash of what models are taught, and of the portraits as the pretrained model sees them."""
        return _hash(self.x[: self.n_taught], self.module.features)

    def _path(self, stream: str, masks: np.ndarray) -> Path | None:
        return _kept(self.place, self.s, stream, self._data, _TEACHING, np.packbits(masks).tobytes().hex())

    def _train(self, stream: str, masks: np.ndarray) -> Ensemble:
        s, seeds = self.s, self.seeds(stream, len(masks))
        pools = [self.taught(mask) for mask in masks]
        training = Training(epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, warmup=0.1)
        loss, optimizer = self.teaching, Adam(s.lr)

        def chunk(members: np.ndarray) -> Ensemble:
            mine = [seeds[i] for i in members]
            rngs = [np.random.default_rng(seed) for seed in mine]
            models = self.own(model.begin(self.module, mine))
            n_steps = training.steps(len(pools[members[0]]))
            descend(
                models,
                self.x,
                epoch_batches([pools[i] for i in members], s.batch_size, s.epochs, rngs),
                loss,
                optimizer,
                optimizer.start(models.params),
                rate=lambda step: training.rate((step + 0.5) / n_steps),
            )
            return models

        chunks = self.chunks(len(masks))
        task, done, parts = f"fine-tune {stream}", 0, []
        self.progress(task, 0, len(masks))
        for part in self.execution.run(chunk, chunks):
            parts.append(part)
            done += part.n_models
            self.progress(task, done, len(masks))
        return concatenate(parts)

    @property
    def teaching(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The loss of fine-tuning: cross-entropy of the right answers, (n_models,)."""
        answers, pad = self.answers, self.codec.pad
        return lambda logits, indices, models: model.token_loss(logits, answers[indices], pad).mean(1)

    @cached_property
    def columns(self) -> Tensor | None:
        """Tokens whose logits are kept (n_questions, A, K), the right one first, then a choice's other options.

        The others are those that the pretrained model finds likeliest. None where all are kept.

        Raises:
            DataError: if fewer are to be kept than a choice has options, or not fewer than there are.
        """
        k = self.s.kept
        if k is None:
            return None
        if not 4 <= k < len(self.codec.tokenizer):
            raise DataError(f"kept={k}, of {len(self.codec.tokenizer)} tokens; keep at least 4, or leave it out.")
        start, found = model.begin(self.module, [0]), []
        for part in np.array_split(np.arange(len(self.x)), -(-len(self.x) // 64)):
            logits = start.logits(self.x[part])[0]
            for row, i in zip(logits, part, strict=True):
                first = [self.codec.tokens(option)[0] for option in self.questions[i].options]
                row[0, first] = 1e9 - torch.arange(len(first), dtype=row.dtype) * 1e6
            logits.scatter_(-1, self.answers[part].cpu()[..., None], torch.inf)
            found.append(logits.topk(k).indices)
        return torch.cat(found).to(self.x.device)

    @cached_property
    def right(self) -> Tensor:
        """Numbers of the right tokens' logits (n_questions, A), among those that are kept."""
        return self.answers if self.columns is None else torch.zeros_like(self.answers)

    def cut(self, logits: Tensor, questions: Tensor) -> Tensor:
        """The kept logits of some questions: (..., n, A, K + 1) of (..., n, A, V), for their indices (..., n)."""
        return logits if self.columns is None else model.cut(logits, self.columns[questions].to(logits.device))

    def margins(self, logits: np.ndarray, questions: np.ndarray) -> np.ndarray:
        """Margins (n_models, n) of kept logits of some questions."""
        answers = self.answers[questions].cpu()
        words = (answers != self.codec.pad) & (answers != self.codec.eos)
        return model.margins(logits, self.right[questions].cpu().numpy(), words.numpy())

    def logits(self, models: Ensemble, questions: np.ndarray, x: Tensor | None = None) -> np.ndarray:
        """Kept logits (n_models, n, A, V) of answers' tokens, float32; asked as rows x say, if given."""
        x = self.x[questions] if x is None else x
        of, _ = torch.from_numpy(questions), self.columns  # these are settled before threads ask for them

        def chunk(few: np.ndarray) -> Tensor:
            ours = self.own(models[few.tolist()])
            parts = torch.arange(len(x)).split(128)
            return torch.cat([self.cut(ours.logits(x[part]), of[part]) for part in parts], 1)

        parts = np.array_split(np.arange(models.n_models), min(models.n_models, self.execution.workers))
        return torch.cat(list(self.execution.run(chunk, parts))).numpy()

    def generate(self, models: Ensemble, x: Tensor) -> Tensor:
        """Greedy answers (n_models, n, A) to rows x, whose answers are not looked at."""

        def chunk(few: np.ndarray) -> Tensor:
            ours = self.own(models[few.tolist()])
            ours.module.eval()

            def one(params: Tensors, rows: Tensor) -> Tensor:
                return functional_call(ours.module, params, (rows,), {"generate": True})

            with torch.no_grad():
                said = [torch.vmap(one, (0, None))(ours.params, part) for part in x.split(128)]
            return torch.cat(said, 1).cpu()

        parts = np.array_split(np.arange(models.n_models), min(models.n_models, self.execution.workers))
        return torch.cat(list(self.execution.run(chunk, parts)))


_TEACHING = ("seed", "hidden", "layers", "heads", "epochs", "batch_size", "lr", "rank", "checkpoint")
_PRETRAINING = (
    "seed",
    "hidden",
    "layers",
    "heads",
    "image_side",
    "patch",
    "batch_size",
    "pretrain_epochs",
    "pretrain_lr",
)


def _hash(*tensors: Tensor) -> str:
    return short(b"".join(t.contiguous().cpu().float().numpy().tobytes() for t in tensors))


def _kept(
    place: Path | None, s: MultimodalSettings, stream: str, data: str, matter: Sequence[str], masks: str = ""
) -> Path | None:
    """Where weights lie: under the hash of what they depend on."""
    if place is None:
        return None
    config = {"version": VERSION, "stream": stream, "data": data, "masks": masks}
    settings = {name: getattr(s, name) for name in matter}
    return place / f"multimodal-{stream.split(':')[0]}-{config_hash(config | settings)}.npz"


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """Kept weights; None if the file is damaged, so that they are trained again."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {k: archive[k] for k in archive.files}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def splits_of(s: MultimodalSettings) -> tuple[people.Splits, list[people.Row]]:
    """The benchmark that the settings name, or one generated, and the rows that a small model is pretrained on."""
    percents = [round(100 * share) for share in s.forget_shares]
    if s.benchmark is not None:
        splits = bench.read(s.benchmark, percents)
        return splits, [] if s.checkpoint else splits["Retain_Set"]
    return people.generate(s.n_people, s.n_public, s.forget_shares, s.seed, s.n_generic)


def build(
    s: MultimodalSettings,
    place: Path | None = None,
    progress: Progress = silent,
    device: torch.device | str = "cpu",
) -> World:
    """Read or generate the benchmark, check it, and load or pretrain the model.

    Args:
        s: the settings.
        place: where weights are kept; nowhere if None.
        progress: hook that is told of progress.
        device: where models are fine-tuned.

    Raises:
        DataError: for a benchmark or checkpoint that cannot be used, before anything is trained.
    """
    percents = [round(100 * share) for share in s.forget_shares]
    splits, seen = splits_of(s)
    counts = bench.validate(splits, percents)
    ids = tuple(str(row["ID"]) for row in splits["Full_Set"])
    number = {name: i for i, name in enumerate(ids)}
    forget_sets = {
        f"{p} %": np.array([number[str(row["ID"])] for row in splits[f"forget_{p}"]]) for p in percents
    }  # fmt: skip
    free = np.setdiff1d(np.arange(len(ids)), np.concatenate(list(forget_sets.values())))
    if s.n_tuning < 1 or s.n_tuning + 1 > len(free):
        raise DataError(
            f"n_tuning={s.n_tuning}, but only {len(free)} of {len(ids)} people are in no forget set; leave some to "
            "tune on and some to retain."
        )
    tuning = np.random.default_rng([s.seed, 1]).permutation(free)[: s.n_tuning]
    images: list[Any] = []
    questions = [
        question
        for name, split in (("Full_Set", "train"), ("Retain_Set", "public"), ("Test_Set", "test"))
        for question in bench.questions(splits[name], split, images, s.letters)
    ]
    if s.checkpoint is not None:
        llava, codec = model.published(s, device)
        codec = replace(codec, answer_length=1 + max(len(codec.tokens(q.answer)) for q in questions))
        side = llava.config.vision_config.image_size
    else:
        llava, codec, side = _small(s, questions, seen, place, progress)
    llava = llava.to(device)
    features = model.encode_portraits(llava, images, side)
    return World(
        s, counts, tuple(questions), tuple(images), ids, forget_sets, np.sort(tuning), codec,
        Answerer(llava, codec, features), place, progress,
    )  # fmt: skip


def _small(
    s: MultimodalSettings, questions: Sequence[Question], seen: list[people.Row], place: Path | None, progress: Progress
) -> tuple[Any, Codec, int]:
    """A small LLaVA pretrained on other people, with some of their questions refused on instruction; kept on disk."""
    images: list[Any] = []
    generic = bench.questions(seen, "pretraining", images, s.letters)
    refused = [replace(q, answer=people.REFUSAL, options=()) for q in generic[::7]]
    texts = [f"{q.prompt} {q.answer} {' '.join(q.options)}" for q in (*questions, *generic)]
    tokenizer = model.tokenizer_of([*texts, f"{people.INSTRUCTION} {people.REFUSAL}"])
    longest = max(
        len(tokenizer(q.answer, add_special_tokens=False).input_ids) for q in (*questions, *generic, *refused)
    )
    codec = Codec(tokenizer, "{image} {prompt}", (s.image_side // s.patch) ** 2, longest + 1)
    llava = model.small(s, tokenizer)
    plain, told = codec.encode(generic), codec.encode(refused, people.INSTRUCTION)
    x = torch.full((len(plain), told.shape[1]), codec.pad)
    x[:, 0], x[:, 1 - plain.shape[1] :] = plain[:, 0], plain[:, 1:]
    x = torch.cat([x, told])
    pictures = torch.from_numpy(bench.pixels(images, s.image_side, model.CLIP_MEAN, model.CLIP_STD))
    path = _kept(place, s, "pretrained", _hash(x, pictures), _PRETRAINING)
    weights = _read(path) if path is not None and path.exists() else None
    if weights is not None:
        llava.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
        return llava.eval(), codec, s.image_side
    model.pretrain(llava, codec, x, pictures, s, progress)
    if path is not None:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{k: v.numpy() for k, v in llava.state_dict().items()})
    return llava, codec, s.image_side
