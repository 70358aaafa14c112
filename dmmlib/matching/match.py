"""DMM and oracle matching: move a model to the answers of one that never saw F.

Georgiev et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching", ICLR 2025. Oracle matching (OM)
takes the answers of true oracles as targets and is a bound; datamodel matching (DMM) takes predicted ones. Each
original keeps its own randomness: its targets are its own margins plus the change. Where the paper fine-tunes by Adam
(`baselines.published`), a least-squares problem is solved here as one, by `gauss_newton`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import PositiveInt

from dmmlib.errors import DataError, OptionError
from dmmlib.matching.gauss_newton import Jacobian, separable_weights
from dmmlib.metrics import margins
from dmmlib.unlearn.base import (
    Amount,
    Count,
    Moved,
    Positive,
    Problem,
    Unlearned,
    collect,
    draw_batches,
    moments,
    register,
    taken,
)

GEORGIEV = "Georgiev et al., ICLR 2025"
published = partial(register, elsewhere="RoyRin/data-unlearning-bench")
SPACE = {"cost": [0.03]}  # nothing to search
LARGEST = 600  # points in a step: their kernel is solved for each model
EXPLICIT = 200_000_000  # explicit gradients in memory at a time, of weights that are in no layer `gauss_newton` knows
RIDGE_FORGET, RIDGE_RETAIN = 0.001, 0.1  # relative to the kernel's mean diagonal: F is to be met, R to be fitted


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
    alone=False,
)
def dm_direct(problem: Problem) -> Unlearned:
    """Answer with the predicted logits: what matching could reach. This is no model, so it costs no gradients."""
    return Unlearned.from_logits(predicted_oracle(problem), problem.labels, cost=0.0)


@published("dmm", SPACE, version=3, paper=f"DMM; {GEORGIEV}", cost="cost n_R training epochs", attributed=True)
def dmm(problem: Problem, *, cost: Amount = 0.03, steps: Count = 4, farthest: Positive = 8.0) -> Unlearned:
    """Datamodel matching: `match` with the margins of predicted oracles as targets."""
    return match(problem, margins(predicted_oracle(problem), problem.labels), cost, steps, farthest)


@published(
    "oracle_matching",
    SPACE,
    version=3,
    paper=f"OM; {GEORGIEV}",
    cost="cost n_R training epochs (and not counted: n_oracles retrainings)",
    alone=False,
)
def oracle_matching(
    problem: Problem,
    *,
    n_oracles: PositiveInt | None = None,
    targets: Literal["shifted", "oracle"] = "shifted",
    cost: Amount = 0.03,
    steps: Count = 4,
    farthest: Positive = 8.0,
) -> Unlearned:
    """Oracle matching: `match` with targets made of the margins of `n_oracles` true oracles, all by default.

    Original i takes oracles i, i + 1, ... With targets "shifted" its own margins move by the mean of theirs minus the
    mean of the originals, which DMM approaches as its datamodel gets better; few oracles spread that more. With
    "oracle" their mean is the target: of one oracle it is spread as oracles are, of several it is spread less.

    Raises DataError without oracles or for more than there are, OptionError for unknown targets.
    """
    return match(problem, oracle_targets(problem, n_oracles, targets), cost, steps, farthest)


def oracle_targets(problem: Problem, n_oracles: int | None = None, targets: str = "shifted") -> np.ndarray:
    """Margins (N, n_points) that `oracle_matching` matches, and its errors."""
    if targets not in ("shifted", "oracle"):
        raise OptionError(f"Option targets={targets!r} was given; use 'shifted' or 'oracle'.")
    if problem.oracle_logits is None:
        raise DataError("oracle_matching needs the logits of retrained models; give Problem(oracle_logits=...).")
    oracles = margins(problem.oracle_logits, problem.labels)
    n = len(oracles) if n_oracles is None else n_oracles
    if not 1 <= n <= len(oracles):
        raise DataError(f"n_oracles={n}, but there are {len(oracles)} oracles; use 1 to {len(oracles)}.")
    goal = means_of_oracles(oracles, n, problem.n_models)
    if targets == "shifted":
        own = margins(problem.original_logits, problem.labels)
        goal = goal + own - own.mean(0)
    return goal


def means_of_oracles(oracles: np.ndarray, n: int, n_models: int) -> np.ndarray:
    """Mean answers (n_models, ...) of n oracles for each model: of oracles i, i + 1, ... for model i."""
    first = np.arange(n_models)
    return np.asarray(sum(oracles[(first + j) % len(oracles)] for j in range(n)) / n, np.float32)


def match(
    problem: Problem, targets: np.ndarray, cost: float = 0.03, steps: int = 4, farthest: float = 8.0
) -> Unlearned:
    """Move every original, in a few Gauss-Newton steps, to target margins (N, at least n_train).

    Each step sees F, or as much of it as fills half a batch, and points of R that no step before it saw, as long as R
    lasts, whose margins are to be those of their targets, too: so R moves as a retrained model's would, and the steps
    say nothing of other points but that inputs of layers as R's are left alone; see `gauss_newton`. There is no rate.

    Args:
        cost: sample gradients to spend, relative to one retraining; batches have at most `LARGEST` points.
        steps: the least number of steps.
        farthest: no margin is asked to move further than this in a step, as gradients change on the way.
    """
    originals, x, y = problem.originals, problem.x, problem.y
    goal = torch.from_numpy(np.asarray(targets, np.float32)).to(x.device)
    known, others = separable_weights(originals, x, y)
    largest = max(2, min(LARGEST, problem.n_train, EXPLICIT // max(1, others)))
    budget = cost * problem.retraining
    n_steps = max(steps, math.ceil(budget / largest))
    size = min(largest, max(2, round(budget / n_steps)))
    from_forget = min(len(problem.forget), size // 2)
    from_retain = min(len(problem.retain), size - from_forget)
    forgotten = draw_batches(problem, problem.forget, n_steps, from_forget)
    batches = np.concatenate([forgotten, draw_batches(problem, problem.retain, n_steps, from_retain)], axis=2)
    batches = batches[: taken(problem, n_steps)]
    ridge = torch.tensor([RIDGE_FORGET] * from_forget + [RIDGE_RETAIN] * from_retain, device=x.device)
    recorded = moments(problem, len(batches))[:-1]

    def move(members: np.ndarray) -> Moved:
        models, trajectory = originals[members.tolist()].clone(), list[np.ndarray]()
        models.module.eval()
        for step, batch in enumerate(batches[:, members], 1):
            for i, (member, points) in enumerate(zip(members, torch.from_numpy(batch).to(x.device), strict=True)):
                params, buffers = models.state_of(i)
                seen = Jacobian(models.module, params, buffers, x[points], y[points], from_retain, known)
                far = (goal[member, points] - seen.margins).clamp(-farthest, farthest)
                for name, moved in seen.solve(far, ridge).items():
                    params[name] += moved
            if step in recorded:
                trajectory.append(margins(models.logits(x[problem.follow]).numpy(), problem.labels[problem.follow]))
        return models.logits(x).numpy(), trajectory, models.state()

    parts = problem.execution.run(move, problem.execution.split(np.arange(problem.n_models)))
    return collect(problem, parts, batches.shape[2] * np.arange(1, len(batches) + 1))
