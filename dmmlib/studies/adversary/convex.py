"""The attacks on a convex model, whose deletions are served exactly: TV-stable noisy SGD (`exact.chains`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from dmmlib import ensemble
from dmmlib.data import Dataset
from dmmlib.execution import Execution
from dmmlib.forget_sets import ForgetSet
from dmmlib.studies.adversary.attacks import datamodel_influence, most_harmful
from dmmlib.studies.adversary.crafting import Poison
from dmmlib.studies.adversary.experiments import ddpa, fit_datamodel, hidden
from dmmlib.studies.adversary.serving import columns, klom_rows, over_requests
from dmmlib.studies.adversary.settings import AdversarySettings
from dmmlib.studies.adversary.world import Victim, World, cores, sites, standardise, with_poison
from dmmlib.studies.exact.chains import SGD, Chains, delete, learn
from dmmlib.studies.exact.problem import Problem


def victim(data: Dataset, s: AdversarySettings, execution: Execution | None = None) -> Victim:
    """Logistic regression on points of norm 1 (`exact.problem.from_images`), as a module of two logits."""

    def prepare(images: Tensor) -> Tensor:
        pixels = adaptive_avg_pool2d(standardise(data, images), s.convex_side).flatten(1)
        return normalize(torch.cat([pixels, pixels.new_ones(len(pixels), 1)], 1), dim=1)

    width = prepare(torch.zeros(1, *data.x_train.shape[1:])).shape[1]
    training = ensemble.Training(s.epochs, s.convex_batch, s.convex_lr, momentum=0.0, weight_decay=0.0)
    return Victim(prepare, lambda: nn.Linear(width, 2, bias=False), training, execution or cores())


def binary(data: Dataset, positive: tuple[int, ...]) -> Dataset:
    """The data with the labels 1 for some classes and 0 for the others."""
    labels = (np.isin(y, positive).astype(np.int64) for y in (data.y_train, data.y_val))
    y_train, y_val = labels
    return replace(data, y_train=y_train, y_val=y_val, class_names=("others", "positive"))


@dataclass(frozen=True)
class Attack:
    """An attack's requests to one training set.

    Attributes:
        name: in `experiments.ATTACKS`.
        points: training points, then validation points.
        n: training points among them.
        targets: validation points, counted from 0.
        requests: training points to delete, for each target.
    """

    name: str
    points: Problem
    n: int
    targets: np.ndarray
    requests: list[np.ndarray]


def prepare(data: Dataset, s: AdversarySettings, execution: Execution | None = None) -> list[Attack]:
    """Every attack on points that were trained on; poison for one target alone has training sets of its own.

    DDPA takes the first of the settings' angles, and their damping; nothing is searched here.
    """
    two = binary(data, s.positive)
    world = World.of(two, s, victim(two, s, execution))

    def attack(name: str, poison: Poison | None, targets: np.ndarray, requests: list[np.ndarray]) -> Attack:
        trained = with_poison(world.data, poison.images, poison.labels)[0] if poison else world.data
        return Attack(name, _problem(world, trained), s.n, targets, requests)

    attacks = []
    for kind, white in (("ddpa", True), ("surrogate", False)):
        space = world.subspace(s.convex_k, white=white)
        for labels in ("clean", "dirty"):
            poison = world.craft(space, dirty=labels == "dirty", angle=s.angles[0])
            requests = ddpa(world, poison, space, world.targets, world.half)
            attacks.append(attack(f"{kind}_{labels}", poison, world.targets, requests))
            if (kind, labels) == ("ddpa", "dirty"):
                rng = np.random.default_rng([s.seed, 5])
                own = np.arange(s.n - len(poison), s.n)
                some = [np.sort(rng.choice(own, world.half, replace=False)) for _ in world.targets]
                attacks.append(attack("random", poison, world.targets, some))
    attacks += [
        attack("camouflage", poison, world.targets[[t]], [request])
        for t, (poison, request) in enumerate(zip(*hidden(world), strict=True))
    ]
    honest = sites(world, [(data.x_train[:0], data.y_train[:0])], s.n_models)[0]
    influences = {
        "honest_datamodel": datamodel_influence(
            fit_datamodel(world, honest).datamodel, honest.data.y, s.n, s.n + world.targets
        ),
        "honest_gradient": world.known.influence(*world.of_targets(world.targets)),
    }
    for name, influence in influences.items():
        requests = [most_harmful(row, world.half, np.arange(s.n)) for row in influence]
        attacks.append(attack(name, None, world.targets, requests))
    return attacks


def study(attacks: list[Attack], s: AdversarySettings) -> pd.DataFrame:
    """Do nothing, retrain and TV-stable deletion against the request for each target, in the columns of `serve`."""
    parts = []
    every = np.concatenate([attack.targets for attack in attacks])
    for attack, rng in _streams(attacks, s, 9):
        val = attack.points.part(np.arange(attack.n, attack.points.n))
        others = np.setdiff1d(np.arange(val.n), every)
        trained, originals = learned(attack, s, s.n_models, rng)
        before = val.margins(originals.average)
        for t, forget in zip(attack.targets, attack.requests, strict=True):
            for method, (w, cost) in _serve(trained, originals, forget, rng).items():
                margins = val.margins(w)
                told = columns((margins, margins > 0), (before, before > 0), t, others)
                names: dict[str, Any] = {
                    "attack": attack.name,
                    "method": method,
                    "target": int(t),
                    "size": len(forget),
                    "cost": cost,
                }
                parts.append(pd.DataFrame({"model": np.arange(s.n_models)} | told).assign(**names))
    return pd.concat(parts, ignore_index=True)


def klom(attacks: list[Attack], s: AdversarySettings) -> pd.DataFrame:
    """KLoM's p95 of the first targets' requests, each served from `convex_n_klom` chains, as `serving.klom` has it.

    All is compared with as many retrained chains; "retrain" is others of them, the floor.
    """
    rows = []
    first = attacks[0].targets[: s.n_requests]
    for attack, rng in _streams([a for a in attacks if np.isin(a.targets, first).any()], s, 11):
        trained, originals = learned(attack, s, s.convex_n_klom, rng)
        for t, forget in zip(attack.targets, attack.requests, strict=True):
            if t in first:
                aim = attack.points.margins(_retrain(trained, originals, forget, rng))
                splits = ForgetSet("", forget).splits(attack.n, attack.points.n - attack.n)
                for method, (w, _) in _serve(trained, originals, forget, rng).items():
                    names = {"attack": attack.name, "method": method, "request": int(t)}
                    rows += klom_rows(names, attack.points.margins(w), aim, splits)
    return over_requests(rows)


def _streams(attacks: list[Attack], s: AdversarySettings, stream: int) -> Iterator[tuple[Attack, np.random.Generator]]:
    for i, attack in enumerate(attacks):
        yield attack, np.random.default_rng([s.seed, stream, i])


def learned(attack: Attack, s: AdversarySettings, n_runs: int, rng: np.random.Generator) -> tuple[Problem, Chains]:
    """The training set, and chains trained on all of it."""
    trained = attack.points.part(np.arange(attack.n))
    sgd = SGD(s.convex_steps, s.convex_batch, s.convex_lr, s.convex_radius, s.convex_noise)
    return trained, learn(trained, sgd, n_runs, rng)


def _retrain(trained: Problem, originals: Chains, forget: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kept = originals.present.copy()
    kept[:, forget] = False
    return learn(trained, originals.sgd, kept, rng).average


def _serve(
    trained: Problem, originals: Chains, forget: np.ndarray, rng: np.random.Generator
) -> dict[str, tuple[np.ndarray, float]]:
    """Weights (n_runs, d) after the request, and what it cost in retrainings, by each way to serve it."""
    unlearned, receipt = delete(trained, originals, forget, rng)
    return {
        "do_nothing": (originals.average, 0.0),
        "retrain": (_retrain(trained, originals, forget, rng), 1.0),
        "tv_stable": (unlearned.average, float(receipt.cost.mean()) / originals.sgd.work),
    }


def _problem(world: World, data: Dataset) -> Problem:
    x = world.victim.points(data.x).double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)  # to double precision
    return Problem(x, np.where(data.y > 0, 1.0, -1.0))
