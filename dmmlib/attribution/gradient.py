"""Gradient attributors of the `dattri` library, calibrated to logit units.

`dattri` (Deng et al., NeurIPS 2024 datasets and benchmarks track) is optional: `pip install --no-deps dattri`, since
its dependency pretty_midi serves only its music benchmark. Its scores, a number a training point and margin, are those
of TRAK (Park et al., 2023) and TracIn (Pruthi et al., 2020; here at final weights only). They have no unit; one
least-squares slope on the subset models' margins gives them that of logits, and their sign.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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


def _task(context: Context, loss: Callable[[Tensor, Tensor], Tensor], n_models: int | None) -> Any:
    """dattri's description of the models: gradients of `loss` of training points against those of margins."""
    _dattri("TRAKAttributor")
    from dattri.task import AttributionTask

    models = context.subset_models()[:n_models]
    if models.buffers:
        raise DataError("dattri's attributors take models without buffers such as batch norm's; use 'kernel'.")
    module = copy.deepcopy(models.module).to_empty(device=context.device).eval()

    def of_train(params: dict[str, Tensor], point: tuple[Tensor, Tensor]) -> Tensor:
        x, y = point
        return loss(functional_call(module, params, (x[None],)), y[None])

    def of_target(params: dict[str, Tensor], point: tuple[Tensor, Tensor]) -> Tensor:
        x, y = point
        return margin(functional_call(module, params, (x[None],)), y[None])[0]

    weights = [{k: v[i] for k, v in models.params.items()} for i in range(models.n_models)]
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
    scores.cache(train)
    return calibrated(context, scores.attribute(targets).detach().cpu().numpy())


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
    return calibrated(context, scores.attribute(train, targets).detach().cpu().numpy())
