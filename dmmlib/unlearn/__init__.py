"""Unlearning methods: one signature, vectorised over all originals, one family a file.

A method is a function `(problem: Problem, **hyperparameters) -> Unlearned`, registered under a name with the
grid that its hyperparameters are searched on:

    @register("my_method", space={"lr": [1e-3, 1e-2]})
    def my_method(problem, *, lr=1e-3): ...
"""

from dmmlib.unlearn import gradient, matching, reference, scrub
from dmmlib.unlearn.base import (
    Method,
    Problem,
    Unlearned,
    configurations,
    finetune,
    get,
    names,
    register,
)

__all__ = [
    "Method",
    "Problem",
    "Unlearned",
    "configurations",
    "finetune",
    "get",
    "gradient",
    "matching",
    "names",
    "reference",
    "register",
    "scrub",
]
