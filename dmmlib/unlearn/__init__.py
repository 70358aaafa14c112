"""Unlearning methods: one signature, vectorised over all originals, one family a file.

A method is a function `(problem: Problem, **hyperparameters) -> Unlearned`, registered under a name with the
grid that its hyperparameters are searched on:

    @register("my_method", space={"lr": [1e-3, 1e-2]})
    def my_method(problem, *, lr=1e-3): ...
"""

from dmmlib.unlearn import reference, scrub
from dmmlib.unlearn.base import (
    Method,
    Phase,
    Problem,
    Unlearned,
    configurations,
    finetune,
    get,
    names,
    register,
    registered,
)
from dmmlib.unlearn.gradient import descent, passes
from dmmlib.unlearn.matching import match, predicted_oracle

__all__ = [
    "Method",
    "Phase",
    "Problem",
    "Unlearned",
    "configurations",
    "descent",
    "finetune",
    "get",
    "match",
    "names",
    "passes",
    "predicted_oracle",
    "reference",
    "register",
    "registered",
    "scrub",
]
