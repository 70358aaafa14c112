"""What the attack depends on: one quantity at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from dmmlib.studies.adversary.crafting import Poison, most_harmful
from dmmlib.studies.adversary.experiments import Prepared, ddpa
from dmmlib.studies.adversary.subspace import Subspace
from dmmlib.studies.adversary.world import Site, World, together

ATTACKS = ("ddpa_clean", "ddpa_dirty", "camouflage", "honest_gradient")


def sweep(world: World, prepared: Prepared) -> pd.DataFrame:
    """Retrain after requests while one thing varies: outcomes for each attack, quantity, value and target.

    "share", "bound" and "k" vary DDPA's poison, "points deleted" the requests of all `ATTACKS`. One retrained model
    answers for each target, several where nothing is varied. All models are trained together, which is what makes a
    step of many small models cheap.
    """
    s, asked, tables = world.s, prepared.asked, list[pd.DataFrame]()

    def add(site: Site, retrained: np.ndarray, targets: np.ndarray, attack: str, varies: str, value: float) -> None:
        size = value if varies == "points deleted" else s.half
        told: dict[str, Any] = {"attack": attack, "varies": varies, "value": value, "size": size}
        tables.append(site.outcomes(targets, retrained).assign(**told))

    made = list(_poisons(world, prepared))
    requests = [requests for *_, requests in made]
    done = together(world, [p.points for *_, p, _ in made], s.n_models, requests, 1, seed=50_000)
    for (site, retrained), (attack, varies, value, *_) in zip(done, made, strict=True):
        add(site, retrained, world.targets, attack, varies, value)

    fewer = [(attack, size) for attack in ATTACKS for size in s.sizes]
    places = [(site, attack, size) for attack, size in fewer for site in asked[attack].sites]
    requests = [
        list(part)
        for attack, size in fewer
        for part in np.array_split(np.stack(_fewer(world, prepared, attack, size)), len(asked[attack].sites))
    ]
    targets = [t for attack, _ in fewer for t in np.array_split(world.targets, len(asked[attack].sites))]
    done = together(world, [site.poison for site, *_ in places], 0, requests, 1, seed=60_000)
    for (_, retrained), (site, attack, size), its in zip(done, places, targets, strict=True):
        add(site, retrained, its, attack, "points deleted", size)

    usual = {"share": s.share, "bound": float(s.epsilon), "k": float(s.k), "points deleted": float(s.half)}
    for attack in ATTACKS:
        sites = asked[attack].sites
        parts = (np.array_split(z, len(sites)) for z in (asked[attack].retrained, world.targets))
        for site, retrained, its in zip(sites, *parts, strict=True):
            for varies, value in usual.items():
                if attack.startswith("ddpa") or varies == "points deleted":
                    add(site, retrained, its, attack, varies, value)
    return pd.concat(tables, ignore_index=True).sort_values(["attack", "varies", "value"], kind="stable")


def _poisons(world: World, prepared: Prepared) -> Iterator[tuple[str, str, float, Poison, list[np.ndarray]]]:
    """DDPA with other poison: its name, what varies, the value, the poison, and requests for all targets."""
    s = world.s
    for attack in ATTACKS[:2]:
        crafted = prepared.crafted[attack]
        cases: list[tuple[str, float, Subspace, dict[str, Any]]] = [
            ("share", share, crafted.subspace, {"share": share}) for share in s.shares if share * s.n > s.k
        ]
        cases += [("bound", epsilon, crafted.subspace, {"epsilon": epsilon}) for epsilon in s.epsilons]
        cases += [("k", k, world.subspace(k, crafted.damping), {}) for k in s.ks]
        for varies, value, space, changes in cases:
            poison = world.craft(space, crafted.dirty, crafted.angle, **changes)
            yield attack, varies, value, poison, ddpa(world, poison, space, world.targets)


def _fewer(world: World, prepared: Prepared, attack: str, size: int) -> list[np.ndarray]:
    """An attack's request for each target with fewer points: those that count most."""
    if attack in prepared.crafted:
        crafted = prepared.crafted[attack]
        return ddpa(world, crafted.poison, crafted.subspace, world.targets, size)
    if attack == "honest_gradient":
        influence = world.known.influence(*world.of_targets(world.targets))
        return [most_harmful(row, size, np.arange(world.s.n)) for row in influence]
    requests = []
    for poison, forget in zip(prepared.hidden, prepared.asked[attack].requests, strict=True):
        pull = np.zeros(world.s.n)
        pull[-len(poison) :] = np.abs(poison.coordinates[:, 0])
        requests.append(most_harmful(-pull, size, forget))
    return requests
