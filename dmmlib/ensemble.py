"""Train many independent models at once.

The parameters of `n_models` copies of one `nn.Module` are stacked along a first axis, the forward pass is
mapped over it with `torch.func.vmap`, and an elementwise optimizer (SGD, Adam) over the stacked tensors is
then exactly one optimizer a model. Models whose training sets have the same size share every step; nothing
that one model computes enters another's, so a model is determined by its seed and its training indices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F

from dmmlib.errors import DataError, StoreError
from dmmlib.files import replacing
from dmmlib.progress import Progress, silent

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How a model is trained: SGD with Nesterov momentum and a triangular learning rate.

    The rate rises linearly from 0 to `lr` over the share `warmup` of all steps and falls linearly to 0.
    """

    epochs: int = 20
    batch_size: int = 50
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2
    precision: str = "float32"

    def rate(self, progress: float) -> float:
        """Learning rate after the share `progress` of all steps, in [0, 1]."""
        rising = progress / self.warmup if self.warmup > 0 else 1.0
        return self.lr * min(rising, (1.0 - progress) / (1.0 - self.warmup))


@dataclass(frozen=True)
class Ensemble:
    """Stacked models.

    Attributes:
        module: the architecture; its own weights are not used.
        params: name -> tensor (n_models, ...).
        buffers: name -> tensor (n_models, ...), e.g. batch-norm statistics.
    """

    module: nn.Module
    params: Tensors
    buffers: Tensors

    @property
    def n_models(self) -> int:
        return len(next(iter(self.params.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    def __getitem__(self, models: slice | Sequence[int]) -> Ensemble:
        """Some of the models, sharing memory where `models` is a slice."""
        return Ensemble(
            self.module,
            {k: v[models] for k, v in self.params.items()},
            {k: v[models] for k, v in self.buffers.items()},
        )

    def clone(self) -> Ensemble:
        """An independent copy."""
        return Ensemble(
            self.module,
            {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in self.params.items()},
            {k: v.clone() for k, v in self.buffers.items()},
        )

    def forward(self, x: Tensor, *, training: bool = False) -> Tensor:
        """Logits (n_models, n_points, n_classes) for a batch a model: x is (n_models, n_points, ...).

        With `training`, batch norm uses the batch and updates `buffers` in place.
        """
        self.module.train(training)

        def one(params: Tensors, buffers: Tensors, batch: Tensor) -> Tensor:
            return functional_call(self.module, (params, buffers), (batch,))

        return torch.vmap(one)(self.params, self.buffers, x)

    @torch.no_grad()
    def logits(self, x: Tensor, batch_size: int = 1000) -> Tensor:
        """Logits (n_models, n_points, n_classes), float32 on the CPU, of the points x (n_points, ...).

        Points are evaluated `batch_size` at a time, models as many at a time as keep that bounded.
        """
        self.module.eval()

        def one(params: Tensors, buffers: Tensors, batch: Tensor) -> Tensor:
            return functional_call(self.module, (params, buffers), (batch,))

        many = torch.vmap(one, in_dims=(0, 0, None))
        parts = []
        for first in range(0, self.n_models, 16):
            few = self[first : first + 16]
            rows = [many(few.params, few.buffers, b.to(self.device)) for b in x.split(batch_size)]
            parts.append(torch.cat(rows, 1).float().cpu())
        return torch.cat(parts)

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, atomically."""
        tensors = {f"params/{k}": v for k, v in self.params.items()}
        tensors |= {f"buffers/{k}": v for k, v in self.buffers.items()}
        with replacing(path) as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: Path, module: nn.Module, device: torch.device | str = "cpu") -> Ensemble:
        """Read what `save` wrote for the same architecture.

        Raises:
            StoreError: if the file is missing, damaged, or of another architecture.
        """
        try:
            tensors = load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{path} cannot be read as saved models ({error}); delete it to train them again."
            ) from error
        groups: dict[str, Tensors] = {"params": {}, "buffers": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            groups.setdefault(kind, {})[name] = tensor
        own = {k: tuple(v.shape) for k, v in module.named_parameters()}
        found = {k: tuple(v.shape[1:]) for k, v in groups["params"].items()}
        if own != found:
            raise StoreError(f"{path} holds models of another architecture: {found}, expected {own}.")
        return cls(_template(module), groups["params"], groups["buffers"])


def _template(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("meta")


def concatenate(parts: Sequence[Ensemble]) -> Ensemble:
    """One ensemble of all models, in order."""
    first = parts[0]
    return Ensemble(
        first.module,
        {k: torch.cat([p.params[k] for p in parts]) for k in first.params},
        {k: torch.cat([p.buffers[k] for p in parts]) for k in first.buffers},
    )


def initialise(factory: Callable[[], nn.Module], seeds: Sequence[int], device: torch.device | str = "cpu") -> Ensemble:
    """Fresh models, one a seed; drawn on the CPU, so that a seed means the same weights on any device."""
    modules = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            modules.append(factory())
    params, buffers = stack_module_state(modules)
    return Ensemble(
        _template(modules[0]),
        {k: v.detach().to(device) for k, v in params.items()},
        {k: v.to(device) for k, v in buffers.items()},
    )


def epoch_batches(
    pools: Sequence[np.ndarray], batch_size: int, epochs: int, rngs: Sequence[np.random.Generator]
) -> Iterator[np.ndarray]:
    """Batches of indices (n_models, batch) that go through each model's pool once an epoch.

    All pools have one size; an epoch is cut into equal parts (sizes differ by at most one), so that no
    example is dropped and no batch is a small remainder.
    """
    n_batches = max(1, math.ceil(len(pools[0]) / batch_size))
    for _ in range(epochs):
        order = np.stack([rng.permutation(pool) for pool, rng in zip(pools, rngs, strict=True)])
        yield from np.array_split(order, n_batches, axis=1)


Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (n_models, batch, n_classes), indices (n_models, batch)) -> loss of each model (n_models,)."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each model (n_models,), for labels (n_models, batch)."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(1)


def descend(
    ensemble: Ensemble,
    x: Tensor,
    batches: Iterator[np.ndarray],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float] | None = None,
    precision: str = "float32",
    after: Callable[[int], None] | None = None,
) -> None:
    """Take one optimizer step of every model a batch, in place.

    Args:
        ensemble: models whose params are leaves that require gradients and belong to `optimizer`.
        x: points (n_points, ...) that the indices in `batches` refer to, on the ensemble's device.
        batches: index arrays (n_models, batch).
        loss: of each model; the models' losses are summed, which keeps their gradients apart.
        rate: learning rate of step t = 0, 1, ...; the optimizer's own if None.
        precision: "float32", or "bfloat16" for matrix products under autocast.
        after: called with the number of steps taken so far after each step.
    """
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    for step, numbers in enumerate(batches):
        indices = torch.from_numpy(numbers).to(x.device)
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        with autocast:
            logits = ensemble.forward(x[indices], training=True)
        optimizer.zero_grad(set_to_none=True)
        loss(logits.float(), indices).sum().backward()
        optimizer.step()
        if after is not None:
            after(step + 1)


def trainable(ensemble: Ensemble) -> tuple[Ensemble, list[Tensor]]:
    """A copy to be trained, and the leaves that an optimizer moves.

    Stacked matrices (n_models, out, in) are views of leaves (n_models, in, out): batched products deliver
    their gradients in that layout, and gradients of another would be copied at every step.
    """
    leaves, params = [], {}
    for name, tensor in ensemble.params.items():
        matrix = tensor.ndim == 3
        leaf = (tensor.detach().mT if matrix else tensor.detach()).clone(memory_format=torch.contiguous_format)
        leaves.append(leaf.requires_grad_(True))
        params[name] = leaf.mT if matrix else leaf
    return Ensemble(ensemble.module, params, {k: v.clone() for k, v in ensemble.buffers.items()}), leaves


def check_masks(masks: np.ndarray, n_train: int) -> None:
    """Raise DataError unless masks are boolean (n_models, n_train) with no empty row."""
    if masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != n_train:
        raise DataError(
            f"Masks are {masks.dtype} of shape {masks.shape}; give booleans of shape (n_models, {n_train})."
        )
    empty = np.flatnonzero(~masks.any(1))
    if len(empty):
        raise DataError(f"The mask of model {empty[0]} is empty; every model needs an example to train on.")


def train(
    factory: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    masks: np.ndarray,
    seeds: Sequence[int],
    training: Training,
    chunk: int = 32,
    progress: Progress = silent,
) -> Ensemble:
    """Train one model a mask, from scratch.

    Args:
        factory: makes the `nn.Module`.
        x: prepared points (n_train, ...), on the device to train on.
        y: labels (n_train,).
        masks: which points each model is trained on, bool (n_models, n_train).
        seeds: one a model, for its initial weights and the order of its batches.
        chunk: how many models to train together; changes speed and memory, not the result.
        progress: called with the models done so far.

    Returns:
        The trained models, in the order of the masks.

    Raises:
        DataError: for masks that do not fit x, or as many seeds as there are not masks.
    """
    check_masks(masks, len(x))
    if len(seeds) != len(masks):
        raise DataError(f"{len(masks)} masks but {len(seeds)} seeds; give one seed a model.")
    if len(masks) == 0:
        raise DataError("No masks were given; ask for at least one model.")
    sizes = masks.sum(1)
    order = np.argsort(sizes, kind="stable")  # models of one size train together
    same = np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1)
    chunks = [group[i : i + chunk] for group in same for i in range(0, len(group), chunk)]
    parts: list[Ensemble] = []
    done = 0
    progress("train", 0, len(masks))
    for members in chunks:
        parts.append(_train_chunk(factory, x, y, masks[members], [seeds[i] for i in members], training))
        done += len(members)
        progress("train", done, len(masks))
    back = np.argsort(np.concatenate(chunks), kind="stable")
    return concatenate(parts)[back.tolist()]


def _train_chunk(
    factory: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    masks: np.ndarray,
    seeds: Sequence[int],
    training: Training,
) -> Ensemble:
    ensemble, leaves = trainable(initialise(factory, seeds, x.device))
    pools = [np.flatnonzero(mask) for mask in masks]
    rngs = [np.random.default_rng(seed) for seed in seeds]
    n_steps = training.epochs * math.ceil(len(pools[0]) / training.batch_size)
    optimizer = torch.optim.SGD(
        leaves,
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=training.momentum > 0,
        fused=True,
    )
    descend(
        ensemble,
        x,
        epoch_batches(pools, training.batch_size, training.epochs, rngs),
        lambda logits, indices: cross_entropy(logits, y[indices]),
        optimizer,
        rate=lambda step: training.rate((step + 0.5) / n_steps),
        precision=training.precision,
    )
    return ensemble.clone()
