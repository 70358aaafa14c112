"""Untrained models of the originals' architecture."""

from __future__ import annotations

import copy

from torch import nn

from dmmlib.ensemble import Ensemble, initialise
from dmmlib.errors import MethodError
from dmmlib.unlearn.base import Problem


def fresh(problem: Problem) -> Ensemble:
    """Draw as many untrained models as there are originals, each with a seed of its own.

    Raises MethodError if a part of the module has weights that it cannot draw anew (no `reset_parameters`).
    """
    template = problem.originals.module

    def draw() -> nn.Module:
        module = copy.deepcopy(template).to_empty(device="cpu")
        for name, part in module.named_modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
            elif next(part.parameters(recurse=False), None) is not None:
                raise MethodError(
                    f"Part {name!r} of the model, a {type(part).__name__}, cannot be initialised anew; give it a "
                    "method reset_parameters()."
                )
        return module

    seeds = [int(rng.integers(2**32)) for rng in problem.rngs(use=1)]
    return initialise(draw, seeds, problem.originals.device)
