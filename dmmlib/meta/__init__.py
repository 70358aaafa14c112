"""Stability of meta-learning: uniform meta-stability measured against bounds derived for it, and forgetting a task.

`losses` with their worst case under an adversary, `tasks` where tasks come from, `learner` the algorithms, `bounds`
what is proven of them, `stability` what is measured, `forgetting` unlearning a task, `experiments` the tables of
notebook 10, `figures` its pictures.
"""

from dmmlib.meta.bounds import KINDS, constants, stability_bounds
from dmmlib.meta.learner import Learner, Meta, adapt, affine, learn
from dmmlib.meta.losses import LOGISTIC, PHASE, SQUARED, Loss, attacked
from dmmlib.meta.settings import MetaSettings
from dmmlib.meta.stability import Sizes, gap, measure
from dmmlib.meta.tasks import Environment, images, synthetic

__all__ = [
    "KINDS", "LOGISTIC", "PHASE", "SQUARED", "Environment", "Learner", "Loss", "Meta", "MetaSettings", "Sizes",
    "adapt", "affine", "attacked", "constants", "gap", "images", "learn", "measure", "stability_bounds", "synthetic",
]  # fmt: skip
