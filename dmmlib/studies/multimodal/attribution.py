"""Attribution to people: what leaving profiles out of the teaching does to every token of every answer.

The unit is a profile: masks are over people, and a person's gradient is summed over the answers about them. With
phi_t the gradient of the margin of token t in the trainable weights, and h_t how likely models that were not taught the
person are to be wrong there,

    Phi_p = sum over the tokens t of p's training answers of h_t phi_t,
    T_pt = ((K + lam mean(diag K) I)^-1 Phi phi_t)_p,    K = Phi Phi^T,

averaged over models, and r_p T_pt is what teaching p is expected to add to the margin of t, r_p measured on p's own
answers (`attribution.kernel`, where a training point is one example). Gradients are sketched (Charikar, Chen and
Farach-Colton, 2002): weights are summed, with random signs, into few buckets; inner products are kept in expectation.

Around that prior lies the study's Bayesian datamodel (`attribution.bayesian`). It knows one own output a training
point, and a person has many: so every place in a profile (say, the first word of the second cloze question) is a
problem of its own, with an output a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dmmlib import datamodels, metrics
from dmmlib.attribution import Context, bayesian
from dmmlib.attribution.base import calibrated, indicator
from dmmlib.attributors import kernel
from dmmlib.ensemble import Ensemble
from dmmlib.studies.multimodal.world import World

BUCKETS = 8192  # of a sketched gradient
LAM, DELTA = 0.3, 0.2  # the study's own: the kernel's penalty, and the share of the prior that is each person's own


@dataclass(frozen=True)
class Tokens:
    """The tokens of all answers, EOS included and padding left out.

    Attributes:
        question, place: the question (n_tokens,), and which token of its answer.
        right: number of the right token's logit among those that are kept (n_tokens,).
        owner: index of the person that the answer is about (n_tokens,), -1 for public figures.
        taught: whether the question is a training question (n_tokens,).
    """

    question: np.ndarray
    place: np.ndarray
    right: np.ndarray
    owner: np.ndarray
    taught: np.ndarray

    @classmethod
    def of(cls, world: World) -> Tokens:
        question, place = np.nonzero((world.answers != world.codec.pad).cpu().numpy())
        right = world.right.cpu().numpy()[question, place]
        return cls(question, place, right, world.person[question], question < world.n_taught)


def gauged(logits: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Logits (n_models, n_tokens, V) of the tokens, in the margin gauge, of logits (n_models, n_questions, A, V)."""
    return metrics.margin_gauge(logits[:, tokens.question, tokens.place], tokens.right)


def moved(world: World, logits: np.ndarray, change: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Predicted logits (n_models, n, A, V) of some questions: each model's own, moved in the margin gauge."""
    right = world.right[torch.from_numpy(questions)].cpu().numpy()
    flat = logits.reshape(len(logits), -1, logits.shape[-1])
    return datamodels.retrained(flat, change.reshape(flat.shape[1:]), right.ravel()).reshape(logits.shape)


@dataclass(frozen=True)
class Profiles:
    """Attributors over masks of people, each of the outputs at some of the tokens.

    Attributes:
        attributors: fitted, and
        places: which tokens each is of.
        tokens: all of them.
        shape: of kept logits (n_questions, A, V).
    """

    attributors: Sequence[datamodels.Attributor]
    places: Sequence[np.ndarray]
    tokens: Tokens
    shape: tuple[int, ...]

    def change(self, forget: np.ndarray) -> np.ndarray:
        """Change of logits in the margin gauge (n_questions, A, V) without the people `forget` (indices).

        Raises:
            ForgetSetError: for indices that are no proper part of the people.
        """
        found = np.zeros(self.shape, np.float32)
        for attributor, place in zip(self.attributors, self.places, strict=True):
            found[self.tokens.question[place], self.tokens.place[place]] = attributor.effect(forget)
        return found


@dataclass(frozen=True)
class Own:
    """What leaving a person out changes of the one output that is about them, and nothing else (n_people, V)."""

    difference: np.ndarray

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        return indicator(forget, len(self.difference))[:, None] * self.difference

    @classmethod
    def fit(cls, masks: np.ndarray, outputs: np.ndarray) -> Own:
        """Mean output (M, n_people, V) of the models that were not taught the person, minus that of the others."""
        without, taught = ((~masks)[..., None], masks[..., None])
        means = [(outputs * m).sum(0) / np.maximum(m.sum(0), 1) for m in (without, taught)]
        return cls(np.asarray(means[0] - means[1], np.float32))


def fit(world: World, masks: np.ndarray, logits: np.ndarray, models: Ensemble) -> dict[str, Profiles]:
    """What subset models tell of leaving people out, by several methods.

    Args:
        masks: who each subset model was taught (M, n_people).
        logits: their answers (M, n_questions, A, V).
        models: the first of them, at which gradients are taken.

    Returns:
        "Bayesian", as the module describes it; its parts alone: "own", a person's weight on their own answers, and
        "kernel", the prior, scaled to fit; and "ridge", a penalty each.
    """
    tokens, n = Tokens.of(world), len(world.people)
    outputs = gauged(logits, tokens)
    prior = kernel_weights(world, masks, metrics.right_logits(outputs, tokens.right), models, tokens)

    def context(place: np.ndarray) -> Context:
        labels = torch.from_numpy(tokens.right[place])
        return Context(torch.zeros(len(place)), labels, masks, outputs[:, place], seed=world.s.seed)

    own = [np.flatnonzero(tokens.owner == p) for p in range(n)]
    places = [np.array([mine[min(j, len(mine) - 1)] for mine in own]) for j in range(max(map(len, own)))]
    every, shape = np.arange(len(tokens.right)), logits.shape[1:]
    alone = Profiles([Own.fit(masks, outputs[:, place]) for place in places], places, tokens, shape)
    places = [np.concatenate([places[0], every[tokens.owner < 0]]), *places[1:]]
    posteriors = [bayesian.fit(context(place), prior[:, place], DELTA) for place in places]
    whole: dict[str, datamodels.Attributor] = {"kernel": calibrated(context(every), prior)}
    whole |= {f"ridge, {lam:g}": datamodels.RidgeDatamodel.fit(masks, outputs, lam) for lam in world.s.lams}
    return {"Bayesian": Profiles(posteriors, places, tokens, shape), "own": alone} | {
        name: Profiles([attributor], [every], tokens, shape) for name, attributor in whole.items()
    }


def kernel_weights(
    world: World, masks: np.ndarray, margins: np.ndarray, models: Ensemble, tokens: Tokens
) -> np.ndarray:
    """r_p T_pt (n_people, n_tokens): how much teaching each person raises each token's margin; see the module.

    Args:
        masks: who each subset model was taught (M, n_people).
        margins: of the subset models at every token (M, n_tokens).
        models: at which gradients are taken.
        tokens: of all answers.
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
    """Sketched gradients (n_tokens, BUCKETS) of each token's margin in the trainable weights of model i."""
    module, params = models.module, {k: v[i] for k, v in models.params.items()}
    n_weights = sum(v.numel() for v in params.values())
    block = max(1, 10_000_000 // n_weights)
    rng = torch.Generator().manual_seed(world.s.seed)
    bucket = torch.randint(BUCKETS, (n_weights,), generator=rng).to(world.x.device)
    sign = (2.0 * torch.randint(2, (n_weights,), generator=rng) - 1.0).to(world.x.device)

    def margin(params: dict[str, Tensor], row: Tensor, place: Tensor, answer: Tensor) -> Tensor:
        logits = functional_call(module, (params, {}), (row[None],))[0].float()
        z = logits.gather(0, place.expand(1, logits.shape[1]))[0]
        right = torch.arange(len(z), device=z.device) == answer
        return (z * right).sum() - z.masked_fill(right, -torch.inf).logsumexp(0)

    each = vmap(grad(margin), (None, 0, 0, 0))
    rows = []
    for part in torch.arange(len(tokens.question)).split(block):
        question, place = (torch.from_numpy(a[part]).to(world.x.device) for a in (tokens.question, tokens.place))
        found = each(params, world.x[question], place, world.answers[question, place])
        flat = torch.cat([found[k].flatten(1) for k in params], 1).float() * sign
        rows.append(flat.new_zeros(len(flat), BUCKETS).index_add_(1, bucket, flat))
    return torch.cat(rows)
