"""Unlearning methods: one signature, vectorised over all originals, one family per file.

A method is a function `(problem: Problem, **hyperparameters) -> Unlearned`, registered under a name with the
grid that its hyperparameters are searched on:

    @register("my_method", space={"lr": [1e-3, 1e-2]})
    def my_method(problem, *, lr=1e-3): ...
"""

from dmmlib.unlearn.base import (
    METHODS,
    Method,
    Phase,
    Problem,
    Registered,
    Unlearned,
    check_setting,
    configurations,
    descent,
    draw_batches,
    finetune,
    get,
    names,
    passes,
    register,
)
