"""What the preset `gpu` costs, counted before it runs: FLOP, and seconds at assumed rates; or the study itself.

    python -m benchmarks.gpu_study                     # the estimate, as the table in docs/speed.md
    python -m benchmarks.gpu_study --run --images .gpu/cifar10.npz --out gpu-out    # train, unlearn, measure

FLOP are counted on the model itself and, for attribution and matching, from the shapes of its layers. A run writes
results.csv anew after each forget set. What it trains lies under $DMM_RUNS: started again there, it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmmlib import models, presets
from dmmlib.analysis import plots, tables
from dmmlib.attributors.gradients import FLOATS, margins_of, observe
from dmmlib.attributors.kernel import BLOCK
from dmmlib.files import write_bytes
from dmmlib.jobs import jobs
from dmmlib.matching.match import LARGEST
from dmmlib.presets import Preset
from dmmlib.study import Study

SHAPE, N_CLASSES = (3, 32, 32), 10
RATES = {"bfloat16": 100e12, "TF32": 80e12, "float32": 40e12}  # FLOP/s, assumed of one H100, not measured
A_POINT = 12e6  # bytes that a Gauss-Newton step takes for each point, beside the gradients of a block of outputs
QUICK = {
    "data.name": "fashion-mnist",
    "data.n_train": 80,
    "data.n_val": 20,
    "model.options.width": 4,
    "training.epochs": 2,
    "training.batch_size": 40,
    "ensembles.n_models": 4,
    "attribution.n_subsets": 10,
    "attribution.options": {"n_models": 2, "project": 64},
    "forget_sets": [
        {"name": "random_4", "kind": "random", "size": 4},
        {"name": "shirts", "kind": "class", "label": 6, "share": 0.5},
        {"name": "pc1_top_4", "kind": "pc", "size": 4},
    ],
    "tuning.forget_sets": [{"name": "tune", "kind": "random", "size": 4}],
}


class Part(NamedTuple):
    """A part of the study."""

    what: str
    precision: str
    flop: float

    @property
    def seconds(self) -> float:
        return self.flop / RATES[self.precision]


@dataclasses.dataclass(frozen=True)
class Flop:
    """FLOP on one example."""

    answer: float  # forward
    gradient: float  # forward and backward
    matching: float  # whitening and moments of a Gauss-Newton step
    n_weights: int

    @classmethod
    def of(cls, preset: Preset) -> Flop:
        module = models.build(preset.model.name, SHAPE, N_CLASSES, **preset.model.options).eval()
        x, y = torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.long)
        with FlopCounterMode(display=False) as whole:
            module(x).sum().backward()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            module(x)
        params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        layers = observe(module, params, margins_of(module, buffers), x, y, (nn.Conv2d,))[1]
        shapes = [(layer.d.shape[1], layer.d.shape[2], layer.rows.shape[2]) for layer in layers]
        matching = sum(2 * places * d_in**2 + d_out * d_in**2 for places, d_out, d_in in shapes)
        n_weights = sum(p.numel() for p in params.values())
        return cls(forward.get_total_flops() / 2, whole.get_total_flops() / 2, matching, n_weights)


def estimate(preset: Preset) -> Iterator[Part]:
    """Count the parts of a study in which no method is searched and ridge is not fitted."""
    flop, n, epochs, given = (
        Flop.of(preset),
        preset.data.n_train or 0,
        preset.training.epochs,
        preset.unlearning.settings,
    )
    n_points, n_sets, n_models = n + (preset.data.n_val or 0), len(preset.forget_sets), preset.ensembles.n_models
    trained = [j for j in jobs(preset, n, N_CLASSES) if j.what != "subset models" and not j.what.startswith("tuning")]
    gradients, n_trained = sum(j.n_models * j.size * epochs for j in trained), sum(j.n_models for j in trained)
    yield Part(f"train {n_trained} models, {epochs} epochs", preset.training.precision, gradients * flop.gradient)
    tuned = {m: given[m].get("epochs", given[m].get("descent_epochs")) for m in given if "cost" not in given[m]}
    gradients = n_sets * n_models * n * sum(tuned.values())
    yield Part(f"fine-tune: {', '.join(tuned)}", preset.training.precision, gradients * flop.gradient)
    answers = n_points * (n_trained + n_models * n_sets * len(given))
    yield Part("answer all points with each of these", "TF32", answers * flop.answer)
    options = preset.attribution.options
    yield Part(
        f"attribute: gradients of {options['n_models']} models, and their products",
        "TF32",
        options["n_models"] * n_points * (2 * flop.gradient + flop.answer + 2 * n_points * options["project"]),
    )
    matched = {m: given[m]["cost"] * epochs * n for m in given if "cost" in given[m]}  # points
    in_step = {m: size / max(4, math.ceil(size / LARGEST)) for m, size in matched.items()}
    solved = sum(matched[m] * (flop.matching + 2 * in_step[m] * flop.n_weights) for m in matched)
    seen = sum(matched.values()) * (flop.gradient + flop.answer)
    yield Part(f"match: {', '.join(matched)}", "float32", n_sets * n_models * (solved + seen))


def markdown(preset: Preset) -> str:
    """The estimate as a table."""
    parts = list(estimate(preset))
    rows = [f"| {p.what} | {p.precision} | {p.flop / 1e15:.1f} | {p.seconds:.0f} |" for p in parts]
    total = f"| all | | {sum(p.flop for p in parts) / 1e15:.1f} | {sum(p.seconds for p in parts):.0f} |"
    return "\n".join(["| part | precision | PFLOP | seconds |", "| --- | --- | --- | --- |", *rows, total])


def memory(preset: Preset) -> str:
    """Memory on the device, in words: what takes most, by formulas and, of a step, as measured on a CPU."""
    flop, n = Flop.of(preset), preset.data.n_train or 0
    n_points, giga = n + (preset.data.n_val or 0), 1e9
    kernel = 4 * n_points * (3 * n_points + preset.attribution.options["project"]) + 4 * BLOCK["cuda"]
    step = LARGEST * A_POINT + 3 * 4 * FLOATS
    weights = 4 * flop.n_weights * (preset.ensembles.n_models + preset.attribution.n_subsets)
    return (
        f"all kept weights {weights / giga:.1f} GB, a gradient kernel {kernel / giga:.1f} GB, a Gauss-Newton step of "
        f"{LARGEST} points, the most there are, {step / giga:.1f} GB"
    )


def run(changes: dict[str, Any], images: Path | None, out: Path) -> None:
    """Run the study, one forget set after the other; its tables and figures go to a folder as they are made."""
    content = presets.load("gpu", changes).model_dump()
    content["data"]["path"] = images and str(images)  # where images lie is no part of the preset's name
    study, rows = Study(content, figures=out), list[dict[str, Any]]()
    for forget_set in study.forget_sets().values():
        for method in study.methods:
            rows += study.evaluate(method, forget_set)
        write_bytes(out / "results.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())
    results = pd.DataFrame(rows)
    text = f"N = {study.preset.ensembles.n_models} models of each kind. Medians over forget sets:"
    text += f"\n\n{tables.markdown(tables.medians(results))}\n"
    write_bytes(out / "medians.md", text.encode())
    print(text)
    plots.style()
    title = (
        f"{study.data.name}, n = {study.data.n_train:,}, {study.preset.model.name}: unlearned against retrained models"
    )
    caption = "Medians over {} forget sets; dotted: retraining. N = {} models of each kind: KS sees {}."
    n = study.preset.ensembles.n_models
    figure = plots.measures(results, title, caption.format(results["forget_set"].nunique(), n, tables.powers(n)))
    study.save_figure(figure, "measures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run it instead of counting")
    parser.add_argument("--quick", action="store_true", help="at tiny sizes, on images that come with the library")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=Path, help="an .npz of CIFAR-10's images")
    parser.add_argument("--out", type=Path, default=Path("gpu-out"))
    given = parser.parse_args()
    if given.run:
        run({"device": given.device} | (QUICK if given.quick else {}), given.images, given.out)
    else:
        print(f"{markdown(presets.load('gpu'))}\n\nMemory: {memory(presets.load('gpu'))}.")


if __name__ == "__main__":
    main()
