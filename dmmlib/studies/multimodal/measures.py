"""How answers are judged: the benchmark's scores, and margins for distances from retrained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from dmmlib.analysis.intervals import means_over
from dmmlib.ensemble import Ensemble
from dmmlib.studies.multimodal.extra import require
from dmmlib.studies.multimodal.world import World, instructed


@dataclass(frozen=True)
class Judged:
    """What models answer to n questions: arrays (n_models, n)."""

    margins: np.ndarray  # mean log-odds of the correct answer's tokens
    scores: np.ndarray  # 1 or 0 of classification and cloze, ROUGE-L of generation; NaN where nothing is generated


@lru_cache(maxsize=100_000)
def rouge_l(said: str, truth: str) -> float:
    """Compute ROUGE-L's F1 in [0, 1] (Lin, 2004), by the package rouge-score."""
    scorer = require("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    return float(scorer.score(truth, said)["rougeL"].fmeasure)


def judge(world: World, models: Ensemble, questions: np.ndarray, prompting: bool = False) -> Judged:
    """Ask models some questions, each after the system instruction if `prompting`."""
    asked = [instructed(world.questions[i]) if prompting else world.questions[i] for i in questions]
    x = world.codec.encode(asked).to(world.x.device)
    said = world.generate(models, x[world.task[questions] == "generation"])
    return judged(world, world.logits(models, questions, x), questions, said)


def judged(world: World, logits: np.ndarray, questions: np.ndarray, said: torch.Tensor | None = None) -> Judged:
    """Score logits (n_models, n, A, V), and the tokens (n_models, n_free, A) said to free questions, if any were.

    A cloze answer is correct if every token, EOS included, is the likeliest given the correct ones before: that is when
    greedy decoding gives the answer. (Where not all logits are kept, likelier than all that are not, together.)
    """
    asked, task = [world.questions[i] for i in questions], world.task[questions]
    choice, cloze, free = (np.flatnonzero(task == kind) for kind in ("classification", "cloze", "generation"))
    scores = np.full(logits.shape[:2], np.nan, np.float32)
    options, label = world.codec.options([asked[i] for i in choice]).numpy(), [asked[i].label for i in choice]
    if world.columns is not None:  # the options are kept first, the correct one before the others
        options, label = np.zeros_like(options) + np.arange(options.shape[1]), [0] * len(choice)
    first = np.take_along_axis(logits[:, choice, 0], options[None], 2)
    scores[:, choice] = first.argmax(-1) == label
    truth, padding = (t[questions[cloze]].cpu().numpy() for t in (world.truth, world.answers == world.codec.pad))
    scores[:, cloze] = ((logits[:, cloze].argmax(-1) == truth) | padding).all(-1)
    if said is not None:
        for m, tokens in enumerate(said):
            for i, text in zip(free, world.codec.decode(tokens), strict=True):
                scores[m, i] = rouge_l(text, asked[i].answer)
    return Judged(world.margins(logits, questions), scores)


def over_people(scores: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Compute the mean score for each combination of the columns `by`, with a 95 % t-interval over "person".

    A person's questions are no independent looks, so they are averaged first; columns as of `intervals.means_over`,
    with "people" for n.
    """
    each = scores.astype({"score": float}).groupby([*by, "person"], sort=False)["score"].mean()
    return means_over(each.reset_index(), by, "score").rename(columns={"n": "people"})
