"""Gradient attributors of the `dattri` library, calibrated to logit units.

`dattri` (Deng et al., NeurIPS 2024 datasets and benchmarks track) is optional: the extra `gradient`, or
`pip install --no-deps dattri`, since its dependency pretty_midi serves only its music benchmark. Its scores, a number a
training point and margin, are those of TRAK (Park et al., 2023), TracIn (Pruthi et al., 2020; here at final weights
only) and influence functions with the EK-FAC curvature (George et al., 2018; Grosse et al., 2023) or with that of
gradients projected layer by layer, LoGra (Choe et al., 2024). They have no unit; one least-squares slope on the subset
models' margins gives them that of logits, and their sign.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, StackDataset, Subset, TensorDataset

from dmmlib.attribution.base import Context, MarginDatamodel, calibrated, register
from dmmlib.attribution.gradients import margin
from dmmlib.errors import DataError, MethodError


def _dattri(name: str) -> Any:
    """A class of dattri; raises MethodError with what to do where it is not installed."""
    try:
        from dattri import algorithm
    except ImportError as error:
        raise MethodError(
            f"This attribution method needs the library dattri ({error}); install it with "
            "`pip install --no-deps dattri`, or use 'kernel'."
        ) from error
    return getattr(algorithm, name)


def _models(context: Context, n_models: int | None) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A module on the models' device, and the weights of each of the first of them; a bare layer too has a name."""
    _dattri("TRAKAttributor")
    models = context.subset_models()[:n_models]
    if models.buffers:
        raise DataError("dattri's attributors take models without buffers such as batch norm's; use 'kernel'.")
    module = nn.Sequential(copy.deepcopy(models.module).to_empty(device=context.device)).eval()
    return module, [{f"0.{k}": v[i] for k, v in models.params.items()} for i in range(models.n_models)]


def _check_linear(module: nn.Module, x: Tensor, name: str) -> None:
    """Raises DataError unless all weights are of linear layers that a forward pass meets once."""
    met: list[nn.Module] = []
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    hooks = [part.register_forward_hook(lambda part, *_: met.append(part)) for part in linear]
    with torch.no_grad():
        module(x[:1])
    for hook in hooks:
        hook.remove()
    if sum(p.numel() for part in met for p in part.parameters()) != sum(p.numel() for p in module.parameters()):
        raise DataError(
            f"{name}'s curvature here is of linear layers only, each used once, and the model has others; use 'kernel'."
        )


def _task(context: Context, loss: Callable[[Tensor, Tensor], Tensor], n_models: int | None) -> Any:
    """dattri's description of the models: gradients of `loss` of training points against those of margins."""
    module, weights = _models(context, n_models)
    from dattri.task import AttributionTask

    def of_train(params: dict[str, Tensor], point: tuple[Tensor, Tensor]) -> Tensor:
        x, y = point
        return loss(functional_call(module, params, (x[None],)), y[None])

    def of_target(params: dict[str, Tensor], point: tuple[Tensor, Tensor]) -> Tensor:
        x, y = point
        return margin(functional_call(module, params, (x[None],)), y[None])[0]

    return AttributionTask(loss_func=of_train, model=module, checkpoints=weights, target_func=of_target)


def _loaders(context: Context, batch: int) -> tuple[DataLoader, DataLoader]:
    """Training points, and all points."""
    every, n = TensorDataset(context.x, context.y), context.n_train
    return DataLoader(Subset(every, range(n)), batch), DataLoader(every, batch)


def _projection(context: Context, n_features: int | None) -> dict[str, Any]:
    """Every setting of dattri's projections, since those left out keep what an earlier attributor was given."""
    return {
        "proj_dim": n_features or 512,  # without effect on whole gradients
        "proj_type": "normal" if n_features else "identity",
        "proj_max_batch_size": 32,
        "proj_seed": context.seed,
        "device": str(context.device),
    }


@register("trak")
def trak(
    context: Context,
    n_features: int | None = 512,
    regularization: float = 1e-6,
    n_models: int | None = None,
    batch: int = 250,
) -> MarginDatamodel:
    """TRAK with random projections, by dattri, at the context's subset models.

    Args:
        context: with the weights of subset models; scores take 4 n_train n_points bytes.
        n_features: of the projection; None for whole gradients.
        regularization: added to the diagonal of the features' Gram matrix, gradients being divided by the square
            root of the number of weights.
        n_models: the first so many; all by default.
        batch: gradients held at a time.

    Raises:
        MethodError: if dattri is not installed.
        DataError: for a context without weights, or models with buffers.
    """
    attributor = _dattri("TRAKAttributor")
    task = _task(context, lambda z, y: margin(z, y)[0], n_models)
    module = task.get_model()

    def right(params: dict[str, Tensor], point: tuple[Tensor, Tensor]) -> Tensor:
        x, y = point
        return margin(functional_call(module, params, (x[None],)), y[None])[0].sigmoid()

    train, targets = _loaders(context, batch)
    scores = attributor(
        task=task,
        correct_probability_func=right,
        projector_kwargs=_projection(context, n_features),
        device=str(context.device),
        regularization=regularization,
    )
    with redirect_stderr(io.StringIO()):  # dattri's progress bars
        scores.cache(train)
        found = scores.attribute(targets)
    return calibrated(context, found.detach().cpu().numpy())


@register("tracin")
def tracin(context: Context, n_models: int | None = None, batch: int = 250) -> MarginDatamodel:
    """Grad-dot: TracIn at the final weights of the subset models, whole gradients, by dattri; arguments as `trak`."""
    attributor = _dattri("TracInAttributor")
    task = _task(context, lambda z, y: torch.nn.functional.cross_entropy(z, y), n_models)
    train, targets = _loaders(context, batch)
    ones = torch.ones(len(task.get_checkpoints()))
    scores = attributor(
        task=task,
        weight_list=ones,
        normalized_grad=False,
        projector_kwargs=_projection(context, None),
        device=str(context.device),
    )
    with redirect_stderr(io.StringIO()):  # dattri's progress bars
        found = scores.attribute(train, targets)
    return calibrated(context, found.detach().cpu().numpy())


def _upright(attributor: Any, module: nn.Module) -> Any:
    """dattri's EK-FAC, given eigenvectors in rows and a layer's bias as a column of its weights, as its formulas ask.

    It gives them eigenvectors in columns, and the bias behind the weights: a curvature of quite other directions.
    """
    sizes = [p.numel() for p in module.parameters()]
    indices = torch.arange(sum(sizes)).split(sizes)
    layers: dict[str, list[Tensor]] = {}
    for (name, p), i in zip(module.named_parameters(), indices, strict=True):
        layers.setdefault(name.rpartition(".")[0], []).append(i.view(len(p), -1))
    order = torch.cat([torch.cat(parts, 1).flatten() for parts in layers.values()])

    class Upright(attributor):
        @property
        def cached_q(self) -> dict[str, tuple[Tensor, Tensor]]:
            return self.rows

        @cached_q.setter
        def cached_q(self, columns: dict[str, tuple[Tensor, Tensor]]) -> None:
            self.rows = {name: (a.T, s.T) for name, (a, s) in columns.items()}

        def transform_test_rep(self, ckpt_idx: int, test_rep: Tensor) -> Tensor:
            return super().transform_test_rep(ckpt_idx, test_rep[:, order])[:, order.argsort()]

    return Upright


@register("ekfac")
def ekfac(context: Context, damping: float = 0.1, n_models: int | None = None, batch: int = 250) -> MarginDatamodel:
    """Influence functions with the EK-FAC curvature, by dattri (see `_upright`), averaged over the subset models.

    Args:
        context: with the weights of subset models, all of linear layers; gradients take 4 n_train bytes a weight.
        damping: added to the curvature's eigenvalues, as a share of their mean.
        n_models: the first so many; all by default.
        batch: gradients of other points held at a time.

    Raises:
        MethodError: if dattri is not installed.
        DataError: for a context without weights, models with buffers, or with weights outside linear layers or in one
            that is used twice.
    """
    module, weights = _models(context, n_models)
    from dattri.task import AttributionTask

    _check_linear(module, context.x, "EK-FAC")
    attributor = _upright(_dattri("IFAttributorEKFAC"), module)

    def loss(params: dict[str, Tensor], points: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(module, params, (points[0],)), points[1])

    def target(params: dict[str, Tensor], points: tuple[Tensor, Tensor]) -> Tensor:
        return margin(functional_call(module, params, (points[0],)), points[1]).mean()

    train, every = (
        TensorDataset(context.x[: context.n_train], context.y[: context.n_train]),
        _loaders(context, batch)[1],
    )
    total = torch.zeros(context.n_train, len(context.x), device=context.device)
    for checkpoint in weights:
        of_loss, of_margin = (
            AttributionTask(loss_func=loss, model=module, checkpoints=[checkpoint], target_func=function)
            for function in (loss, target)
        )
        scores = attributor(task=of_loss, device=str(context.device))
        with redirect_stderr(io.StringIO()):  # dattri's progress bars
            scores.cache(DataLoader(train, batch))
            values = torch.cat([v.flatten() for v in scores.cached_lambdas.values()])
            scores.task, scores.damping = of_margin, damping * float(values.mean())
            total += scores.attribute(DataLoader(train, len(train)), every).detach() / len(weights)
    return calibrated(context, total.cpu().numpy())


class _MeanMargin(nn.Module):
    """A network whose "loss" is the mean margin: dattri's LoGra asks models for one, instead of a target function."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=margin(self.net(x), y).mean())


@register("logra")
def logra(
    context: Context, rank: int = 64, damping: float = 0.1, n_models: int | None = None, batch: int = 250
) -> MarginDatamodel:
    """LoGra, influence functions of gradients projected layer by layer, by dattri, averaged over the subset models.

    A linear layer's gradient d a^T becomes (P d)(Q a)^T, with random P (rank, n_out) and Q (rank, n_in + 1); a layer's
    curvature is the mean product of the projected gradients of training losses (Choe et al., "What is your data worth
    to GPT?", 2024, with random P and Q). dattri's takes one model, and the cross-entropy as its target whatever it is
    told, unless the model states a loss of its own, here the margin; it reads and leaves a file in the working
    directory, here a temporary one; and it compiles its few products, which takes a compiler and longer than they do.

    Args:
        context: with the weights of subset models, all of linear layers; a layer takes 4 n_points rank^2 bytes of
            gradients, and 4 rank^4 of curvature.
        rank: of both projections, so that a layer has rank^2 features; dattri's choice by default.
        damping: added to the curvature of each layer, as a share of its mean eigenvalue.
        n_models: the first so many; all by default.
        batch: gradients taken at a time.

    Raises:
        MethodError: if dattri is not installed.
        DataError: for a rank below 1 or a damping not above 0, a context without weights, models with buffers, or with
            weights outside linear layers or in one that is used twice.
    """
    if rank < 1 or damping <= 0:
        raise DataError(f"LoGra was given rank={rank} and damping={damping}; give at least 1, and a share above 0.")
    attributor = _dattri("LoGraAttributor")
    module, weights = _models(context, n_models)
    from dattri.task import AttributionTask

    _check_linear(module, context.x, "LoGra")

    def loss(model: _MeanMargin, points: dict[str, Tensor], _: str) -> Tensor:
        return nn.functional.cross_entropy(model.net(points["x"]), points["y"])

    points: dict[str, Any] = {"x": context.x, "y": context.y}
    every, n = StackDataset(**points), context.n_train
    train, targets = DataLoader(Subset(every, range(n)), batch), DataLoader(every, batch)
    total = torch.zeros(n, len(context.x), device=context.device)
    for i, checkpoint in enumerate(weights):
        named = {f"net.{name}": weight for name, weight in checkpoint.items()}
        task = AttributionTask(loss_func=loss, model=_MeanMargin(module), checkpoints=[named])
        with (
            TemporaryDirectory() as folder,
            redirect_stderr(io.StringIO()),  # dattri's progress bars
            torch.compiler.set_stance("force_eager"),
        ):
            scores = attributor(
                task=task,
                damping=damping,
                device=str(context.device),
                proj_dim=rank**2,
                offload="none",
                cache_dir=folder,
            )
            scores.sparsifier_kwargs["proj_seed"] = context.seed + i
            scores.cache(train)
            total += scores.attribute(train, targets).detach() / len(weights)
    return calibrated(context, total.cpu().numpy())
