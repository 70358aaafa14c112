"""Unlearning methods: one signature, vectorised over all originals, one family a file.

A method is a function `(problem: Problem, **hyperparameters) -> Unlearned`, registered under a name with the
grid that its hyperparameters are searched on:

    @register("my_method", space={"lr": [1e-3, 1e-2]})
    def my_method(problem, *, lr=1e-3): ...
"""

from dmmlib.unlearn import reference  # methods are listed in the order of their registration

# isort: split
from dmmlib.unlearn import bad_teacher, dampening, last_layers, newton, relabel, scrub, sparse
from dmmlib.unlearn.base import (
    Method,
    Phase,
    Problem,
    Unlearned,
    check_options,
    configurations,
    finetune,
    fresh,
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
    "bad_teacher",
    "check_options",
    "configurations",
    "dampening",
    "descent",
    "finetune",
    "fresh",
    "get",
    "last_layers",
    "match",
    "names",
    "newton",
    "passes",
    "predicted_oracle",
    "reference",
    "register",
    "registered",
    "relabel",
    "scrub",
    "sparse",
]
