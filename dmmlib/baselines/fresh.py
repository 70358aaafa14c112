"""Untrained models of the originals' architecture."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from dmmlib import stacking
from dmmlib.ensemble import Ensemble, initialise
from dmmlib.errors import MethodError
from dmmlib.unlearn.base import Problem


def fresh(problem: Problem) -> Ensemble:
    """Draw as many untrained models as there are originals, each with a seed of its own.

    Raises MethodError if a part of the module has weights that it cannot draw anew (no `reset_parameters`).
    """

    def draw() -> nn.Module:
        module = stacking.template(problem.originals.module, "cpu")
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            known = problem.originals.buffers.get(name)  # a constant, a statistic, or a frozen weight
            torch.nn.init.constant_(tensor, torch.nan) if known is None else tensor.detach().copy_(known[0])
        for part in module.modules():
            getattr(part, "reset_parameters", getattr(part, "_reset_parameters", lambda: None))()
        for name, parameter in module.named_parameters():
            if parameter.isnan().any():
                owner = name.rpartition(".")[0]
                raise MethodError(
                    f"Part {owner!r} of the model, a {type(module.get_submodule(owner)).__name__}, cannot be "
                    f"initialised anew; give it a method reset_parameters() that draws {name!r}."
                )
        return module

    seeds = [int(rng.integers(2**32)) for rng in problem.rngs(use=1)]
    return initialise(draw, seeds, problem.originals.device)
