"""One model and its own oracle: how far does a seed decide what a model becomes, and does DMM find this model's twin?

The *twin* of an original is retrained with its seed, initial weights and order of batches, the forgotten points having
weight 0 in the loss. At the preset `laptop`'s rate, and at a quarter of it (`smooth`), for each forget set and split:

- alike: the correlation over models, at each point, between originals' margins and their twins', mean over points;
- again: the same with the originals trained once more, by kernels that round otherwise;
- r: the correlation over points, for each model, between the change of its margins by a way and that to its twin, mean
  over models; own: the same over models, at each point: what is this model's own and not the crowd's. Another
  retraining has neither, as both changes would start from the same margins;
- error: root mean square over models and points of the difference between a way's margins and the twin's, in the
  oracles' standard deviations (an independent retraining is at sqrt(2) if seeds decide nothing);
- gap: that of mean margins, which is what KLoM sees first.

Ways: nothing; another retraining; DMM; matching with true targets; and the *metagradient*, the derivative of the
trained model by the weight of the forgotten points, taken forwards through all of training and followed from 1 to 0.

    python -m benchmarks.paired 601 602 603            # seeds, which nothing else uses
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.matching import arguments, save
from dmmlib import forget_sets, metrics, stacking, unlearn
from dmmlib.ensemble import Ensemble, epoch_batches, initialise
from dmmlib.forget_sets import ForgetSet
from dmmlib.optim import Tensors
from dmmlib.study import Study

N, CHUNK = 60, 20
PRESETS = ("laptop", "smooth")


class Trained(NamedTuple):
    """Models, their margins (n_models, n_points), and how these change by the metagradient."""

    models: Ensemble
    margins: np.ndarray
    change: np.ndarray


def retrained(study: Study, seeds: list[int], forget: np.ndarray, follow: bool) -> Trained:
    """Train models with these seeds and weight 0 of the forgotten points; to `follow` their weight, it stays 1."""
    n, training, x, y = study.data.n_train, study.training, study.x, study.y
    models = initialise(study.module, seeds, study.device)
    optimizer, module, params = training.optimizer, models.module.train(), dict(models.params)
    weights, away = torch.ones(n), torch.zeros(n)
    (away if follow else weights)[forget] -= 1.0
    turned = {k: torch.zeros_like(v) for k, v in params.items()}
    memory, turned_memory = optimizer.start(params), optimizer.start(turned)
    pools, rngs = [np.arange(n)] * len(seeds), [np.random.default_rng(seed) for seed in seeds]
    for step, batch in enumerate(epoch_batches(pools, training.batch_size, training.epochs, rngs)):
        indices = torch.from_numpy(batch)

        def gradient(params: Tensors, weights: Tensor) -> Tensors:
            def total(params: Tensors) -> Tensor:
                logits = stacking.forward(module, params, models.buffers, x[indices], None)[0]  # noqa: B023
                losses = F.cross_entropy(logits.flatten(0, 1), y[indices].flatten(), reduction="none")  # noqa: B023
                each = weights[indices]  # noqa: B023
                return ((losses.view(each.shape) * each).sum(1) / each.sum(1)).sum()

            return torch.func.grad(total)(params)

        rate = torch.tensor(training.rate((step + 0.5) / training.steps(n)))
        if follow:  # an update is linear in weights, gradients and memory, so that it serves their tangents as well
            gradients, tangents = torch.func.jvp(gradient, (params, weights), (turned, away))
            optimizer.update(turned, tangents, turned_memory, rate)
        else:
            gradients = gradient(params, weights)
        optimizer.update(params, gradients, memory, rate)

    def answer(params: Tensors) -> Tensor:
        points = x.expand(len(seeds), *x.shape)
        logits = stacking.forward(module.eval(), params, models.buffers, points, None)[0]
        right = F.one_hot(y, logits.shape[-1]).bool()
        return logits[:, right] - logits.masked_fill(right, -torch.inf).logsumexp(-1)

    with torch.no_grad():
        margins, change = torch.func.jvp(answer, (params,), (turned,))
    return Trained(Ensemble(models.module, params, models.buffers), margins.numpy(), change.numpy())


def of_all(study: Study, forget: np.ndarray, follow: bool = False) -> Trained:
    """`retrained` with all originals' seeds, some at a time."""
    seeds = study.seeds("originals", N)
    parts = [retrained(study, seeds[i : i + CHUNK], forget, follow) for i in range(0, N, CHUNK)]
    params = {name: torch.cat([part.models.params[name] for part in parts]) for name in parts[0].models.params}
    models = Ensemble(parts[0].models.module, params, {})
    return Trained(models, *(np.concatenate([part[i] for part in parts]) for i in (1, 2)))


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over models, at each point; 0 where one does not vary."""
    a, b = a - a.mean(0), b - b.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), size, out=np.zeros_like(size), where=size > 0)


def sets_of(study: Study) -> dict[str, ForgetSet]:
    """Random points, the nearest of a point, half of a class: the same for both presets."""
    d, rng, n = study.data, np.random.default_rng(9), study.data.n_train
    of_class = np.flatnonzero(d.y_train == 6)
    found = {"random": rng.permutation(n)[:50], "nearest": forget_sets.nearest(study.features[:n], 17, 50, None)}
    found["half of a class"] = rng.permutation(of_class)[: len(of_class) // 2]
    return {name: forget_sets.make(name, i, d, preset="lab", kind="own") for name, i in found.items()}


def rows(preset: str, seed: int, runs: Path) -> Iterator[dict[str, Any]]:
    """One row for each set, way and split."""
    study = Study(preset, {"seed": seed, "data.seed": seed, "ensembles.n_models": N}, runs=runs)
    d, (originals, before, _) = study.data, of_all(study, np.array([], int))
    logits = originals.logits(study.x).numpy()
    accuracy = float(metrics.correct(logits, d.y)[:, d.n_train :].mean())
    for name, forget_set in sets_of(study).items():
        twins, followed = (of_all(study, forget_set.indices, follow) for follow in (False, True))
        twins, again, change = twins.margins, followed.margins, followed.change
        oracles = metrics.margins(study.oracles(forget_set), d.y)
        ways = {"nothing": before, "another retraining": oracles, "metagradient": before + change}
        for method in ("oracle_matching", "dmm"):
            problem = replace(study.problem(forget_set, method), originals=originals, original_logits=logits)
            ways[method] = unlearn.get(method)(problem).margins
        sd = np.concatenate([oracles, twins]).std(0)
        for split, at in forget_set.splits(d.n_train, d.n_val).items():
            alike, repeated = (correlation(before, other)[at].mean() for other in (twins, again))
            for way, margins in ways.items():
                off = (margins - twins)[:, at] / sd[at]
                moved = [(z - before)[:, at] for z in (margins, twins)]
                shared = way == "another retraining"
                found = {
                    "accuracy": accuracy,
                    "alike": alike,
                    "again": repeated,
                    "r": np.nan if shared else correlation(*(z.T for z in moved)).mean(),
                    "own": np.nan if shared else correlation(*moved).mean(),
                    "error": np.sqrt((off**2).mean()),
                    "gap": np.abs(off.mean(0)).mean(),
                }
                setting = {"preset": preset, "seed": seed, "set": name, "way": way, "split": split}
                yield setting | {key: round(float(value), 3) for key, value in found.items()}


def text_of(table: pd.DataFrame) -> str:
    """The tables for people: means over seeds and sets, with the lowest and the highest of each preset and split."""
    keys = ["preset", "split", "way"]
    of_models = table.groupby(["preset", "split"], sort=False)[["accuracy", "alike", "again"]].mean().round(2)
    means = table.groupby(keys, sort=False)[["r", "own", "error", "gap"]].mean().round(2)
    ranges = table.groupby(keys, sort=False)[["r", "own", "error"]].agg(["min", "max"]).round(2)
    return "\n\n".join(
        [
            f"Seeds {sorted(map(int, table['seed'].unique()))}; {', '.join(table['set'].unique())}; N = {N}. Means:",
            of_models.to_string(),
            means.to_string(),
            "Lowest and highest of these seeds and sets:",
            ranges.to_string(),
        ]
    ) + "\n"  # fmt: skip


def main() -> None:
    asked = arguments(__doc__, "paired", kinds=False)
    found = [row for preset in PRESETS for seed in asked.seeds for row in rows(preset, seed, asked.runs)]
    table = pd.DataFrame(found)
    save(asked.out, table.astype(object).where(table.notna(), None), text_of(table))
    print(text_of(table))


if __name__ == "__main__":
    main()
