"""A service that trains and unlearns, an attacker that contributes, and the targets between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from dmmlib import ensemble, metrics, models
from dmmlib.data import Dataset, from_arrays
from dmmlib.errors import DataError, OptionError
from dmmlib.execution import Execution
from dmmlib.studies.adversary import simplex
from dmmlib.studies.adversary.crafting import Poison, Prepare, craft
from dmmlib.studies.adversary.settings import AdversarySettings
from dmmlib.studies.adversary.subspace import Metric, Subspace

Logits = Sequence[np.ndarray] | np.ndarray
"""Logits (n_models, n_points, n_classes) for each of several requests."""


def check_share(share: float) -> None:
    """Raise OptionError unless the attacker's share of the training set is above 0 and at most a half."""
    if not 0 < share <= 0.5:
        raise OptionError(f"The attacker's share {share} was given; use a number above 0 and at most 0.5.")


@dataclass(frozen=True)
class Victim:
    """What the service trains.

    Attributes:
        prepare: from images in [0, 1] to points, differentiable.
        factory: makes the module.
        training: the recipe.
        execution: how it is carried out.
    """

    prepare: Prepare
    factory: Callable[[], nn.Module]
    training: ensemble.Training
    execution: Execution

    def points(self, images: np.ndarray) -> Tensor:
        """uint8 images (n, height, width, channels) as points."""
        return self.prepare(torch.from_numpy(images).float() / 255)

    def train(self, x: Tensor, y: np.ndarray, masks: np.ndarray, seeds: Sequence[int]) -> ensemble.Ensemble:
        """One model a mask; see `ensemble.train`."""
        return ensemble.train(self.factory, x, torch.from_numpy(y), masks, seeds, self.training, self.execution)


def standardise(data: Dataset, images: Tensor) -> Tensor:
    """`models.normalise` of pixels in [0, 1] (n, height, width, channels), to be differentiated in them.

    It is not there, since stored models are named by the source of `models`.
    """
    mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (data.mean, data.std))
    return (images.permute(0, 3, 1, 2).contiguous() - mean) / std


def pool(images: Tensor) -> Tensor:
    """What `models.pooled` does after normalising, to be differentiated: (n, features)."""
    return (avg_pool2d(images, 2) if images.shape[-1] >= 20 else images).flatten(1)


def cores() -> Execution:
    """Many small models a step on each core; nothing is compiled, as nothing here trains for long."""
    return Execution(512, torch.get_num_threads())


def mlp(data: Dataset, s: AdversarySettings, execution: Execution | None = None) -> Victim:
    """One hidden layer on pooled pixels."""

    def prepare(images: Tensor) -> Tensor:
        return pool(standardise(data, images))

    width = prepare(torch.zeros(1, *data.x_train.shape[1:])).shape[1]
    return Victim(
        prepare,
        lambda: models.mlp((width,), data.n_classes, s.hidden),
        ensemble.Training(s.epochs, s.batch, s.lr),
        execution or cores(),
    )


@dataclass(frozen=True)
class World:
    """Who holds what.

    Attributes:
        s: sizes.
        data: the service's training points (n, honest) and V; where there is poison it takes the last places of S.
        pool_x, pool_y: the attacker's own images and their labels.
        victim: what is trained.
        known: white box: models of the service's seeds on `data`, without the attacker.
        surrogate: models of other seeds on the attacker's own points.
        targets, tuning: positions in V of targets that results are reported on, and of others to choose settings on.
    """

    s: AdversarySettings
    data: Dataset
    pool_x: np.ndarray
    pool_y: np.ndarray
    victim: Victim
    known: Metric
    surrogate: Metric
    targets: np.ndarray
    tuning: np.ndarray

    @property
    def half(self) -> int:
        """Points a request: half of the attacker's, as many as one of two groups that cancel."""
        return max(1, round(self.s.share * self.s.n) // 2)

    @classmethod
    def of(cls, data: Dataset, s: AdversarySettings, victim: Victim) -> World:
        """Split the data, train what the attacker knows, draw targets that all of it answers rightly.

        Raises:
            OptionError: for a share that is no share.
            DataError: for too few points or targets.
        """
        check_share(s.share)
        if data.n_train < s.n + s.n_candidates:
            raise DataError(
                f"The data have {data.n_train} training points; give {s.n} for the service and at least "
                f"{s.n_candidates} for the attacker, or lower adversary.n."
            )
        if data.x_train.dtype != np.uint8:
            raise DataError(f"The data are {data.x_train.dtype}; give uint8 images, whose pixels can be bounded.")
        service = from_arrays(
            data.x_train[: s.n], data.y_train[: s.n], data.x_val, data.y_val,
            name=data.name, class_names=data.class_names, mean=data.mean, std=data.std,
        )  # fmt: skip
        pool_x, pool_y = data.x_train[s.n :], data.y_train[s.n :]
        own = min(len(pool_x), s.n)
        x, x_own, x_val = (victim.points(v) for v in (service.x_train, pool_x[:own], data.x_val))
        seeds = list(range(s.n_known))
        known = victim.train(x, service.y_train, np.ones((s.n_known, s.n), bool), seeds)
        other = victim.train(x_own, pool_y[:own], np.ones((s.n_known, own), bool), [10_000 + i for i in seeds])
        right = np.concatenate([metrics.correct(m.logits(x_val).numpy(), data.y_val) for m in (known, other)]).all(0)
        candidates = np.random.default_rng([s.seed, 1]).permutation(np.flatnonzero(right))
        if len(candidates) < s.n_targets + s.n_tuning:
            raise DataError(
                f"Models answer {len(candidates)} validation points rightly, but {s.n_targets} + {s.n_tuning} targets "
                "were asked for; lower adversary.n_targets or n_tuning."
            )
        return cls(
            s,
            service,
            pool_x,
            pool_y,
            victim,
            Metric.at(known, x, torch.from_numpy(service.y_train), s.damping),
            Metric.at(other, x_own, torch.from_numpy(pool_y[:own]), s.damping),
            candidates[: s.n_targets],
            candidates[s.n_targets : s.n_targets + s.n_tuning],
        )

    def of_targets(self, targets: np.ndarray) -> tuple[Tensor, Tensor]:
        """Points and labels of targets, positions in V."""
        return self.victim.points(self.data.x_val[targets]), torch.from_numpy(self.data.y_val[targets])

    def subspace(self, k: int, damping: float | None = None, white: bool = True) -> Subspace:
        """The k principal directions of the gradients of candidate targets, points of the attacker's own."""
        x, y = self.pool_x[: self.s.n_candidates], self.pool_y[: self.s.n_candidates]
        metric = self.known if white else self.surrogate
        if damping is not None:
            metric = metric.damped(damping)
        return Subspace.of(metric, self.victim.points(x), torch.from_numpy(y), k)

    def album(self, size: int, honest: int, rng: np.random.Generator) -> np.ndarray:
        """An honest user's images: a random one of the first `honest` points, and the nearest of its class."""
        x, y = self.known.x[:honest].flatten(1).cpu().numpy(), self.data.y_train[:honest]
        first = int(rng.integers(honest))
        same = np.flatnonzero(y == y[first])
        order = np.argsort(((x[same] - x[first]) ** 2).sum(1), kind="stable")
        return np.sort(same[order[:size]])

    def craft(self, subspace: Subspace, *, dirty: bool, angle: float, **changes: float) -> Poison:
        """Poison for a subspace, at the settings' share and bound unless `changes` says otherwise."""
        share, epsilon = changes.get("share", self.s.share), changes.get("epsilon", self.s.epsilon)
        check_share(share)
        return craft(
            subspace,
            simplex.regular(subspace.k),
            self.pool_x,
            self.pool_y,
            self.victim.prepare,
            max(subspace.k + 1, round(share * self.s.n)),
            epsilon=int(epsilon),
            dirty=dirty,
            angle=angle,
            steps=self.s.craft_steps,
        )


@dataclass(frozen=True)
class Site:
    """A training set with the attacker's points in it, and the models that were trained on it.

    Attributes:
        data: honest points, then the attacker's.
        own: indices of the attacker's points.
        x: prepared points, training first.
        originals, logits: N models of all of S, and their logits (N, n_points, n_classes).
    """

    data: Dataset
    own: np.ndarray
    x: Tensor
    originals: ensemble.Ensemble
    logits: np.ndarray

    @property
    def y(self) -> Tensor:
        return torch.from_numpy(self.data.y)

    @property
    def poison(self) -> tuple[np.ndarray, np.ndarray]:
        """The attacker's images and labels."""
        return self.data.x_train[self.own], self.data.y_train[self.own]

    def outcomes(self, targets: np.ndarray, retrained: Logits) -> pd.DataFrame:
        """Target, model, error and margin, a row a target and retrained model; "before": the originals' means.

        Args:
            targets: positions in V (T,).
            retrained: logits (n_models, n_points, n_classes) for each of them.
        """
        parts = []
        for target, logits in zip(targets, retrained, strict=True):
            at = [self.data.n_train + target]
            columns: dict[str, Any] = {"target": target, "model": np.arange(len(logits))}
            for when, z in (("", logits), (" before", self.logits)):
                right, margin = metrics.correct(z[:, at], self.data.y[at]), metrics.margins(z[:, at], self.data.y[at])
                columns |= {f"error{when}": ~right[:, 0], f"margin{when}": margin[:, 0]}
            before = {name: columns[name].mean() for name in ("error before", "margin before")}
            parts.append(pd.DataFrame(columns | before))
        return pd.concat(parts, ignore_index=True)


def with_poison(data: Dataset, images: np.ndarray, labels: np.ndarray) -> tuple[Dataset, np.ndarray]:
    """The data with their last training points replaced by the attacker's, and the indices of those."""
    honest = data.n_train - len(images)
    poisoned = replace(
        data,
        x_train=np.concatenate([data.x_train[:honest], images]),
        y_train=np.concatenate([data.y_train[:honest], labels]),
    )
    return poisoned, np.arange(honest, data.n_train)


def sites(world: World, poisons: Sequence[tuple[np.ndarray, np.ndarray]], n_models: int) -> list[Site]:
    """Train N models with each of several poisons (images, labels), all of them together."""
    return [site for site, _ in together(world, poisons, n_models, [[] for _ in poisons], 0)]


def together(
    world: World,
    poisons: Sequence[tuple[np.ndarray, np.ndarray]],
    n_models: int,
    requests: Sequence[Sequence[np.ndarray]],
    n_retrained: int,
    seed: int = 20_000,
) -> list[tuple[Site, np.ndarray]]:
    """Sites, and logits (n_requests, n_retrained, n_points, n_classes) of models retrained for each site's requests.

    All poisons stand in one array after the honest points, and a model's mask says which of them it sees; so models of
    different training sets share every step. Without originals (n_models 0) a site holds none. Originals have the seeds
    0, 1, ..., and every request its own, from `seed` on.
    """
    data, victim, n = world.data, world.victim, world.s.n
    made = [with_poison(data, *poison) for poison in poisons]
    starts = n + np.concatenate([[0], np.cumsum([len(own) for _, own in made])])
    x = victim.points(np.concatenate([data.x_train, *(p[0] for p in poisons)]))
    y = np.concatenate([data.y_train, *(p[1] for p in poisons)])
    masks, seeds, fresh = [], [], itertools.count(seed, 1000)
    for (_, own), start, asked in zip(made, starts, requests, strict=False):
        place = np.concatenate([np.arange(n - len(own)), start + np.arange(len(own))])
        for forget in [None, *asked]:
            mask = np.zeros(len(x), bool)
            mask[place if forget is None else np.delete(place, forget)] = True
            count = n_models if forget is None else n_retrained
            masks += [mask] * count
            first = 0 if forget is None else next(fresh)
            seeds += [first + i for i in range(count)]
    trained = victim.train(x, y, np.stack(masks), seeds)
    done, first = [], 0
    for (poisoned, own), asked in zip(made, requests, strict=True):
        points = victim.points(poisoned.x)
        last = first + n_models + len(asked) * n_retrained
        logits = trained[first:last].logits(points).numpy()
        originals = trained[first : first + n_models]
        retrained = logits[n_models:].reshape(len(asked), n_retrained, *logits.shape[1:])
        done.append((Site(poisoned, own, points, originals, logits[:n_models]), retrained))
        first = last
    return done


def retrain(world: World, site: Site, requests: Sequence[np.ndarray], n: int, seed: int = 20_000) -> np.ndarray:
    """Logits (n_requests, n, n_points, n_classes) of models trained on a site's points without each request's."""
    masks = np.ones((len(requests), n, site.data.n_train), bool)
    for mask, forget in zip(masks, requests, strict=True):
        mask[:, forget] = False
    seeds = [seed + 1000 * r + i for r in range(len(requests)) for i in range(n)]
    trained = world.victim.train(
        site.x[: site.data.n_train], site.data.y_train, masks.reshape(-1, site.data.n_train), seeds
    )
    return trained.logits(site.x).numpy().reshape(len(requests), n, len(site.x), -1)


def check_targets(logits: np.ndarray, labels: np.ndarray, targets: np.ndarray, n_train: int) -> None:
    """Raise DataError if most originals err on a target already: there is nothing to attack."""
    wrong = (~metrics.correct(logits[:, n_train + targets], labels[n_train + targets])).mean(0) > 0.5
    if wrong.any():
        raise DataError(
            f"Target {targets[wrong][0]} is misclassified by most originals already; choose one that they get right."
        )
