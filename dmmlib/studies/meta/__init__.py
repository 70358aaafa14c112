"""Stability of meta-learning: uniform meta-stability measured against bounds derived for it, and forgetting a task.

`losses` with their worst case under an adversary, `tasks` where tasks come from, `learner` the algorithms, `bounds`
what is proven of them, `stability` what is measured, `forgetting` unlearning a task, `experiments` the tables of
notebook 10, `figures` its pictures.
"""

from dmmlib.studies.meta.bounds import KINDS, constants, stability_bounds
from dmmlib.studies.meta.learner import Learner, Meta, adapt, affine, learn
from dmmlib.studies.meta.losses import LOGISTIC, PHASE, SQUARED, Loss, attacked
from dmmlib.studies.meta.settings import MetaSettings
from dmmlib.studies.meta.stability import Sizes, gap, measure
from dmmlib.studies.meta.tasks import Environment, images, synthetic

__all__ = [
    "KINDS", "LOGISTIC", "PHASE", "SQUARED", "Environment", "Learner", "Loss", "Meta", "MetaSettings", "Sizes",
    "adapt", "affine", "attacked", "constants", "gap", "images", "learn", "measure", "stability_bounds", "synthetic",
]  # fmt: skip
