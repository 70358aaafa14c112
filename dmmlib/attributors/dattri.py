"""Gradient attributors of the `dattri` library, calibrated to logit units.

`dattri` (Deng et al., NeurIPS 2024 datasets and benchmarks track) is optional: the extra `gradient`, or
`pip install --no-deps dattri`, since its dependency pretty_midi serves only its music benchmark. It gives a score to
each training point and margin: that of TRAK (Park et al., 2023), of TracIn (Pruthi et al., 2020; here at final weights
only), or of influence functions with the EK-FAC curvature (George et al., 2018; Grosse et al., 2023) or that of
gradients projected layer by layer, LoGra (Choe et al., "What is your data worth to GPT?", 2024). Scores have no unit;
one least-squares slope on the subset models' margins gives them that of logits, and their sign.

All take `n_models`, at how many of the context's subset models gradients are taken (all by default), and `batch`, of
how many points they are held at a time; scores are 4 n_train n_points bytes. All raise MethodError where dattri is not
installed, and DataError for a context without weights, or models with buffers, shared weights, or no vmap.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, StackDataset, Subset, TensorDataset

from dmmlib import stacking
from dmmlib.attribution import Context, register
from dmmlib.attributors.gradients import margin
from dmmlib.attributors.margins import MarginDatamodel, calibrated
from dmmlib.errors import DataError, MethodError

Weights = dict[str, Tensor]
Of = Callable[[Tensor, Tensor], Tensor]  # values of points (n,), or their mean, from logits (n, n_classes) and labels


def _load() -> Any:
    """dattri, with the parts of it that are used here."""
    try:
        import dattri.algorithm
        import dattri.task  # noqa: F401
    except ImportError as error:
        raise MethodError(
            f"This attribution method needs the library dattri ({error}); install it with "
            "`pip install --no-deps dattri`, or use 'kernel'."
        ) from error
    return dattri


def _models(context: Context, n_models: int | None) -> tuple[nn.Module, list[Weights]]:
    """A module on the models' device, and the weights of each of the first of them; a bare layer too has a name."""
    models = context.subset_models()[:n_models]
    shared = len(dict(models.module.named_parameters(remove_duplicate=False))) > len(models.params)
    if models.buffers or shared:
        raise DataError("dattri takes models without buffers, such as batch norm's, or shared weights; use 'kernel'.")
    module = nn.Sequential(stacking.template(models.module, context.device)).eval()
    weights = [{f"0.{k}": v[i] for k, v in models.params.items()} for i in range(models.n_models)]
    try:
        torch.vmap(lambda point: functional_call(module, weights[0], (point[None].clone(),)))(context.x[:2])
    except RuntimeError as error:
        raise DataError(
            f"dattri maps models over points, which this one does not let ({error}); use 'kernel'."
        ) from error
    return module, weights


def _check_linear(module: nn.Module, x: Tensor, name: str) -> None:
    """Raise DataError unless all weights are of linear layers that a forward pass meets once."""
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


def _function(module: nn.Module, of: Of, single: bool) -> Callable[..., Tensor]:
    """The mean of `of`, as dattri takes functions: of weights, and of a single point or a batch."""

    def value(params: Weights, points: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (part[None] for part in points) if single else points
        return of(functional_call(module, params, (x.clone(),)), y).mean()

    return value


def _task(module: nn.Module, weights: list[Weights], loss: Of, target: Of, single: bool) -> Any:
    """dattri's description of models: gradients of `loss` of training points against those of `target`."""
    loss_func, target_func = (_function(module, of, single) for of in (loss, target))
    task = _load().task.AttributionTask
    return task(loss_func=loss_func, target_func=target_func, model=module, checkpoints=weights)


def _loaders(context: Context, batch: int, kind: Any = TensorDataset) -> tuple[DataLoader, DataLoader]:
    """Training points, and all points, as pairs or, of a `StackDataset`, as x and y."""
    every = kind(context.x, context.y) if kind is TensorDataset else kind(x=context.x, y=context.y)
    return DataLoader(Subset(every, range(context.n_train)), batch), DataLoader(every, batch)


def _projection(context: Context, n_features: int | None) -> dict[str, Any]:
    """Every setting of dattri's projections, since those left out keep what an earlier attributor was given."""
    kind = {"proj_dim": n_features or 512, "proj_type": "normal" if n_features else "identity"}  # 512 without effect
    return kind | {"proj_max_batch_size": 32, "proj_seed": context.seed, "device": str(context.device)}


@register("trak")
def trak(
    context: Context,
    n_features: PositiveInt | None = 512,
    regularization: NonNegativeFloat = 1e-6,
    n_models: PositiveInt | None = None,
    batch: PositiveInt = 250,
) -> MarginDatamodel:
    """TRAK with random projections to `n_features` (None: whole gradients), by dattri, at the context's subset models.

    The regularization is added to the diagonal of the features' Gram matrix, gradients being divided by the square
    root of the number of weights.
    """
    algorithm, (module, weights) = _load().algorithm, _models(context, n_models)
    train, targets = _loaders(context, batch)
    scores = algorithm.TRAKAttributor(
        task=_task(module, weights, margin, margin, single=True),
        correct_probability_func=_function(module, lambda z, y: margin(z, y).sigmoid(), single=True),
        projector_kwargs=_projection(context, n_features),
        device=str(context.device),
        regularization=regularization,
    )
    with redirect_stderr(io.StringIO()):  # dattri's progress bars
        scores.cache(train)
        return calibrated(context, scores.attribute(targets).detach().cpu().numpy())


@register("tracin")
def tracin(context: Context, n_models: PositiveInt | None = None, batch: PositiveInt = 250) -> MarginDatamodel:
    """Grad-dot: TracIn at the final weights of the subset models, whole gradients, by dattri."""
    algorithm, (module, weights) = _load().algorithm, _models(context, n_models)
    scores = algorithm.TracInAttributor(
        task=_task(module, weights, cross_entropy, margin, single=True),
        weight_list=torch.ones(len(weights)),
        normalized_grad=False,
        projector_kwargs=_projection(context, None),
        device=str(context.device),
    )
    with redirect_stderr(io.StringIO()):  # dattri's progress bars
        return calibrated(context, scores.attribute(*_loaders(context, batch)).detach().cpu().numpy())


def _corrected(attributor: Any, module: nn.Module) -> Any:
    """dattri's EK-FAC, given eigenvectors in rows and a layer's bias as a column of its weights, as its formulas ask.

    It gives them eigenvectors in columns, and the bias behind the weights: a curvature of quite other directions.
    """
    sizes = [p.numel() for p in module.parameters()]
    indices = torch.arange(sum(sizes)).split(sizes)
    layers: dict[str, list[Tensor]] = {}
    for (name, p), i in zip(module.named_parameters(), indices, strict=True):
        layers.setdefault(name.rpartition(".")[0], []).append(i.view(len(p), -1))
    order = torch.cat([torch.cat(parts, 1).flatten() for parts in layers.values()])

    class Corrected(attributor):
        @property
        def cached_q(self) -> dict[str, tuple[Tensor, Tensor]]:
            return self.rows

        @cached_q.setter
        def cached_q(self, columns: dict[str, tuple[Tensor, Tensor]]) -> None:
            self.rows = {name: (a.T, s.T) for name, (a, s) in columns.items()}

        def transform_test_rep(self, ckpt_idx: int, test_rep: Tensor) -> Tensor:
            return super().transform_test_rep(ckpt_idx, test_rep[:, order])[:, order.argsort()]

    return Corrected


@register("ekfac")
def ekfac(
    context: Context, damping: PositiveFloat = 0.1, n_models: PositiveInt | None = None, batch: PositiveInt = 250
) -> MarginDatamodel:
    """Influence functions with the EK-FAC curvature, by dattri (see `_corrected`), averaged over the subset models.

    Models must be of linear layers only, each used once; else DataError. It takes 4 n_train bytes per weight. The
    damping is added to the curvature's eigenvalues, as a share of their mean.
    """
    algorithm, (module, weights) = _load().algorithm, _models(context, n_models)
    _check_linear(module, context.x, "EK-FAC")
    attributor = _corrected(algorithm.IFAttributorEKFAC, module)
    train, every = _loaders(context, batch)
    total = torch.zeros(context.n_train, len(context.x), device=context.device)
    for checkpoint in weights:
        task = partial(_task, module, [checkpoint], cross_entropy, single=False)
        scores = attributor(task=task(cross_entropy), device=str(context.device))
        with redirect_stderr(io.StringIO()):  # dattri's progress bars
            scores.cache(train)
            values = torch.cat([v.flatten() for v in scores.cached_lambdas.values()])
            scores.task, scores.damping = task(margin), damping * float(values.mean())
            total += scores.attribute(DataLoader(train.dataset, context.n_train), every).detach() / len(weights)
    return calibrated(context, total.cpu().numpy())


class _MeanMargin(nn.ModuleList):
    """A network whose "loss" is the mean margin: dattri's LoGra asks models for one, instead of a target function."""

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=margin(self[0](x), y).mean())


@register("logra")
def logra(
    context: Context,
    rank: PositiveInt = 64,
    damping: PositiveFloat = 0.1,
    n_models: PositiveInt | None = None,
    batch: PositiveInt = 250,
) -> MarginDatamodel:
    """LoGra, influence functions of gradients projected layer by layer, by dattri, averaged over the subset models.

    A linear layer's gradient d a^T becomes (P d)(Q a)^T, with random P (rank, n_out) and Q (rank, n_in + 1); a layer's
    curvature is the mean product of the projected gradients of training losses. dattri's takes one model, and the
    cross-entropy as its target whatever it is told, unless the model states a loss of its own, here the margin; it
    leaves a file in the working directory, here a temporary one; and it compiles its few products, which takes longer.
    Models must be as for `ekfac`. A layer takes 4 n_points rank^2 bytes of gradients, and 4 rank^4 of curvature, to
    which the damping is added as a share of the mean eigenvalue.
    """
    library, (module, weights) = _load(), _models(context, n_models)
    _check_linear(module, context.x, "LoGra")

    def loss(model: _MeanMargin, points: Weights, _: str) -> Tensor:
        return cross_entropy(model[0](points["x"]), points["y"])

    train, every = _loaders(context, batch, StackDataset)
    total = torch.zeros(context.n_train, len(context.x), device=context.device)
    settings = {"damping": damping, "proj_dim": rank**2, "offload": "none", "device": str(context.device)}
    for i, checkpoint in enumerate(weights):
        named = {f"0.{name}": weight for name, weight in checkpoint.items()}
        task = library.task.AttributionTask(loss_func=loss, model=_MeanMargin([module]), checkpoints=[named])
        with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()), torch.compiler.set_stance("force_eager"):
            scores = library.algorithm.LoGraAttributor(task=task, cache_dir=folder, **settings)
            scores.sparsifier_kwargs["proj_seed"] = context.seed + i
            scores.cache(train)
            total += scores.attribute(train, every).detach() / len(weights)
    return calibrated(context, total.cpu().numpy())
