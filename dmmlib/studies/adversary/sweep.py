"""What the attack depends on: one quantity at a time, several targets one after another, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from dmmlib.studies.adversary import attacks
from dmmlib.studies.adversary.crafting import Poison
from dmmlib.studies.adversary.experiments import Prepared, ddpa, energies
from dmmlib.studies.adversary.simplex import regular
from dmmlib.studies.adversary.subspace import Metric, Subspace
from dmmlib.studies.adversary.world import Site, World, retrain, together


@dataclass(frozen=True)
class Case:
    """One way of attacking: a value of what varies, the training sets, and a request for each target of each of them.

    Attributes:
        attack, varies, value: its names in the table.
        poisons: of each training set.
        requests: of each training set.
        targets: positions in V that they are for.
        sites: the training sets, where there are models of them already.
    """

    attack: str
    varies: str
    value: float
    poisons: Sequence[Poison]
    requests: Sequence[Sequence[np.ndarray]]
    targets: Sequence[np.ndarray]
    sites: Sequence[Site] = ()

    @property
    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Images and labels of each training set's poison."""
        return [site.poison for site in self.sites] or [(p.images, p.labels) for p in self.poisons]


def outcomes(world: World, cases: Sequence[Case]) -> list[pd.DataFrame]:
    """A table a case: a row a target, with one retrained model; originals are trained where there are none.

    All cases' models are trained together, which is what makes a step of many small models cheap.
    """
    tables: dict[int, pd.DataFrame] = {}
    for n_models in (0, world.s.n_models):
        part = [case for case in cases if bool(case.sites) == (n_models == 0)]
        pairs = [pair for case in part for pair in case.pairs]
        done = iter(together(world, pairs, n_models, [r for case in part for r in case.requests], 1, seed=50_000))
        for case in part:
            trained = [next(done) for _ in case.pairs]
            made = case.sites or [site for site, _ in trained]
            found = [s.outcomes(t, z) for s, t, (_, z) in zip(made, case.targets, trained, strict=True)]
            names: dict[str, Any] = {"attack": case.attack, "varies": case.varies, "value": case.value}
            names |= {"size": len(case.requests[0][0])}
            names |= {"balance": float(np.mean([p.balance for p in case.poisons])) if case.poisons else 0.0}
            right = [site.logits[:, world.s.n :].argmax(2) == world.data.y_val for site in made]
            tables[id(case)] = pd.concat(found).assign(**names | {"accuracy before": float(np.mean(right))})
    return [tables[id(case)] for case in cases]


def sweep(world: World, prepared: Prepared) -> pd.DataFrame:
    """Outcomes of retraining after requests while one thing varies: a row an attack, quantity, value, target and model.

    - "share", "bound", "k": DDPA with other poison;
    - "points deleted": fewer of them, also of the attacks that need no flexibility;
    - "class known": poison that pulls along the one direction in which the images of the target's class agree most;
    - "plan": the points that models trained *with* the poison name as most harmful, instead of a convex combination.
    """
    s = world.s
    cases = [case for name in ("ddpa_clean", "ddpa_dirty") for case in _of_ddpa(world, prepared, name)]
    parts = outcomes(world, [*cases, *_of_fixed_targets(world, prepared)])
    usual = {"share": s.share, "bound": float(s.epsilon), "k": float(s.k), "points deleted": float(world.half)}
    for name in ("ddpa_clean", "ddpa_dirty", "camouflage", "honest_gradient"):
        asked = prepared.asked[name]
        every = enumerate(world.targets)
        found = pd.concat([asked.site(t).outcomes(world.targets[[t]], asked.retrained[t][None]) for t, _ in every])
        right = [site.logits[:, s.n :].argmax(2) == world.data.y_val for site in asked.sites]
        found = found.assign(**{"accuracy before": float(np.mean(right))})
        for varies, value in usual.items():
            if name.startswith("ddpa") or varies == "points deleted":
                parts.append(found.assign(attack=name, varies=varies, value=value, size=world.half))
    return pd.concat(parts, ignore_index=True).sort_values(["attack", "varies", "value"], kind="stable")


def _of_ddpa(world: World, prepared: Prepared, name: str) -> list[Case]:
    s, targets, crafted = world.s, world.targets, prepared.crafted[name]
    site = prepared.places[name]
    cases: list[Case] = []

    def craft(varies: str, value: float, space: Subspace, **changes: float) -> None:
        poison = world.craft(space, dirty=crafted.dirty, angle=crafted.angle, **changes)
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
    metric = Metric.at(site.originals, site.x[: s.n], site.y[: s.n], s.damping)
    influence = metric.influence(*world.of_targets(targets))
    ask("plan", 1, [attacks.most_harmful(row, world.half, site.own) for row in influence])
    return [*cases, _class_known(world, name, crafted.dirty)]


def _class_known(world: World, name: str, dirty: bool) -> Case:
    x, y = world.pool_x[: world.s.n_candidates], world.pool_y[: world.s.n_candidates]
    poisons, requests, targets = [], [], []
    for label in np.unique(world.data.y_val[world.targets]):
        its, known = world.targets[world.data.y_val[world.targets] == label], y == label
        if not known.any():
            continue
        line = Subspace.of(world.known, world.victim.points(x[known]), torch.from_numpy(y[known]), 1)
        poison = world.craft(line, dirty=dirty, angle=0.0)
        poisons.append(poison)
        requests.append(ddpa(world, poison, line, its))
        targets.append(its)
    return Case(name, "class known", 1, poisons, requests, targets)


def _of_fixed_targets(world: World, prepared: Prepared) -> list[Case]:
    """Camouflage and honest points chosen by gradients, with fewer points deleted: those that count most."""
    targets, camouflage = world.targets, prepared.asked["camouflage"]
    honest, each = prepared.places["honest"], [targets[[t]] for t in range(len(targets))]
    influence = world.known.influence(*world.of_targets(targets))
    cases = []
    for size in world.s.sizes:
        fewer = []
        for poison, forget in zip(prepared.hidden, camouflage.requests, strict=True):
            pull = np.abs(poison.coordinates[forget - world.s.n + len(poison), 0])
            fewer.append([np.sort(forget[np.argsort(-pull, kind="stable")[:size]])])
        cases.append(Case("camouflage", "points deleted", size, prepared.hidden, fewer, each, camouflage.sites))
        chosen = [attacks.most_harmful(row, size, np.arange(world.s.n)) for row in influence]
        cases.append(Case("honest_gradient", "points deleted", size, [], [chosen], [targets], [honest]))
    return cases


def sequence(world: World, prepared: Prepared) -> pd.DataFrame:
    """Several targets one after another from the same dirty-label poison: a row a place in the sequence and target.

    Each asks for an equal part of the poison, from what earlier ones left. After each request a retrained model is
    looked at, at the target asked for "last" and at the "first" one.
    """
    s = world.s
    crafted, site = prepared.crafted["ddpa_dirty"], prepared.places["ddpa_dirty"]
    poison = crafted.poison
    coordinates = crafted.subspace.of_margins(*world.of_targets(world.targets))
    groups = np.arange(len(world.targets) // s.sequence * s.sequence).reshape(-1, s.sequence)
    size = max(1, len(poison) // (2 * s.sequence))
    requests = []
    for group in groups:
        left = np.ones(len(poison), bool)
        for t in group:
            left[attacks.delete_groups(poison, coordinates[t], size, left)] = False
            requests.append(site.own[~left])
    after = retrain(world, site, requests, 1, seed=60_000)
    looked = {"last": groups.ravel(), "first": np.repeat(groups[:, 0], s.sequence)}
    place = np.tile(np.arange(s.sequence) + 1, len(groups))
    deleted = [len(r) for r in requests]
    parts = [
        site.outcomes(world.targets[at], after).assign(**{"looked at": name}, place=place, deleted=deleted)
        for name, at in looked.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(change=table["margin"] - table["margin before"])


def limits(world: World, prepared: Prepared, measured: pd.Series) -> pd.DataFrame:
    """What is left of a request's pull along its target, factor by factor, relative to camouflage: a row an attack.

    "pulls along the target": length, in pulls of one perfect point, of what a request of the convex combination leaves,
    sum over deleted points of -v_i . d; with the target known it is the number of points. Times the alignment of the
    real points, times the root of the share of a target's squared gradient that the subspace holds: `expected` is what
    camouflage's change of margin would be worth at that.

    Args:
        world, prepared: the study's.
        measured: change of margin by retraining, indexed by attack.
    """
    x, y = world.of_targets(world.targets)
    rows = []
    for name in ("camouflage", "ddpa_clean", "ddpa_dirty"):
        if name == "camouflage":
            poisons, held = prepared.hidden, 1.0
            pulls = float(world.half)
        else:
            crafted = prepared.crafted[name]
            poisons, k = [crafted.poison], crafted.subspace.k
            coordinates = crafted.subspace.of_margins(x, y)
            held = float(((coordinates**2).sum(1) / energies(world, crafted.damping, x, y)).mean())
            first, unit = world.s.n - len(crafted.poison), regular(k)
            gone = [unit[crafted.poison.group[r - first]].sum(0) for r in prepared.asked[name].requests]
            wanted = [attacks.wanted(c) for c in coordinates]
            pulls = float(np.mean([-(g @ d) for g, d in zip(gone, wanted, strict=True)]))
        alignment = float(np.mean([p.alignment for p in poisons]))
        row = {"attack": name, "pulls along the target": pulls, "alignment": alignment, "gradient held": held}
        row |= {"balance": float(np.mean([p.balance for p in poisons])), "product": pulls * alignment * held**0.5}
        rows.append(row | {"measured": float(measured[name])})
    table = pd.DataFrame(rows)
    return table.assign(expected=table["product"] / table["product"].iloc[0] * table["measured"].iloc[0])


def costs(world: World) -> pd.DataFrame:
    """What an attack takes, in sample gradients relative to training one model, once and a target.

    Knowing: K models trained, and their gradients. Crafting: a step takes a forward-mode pass and its reverse a point,
    model and direction. Asking: a gradient at the target, or, where the target has to be known, crafting anew.
    """
    s = world.s
    one = s.n * s.epochs
    p = max(s.k + 1, round(s.share * s.n))
    knowing = s.n_known * (one + s.n) / one

    def crafting(k: int) -> float:
        labels = len(world.pool_x) * s.n_known * k
        return (s.n_known * s.n_candidates + labels + s.craft_steps * p * s.n_known * (k + 1)) / one

    gradient = s.n_known / one
    return pd.DataFrame(
        [
            {"attack": "DDPA, white box or surrogate", "once": knowing + crafting(s.k), "a target": gradient},
            {"attack": "camouflage", "once": knowing, "a target": crafting(1) + gradient},
            {"attack": "honest points, gradients", "once": knowing, "a target": gradient + s.n_known * s.n / one},
            {"attack": "honest points, datamodel", "once": s.n_subsets * s.fraction, "a target": 0.0},
            {"attack": "random", "once": 0.0, "a target": 0.0},
        ]
    )
