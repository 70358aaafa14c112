"""What notebook 09 works on: a benchmark's questions as tokens, a pretrained model, and ensembles fine-tuned from it.

Models of a kind start from the same pretrained model, as the benchmark's do, and differ by the order of what they are
taught. A retrained model is fine-tuned without some people, from that same start. Public figures are taught along:
so small a model would otherwise lose them.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call

from dmmlib import metrics
from dmmlib.ensemble import Ensemble, Loss, Training, descend, epoch_batches
from dmmlib.errors import DataError
from dmmlib.execution import Execution
from dmmlib.files import config_hash, kept, read_arrays, short, write_arrays
from dmmlib.optim import Adam, Tensors
from dmmlib.progress import Progress, silent
from dmmlib.studies.multimodal import bench, model, people
from dmmlib.studies.multimodal.bench import Question
from dmmlib.studies.multimodal.model import Answerer, Codec
from dmmlib.studies.multimodal.settings import MultimodalSettings

R = TypeVar("R")
VERSION = 2  # of what lies in the cache: raise it when the same settings give other weights
BLOCK = 128  # questions that are answered at a time


def _column(name: str) -> cached_property[np.ndarray]:
    return cached_property(lambda world: np.array([getattr(q, name) for q in world.questions]))


@dataclass(frozen=True)
class World:
    """Everything but the ensembles."""

    s: MultimodalSettings
    counts: pd.DataFrame  # questions of each split, as `bench.validate` counts them
    questions: tuple[Question, ...]  # training questions (private, then public), then those of the Test set
    images: tuple[Any, ...]  # the portraits that they number
    people: tuple[str, ...]  # IDs of the private people; masks are over these
    forget_sets: dict[str, np.ndarray]  # name -> indices of people
    tuning: np.ndarray  # indices of the people that hyperparameters are chosen on
    codec: Codec  # questions as tokens
    module: Answerer  # the pretrained model
    place: Path | None = None  # where fine-tuned weights are kept; nowhere if None
    progress: Progress = silent  # hook that is told of progress

    name = _column("person")  # ID of the person that each question is about (n_questions,)
    split = _column("split")  # "train", "public" or "test" (n_questions,)
    task = _column("task")
    modality = _column("modality")

    @cached_property
    def person(self) -> np.ndarray:
        """Index into `people` (n_questions,), -1 for public figures."""
        number = {name: i for i, name in enumerate(self.people)}
        return np.array([-1 if q.split == "public" else number[q.person] for q in self.questions])

    @cached_property
    def x(self) -> Tensor:
        """Rows of tokens (n_questions, 1 + P + A), on the model's device."""
        return self.codec.encode(self.questions).to(self.module.features.device)

    @cached_property
    def answers(self) -> Tensor:
        """Tokens (n_questions, A) of the correct answers."""
        return self.codec.answers(self.x)

    @property
    def n_taught(self) -> int:
        """Questions that models are fine-tuned on; they come first."""
        return int((self.split != "test").sum())

    def taught(self, mask: np.ndarray) -> np.ndarray:
        """Return training questions of the people that a mask (n_people,) keeps, and of public figures."""
        return np.flatnonzero((self.split == "public") | ((self.split == "train") & mask[self.person]))

    def without(self, forget: np.ndarray, n: int) -> np.ndarray:
        """Return masks (n, n_people) that leave some people out."""
        return np.tile(~np.isin(np.arange(len(self.people)), forget), (n, 1))

    @cached_property
    def execution(self) -> Execution:
        """Settled once, before threads change how many threads torch says there are."""
        return Execution(self.s.chunk, workers=1 if self.x.is_cuda else torch.get_num_threads())

    def _in_chunks(
        self, work: Callable[[Ensemble, np.ndarray], R], n: int, models: Callable[[list[int]], Ensemble]
    ) -> Iterator[R]:
        """The results of `work` on the models of some numbers, and these numbers, for chunks of n models.

        Two threads cannot call one module with different weights, so each gets a module of its own.
        """
        copied = copy.deepcopy if self.execution.workers > 1 else lambda module: module

        def chunk(members: np.ndarray) -> R:
            few = models(members.tolist())
            return work(Ensemble(copied(few.module), few.params, {}), members)

        return self.execution.run(chunk, self.execution.split(np.arange(n)))

    def descend(
        self,
        start: Callable[[list[int]], Ensemble],
        batches: Sequence[np.ndarray],
        loss: Loss,
        rate: Callable[[int], float],
        task: str = "",
    ) -> Ensemble:
        """Fine-tune by Adam, in steps on `batches` of questions (n_models, batch), what `start` makes for some numbers.

        Loss and rate are as `ensemble.descend` takes them. Progress is reported as `task`, unless that is empty.
        """

        def work(models: Ensemble, members: np.ndarray) -> Ensemble:
            optimizer, mine = Adam(self.s.lr), (batch[members] for batch in batches)
            state = optimizer.start(models.params)
            descend(models, self.x, mine, loss, optimizer, state, models=members, rate=rate)
            return models

        parts: list[Ensemble] = []
        for part in self._in_chunks(work, len(batches[0]), start):
            parts.append(part)
            if task:
                self.progress(task, sum(p.n_models for p in parts), len(batches[0]))
        params = {k: torch.cat([part.params[k] for part in parts]) for k in parts[0].params}
        return Ensemble(parts[0].module, params, {})

    @cached_property
    def _data(self) -> str:
        """Hash of what models are taught, and of the portraits as the pretrained model sees them."""
        return _hash(self.x[: self.n_taught], self.module.features)

    def fine_tuned(self, stream: str, masks: np.ndarray) -> Ensemble:
        """Fine-tune models on what masks (n, n_people) keep, which must be equally many people each; kept on disk."""
        s, answers, pad, like = self.s, self.answers, self.codec.pad, dict(self.module.named_parameters())

        def train() -> Tensors:
            sequence = np.random.SeedSequence([s.seed, zlib.crc32(stream.encode())])
            seeds = sequence.generate_state(len(masks)).tolist()
            pools, rngs = [self.taught(mask) for mask in masks], [np.random.default_rng(seed) for seed in seeds]
            training = Training(epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, warmup=0.1)
            n_steps = training.steps(len(pools[0]))
            self.progress(f"fine-tune {stream}", 0, len(masks))
            return self.descend(
                lambda members: model.begin(self.module, [seeds[i] for i in members]),
                list(epoch_batches(pools, s.batch_size, s.epochs, rngs)),
                lambda logits, indices, models: model.token_loss(logits, answers[indices], pad).mean(1),
                rate=lambda step: training.rate((step + 0.5) / n_steps),
                task=f"fine-tune {stream}",
            ).params

        depends = s.model_dump(include=_TEACHING) | {"data": self._data, "masks": np.packbits(masks).tobytes().hex()}
        weights = _kept(self.place, stream, depends, train)
        return Ensemble(self.module, {k: torch.from_numpy(v).to(like[k].detach()) for k, v in weights.items()}, {})

    @cached_property
    def columns(self) -> Tensor | None:
        """Tokens whose logits are kept (n_questions, A, K), the correct one first, then a choice's other options.

        The others are those that the pretrained model finds likeliest. None where all are kept. Raises DataError if
        more are to be kept than there are.
        """
        k = self.s.kept
        if k is None:
            return None
        if k >= len(self.codec.tokenizer):
            raise DataError(f"kept={k}, but there are {len(self.codec.tokenizer)} tokens; keep fewer, or all by null.")
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
    def truth(self) -> Tensor:
        """Numbers of the correct tokens' logits (n_questions, A), among those that are kept."""
        return self.answers if self.columns is None else torch.zeros_like(self.answers)

    def cut(self, logits: Tensor, questions: Tensor) -> Tensor:
        """Cut logits (..., n, A, V) of questions of indices (..., n) down to those kept: (..., n, A, K + 1).

        The last is the logsumexp of all others, which changes no probability and no margin.
        """
        if self.columns is None:
            return logits
        columns = self.columns[questions].to(logits.device).expand(*logits.shape[:-1], -1)
        rest = logits.scatter(-1, columns, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, columns), rest], -1)

    def margins(self, logits: np.ndarray, questions: np.ndarray) -> np.ndarray:
        """Compute margins (n_models, n) from kept logits (n_models, n, A, V) of some questions.

        That is the log-odds of the correct token given the correct ones before it, averaged over an answer's words.
        """
        answers, truth = (t[questions].cpu().numpy() for t in (self.answers, self.truth))
        odds = metrics.margins(logits.reshape(len(logits), truth.size, -1), truth.ravel())
        words = ((answers != self.codec.pad) & (answers != self.codec.eos)).astype(np.float32)
        return (odds.reshape(-1, *words.shape) * words).sum(-1) / words.sum(-1)

    def logits(self, models: Ensemble, questions: np.ndarray, x: Tensor | None = None) -> np.ndarray:
        """Return kept logits (n_models, n, A, V) of answers' tokens, float32; asked as rows x say, if given."""
        x = self.x[questions] if x is None else x
        of, _ = torch.from_numpy(questions), self.columns  # these are settled before threads ask for them
        parts = torch.arange(len(x)).split(BLOCK)

        def answer(ours: Ensemble, _: np.ndarray) -> Tensor:
            return torch.cat([self.cut(ours.logits(x[part]), of[part]) for part in parts], 1)

        return torch.cat(list(self._in_chunks(answer, models.n_models, models.__getitem__))).numpy()

    def generate(self, models: Ensemble, x: Tensor) -> Tensor:
        """Generate greedy answers (n_models, n, A) to rows x, whose answers are not looked at."""

        def answer(ours: Ensemble, _: np.ndarray) -> Tensor:
            module = ours.module.eval()
            one = torch.vmap(
                lambda params, rows: functional_call(module, params, (rows,), {"generate": True}), (0, None)
            )
            with torch.no_grad():  # which each thread is told for itself
                return torch.cat([one(ours.params, part) for part in x.split(BLOCK)], 1).cpu()

        return torch.cat(list(self._in_chunks(answer, models.n_models, models.__getitem__)))


def instructed(question: Question) -> Question:
    """Put the system instruction to keep the person private before a question."""
    return replace(question, prompt=f"{people.INSTRUCTION} {question.prompt}")


_SIZE = {"seed", "hidden", "layers", "heads", "batch_size"}
_TEACHING = _SIZE | {"epochs", "lr", "rank", "checkpoint"}
_PRETRAINING = _SIZE | {"image_side", "patch", "pretrain_epochs", "pretrain_lr"}


def _hash(*tensors: Tensor) -> str:
    return short(b"".join(t.contiguous().cpu().float().numpy().tobytes() for t in tensors))


def _kept(
    place: Path | None, stream: str, depends: dict[str, Any], make: Callable[[], Tensors]
) -> dict[str, np.ndarray]:
    """Weights kept at a place under the hash of what they depend on; made if there are none or they are damaged."""
    key = config_hash({"version": VERSION, "stream": stream} | depends)

    def weights() -> dict[str, np.ndarray]:
        return {k: v.float().cpu().numpy() for k, v in make().items()}

    if place is None:
        return weights()
    return kept(place / f"multimodal-{stream.split(':')[0]}-{key}.npz", weights, read_arrays, write_arrays)


def build(
    s: MultimodalSettings, place: Path | None = None, progress: Progress = silent, device: torch.device | str = "cpu"
) -> World:
    """Read or generate the benchmark, check it, and load or pretrain the model.

    Weights are kept at `place`, and models fine-tuned on `device`. Raises DataError for a benchmark or checkpoint that
    cannot be used, before anything is trained.
    """
    if s.benchmark is not None:
        splits = bench.read(s.benchmark, s.percents)
        seen = splits["Retain_Set"]
    else:
        splits, seen = people.generate(s)
    counts = bench.validate(splits, s.percents)
    ids = tuple(str(row["ID"]) for row in splits["Full_Set"])
    forget_sets = {f"{p} %": np.array([ids.index(str(r["ID"])) for r in splits[f"forget_{p}"]]) for p in s.percents}
    free = np.setdiff1d(np.arange(len(ids)), np.concatenate(list(forget_sets.values())))
    if s.n_tuning >= len(free):
        raise DataError(
            f"n_tuning={s.n_tuning}, but only {len(free)} of {len(ids)} people are in no forget set; leave some to "
            "tune on and some to retain."
        )
    tuning = np.sort(np.random.default_rng([s.seed, 1]).permutation(free)[: s.n_tuning])
    images: list[Any] = []
    asked = list[Question]()
    for name, split in (("Full_Set", "train"), ("Retain_Set", "public"), ("Test_Set", "test")):
        asked += bench.questions(splits[name], split, images, s.letters)
    if s.checkpoint is None:
        llava, codec = _small(s, asked, seen, place, progress)
    else:
        llava, codec = model.published(s, asked, device)
    llava = llava.to(device)
    module = Answerer(llava, codec, model.encode_portraits(llava, images))
    return World(s, counts, tuple(asked), tuple(images), ids, forget_sets, tuning, codec, module, place, progress)


def _small(
    s: MultimodalSettings, asked: list[Question], seen: list[people.Row], place: Path | None, progress: Progress
) -> tuple[Any, Codec]:
    """A small LLaVA pretrained on other people, with some of their questions refused on instruction; kept on disk."""
    images: list[Any] = []
    generic = bench.questions(seen, "pretraining", images, s.letters)
    refused = [replace(instructed(q), answer=people.REFUSAL, options=()) for q in generic[::7]]
    texts = [f"{q.prompt} {q.answer} {' '.join(q.options)}" for q in asked + generic]
    tokenizer = model.tokenizer_of([*texts, f"{people.INSTRUCTION} {people.REFUSAL}"])
    codec = Codec.of(tokenizer, "{image} {prompt}", (s.image_side // s.patch) ** 2, asked + generic + refused)
    llava = model.small(s, tokenizer)
    x = codec.encode(generic + refused)
    pictures = torch.from_numpy(bench.pixels(images, s.image_side, model.CLIP_MEAN, model.CLIP_STD))

    def train() -> Tensors:
        model.pretrain(llava, codec, x, pictures, s, progress)
        return llava.state_dict()

    depends = s.model_dump(include=_PRETRAINING) | {"data": _hash(x, pictures), "masks": ""}
    weights = _kept(place, "pretrained", depends, train)
    llava.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return llava.eval(), codec
