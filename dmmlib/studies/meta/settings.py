"""Sizes of the meta-learning study; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dmmlib.presets import Fraction, Section, Several, Side, Some, study

T = TypeVar("T")
Sweep = Annotated[tuple[T, ...], Field(min_length=2)]  # a slope is fitted over it


@study("meta")
class MetaSettings(Section):
    """Every number of notebook 10."""

    # Synthetic tasks
    dim: PositiveInt = 5  # features
    spread: NonNegativeFloat = 0.5  # standard deviation of a task's parameters around the centre of all tasks
    # The learner, where nothing varies
    m: Several = 16  # tasks
    n: Several = 16  # examples of each task
    lam: PositiveFloat = 1.0  # regularisation lambda
    step: PositiveFloat = 0.2  # meta-level step gamma
    steps: PositiveInt = 10  # meta-level steps T
    inner_step: PositiveFloat = 0.5  # eta of task-level gradient descent
    inner_steps: PositiveInt = 5  # its steps K
    # What is swept, in the same order
    ms: Sweep[Several] = (4, 8, 16, 32, 64)
    ns: Sweep[Several] = (4, 8, 16, 32, 64)
    lams: Sweep[PositiveFloat] = (0.1, 0.3, 1.0, 3.0)
    gammas: Sweep[PositiveFloat] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    ts: Sweep[PositiveInt] = (2, 5, 10, 20, 50)
    etas: Sweep[PositiveFloat] = (0.02, 0.05, 0.1, 0.2, 0.5)
    ks: Sweep[PositiveInt] = (1, 2, 5, 10, 20)
    weak_lams: Sweep[Annotated[float, Field(gt=2)]] = (2.5, 4.0, 8.0, 16.0)  # of phase retrieval; its modulus is 2
    # How much is measured
    repeats: Several = 8  # independent meta-samples; intervals are over these
    probes: PositiveInt = 16  # replacements in each meta-sample; the worst of them counts
    queries: PositiveInt = 64  # points that the loss is compared on, for each probe
    seeds: PositiveInt = 16  # runs that a stochastic learner's loss is averaged over
    gap_repeats: Several = 100  # meta-samples of transfer risk minus empirical risk
    gap_tasks: PositiveInt = 50  # fresh tasks for each of them
    # Forgetting a task
    side: Side = 5  # pooled images are side x side
    tasks: Several = 18  # class pairs to train on; the other pairs are validation tasks
    shots: Annotated[int, Field(ge=2, multiple_of=2)] = 10  # examples of a task, and fresh ones that models adapt to
    n_models: Several = 100  # N, meta-learners of each kind
    init: PositiveFloat = 0.1  # standard deviation of an initialisation's coordinates
    forget_step: PositiveFloat = 0.3  # gamma
    forget_steps: PositiveInt = 100  # T
    tasks_per_step: PositiveInt = 4
    forget_lam: PositiveFloat = 0.3  # lambda where methods are compared
    forget_lams: Some[PositiveFloat] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # and where it varies
    n_forget: Several = 8  # tasks that are forgotten, one at a time, for the report
    n_subsets: Several = 1000  # subset meta-learners behind the datamodel
    fraction: Fraction = 0.9  # share of the tasks that each of them has
    ridge: PositiveFloat = 0.01  # penalty
    cost: Annotated[float, Field(gt=0, le=1)] = 0.2  # share of a retraining that a method may spend
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _fit(self) -> MetaSettings:
        """Refuse sizes that do not fit one another, and unstable steps."""
        if self.n_forget >= self.tasks:
            raise ValueError(f"n_forget={self.n_forget} must leave some of the {self.tasks} tasks to retain")
        if self.tasks_per_step > self.tasks:
            raise ValueError(f"tasks_per_step={self.tasks_per_step} exceeds the {self.tasks} tasks; lower it")
        forgetting = self.forget_step * max(self.forget_lam, *self.forget_lams)
        if max(self.step * max(self.lam, *self.lams), max(self.gammas) * self.lam, forgetting) > 1:
            raise ValueError("a meta-level step times lambda exceeds 1; lower step, gammas, forget_step or a lambda")
        return self
