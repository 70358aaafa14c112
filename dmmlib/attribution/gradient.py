"""Gradient attributors of the `dattri` library, calibrated to logit units.

`dattri` (Deng et al., NeurIPS 2024 datasets and benchmarks track) is optional: the extra `gradient`, or
`pip install --no-deps dattri`, since its dependency pretty_midi serves only its music benchmark. Its scores, a number a
training point and margin, are those of TRAK (Park et al., 2023), TracIn (Pruthi et al., 2020; here at final weights
only) and influence functions with the EK-FAC curvature (George et al., 2018; Grosse et al., 2023). They have no unit;
one least-squares slope on the subset models' margins gives them that of logits, and their sign.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Subset, TensorDataset

from dmmlib.attribution.base import Context, MarginDatamodel, calibrated, register
from dmmlib.attribution.kernel import margin
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
    """A module on the models' device, and the weights of each of the first of them."""
    _dattri("TRAKAttributor")
    models = context.subset_models()[:n_models]
    if models.buffers:
        raise DataError("dattri's attributors take models without buffers such as batch norm's; use 'kernel'.")
    module = copy.deepcopy(models.module).to_empty(device=context.device).eval()
    return module, [{k: v[i] for k, v in models.params.items()} for i in range(models.n_models)]


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


@register("ekfac")
def ekfac(context: Context, damping: float = 0.1, n_models: int | None = None, batch: int = 250) -> MarginDatamodel:
    """Influence functions with the EK-FAC curvature, by dattri, averaged over the subset models.

    Args:
        context: with the weights of subset models, all of linear layers; gradients take 4 n_train bytes a weight.
        damping: added to the curvature's eigenvalues, as a share of their mean.
        n_models: the first so many; all by default.
        batch: gradients of other points held at a time.

    Raises:
        MethodError: if dattri is not installed.
        DataError: for a context without weights, models with buffers, or with weights outside linear layers.
    """
    attributor = _dattri("IFAttributorEKFAC")
    module, weights = _models(context, n_models)
    from dattri.task import AttributionTask

    linear = sum(p.numel() for part in module.modules() if isinstance(part, nn.Linear) for p in part.parameters())
    if linear != sum(p.numel() for p in module.parameters()):
        raise DataError("EK-FAC's curvature here is of linear layers only, and the model has others; use 'kernel'.")

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
