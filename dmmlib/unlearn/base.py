"""What every method gets and returns, the registry, and the fine-tuning loop that they share."""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dmmlib.datamodels import Attributor
from dmmlib.ensemble import Ensemble, Loss, Training, classification, descend, epoch_batches
from dmmlib.errors import DataError, MethodError, OptionError, StoreError
from dmmlib.execution import Execution
from dmmlib.files import replacing
from dmmlib.forget_sets import check_forget_indices
from dmmlib.metrics import correct, margins
from dmmlib.optim import Optimizer, Tensors
from dmmlib.registry import Registry


@dataclass(frozen=True)
class Problem:
    """One forget set, to be unlearned from every original.

    >>> x, y = torch.randn(12, 4), torch.arange(12) % 2  # ten training points and two others
    >>> masks, recipe = np.ones((3, 10), bool), Training(epochs=2)
    >>> originals = train(lambda: nn.Linear(4, 2), x[:10], y[:10], masks, seeds=[0, 1, 2], training=recipe)
    >>> problem = Problem(originals, originals.logits(x).numpy(), x, y, 10, np.array([1, 6]), recipe)
    >>> get("gd")(problem, epochs=1.0).margins.shape
    (3, 12)

    Attributes:
        originals: N models trained on S.
        original_logits: their logits (N, n_points, n_classes), float32, training points first.
        x: prepared points (n_points, ...), training points first, on the originals' device.
        y: labels (n_points,), on the same device.
        n_train: size of S.
        forget: indices of F in S.
        training: how the originals were trained; costs are relative to retraining with it.
        attributor: predicts the effect of leaving F out (for methods registered as `attributed`).
        oracle_logits: logits (n_oracles, n_points, n_classes) of retrained models (for oracle methods and
            the floor); independent of the oracles that a result is measured against.
        checkpoints: at how many moments to record the trajectory.
        seed: of batches and samples.
        execution: how fine-tuning is carried out; changes speed and memory only.
    """

    originals: Ensemble
    original_logits: np.ndarray
    x: Tensor
    y: Tensor
    n_train: int
    forget: np.ndarray
    training: Training
    attributor: Attributor | None = None
    oracle_logits: np.ndarray | None = None
    checkpoints: int = 0
    seed: int = 0
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forget", check_forget_indices(self.forget, self.n_train))
        expected = (self.originals.n_models, len(self.x))
        if self.original_logits.shape[:2] != expected:
            raise DataError(
                f"original_logits have shape {self.original_logits.shape}; give (n_models, n_points) = "
                f"{expected} first."
            )

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

    def rngs(self, stream: int | None = None) -> list[np.random.Generator]:
        """One generator a model, so that each original meets its own batches.

        Args:
            stream: 1, 2, ... for a further use of chance, independent of the batches' and of other streams.
        """
        key = [] if stream is None else [stream]
        return [np.random.default_rng([self.seed, i, *key]) for i in range(self.n_models)]


@dataclass(frozen=True)
class Unlearned:
    """What a method's models answer.

    Attributes:
        margins: (N, n_points), float32.
        correct: whether each answer is right, bool (N, n_points).
        cost: sample gradients a model, relative to one retraining.
        costs: the same at each checkpoint of the trajectory (n_checkpoints,), increasing.
        trajectory: margins at each checkpoint (n_checkpoints, N, n_points).
    """

    margins: np.ndarray
    correct: np.ndarray
    cost: float
    costs: np.ndarray
    trajectory: np.ndarray

    @classmethod
    def from_logits(cls, logits: np.ndarray, labels: np.ndarray, cost: float, one_step: bool = False) -> Unlearned:
        """A result of logits (N, n_points, n_classes), without a trajectory, or with one of a single step."""
        m = margins(logits, labels)
        return cls(m, correct(logits, labels), cost, np.full(int(one_step), cost), m[None][: int(one_step)])

    def save(self, path: Path) -> None:
        """Write as .npz, atomically."""
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Unlearned:
        """Read what `save` wrote; raises StoreError if it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                values = {f.name: archive[f.name] for f in fields(cls)}
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(f"{path} is damaged ({error}); delete it to compute it again.") from error
        return cls(**{**values, "cost": float(values["cost"])})


Method = Callable[..., Unlearned]


@dataclass(frozen=True)
class Registered:
    """A method, and what is to be known of it.

    Attributes:
        run: the method.
        space: the grid that its hyperparameters are searched on.
        paper: who proposed it.
        cost: sample gradients per model, as a formula of options and of the sizes n_S, n_F, n_R.
        elsewhere: public code that implements it.
        attributed: whether it asks for the problem's attributor; presets then also know `name@attributor`.
    """

    run: Method
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    paper: str = ""
    cost: str = ""
    elsewhere: str = ""
    attributed: bool = False


METHODS: Registry[Registered] = Registry(
    "method", "dmmlib.unlearn.reference", "dmmlib.baselines", "dmmlib.unlearn.matching"
)


def register(
    name: str, space: Mapping[str, Sequence[Any]] | None = None, *, version: int = 1, **known: Any
) -> Callable[[Method], Method]:
    """Register a method by name.

    >>> from dmmlib.optim import SGD
    >>> @register("halfway", space={"epochs": [0.5, 1.0]}, paper="an example", cost="epochs n_R")
    ... def halfway(problem, *, epochs=0.5):
    ...     return finetune(problem, [Phase(passes(problem, problem.retain, epochs, 10), descent(problem))], SGD(0.01))
    >>> len(configurations("halfway", budget=8))
    2
    >>> METHODS.remove("halfway")

    Args:
        name: what presets call it.
        space: the grid on which its hyperparameters are searched; none if None.
        version: to be raised when its numbers change, so that results are made anew.
        known: further fields of `Registered`.
    """

    def add(method: Method) -> Method:
        METHODS.add(name, Registered(method, dict(space or {}), **known), version)
        return method

    return add


def names() -> tuple[str, ...]:
    """The registered methods."""
    return tuple(METHODS)


def get(name: str) -> Method:
    """The method of that name; raises MethodError if there is none."""
    return registered(name).run


def registered(name: str) -> Registered:
    """A method with its grid and what is to be known of it.

    Raises:
        MethodError: if there is none, or it is named with an attributor (`dmm@ridge`) and takes none.
    """
    base, _, attributor = name.partition("@")
    found = METHODS[base]
    if attributor and not found.attributed:
        raise MethodError(
            f"Method {name!r} names an attributor, but {base!r} takes none; write {base!r}, or register the method "
            "with attributed=True."
        )
    return found


def configurations(name: str, budget: int, seed: int = 0) -> list[dict[str, Any]]:
    """`budget` settings drawn without replacement from a method's grid (all of them if it has fewer).

    A method without a grid has the one empty setting.
    """
    space = registered(name).space
    grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    keep = np.random.default_rng(seed).permutation(len(grid))[:budget]
    return [grid[i] for i in sorted(keep)]


def check_options(low: float = 0.0, high: float = math.inf, *, whole: bool = False, **options: float) -> None:
    """Raise OptionError unless every option is a (whole) number above `low` and at most `high`."""
    for name, value in options.items():
        if not isinstance(value, Integral if whole else Real) or not low < value <= high:
            limit = "" if high == math.inf else f" and at most {high:g}"
            kind = "whole number" if whole else "number"
            raise OptionError(f"Option {name}={value!r} was given; use a {kind} above {low:g}{limit}.")


def passes(problem: Problem, pool: np.ndarray, epochs: float, batch_size: int) -> list[np.ndarray]:
    """Batches (n_models, batch) of so many passes over a pool, in an order of each model's own.

    The pool is one for all models (size,), or one a model (n_models, size). Half a pass is the first half of
    a pass's batches.
    """
    check_options(epochs=epochs)
    check_options(batch_size=batch_size, whole=True)
    whole = math.ceil(epochs)
    pools = list(np.broadcast_to(pool, (problem.n_models, pool.shape[-1])))
    batches = list(epoch_batches(pools, batch_size, whole, problem.rngs()))
    return batches[: max(1, round(len(batches) * epochs / whole))]


def descent(problem: Problem, sign: float = 1.0) -> Loss:
    """Cross-entropy as a `Loss`; ascent with sign -1."""
    return classification(problem.y, sign)


def draw_batches(problem: Problem, pool: np.ndarray, n_steps: int, size: int) -> np.ndarray:
    """`size` points of a pool a step, pass after pass without replacement: (n_steps, n_models, size)."""
    n_passes = -(-n_steps * size // len(pool))
    orders = []
    for rng in problem.rngs():
        order = np.concatenate([rng.permutation(pool) for _ in range(n_passes)])
        orders.append(order[: n_steps * size].reshape(n_steps, size))
    return np.stack(orders, axis=1)


@dataclass(frozen=True)
class Phase:
    """A stretch of fine-tuning: which batches, which loss.

    Attributes:
        batches: index arrays (n_models, batch) into the problem's points, one a step.
        loss: of each model.
    """

    batches: Sequence[np.ndarray]
    loss: Loss


class Coordinates(Protocol):
    """Other coordinates of the same models, in which steps are taken."""

    def enter(self, models: Ensemble, members: np.ndarray) -> Ensemble:
        """Stacked models in these coordinates; `members` are their numbers among the originals."""
        ...

    def leave(self, models: Ensemble) -> Ensemble:
        """The same models in coordinates of their own again."""
        ...


def finetune(
    problem: Problem,
    phases: Sequence[Phase],
    optimizer: Optimizer,
    rate: Callable[[float], float] | None = None,
    only: Collection[str] | None = None,
    masks: Tensors | None = None,
    spent: int = 0,
    coordinates: Coordinates | None = None,
) -> Unlearned:
    """Fine-tune all originals through the phases and record their margins on the way.

    Args:
        problem: what to unlearn, from which models.
        phases: gone through in order, with one optimizer.
        optimizer: moves the stacked parameters; it keeps its memory from phase to phase.
        rate: learning rate after a share, in [0, 1), of all steps; the optimizer's own if None.
        only: names of the parameters to move, the others being frozen; all if None.
        masks: name -> (N, ...), what gradients are multiplied with, if given.
        spent: sample gradients a model that were spent before, to be counted in the cost.
        coordinates: those that steps are taken in, the models' own if None; parameters that they add are frozen.
    """
    gradients = spent + np.cumsum([batch.shape[1] for phase in phases for batch in phase.batches])
    n_steps = len(gradients)
    checkpoints = np.unique(np.linspace(0, n_steps, problem.checkpoints + 1).round().astype(int))[1:]

    # What follows may run in another process, so it refers to what it needs, not to the whole problem.
    originals, x, labels, precision = problem.originals, problem.x, problem.labels, problem.training.precision
    compile, moving = problem.execution.compile, list(originals.params) if only is None else list(only)

    def tune_chunk(members: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        models = originals[members.tolist()].clone()
        models = models if coordinates is None else coordinates.enter(models, members)
        state = optimizer.start({k: v for k, v in models.params.items() if k in moving})
        trajectory: list[np.ndarray] = []

        def answers() -> np.ndarray:
            return (models if coordinates is None else coordinates.leave(models)).logits(x).numpy()

        def run(phase: Phase, before: int) -> None:
            def record(taken: int) -> None:
                if before + taken in checkpoints[:-1]:
                    trajectory.append(margins(answers(), labels))

            descend(
                models,
                x,
                (batch[members] for batch in phase.batches),
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
        return answers(), trajectory

    chunks = problem.execution.split(np.arange(problem.n_models))
    logits, trajectories = zip(*problem.execution.run(tune_chunk, chunks), strict=True)
    final = np.concatenate(logits)
    end = margins(final, problem.labels)
    moments = [np.concatenate(moment) for moment in zip(*trajectories, strict=True)] + [end] * (len(checkpoints) > 0)
    return Unlearned(
        end,
        correct(final, problem.labels),
        int(gradients[-1]) / problem.retraining,
        gradients[checkpoints - 1] / problem.retraining,
        np.stack(moments) if moments else np.zeros((0, *final.shape[:2]), np.float32),
    )
