"""Sizes of the exact-unlearning study; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from dmmlib.presets import Section, study


@study("exact")
class ExactSettings(Section):
    """Every number of notebook 06.

    Attributes:
        positive: classes labelled +1; the others are -1.
        n_runs: independent chains of the exactness tests, on each side.
        n_permutations: of the energy-distance test.
        small_n, small_side: points and pooled image side of the exactness tests.
        small_steps, small_batch, small_lr, small_noise: their chain.
        price_runs: chains a setting when the price is measured.
        price_noise, price_batch, price_n, price_steps: sweeps; the middle value stays where another varies.
        side: pooled image side of the comparison.
        n_models: N, models of each kind in the comparison.
        forget_size: |F| there, images alike.
        steps, batch, lr, radius: the SGD of every first-order learner there.
        noises: of the noisy chains, standard deviation a coordinate of the averaged gradient.
        shards: of SISA.
        newton_noises: of the certified Newton step, standard deviation of the objective's linear term.
        ridge: lambda there, a point.
        delta: of its (epsilon, delta) certificate.
        n_subsets, ridge_datamodel: subset models behind DMM's predictions, and their ridge penalty.
        dmm_epochs, dmm_batch, dmm_lr: SGD of DMM's models; as many sample gradients as the chains' by default.
        matching_lr, dmm_costs: of DMM's fine-tuning, and the shares of a retraining that it may spend.
        seed: of everything random.
    """

    positive: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_runs: int = 2000
    n_permutations: int = 499
    small_n: int = 5
    small_side: int = 2
    small_steps: int = 4
    small_batch: int = 8
    small_lr: float = 2.0
    small_noise: float = 0.3
    price_runs: int = 1000
    price_noise: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    price_batch: tuple[int, ...] = (1, 4, 16, 64)
    price_n: tuple[int, ...] = (125, 250, 500, 1000, 2000)
    price_steps: tuple[int, ...] = (25, 50, 100, 200, 400)
    side: int = 5
    n_models: int = 100
    forget_size: int = 20
    steps: int = 100
    batch: int = 100
    lr: float = 2.0
    radius: float = 10.0
    noises: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    shards: tuple[int, ...] = (2, 5, 10, 20)
    newton_noises: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    ridge: float = 1e-2
    delta: float = 1e-4
    n_subsets: int = 2000
    ridge_datamodel: float = 0.05
    dmm_epochs: int = 5
    dmm_batch: int = 20
    dmm_lr: float = 8.0
    matching_lr: float = 0.03
    dmm_costs: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    seed: int = 0
