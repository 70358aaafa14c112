"""Sizes of the study of malicious deletion requests; cheap to import, so that a preset can embed them."""

from __future__ import annotations

from dmmlib.presets import Section, study


@study("adversary")
class AdversarySettings(Section):
    """Every number of notebook 08.

    Attributes:
        n: training points of a service, the attacker's among them; the rest of the preset's are the attacker's pool.
        share: of the training points, the attacker's.
        hidden, epochs, batch, lr: of the service's models.
        n_targets, n_tuning: targets that results are reported on, and others that settings are chosen on.
        n_models: originals, and retrained models a request of the main table; one is retrained a request elsewhere.
        n_known: K, models that gradients are matched at.
        n_candidates: candidate targets that span the subspace.
        k: its dimension.
        damping: lambda of the metric, relative to the mean squared length of gradients, where it is not chosen.
        dampings, angles: of DDPA's metric and crafting; chosen on the tuning targets.
        epsilon: bound on the change of a pixel, of 255.
        craft_steps: of signed descent on pixels.
        radii, tolerance, n_polyhedra: of the stable region; radii are in multiples of the attack's reach.
        volume_ks, volume_samples: dimensions at which the simplex's share of the ball is sampled, and points.
        shares, epsilons, ks, sizes: swept beside the values above, one at a time; sizes are points deleted, fewer than
            half of the attacker's.
        n_subsets, fraction: subset models behind the service's datamodel, and the share of S that each is trained on.
        camouflage_subsets: subset models behind the gradient kernel of each camouflaged training set.
        n_klom: originals, retrained models, and others for the floor, where KLoM is measured.
        n_requests: of each attack there, each retrained for twice `n_klom` times; and honest ones on which the settings
            of methods are chosen.
        sequence: targets asked for one after another from the same poison.
        n_honest: honest requests of each kind that the defence is compared with.
        convex_side, convex_steps, convex_batch, convex_lr, convex_noise, convex_radius: of the noisy SGD that is
            unlearned exactly.
        convex_n_klom: `n_klom` there, where a chain costs little.
        positive: classes labelled +1 there.
        convex_k: dimension of its subspace.
        seed: of everything random.
    """

    n: int = 1000
    share: float = 0.05
    hidden: int = 32
    epochs: int = 10
    batch: int = 50
    lr: float = 0.2
    n_targets: int = 50
    n_tuning: int = 40
    n_models: int = 5
    n_known: int = 4
    n_candidates: int = 300
    k: int = 9
    damping: float = 0.3
    dampings: tuple[float, ...] = (0.3, 30.0)
    epsilon: int = 32
    angles: tuple[float, ...] = (0.0, 3.0)
    craft_steps: int = 10
    radii: tuple[float, ...] = (1.0, 64.0, 4096.0, 262144.0)
    tolerance: float = 0.05
    n_polyhedra: int = 40
    volume_ks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    volume_samples: int = 200_000
    shares: tuple[float, ...] = (0.02, 0.2)
    epsilons: tuple[int, ...] = (0, 96)
    ks: tuple[int, ...] = (3, 18)
    sizes: tuple[int, ...] = (6, 12)
    n_subsets: int = 100
    fraction: float = 0.75
    camouflage_subsets: int = 10
    n_klom: int = 20
    n_requests: int = 5
    sequence: int = 3
    n_honest: int = 100
    convex_side: int = 5
    convex_steps: int = 100
    convex_batch: int = 100
    convex_lr: float = 2.0
    convex_noise: float = 0.05
    convex_radius: float = 10.0
    convex_n_klom: int = 100
    positive: tuple[int, ...] = (0, 1, 2, 3, 4)
    convex_k: int = 9
    seed: int = 0
