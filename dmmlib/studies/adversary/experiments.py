"""The attacks of notebook 08: who contributes what, who asks for what, and what retraining makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import expit

from dmmlib import attribution, metrics
from dmmlib.attributors.bayesian import fit
from dmmlib.attributors.kernel import gradient_kernel, kernel_response
from dmmlib.attributors.margins import calibrated
from dmmlib.datamodels import Attributor, Indices
from dmmlib.studies.adversary.crafting import Poison, delete_groups, most_harmful
from dmmlib.studies.adversary.service import COMPONENTS, Monitor
from dmmlib.studies.adversary.subspace import Subspace
from dmmlib.studies.adversary.world import Site, World, retrain, sites, together, with_poison

ATTACKS = {
    "ddpa_clean": "DDPA, clean labels",
    "ddpa_dirty": "DDPA, dirty labels",
    "surrogate_clean": "DDPA by surrogate, clean",
    "surrogate_dirty": "DDPA by surrogate, dirty",
    "random": "random, own points",
    "camouflage": "camouflage, target known",
    "honest_datamodel": "honest points, datamodel",
    "honest_gradient": "honest points, gradients",
    "never_trained": "never trained (unchecked)",
}


@dataclass(frozen=True)
class Crafted:
    """One kind of DDPA."""

    dirty: bool  # its labels
    damping: float  # as chosen on the tuning targets
    angle: float  # chosen likewise
    subspace: Subspace  # at the models that the attacker knows, or at its own
    poison: Poison  # for it


def ddpa(
    world: World, poison: Poison, subspace: Subspace, targets: np.ndarray, size: int | None = None
) -> list[np.ndarray]:
    """Plan DDPA's request for each target: training points to delete, half of the poison if `size` is not given."""
    first = world.s.n - len(poison)
    coordinates = subspace.of_margins(*world.of_targets(targets))
    return [first + delete_groups(poison, c, size or len(poison) // 2) for c in coordinates]


def choose(world: World, dirty: bool) -> Crafted:
    """Choose the damping and angle whose requests lower the tuning targets' margins most after retraining."""
    s = world.s
    spaces = {damping: world.subspace(s.k, damping) for damping in s.dampings}
    cases = [(damping, angle) for damping in s.dampings for angle in s.angles]
    poisons = [world.craft(spaces[damping], dirty, angle) for damping, angle in cases]
    asked = [ddpa(world, p, spaces[damping], world.tuning) for p, (damping, _) in zip(poisons, cases, strict=True)]
    done = together(world, [p.points for p in poisons], s.n_models, asked, 1)
    best = int(np.argmin([site.outcomes(world.tuning, retrained)["change"].mean() for site, retrained in done]))
    damping, angle = cases[best]
    return Crafted(dirty, damping, angle, spaces[damping], poisons[best])


def by_surrogate(world: World, crafted: Crafted) -> Crafted:
    """Craft and plan the same attack on models of other seeds and of the attacker's own data."""
    space = world.subspace(crafted.subspace.k, crafted.damping, white=False)
    return replace(crafted, subspace=space, poison=world.craft(space, crafted.dirty, crafted.angle))


@dataclass(frozen=True)
class Asked:
    """Requests of one attack, one for each target."""

    attack: str  # its name in `ATTACKS`
    sites: list[Site]  # what was trained, one for all targets or one for each
    requests: list[np.ndarray]  # training points to delete for each target
    retrained: np.ndarray  # logits (T, n_models, n_points, n_classes) of models without them
    attributors: Sequence[Attributor]  # of the sites, for the methods that go by a datamodel

    def site(self, t: int) -> Site:
        return self.sites[t % len(self.sites)]


@dataclass(frozen=True)
class Predicted(Attributor):
    """An attributor that was asked already: `change` (n_points, n_classes) is its answer for the one request."""

    change: np.ndarray

    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        return np.stack([self.change] * len(forget_sets))

    def predict(self, masks: np.ndarray) -> np.ndarray:
        raise NotImplementedError("it was asked for one forget set only")


@dataclass(frozen=True)
class Prepared:
    """Everything that is served."""

    crafted: dict[str, Crafted]  # attack -> how DDPA was crafted, by white box and by surrogate
    asked: dict[str, Asked]  # attack -> its requests
    places: dict[str, Site]  # the training sets "honest" and those of `crafted`
    monitors: dict[str, Monitor]  # the service's datamodel of each of them
    hidden: list[Poison]  # camouflaged poison for each target
    watched: pd.DataFrame  # scores of camouflage's requests, and of honest ones for the same training sets; see `watch`


def prepare(world: World) -> Prepared:
    """Craft, train, choose requests for every target, and retrain for each of them.

    All requests delete equally many points, half of what the attacker contributed.
    """
    s, targets = world.s, world.targets
    crafted = {"ddpa_clean": choose(world, dirty=False), "ddpa_dirty": choose(world, dirty=True)}
    crafted |= {name.replace("ddpa", "surrogate"): by_surrogate(world, c) for name, c in crafted.items()}
    made = sites(world, [world.nobody, *(c.poison.points for c in crafted.values())], s.n_models)
    places = dict(zip(("honest", *crafted), made, strict=True))
    monitors = {name: fit_datamodel(world, site) for name, site in places.items()}
    requests = {(name, name): ddpa(world, c.poison, c.subspace, targets, s.half) for name, c in crafted.items()}
    requests["random", "ddpa_dirty"] = at_random(world, places["ddpa_dirty"].own)
    requests |= {(name, "honest"): r for name, r in of_honest_points(world, monitors["honest"]).items()}
    asked = {}
    for (name, home), wanted in requests.items():
        after = retrain(world, places[home], wanted, s.n_models)
        asked[name] = Asked(name, [places[home]], wanted, after, [monitors[home].datamodel])
    asked["camouflage"], poisons, watched = camouflage(world)
    asked["never_trained"] = never_trained(world, places["honest"], asked["camouflage"], s.n_models)
    return Prepared(crafted, asked, places, monitors, poisons, watched)


def at_random(world: World, own: np.ndarray) -> list[np.ndarray]:
    """Request, for each target, the deletion of random points of the attacker's own."""
    rng = np.random.default_rng([world.s.seed, 5])
    return [np.sort(rng.choice(own, world.s.half, replace=False)) for _ in world.targets]


def of_honest_points(world: World, monitor: Monitor) -> dict[str, list[np.ndarray]]:
    """Name, for each target, the honest points that a datamodel of the service, or gradients, find most harmful."""
    n, targets = world.s.n, world.targets
    influences = {
        "honest_datamodel": monitor.influence(n + targets),
        "honest_gradient": world.known.influence(*world.of_targets(targets)),
    }
    return {name: [most_harmful(row, world.s.half, np.arange(n)) for row in z] for name, z in influences.items()}


def fit_datamodel(world: World, site: Site) -> Monitor:
    """Fit the service's Bayesian datamodel of a site (`attributors.bayesian`), and what scores requests by it."""
    s, n = world.s, site.data.n_train
    rng = np.random.default_rng([s.seed, 4])
    masks = rng.random((s.n_subsets, n)).argsort(1) < round(s.fraction * n)
    models = world.victim.train(site.x[:n], site.data.y_train, masks, rng.integers(0, 2**31, s.n_subsets).tolist())
    outputs = metrics.margin_gauge(models.logits(site.x).numpy(), site.data.y)
    context = attribution.Context(site.x, site.y, masks, outputs, models=models)
    t = gradient_kernel(site.originals[:4], site.x[:n], site.y[:n], n, s.damping).transfer
    response = kernel_response(context, n_models=20)  # predicts hundreds of requests in a moment
    return _monitor(fit(context, response, 0.2), context, t)


def _monitor(datamodel: Attributor, context: attribution.Context, t: np.ndarray) -> Monitor:
    """A monitor with residuals 1 - p of the context's subset models, and the kernel T (n_train, n_points)."""
    n = context.n_train
    residual = expit(-context.margins[:, :n]).mean(0)
    return Monitor(datamodel, context.labels, residual[:, None] * t[:, :n] * residual)


def camouflage(world: World) -> tuple[Asked, list[Poison], pd.DataFrame]:
    """Craft poison for each target alone: the simplex of k = 1, whose two groups pull its margin down, and up.

    While both are there they cancel; the request deletes the one that holds the target up. Hidden poison of Di et al.,
    "Hidden Poison: Machine Unlearning Enables Camouflaged Poisoning Attacks" (NeurIPS 2023), in the notation of DDPA.
    The service has a gradient kernel of each of these training sets, scaled on a few subset models: nobody can train a
    hundred for every target.

    Returns:
        The requests, the poison, and what the service's scores say (`watch`).
    """
    s, n = world.s, world.s.n
    poisons, requests = hidden(world)
    pairs = [p.points for p in poisons]
    done = together(world, pairs, s.n_models, [[r] for r in requests], s.n_models)
    masks = np.random.default_rng([s.seed, 6]).random((s.camouflage_subsets, n)).argsort(1) < n // 2
    subsets = together(world, pairs, 0, [[np.flatnonzero(~mask) for mask in masks]] * len(pairs), 1, seed=40_000)
    n_honest = -(-s.n_honest // len(pairs))

    def judge(t: int) -> tuple[Predicted, pd.DataFrame]:
        site, outputs = done[t][0], metrics.margin_gauge(subsets[t][1][:, 0], done[t][0].data.y)
        context = attribution.Context(site.x, site.y, masks, outputs)
        kernel = gradient_kernel(site.originals[:2].clone(), site.x, site.y, n, s.damping).transfer
        datamodel = calibrated(context, expit(-context.margins[:, :n]).mean(0)[:, None] * kernel)
        its = _monitor(datamodel, context, kernel)
        watched = watch(world, its, site, "camouflage", {"camouflage": [requests[t]]}, n_honest, t)
        return Predicted(datamodel.effect(requests[t])), watched

    predicted, watched = zip(*world.victim.one_by_one.run(judge, range(len(pairs))), strict=True)
    asked = Asked("camouflage", [site for site, _ in done], requests, np.concatenate([z for _, z in done]), predicted)
    return asked, poisons, pd.concat(watched, ignore_index=True)


def hidden(world: World) -> tuple[list[Poison], list[np.ndarray]]:
    """Craft camouflaged poison for each target, and the request that uncovers it."""
    poisons, requests = [], []
    for target in world.targets[:, None]:
        line = Subspace.of(world.known, *world.of_targets(target), 1)
        poisons.append(world.craft(line, dirty=False, angle=0.0))
        requests += ddpa(world, poisons[-1], line, target)
    return poisons, requests


def never_trained(world: World, honest: Site, camouflaged: Asked, n_models: int) -> Asked:
    """Request points that hold a target up and were never contributed: an unchecked service "forgets" them.

    In the manner of "unlearn and burn". They are the points that `camouflage` would ask to delete, and stand behind the
    training points, in no model's training set, so that retraining without them is training again: `n_models` for all.
    """
    n, data = world.s.n, honest.data
    seeds = range(30_000, 30_000 + n_models)
    again = world.victim.train(honest.x[:n], data.y_train, np.ones((n_models, n), bool), seeds)
    made = []
    for t, forget in enumerate(camouflaged.requests):
        poisoned = camouflaged.site(t).data
        extended = with_poison(data, poisoned.x_train[forget], poisoned.y_train[forget], n)
        x = world.victim.points(extended.x)
        made.append(Site(extended, np.zeros(0, int), x, honest.originals, honest.originals.logits(x).numpy()))
    requests = [n + np.arange(len(forget)) for forget in camouflaged.requests]
    retrained = np.stack([again.logits(site.x).numpy() for site in made])
    none = [Predicted(np.zeros(site.logits.shape[1:], np.float32)) for site in made]  # no subset held them: no effect
    return Asked("never_trained", made, requests, retrained, none)


def watch(
    world: World,
    monitor: Monitor,
    site: Site,
    name: str,
    requests: Mapping[str, Sequence[np.ndarray]],
    n_honest: int,
    stream: int = 0,
) -> pd.DataFrame:
    """Score attacks' requests, and `n_honest` honest ones of each kind for the same training set.

    Honest requests are as large as the attacks', and of two kinds: random points, and images alike (`World.album`).
    The service knows neither who is honest nor the attacker's models.
    """
    rng = np.random.default_rng([world.s.seed, 8, stream])
    honest = site.data.n_train - len(site.own)
    kinds = {
        "honest, random": [np.sort(rng.choice(honest, world.s.half, replace=False)) for _ in range(n_honest)],
        "honest, images alike": [world.album(honest, rng) for _ in range(n_honest)],
    }
    rows = [(kind, kind not in kinds, r) for kind, asked in {**kinds, **requests}.items() for r in asked]
    table = pd.DataFrame([row[:2] for row in rows], columns=["request", "malicious"]).assign(site=name)
    return table.join(pd.DataFrame(monitor.scores([r for *_, r in rows]), columns=[*COMPONENTS, "score"]))
