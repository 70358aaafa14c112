"""The attacks on a convex model, whose deletions are served exactly: TV-stable noisy SGD (`exact.chains`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from dmmlib import ensemble
from dmmlib.data import Dataset
from dmmlib.forget_sets import ForgetSet
from dmmlib.studies.adversary.experiments import at_random, ddpa, fit_datamodel, hidden, of_honest_points
from dmmlib.studies.adversary.serving import columns, klom_rows, over_requests
from dmmlib.studies.adversary.settings import AdversarySettings
from dmmlib.studies.adversary.world import Points, Victim, World, sites, with_poison
from dmmlib.studies.exact.chains import SGD, Chains, delete, learn
from dmmlib.studies.exact.problem import Problem, from_images


def victim(data: Dataset, s: AdversarySettings) -> Victim:
    """Make logistic regression on the points of `exact.problem.from_images`, of norm 1, a module of two logits."""

    def features(images: Tensor) -> Tensor:
        pixels = adaptive_avg_pool2d(images, s.convex_side).flatten(1)
        return normalize(torch.cat([pixels, pixels.new_ones(len(pixels), 1)], 1), dim=1)

    training = ensemble.Training(s.epochs, s.convex_batch, s.convex_lr, momentum=0.0, weight_decay=0.0)
    return Victim.of(data, features, lambda d: nn.Linear(d, 2, bias=False), training)


def binary(data: Dataset, positive: tuple[int, ...]) -> Dataset:
    """Return the data with the labels 1 for some classes and 0 for the others."""
    y_train, y_val = (np.isin(y, positive).astype(np.int64) for y in (data.y_train, data.y_val))
    return replace(data, y_train=y_train, y_val=y_val, class_names=("others", "positive"))


@dataclass(frozen=True)
class Attack:
    """An attack's requests to one training set."""

    name: str  # in `experiments.ATTACKS`
    train: Problem  # the training points
    val: Problem  # the validation points
    targets: np.ndarray  # validation points, counted from 0
    requests: list[np.ndarray]  # training points to delete, for each target


def prepare(data: Dataset, s: AdversarySettings) -> list[Attack]:
    """Prepare every attack on points that were trained on; poison for one target has training sets of its own.

    DDPA takes the first of the settings' angles, and their damping; nothing is searched here.
    """
    two = binary(data, s.positive)
    world = World.of(two, s, victim(two, s))

    def attack(name: str, points: Points, targets: np.ndarray, requests: list[np.ndarray]) -> Attack:
        trained = with_poison(world.data, *points)
        return Attack(name, *from_images(trained, s.convex_side, positive=[1]), targets, requests)

    attacks = []
    for kind, white in (("ddpa", True), ("surrogate", False)):
        space = world.subspace(s.convex_k, white=white)
        for dirty in (False, True):
            poison, labels = world.craft(space, dirty, s.angles[0]), "dirty" if dirty else "clean"
            requests = ddpa(world, poison, space, world.targets, s.half)
            attacks.append(attack(f"{kind}_{labels}", poison.points, world.targets, requests))
            if white and dirty:
                requests = at_random(world, np.arange(s.n - len(poison), s.n))
                attacks.append(attack("random", poison.points, world.targets, requests))
    for t, poison, request in zip(world.targets, *hidden(world), strict=True):
        attacks.append(attack("camouflage", poison.points, np.array([t]), [request]))
    monitor = fit_datamodel(world, sites(world, [world.nobody], s.n_models)[0])
    for name, requests in of_honest_points(world, monitor).items():
        attacks.append(attack(name, world.nobody, world.targets, requests))
    return attacks


def study(attacks: list[Attack], s: AdversarySettings) -> pd.DataFrame:
    """Serve each target's request by doing nothing, by retraining and by TV-stable deletion; columns as of `serve`."""
    tables = []
    every = np.concatenate([attack.targets for attack in attacks])
    for attack, rng in _streams(attacks, s, 9):
        others = np.setdiff1d(np.arange(attack.val.n), every)
        originals = learned(attack, s, s.n_models, rng)
        before = attack.val.margins(originals.average)
        for t, forget in zip(attack.targets, attack.requests, strict=True):
            for method, (w, cost) in _serve(attack, originals, forget, rng).items():
                margins = attack.val.margins(w)
                names = {"attack": attack.name, "method": method, "target": int(t), "size": len(forget), "cost": cost}
                told = columns((margins, margins > 0), (before, before > 0), t, others)
                tables.append(pd.DataFrame(names | {"model": np.arange(s.n_models)} | told))
    return pd.concat(tables, ignore_index=True)


def klom(attacks: list[Attack], s: AdversarySettings) -> pd.DataFrame:
    """Compute KLoM's p95 of the first targets' requests, each served from `convex_n_klom` chains; see `serving.klom`.

    All is compared with as many retrained chains; "retrain" is others of them, the floor.
    """
    rows = []
    first = attacks[0].targets[: s.n_requests]
    for attack, rng in _streams([a for a in attacks if np.isin(a.targets, first).any()], s, 11):
        originals = learned(attack, s, s.convex_n_klom, rng)
        for t, forget in zip(attack.targets, attack.requests, strict=True):
            if t in first:
                aim = _margins(attack, _retrain(attack, originals, forget, rng))
                splits = ForgetSet("", forget).splits(attack.train.n, attack.val.n)
                for method, (w, _) in _serve(attack, originals, forget, rng).items():
                    rows += klom_rows({"attack": attack.name, "method": method}, _margins(attack, w), aim, splits)
    return over_requests(rows)


def _streams(attacks: list[Attack], s: AdversarySettings, stream: int) -> Iterator[tuple[Attack, np.random.Generator]]:
    for i, attack in enumerate(attacks):
        yield attack, np.random.default_rng([s.seed, stream, i])


def _margins(attack: Attack, w: np.ndarray) -> np.ndarray:
    return np.concatenate([attack.train.margins(w), attack.val.margins(w)], 1)


def learned(attack: Attack, s: AdversarySettings, n_runs: int, rng: np.random.Generator) -> Chains:
    """Train chains on all of an attack's training points."""
    sgd = SGD(s.convex_steps, s.convex_batch, s.convex_lr, s.convex_radius, s.convex_noise)
    return learn(attack.train, sgd, n_runs, rng)


def _retrain(attack: Attack, originals: Chains, forget: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kept = originals.present.copy()
    kept[:, forget] = False
    return learn(attack.train, originals.sgd, kept, rng).average


def _serve(
    attack: Attack, originals: Chains, forget: np.ndarray, rng: np.random.Generator
) -> dict[str, tuple[np.ndarray, float]]:
    """Weights (n_runs, d) after the request, and what it cost in retrainings, by each way to serve it."""
    unlearned, receipt = delete(attack.train, originals, forget, rng)
    return {
        "do_nothing": (originals.average, 0.0),
        "retrain": (_retrain(attack, originals, forget, rng), 1.0),
        "tv_stable": (unlearned.average, float(receipt.cost.mean()) / originals.sgd.work),
    }
