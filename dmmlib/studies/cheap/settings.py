"""Sizes of the study of cheap attribution; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from dmmlib.presets import Section, study


@study("cheap")
class CheapSettings(Section):
    """Every number of notebook 07 that the study's own sections do not have.

    Attributes:
        sizes: subset models of Bayesian datamodels; the largest number of them is trained.
        n_draws: independent draws of subset models, of every size that fits in as many blocks, and of every design.
        n_kernel: linearised models, the first of a draw.
        n_ablation: the same in the ablation, and
        linearised: other numbers of them tried there.
        penalties, ranks: of linearised models, in the ablation.
        fractions: of S in a subset, in the ablation, besides the preset's.
        n_clusters: of training points whose effects are alike, for clustered subsets.
    """

    sizes: tuple[int, ...] = (25, 50, 100, 250, 1000)
    n_draws: int = 3
    n_kernel: int = 20
    n_ablation: int = 10
    linearised: tuple[int, ...] = (5, 20)
    penalties: tuple[float, ...] = (0.002, 0.02)
    ranks: tuple[int, ...] = (100,)
    fractions: tuple[float, ...] = (0.5, 0.9)
    n_clusters: int = 50
