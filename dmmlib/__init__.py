"""Machine unlearning by datamodel matching, measured against retraining.

The names below are loaded when they are first used; all else is in the modules that they come from.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_data": "data:load",
    "Dataset": "data:Dataset",
    "Training": "ensemble:Training",
    "Ensemble": "ensemble:Ensemble",
    "train": "ensemble:train",
    "margins": "metrics:margins",
    "klom": "metrics:klom",
    "lds": "datamodels:lds",
    "Attributor": "datamodels:Attributor",
    "RidgeDatamodel": "datamodels:RidgeDatamodel",
    "BayesianDatamodel": "attributors.bayesian:BayesianDatamodel",
    "ForgetSet": "forget_sets:ForgetSet",
    "Problem": "unlearn.base:Problem",
    "register": "unlearn.base:register",
    "Study": "study:Study",
    "Recipe": "own.recipe:Recipe",
    "prepare": "own.prepare:prepare",
    "forget": "own.forget:forget",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"dmmlib has no {name!r}; its public names are {', '.join(__all__)}.")
    module, _, found = _HOMES[name].partition(":")
    globals()[name] = getattr(importlib.import_module(f"dmmlib.{module}"), found)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
