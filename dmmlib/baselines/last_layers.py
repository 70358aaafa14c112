"""Fine-tuning the last k layers: from where they are (CF-k), or drawn anew (EU-k).

Goel et al., "Towards Adversarial Evaluation of Inexact Unlearning", 2022.
"""

from __future__ import annotations

import dataclasses

import torch
from pydantic import PositiveInt
from torch import Tensor

from dmmlib import stacking
from dmmlib.baselines.fresh import fresh
from dmmlib.ensemble import Ensemble
from dmmlib.errors import OptionError
from dmmlib.optim import SGD
from dmmlib.unlearn.base import Amount, Phase, Positive, Problem, Unlearned, descent, finetune, passes, register

PAPER = "Goel et al., arXiv 2201.06640"
ELSEWHERE = "shash42/Evaluating-Inexact-Unlearning, meghdadk/SCRUB, xcadet/deepunlearn"


def last_layers(models: Ensemble, k: int, x: Tensor) -> set[str]:
    """Names of the parameters of the last k layers that a forward pass of points x begins.

    A layer is a module with a weight matrix or kernel. Modules with vectors only (batch norm) do not count and go with
    the layer that they follow, as in the authors' code. Raises OptionError unless there are k.
    """
    module, begun = stacking.copied(models.module).eval(), list[str]()
    for name, part in module.named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: begun.append(name))
    with torch.no_grad():
        stacking.one(module, *models.state_of(0), x[:1].clone())
    when = {name: i for i, name in enumerate(begun)}

    def begins(parameter: str) -> int:
        """When its module does, or the next around it that is called at all."""
        owner = parameter.rpartition(".")[0]
        return when[owner] if owner in when else begins(owner)

    owners = {name: name.rpartition(".")[0] for name in sorted(models.params, key=begins)}
    layers = list(dict.fromkeys(owner for name, owner in owners.items() if models.params[name].ndim > 2))
    if not isinstance(k, int) or not 1 <= k <= len(layers):
        raise OptionError(f"Option k={k!r} was given, but the model has {len(layers)} layers; use 1 to {len(layers)}.")
    first = list(owners.values()).index(layers[-k])
    return set(list(owners)[first:])


@register(
    "cf_k",
    space={"epochs": [4.0], "lr": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1], "k": [1]},
    paper=f"CF-k; {PAPER}",
    cost="epochs n_R",
    elsewhere=ELSEWHERE,
)
def cf_k(
    problem: Problem, *, k: PositiveInt = 1, epochs: Amount = 3.0, lr: Positive = 3e-2, batch_size: PositiveInt = 64
) -> Unlearned:
    """Catastrophic forgetting of the last k layers: descend on R with the layers before them frozen.

    SGD with momentum 0.9, a rate that falls linearly to 0. Frozen are weights; running statistics of batch norm move,
    as in the authors' code. A sample gradient counts as one although it stops at layer k.
    """
    only = last_layers(problem.originals, k, problem.x)
    phase = Phase(passes(problem, problem.retain, epochs, batch_size), descent(problem))
    return finetune(problem, [phase], SGD(lr), rate=lambda share: lr * (1 - share), only=only)


@register(
    "eu_k",
    space={"epochs": [5.0], "lr": [3e-2, 1e-1, 2e-1, 4e-1, 8e-1], "k": [1]},
    paper=f"EU-k; {PAPER}",
    cost="epochs n_R",
    elsewhere=ELSEWHERE,
)
def eu_k(
    problem: Problem, *, k: PositiveInt = 1, epochs: Amount = 6.0, lr: Positive = 1e-1, batch_size: PositiveInt = 64
) -> Unlearned:
    """Exact unlearning of the last k layers: as `cf_k`, from newly drawn weights of those layers."""
    originals, drawn = problem.originals, fresh(problem).params
    params = originals.params | {name: drawn[name] for name in last_layers(originals, k, problem.x)}
    restarted = dataclasses.replace(problem, originals=Ensemble(originals.module, params, originals.buffers))
    return cf_k(restarted, k=k, epochs=epochs, lr=lr, batch_size=batch_size)
