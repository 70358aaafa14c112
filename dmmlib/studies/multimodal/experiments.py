"""What notebook 09 runs: ensembles, attribution, tuning, every method on every forget set, and the answers' tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from dmmlib import metrics
from dmmlib.ensemble import Ensemble
from dmmlib.studies.multimodal import attribution
from dmmlib.studies.multimodal.attribution import Change, mean_change, moved
from dmmlib.studies.multimodal.measures import Judged, judge, judged, over_people
from dmmlib.studies.multimodal.methods import GRADIENT, MATCHING, VARIANTS, WITH, Setting, Task, unlearn
from dmmlib.studies.multimodal.world import World

SETS = ("forget", "test", "retain", "public")
METHODS = ("do_nothing", "retrain", *VARIANTS, "prompting", "oracle_matching", "dm_direct", "dmm")


@dataclass(frozen=True)
class Results:
    """What was found."""

    known: pd.DataFrame  # scores of the originals on training questions, for each task and modality
    distances: pd.DataFrame  # for each forget set, method, set of questions and statistic, with its interval, and cost
    scores: pd.DataFrame  # for each forget set, method and question: score, averaged over models
    chosen: dict[str, Setting]  # the setting of each method that the tuning people chose
    tried: pd.DataFrame  # mean gap on the tuning people for each setting of each method
    attributions: pd.DataFrame  # how well each predicts what leaving those people out changes; see `tune`
    effects: pd.DataFrame  # predicted and true change of each mean margin, for questions about forgotten people


def run(world: World) -> Results:
    """Run everything that notebook 09 shows."""
    originals = world.fine_tuned("originals", world.without(np.array([], int), world.s.n_models))
    logits = world.logits(originals, np.arange(len(world.questions)))
    learnt = known(world, originals)
    attributions = attribute(world)
    tried, compared = tune(world, originals, logits, attributions)
    best = tried.loc[tried.groupby("method")["gap"].idxmin()]
    chosen = {m: (float(lr), float(cost)) for m, lr, cost in best[["method", "rate", "cost"]].itertuples(index=False)}
    found = []
    for number, name in enumerate(world.forget_sets):
        found.append(_forget(world, name, originals, logits, attributions["contrast"], chosen))
        world.progress("forget", number + 1, len(world.forget_sets))
    distances, scores, effects = (pd.concat(tables, ignore_index=True) for tables in zip(*found, strict=True))
    return Results(learnt, distances, scores, chosen, tried, compared, effects)


def attribute(world: World) -> dict[str, Change]:
    """Fine-tune models on random subsets of people, and attribute what they answer to people; see `attribution.fit`."""
    s, n = world.s, len(world.people)
    size = min(n - 1, max(1, round(s.fraction * n)))
    masks = np.argsort(np.random.default_rng([s.seed, 2]).random((s.n_subsets, n)), 1).argsort(1) < size
    models = world.fine_tuned("subsets", masks)
    outputs = world.logits(models, np.arange(len(world.questions)))
    return attribution.fit(world, masks, outputs)


def known(world: World, originals: Ensemble) -> pd.DataFrame:
    """Score what the originals know of what they were taught: the mean for each task and modality."""
    taught = np.arange(world.n_taught)
    found, private = judge(world, originals, taught), world.split[taught] == "train"
    mean = found.scores.mean(0)
    table = pd.DataFrame({"private": np.where(private, mean, np.nan), "public": np.where(private, np.nan, mean)})
    kinds = [world.task[taught], world.modality[taught]]
    return table.groupby(kinds, sort=False).mean().rename_axis(["task", "modality"]).reset_index()


def asked_about(world: World, forget: np.ndarray) -> pd.DataFrame:
    """List the questions of a forget set's four sets, with their set, task, modality and person.

    Of retained and public people a sample is asked, the same for all forget sets. Retained people are sampled among
    those that no forget set and no tuning touches.
    """
    w = world
    used = np.concatenate([*w.forget_sets.values(), w.tuning])
    kept = np.setdiff1d(np.arange(len(w.people)), used)[: w.s.sample]
    ours, figures = np.isin(w.person, forget), pd.unique(w.name[w.split == "public"])[: w.s.sample]
    sets = {
        "forget": ours & (w.split == "train"),
        "test": ours & (w.split == "test"),
        "retain": np.isin(w.person, kept) & (w.split == "train"),
        "public": np.isin(w.name, figures),
    }
    table = pd.DataFrame({"task": w.task, "modality": w.modality, "person": w.name}).rename_axis("question")
    return pd.concat([table[mask].reset_index().assign(set=name) for name, mask in sets.items()], ignore_index=True)


def tune(
    world: World, originals: Ensemble, logits: np.ndarray, attributions: dict[str, Change]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare settings and attributions on the tuning people, who are in no reported forget set.

    Everything is measured against models without them. Oracle matching is tried with those same models' mean; on
    reported sets it gets others'. The first table has every setting of every method, with the mean gap of margins
    (`metrics.gaps`, in the retrained models' standard deviations) on each set and over the four; the second every
    attribution, with that of DM-direct on each set, the correlation of predicted with true changes of forgotten
    people's margins, and the slope of predicted on true ones.
    """
    s, n, few = world.s, world.n_taught, world.s.tuning_models
    oracles = world.fine_tuned("retrained:tuning", world.without(world.tuning, s.n_models))
    table = asked_about(world, world.tuning)
    asked, places = np.array(table["question"]), table.groupby("set").indices
    ours = places["forget"]
    every = world.logits(oracles, np.arange(len(world.questions)))
    reference, before = (world.margins(z[:, asked], asked) for z in (every, logits))

    def distances(margins: np.ndarray) -> dict[str, float]:
        sound = np.isfinite(margins).all()
        each = np.abs(metrics.gaps(margins, reference)) if sound else np.full(len(asked), np.inf)
        return {split: float(each[places[split]].mean()) for split in SETS}

    changes = {name: change(world.tuning) for name, change in attributions.items()}
    changes["true mean change"] = mean_change(world, logits, every)
    compared = []
    for name, change in changes.items():
        margins = world.margins(moved(world, logits[:, asked], change[asked], asked), asked)
        predicted, true = (m.mean(0)[ours] - before.mean(0)[ours] for m in (margins, reference))
        fit = {"correlation": np.corrcoef(predicted, true)[0, 1], "slope": float(predicted @ true / (true @ true))}
        compared.append({"attribution": name} | fit | distances(margins))
    matched = {"dmm": changes["contrast"][:n], "oracle_matching": changes["true mean change"][:n]}
    task = Task(world, originals[:few], logits[:few, :n], world.tuning, matched)
    tries = [(name, (lr, 0.0)) for name in VARIANTS for lr in s.lrs]
    tries += [(name, (lr, cost)) for name in MATCHING for lr in s.match_lrs for cost in s.costs]
    tried = []
    for number, (name, setting) in enumerate(tries):
        models, _ = unlearn(task, name, setting)
        on = distances(world.margins(world.logits(models, asked), asked))
        tried.append({"method": name, "rate": setting[0], "cost": setting[1]} | on | {"gap": np.mean([*on.values()])})
        world.progress("tune", number + 1, len(tries))
    return pd.DataFrame(tried), pd.DataFrame(compared)


def _forget(
    world: World, name: str, originals: Ensemble, logits: np.ndarray, attributed: Change, chosen: dict[str, Setting]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Tables of distances, scores and effects of every method on one forget set."""
    s, n, forget = world.s, world.n_taught, world.forget_sets[name]
    retrained = world.fine_tuned(f"retrained:{name}", world.without(forget, 2 * s.n_models))
    oracles, floor = retrained[: s.n_models], retrained[s.n_models :]
    table = asked_about(world, forget)
    asked, by_data = np.array(table["question"]), table.groupby(["set", "modality"]).indices
    places = {split: np.flatnonzero(table["set"] == split) for split in SETS}
    places |= {f"{split}, {data}": np.array(by_data[split, m]) for split in SETS for data, m in WITH.items()}
    reference = world.margins(world.logits(oracles, asked), asked)
    change = attributed(forget)
    true = mean_change(world, logits[:, :n], world.logits(floor, np.arange(n)))
    task = Task(world, originals, logits[:, :n], forget, {"dmm": change[:n], "oracle_matching": true})

    def answered(method: str) -> tuple[Judged, float]:
        if method in chosen:
            models, cost = unlearn(task, method, chosen[method])
            return judge(world, models, asked), cost
        if method == "dm_direct":
            return judged(world, moved(world, logits[:, asked], change[asked], asked), asked), 0.0
        if method == "retrain":
            return judge(world, floor, asked), 1.0
        return judge(world, originals, asked, prompting=method == "prompting"), 0.0

    distances, scores, predicted = list[dict[str, Any]](), [], np.array([])
    for method in METHODS:
        found, cost = answered(method)
        head = {"forget_set": name, "method": method}
        for split, statistics in metrics.gap_summary(found.margins, reference, places, seed=s.seed).items():
            for statistic in ("mean_gap", "ks_share"):
                told = {"split": split, "statistic": statistic, "cost": cost}
                distances.append(head | told | asdict(statistics[statistic]))
        scores.append(table.assign(**head, score=found.scores.mean(0)))
        if method == "dm_direct":
            predicted = found.margins.mean(0)
    before = world.margins(logits[:, asked], asked).mean(0)
    effects = table.assign(forget_set=name, predicted=predicted - before, true=reference.mean(0) - before)
    return pd.DataFrame(distances), pd.concat(scores), effects[effects["set"].isin(["forget", "test"])]


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Compute scores by method, set, task and modality over all forget sets, with 95 % t-intervals over people."""
    return over_people(scores, ["method", "set", "task", "modality"])


def _by_method(scores: pd.DataFrame, *sets: str) -> pd.DataFrame:
    """Scores on some sets with one column for each method."""
    keys = ["forget_set", "set", "task", "modality", "person"]
    return scores[scores["set"].isin(sets)].pivot_table(index=keys, columns="method", values="score")


def _over_people(gaps: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    long = gaps.melt(var_name="method", value_name="score", ignore_index=False).reset_index()
    return over_people(long, ["method", *by])


def text_against_image(scores: pd.DataFrame) -> pd.DataFrame:
    """Score on forgotten people after unlearning on text minus that after unlearning on portraits with text.

    Below 0: text alone forgets more. The paper finds that in generation and cloze; in classification with images, the
    opposite. For each gradient method, set (forget, test), task and modality of the question; "all" is the mean over
    the gradient methods. 95 % t-intervals over people.
    """
    wide = _by_method(scores, "forget", "test")
    gaps = pd.DataFrame({m: wide[f"{m}:text"] - wide[f"{m}:image"] for m in GRADIENT})
    return _over_people(gaps.assign(all=gaps.mean(axis="columns")), ["set", "task", "modality"])


def utility_gap(scores: pd.DataFrame) -> pd.DataFrame:
    """Score on retained and public people minus that after retraining, by method, with intervals over people."""
    wide = _by_method(scores, "retain", "public")
    gaps = wide[[m for m in METHODS if m != "retrain"]].sub(wide["retrain"], axis="index")
    return _over_people(gaps).set_index("method")


def over_sets(distances: pd.DataFrame, statistic: str = "mean_gap") -> pd.DataFrame:
    """Average a distance over the forget sets by method and set; "all" is the mean of the four, as rates are chosen.

    The interval is as wide as a forget set's is on average: they share the originals, so they do not average out.
    """
    here = distances[distances["statistic"] == statistic].assign(error=distances["high"] - distances["value"])
    table = here.groupby(["method", "split"], sort=False)[["value", "error", "cost"]].mean()
    error = table.pop("error")
    table = table.assign(low=(table["value"] - error).clip(lower=0), high=table["value"] + error).reset_index()
    overall = table[table["split"].isin(SETS)].groupby("method", sort=False)[["value", "low", "high", "cost"]].mean()
    return pd.concat([table, overall.reset_index().assign(split="all")], ignore_index=True)
