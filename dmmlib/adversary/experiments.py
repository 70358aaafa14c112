"""What notebook 08 runs, each a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dmmlib import attribution, metrics, unlearn
from dmmlib.adversary import attacks, service, simplex
from dmmlib.adversary.crafting import Poison
from dmmlib.adversary.settings import AdversarySettings
from dmmlib.adversary.stable_region import Region, stable_region
from dmmlib.adversary.subspace import Metric, Subspace, gradients
from dmmlib.adversary.world import Site, World, check_targets, retrain, sites, together
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.execution import Execution

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "do_nothing": [{}],
    "retrain": [{}],
    "gd": [{"epochs": 1.0, "lr": lr} for lr in (1e-2, 3e-2, 1e-1)],
    "ga": [{"epochs": 3.0, "lr": lr} for lr in (1e-3, 3e-3, 1e-2)],
    "ga_gd": [{"ascent_epochs": 2.0, "descent_epochs": 1.0, "lr": lr} for lr in (3e-3, 1e-2, 3e-2)],
    "scrub": [{"epochs": 2, "max_epochs": 1, "lr": lr} for lr in (3e-3, 1e-2, 3e-2)],
    "ssd": [{"alpha": a} for a in (5.0, 10.0, 25.0)],
    "oracle_matching": [{"cost": 0.1, "lr": lr} for lr in (1e-3, 3e-3, 1e-2)],
    "dm_direct": [{}],
    "dmm": [{"cost": 0.1, "lr": lr} for lr in (1e-3, 3e-3, 1e-2)],
}
"""Settings tried of each method, on honest requests of the attack's size."""

ATTACKS = {
    "ddpa_clean": "DDPA, clean labels",
    "ddpa_dirty": "DDPA, dirty labels",
    "random": "random, own points",
    "camouflage": "camouflage, target known",
    "honest_datamodel": "honest points, datamodel",
    "honest_gradient": "honest points, gradients",
    "never_trained": "never trained (unchecked)",
}


def splits(forget: np.ndarray, n_train: int, n_points: int) -> dict[str, np.ndarray]:
    """Positions of F, R and V."""
    return {
        "forget": forget,
        "retain": np.setdiff1d(np.arange(n_train), forget),
        "validation": np.arange(n_train, n_points),
    }


# --- geometry ------------------------------------------------------------------------------------------


def regions(world: World, subspace: Subspace, reach: float) -> dict[str, Region]:
    """Stable regions of the first two models' training loss along the subspace, and along as many of highest curvature.

    Radii are in multiples of how far the poison reaches, lengths those of the subspace's own metric.
    """
    s, known = world.s, world.known
    sharp = Subspace.of(known, known.x, known.y, subspace.k)
    cases = [(f"towards targets, model {i + 1}", subspace, i) for i in range(min(2, known.models.n_models))]
    cases += [("highest curvature, model 1", sharp, 0)]
    return {
        name: stable_region(
            space.loss(known.x, known.y, model),
            space.k,
            [reach * r for r in s.radii],
            s.tolerance,
            s.n_polyhedra,
            np.random.default_rng([s.seed, 2, model]),
        )
        for name, space, model in cases
    }


def reach(poison: Poison) -> float:
    """How far a whole group is to move the parameters: mean length of the groups' summed pulls."""
    pulls = [poison.coordinates[poison.group == i].sum(0) for i in range(len(poison.vertices))]
    return float(np.linalg.norm(pulls, axis=1).mean())


def energies(world: World, damping: float, x: Tensor, y: Tensor) -> np.ndarray:
    """Squared lengths (m,) of the gradients of margins, phi . A^-1 phi, at the models that the attacker knows."""
    metric = world.known.damped(damping)
    total = torch.zeros(len(x), device=x.device)
    for i in range(metric.models.n_models):
        g = gradients(metric.models, i, x, y)
        total += (g * metric.solve(i, g)).sum(1) / metric.models.n_models
    return total.cpu().numpy()


def covered(s: AdversarySettings) -> pd.DataFrame:
    """Volume of the regular simplex over its ball's: in closed form, and by sampling, a row a dimension."""
    rng = np.random.default_rng([s.seed, 3])
    rows = []
    for k in s.volume_ks:
        share, error = simplex.sampled_share(simplex.regular(k), s.volume_samples, rng)
        rows.append({"k": k, "theory": simplex.volume_share(k), "sampled": share, "error": 1.96 * error})
    return pd.DataFrame(rows)


# --- attacks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Requests of one attack, a target each.

    Attributes:
        attack: its name in `ATTACKS`.
        sites: what was trained, one for all targets or one a target.
        requests: training points to delete, a request a target.
        retrained: logits (T, n_models, n_points, n_classes) of models without them.
        effects: predicted changes of logits (T, n_points, n_classes), for the methods that go by a datamodel.
    """

    attack: str
    sites: list[Site]
    requests: list[np.ndarray]
    retrained: list[np.ndarray]
    effects: Sequence[np.ndarray]

    def site(self, t: int) -> Site:
        return self.sites[t % len(self.sites)]

    def problem(self, world: World, t: int) -> unlearn.Problem:
        """The unlearning problem of target number t, with copies of the originals: problems are solved in threads."""
        site = self.site(t)
        return unlearn.Problem(
            originals=site.originals.clone(),
            original_logits=site.logits,
            x=site.x,
            y=site.y,
            n_train=site.data.n_train,
            forget=self.requests[t],
            training=world.victim.training,
            attributor=Predicted(self.effects[t]),
            oracle_logits=self.retrained[t],
            seed=world.s.seed,
            execution=Execution(chunk=64),
        )


@dataclass(frozen=True)
class Predicted:
    """An attributor that was asked already: `change` (n_points, n_classes) is its answer for the one request."""

    change: np.ndarray

    def effect(self, forget: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.change


def fit_datamodel(world: World, site: Site) -> tuple[RidgeDatamodel, np.ndarray]:
    """A ridge datamodel on models of random halves of a site's training set, and their logits in the margin gauge."""
    s, n = world.s, site.data.n_train
    rng = np.random.default_rng([s.seed, 4])
    masks = rng.random((s.n_subsets, n)).argsort(1) < n // 2
    seeds = rng.integers(0, 2**31, s.n_subsets).tolist()
    logits = world.victim.train(site.x[:n], site.data.y_train, masks, seeds).logits(site.x).numpy()
    outputs = metrics.margin_gauge(logits, site.y.cpu().numpy())
    return RidgeDatamodel.fit(masks, outputs, s.ridge), outputs


def ddpa(
    world: World, poison: Poison, subspace: Subspace, targets: np.ndarray, size: int | None = None
) -> list[np.ndarray]:
    """DDPA's request for each target: training points to delete."""
    first = world.s.n - len(poison)
    coordinates = subspace.of_margins(*world.of_targets(targets))
    return [first + attacks.delete_groups(poison, c, size) for c in coordinates]


@dataclass(frozen=True)
class Crafted:
    """One kind of DDPA, as chosen on the tuning targets.

    Attributes:
        dirty: its labels.
        damping, angle: what was chosen.
        subspace: at the models that the attacker knows.
        poison: for it.
        tried: a row a setting: change of the tuning targets' margins after retraining, and how the pulls cancel.
    """

    dirty: bool
    damping: float
    angle: float
    subspace: Subspace
    poison: Poison
    tried: pd.DataFrame


def choose(world: World, dirty: bool) -> Crafted:
    """The damping and angle whose requests lower the tuning targets' margins most after retraining."""
    s = world.s
    spaces = {damping: world.subspace(s.k, damping) for damping in s.dampings}
    cases = [(damping, angle) for damping in s.dampings for angle in s.angles]

    def make(case: tuple[float, float]) -> Poison:
        return world.craft(spaces[case[0]], dirty=dirty, angle=case[1])

    poisons = [make(case) for case in cases]
    asked = [ddpa(world, p, spaces[damping], world.tuning) for p, (damping, _) in zip(poisons, cases, strict=True)]
    done = together(world, [(p.images, p.labels) for p in poisons], s.n_sweep, asked, s.n_sweep)
    changes = []
    for site, retrained in done:
        before, after = (_target_margins(site, z, world.tuning) for z in (site.logits[None], retrained))
        changes.append(float((after - before).mean()))
    best = int(np.argmin(changes))
    tried = pd.DataFrame(cases, columns=["damping", "angle"]).assign(
        **{"labels": "dirty" if dirty else "clean", "change of margin": changes},
        balance=[p.balance for p in poisons],
        alignment=[p.alignment for p in poisons],
    )
    damping, angle = cases[best]
    return Crafted(dirty, damping, angle, spaces[damping], poisons[best], tried)


def _target_margins(site: Site, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean margins (T,) of targets over models, logits (T or 1, n_models, n_points, n_classes)."""
    n, labels = site.data.n_train, site.data.y
    rows = range(len(targets))
    return np.array(
        [metrics.margins(logits[t % len(logits)][:, [n + targets[t]]], labels[[n + targets[t]]]).mean() for t in rows]
    )


@dataclass(frozen=True)
class Prepared:
    """Everything that requests are made from.

    Attributes:
        crafted: "ddpa_clean" and "ddpa_dirty".
        asked: attack -> its requests.
        places: the training sets "honest", "ddpa_clean" and "ddpa_dirty".
        datamodels: of each of them.
    """

    crafted: dict[str, Crafted]
    asked: dict[str, Asked]
    places: dict[str, Site]
    datamodels: dict[str, RidgeDatamodel]

    @property
    def poisons(self) -> dict[str, Poison]:
        return {attack: crafted.poison for attack, crafted in self.crafted.items()}


def prepare(world: World) -> Prepared:
    """Craft, train, choose requests for every target, and retrain for each of them."""
    s, targets = world.s, world.targets
    crafted = {"ddpa_clean": choose(world, dirty=False), "ddpa_dirty": choose(world, dirty=True)}
    poisons = {attack: c.poison for attack, c in crafted.items()}
    nobody = (world.data.x_train[:0], world.data.y_train[:0])
    made = sites(world, [nobody, *((p.images, p.labels) for p in poisons.values())], s.n_models)
    places = dict(zip(("honest", *poisons), made, strict=True))
    check_targets(places["honest"].logits, world.data.y, targets, s.n)
    fitted = {name: fit_datamodel(world, site) for name, site in places.items()}
    models = {name: model for name, (model, _) in fitted.items()}
    requests = {name: ddpa(world, c.poison, c.subspace, targets) for name, c in crafted.items()}
    sizes = [len(r) for r in requests["ddpa_dirty"]]
    rng = np.random.default_rng([s.seed, 5])
    dirty_own = places["ddpa_dirty"].own
    requests["random"] = [np.sort(rng.choice(dirty_own, size, replace=False)) for size in sizes]
    honest, everyone = places["honest"], np.arange(s.n)
    by_datamodel = attacks.datamodel_influence(models["honest"], fitted["honest"][1], honest.data.y, s.n + targets)
    by_gradient = world.known.influence(*world.of_targets(targets))
    for name, influence in (("honest_datamodel", by_datamodel), ("honest_gradient", by_gradient)):
        requests[name] = [attacks.most_harmful(row, size, everyone) for row, size in zip(influence, sizes, strict=True)]
    homes = {"random": "ddpa_dirty", "honest_datamodel": "honest", "honest_gradient": "honest"}
    asked = {}
    for name, wanted in requests.items():
        home = homes.get(name, name)
        after = retrain(world, places[home], wanted, s.n_models)
        asked[name] = Asked(name, [places[home]], wanted, list(after), list(models[home].effects(wanted)))
    asked["camouflage"] = camouflage(world)
    asked["never_trained"] = never_trained(world, honest, asked["camouflage"])
    return Prepared(crafted, asked, places, models)


def camouflage(world: World) -> Asked:
    """Poison for each target alone: the simplex of k = 1, whose two groups pull its margin down, and up.

    While both are there they cancel; the request deletes the one that holds the target up. Hidden poison of Di et al.,
    "Hidden Poison: Machine Unlearning Enables Camouflaged Poisoning Attacks" (NeurIPS 2023), in the notation of DDPA.
    """
    s = world.s
    x, y = world.of_targets(world.targets)

    def make(t: int) -> tuple[Poison, np.ndarray]:
        line = Subspace.of(world.known, x[[t]], y[[t]], 1)
        poison = world.craft(line, dirty=False, angle=0.0)
        own = attacks.delete_groups(poison, line.of_margins(x[[t]], y[[t]])[0])
        return poison, s.n - len(poison) + own

    poisons, requests = zip(*(make(t) for t in range(len(world.targets))), strict=True)
    pairs = [(p.images, p.labels) for p in poisons]
    done = together(world, pairs, s.n_models, [[r] for r in requests], s.n_models)
    made = [site for site, _ in done]
    effects = kernel_effects(world, made, pairs, requests)
    return Asked("camouflage", made, list(requests), [after[0] for _, after in done], effects)


def kernel_effects(
    world: World,
    made: Sequence[Site],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    requests: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Each request's effect by a gradient kernel at some of its site's originals, scaled on a few subset models.

    A ridge datamodel needs a thousand subset models a training set, which nobody can train for every target.
    """
    s, n = world.s, world.s.n
    rng = np.random.default_rng([s.seed, 6])
    masks = rng.random((s.camouflage_subsets, n)).argsort(1) < n // 2
    out = [np.flatnonzero(~mask) for mask in masks]
    subset = together(world, pairs, 0, [out for _ in made], 1, seed=40_000)

    effects = []
    for site, (_, outputs), forget in zip(made, subset, requests, strict=True):
        gauged = metrics.margin_gauge(outputs[:, 0], site.y.cpu().numpy())
        context = attribution.Context(site.x, site.y, masks, gauged, originals=site.originals)
        fitted = attribution.fit("kernel", context, residual="mean", at="originals", n_models=2)
        effects.append(fitted.effect(forget))
    return effects


def never_trained(world: World, honest: Site, camouflaged: Asked) -> Asked:
    """Requests for points that hold a target up and were never contributed: an unchecked service "forgets" them.

    In the manner of "unlearn and burn". They are the points that `camouflage` would ask to delete, and stand behind the
    training points, in no model's training set, so that retraining without them is training again.
    """
    s, data = world.s, honest.data
    again = world.victim.train(
        honest.x[: s.n], data.y_train, np.ones((s.n_models, s.n), bool), [30_000 + i for i in range(s.n_models)]
    )
    made, requests, retrained = [], [], []
    for t, forget in enumerate(camouflaged.requests):
        poisoned = camouflaged.site(t).data
        extended = replace(
            data,
            x_train=np.concatenate([data.x_train, poisoned.x_train[forget]]),
            y_train=np.concatenate([data.y_train, poisoned.y_train[forget]]),
        )
        x = world.victim.points(extended.x)
        made.append(Site(extended, np.zeros(0, int), x, honest.originals, honest.originals.logits(x).numpy()))
        requests.append(s.n + np.arange(len(forget)))
        retrained.append(again.logits(x).numpy())
    none = [np.zeros(site.logits.shape[1:], np.float32) for site in made]  # no subset held them: no column, no effect
    return Asked("never_trained", made, requests, retrained, none)


def threads(world: World) -> Execution:
    """One request a thread: many small jobs keep cores busier than shared steps do.

    Not for what takes forward-mode derivatives, of which torch keeps one level for all threads.
    """
    return Execution(chunk=1, workers=world.victim.execution.workers)


# --- methods -------------------------------------------------------------------------------------------


def choose_options(world: World, prepared: Prepared) -> tuple[dict[str, dict[str, Any]], pd.DataFrame]:
    """Each method's setting: the one nearest to retraining on an honest request of the attack's size.

    The request is a class-pure set of images alike, from the site without poison. Distance: mean over F, R and V of the
    mean absolute difference of mean margins to retrained models. No target plays a part.
    """
    s, site = world.s, prepared.places["honest"]
    size = round(np.mean([len(r) for r in prepared.asked["ddpa_dirty"].requests]))
    forget = album(world, size, np.random.default_rng([s.seed, 7]))
    retrained = retrain(world, site, [forget], 2 * s.n_models)
    effects = list(prepared.datamodels["honest"].effects([forget]))
    asked = Asked("search", [site], [forget], list(retrained[:, : s.n_models]), effects)
    goal = metrics.margins(retrained[0, s.n_models :], site.data.y).mean(0)
    parts = splits(forget, s.n, len(goal))
    tried = [(method, setting) for method, grid in OPTIONS.items() for setting in grid if len(grid) > 1]

    def distance(case: tuple[str, dict[str, Any]]) -> float:
        done = unlearn.get(case[0])(asked.problem(world, 0), **case[1]).margins.mean(0)
        gap = np.nan_to_num(np.abs(done - goal), nan=1e3, posinf=1e3)
        return float(np.mean([gap[part].mean() for part in parts.values()]))

    scores = list(threads(world).run(distance, tried))
    table = pd.DataFrame(
        {"method": m, "setting": str(o), "distance": d} for (m, o), d in zip(tried, scores, strict=True)
    )
    best: dict[str, dict[str, Any]] = {method: grid[0] for method, grid in OPTIONS.items()}
    for method in table["method"].unique():
        rows = [i for i, (name, _) in enumerate(tried) if name == method]
        best[method] = tried[min(rows, key=lambda i: scores[i])][1]
    return best, table


def album(world: World, size: int, rng: np.random.Generator) -> np.ndarray:
    """An honest user's images: a random one of the service's points, and its nearest neighbours of its class."""
    x, y = world.known.x.flatten(1).cpu().numpy(), world.data.y_train
    first = int(rng.integers(len(x)))
    same = np.flatnonzero(y == y[first])
    order = np.argsort(((x[same] - x[first]) ** 2).sum(1), kind="stable")
    return np.sort(same[order[:size]])


def serve(world: World, asked: Asked, options: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Every method on every request: a row an attack, method, target and model.

    Columns: attack, method, target, model, size, error and margin at the target, accuracy on V without the targets, the
    same three before the request, and cost.
    """
    others = np.setdiff1d(np.arange(world.data.n_val), world.targets)

    def one(t: int) -> list[pd.DataFrame]:
        problem, site = asked.problem(world, t), asked.site(t)
        n, target = site.data.n_train, world.targets[t]
        before = unlearn.get("do_nothing")(problem)
        parts = []
        for method, setting in options.items():
            done = unlearn.get(method)(problem, **setting)
            columns = {"attack": asked.attack, "method": method, "target": int(target), "size": len(problem.forget)}
            columns |= {"cost": done.cost, "model": np.arange(problem.n_models)}
            for when, result in (("", done), (" before", before)):
                columns |= {
                    f"error{when}": ~result.correct[:, n + target],
                    f"margin{when}": result.margins[:, n + target],
                    f"accuracy{when}": result.correct[:, n + others].mean(1),
                }
            parts.append(pd.DataFrame(columns))
        return parts

    tables = threads(world).run(one, list(range(len(asked.requests))))
    return pd.concat([part for parts in tables for part in parts], ignore_index=True)


def interval(table: pd.DataFrame, column: str, n_bootstrap: int = 500, seed: int = 0) -> metrics.Estimate:
    """Mean of a column with a 95 % interval: targets and models are both resampled."""
    values = table.pivot_table(index="target", columns="model", values=column, aggfunc="first").to_numpy(float)
    rng = np.random.default_rng(seed)
    t, m = values.shape
    draws = [values[np.ix_(rng.integers(0, t, t), rng.integers(0, m, m))].mean() for _ in range(n_bootstrap)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return metrics.Estimate(float(values.mean()), float(low), float(high))


def summary(served: pd.DataFrame) -> pd.DataFrame:
    """A row an attack and method: success, drop of the margin and of accuracy with intervals, spread over models.

    "spread": standard deviation, over models, of the share of targets that a model errs on.
    """
    rows = []
    for (attack, method), part in served.groupby(["attack", "method"], sort=False):
        part = part.assign(change=part["margin"] - part["margin before"])
        part = part.assign(lost=part["accuracy"] - part["accuracy before"])
        row: dict[str, Any] = {"attack": attack, "method": method, "n_targets": part["target"].nunique()}
        for name, column in (("success", "error"), ("before", "error before"), ("change", "change"), ("lost", "lost")):
            e = interval(part, column)
            row |= {name: e.value, f"{name} low": e.low, f"{name} high": e.high}
        by_model = part.groupby("model")["error"].mean()
        row |= {"spread": float(by_model.std(ddof=1)), "accuracy": float(part["accuracy"].mean())}
        rows.append(row | {"size": float(part["size"].mean()), "cost": float(part["cost"].mean())})
    return pd.DataFrame(rows)


def klom(world: World, prepared: Prepared, options: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """KLoM's p95 a split of the request for the first target, with many models: a row an attack and method."""
    s = world.s
    rows = []
    for attack in ("ddpa_dirty", "honest_datamodel", "camouflage"):
        small = prepared.asked[attack]
        site, forget = small.site(0), small.requests[0]
        pair = (site.data.x_train[site.own], site.data.y_train[site.own])
        ((large, after),) = together(world, [pair], s.n_klom, [[forget, forget]], s.n_klom)
        asked = Asked(attack, [large], [forget], [after[0]], small.effects[:1])
        oracle = metrics.margins(after[1], large.data.y)
        parts = splits(forget, large.data.n_train, len(large.x))

        def one(case: tuple[str, dict[str, Any]], asked: Asked = asked) -> np.ndarray:
            return unlearn.get(case[0])(asked.problem(world, 0), **case[1]).margins

        for method, margins in zip(options, threads(world).run(one, list(options.items())), strict=True):
            found = metrics.klom_summary(margins, oracle, parts, n_bootstrap=20)
            for split, statistics in found.items():
                e = statistics["p95"]
                rows.append({"attack": attack, "method": method, "split": split} | vars(e))
    return pd.DataFrame(rows)


# --- what the attack depends on ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way of attacking; equal ones are run once."""

    dirty: bool
    share: float
    epsilon: int
    k: int
    size: int | None = None
    white: bool = True


def sweep(world: World, prepared: Prepared) -> pd.DataFrame:
    """Success of retraining after DDPA's request while one thing varies: a row a label, quantity, value, target, model.

    "surrogate" stands for crafting and planning on models of other seeds and other data.
    """
    s, targets = world.s, world.targets
    chosen = {c.dirty: c for c in prepared.crafted.values()}
    named: list[tuple[str, float, Case]] = []
    for dirty in chosen:
        usual = Case(dirty, s.share, s.epsilon, s.k)
        named += [("share", v, replace(usual, share=v)) for v in sorted({*s.shares, s.share}) if round(v * s.n) > s.k]
        named += [("bound", v, replace(usual, epsilon=v)) for v in sorted({*s.epsilons, s.epsilon})]
        named += [("k", v, replace(usual, k=v)) for v in sorted({*s.ks, s.k})]
        named += [("points deleted", v, replace(usual, size=v)) for v in s.sizes]
        named += [("surrogate", 1, replace(usual, white=False))]
    cases = list(dict.fromkeys(case for *_, case in named))
    spaces = {
        (dirty, k, white): world.subspace(k, chosen[dirty].damping, white)
        for dirty, k, white in dict.fromkeys((c.dirty, c.k, c.white) for c in cases)
    }

    def make(case: Case) -> tuple[Poison, list[np.ndarray]]:
        space, its = spaces[case.dirty, case.k, case.white], chosen[case.dirty]
        if replace(case, size=None) == Case(case.dirty, s.share, s.epsilon, s.k):
            poison = its.poison
        else:
            poison = world.craft(space, dirty=case.dirty, angle=its.angle, share=case.share, epsilon=case.epsilon)
        return poison, ddpa(world, poison, space, targets, case.size)

    made = [make(case) for case in cases]
    done = together(
        world, [(p.images, p.labels) for p, _ in made], s.n_sweep, [r for _, r in made], s.n_sweep, seed=50_000
    )
    tables = {}
    for case, (poison, requests), (site, after) in zip(cases, made, done, strict=True):
        n, y = site.data.n_train, site.data.y
        parts = []
        for t, target in enumerate(targets):
            at = [n + target]
            parts.append(
                pd.DataFrame(
                    {"target": target, "size": len(requests[t]), "model": np.arange(s.n_sweep)}
                    | {"error": ~metrics.correct(after[t][:, at], y[at])[:, 0], "balance": poison.balance}
                    | {"margin": metrics.margins(after[t][:, at], y[at])[:, 0]}
                    | {"margin before": metrics.margins(site.logits[:, at], y[at])[:, 0].mean()}
                    | {"error before": (~metrics.correct(site.logits[:, at], y[at])).mean()}
                    | {"accuracy before": metrics.correct(site.logits[:, n:], y[n:]).mean()}
                )
            )
        tables[case] = pd.concat(parts, ignore_index=True)
    return pd.concat(
        [
            tables[case].assign(labels="dirty" if case.dirty else "clean", varies=varies, value=value)
            for varies, value, case in named
        ],
        ignore_index=True,
    )


def sweep_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Success and change of margin with intervals, a row a label, quantity and value."""
    rows = []
    for (labels, varies, value), part in table.groupby(["labels", "varies", "value"], sort=False):
        part = part.assign(change=part["margin"] - part["margin before"])
        row: dict[str, Any] = {"labels": labels, "varies": varies, "value": value, "size": part["size"].mean()}
        for name, column in (("success", "error"), ("change", "change")):
            e = interval(part, column)
            row |= {name: e.value, f"{name} low": e.low, f"{name} high": e.high}
        row |= {"before": part["error before"].mean(), "accuracy before": part["accuracy before"].mean()}
        rows.append(row | {"balance": part["balance"].mean()})
    return pd.DataFrame(rows)


def sequence(world: World, prepared: Prepared) -> pd.DataFrame:
    """Several targets one after another from the same dirty-label poison: a row a place in the sequence and target.

    Each asks for an equal part of the poison, from what earlier ones left. After each request all targets so far are
    looked at, with retrained models: "error" is that of the target asked for last, "first" that of the first one.
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
    after = retrain(world, site, requests, s.n_sweep, seed=60_000)
    n, y = site.data.n_train, site.data.y
    rows = []
    for i, z in enumerate(after):
        row, place = divmod(i, s.sequence)
        for name, position in (("last", groups[row, place]), ("first", groups[row, 0])):
            at = [n + world.targets[position]]
            wrong, was = ~metrics.correct(z[:, at], y[at]), ~metrics.correct(site.logits[:, at], y[at])
            margins = metrics.margins(z[:, at], y[at]).mean() - metrics.margins(site.logits[:, at], y[at]).mean()
            rows.append(
                {"place": place + 1, "looked at": name, "error": wrong.mean(), "before": was.mean()}
                | {"change": float(margins), "deleted": len(requests[i])}
            )
    return pd.DataFrame(rows)


# --- defence -------------------------------------------------------------------------------------------


def defence(world: World, prepared: Prepared) -> pd.DataFrame:
    """Scores of attacks' requests and of as many honest ones of the same size, a row a request.

    Honest requests are of two kinds: random points, and images alike (`album`). The service knows neither who is honest
    nor the attacker's models: it scores with a datamodel and originals of its own training set.
    """
    s = world.s
    rng = np.random.default_rng([s.seed, 8])
    monitors = {}
    for name, site in prepared.places.items():
        n = site.data.n_train
        metric = Metric.at(site.originals[:4], site.x[:n], site.y[:n], s.damping)
        monitors[name] = service.Monitor.of(prepared.datamodels[name], metric, site.data.y, s.seed)
    size = round(np.mean([len(r) for r in prepared.asked["ddpa_dirty"].requests]))
    rows = []

    def add(place: str, kind: str, malicious: bool, requests: Sequence[np.ndarray]) -> None:
        for z in monitors[place].scores(requests):
            rows.append(
                {"site": place, "request": kind, "malicious": malicious}
                | dict(zip((*service.COMPONENTS, "score"), z, strict=True))
            )

    for place, site in prepared.places.items():
        honest = site.data.n_train - len(site.own)
        add(
            place, "honest, random", False,
            [np.sort(rng.choice(honest, size, replace=False)) for _ in range(s.n_honest)],
        )  # fmt: skip
        alike = [a[a < honest] for a in (album(world, size, rng) for _ in range(s.n_honest))]
        add(place, "honest, images alike", False, alike)
    for attack in ("ddpa_clean", "ddpa_dirty", "random", "honest_datamodel", "honest_gradient"):
        asked = prepared.asked[attack]
        place = next(name for name, site in prepared.places.items() if site is asked.sites[0])
        add(place, attack, True, asked.requests)
    return pd.DataFrame(rows)


def detection(scores: pd.DataFrame) -> pd.DataFrame:
    """Area under the ROC of each component and of the score, against each kind of honest request of the same site."""
    rows = []
    for (place, attack), part in scores[scores["malicious"]].groupby(["site", "request"], sort=False):
        for kind in scores.loc[~scores["malicious"], "request"].unique():
            honest = scores[(scores["site"] == place) & (scores["request"] == kind)]
            row: dict[str, Any] = {"attack": attack, "against": kind, "n": len(part), "n_honest": len(honest)}
            for name in (*service.COMPONENTS, "score"):
                row[name] = service.roc(honest[name].to_numpy(), part[name].to_numpy())[2]
            false, true, _ = service.roc(honest["score"].to_numpy(), part["score"].to_numpy())
            rows.append(row | {"detected at 5 %": float(true[false <= 0.05].max())})
    return pd.DataFrame(rows)


def refusals(world: World, prepared: Prepared) -> pd.DataFrame:
    """What the service answers to each kind of request: served, or the reason why not, a row a kind."""
    site, asked = prepared.places["ddpa_dirty"], prepared.asked
    poison = prepared.poisons["ddpa_dirty"]
    own = asked["ddpa_dirty"].requests[0]
    phantom = asked["never_trained"]
    extra, where = phantom.site(0).data, phantom.requests[0]
    base, labels = poison.bases[:5], poison.labels[:5]
    cases = {
        "DDPA: its own points": (site.data.x_train[own], site.data.y_train[own]),
        "honest points of others": (site.data.x_train[:5], site.data.y_train[:5]),
        "points that were never contributed": (extra.x_train[where], extra.y_train[where]),
        "its own points before their pixels were changed": (base, labels),
        "its own points under other labels": (site.data.x_train[own], (site.data.y_train[own] + 1) % 10),
    }
    rows = []
    for kind, (images, given) in cases.items():
        try:
            found = service.resolve(site.data, images, given, site.own)
            answer = f"served: {len(found)} points"
        except service.ForgetSetError as error:
            answer = f"refused: {error}"
        rows.append({"request": kind, "answer": answer})
    return pd.DataFrame(rows)


def burned(world: World, prepared: Prepared) -> tuple[int, int]:
    """How many of the never-trained requests the service refuses, and how many there are."""
    phantom = prepared.asked["never_trained"]
    refused = 0
    for t, forget in enumerate(phantom.requests):
        data = phantom.site(t).data
        try:
            service.resolve(prepared.places["honest"].data, data.x_train[forget], data.y_train[forget])
        except service.ForgetSetError:
            refused += 1
    return refused, len(phantom.requests)


def costs(world: World, prepared: Prepared) -> pd.DataFrame:
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
            {"attack": "DDPA", "once": knowing + crafting(s.k), "a target": gradient},
            {"attack": "camouflage", "once": knowing, "a target": crafting(1) + gradient},
            {"attack": "honest points, gradients", "once": knowing, "a target": gradient + s.n_known * s.n / one},
            {"attack": "honest points, datamodel", "once": s.n_subsets / 2, "a target": 0.0},
            {"attack": "random", "once": 0.0, "a target": 0.0},
        ]
    )
