"""The attack on a convex model, whose deletions are served exactly: TV-stable noisy SGD (`exact.chains`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from dmmlib import ensemble
from dmmlib.adversary import attacks
from dmmlib.adversary.experiments import ddpa
from dmmlib.adversary.serving import columns
from dmmlib.adversary.settings import AdversarySettings
from dmmlib.adversary.world import Victim, World, cores, standardise, with_poison
from dmmlib.data import Dataset
from dmmlib.exact.chains import SGD, delete, learn
from dmmlib.exact.problem import Problem
from dmmlib.execution import Execution


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


def study(data: Dataset, s: AdversarySettings, execution: Execution | None = None) -> pd.DataFrame:
    """Do nothing, retrain and TV-stable deletion against requests for each target, in the columns of `serve`.

    DDPA with dirty labels on its own poison; honest points chosen by gradients, of the same number, without poison.
    """
    two = binary(data, s.positive)
    world = World.of(two, s, victim(two, s, execution))
    subspace = world.subspace(s.convex_k)
    poison = world.craft(subspace, dirty=True, angle=s.angles[0])
    requests = {"ddpa_dirty": ddpa(world, poison, subspace, world.targets)}
    influence = world.known.influence(*world.of_targets(world.targets))
    requests["honest_gradient"] = [
        attacks.most_harmful(row, len(r), np.arange(s.n))
        for row, r in zip(influence, requests["ddpa_dirty"], strict=True)
    ]
    trained = {
        "ddpa_dirty": with_poison(world.data, poison.images, poison.labels)[0],
        "honest_gradient": world.data,
    }
    sgd = SGD(s.convex_steps, s.convex_batch, s.convex_lr, s.convex_radius, s.convex_noise)
    rng = np.random.default_rng([s.seed, 9])
    val = _problem(world, world.data.x_val, world.data.y_val)
    others = np.setdiff1d(np.arange(val.n), world.targets)
    parts = []
    for attack, asked in requests.items():
        problem = _problem(world, trained[attack].x_train, trained[attack].y_train)
        originals = learn(problem, sgd, s.n_models, rng)
        before = val.margins(originals.average)
        for t, forget in zip(world.targets, asked, strict=True):
            kept = np.ones((s.n_models, problem.n), bool)
            kept[:, forget] = False
            unlearned, receipt = delete(problem, originals, forget, rng)
            found = {
                "do_nothing": (originals.average, 0.0),
                "retrain": (learn(problem, sgd, kept, rng).average, 1.0),
                "tv_stable": (unlearned.average, float(receipt.cost.mean()) / sgd.work),
            }
            for method, (w, cost) in found.items():
                margins = val.margins(w)
                names: dict[str, Any] = {
                    "attack": attack,
                    "method": method,
                    "target": int(t),
                    "size": len(forget),
                    "cost": cost,
                }
                told = columns((margins, margins > 0), (before, before > 0), t, others)
                parts.append(pd.DataFrame({"model": np.arange(s.n_models)} | told).assign(**names))
    return pd.concat(parts, ignore_index=True)


def _problem(world: World, images: np.ndarray, labels: np.ndarray) -> Problem:
    x = world.victim.points(images).double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)  # to double precision
    return Problem(x, np.where(labels > 0, 1.0, -1.0))
