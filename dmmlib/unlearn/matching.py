"""DMM and oracle matching: their grids, and fine-tuning to the answers of a model that never saw F.

Georgiev et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", ICLR 2025. Oracle matching (OM)
takes the logits of true oracles as targets and is a bound; datamodel matching (DMM) takes predicted ones. Each original
keeps its own randomness: its target is its own answer plus the predicted change.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dmmlib.errors import DataError, OptionError
from dmmlib.optim import Adam
from dmmlib.unlearn.base import Phase, Problem, Unlearned, check_options, draw_batches, finetune, register
from dmmlib.unlearn.whitening import Whitening

GEORGIEV = "Georgiev et al., ICLR 2025"
published = partial(register, elsewhere="RoyRin/data-unlearning-bench")
SPACE: dict[str, list[Any]] = {
    "cost": [0.1],
    "lr": [1e-3, 3e-3, 1e-2],
    "batch_size": [10, 20],
    "forget_share": [0.2, 0.4, 0.6],
}


def predicted_oracle(problem: Problem) -> np.ndarray:
    """Predict oracle logits (N, n_points, n_classes): each original's own, moved by what the attributor predicts."""
    if problem.attributor is None:
        raise DataError("Datamodel methods need an attributor; give Problem(attributor=...).")
    return problem.attributor.retrained(problem.original_logits, problem.forget, problem.labels)


@published(
    "dm_direct",
    paper=f"DM-direct; {GEORGIEV}",
    cost="none (the datamodel's subset models are paid once)",
    attributed=True,
)
def dm_direct(problem: Problem) -> Unlearned:
    """Answer with the predicted logits: what matching could reach. This is no model, so it costs no gradients."""
    return Unlearned.from_logits(predicted_oracle(problem), problem.labels, cost=0.0)


@published("dmm", SPACE, paper=f"DMM; {GEORGIEV}", cost="cost n_R training epochs", attributed=True)
def dmm(problem: Problem, **hyperparameters: float) -> Unlearned:
    """Datamodel matching: `match` with predicted oracle logits as targets."""
    return match(problem, predicted_oracle(problem)[:, : problem.n_train], **hyperparameters)  # type: ignore[arg-type]


@published(
    "oracle_matching",
    SPACE,
    paper=f"OM; {GEORGIEV}",
    cost="cost n_R training epochs (and not counted: n_oracles retrainings)",
)
def oracle_matching(
    problem: Problem, *, n_oracles: int = 1, targets: Literal["oracle", "shifted"] = "oracle", **hyperparameters: float
) -> Unlearned:
    """Oracle matching: `match` with targets made of the mean logits of `n_oracles` true oracles.

    Original i takes oracles i, i + 1, ... With targets "oracle" their mean is the target: of one oracle it is spread as
    oracles are, of several it is spread less. With "shifted" the target is z_original + mean oracle - mean original
    (over all N), which DMM approaches as its datamodel gets better; there, too few oracles spread it more.

    Raises DataError without oracles or for more than there are, OptionError for unknown targets.
    """
    if targets not in ("oracle", "shifted"):
        raise OptionError(f"Option targets={targets!r} was given; use 'oracle' or 'shifted'.")
    if problem.oracle_logits is None:
        raise DataError("oracle_matching needs the logits of retrained models; give Problem(oracle_logits=...).")
    oracles = problem.oracle_logits[:, : problem.n_train]
    if not 1 <= n_oracles <= len(oracles):
        raise DataError(f"n_oracles={n_oracles}, but there are {len(oracles)} oracles; use 1 to {len(oracles)}.")
    first = np.arange(problem.n_models)
    goal = np.asarray(sum(oracles[(first + j) % len(oracles)] for j in range(n_oracles)) / n_oracles, np.float32)
    if targets == "shifted":
        originals = problem.original_logits[:, : problem.n_train]
        goal = goal + originals - originals.mean(0)
    return match(problem, goal, **hyperparameters)  # type: ignore[arg-type]


N_WHITEN, DAMPING = 500, 0.03  # retained points on which inputs of layers are measured, at most; see `Whitening`


def whiten(problem: Problem, cost: float) -> tuple[int, Whitening]:
    """Choose coordinates to match in: retained points that each model sees for them, and the coordinates."""
    seen = max(1, min(N_WHITEN, len(problem.retain), round(cost * problem.retraining / 8)))
    points = np.stack([rng.permutation(problem.retain)[:seen] for rng in problem.rngs(2)])
    return seen, Whitening(problem.x, points, DAMPING, problem.originals.module)


def match(
    problem: Problem,
    targets: np.ndarray,
    *,
    cost: float = 0.1,
    lr: float = 3e-3,
    batch_size: int = 20,
    forget_share: float = 0.4,
    optimizer: str = "whitened",
) -> Unlearned:
    """Fine-tune every original to target logits (N, n_train, n_classes) on F and a random sample of R.

    The loss is the mean squared error on logits; Adam steps at a rate that falls linearly to zero. Targets move the
    answers of F far and those of R hardly, so a step for the one must leave the other alone; inputs of layers that are
    all positive and alike tie them together, hence the coordinates (`Whitening`). The published
    setting (F repeated 5 times with 20 |F| of R per epoch) is `forget_share` 0.2; here the *cost* is fixed instead of
    the number of epochs, so that small and large forget sets get the same work, and small batches use it better.

    Args:
        cost: sample gradients to spend, relative to one retraining; up to an eighth of it goes into whitening.
        lr: Adam's rate at the start.
        forget_share: share of a batch that comes from F; the rest is drawn from R.
        optimizer: "whitened", or "adam" in the models' own coordinates.

    Raises OptionError for an unknown optimizer, or a cost, rate, size or share out of range.
    """
    if optimizer not in ("whitened", "adam"):
        raise OptionError(f"Option optimizer={optimizer!r} was given; use 'whitened' or 'adam'.")
    check_options(cost=cost, lr=lr)
    check_options(1, whole=True, batch_size=batch_size)
    check_options(high=1.0, forget_share=forget_share)
    goal = torch.from_numpy(targets).to(problem.x.device)

    def to_targets(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        return ((logits - goal[models[:, None], indices]) ** 2).mean((1, 2))

    seen, whitening = whiten(problem, cost) if optimizer == "whitened" else (0, None)
    n_steps = max(1, round((cost * problem.retraining - seen) / batch_size))
    from_forget = min(max(1, round(forget_share * batch_size)), batch_size - 1)
    forgotten = draw_batches(problem, problem.forget, n_steps, from_forget)
    retained = draw_batches(problem, problem.retain, n_steps, batch_size - from_forget)
    phase = Phase(list(np.concatenate([forgotten, retained], axis=2)), to_targets)
    return finetune(problem, [phase], Adam(lr), rate=lambda t: lr * (1 - t), spent=seen, whitening=whitening)
