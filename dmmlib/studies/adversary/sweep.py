"""What the attack depends on: one quantity at a time, several targets one after another, and what limits it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dmmlib.studies.adversary.crafting import Poison, delete_groups, most_harmful, wanted
from dmmlib.studies.adversary.experiments import Prepared, ddpa, on_a_line
from dmmlib.studies.adversary.subspace import Metric, Subspace
from dmmlib.studies.adversary.world import Site, World, retrain, together


@dataclass(frozen=True)
class Case:
    """One way of attacking: a value of what varies, training sets, and a request for each target of each of them."""

    attack: str  # these three are its names in the table
    varies: str
    value: float
    poisons: list[Poison]  # of each training set
    requests: list[list[np.ndarray]]  # of each training set
    targets: list[np.ndarray]  # positions in V that they are for
    sites: Sequence[Site] = ()  # the training sets, where there are models of them already


def outcomes(world: World, cases: Sequence[Case]) -> list[pd.DataFrame]:
    """Record, for each case, what one retrained model answers at each target; trains originals where there are none.

    All cases' models are trained together, which is what makes a step of many small models cheap.
    """
    tables: dict[int, pd.DataFrame] = {}
    for n_models in (0, world.s.n_models):
        part = {i: case for i, case in enumerate(cases) if bool(case.sites) == (n_models == 0)}
        pairs = [z for c in part.values() for z in [s.poison for s in c.sites] or [p.points for p in c.poisons]]
        done = iter(together(world, pairs, n_models, [r for c in part.values() for r in c.requests], 1, seed=50_000))
        for i, case in part.items():
            made, retrained = zip(*(next(done) for _ in case.targets), strict=True)
            tables[i] = _outcomes(case.sites or made, case.targets, retrained).assign(
                attack=case.attack,
                varies=case.varies,
                value=case.value,
                size=len(case.requests[0][0]),
                balance=np.mean([p.balance for p in case.poisons]) if case.poisons else 0.0,
            )
    return [tables[i] for i in range(len(cases))]


def _outcomes(sites: Sequence[Site], targets: Iterable[np.ndarray], retrained: Iterable[np.ndarray]) -> pd.DataFrame:
    tables = [site.outcomes(t, z) for site, t, z in zip(sites, targets, retrained, strict=True)]
    return pd.concat(tables).assign(**{"accuracy before": np.mean([site.accuracy for site in sites])})


def sweep(world: World, prepared: Prepared) -> pd.DataFrame:
    """Retrain after requests while one thing varies: outcomes for each attack, quantity, value and target.

    - "share", "bound", "k": DDPA with other poison;
    - "points deleted": fewer of them, also of the attacks that need no flexibility;
    - "class known": poison that pulls along the one direction in which the images of the target's class agree most;
    - "plan": the points that models trained *with* the poison name as most harmful, instead of a convex combination.
    """
    s = world.s
    cases = [case for name in ("ddpa_clean", "ddpa_dirty") for case in _of_ddpa(world, prepared, name)]
    parts = outcomes(world, [*cases, *_of_fixed_targets(world, prepared)])
    usual = {"share": s.share, "bound": float(s.epsilon), "k": float(s.k), "points deleted": float(s.half)}
    for name in ("ddpa_clean", "ddpa_dirty", "camouflage", "honest_gradient"):
        asked = prepared.asked[name]
        found = _outcomes(asked.sites, *(np.split(z, len(asked.sites)) for z in (world.targets, asked.retrained)))
        for varies, value in usual.items():
            if name.startswith("ddpa") or varies == "points deleted":
                parts.append(found.assign(attack=name, varies=varies, value=value, size=s.half))
    return pd.concat(parts, ignore_index=True).sort_values(["attack", "varies", "value"], kind="stable")


def _of_ddpa(world: World, prepared: Prepared, name: str) -> list[Case]:
    s, targets, crafted, site = world.s, world.targets, prepared.crafted[name], prepared.places[name]
    cases: list[Case] = []

    def craft(varies: str, value: float, space: Subspace, **changes: Any) -> None:
        poison = world.craft(space, crafted.dirty, crafted.angle, **changes)
        cases.append(Case(name, varies, value, [poison], [ddpa(world, poison, space, targets)], [targets]))

    def ask(varies: str, value: float, requests: list[np.ndarray]) -> None:
        cases.append(Case(name, varies, value, [crafted.poison], [requests], [targets], [site]))

    for share in s.shares:
        if round(share * s.n) > s.k:
            craft("share", share, crafted.subspace, share=share)
    for epsilon in s.epsilons:
        craft("bound", epsilon, crafted.subspace, epsilon=epsilon)
    for k in s.ks:
        craft("k", k, world.subspace(k, crafted.damping))
    for size in s.sizes:
        ask("points deleted", size, ddpa(world, crafted.poison, crafted.subspace, targets, size))
    influence = Metric.at(site.originals, site.x[: s.n], site.y[: s.n], s.damping).influence(*world.of_targets(targets))
    ask("plan", 1, [most_harmful(row, s.half, site.own) for row in influence])
    return [*cases, _class_known(world, name, crafted.dirty)]


def _class_known(world: World, name: str, dirty: bool) -> Case:
    (x, y), labels = world.candidates(), world.data.y_val[world.targets]
    classes = np.intersect1d(labels, y)
    targets = [world.targets[labels == label] for label in classes]
    made = [on_a_line(world, x[y == c], y[y == c], dirty, its) for c, its in zip(classes, targets, strict=True)]
    poisons, requests = map(list, zip(*made, strict=True))
    return Case(name, "class known", 1, poisons, requests, targets)


def _of_fixed_targets(world: World, prepared: Prepared) -> list[Case]:
    """Camouflage and honest points chosen by gradients, with fewer points deleted: those that count most."""
    targets, camouflage, name = world.targets, prepared.asked["camouflage"], "points deleted"
    influence = world.known.influence(*world.of_targets(targets))
    cases = []
    for size in world.s.sizes:
        fewer = []
        for poison, forget in zip(prepared.hidden, camouflage.requests, strict=True):
            pull = np.zeros(world.s.n)
            pull[-len(poison) :] = np.abs(poison.coordinates[:, 0])
            fewer.append([most_harmful(-pull, size, forget)])
        each = [np.array([t]) for t in targets]
        cases.append(Case("camouflage", name, size, prepared.hidden, fewer, each, camouflage.sites))
        chosen = [most_harmful(row, size, np.arange(world.s.n)) for row in influence]
        cases.append(Case("honest_gradient", name, size, [], [chosen], [targets], [prepared.places["honest"]]))
    return cases


def sequence(world: World, prepared: Prepared) -> pd.DataFrame:
    """Ask for several targets one after another from the same dirty-label poison: outcomes at each place and target.

    Each asks for an equal part of the poison, from what earlier ones left. After each request a retrained model is
    looked at, at the target asked for "last" and at the "first" one.
    """
    s, crafted, site = world.s, prepared.crafted["ddpa_dirty"], prepared.places["ddpa_dirty"]
    poison = crafted.poison
    coordinates = crafted.subspace.of_margins(*world.of_targets(world.targets))
    groups = np.arange(len(world.targets) // s.sequence * s.sequence).reshape(-1, s.sequence)
    size = max(1, len(poison) // (2 * s.sequence))
    requests = []
    for group in groups:
        left = np.ones(len(poison), bool)
        for t in group:
            left[delete_groups(poison, coordinates[t], size, left)] = False
            requests.append(site.own[~left])
    after = retrain(world, site, requests, 1, seed=60_000)
    looked = {"last": groups.ravel(), "first": np.repeat(groups[:, 0], s.sequence)}
    place, deleted = np.tile(np.arange(s.sequence) + 1, len(groups)), [len(r) for r in requests]
    parts = [
        site.outcomes(world.targets[at], after).assign(**{"looked at": name}, place=place, deleted=deleted)
        for name, at in looked.items()
    ]
    return pd.concat(parts, ignore_index=True)


def limits(world: World, prepared: Prepared, measured: pd.Series) -> pd.DataFrame:
    """Say what is left of a request's pull along its target, factor by factor, relative to camouflage.

    "pulls along the target": length, in pulls of one perfect point, of what a request of the convex combination leaves,
    sum over deleted points of -v_i . d; with the target known it is the number of points. Times the alignment of the
    real points, times the root of the share of a target's squared gradient that the subspace holds: `expected` is what
    camouflage's change of margin would be worth at that.

    `measured` is the change of margin by retraining, indexed by attack.
    """
    x, y = world.of_targets(world.targets)
    factors = {"camouflage": (prepared.hidden, float(world.s.half), 1.0)}
    for name in ("ddpa_clean", "ddpa_dirty"):
        crafted, site = prepared.crafted[name], prepared.places[name]
        poison, coordinates = crafted.poison, crafted.subspace.of_margins(x, y)
        vertices = poison.vertices[poison.group]
        pulls = [
            -vertices[forget - site.own[0]].sum(0) @ wanted(target)
            for forget, target in zip(prepared.asked[name].requests, coordinates, strict=True)
        ]
        held = (coordinates**2).sum(1) / world.known.damped(crafted.damping).energy(x, y)
        factors[name] = [poison], float(np.mean(pulls)), float(held.mean())
    table = pd.DataFrame(
        {
            "attack": name,
            "pulls along the target": pulls,
            "alignment": np.mean([p.alignment for p in poisons]),
            "gradient held": held,
            "balance": np.mean([p.balance for p in poisons]),
        }
        for name, (poisons, pulls, held) in factors.items()
    )
    product = table["pulls along the target"] * table["alignment"] * table["gradient held"] ** 0.5
    table = table.assign(product=product, measured=measured[table["attack"]].to_numpy(float))
    return table.assign(expected=product / product[0] * table["measured"][0])


def costs(world: World) -> pd.DataFrame:
    """Count what an attack takes, in sample gradients relative to training one model, once and for each target.

    Knowing: K models trained, and their gradients. Crafting: a step takes a forward-mode pass and its reverse for each
    point, model and direction. Asking: a gradient at the target, or, where the target has to be known, crafting anew.
    """
    s = world.s
    one = s.n * s.epochs
    knowing, gradient = s.n_known * (one + s.n) / one, s.n_known / one

    def crafting(k: int) -> float:
        labels, points = len(world.pool[0]) * k, max(s.k + 1, round(s.share * s.n))
        return s.n_known * (s.n_candidates + labels + s.craft_steps * points * (k + 1)) / one

    rows = [
        ("DDPA, white box or surrogate", knowing + crafting(s.k), gradient),
        ("camouflage", knowing, crafting(1) + gradient),
        ("honest points, gradients", knowing, gradient + s.n_known * s.n / one),
        ("honest points, datamodel", s.n_subsets * s.fraction, 0.0),
        ("random", 0.0, 0.0),
    ]
    return pd.DataFrame(rows, columns=["attack", "once", "a target"])
