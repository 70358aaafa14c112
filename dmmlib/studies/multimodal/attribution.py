"""Attribution to people: what leaving profiles out of the teaching does to every token of every answer.

The unit is a profile: masks are over people, and a person's gradient is summed over the answers about them. With
phi_t the gradient of the margin of token t in the trainable weights, and h_t how likely models that were not taught the
person are to be wrong there,

    Phi_p = sum over the tokens t of p's training answers of h_t phi_t,
    T_pt = ((K + lam mean(diag K) I)^-1 Phi phi_t)_p,    K = Phi Phi^T,

averaged over models, and r_p T_pt is what teaching p is expected to add to the margin of t, r_p measured on p's own
answers (`attributors.kernel`, where a training point is one example). Gradients are sketched (Charikar, Chen and
Farach-Colton, 2002): weights are summed, with random signs, into few buckets; inner products are kept in expectation.

Around that prior lies the study's Bayesian datamodel (`attributors.bayesian`). It knows one own output per training
point, and a person has many: so every place in a profile (say, the first word of the second cloze question) is a
problem of its own, with one output per person.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dmmlib import datamodels, metrics
from dmmlib.attribution import Context
from dmmlib.attributors import bayesian, kernel
from dmmlib.attributors.margins import calibrated
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.ensemble import Ensemble
from dmmlib.studies.multimodal.world import World

BUCKETS = 8192  # of a sketched gradient
LAM, DELTA = 0.3, 0.2  # the kernel's penalty, and the share of the prior that is each person's own


@dataclass(frozen=True)
class Tokens:
    """The tokens of all answers, EOS included and padding left out: arrays (n_tokens,)."""

    question: np.ndarray
    place: np.ndarray  # which token of the question's answer
    truth: np.ndarray  # number of the correct token's logit among those that are kept
    owner: np.ndarray  # index of the person that the answer is about, -1 for public figures
    taught: np.ndarray  # whether the question is a training question

    @classmethod
    def of(cls, world: World) -> Tokens:
        question, place = np.nonzero((world.answers != world.codec.pad).cpu().numpy())
        truth = world.truth.cpu().numpy()[question, place]
        return cls(question, place, truth, world.person[question], question < world.n_taught)


def moved(world: World, logits: np.ndarray, change: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Predict logits (n_models, n, A, V) of some questions: each model's own, moved in the margin gauge."""
    truth = world.truth[questions].cpu().numpy().ravel()
    flat = logits.reshape(len(logits), len(truth), -1)
    return datamodels.retrained(flat, change.reshape(flat.shape[1:]), truth).reshape(logits.shape)


def mean_change(world: World, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Compute the mean change (n, A, V), in the margin gauge, of logits of the first n questions."""
    truth = world.truth[: before.shape[1]].cpu().numpy().ravel()
    means = [metrics.margin_gauge(z.reshape(len(z), len(truth), -1), truth).mean(0) for z in (before, after)]
    return (means[1] - means[0]).reshape(before.shape[1:])


Change = Callable[[Sequence[int] | np.ndarray], np.ndarray]
"""The change of logits in the margin gauge (n_questions, A, V) without some people, for their indices."""


def fit(world: World, masks: np.ndarray, logits: np.ndarray, models: Ensemble) -> dict[str, Change]:
    """Fit several methods to what subset models answer.

    Args:
        masks: who each subset model was taught (M, n_people).
        logits: their answers (M, n_questions, A, V).
        models: the first of them, at which gradients are taken.

    Returns:
        "Bayesian", as the module describes it; its parts alone: "own", a person's weight on their own answers, and
        "kernel", the prior, scaled to fit; and "ridge" with each penalty.
    """
    tokens = Tokens.of(world)
    outputs = metrics.margin_gauge(logits[:, tokens.question, tokens.place], tokens.truth)
    prior = kernel_weights(world, masks, metrics.right_logits(outputs, tokens.truth), models, tokens)
    every, about = np.arange(len(tokens.truth)), np.flatnonzero(tokens.owner >= 0)

    def context(which: np.ndarray) -> Context:
        truth = torch.from_numpy(tokens.truth[which])
        return Context(torch.zeros(len(which)), truth, masks, outputs[:, which], seed=world.s.seed)

    own = [np.flatnonzero(tokens.owner == p) for p in range(len(world.people))]
    places = [np.array([mine[min(j, len(mine) - 1)] for mine in own]) for j in range(max(map(len, own)))]
    places[0] = np.concatenate([places[0], every[tokens.owner < 0]])
    parts: dict[str, list[tuple[Change, np.ndarray]]] = {
        "Bayesian": [(bayesian.fit(context(which), prior[:, which], DELTA).effect, which) for which in places],
        "own": [(own_effect(masks, outputs[:, about], tokens.owner[about]), about)],
        "kernel": [(calibrated(context(every), prior).effect, every)],
    }
    parts |= {f"ridge, {lam:g}": [(RidgeDatamodel.fit(masks, outputs, lam).effect, every)] for lam in world.s.lams}

    def change(name: str, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        found = np.zeros(logits.shape[1:], np.float32)
        for effect, which in parts[name]:
            found[tokens.question[which], tokens.place[which]] = effect(forget)
        return found

    return {name: partial(change, name) for name in parts}


def own_effect(masks: np.ndarray, outputs: np.ndarray, owner: np.ndarray) -> Change:
    """Subtract mean outputs of models taught the owner (n_tokens,) from those of models not: (M, n_tokens, V)."""
    taught = masks[:, owner][..., None]
    means = [(outputs * m).sum(0) / np.maximum(m.sum(0), 1) for m in (~taught, taught)]
    difference = np.asarray(means[0] - means[1], np.float32)
    return lambda forget: np.isin(owner, forget)[:, None] * difference


def kernel_weights(
    world: World, masks: np.ndarray, margins: np.ndarray, models: Ensemble, tokens: Tokens
) -> np.ndarray:
    """Return r_p T_pt (n_people, n_tokens) of the module: how much teaching each person raises each token's margin.

    From margins (M, n_tokens) of models taught by masks (M, n_people), and gradients at `models`.
    """
    n = len(world.people)
    mine = (tokens.owner[:, None] == np.arange(n)) & tokens.taught[:, None]
    untaught = ~masks[:, tokens.owner] & (tokens.owner >= 0)
    held_out = (expit(-margins) * untaught).sum(0) / np.maximum(untaught.sum(0), 1)
    total = np.zeros((n, len(held_out)), np.float32)
    for i in range(models.n_models):
        phi = sketches(world, models, i, tokens).cpu()
        people = torch.from_numpy((mine * held_out[:, None]).T.astype(np.float32)) @ phi
        gram = people @ people.T
        gram.diagonal().add_(LAM * gram.diagonal().mean())
        total += torch.cholesky_solve(people @ phi.T, torch.linalg.cholesky(gram)).numpy() / models.n_models
    share = (mine / mine.sum(0)).astype(np.float32)
    residual = kernel.measured_residuals(margins @ share, masks, np.einsum("pt,tp->p", total, share))
    return np.asarray(residual[:, None] * total, np.float32)


def sketches(world: World, models: Ensemble, i: int, tokens: Tokens) -> Tensor:
    """Compute sketched gradients (n_tokens, BUCKETS) of each token's margin in the trainable weights of model i."""
    module, (params, _), device = models.module, models.state_of(i), world.x.device
    n_weights = sum(v.numel() for v in params.values())
    block = max(1, 10_000_000 // n_weights)
    rng = torch.Generator().manual_seed(world.s.seed)
    bucket = torch.randint(BUCKETS, (n_weights,), generator=rng).to(device)
    sign = (2.0 * torch.randint(2, (n_weights,), generator=rng) - 1.0).to(device)

    def margin(params: dict[str, Tensor], row: Tensor, place: Tensor, answer: Tensor) -> Tensor:
        logits = functional_call(module, (params, {}), (row[None],))[0].float()
        z = logits.gather(0, place.expand(1, logits.shape[1]))[0]
        true = torch.arange(len(z), device=z.device) == answer
        return (z * true).sum() - z.masked_fill(true, -torch.inf).logsumexp(0)

    each = vmap(grad(margin), (None, 0, 0, 0))
    rows = []
    for part in torch.arange(len(tokens.question)).split(block):
        question, place = (torch.from_numpy(a[part]).to(device) for a in (tokens.question, tokens.place))
        found = each(params, world.x[question], place, world.answers[question, place])
        flat = torch.cat([found[k].flatten(1) for k in params], 1).float() * sign
        rows.append(flat.new_zeros(len(flat), BUCKETS).index_add_(1, bucket, flat))
    return torch.cat(rows)
