"""Unlearning people: the benchmark's methods and matching, each on an ensemble at once.

An unlearning step sees a batch of forget questions and one of retained people's. The benchmark's four methods (Liu et
al., NAACL 2025) can be given the questions that come with a portrait, or those of text alone. Matching (Georgiev et
al., ICLR 2025) fine-tunes each original to its own logits, at every token of an answer, moved by what leaving the
people out changes: truly, on average over retrained models (OM), or as predicted from models of random subsets of
people (DMM). So OM is DMM with perfect attribution: what it lacks is the fine-tuning's fault, and what DMM lacks
beyond that is attribution's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dmmlib.ensemble import Ensemble, concatenate, descend
from dmmlib.errors import DataError, MethodError
from dmmlib.optim import Adam
from dmmlib.studies.multimodal.attribution import moved
from dmmlib.studies.multimodal.model import gauged, token_loss
from dmmlib.studies.multimodal.world import World

GRADIENT = ("ga", "grad_diff", "kl_min", "npo")
MATCHING = ("oracle_matching", "dmm")


@dataclass(frozen=True)
class Task:
    """People to be unlearned from every original.

    Attributes:
        world: what the models were taught.
        originals: N models taught everybody.
        logits: theirs on training questions (N, n_taught, A, V).
        forget: indices of people.
        changes: matching method -> change of logits without them, in the margin gauge (n_taught, A, V); that of OM is
            from retrained models that nothing is measured against.
        tried: numbers of the originals that are unlearned; all if None.
    """

    world: World
    originals: Ensemble
    logits: np.ndarray
    forget: np.ndarray
    changes: dict[str, np.ndarray] = field(default_factory=dict)
    tried: int | None = None

    @property
    def n_models(self) -> int:
        return self.tried or self.originals.n_models

    def pool(self, forget: bool, modality: str | None) -> np.ndarray:
        """Training questions of the people to forget, or of the others, of one modality or both."""
        w = self.world
        ours = np.isin(w.person, self.forget) == forget
        right = np.ones(len(ours), bool) if modality is None else w.modality == modality
        return np.flatnonzero((w.split == "train") & ours & right)

    @property
    def retraining(self) -> int:
        """Sample gradients (questions forward and backward) of one retraining."""
        w = self.world
        kept = (w.split == "public") | ((w.split == "train") & ~np.isin(w.person, self.forget))
        return w.s.epochs * int(kept.sum())


def _log_probability(logits: Tensor, right: Tensor, counted: Tensor) -> Tensor:
    """Of whole answers (k, b): of the logits (k, b, A, V) that `right` (k, b, A) numbers, where they count."""
    return (logits.log_softmax(-1).gather(-1, right[..., None])[..., 0] * counted).sum(-1)


def _divergence(logits: Tensor, reference: Tensor, answers: Tensor, pad: int) -> Tensor:
    """KL(reference || model), averaged over answers' tokens and questions: (k,)."""
    kl = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    counts = (answers != pad).to(kl.dtype)
    return (kl * counts).sum((1, 2)) / counts.sum((1, 2))


def gradient(task: Task, method: str, modality: str | None, lr: float) -> tuple[Ensemble, float]:
    """GA, gradient difference, KL minimisation or NPO on questions of one modality (both if None).

    - ga: raise the loss on F.
    - grad_diff: raise it on F, lower it on R (Liu et al., 2022).
    - kl_min: raise it on F, keep to the original's answers on R (Nguyen et al., 2020).
    - npo: lower -2/beta log sigmoid(-beta log(p / p_original)) on F, beta = 0.1 (Zhang et al., 2024).

    Returns:
        The models, and the sample gradients spent on each relative to one retraining.
    """
    if method not in GRADIENT:
        raise MethodError(f"Unknown method {method!r}; use one of {', '.join((*GRADIENT, *MATCHING))}.")
    w, s = task.world, task.world.s
    answers, pad, beta = w.answers, w.codec.pad, 0.1
    reference = torch.from_numpy(task.logits).to(w.x.device)
    half = s.batch_size // 2

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        right = answers[indices]
        forgetting = token_loss(logits[:, :half], right[:, :half], pad).mean(1)
        if method == "ga":
            return -forgetting
        if method == "npo":
            told, counted = right[:, :half], right[:, :half] != pad
            was = reference[models[:, None], indices[:, :half]]
            before = _log_probability(was, w.right[indices[:, :half]], counted)
            ratio = _log_probability(logits[:, :half], told, counted) - before
            return -2 / beta * F.logsigmoid(-beta * ratio).mean(1)
        if method == "grad_diff":
            return token_loss(logits[:, half:], right[:, half:], pad).mean(1) - forgetting
        kept = reference[models[:, None], indices[:, half:]]
        now = w.cut(logits[:, half:], indices[:, half:])
        return _divergence(now, kept, right[:, half:], pad) - forgetting

    pool = task.pool(True, modality)
    n_steps = s.unlearn_epochs * -(-len(pool) // half)
    batches = _stream(task, pool, n_steps, half, 1)
    if method in ("grad_diff", "kl_min"):
        batches = np.concatenate([batches, _stream(task, task.pool(False, modality), n_steps, half, 2)], 2)
    return _finetune(task, batches, loss, lr)


def match(task: Task, method: str, lr: float, cost: float, forget_share: float = 0.4) -> tuple[Ensemble, float]:
    """OM or DMM, on questions of both modalities, for a share `cost` of a retraining.

    The distance at a token is, in the margin gauge, the squared error of the right token's logit (the margin, which is
    what KLoM hears) plus the mean squared error of the others. In a mean over a whole vocabulary the right token would
    be one of hundreds.

    Raises:
        DataError: where the task has no change of that method's.
    """
    w, s = task.world, task.world.s
    if method not in task.changes:
        raise DataError(f"{method} needs a change of logits; give Task(changes={{{method!r}: ...}}).")
    goal = moved(w, task.logits[: task.n_models], task.changes[method], np.arange(w.n_taught))
    target = gauged(torch.from_numpy(goal).to(w.x.device), w.right[: w.n_taught])
    answers, pad = w.answers, w.codec.pad

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        right, counts = w.right[indices][..., None], (answers[indices] != pad).to(logits.dtype)
        squared = (gauged(w.cut(logits, indices), w.right[indices]) - target[models[:, None], indices]) ** 2
        margin = squared.gather(-1, right)[..., 0]
        distance = margin + (squared.sum(-1) - margin) / (squared.shape[-1] - 1)
        return (distance * counts).sum((1, 2)) / counts.sum((1, 2))

    n_forget = max(1, round(forget_share * s.batch_size))
    n_steps = max(1, round(cost * task.retraining / s.batch_size))
    ours = task.pool(True, None)
    others = np.setdiff1d(np.arange(w.n_taught), ours)
    shares = [(ours, n_forget), (others, s.batch_size - n_forget)]
    batches = np.concatenate([_stream(task, pool, n_steps, size, k) for k, (pool, size) in enumerate(shares)], 2)
    return _finetune(task, batches, loss, lr)


def _stream(task: Task, pool: np.ndarray, n_steps: int, size: int, stream: int) -> np.ndarray:
    """`size` questions of a pool a step, pass after pass, in an order of each model's own: (n_steps, N, size)."""
    orders = []
    for i in range(task.n_models):
        rng = np.random.default_rng([task.world.s.seed, stream, i])
        passes = [rng.permutation(pool) for _ in range(-(-n_steps * size // len(pool)))]
        orders.append(np.concatenate(passes)[: n_steps * size].reshape(n_steps, size))
    return np.stack(orders, 1)


def _finetune(
    task: Task, batches: np.ndarray, loss: Callable[[Tensor, Tensor, Tensor], Tensor], lr: float
) -> tuple[Ensemble, float]:
    """Adam, from `lr` falling linearly to zero."""
    w, optimizer = task.world, Adam(lr)

    def chunk(members: np.ndarray) -> Ensemble:
        few = task.originals[members.tolist()]
        models = w.own(Ensemble(few.module, {k: v.clone() for k, v in few.params.items()}, {}))
        descend(
            models,
            w.x,
            (batch[members] for batch in batches),
            loss,
            optimizer,
            optimizer.start(models.params),
            models=members,
            rate=lambda step: lr * (1 - step / len(batches)),
        )
        return models

    models = concatenate(list(w.execution.run(chunk, w.chunks(task.n_models))))
    return models, batches.shape[0] * batches.shape[2] / task.retraining
