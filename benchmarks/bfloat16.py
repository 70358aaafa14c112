"""What bfloat16 changes in what is measured: margins' distributions (KLoM), and a datamodel's LDS.

    python benchmarks/bfloat16.py [--n-models 100] [--n-subsets 600] [--out results/bfloat16.json]

KLoM of originals trained in bfloat16 against originals trained in float32 is set beside its floor: two independent
sets, both float32. The LDS is that of a ridge datamodel on subset models of either precision, for float32 models held
out.
The laptop preset's data, model and recipe.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dmmlib import ensemble, metrics
from dmmlib.datamodels import RidgeDatamodel, lds
from dmmlib.execution import Execution
from dmmlib.progress import silent
from dmmlib.study import Study

N_HELD_OUT, LAMBDA = 100, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-models", type=int, default=100)
    parser.add_argument("--n-subsets", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bfloat16.json")
    arguments = parser.parse_args()
    n, m = arguments.n_models, arguments.n_subsets
    study = Study("laptop", progress=silent)
    x, y, n_train = study.x, study.data.y, study.data.n_train
    way = Execution(16, torch.get_num_threads(), compile=True, processes=True)
    seconds: dict[str, float] = {}

    def logits(masks: np.ndarray, first_seed: int, precision: str) -> np.ndarray:
        """Logits (n_models, n_points, n_classes), always evaluated in float32."""
        recipe = replace(study.training, precision=precision)
        seeds = range(first_seed, first_seed + len(masks))
        start = time.perf_counter()
        kept = ensemble.train_and(
            lambda models: {"logits": models.logits(x).numpy()},
            study.module, x[:n_train], study.y[:n_train], masks, seeds, recipe, way,
        )  # fmt: skip
        seconds[precision] = seconds.get(precision, 0.0) + time.perf_counter() - start
        return kept["logits"]

    whole = np.ones((n, n_train), bool)
    reference, again = (metrics.margins(logits(whole, first, "float32"), y) for first in (0, 10_000))
    halved = metrics.margins(logits(whole, 20_000, "bfloat16"), y)
    masks = study.subset_masks()
    held_out, fitted = masks[-N_HELD_OUT:], masks[:m]
    truth = metrics.margins(logits(held_out, 30_000, "float32"), y)
    report: dict = {"n_models": n, "n_subsets": m, "n_held_out": N_HELD_OUT, "klom_p95": {}, "lds": {}}
    sets = {"train": np.arange(n_train), "validation": np.arange(n_train, len(y))}
    for what, margins in (("float32", again), ("bfloat16", halved)):
        for name, e in ((k, v["p95"]) for k, v in metrics.klom_summary(margins, reference, sets).items()):
            report["klom_p95"][f"{what}, {name}"] = [e.value, e.low, e.high]
            print(f"KLoM p95 of {what} against float32, {name}: {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]", flush=True)
    scores = {}
    for precision in ("float32", "bfloat16"):
        model = RidgeDatamodel.fit(fitted, logits(fitted, 40_000, precision), LAMBDA)
        scores[precision] = lds(metrics.margins(model.predict(held_out), y), truth)
    difference = scores["bfloat16"] - scores["float32"]
    for what, values in (*scores.items(), ("difference", difference)):
        error = 1.96 * float(values.std(ddof=1) / np.sqrt(len(values)))
        report["lds"][what] = [float(values.mean()), error]
        print(f"LDS of {what}: {values.mean():.4f} +- {error:.4f} (95 %, over {len(values):,} points)", flush=True)
    report["seconds"] = seconds
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    print(f"{seconds}; saved: {arguments.out}")


if __name__ == "__main__":
    main()
