"""Matching methods: fine-tune the original to the answers of a model that never saw F.

Georgiev et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", ICLR 2025. Oracle matching
(OM) takes true oracles' logits as targets and is a bound; datamodel matching (DMM) takes predicted ones.
Each original keeps its own randomness: its target is its own answer plus the predicted change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError, OptionError
from dmmlib.metrics import margins
from dmmlib.optim import SGD, Adam, Optimizer
from dmmlib.unlearn.base import Phase, Problem, Unlearned, draw_batches, finetune, register
from dmmlib.unlearn.whitening import unwhitened, whitened

GEORGIEV, ELSEWHERE = "Georgiev et al., ICLR 2025", "RoyRin/data-unlearning-bench"
SPACE: dict[str, list[Any]] = {
    "cost": [0.1],
    "lr": [1e-3, 3e-3, 1e-2],
    "batch_size": [10, 20],
    "forget_share": [0.2, 0.4, 0.6],
}


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin of `metrics.margins`, to be differentiated: (n_models, batch)."""
    right = torch.zeros_like(logits, dtype=torch.bool).scatter(2, labels[..., None], True)
    return (logits * right).sum(2) - logits.masked_fill(right, -torch.inf).logsumexp(2)


def _kl(logits: Tensor, goal: Tensor) -> Tensor:
    return kl_div(logits.log_softmax(2), goal.log_softmax(2), log_target=True, reduction="none").sum(2)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": lambda logits, goal, labels: ((logits - goal) ** 2).mean(2),
    "kl": lambda logits, goal, labels: _kl(logits, goal),
    "margin": lambda logits, goal, labels: (_log_odds(logits, labels) - _log_odds(goal, labels)) ** 2,
}
"""Distances (n_models, batch) of logits from target logits, both (n_models, batch, n_classes), given labels
(n_models, batch): squared error of logits, KL(target || model) of probabilities, squared error of margins."""


def predicted_oracle(problem: Problem) -> np.ndarray:
    """Predicted oracle logits (N, n_points, n_classes): each original's own, moved by what the attributor predicts."""
    if problem.attributor is None:
        raise DataError("Datamodel methods need an attributor; give Problem(attributor=...).")
    return problem.attributor.retrained(problem.original_logits, problem.forget, problem.labels)


@register(
    "dm_direct",
    paper=f"DM-direct; {GEORGIEV}",
    cost="none (the datamodel's subset models are paid once)",
    elsewhere=ELSEWHERE,
    attributed=True,
)
def dm_direct(problem: Problem) -> Unlearned:
    """Answer with the predicted logits: what matching could reach; not a model, so of no cost in gradients."""
    return Unlearned.from_logits(predicted_oracle(problem), problem.labels, cost=0.0)


@register(
    "dmm",
    space=SPACE,
    paper=f"DMM; {GEORGIEV}",
    cost="cost n_R training epochs",
    elsewhere=ELSEWHERE,
    attributed=True,
)
def dmm(problem: Problem, *, weighted: bool = False, **hyperparameters: float) -> Unlearned:
    """Datamodel matching: `match` with predicted oracle logits as targets.

    Args:
        problem: what to unlearn; its attributor predicts.
        weighted: let a point count by v / (v + sd^2), with v the variance of its margin over originals and sd how
            uncertain the attributor is of its change: as a normal target of that variance would.
        hyperparameters: of `match`.

    Raises:
        OptionError: for weights where the attributor has no `sd`.
    """
    weights = _confidence(problem) if weighted else None
    return match(problem, predicted_oracle(problem)[:, : problem.n_train], weights, **hyperparameters)  # type: ignore[arg-type]


def _confidence(problem: Problem) -> np.ndarray:
    """v / (v + sd^2) of each training point (n_train,)."""
    sd = getattr(problem.attributor, "sd", None)
    if sd is None:
        raise OptionError("weighted=True needs an attributor that has an `sd`; use 'bayesian', or weighted=False.")
    n = problem.n_train
    v = margins(problem.original_logits[:, :n], problem.labels[:n]).var(0)
    return np.asarray(v / np.maximum(v + sd(problem.forget)[:n] ** 2, 1e-12), np.float32)


@register(
    "oracle_matching",
    space=SPACE,
    paper=f"OM; {GEORGIEV}",
    cost="cost n_R training epochs (and not counted: n_oracles retrainings)",
    elsewhere=ELSEWHERE,
)
def oracle_matching(
    problem: Problem,
    *,
    n_oracles: int = 1,
    targets: Literal["oracle", "shifted"] = "oracle",
    **hyperparameters: float,
) -> Unlearned:
    """Oracle matching: `match` with targets made of the mean logits of `n_oracles` true oracles.

    Original i takes oracles i, i + 1, ... With targets "oracle" that mean is the target: one oracle each
    gives targets that are distributed as oracles are, a mean of several is less spread than they are. With
    "shifted" the target is z_original + mean oracle - mean original, the mean original over all N: what DMM
    approaches as its datamodel gets better. Each original then keeps its own randomness, and it is few
    oracles that spread the targets more than oracles are.

    Raises:
        DataError: without oracles, or for more of them than there are.
        OptionError: for unknown targets.
    """
    if targets not in ("oracle", "shifted"):
        raise OptionError(f"Option targets={targets!r} was given; use 'oracle' or 'shifted'.")
    if problem.oracle_logits is None:
        raise DataError("oracle_matching needs the logits of retrained models; give Problem(oracle_logits=...).")
    oracles = problem.oracle_logits[:, : problem.n_train]
    if not 1 <= n_oracles <= len(oracles):
        raise DataError(f"n_oracles={n_oracles}, but there are {len(oracles)} oracles; use 1 to {len(oracles)}.")
    chosen = (np.arange(problem.n_models)[:, None] + np.arange(n_oracles)) % len(oracles)
    goal = np.asarray(sum(oracles[chosen[:, j]] for j in range(n_oracles)) / n_oracles, np.float32)
    if targets == "shifted":
        originals = problem.original_logits[:, : problem.n_train]
        goal = goal + originals - originals.mean(0)
    return match(problem, goal, **hyperparameters)  # type: ignore[arg-type]


OPTIMIZERS: dict[str, Callable[[float], Optimizer]] = {"whitened": Adam, "adam": Adam, "sgd": SGD}
"""What fine-tunes, by the rate at its start; the first on weights that take white inputs (`whitening.whitened`)."""

N_WHITEN, DAMPING = 500, 0.03  # retained points that layers' inputs are measured on, at most; see `whitening.whitened`


def match(
    problem: Problem,
    targets: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    cost: float = 0.1,
    lr: float = 3e-3,
    batch_size: int = 20,
    forget_share: float = 0.4,
    influence: float = 0.0,
    loss: str = "mse",
    optimizer: str = "whitened",
) -> Unlearned:
    """Fine-tune every original to target logits on F and a random sample of R.

    By default mean squared error on logits, and Adam in whitened coordinates (`whitening.whitened`) at a rate that
    falls linearly to zero: targets move the answers of F far and those of R hardly, so a step for the one must leave
    the other alone, and inputs of layers that are all positive and alike tie them together. A batch holds a fixed
    share of F; the rest is drawn from R. The published setting (F repeated 5 times with 20 |F| of R an epoch) is
    `forget_share` 0.2; here the *cost* is fixed instead of the number of epochs, so that small and large
    forget sets are given the same work, and small batches have been the better use of it.

    Args:
        problem: what to unlearn, from which models.
        targets: logits (N, n_train, n_classes) to match.
        weights: how much each point's distance counts (n_train,); equally, if None.
        cost: sample gradients to spend, relative to one retraining. Up to an eighth of it goes to retained points that
            are seen once, to whiten.
        lr: the optimizer's rate at the start.
        batch_size: examples a step.
        forget_share: share of a batch that comes from F.
        influence: share of what comes from R that is drawn in proportion to how far a point's targets lie from what
            models answer; the rest of it evenly.
        loss: what to lower, one of `LOSSES`.
        optimizer: one of `OPTIMIZERS`.

    Raises:
        OptionError: for an unknown loss or optimizer, or a share that is none.
    """
    for name, value, known in (("loss", loss, LOSSES), ("optimizer", optimizer, OPTIMIZERS)):
        if value not in known:
            raise OptionError(f"Option {name}={value!r} was given; use one of {', '.join(map(repr, known))}.")
    if not 0 <= influence <= 1:
        raise OptionError(f"Option influence={influence!r} was given; use a share between 0 and 1.")
    goal = torch.from_numpy(targets).to(problem.x.device)
    distance, y = LOSSES[loss], problem.y
    counts = torch.ones_like(y, dtype=goal.dtype) if weights is None else torch.from_numpy(weights).to(goal.device)

    def to_targets(logits: Tensor, indices: Tensor, models: Tensor) -> Tensor:
        return (counts[indices] * distance(logits, goal[models[:, None], indices], y[indices])).mean(1)

    budget, seen, options = cost * problem.retraining, 0, dict[str, Any]()
    if optimizer == "whitened":
        seen = max(1, min(N_WHITEN, len(problem.retain), round(budget / 8)))
        points = np.stack([rng.permutation(problem.retain)[:seen] for rng in problem.rngs(2)])
        options = {"prepare": _whitened(problem.x, points), "finish": _unwhitened(problem.originals.module)}
    n_steps = max(1, round((budget - seen) / batch_size))
    from_forget = min(max(1, round(forget_share * batch_size)), batch_size - 1)
    batches = np.concatenate(
        [
            draw_batches(problem, problem.forget, n_steps, from_forget),
            _retained(problem, targets, n_steps, batch_size - from_forget, influence),
        ],
        axis=2,
    )
    return finetune(
        problem,
        [Phase(list(batches), to_targets)],
        OPTIMIZERS[optimizer](lr),
        rate=lambda share: lr * (1 - share),
        spent=seen,
        **options,
    )


def _whitened(x: Tensor, points: np.ndarray) -> Callable[[Ensemble, np.ndarray], Ensemble]:
    return lambda models, members: whitened(models, x, points[members], DAMPING)


def _unwhitened(module: nn.Module) -> Callable[[Ensemble], Ensemble]:
    return lambda models: unwhitened(models, module)


def _retained(problem: Problem, targets: np.ndarray, n_steps: int, size: int, influence: float) -> np.ndarray:
    """Points of R (n_steps, N, size), some drawn evenly, some by how far their targets lie."""
    by_influence = round(influence * size)
    parts = [draw_batches(problem, problem.retain, n_steps, size - by_influence)] if by_influence < size else []
    if by_influence:
        far = ((targets - problem.original_logits[:, : problem.n_train]) ** 2).mean((0, 2))[problem.retain] ** 0.5
        shares = (far + 1e-12) / (far + 1e-12).sum()
        drawn = [rng.choice(problem.retain, (n_steps, by_influence), p=shares) for rng in problem.rngs(stream=3)]
        parts.append(np.stack(drawn, axis=1))
    return np.concatenate(parts, axis=2)
