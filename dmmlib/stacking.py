"""Run many copies of one module at once: which can be stacked, which are run one by one, and which not at all.

`torch.func.vmap` maps a module over stacked weights. It cannot map every module: one that draws random numbers
(dropout), looks at values, or calls a kernel without a rule for it (LSTM) is run model by model. Each model's noise is
then drawn from a seed of its own, so that no model depends on which others share its step.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dmmlib.errors import DmmError, ModelError
from dmmlib.optim import Tensors

torch.backends.mha.set_fastpath_enabled(False)  # of transformer layers: it has no derivative
_DRAWING = threading.RLock()  # modules draw from torch's global generator, and chunks train in threads


@contextmanager
def drawing(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's generators, Python's and NumPy's, for one thread at a time, and leave them as they were."""
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with _DRAWING, torch.random.fork_rng(devices=devices):
        before = random.getstate(), np.random.get_state()  # noqa: NPY002
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def stack(modules: Sequence[nn.Module]) -> tuple[nn.Module, Tensors, Tensors]:
    """The architecture of some modules, and their stacked parameters and buffers, name -> (n_models, ...).

    Parameters that do not require gradients are put among the buffers, so that no method moves them.
    """
    named = [dict(chain(module.named_buffers(), module.named_parameters())) for module in modules]
    stacked = {name: torch.stack([own[name].detach() for own in named]) for name in named[0]}
    params = {name: stacked.pop(name) for name, p in modules[0].named_parameters() if p.requires_grad}
    if not params:
        raise ModelError("The model has no parameter that requires gradients; leave some to be trained.")
    return template(modules[0]), params, stacked


def template(module: nn.Module, device: torch.device | str = "meta") -> nn.Module:
    """The architecture without weights, or with ones of any value; tensors that layers share stay shared."""
    empty, first, aliases = copied(module).to_empty(device=device), dict[int, str](), dict[str, str]()
    named = (module.named_parameters, module.named_buffers)
    for name, tensor in chain(*(of(remove_duplicate=False) for of in named)):
        known = first.setdefault(id(tensor), name)
        (owner, _, own), (source, _, shared) = name.rpartition("."), known.rpartition(".")
        if empty.get_submodule(owner) is not empty.get_submodule(source) or own != shared:
            setattr(empty.get_submodule(owner), own, getattr(empty.get_submodule(source), shared))
            aliases[name] = known
    vars(empty).update(aliases=aliases, stackable=_Noted())
    return empty


def copied(module: nn.Module) -> nn.Module:
    """A copy, without what a forward pass left in the module that cannot be copied, such as features that it kept."""
    left: dict[int, Any] = {}
    for value in chain.from_iterable(vars(part).values() for part in module.modules()):
        if isinstance(value, Tensor):
            try:
                copy.deepcopy(value)
            except RuntimeError:
                left[id(value)] = None
    return copy.deepcopy(module, left)


def one(module: nn.Module, params: Tensors, buffers: Tensors, x: Tensor) -> tuple[Tensor, Tensors]:
    """Logits (n_points, n_classes) of one model, and its buffers afterwards; nothing that is given changes."""
    state = params | {k: v.clone() for k, v in buffers.items()}  # which a module may change, or replace
    aliases = vars(module).get("aliases")  # by itself torch would leave weights in a layer that is used under two names
    state |= {name: state[known] for name, known in (aliases or {}).items()}
    return functional_call(module, state, (x,), tie_weights=aliases is None), {k: state[k] for k in buffers}


def forward(
    module: nn.Module, params: Tensors, buffers: Tensors, x: Tensor, seeds: Sequence[int] | None = None
) -> tuple[Tensor, Tensors]:
    """Logits of stacked models, each on its own batch x[i], and their buffers afterwards.

    With seeds, one by one, each model drawing by its own.
    """
    if seeds is None and len(x) > 1:
        return torch.vmap(partial(one, module))(params, buffers, x)
    logits, after = [], []
    for i in range(len(x)):  # a single model as it would be alone, too: batched convolutions are slower
        with nullcontext() if seeds is None else drawing(seeds[i], x.device):
            z, moved = one(module, at(params, i), at(buffers, i), x[i] if seeds is None else x[i].clone())
        logits.append(z)
        after.append(moved)
    return torch.stack(logits), {k: torch.stack([moved[k] for moved in after]) for k in buffers}


def gradient(loss: Callable[[Tensors], tuple[Tensor, Any]], params: Tensors) -> tuple[Tensors, Any]:
    """Gradient of a loss with respect to params, and what it returns besides, as `torch.func.grad` does, to the bit.

    But without that function's import of the compiler, a quarter of the time in which a process has a study.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.func.grad(loss, has_aux=True)(params)
    with torch.enable_grad():
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        value, besides = loss(leaves)
    if not value.requires_grad:
        return {k: torch.zeros_like(v) for k, v in params.items()}, besides
    found = torch.autograd.grad(value, [*leaves.values()], materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), besides


def stackable(module: nn.Module, params: Tensors, buffers: Tensors, x: Tensor) -> bool:
    """Whether vmap maps models, in the module's mode, to what each answers alone, drawing nothing.

    Found out on two models with batches of x (n_models, n_points, ...), gradients included, and noted for the module
    and its copies.
    """
    known: _Noted = vars(module).setdefault("stackable", _Noted())
    mode = module.training, x.shape[1] == 1, *params, *buffers  # the second: see `lone_points`
    if mode not in known:
        trial, weights, state = copied(module), at(params, slice(2)), at(buffers, slice(2))
        weights = {k: v.detach() for k, v in weights.items()}

        def answers(weights: Tensors, ask: Callable[..., Any]) -> tuple[Tensor, tuple[Tensor, Tensors]]:
            z, moved = ask(weights, state, x[:2].clone())
            return z.square().sum(), (z, moved)

        with drawing(0, x.device):
            alone, drawn = gradient(partial(answers, ask=partial(forward, trial, seeds=[0, 1])), weights), _drawn()
            try:
                stacked = gradient(partial(answers, ask=torch.vmap(partial(one, trial))), weights)
                flat = [[*g.values(), z, *moved.values()] for g, (z, moved) in (stacked, alone)]
                known[mode] = all(map(alike, *flat)) and _drawn() == drawn
            except Exception:  # whatever vmap cannot do, the module can alone
                known[mode] = False
    return known[mode]


class _Noted(dict[tuple[Any, ...], bool]):
    """What was found out of a module, which its copies share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noted:
        return self


def _drawn() -> tuple[Any, ...]:
    """How far Python's and NumPy's generators are; of torch's own, vmap sees to it."""
    state: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), np.asarray(state[1]).tobytes(), *state[2:]


def close(a: Tensor, b: Tensor, share: float = 1e-3) -> bool:
    """Whether tensors are equal up to a share, by default more than rounding does."""
    scale = float(b.detach().abs().nan_to_num().max()) if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b.to(a), share, 0.1 * share * scale + 1e-7, equal_nan=True)


def alike(a: Tensor, b: Tensor, share: float = 0.02) -> bool:
    """Whether gradients are equal up to a share of their norm.

    Rounding moves a few units of a large network to the other side of a ReLU or a max-pool, and gradients with them; so
    do the short products of a GPU's convolutions (TF32).
    """
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    apart = (a - b).masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
    return float(apart.norm()) <= share * float(b.nan_to_num(0, 0, 0).norm()) + 1e-7


def each(function: Callable[..., Any], in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """`torch.vmap` of a function of tensors, or dictionaries of them, to a dictionary; a loop where that fails."""
    mapped = [(a, dim is not None) for a, dim in zip(arguments, in_dims, strict=True)]

    def single(i: int) -> Any:
        return function(*(at(a, i) if along else a for a, along in mapped))

    with suppress(RuntimeError):
        found, first = torch.vmap(function, in_dims)(*arguments), single(0)
        if all(alike(found[k][0], v) for k, v in first.items()):
            return found
    n = next(len(next(iter(a.values())) if isinstance(a, dict) else a) for a, along in mapped if along)
    each_of = [single(i) for i in range(n)]
    return {k: torch.stack([values[k] for values in each_of]) for k in each_of[0]}


def at(tensors: Any, i: int | slice) -> Any:
    """The i-th of a tensor, or of each in a dictionary."""
    return {k: v[i] for k, v in tensors.items()} if isinstance(tensors, dict) else tensors[i]


@contextmanager
def lone_points(module: nn.Module) -> Iterator[None]:
    """Let batch norm take its running statistics, unmoved, where a batch leaves a channel a single value."""

    def settle(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        part.train(inputs[0].numel() > inputs[0].shape[1])

    hooks = [p.register_forward_pre_hook(settle) for p in module.modules() if isinstance(p, _BatchNorm)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        module.train()


def check(
    make: Callable[[], nn.Module], x: Tensor, n_classes: int, exactly: bool = True, name: str = "The model"
) -> None:
    """Raise ModelError, in one line, unless two models made by `make` answer points x as training needs it.

    They are asked on four points, alone and from stacked weights, in training and in evaluation, 16 passes in all.
    Needed are finite logits (n_points, n_classes), or at least so many unless `exactly`, with a gradient; in evaluation
    always the same of a point, whichever others are asked with it; and no state but parameters and buffers.
    """
    cause = None
    try:
        modules = []
        for seed in (0, 1):
            with drawing(seed):
                modules.append(make().to(x.device))
        # As answers are compared, a GPU's convolutions multiply all digits of float32; by default they take TF32's.
        whole = torch.backends.cudnn.flags(enabled=None, benchmark=None, deterministic=None, allow_tf32=False)
        with drawing(0, x.device), whole:
            fault = next(_faults(modules, x[:4], n_classes, exactly), "")
    except DmmError:
        raise
    except Exception as error:
        cause, first = error, f"{type(error).__name__}: {error}".partition("\n")[0]
        given = f"points of shape {tuple(x.shape[1:])}, {str(x.dtype).removeprefix('torch.')}"
        fault = f"fails on {given} ({first}); mend it, or what prepares its points"
    if fault:
        raise ModelError(f"{name} {fault}.") from cause


def _faults(modules: list[nn.Module], x: Tensor, n_classes: int, exactly: bool) -> Iterator[str]:
    """What keeps two modules of different seeds from being trained."""
    if modules[0] is modules[1]:
        yield "is the same object at every call of its factory; make a fresh one at each call"
    empty, params, buffers = stack(modules)
    if odd := {v.dtype for v in params.values()} - {torch.float32, torch.float64}:
        yield f"has weights of {odd.pop()}; keep them in float32 (training.precision is for less)"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in modules[0].parameters()):
        yield "has hooks on gradients of its weights, which stacked copies lose; put them into its forward pass"
    if bare := [k for k, v in params.items() if not v.numel()]:
        yield f"has no number in its weight {bare[0]}; make that layer wider"
    for training in (False, True):
        alone = []
        for seed, module in enumerate(modules):
            alone.append((yield from _asked(module.train(training), x, seed)))
        z = alone[0][0]
        if z.ndim != 2 or len(z) != len(x) or (z.shape[1] != n_classes if exactly else z.shape[1] < n_classes):
            wanted = f"({len(x)}, {'' if exactly else 'at least '}{n_classes})"
            yield f"answers {tuple(z.shape)} for {len(x)} points; give logits {wanted}"
        if not all(logits.isfinite().all() for logits, _ in alone):
            yield "answers NaN or infinity before any training; lower its initial weights, or scale its points"
        if not training and all((z >= 0).all() and close(z.sum(1), torch.ones(len(z))) for z, _ in alone):
            yield "answers probabilities; return logits, before the softmax"
        logits, after = forward(empty.train(training), params, buffers, x.repeat(2, *(1,) * x.ndim), seeds=[0, 1])
        for i, (own, moved) in enumerate(alone):
            if not close(logits[i], own) or not all(close(after[k][i], v) for k, v in moved.items()):
                yield "answers otherwise with its weights from outside; make every tensor a parameter or buffer"

    def loss(params: Tensors) -> tuple[Tensor, None]:
        z = forward(empty, params, buffers, x.repeat(2, *(1,) * x.ndim), seeds=[0, 1])[0].flatten(0, 1).float()
        return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long, device=z.device)), None

    torch.func.vjp(lambda params: loss(params)[0], params)  # which fails where gradients of each point would, later
    slopes = gradient(loss, params)[0].values()
    if not any(g.any() for g in slopes) or not all(g.isfinite().all() for g in slopes):
        yield "passes no finite gradient on to its parameters; let its answers depend on them"


def _asked(module: nn.Module, x: Tensor, seed: int) -> Generator[str, None, tuple[Tensor, Tensors]]:
    """What a module in its mode answers, and its buffers afterwards, which are put back; faults on the way."""
    before, noted, answers = {k: v.clone() for k, v in module.named_buffers()}, _noted(module), list[Tensor]()
    weights = {k: v.detach().clone() for k, v in module.named_parameters()}
    for again in (0, 1):
        with drawing(seed if module.training else seed + 2 * again, x.device):
            answers.append(module(x.clone()))
        if not isinstance(answers[-1], Tensor) or answers[-1].dtype not in (torch.float32, torch.float64):
            yield f"answers a {getattr(answers[-1], 'dtype', type(answers[-1]).__name__)}; return logits, one tensor"
        if _noted(module) != noted:
            yield "counts or keeps something in plain attributes as it is called; make that a buffer, or drop it"
        if not all(torch.equal(v, weights[k]) for k, v in module.named_parameters()):
            yield "changes its parameters as it is called; leave that to training"
        after = {k: v.clone() for k, v in module.named_buffers()}
        for name, value in before.items():
            module.get_buffer(name).copy_(value)
    if not close(answers[0], answers[1], share=1e-5):
        how = "keep what changes in buffers" if module.training else "draw nothing in evaluation"
        yield f"answers the same points differently when asked twice; {how}"
    z, half = answers[0], len(x) // 2
    single = not module.training and half and z.shape[:1] == (len(x),)
    if single and not close(module(x[:half].clone()), z[:half]):
        yield "answers a point by which others are in its batch, in evaluation; let it answer each alone"
    return z, after


def _noted(module: nn.Module) -> list[tuple[str, str, str]]:
    """What a module holds besides tensors and parts, in words."""
    named = ((name, *item) for name, part in module.named_modules() for item in vars(part).items())
    own = ((name, key, value) for name, key, value in named if key not in vars(nn.Module()))
    return [(name, key, repr(value)) for name, key, value in own if not isinstance(value, (Tensor, nn.Module))]
