"""How answers are judged: the benchmark's scores, and margins for KLoM.

The benchmark asks a language model how factual a free answer is. Here a rule does, attribute by attribute: an answer
is factual if it names the right value and no other value that this kind of question is ever answered with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import stats

from dmmlib.ensemble import Ensemble
from dmmlib.metrics import Estimate
from dmmlib.studies.multimodal.extra import require
from dmmlib.studies.multimodal.people import INSTRUCTION
from dmmlib.studies.multimodal.world import World


@dataclass(frozen=True)
class Judged:
    """What models answer to some questions.

    Attributes:
        questions: their indices (n,).
        margins: mean log-odds of the right answer's tokens (n_models, n).
        scores: of the question's task (n_models, n): classification 1 or 0, ROUGE-L of generation, cloze 1 or 0; NaN
            where nothing generates (predicted logits).
        factual: of generation 1 or 0, else NaN (n_models, n).
    """

    questions: np.ndarray
    margins: np.ndarray
    scores: np.ndarray
    factual: np.ndarray


@lru_cache(maxsize=100_000)
def rouge_l(said: str, truth: str) -> float:
    """ROUGE-L's F1 in [0, 1] (Lin, 2004), by the package rouge-score."""
    return float(_scorer().score(truth, said)["rougeL"].fmeasure)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    return require("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)


def factual(said: str, truth: str, others: frozenset[str]) -> bool:
    """Whether an answer holds the truth's words and none of the words that only other answers have."""
    words, right = set(said.lower().split()), set(truth.lower().split())
    return right <= words and not words & (others - right)


def judge(world: World, models: Ensemble, questions: np.ndarray, instructed: bool = False) -> Judged:
    """Ask models some questions; `instructed` puts the system instruction before each."""
    asked = [world.questions[i] for i in questions]
    x = world.codec.encode(asked, INSTRUCTION if instructed else "").to(world.x.device)
    free = np.flatnonzero(world.task[questions] == "generation")
    said = world.generate(models, x[free])
    return judged(world, world.logits(models, questions, x), questions, (free, said))


def judged(
    world: World, logits: np.ndarray, questions: np.ndarray, said: tuple[np.ndarray, torch.Tensor] | None = None
) -> Judged:
    """Scores of logits (n_models, n, A, V), and of what was generated for the questions at some places, if anything.

    A cloze answer is right if every token, EOS included, is the likeliest given the right ones before: that is when
    greedy decoding gives the answer. (Where not all logits are kept, likelier than all that are not, together.)
    """
    asked, task = [world.questions[i] for i in questions], world.task[questions]
    scores = np.full(logits.shape[:2], np.nan, np.float32)
    facts = scores.copy()
    choice = np.flatnonzero(task == "classification")
    options, label = world.codec.options([asked[i] for i in choice]).numpy(), [asked[i].label for i in choice]
    if world.columns is not None:  # the options are kept first, the right one before the others
        options, label = np.broadcast_to(np.arange(options.shape[1]), options.shape), [0] * len(choice)
    first = np.take_along_axis(logits[:, choice, 0], np.broadcast_to(options, (len(logits), *options.shape)), 2)
    scores[:, choice] = first.argmax(-1) == label
    gaps = np.flatnonzero(task == "cloze")
    y, padding = (t[questions[gaps]].cpu().numpy() for t in (world.right, world.answers == world.codec.pad))
    scores[:, gaps] = ((logits[:, gaps].argmax(-1) == y) | padding).all(-1)
    if said is not None:
        free, tokens = said
        others = _other_words(world)
        for m, answers_of in enumerate(tokens):
            for i, text in zip(free, world.codec.decode(answers_of), strict=True):
                scores[m, i] = rouge_l(text, asked[i].answer)
                facts[m, i] = factual(text, asked[i].answer, others)
    return Judged(questions, world.margins(logits, questions), scores, facts)


def _other_words(world: World) -> frozenset[str]:
    """Words that answers to cloze questions are made of: the values of every attribute."""
    return frozenset(w for q in world.questions if q.task == "cloze" for w in q.answer.lower().split())


def over_people(values: np.ndarray, person: np.ndarray) -> Estimate:
    """Mean of values (n,) with a 95 % t-interval over people (n,): a person's questions are no independent looks.

    NaN values do not count; there is no interval for fewer than two people.
    """
    person, values = person[~np.isnan(values)], values[~np.isnan(values)]
    means = np.array([values[person == p].mean() for p in np.unique(person)])
    n, none = len(means), float("nan")
    if n < 2:
        return Estimate(float(means[0]) if n else none, none, none)
    value = float(means.mean())
    error = float(stats.t.ppf(0.975, n - 1) * means.std(ddof=1) / np.sqrt(n))
    return Estimate(value, value - error, value + error)
