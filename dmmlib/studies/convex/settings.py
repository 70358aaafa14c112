"""Sizes of the convex study."""

from __future__ import annotations

from dmmlib.presets import Section, study


@study("convex")
class ConvexSettings(Section):
    """Sizes of the convex study.

    Attributes:
        n, dim: training points and features of the synthetic problems.
        condition: condition number of the retain set's Hessian A_R where it is not varied.
        conditions: those of the cost figure.
        forget_size: |F| where it is not varied.
        group_sizes: |F| of the group-effect figure.
        noise: standard deviation of the synthetic labels' noise.
        log2_steps, image_log2_steps: iterations are followed for 2 ** log2_steps steps.
        n_chains: independent runs of each stochastic method.
        n_subset_models: models behind the regression datamodel.
        image_n, image_side: training images, and their side after average pooling.
        image_ridge: ridge of the models on images.
        seed: of everything random.
    """

    n: int = 500
    dim: int = 20
    condition: float = 1e4
    conditions: tuple[float, ...] = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
    forget_size: int = 12
    group_sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200)
    noise: float = 0.5
    log2_steps: int = 17
    image_log2_steps: int = 13
    n_chains: int = 64
    n_subset_models: int = 2000
    image_n: int = 1000
    image_side: int = 5
    image_ridge: float = 1.0
    seed: int = 0
