"""A service that trains and unlearns, an attacker that contributes, and the targets between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from dmmlib import ensemble, metrics, models
from dmmlib.data import Dataset, from_arrays
from dmmlib.errors import DataError
from dmmlib.execution import Execution
from dmmlib.studies.adversary.crafting import Poison, Prepare, craft
from dmmlib.studies.adversary.settings import AdversarySettings
from dmmlib.studies.adversary.subspace import Metric, Subspace

Points = tuple[np.ndarray, np.ndarray]
"""Images, uint8 (k, height, width, channels), and their labels (k,)."""


@dataclass(frozen=True)
class Victim:
    """What the service trains."""

    prepare: Prepare  # from images in [0, 1] to points, differentiable
    factory: Callable[[], nn.Module]  # makes the module
    training: ensemble.Training  # the recipe
    execution: Execution = field(default_factory=lambda: Execution(512, torch.get_num_threads()))

    @property
    def one_by_one(self) -> Execution:
        """One job in each thread; not for forward-mode derivatives, of which torch keeps one level for all threads."""
        return Execution(chunk=1, workers=self.execution.workers)

    def points(self, images: np.ndarray) -> Tensor:
        """Turn uint8 images (n, height, width, channels) into points."""
        return self.prepare(torch.from_numpy(images).float() / 255)

    def train(self, x: Tensor, y: np.ndarray, masks: np.ndarray, seeds: Sequence[int]) -> ensemble.Ensemble:
        """Train one model for each mask; see `ensemble.train`."""
        return ensemble.train(self.factory, x, torch.from_numpy(y), masks, seeds, self.training, self.execution)


def mlp(data: Dataset, s: AdversarySettings) -> Victim:
    """Make a victim with one hidden layer on pooled pixels, as `models.pooled` makes them.

    Raises DataError for points that are no uint8 images.
    """
    if data.x_train.dtype != np.uint8:
        raise DataError(f"The data are {data.x_train.dtype}; give uint8 images, whose pixels can be bounded.")

    def prepare(images: Tensor) -> Tensor:
        channels_first = images.permute(0, 3, 1, 2).contiguous()  # as `models.normalise`, to be differentiated
        mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (data.mean, data.std))
        x = (channels_first - mean) / std
        return (avg_pool2d(x, 2) if min(x.shape[-2:]) >= 20 else x).flatten(1)

    d = prepare(torch.zeros(1, *data.x_train.shape[1:])).shape[1]
    module = partial(models.build, "mlp", (d,), data.n_classes, hidden=s.hidden)
    return Victim(prepare, module, ensemble.Training(s.epochs, s.batch, s.lr))


@dataclass(frozen=True)
class World:
    """Who holds what."""

    s: AdversarySettings  # sizes
    data: Dataset  # the service's: n honest training points, of which poison takes the last places, and V
    pool: Points  # the attacker's own images and labels
    victim: Victim  # what is trained
    known: Metric  # white box: models of the service's seeds on `data`, without the attacker
    surrogate: Metric  # models of other seeds on the attacker's own points
    targets: np.ndarray  # positions in V of those that results are reported on
    tuning: np.ndarray  # and of others, on which settings are chosen

    @classmethod
    def of(cls, data: Dataset, s: AdversarySettings, victim: Victim) -> World:
        """Split the data, train what the attacker knows, draw targets that all of it answers correctly.

        Raises DataError for too few points or targets.
        """
        if data.n_train < s.n + s.n_candidates:
            raise DataError(
                f"The data have {data.n_train} training points; give {s.n} for the service and at least "
                f"{s.n_candidates} for the attacker, or lower adversary.n."
            )
        service = from_arrays(
            data.x_train[: s.n], data.y_train[: s.n], data.x_val, data.y_val,
            name=data.name, class_names=data.class_names, mean=data.mean, std=data.std,
        )  # fmt: skip
        pool = data.x_train[s.n :], data.y_train[s.n :]
        known = _metric(victim, s, service.x_train, service.y_train, 0)
        surrogate = _metric(victim, s, pool[0][: s.n], pool[1][: s.n], 10_000)
        answers = [m.models.logits(victim.points(data.x_val)).numpy() for m in (known, surrogate)]
        able = np.flatnonzero(metrics.correct(np.concatenate(answers), data.y_val).all(0))
        candidates = np.random.default_rng([s.seed, 1]).permutation(able)
        if len(candidates) < s.n_targets + s.n_tuning:
            raise DataError(
                f"Models answer {len(candidates)} validation points correctly, but {s.n_targets} + {s.n_tuning} "
                "targets were asked for; lower adversary.n_targets or n_tuning."
            )
        targets, tuning = np.split(candidates[: s.n_targets + s.n_tuning], [s.n_targets])
        return cls(s, service, pool, victim, known, surrogate, targets, tuning)

    @property
    def nobody(self) -> Points:
        """No poison at all."""
        return self.data.x_train[:0], self.data.y_train[:0]

    def of_targets(self, targets: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return points and labels of targets, positions in V."""
        return self.victim.points(self.data.x_val[targets]), torch.from_numpy(self.data.y_val[targets])

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Return candidate targets that span subspaces, the first of the attacker's own: points and labels."""
        x, y = (part[: self.s.n_candidates] for part in self.pool)
        return self.victim.points(x), torch.from_numpy(y)

    def subspace(self, k: int, damping: float | None = None, white: bool = True) -> Subspace:
        """Find the k principal directions of the candidate targets' gradients."""
        metric = self.known if white else self.surrogate
        return Subspace.of(metric if damping is None else metric.damped(damping), *self.candidates(), k)

    def album(self, honest: int, rng: np.random.Generator) -> np.ndarray:
        """Return an honest user's request: a random one of the first `honest` points, and the nearest of its class."""
        x, y = self.known.x[:honest].flatten(1).cpu().numpy(), self.data.y_train[:honest]
        first = int(rng.integers(honest))
        same = np.flatnonzero(y == y[first])
        order = np.argsort(((x[same] - x[first]) ** 2).sum(1), kind="stable")
        return np.sort(same[order[: self.s.half]])

    def craft(
        self, subspace: Subspace, dirty: bool, angle: float, share: float | None = None, epsilon: int | None = None
    ) -> Poison:
        """Craft poison for a subspace, at the settings' share and bound unless others are given."""
        size = max(subspace.k + 1, round((self.s.share if share is None else share) * self.s.n))
        epsilon = self.s.epsilon if epsilon is None else epsilon
        return craft(subspace, *self.pool, self.victim.prepare, size, epsilon, dirty, angle, self.s.craft_steps)


def _metric(victim: Victim, s: AdversarySettings, images: np.ndarray, labels: np.ndarray, seed: int) -> Metric:
    """The metric at models of those points, of the seeds from `seed` on."""
    x = victim.points(images)
    trained = victim.train(x, labels, np.ones((s.n_known, len(x)), bool), range(seed, seed + s.n_known))
    return Metric.at(trained, x, torch.from_numpy(labels), s.damping)


@dataclass(frozen=True)
class Site:
    """A training set with the attacker's points in it, and the models that were trained on it."""

    data: Dataset  # honest points, then the attacker's
    own: np.ndarray  # indices of the attacker's points
    x: Tensor  # prepared points, training first
    originals: ensemble.Ensemble  # N models of all of S
    logits: np.ndarray  # theirs (N, n_points, n_classes)

    @property
    def y(self) -> Tensor:
        return torch.from_numpy(self.data.y)

    @property
    def poison(self) -> Points:
        """The attacker's images and labels."""
        return self.data.x_train[self.own], self.data.y_train[self.own]

    def outcomes(self, targets: np.ndarray, retrained: np.ndarray) -> pd.DataFrame:
        """Return error, margin and its change of retrained models at their targets; "before": the originals' means.

        Takes positions in V (T,), and logits (T, n_models, n_points, n_classes).
        """
        at, n_models = self.data.n_train + targets, retrained.shape[1]
        after, before = retrained[np.arange(len(at)), :, at].swapaxes(0, 1), self.logits[:, at]
        columns = {"target": np.repeat(targets, n_models), "model": np.tile(np.arange(n_models), len(at))}
        for name, of in (("error", lambda z, y: ~metrics.correct(z, y)), ("margin", metrics.margins)):
            columns[name] = of(after, self.data.y[at]).T.ravel()
            columns[f"{name} before"] = np.repeat(of(before, self.data.y[at]).mean(0), n_models)
        return pd.DataFrame(columns).assign(change=columns["margin"] - columns["margin before"])


def with_poison(data: Dataset, images: np.ndarray, labels: np.ndarray, honest: int | None = None) -> Dataset:
    """Return the first `honest` training points, then the attacker's; as many in all as there were if None."""
    honest = data.n_train - len(images) if honest is None else honest
    x, y = np.concatenate([data.x_train[:honest], images]), np.concatenate([data.y_train[:honest], labels])
    return replace(data, x_train=x, y_train=y)


def together(
    world: World,
    poisons: Sequence[Points],
    n_models: int,
    requests: Sequence[Sequence[np.ndarray]],
    n_retrained: int,
    seed: int = 20_000,
) -> list[tuple[Site, np.ndarray]]:
    """Return sites, and logits (n_requests, n_retrained, n_points, n_classes) after retraining for each's requests.

    All poisons stand in one array after the honest points, and a model's mask says which of them it sees; so models of
    different training sets share every step. Without originals (n_models 0) a site holds none. Originals have the seeds
    0, 1, ..., and every request its own, from `seed` on.
    """
    data, n = world.data, world.s.n
    x = np.concatenate([data.x_train, *(images for images, _ in poisons)])
    y = np.concatenate([data.y_train, *(labels for _, labels in poisons)])
    masks, seeds, fresh, start = list[np.ndarray](), list[int](), itertools.count(seed, 1000), n
    for (images, _), asked in zip(poisons, requests, strict=True):
        places = np.r_[: n - len(images), start : start + len(images)]
        start += len(images)
        masks += [np.isin(np.arange(len(x)), places)] * n_models
        seeds += range(n_models)
        for forget, first in zip(asked, fresh, strict=False):
            masks += [np.isin(np.arange(len(x)), np.delete(places, forget))] * n_retrained
            seeds += range(first, first + n_retrained)
    trained, first = world.victim.train(world.victim.points(x), y, np.stack(masks), seeds), 0
    done = []
    for poison, asked in zip(poisons, requests, strict=True):
        poisoned = with_poison(data, *poison)
        points, own = world.victim.points(poisoned.x), np.arange(n - len(poison[0]), n)
        its = trained[first : first + n_models + len(asked) * n_retrained]
        logits = its.logits(points).numpy()
        retrained = logits[n_models:].reshape(len(asked), n_retrained, *logits.shape[1:])
        done.append((Site(poisoned, own, points, its[:n_models], logits[:n_models]), retrained))
        first += its.n_models
    return done


def sites(world: World, poisons: Sequence[Points], n_models: int) -> list[Site]:
    """Train N models with each of several poisons (images, labels), all of them together."""
    return [site for site, _ in together(world, poisons, n_models, [[] for _ in poisons], 0)]


def retrain(world: World, site: Site, requests: Sequence[np.ndarray], n: int, seed: int = 20_000) -> np.ndarray:
    """Return logits (n_requests, n, n_points, n_classes) of models trained on a site without each request's points."""
    return together(world, [site.poison], 0, [requests], n, seed)[0][1]
