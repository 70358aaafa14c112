"""What notebook 09 runs: ensembles, attribution, tuning, every method on every forget set, and the answers' tables."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError
from dmmlib.metrics import Estimate
from dmmlib.studies.multimodal import attribution, methods
from dmmlib.studies.multimodal.attribution import Profiles, moved
from dmmlib.studies.multimodal.bench import TASKS
from dmmlib.studies.multimodal.measures import Judged, judge, judged, over_people
from dmmlib.studies.multimodal.methods import Task
from dmmlib.studies.multimodal.people import IMAGE, TEXT
from dmmlib.studies.multimodal.world import World

SETS = ("forget", "test", "retain", "public")
WITH = {"image": IMAGE, "text": TEXT}
VARIANTS = tuple(f"{method}:{data}" for method in methods.GRADIENT for data in WITH)
Setting = tuple[float, float]  # learning rate, and share of a retraining that matching spends
METHODS = ("do_nothing", "retrain", *VARIANTS, "prompting", "oracle_matching", "dm_direct", "dmm")


@dataclass(frozen=True)
class Results:
    """What was found.

    Attributes:
        known: accuracy of the originals on training questions, a row a task and modality.
        klom: a row a forget set, method, set of questions and statistic, with its 95 % interval over models, and cost.
        scores: a row a forget set, method and question, averaged over models: score, factual, and the mean margin.
        chosen: method -> learning rate, and share of a retraining for matching, that the tuning people chose.
        tried: method, rate, cost -> KLoM on the tuning people, on each of the four sets and over them, and
        attributions: how well each predicts what leaving those out changes; see `tune`.
        effects: predicted and true change of each question's mean margin, a row a question about forgotten people.
        seconds: what took how long.
    """

    known: pd.DataFrame
    klom: pd.DataFrame
    scores: pd.DataFrame
    chosen: dict[str, Setting]
    tried: pd.DataFrame
    attributions: pd.DataFrame
    effects: pd.DataFrame
    seconds: dict[str, float] = field(default_factory=dict)


def subset_masks(world: World) -> np.ndarray:
    """Random subsets of people, all of one size: bool (M, n_people)."""
    s, n = world.s, len(world.people)
    size = min(n - 1, max(1, round(s.fraction * n)))
    rng = np.random.default_rng([s.seed, 2])
    return np.argsort(rng.random((s.n_subsets, n)), 1).argsort(1) < size


def attribute(world: World) -> dict[str, Profiles]:
    """Fine-tune models on random subsets of people, and attribute what they answer to people; see `attribution.fit`."""
    masks = subset_masks(world)
    models = world.fine_tuned("subsets", masks)
    outputs = world.logits(models, np.arange(len(world.questions)))
    return attribution.fit(world, masks, outputs, models[: world.s.kernel_models])


def mean_change(world: World, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What some models' logits (n_models, n, A, V) on the first n questions are moved by on average to become others'.

    Returns:
        (n, A, V), in the margin gauge.
    """
    right = world.right[: before.shape[1]].cpu().numpy().ravel()
    means = [metrics.margin_gauge(z.reshape(len(z), len(right), -1), right).mean(0) for z in (before, after)]
    return np.asarray(means[1] - means[0]).reshape(before.shape[1:])


def known(world: World, originals: Ensemble) -> pd.DataFrame:
    """What the originals know of what they were taught: score a task and modality, mean over models and questions."""
    taught = np.arange(world.n_taught)
    found = judge(world, originals, taught)
    rows = []
    for task in TASKS:
        for modality in WITH.values():
            here = (world.task[taught] == task) & (world.modality[taught] == modality)
            private = here & (world.split[taught] == "train")
            rows.append(
                {
                    "task": task,
                    "modality": modality,
                    "private": float(found.scores[:, private].mean()),
                    "public": float(found.scores[:, here & ~private].mean()),
                    "factual": float(np.nanmean(found.factual[:, private])) if task == "generation" else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def unlearned(task: Task, name: str, setting: Setting) -> tuple[Ensemble, float]:
    """Models that a method leaves, and its cost; for methods that train."""
    method, _, data = name.partition(":")
    if method in methods.GRADIENT:
        return methods.gradient(task, method, WITH[data], setting[0])
    return methods.match(task, method, *setting)


def tune(
    world: World, originals: Ensemble, logits: np.ndarray, attributions: dict[str, Profiles]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is chosen on the tuning people, who are in no reported forget set, against models without them.

    Oracle matching is tried with those same models' mean; on reported sets it gets others'.

    Returns:
        Every setting of every method, with mean KLoM on each set and over the four; and every attribution with the
        mean KLoM of DM-direct on each set, the correlation of predicted with true changes of forgotten people's
        margins, and the slope of predicted on true ones.
    """
    s, n = world.s, world.n_taught
    oracles = world.fine_tuned("retrained:tuning", world.without(world.tuning, s.n_models))
    sets = world.sets(world.tuning)
    asked = np.concatenate(list(sets.values()))
    places = {name: np.flatnonzero(np.isin(asked, part)) for name, part in sets.items()}
    every = world.logits(oracles, np.arange(len(world.questions)))
    reference, before = (world.margins(z[:, asked], asked) for z in (every, logits))
    changes = {name: found.change(world.tuning) for name, found in attributions.items()}
    changes["true mean change"] = mean_change(world, logits, every)
    compared = []
    for name, change in changes.items():
        margins = world.margins(moved(world, logits[:, asked], change[asked], asked), asked)
        each, ours = metrics.klom(margins, reference), places["forget"]
        predicted, true = (m.mean(0)[ours] - before.mean(0)[ours] for m in (margins, reference))
        compared.append(
            {"attribution": name}
            | {"correlation": np.corrcoef(predicted, true)[0, 1], "slope": float(predicted @ true / (true @ true))}
            | {split: float(each[part].mean()) for split, part in places.items()}
        )
    matched = {"dmm": changes["Bayesian"][:n], "oracle_matching": changes["true mean change"][:n]}
    task = Task(world, originals, logits[:, :n], world.tuning, matched, tried=s.tuning_models)
    tries = [(name, (lr, 0.0)) for name in VARIANTS for lr in s.lrs]
    tries += [(name, (lr, cost)) for name in methods.MATCHING for lr in s.match_lrs for cost in s.costs]
    rows = []
    for number, (name, setting) in enumerate(tries):
        models, _ = unlearned(task, name, setting)
        margins = world.margins(world.logits(models, asked), asked)
        sound = np.isfinite(margins).all()
        each = metrics.klom(margins, reference) if sound else np.full(len(asked), np.inf)
        on = {split: float(each[part].mean()) for split, part in places.items()}
        rows.append(
            {"method": name, "rate": setting[0], "cost": setting[1]} | on | {"klom": np.mean(list(on.values()))}
        )
        world.progress("tune", number + 1, len(tries))
    return pd.DataFrame(rows), pd.DataFrame(compared)


def run(world: World) -> Results:
    """Everything that notebook 09 shows.

    Raises:
        DataError: if the world has fewer than four models of a kind, or tuning or the kernel wants more than there are.
    """
    s = world.s
    if s.n_models < 4 or not 4 <= s.tuning_models <= s.n_models:
        raise DataError(
            f"n_models={s.n_models} and tuning_models={s.tuning_models}; give 4 or more, and no more to tune on than "
            "there are."
        )
    if not 1 <= s.kernel_models <= s.n_subsets:
        raise DataError(
            f"kernel_models={s.kernel_models} of {s.n_subsets} subset models; give at least 1 and at most n_subsets."
        )
    clock, last = {}, time.monotonic()

    def stamp(what: str) -> None:
        nonlocal last
        clock[what], last = time.monotonic() - last, time.monotonic()

    originals = world.fine_tuned("originals", np.ones((s.n_models, len(world.people)), bool))
    stamp("originals")
    logits = world.logits(originals, np.arange(len(world.questions)))
    learnt = known(world, originals)
    stamp("what originals know")
    attributions = attribute(world)
    stamp("attribution")
    tried, compared = tune(world, originals, logits, attributions)
    best = tried.loc[tried.groupby("method")["klom"].idxmin()]
    chosen = {method: (float(lr), float(cost)) for method, lr, cost in best[["method", "rate", "cost"]].to_numpy()}
    stamp("tuning")
    klom: list[dict[str, Any]] = []
    scores: list[pd.DataFrame] = []
    effects: list[pd.DataFrame] = []
    for number, (name, forget) in enumerate(world.forget_sets.items()):
        found = _forget(world, name, forget, originals, logits, attributions["Bayesian"], chosen)
        for part, rows in zip((klom, scores, effects), found, strict=True):
            part.extend(rows)  # type: ignore[attr-defined]
        world.progress("forget", number + 1, len(world.forget_sets))
        stamp(f"forget {name}")
    return Results(learnt, pd.DataFrame(klom), pd.concat(scores), chosen, tried, compared, pd.concat(effects), clock)


def _forget(
    world: World,
    name: str,
    forget: np.ndarray,
    originals: Ensemble,
    logits: np.ndarray,
    attributed: Profiles,
    chosen: dict[str, Setting],
) -> tuple[list[dict[str, Any]], list[pd.DataFrame], list[pd.DataFrame]]:
    """Every method on one forget set."""
    s, n = world.s, world.n_taught
    retrained = world.fine_tuned(f"retrained:{name}", world.without(forget, 2 * s.n_models))
    oracles, floor = retrained[: s.n_models], retrained[s.n_models :]
    sets = world.sets(forget)
    asked = np.concatenate(list(sets.values()))
    places = {split: np.flatnonzero(np.isin(asked, part)) for split, part in sets.items()}
    for split in list(places):
        for data, modality in WITH.items():
            places[f"{split}, {data}"] = places[split][world.modality[asked[places[split]]] == modality]
    reference = world.margins(world.logits(oracles, asked), asked)
    change = attributed.change(forget)
    true = mean_change(world, logits[:, :n], world.logits(floor, np.arange(n)))
    task = Task(world, originals, logits[:, :n], forget, {"dmm": change[:n], "oracle_matching": true})
    klom: list[dict[str, Any]] = []
    scores: list[pd.DataFrame] = []

    def answered(method: str) -> tuple[Judged, float]:
        if method == "do_nothing":
            return judge(world, originals, asked), 0.0
        if method == "retrain":
            return judge(world, floor, asked), 1.0
        if method == "prompting":
            return judge(world, originals, asked, instructed=True), 0.0
        if method == "dm_direct":
            return judged(world, moved(world, logits[:, asked], change[asked], asked), asked), 0.0
        models, cost = unlearned(task, method, chosen[method])
        return judge(world, models, asked), cost

    for method in METHODS:
        found, cost = answered(method)
        head = {"forget_set": name, "method": method}
        summary = metrics.klom_summary(found.margins, reference, places, seed=s.seed)
        klom += [
            head | {"split": split, "statistic": f"klom_{statistic}", "cost": cost} | asdict(e)
            for split, statistics in summary.items()
            for statistic, e in statistics.items()
        ]
        columns = {
            "set": np.concatenate([np.full(len(part), split) for split, part in sets.items()]),
            "task": world.task[asked],
            "modality": world.modality[asked],
            "person": [world.questions[i].person for i in asked],
            "score": found.scores.mean(0),
            "factual": found.factual.mean(0),
            "margin": found.margins.mean(0),
        }
        scores.append(pd.DataFrame(head | columns))
    ours = np.concatenate([sets["forget"], sets["test"]])
    predicted = world.margins(moved(world, logits[:, ours], change[ours], ours), ours).mean(0)
    before = world.margins(logits[:, ours], ours).mean(0)
    after = reference[:, np.isin(asked, ours)].mean(0)
    effects = pd.DataFrame(
        {"forget_set": name, "set": world.split[ours], "modality": world.modality[ours]}
        | {"predicted": predicted - before, "true": after - before}
    )
    return klom, scores, [effects]


# --- tables --------------------------------------------------------------------------------------------


def score_table(scores: pd.DataFrame, column: str = "score") -> pd.DataFrame:
    """Scores by method, set, task and modality over all forget sets, with 95 % t-intervals over people.

    Args:
        scores: of `Results`.
        column: "score", or "factual", which only free answers have.
    """
    rows = []
    scored = scores if column == "score" else scores[scores["task"] == "generation"]
    for (method, split, task, modality), part in scored.groupby(["method", "set", "task", "modality"], sort=False):
        e = over_people(part[column].to_numpy(float), part["person"].to_numpy())
        rows.append(
            {"method": method, "set": split, "task": task, "modality": modality}
            | {"value": e.value, "low": e.low, "high": e.high, "people": part["person"].nunique()}
        )
    return pd.DataFrame(rows)


def text_against_image(scores: pd.DataFrame) -> pd.DataFrame:
    """Score on forgotten people after unlearning on text minus that after unlearning on portraits with text.

    Below 0: text alone forgets more. The paper finds that in generation and cloze; in classification with images, the
    opposite. A row a gradient method, set (forget, test), task and modality of the question; "all" is the mean over
    the gradient methods. 95 % t-intervals over people.
    """
    keys = ["forget_set", "set", "task", "modality", "person"]
    wide = scores[scores["set"].isin(["forget", "test"])].pivot_table(
        index=keys, columns="method", values="score", aggfunc="mean"
    )
    gaps = pd.DataFrame({m: wide[f"{m}:text"] - wide[f"{m}:image"] for m in methods.GRADIENT})
    gaps["all"] = gaps.mean(axis="columns")
    rows = []
    for (split, task, modality), part in gaps.groupby(["set", "task", "modality"], sort=False):
        for method in gaps:
            e = over_people(part[method].to_numpy(float), part.index.get_level_values("person").to_numpy())
            rows.append(
                {"method": method, "set": split, "task": task, "modality": modality, "people": len(part)}
                | {"value": e.value, "low": e.low, "high": e.high}
            )
    return pd.DataFrame(rows)


def klom_over_sets(klom: pd.DataFrame, statistic: str = "klom_mean") -> pd.DataFrame:
    """Mean KLoM over the forget sets, a row a method and set; "all" is the mean of the four sets, as rates are chosen.

    The interval is as wide as a forget set's is on average: they share the originals, so they do not average out.
    """
    rows = []
    here = klom[klom["statistic"] == statistic]
    for (method, split), part in here.groupby(["method", "split"], sort=False):
        value, error = part["value"].mean(), (part["high"] - part["value"]).mean()
        rows.append(
            {"method": method, "split": split, "value": value, "low": max(0.0, value - error), "high": value + error}
            | {"cost": part["cost"].mean()}
        )
    table = pd.DataFrame(rows)
    overall = table[table["split"].isin(SETS)].groupby("method", sort=False)[["value", "low", "high", "cost"]].mean()
    return pd.concat([table, overall.reset_index().assign(split="all")], ignore_index=True)


def utility_gap(scores: pd.DataFrame) -> dict[str, Estimate]:
    """Score on retained and public people minus that after retraining, a method, with intervals over people."""
    kept = scores[scores["set"].isin(["retain", "public"])]
    wide = kept.pivot_table(index=["forget_set", "task", "modality", "person"], columns="method", values="score")
    person = wide.index.get_level_values("person").to_numpy()
    return {
        m: over_people((wide[m] - wide["retrain"]).to_numpy(float), person)
        for m in METHODS
        if m in wide and m != "retrain"
    }
