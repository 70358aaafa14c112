"""Train many independent models at once: the recipe, its learning rate, batches and the training step.

The parameters of `n_models` copies of one `nn.Module` are stacked along a first axis, the forward pass is mapped over
it with `torch.func.vmap`, and an elementwise optimizer over the stacked tensors is one optimizer for each model.
Models whose training sets have the same size share every step; nothing that one model computes enters another's, so a
model is determined by its seed and its training indices. How many share a step, on how many cores, compiled or not, is
an `Execution`: it changes speed and memory, not the models.
"""

from __future__ import annotations

import math
import reprlib
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from dmmlib import stacking
from dmmlib.errors import DataError
from dmmlib.execution import Execution, compiled, vary_in_size
from dmmlib.optim import SGD, Optimizer, Tensors
from dmmlib.presets import BelowOne
from dmmlib.registry import check_call


@dataclass(frozen=True)
class Training:
    """How a model is trained: SGD with Nesterov momentum and a triangular learning rate.

    The rate rises linearly from 0 to `lr` over the share `warmup` of all steps, then falls linearly to 0.

    >>> Training(epochs=10, lr=0.1, warmup=0.25).rate(0.25)
    0.1
    """

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 50
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    momentum: BelowOne = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    warmup: BelowOne = 0.2
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Raise OptionError for what no training has."""
        check_call("Training", type(self), **vars(self))

    def rate(self, progress: float) -> float:
        """Return the learning rate after the share `progress`, in [0, 1], of all steps."""
        rising = progress / self.warmup if self.warmup > 0 else 1.0
        return self.lr * min(rising, (1.0 - progress) / (1.0 - self.warmup))

    def steps(self, size: int) -> int:
        """Count the optimizer steps of a training on `size` examples."""
        return self.epochs * math.ceil(size / self.batch_size)

    @property
    def optimizer(self) -> SGD:
        return SGD(self.lr, self.momentum, self.weight_decay, nesterov=self.momentum > 0)


@dataclass(frozen=True)
class Ensemble:
    """Stacked models.

    >>> models = initialise(lambda: nn.Linear(4, 3), seeds=[0, 1, 2])
    >>> models.logits(torch.zeros(5, 4)).shape
    torch.Size([3, 5, 3])
    """

    module: nn.Module  # the architecture; its own weights are not used
    params: Tensors  # name -> tensor (n_models, ...)
    buffers: Tensors  # name -> tensor (n_models, ...), e.g. batch-norm statistics

    @property
    def n_models(self) -> int:
        return len(next(iter(self.params.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    def _each(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensors, Tensors]:
        """Change every tensor: parameters and buffers."""
        return {k: change(v) for k, v in self.params.items()}, {k: change(v) for k, v in self.buffers.items()}

    def __getitem__(self, models: slice | Sequence[int]) -> Ensemble:
        """Some of the models, sharing memory where `models` is a slice."""
        return Ensemble(self.module, *self._each(lambda v: v[models]))

    def clone(self) -> Ensemble:
        """An independent copy."""
        copies = self._each(lambda v: v.detach().clone(memory_format=torch.contiguous_format))
        return Ensemble(stacking.copied(self.module), *copies)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n_models, n_points, n_classes), each model on its own points: x is (n_models, n_points, ...)."""
        stacked = stacking.stackable(self.module.eval(), self.params, self.buffers, x)
        seeds, module = None if stacked else [0] * self.n_models, stacking.copied(self.module)
        return stacking.forward(module, self.params, self.buffers, x.clone(), seeds)[0]  # it may change x in place

    def state_of(self, i: int) -> tuple[Tensors, Tensors]:
        """Parameters and buffers of one model, as `functional_call` takes them."""
        return self._each(lambda v: v[i])

    @torch.no_grad()
    def logits(self, x: Tensor, batch_size: int = 500) -> Tensor:
        """Logits (n_models, n_points, n_classes), float32 on the CPU, of the points x (n_points, ...).

        One model after the other, `batch_size` points at a time: products are large enough alone, and stay in cache.
        """
        self.module.eval()
        answers = []
        for its in map(self.state_of, range(self.n_models)):
            lent = (batch.to(self.device, copy=True) for batch in x.split(batch_size))  # a model may change its input
            answers.append(torch.cat([stacking.one(self.module, *its, batch)[0] for batch in lent]).float().cpu())
        return torch.stack(answers)

    def state(self) -> dict[str, np.ndarray]:
        """All weights and buffers by name, (n_models, ...), as `from_state` takes them."""
        groups = {"params": self.params, "buffers": self.buffers}
        return {f"{group}.{k}": v.detach().cpu().numpy() for group, named in groups.items() for k, v in named.items()}

    @classmethod
    def from_state(
        cls, module: nn.Module, state: Mapping[str, np.ndarray], device: torch.device | str = "cpu"
    ) -> Ensemble:
        """The models of a `state`, for the architecture that it came from."""
        groups: dict[str, Tensors] = {"params": {}, "buffers": {}}
        for key, array in state.items():
            kind, _, name = key.partition(".")
            groups[kind][name] = torch.from_numpy(array).to(device)
        return cls(stacking.template(module), groups["params"], groups["buffers"])


def initialise(factory: Callable[[], nn.Module], seeds: Sequence[int], device: torch.device | str = "cpu") -> Ensemble:
    """Make a fresh model for each seed, drawn on the CPU, so that a seed means the same weights on any device.

    Parameters that do not require gradients are kept among the buffers, so that no method moves them.
    """
    modules = []
    for seed in seeds:
        with stacking.drawing(seed):
            modules.append(factory())
    module, *stacked = stacking.stack(modules)
    return Ensemble(module, *Ensemble(module, *stacked)._each(lambda v: v.detach().to(device)))


def epoch_batches(
    pools: Sequence[np.ndarray], batch_size: int, epochs: int, rngs: Sequence[np.random.Generator]
) -> Iterator[np.ndarray]:
    """Yield batches of indices (n_models, batch) that go through each model's pool once per epoch.

    All pools have one size. An epoch is cut into parts whose sizes differ by at most one: no example is dropped.
    """
    n_batches = max(1, math.ceil(len(pools[0]) / batch_size))
    for _ in range(epochs):
        order = np.stack([rng.permutation(pool) for pool, rng in zip(pools, rngs, strict=True)])
        yield from np.array_split(order, n_batches, axis=1)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss of each model, (n_models,), of its logits (n_models, batch, n_classes), the indices (n_models, batch) of
the points they answer, and the numbers (n_models,) of the models in the ensemble that is being trained."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Average the cross-entropy of each model, (n_models,), over labels (n_models, batch)."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)


def classification(y: Tensor, sign: float = 1.0) -> Loss:
    """Make the loss of cross-entropy against labels y (n_points,); with sign -1 it is raised instead of lowered."""
    return lambda logits, indices, models: sign * cross_entropy(logits, y[indices])


_COMPILING = threading.Lock()


def descend(
    ensemble: Ensemble,
    x: Tensor,
    batches: Iterable[np.ndarray],
    loss: Loss,
    optimizer: Optimizer,
    state: dict[str, Tensors],
    *,
    only: Collection[str] | None = None,
    masks: Tensors | None = None,
    models: Sequence[int] | np.ndarray | None = None,
    rate: Callable[[int], float] | None = None,
    precision: str = "float32",
    compile: bool = False,
    after: Callable[[int], None] | None = None,
) -> None:
    """Take one optimizer step of every model for each batch, in place.

    Args:
        x: points (n_points, ...) that the indices in `batches` refer to, on the ensemble's device.
        batches: index arrays (n_models, batch).
        loss: of each model; the models' losses are summed, which keeps their gradients apart.
        state: the optimizer's memory, from `optimizer.start`; moves on as well.
        only: names of the parameters that the state is of and that move; all if None.
        masks: name -> (n_models, ...), what gradients are multiplied with, if given.
        models: the models' numbers, as the loss is told them and their noise depends on; 0, 1, ... if None.
        rate: learning rate of step t = 0, 1, ...; the optimizer's own if None.
        precision: "float32", or "bfloat16" for matrix products under autocast.
        compile: run the step through torch.compile.
        after: called after each step with the number of steps taken.
    """
    module, numbers = ensemble.module.train(), np.arange(ensemble.n_models) if models is None else np.asarray(models)
    moves = {k: v for k, v in ensemble.params.items() if only is None or k in only}
    stays = {k: v for k, v in ensemble.params.items() if k not in moves}
    told = torch.as_tensor(numbers, device=x.device)
    fixed = (module, loss, optimizer, moves, stays, ensemble.buffers, state, masks, x, told)
    for t, batch in enumerate(batches):
        indices = torch.from_numpy(batch)
        if x.device.type == "cuda":  # without waiting for what the device is doing
            indices = indices.pin_memory()
        indices = indices.to(x.device, non_blocking=True)
        lr = torch.tensor(optimizer.lr if rate is None else rate(t))
        lone = batch.shape[1] == 1
        with stacking.lone_points(module) if lone else nullcontext():
            if t == 0:
                stacked = stacking.stackable(module, ensemble.params, ensemble.buffers, x[indices[:2]])
                if compile := compile and stacked:
                    vary_in_size([*ensemble.params.values(), *ensemble.buffers.values(), x, told], 0)
                    vary_in_size([t for memory in (*state.values(), masks or {}) for t in memory.values()], 0)
            seeds = None if stacked else [noise(m, t, row) for m, row in zip(numbers, batch, strict=True)]
            if compile:
                vary_in_size([indices], 0, 1)
            step = compiled(_step) if compile and not lone else _step
            with _COMPILING if compile and t == 0 else nullcontext():  # one thread compiles, others find it done
                step(*fixed, indices, lr, precision == "bfloat16", seeds)
        if after is not None:
            after(t + 1)
            module.train()


def noise(model: int, step: int, batch: np.ndarray) -> int:
    """Seed of what a model draws in a step: of its number, the step and its batch, not of other models."""
    return zlib.crc32(batch.tobytes(), zlib.crc32(f"{model} {step}".encode()))


def _step(
    module: nn.Module,
    loss: Loss,
    optimizer: Optimizer,
    moves: Tensors,
    stays: Tensors,
    buffers: Tensors,
    state: dict[str, Tensors],
    masks: Tensors | None,
    x: Tensor,
    models: Tensor,
    indices: Tensor,
    rate: Tensor,
    bfloat16: bool,
    seeds: Sequence[int] | None,
) -> None:
    def total(moves: Tensors) -> tuple[Tensor, Tensors]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            logits, moved = stacking.forward(module, moves | stays, buffers, x[indices], seeds)
        return loss(logits.float(), indices, models).sum(), moved

    gradients, moved = stacking.gradient(total, moves)
    if masks is not None:
        gradients = {name: gradient * masks[name] for name, gradient in gradients.items()}
    optimizer.update(moves, gradients, state, rate)
    for name, value in moved.items():
        buffers[name].copy_(value.detach())


def check_masks(masks: np.ndarray, n_train: int) -> None:
    """Raise DataError unless masks are boolean (n_models, n_train) with no empty row."""
    if not isinstance(masks, np.ndarray) or masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != n_train:
        given = f"{getattr(masks, 'dtype', type(masks).__name__)} {np.shape(masks)}"
        raise DataError(f"Masks are {given}; give booleans in an array of shape (n_models, {n_train}).")
    if not masks.any(1).all():
        raise DataError(f"The mask of model {masks.any(1).argmin()} is empty; every model needs an example.")


def train(
    factory: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    masks: np.ndarray,
    seeds: Sequence[int],
    training: Training,
    execution: Execution | None = None,
) -> Ensemble:
    """Train one model for each mask, from scratch, and return the models in the order of the masks.

    >>> x, y, masks = torch.randn(20, 4), torch.arange(20) % 2, np.ones((3, 20), bool)
    >>> train(lambda: nn.Linear(4, 2), x, y, masks, seeds=[0, 1, 2], training=Training(epochs=1)).n_models
    3

    Args:
        factory: makes a fresh model.
        x: prepared points (n_train, ...), on the device to train on.
        y: labels (n_train,).
        masks: which points each model is trained on, bool (n_models, n_train).
        seeds: one for each model, for its initial weights and the order of its batches.
        execution: how many models share a step, and how it is carried out; changes speed and memory, not the result.

    Raises:
        DataError: for labels or masks that do not fit x, or seeds that do not fit the masks.
        ModelError: for a model that cannot be trained so; see `stacking.check`.
        SchedulerError: if a process that trains is killed.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1] or not len(y) or y.min() < 0:
        given = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else f"{type(y).__name__}"
        raise DataError(f"Labels are {given}; give a tensor ({len(x)},) of int64 from 0, one for each point.")
    check_call("train", train, factory, x, y, masks, seeds, training=training)
    stacking.check(factory, x, int(y.max()) + 1, exactly=False)
    state = train_and(Ensemble.state, factory, x, y, masks, seeds, training, execution)
    return Ensemble.from_state(initialise(factory, [seeds[0]]).module, state, x.device)


def train_and(
    keep: Callable[[Ensemble], dict[str, np.ndarray]],
    factory: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    masks: np.ndarray,
    seeds: Sequence[int],
    training: Training,
    execution: Execution | None = None,
    until: float = 1.0,
) -> dict[str, np.ndarray]:
    """Train as `train` does, and keep of each chunk of models only some arrays (n_models, ...).

    They are made where a chunk is trained, so that little has to be sent where that is another process. `until` is the
    share of all steps after which models are left as they then are.
    """
    check_masks(masks, len(x))
    if len(seeds) != len(masks) or not all(isinstance(seed, Integral) and seed >= 0 for seed in seeds):
        given = f"{len(masks)} masks but {len(seeds)} seeds {reprlib.repr(list(seeds))}"
        raise DataError(f"{given}; give one seed, an integer from 0, for each model.")
    if len(masks) == 0:
        raise DataError("No masks were given; ask for at least one model.")
    execution = execution or Execution()
    compile = execution.compile

    def train_chunk(chunk: tuple[np.ndarray, list[int]]) -> dict[str, np.ndarray]:
        pools, rngs = [np.flatnonzero(mask) for mask in chunk[0]], [np.random.default_rng(seed) for seed in chunk[1]]
        batches = epoch_batches(pools, training.batch_size, training.epochs, rngs)
        n_steps = training.steps(len(pools[0]))
        models = initialise(factory, chunk[1], x.device)
        descend(
            models,
            x,
            islice(batches, round(until * n_steps)),
            classification(y),
            training.optimizer,
            training.optimizer.start(models.params),
            models=chunk[1],
            rate=lambda step: training.rate((step + 0.5) / n_steps),
            precision=training.precision,
            compile=compile,
        )
        return keep(models)

    sizes = masks.sum(1)
    order = np.argsort(sizes, kind="stable")  # models of one size train together
    same = np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1)
    members = [part for group in same for part in execution.split(group)]
    parts = list(execution.run(train_chunk, [(masks[part], [seeds[i] for i in part]) for part in members]))
    back = np.argsort(np.concatenate(members), kind="stable")
    return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}
