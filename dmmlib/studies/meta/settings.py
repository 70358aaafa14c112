"""Sizes of the meta-learning study; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from dmmlib.presets import Section, study


@study("meta")
class MetaSettings(Section):
    """Every number of notebook 10.

    Attributes:
        dim: features of the synthetic tasks.
        spread: standard deviation of a task's parameters around the centre of all tasks.
        m, n: tasks, and examples a task, where they do not vary.
        lam, step, steps: regularisation lambda, meta-level step gamma and steps T, where they do not vary.
        inner_step, inner_steps: of task-level gradient descent.
        ms, ns, lams, gammas, ts, etas, ks: what is swept: m, n, lambda, gamma, T, inner step and inner steps.
        repeats: independent meta-samples of a stability measurement; intervals are over these.
        probes: replacements a meta-sample; the worst of them counts.
        queries: points that the loss is compared on, a probe.
        seeds: runs that a stochastic learner's loss is averaged over.
        gap_repeats, gap_tasks: meta-samples, and fresh tasks each, of transfer risk minus empirical risk.
        epsilons: of the adversary; the data have norm 1.
        weak_lams: lambda of the weakly convex problem, whose modulus is 2.
        broken_etas, broken_labels, broken_ns: sweeps in which an assumption is broken.
        side: pooled image side.
        tasks: m of the forgetting study, class pairs of images; the other pairs are validation tasks.
        shots: examples a task there, and of the fresh support set that models adapt to when asked.
        n_models: N, meta-learners of each kind there.
        init: standard deviation of an initialisation's coordinates there.
        forget_step, forget_steps, tasks_per_step: of its stochastic meta-learner.
        forget_lam: lambda where methods are compared; `forget_lams` where it varies.
        n_forget, n_tuning: tasks that are forgotten, one at a time, for the report and for tuning.
        n_subsets, fraction, ridge: subset meta-learners behind the datamodel, share of tasks each has, and penalty.
        cost: share of a retraining that a method may spend.
        matching_lrs: of OM and DMM; chosen on the tuning tasks.
        seed: of everything random.
    """

    dim: int = 5
    spread: float = 0.5
    m: int = 16
    n: int = 16
    lam: float = 1.0
    step: float = 0.2
    steps: int = 10
    inner_step: float = 0.5
    inner_steps: int = 5
    ms: tuple[int, ...] = (4, 8, 16, 32, 64)
    ns: tuple[int, ...] = (4, 8, 16, 32, 64)
    lams: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    gammas: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    ts: tuple[int, ...] = (2, 5, 10, 20, 50)
    etas: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    ks: tuple[int, ...] = (1, 2, 5, 10, 20)
    repeats: int = 8
    probes: int = 16
    queries: int = 64
    seeds: int = 16
    gap_repeats: int = 100
    gap_tasks: int = 50
    epsilons: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.8)
    weak_lams: tuple[float, ...] = (2.5, 4.0, 8.0, 16.0)
    broken_ns: tuple[int, ...] = (8, 32, 128)
    broken_labels: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 20.0)
    broken_etas: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 2.25, 2.5, 3.0)
    side: int = 5
    tasks: int = 18
    shots: int = 10
    n_models: int = 100
    init: float = 0.1
    forget_step: float = 0.3
    forget_steps: int = 100
    tasks_per_step: int = 4
    forget_lam: float = 0.3
    forget_lams: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    n_forget: int = 8
    n_tuning: int = 2
    n_subsets: int = 1000
    fraction: float = 0.9
    ridge: float = 0.01
    cost: float = 0.2
    matching_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    seed: int = 0
