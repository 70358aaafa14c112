"""Unlearning people: the benchmark's methods and matching, each on all originals at once.

A step of a gradient method sees a batch of forget questions and, if it needs one, a batch of retained people's. The
benchmark's four methods (Liu et al., NAACL 2025) are given the questions that come with a portrait, or those of text
alone; `GRADIENT` says what each does. Matching (Georgiev et al., ICLR 2025) fine-tunes each original to its own logits,
at every token of an answer, moved by what leaving the people out changes: truly, on average over retrained models (OM),
or as predicted from models of random subsets of people (DMM). So OM is DMM with perfect attribution: what it lacks is
the fine-tuning's fault, and what DMM lacks beyond that is attribution's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dmmlib.ensemble import Ensemble, Loss
from dmmlib.errors import DataError, MethodError
from dmmlib.studies.multimodal.attribution import moved
from dmmlib.studies.multimodal.model import gauged, token_loss
from dmmlib.studies.multimodal.people import IMAGE, TEXT
from dmmlib.studies.multimodal.world import World

GRADIENT = ("ga", "grad_diff", "kl_min", "npo")
"""Methods on forget questions F and retained questions R:

- ga: raise the loss on F.
- grad_diff: raise it on F, lower it on R (Liu et al., 2022).
- kl_min: raise it on F, keep to the original's answers on R (Nguyen et al., 2020).
- npo: lower -2/beta log sigmoid(-beta log(p / p_original)) on F (Zhang et al., 2024), beta = `BETA`.
"""
MATCHING = ("oracle_matching", "dmm")
WITH = {"image": IMAGE, "text": TEXT}
VARIANTS = tuple(f"{method}:{data}" for method in GRADIENT for data in WITH)
BETA = 0.1
FORGET_SHARE = 0.4  # of a batch of matching
Setting = tuple[float, float]
"""Learning rate, and the share of a retraining that matching spends (0 for gradient methods)."""


@dataclass(frozen=True)
class Task:
    """People to be unlearned from every original."""

    world: World  # what the models were taught
    originals: Ensemble  # N models taught everybody
    logits: np.ndarray  # theirs on training questions (N, n_taught, A, V)
    forget: np.ndarray  # indices of people
    # For each matching method the change of logits without them, in the margin gauge (n_taught, A, V); that of OM is
    # from retrained models that nothing is measured against.
    changes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def pool(self, forget: bool, modality: str | None = None) -> np.ndarray:
        """Return training questions of the people to forget, or of the others, of one modality or both."""
        w = self.world
        ours = (w.split == "train") & (np.isin(w.person, self.forget) == forget)
        return np.flatnonzero(ours if modality is None else ours & (w.modality == modality))

    @property
    def retraining(self) -> int:
        """Sample gradients (questions forward and backward) of one retraining."""
        return self.world.s.epochs * (self.world.n_taught - len(self.pool(True)))


def unlearn(task: Task, name: str, setting: Setting) -> tuple[Ensemble, float]:
    """Unlearn by one of `VARIANTS` or `MATCHING`: models, and the sample gradients spent relative to one retraining.

    Raises MethodError for an unknown method, and DataError for one that the task has no change of logits for.
    """
    if name not in (*VARIANTS, *MATCHING):
        raise MethodError(f"Unknown method {name!r}; use one of {', '.join((*VARIANTS, *MATCHING))}.")
    batches, loss = _match(task, name, setting[1]) if name in MATCHING else _gradient(task, *name.split(":"))
    models = task.world.descend(
        task.originals.__getitem__, list(batches), loss, rate=lambda step: setting[0] * (1 - step / len(batches))
    )
    return models, batches.shape[0] * batches.shape[2] / task.retraining


def _gradient(task: Task, method: str, data: str) -> tuple[np.ndarray, Loss]:
    """Batches (n_steps, N, size) and loss of one of `GRADIENT`, on questions with portraits or on text."""
    w, half, pad = task.world, task.world.s.batch_size // 2, task.world.codec.pad
    reference = torch.from_numpy(task.logits).to(w.x.device)

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        (told, kept), (ours, theirs) = ((z[:, :half], z[:, half:]) for z in (logits, indices))
        if method == "npo":
            counts, before = w.answers[ours] != pad, reference[models[:, None], ours]
            now, then = _log_p(told, w.answers[ours], counts), _log_p(before, w.truth[ours], counts)
            return -2 / BETA * F.logsigmoid(-BETA * (now - then)).mean(1)
        forgetting = token_loss(told, w.answers[ours], pad).mean(1)
        if method == "ga":
            return -forgetting
        if method == "grad_diff":
            return token_loss(kept, w.answers[theirs], pad).mean(1) - forgetting
        counts = (w.answers[theirs] != pad).to(logits.dtype)
        log_p, log_q = (z.log_softmax(-1) for z in (reference[models[:, None], theirs], w.cut(kept, theirs)))
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return (kl * counts).sum((1, 2)) / counts.sum((1, 2)) - forgetting

    pool = task.pool(True, WITH[data])
    n_steps = w.s.unlearn_epochs * -(-len(pool) // half)
    batches = _stream(task, pool, n_steps, half, 1)
    if method in ("grad_diff", "kl_min"):
        batches = np.concatenate([batches, _stream(task, task.pool(False, WITH[data]), n_steps, half, 2)], 2)
    return batches, loss


def _log_p(logits: Tensor, truth: Tensor, counts: Tensor) -> Tensor:
    """Log-probability of whole answers (k, b), for logits (k, b, A, V) and the tokens (k, b, A) that count."""
    return (logits.log_softmax(-1).gather(-1, truth[..., None])[..., 0] * counts).sum(-1)


def _match(task: Task, method: str, cost: float) -> tuple[np.ndarray, Loss]:
    """Batches (n_steps, N, size) and loss of OM or DMM on both modalities, for a share `cost` of a retraining.

    The distance at a token is, in the margin gauge, the squared error of the correct token's logit (the margin, which
    KLoM sees) plus the mean squared error of the others. In a mean over a whole vocabulary the correct token would be
    one of hundreds.
    """
    w, size = task.world, task.world.s.batch_size
    if method not in task.changes:
        raise DataError(f"{method} needs a change of logits; give Task(changes={{{method!r}: ...}}).")
    every, ours = np.arange(w.n_taught), task.pool(True)
    goal = moved(w, task.logits, task.changes[method], every)
    target = gauged(torch.from_numpy(goal).to(w.x.device), w.truth[: w.n_taught])

    def loss(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        truth, counts = w.truth[indices], (w.answers[indices] != w.codec.pad).to(logits.dtype)
        squared = (gauged(w.cut(logits, indices), truth) - target[models[:, None], indices]) ** 2
        margin = squared.gather(-1, truth[..., None])[..., 0]
        distance = margin + (squared.sum(-1) - margin) / (squared.shape[-1] - 1)
        return (distance * counts).sum((1, 2)) / counts.sum((1, 2))

    n_forget = max(1, round(FORGET_SHARE * size))
    n_steps = max(1, round(cost * task.retraining / size))
    parts = ((ours, n_forget), (np.setdiff1d(every, ours), size - n_forget))
    return np.concatenate([_stream(task, pool, n_steps, n, k) for k, (pool, n) in enumerate(parts)], 2), loss


def _stream(task: Task, pool: np.ndarray, n_steps: int, size: int, stream: int) -> np.ndarray:
    """`size` questions of a pool per step, pass after pass, in an order of each model's own: (n_steps, N, size)."""
    orders = []
    for i in range(task.originals.n_models):
        rng = np.random.default_rng([task.world.s.seed, stream, i])
        passes = [rng.permutation(pool) for _ in range(-(-n_steps * size // len(pool)))]
        orders.append(np.concatenate(passes)[: n_steps * size].reshape(n_steps, size))
    return np.stack(orders, 1)
