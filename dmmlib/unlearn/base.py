"""What every method gets and returns, the registry of methods, and the fine-tuning loop that they share."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from dmmlib.datamodels import Attributor
from dmmlib.ensemble import Ensemble, Loss, Training, classification, descend, epoch_batches
from dmmlib.errors import DataError, MethodError, OptionError
from dmmlib.execution import Execution
from dmmlib.files import read_arrays, write_arrays
from dmmlib.forget_sets import check_forget_indices
from dmmlib.metrics import correct, margins
from dmmlib.optim import Optimizer, Tensors
from dmmlib.registry import Registry, check_call


@dataclass(frozen=True)
class Problem:
    """One forget set, to be unlearned from every original.

    >>> x, y = torch.randn(12, 4), torch.arange(12) % 2  # ten training points and two others
    >>> masks, recipe = np.ones((3, 10), bool), Training(epochs=2)
    >>> originals = train(lambda: nn.Linear(4, 2), x[:10], y[:10], masks, seeds=[0, 1, 2], training=recipe)
    >>> problem = Problem(originals, originals.logits(x).numpy(), x, y, 10, np.array([1, 6]), recipe)
    >>> get("gd")(problem, epochs=1.0).margins.shape
    (3, 12)
    """

    originals: Ensemble  # N models trained on S
    original_logits: np.ndarray  # theirs (N, n_points, n_classes), float32, training points first
    x: Tensor  # prepared points (n_points, ...), training points first, on the originals' device
    y: Tensor  # labels (n_points,), on the same device
    n_train: int  # size of S
    forget: np.ndarray  # indices of F in S
    training: Training  # how the originals were trained; costs are relative to retraining with it
    attributor: Attributor | None = None  # predicts retraining without F, for methods registered as `attributed`
    oracle_logits: np.ndarray | None = None  # of models retrained without F that no result is measured against
    earlier: tuple[float, Ensemble] | None = None  # a share of their training, and the originals as they were then
    checkpoints: NonNegativeInt = 0  # at how many moments to record the trajectory
    follow: np.ndarray | slice = field(default_factory=lambda: slice(None))  # the points whose margins it records
    stop: Annotated[float, Field(gt=0, le=1)] = 1.0  # the share of a method's steps after which to stop
    seed: NonNegativeInt = 0  # of batches and samples
    execution: Execution = field(default_factory=Execution)  # changes speed and memory only

    def __post_init__(self) -> None:
        """Raise OptionError for what is of another type, DataError or ForgetSetError for what does not fit the rest."""
        check_call("Problem", type(self), **vars(self))
        object.__setattr__(self, "forget", check_forget_indices(self.forget, self.n_train))
        n, y = len(self.x), self.y
        if y.dtype != torch.int64 or y.shape != (n,) or self.n_train > n:
            given = f"x has {n} points, {self.n_train} of them to train on, and y is {y.dtype} {tuple(y.shape)}"
            raise DataError(f"{given}; give labels of int64, one for each point, training points first.")
        for name, n_models in (("original_logits", self.n_models), ("oracle_logits", None)):
            if (z := getattr(self, name)) is not None:
                if z.ndim != 3 or z.shape[1] != n or n_models not in (None, len(z)) or z.shape[2] <= int(y.max()):
                    expected = f"({n_models or 'n_models'}, {n}, n_classes > {int(y.max())})"
                    raise DataError(f"{name} have shape {z.shape}; give {expected}.")
                if not np.isfinite(z).all():
                    raise DataError(f"{name} hold NaN or infinity; train those models anew, at a lower rate.")

    @property
    def retain(self) -> np.ndarray:
        """Indices of R."""
        return np.setdiff1d(np.arange(self.n_train), self.forget)

    @property
    def n_models(self) -> int:
        return self.originals.n_models

    @property
    def retraining(self) -> int:
        """Sample gradients (forward and backward on one example) of one retraining on R."""
        return self.training.epochs * (self.n_train - len(self.forget))

    @property
    def labels(self) -> np.ndarray:
        return self.y.cpu().numpy()

    def rngs(self, use: int | None = None) -> list[np.random.Generator]:
        """One generator per model: for batches, or for a further use of chance (1, 2, ...) that is independent."""
        key = [] if use is None else [use]
        return [np.random.default_rng([self.seed, i, *key]) for i in range(self.n_models)]


@dataclass(frozen=True)
class Unlearned:
    """What the models of a method answer."""

    margins: np.ndarray  # (N, n_points), float32
    correct: np.ndarray  # whether each answer is correct, bool (N, n_points)
    cost: float  # sample gradients per model, relative to one retraining
    costs: np.ndarray  # the same at each checkpoint of the trajectory (n_checkpoints,), increasing
    trajectory: np.ndarray  # margins at each checkpoint (n_checkpoints, N, points that `Problem.follow` says)
    models: Ensemble | None = None  # the unlearned models, where a method makes some; not saved

    @classmethod
    def from_logits(
        cls, logits: np.ndarray, labels: np.ndarray, cost: float, one_step: bool = False, models: Ensemble | None = None
    ) -> Unlearned:
        """Make a result of logits (N, n_points, n_classes), with a trajectory of no step or of one."""
        m = margins(logits, labels)
        return cls(m, correct(logits, labels), cost, np.full(int(one_step), cost), m[None][: int(one_step)], models)

    @property
    def diverged(self) -> np.ndarray:
        """Which models answer NaN or infinity anywhere, bool (N,)."""
        return ~np.isfinite(self.margins).all(1)

    def finite(self, n_classes: int, made: str) -> Unlearned:
        """The same, where models that diverged answer all classes alike, nothing correctly, and a warning says so."""
        if not (bad := self.diverged).any():
            return self
        said = f"{bad.sum()} of {len(bad)} models diverged by {made}; they count as answering all classes alike."
        warnings.warn(said, stacklevel=3)
        margins, right, trajectory = self.margins.copy(), self.correct.copy(), self.trajectory.copy()
        margins[bad], right[bad] = -np.log(n_classes - 1), False
        trajectory[:, bad] = np.where(np.isfinite(trajectory[:, bad]), trajectory[:, bad], -np.log(n_classes - 1))
        return replace(self, margins=margins, correct=right, trajectory=trajectory)

    def save(self, path: Path) -> None:
        """Write as .npz; see `files.write_arrays`."""
        write_arrays(path, {f.name: getattr(self, f.name) for f in fields(self) if f.name != "models"})

    @classmethod
    def load(cls, path: Path) -> Unlearned:
        """Read what `save` wrote; raises StoreError if it cannot be read, DamageError if it is damaged."""
        values: dict[str, Any] = read_arrays(path)
        return cls(**values | {"cost": float(values["cost"])})


Method = Callable[..., Unlearned]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(gt=0, le=1000)]  # of passes, or of retrainings
Count = Annotated[int, Field(gt=0, le=1000)]  # of passes
Part = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Registered:
    """A method, and what is to be known of it; called, it checks its options first, as its annotations say."""

    name: str
    run: Method
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # grid on which hyperparameters are searched
    limits: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # ends of that grid beyond which nothing lies
    paper: str = ""  # who proposed it
    cost: str = ""  # sample gradients per model, as a formula of options and of the sizes n_S, n_F, n_R
    elsewhere: str = ""  # public code that implements it
    attributed: bool = False  # whether it needs the problem's attributor; presets then also know `name@attributor`
    rewinds: bool = False  # whether it needs the originals as they were earlier in their training
    alone: bool = True  # whether it makes a model, of one that is trained, without retrained ones

    def __call__(self, problem: Problem, **options: Any) -> Unlearned:
        check_call(f"method {self.name!r}", self.run, problem, **options)
        made = self.run(problem, **options)
        if not isinstance(made, Unlearned):
            raise MethodError(f"Method {self.name!r} gave a {type(made).__name__}; return what `finetune` does.")
        here = problem.follow if made.trajectory.shape[2] == len(problem.x) else slice(None)
        return replace(made, trajectory=made.trajectory[:, :, here])


METHODS: Registry[Registered] = Registry("method", "dmmlib.unlearn.reference", "dmmlib.baselines", "dmmlib.matching")


def register(
    name: str, space: Mapping[str, Sequence[Any]] | None = None, *, version: int = 1, **known: Any
) -> Callable[[Method], Method]:
    """Register a method by name, with fields of `Registered`; raise `version` when its numbers change.

    >>> from dmmlib.optim import SGD
    >>> @register("halfway", space={"epochs": [0.5, 1.0]}, paper="an example", cost="epochs n_R")
    ... def halfway(problem, *, epochs=0.5):
    ...     return finetune(problem, [Phase(passes(problem, problem.retain, epochs, 10), descent(problem))], SGD(0.01))
    >>> len(configurations("halfway", budget=8))
    2
    >>> METHODS.remove("halfway")
    """
    return METHODS.register(name, version, lambda method: Registered(name, method, dict(space or {}), **known))


def names() -> tuple[str, ...]:
    """The registered methods."""
    return tuple(METHODS)


def get(name: str) -> Registered:
    """The method of that name; raises MethodError for an unknown one, or an attributor (`gd@ridge`) that it ignores."""
    base, _, attributor = name.partition("@")
    found = METHODS[base]
    if attributor and not found.attributed:
        raise MethodError(
            f"Method {name!r} names an attributor, but {base!r} takes none; write {base!r}, or register the method "
            "with attributed=True."
        )
    return found


def configurations(name: str, budget: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """List all settings of a method's grid, or draw `budget` without replacement; without a grid, one empty one."""
    space = get(name).space
    grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    keep = np.random.default_rng(seed).permutation(len(grid))[:budget]
    return [grid[i] for i in sorted(keep)]


def check_setting(name: str, options: Mapping[str, Any]) -> None:
    """Raise OptionError, before anything runs, for options of a method that it does not have, or of another kind."""
    check_call(f"method {name!r}", get(name).run, None, **options)


def passes(problem: Problem, pool: np.ndarray, epochs: float, batch_size: int) -> list[np.ndarray]:
    """Batches (n_models, batch) of so many passes over a pool (size,) or (n_models, size), shuffled for each model.

    Half a pass is the first half of the batches of a pass.
    """
    if not (isinstance(batch_size, Integral) and batch_size > 0 and 0 < epochs < math.inf):
        raise OptionError(f"epochs={epochs} and batch_size={batch_size} were given; give more than 0, and whole ones.")
    whole = math.ceil(epochs)
    pools = list(np.broadcast_to(pool, (problem.n_models, pool.shape[-1])))
    batches = list(epoch_batches(pools, batch_size, whole, problem.rngs()))
    return batches[: max(1, round(len(batches) * epochs / whole))]


def descent(problem: Problem, sign: float = 1.0) -> Loss:
    """Cross-entropy as a `Loss`; ascent with sign -1."""
    return classification(problem.y, sign)


def draw_batches(problem: Problem, pool: np.ndarray, n_steps: int, size: int) -> np.ndarray:
    """Draw `size` points of a pool per step, pass after pass without replacement: (n_steps, n_models, size)."""
    n_passes = -(-n_steps * size // len(pool))
    orders = [np.concatenate([rng.permutation(pool) for _ in range(n_passes)]) for rng in problem.rngs()]
    return np.stack([order[: n_steps * size].reshape(n_steps, size) for order in orders], axis=1)


@dataclass(frozen=True)
class Phase:
    """A stretch of fine-tuning."""

    batches: Sequence[np.ndarray]  # indices (n_models, batch) into the problem's points, for each step
    loss: Loss


def finetune(
    problem: Problem,
    phases: Sequence[Phase],
    optimizer: Optimizer,
    rate: Callable[[float], float] | None = None,
    only: Collection[str] | None = None,
    masks: Tensors | None = None,
    spent: int = 0,
    rewind: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Unlearned:
    """Fine-tune all originals through the phases, in order and with one optimizer; record their margins on the way.

    It ends after the share `problem.stop` of all steps.

    Args:
        rate: learning rate after a share, in [0, 1), of all steps; the optimizer's own if None.
        only: names of the parameters to move, the others being frozen; all if None.
        masks: name -> (N, ...), what gradients are multiplied with, if given.
        spent: sample gradients per model that were spent before, to be counted in the cost.
        rewind: chooses, of logits (n_phases, n_models, n_points, n_classes) after each phase, one phase for each model
            (n_models,), where it is to end; the last one if None.
    """
    gradients = spent + np.cumsum([batch.shape[1] for phase in phases for batch in phase.batches])
    n_steps = len(gradients)
    gradients = gradients[: taken(problem, n_steps)]
    checkpoints = moments(problem, len(gradients))
    if unknown := sorted(set(only or ()) - set(problem.originals.params)):
        raise OptionError(f"only names {unknown[0]!r}; the parameters are {', '.join(problem.originals.params)}.")

    # What follows may run in another process, so it refers to what it needs, not to the whole problem.
    originals, x, labels, precision = problem.originals, problem.x, problem.labels, problem.training.precision
    followed, right = x[problem.follow], labels[problem.follow]
    compile, moving = problem.execution.compile, list(originals.params) if only is None else list(only)

    def tune_chunk(members: np.ndarray) -> Moved:
        models = originals[members.tolist()].clone()
        state = optimizer.start({k: v for k, v in models.params.items() if k in moving})
        trajectory, ends = list[np.ndarray](), list[tuple[np.ndarray, dict[str, np.ndarray]]]()

        def run(phase: Phase, before: int) -> None:
            def record(taken: int) -> None:
                if before + taken in checkpoints[:-1]:
                    trajectory.append(margins(models.logits(followed).numpy(), right))

            descend(
                models,
                x,
                (batch[members] for batch in phase.batches[: max(0, len(gradients) - before)]),
                phase.loss,
                optimizer,
                state,
                only=moving,
                masks=None if masks is None else {k: v[members] for k, v in masks.items()},
                models=members,
                rate=None if rate is None else lambda t: rate((before + t) / n_steps),
                precision=precision,
                compile=compile,
                after=record,
            )

        before = 0
        for phase in phases:
            run(phase, before)
            before += len(phase.batches)
            if rewind is not None:
                ends.append((models.logits(x).numpy(), models.state()))
        if rewind is None:
            return models.logits(x).numpy(), trajectory, models.state()
        logits, states = np.stack([end for end, _ in ends]), [state for _, state in ends]
        chosen = rewind(logits), np.arange(len(members))
        return logits[chosen], trajectory, {k: np.stack([state[k] for state in states])[chosen] for k in states[0]}

    chunks = problem.execution.split(np.arange(problem.n_models))
    return collect(problem, problem.execution.run(tune_chunk, chunks), gradients)


def taken(problem: Problem, n_steps: int) -> int:
    """How many of a method's steps are taken before it is to stop."""
    return max(1, round(problem.stop * n_steps))


def moments(problem: Problem, n_steps: int) -> np.ndarray:
    """After how many of `n_steps` steps the trajectory is recorded, the last one included."""
    return np.unique(np.linspace(0, n_steps, problem.checkpoints + 1).round().astype(int))[1:]


Moved = tuple[np.ndarray, list[np.ndarray], dict[str, np.ndarray]]
"""Of a chunk of models: their logits at the end, their margins at each moment before it, and their state."""


def collect(problem: Problem, parts: Iterable[Moved], gradients: np.ndarray) -> Unlearned:
    """Make a result of chunks of models.

    `gradients` (n_steps,) are the sample gradients per model that were spent after each step.
    """
    logits, trajectories, states = zip(*parts, strict=True)
    state = {name: np.concatenate([part[name] for part in states]) for name in states[0]}
    final = np.concatenate(logits)
    end, at = margins(final, problem.labels), moments(problem, len(gradients))
    moved = [*map(np.concatenate, zip(*trajectories, strict=True)), *[end[:, problem.follow]] * (len(at) > 0)]
    return Unlearned(
        end,
        correct(final, problem.labels),
        int(gradients[-1]) / problem.retraining,
        gradients[at - 1] / problem.retraining,
        np.stack(moved) if moved else np.zeros((0, *final.shape[:2]), np.float32),
        Ensemble.from_state(problem.originals.module, state, problem.x.device),
    )
