"""What the paper's setting costs, as a Markdown table: an estimate, from counted FLOP and a sustained rate.

    python benchmarks/cost_table.py [cifar10] [--measured 1.2e11]

Floating-point operations are counted on the model itself; a rate is either measured (`benchmarks/engine.py`,
`dmm run PRESET --dry-run`) or assumed, and the table says which.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from dmmlib import models, presets


def flop_of_sample_gradient(preset: presets.Preset, shape: tuple[int, ...], n_classes: int) -> float:
    """FLOP of forward and backward on one example."""
    model = models.get(preset.model.name).factory(shape, n_classes, **preset.model.options)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, *shape)).sum().backward()
    return counter.get_total_flops() / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="cifar10")
    parser.add_argument("--measured", type=float, help="FLOP/s sustained here")
    parser.add_argument("--shape", type=int, nargs="+", default=[3, 32, 32])
    arguments = parser.parse_args()
    p = presets.load(arguments.preset)
    n, n_val = p.data.n_train or 0, p.data.n_val or 0
    n_classes = 10
    flop = flop_of_sample_gradient(p, tuple(arguments.shape), n_classes)
    m = p.datamodels.n_subsets
    a_model = p.training.epochs * round(p.datamodels.fraction * n) * flop
    print(
        f"{m:,} {p.model.name} on {round(p.datamodels.fraction * n):,} examples, {p.training.epochs} epochs: "
        f"{flop / 1e9:.2f} GFLOP a sample gradient, {a_model / 1e15:.2f} PFLOP per model, {m * a_model:.2g} FLOP "
        f"in all; logits {4 * m * (n + n_val) * n_classes / 1e9:.0f} GB, masks {m * n / 1e9:.0f} GB; the fit "
        f"holds {4 * min(m, n) ** 2 / 1e9:.1f} GB of factor and {4 * m * n / 1e9:.1f} GB of masks.\n"
    )
    print("| sustained rate | models per hour | hours for all | on 8 devices |")
    print("| --- | --- | --- | --- |")
    rates = [(f"{arguments.measured / 1e12:.2f} TFLOP/s, measured on CPU", arguments.measured)]
    rates += [(f"{tera} TFLOP/s, assumed", tera * 1e12) for tera in (10, 50, 100, 200)]
    for what, rate in rates:
        if rate:
            hours = m * a_model / rate / 3600
            print(f"| {what} | {rate * 3600 / a_model:,.2g} | {hours:,.0f} | {hours / 8:,.0f} |")


if __name__ == "__main__":
    main()
