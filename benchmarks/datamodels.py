"""KLoM, effects, previews and fits: time and peak memory, against the obvious way to do each.

    python benchmarks/datamodels.py [--out results/datamodels.json]

Each number is measured in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dmmlib import metrics
from dmmlib.datamodels import BLOCK, RidgeDatamodel
from dmmlib.store import Outputs, Store
from dmmlib.widgets.preview import N_ORIGINALS, Previewer


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median_time(work: Any, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def klom_by_point(unlearned: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """A histogram pair a point, as the public code does it."""
    values = []
    for u, o in zip(np.clip(unlearned, -100, 100).T, np.clip(oracle, -100, 100).T, strict=True):
        edges = np.histogram_bin_edges(np.concatenate([u, o]), metrics.N_BINS)
        p, q = (np.histogram(m, edges)[0] / len(m) for m in (u, o))
        kept = p > 0
        values.append(float((p[kept] * np.log(p[kept] / np.maximum(q[kept], metrics.FLOOR))).sum()))
    return np.array(values)


def klom() -> dict[str, float]:
    rng = np.random.default_rng(0)
    u, o = (rng.normal(size=(100, 60_000)).astype(np.float32) for _ in range(2))
    fast = median_time(lambda: metrics.klom(u, o), 9)
    some = 2_000  # the loop's time is proportional to the points
    slow = median_time(lambda: klom_by_point(u[:, :some], o[:, :some]), 3) * 60_000 / some
    exact = klom_by_point(u[:, :some].astype(float), o[:, :some].astype(float))  # edges in double precision, as klom's
    difference = np.abs(exact - metrics.klom(u[:, :some], o[:, :some])).max()
    return {"seconds": fast, "loop_seconds": slow, "ratio": slow / fast, "largest_difference": float(difference)}


def effects(n: int, m: int, how: str) -> dict[str, float]:
    """Effects on 2,500 targets of 10 classes, of 1, 10 and 100 forget sets of 50 points."""
    rng = np.random.default_rng(0)
    masks = rng.random((m, n)) < 0.5
    outputs = rng.normal(size=(m, 2_500, 10)).astype(np.float32)
    start = time.perf_counter()
    model = RidgeDatamodel.fit(masks, outputs, 0.1)
    result = {"n_train": n, "n_subsets": m, "fit_seconds": time.perf_counter() - start}
    forget = [np.sort(rng.permutation(n)[:50]) for _ in range(100)]
    if how == "solve":
        for k in (1, 10, 100):
            result[f"seconds_{k}"] = median_time(lambda k=k: model.effects(forget[:k]), 3)
    else:
        start = time.perf_counter()
        weights = model.respond(np.eye(n, dtype=np.float32)).reshape(n, -1)
        result["fit_seconds"] += time.perf_counter() - start
        for k in (1, 10, 100):
            result[f"seconds_{k}"] = median_time(lambda k=k: [-weights[f].sum(0) for f in forget[:k]], 3)
    return result | {"peak_mb": peak_mb()}


def preview(n: int, m: int) -> dict[str, float]:
    """What the forget-set widget computes after a change, for 10 originals and n + 500 points."""
    rng = np.random.default_rng(0)
    masks, labels = rng.random((m, n)) < 0.5, rng.integers(0, 10, n + 500)
    outputs = rng.standard_normal((m, n + 500, 10), np.float32)
    previewer = Previewer(RidgeDatamodel.fit(masks, outputs, 0.1), outputs[:N_ORIGINALS], labels, n)
    seconds = {f"seconds_{k}": median_time(lambda k=k: previewer.preview(np.arange(k))) for k in (10, n // 10)}
    return {"n_train": n, "n_subsets": m} | seconds


def fit(m: int) -> dict[str, float]:
    """The fit alone, n = 2,000; the outputs are not touched by it."""
    rng = np.random.default_rng(0)
    masks = rng.random((m, 2_000)) < 0.5
    outputs = np.zeros((m, 1, 1), np.float32)
    before = peak_mb()
    seconds = median_time(lambda: RidgeDatamodel.fit(masks, outputs, 0.1), 3)
    return {"n_subsets": m, "seconds": seconds, "peak_mb": peak_mb(), "peak_mb_before": before}


def memory(use: str, n: int = 2_000, m: int = 4_000, n_val: int = 500, n_classes: int = 10) -> dict[str, float]:
    """Peak memory of what uses subset outputs, which lie in a store; against one block of them and the fitted factor.

    A block is what `datamodels.BLOCK` models answer; the factor is the fitted model: its masks, centred, and the
    Cholesky factor of A^T A / M + lambda I, which is as large while it is made.
    """
    rng = np.random.default_rng(0)
    masks, labels = rng.random((m, n)) < 0.5, rng.integers(0, n_classes, n + n_val)
    with tempfile.TemporaryDirectory() as folder:
        shape = (n + n_val, n_classes)
        store = Store.open(f"{folder}/subsets.zarr", {}, m, {"logits": (shape, "float32")}, 100)
        for shard in range(store.n_shards):
            store.write(shard, {"logits": rng.standard_normal((len(store.models(shard)), *shape), np.float32)})

        def read(first: int, last: int) -> np.ndarray:
            logits = store.read("logits", first, last)
            for i in range(0, len(logits), 10):
                logits[i : i + 10] = metrics.margin_gauge(logits[i : i + 10], labels)
            return logits

        outputs = Outputs(read, (m, *shape), 100)
        RidgeDatamodel.fit(masks[:50], outputs[:50], 0.1).effect([0])  # what is loaded once
        before = peak_mb()
        if use == "whole":
            RidgeDatamodel.fit(masks, outputs[:], 0.1).effects([[0], [1, 2]])
        elif use == "ridge":
            RidgeDatamodel.fit(masks, outputs, 0.1).effects([[0], [1, 2]])
        elif use == "own weights":
            RidgeDatamodel.fit(masks, outputs, 0.1, own_share=0.3).effects([[0], [1, 2]])
        block = BLOCK * shape[0] * n_classes * 4 / 2**20
        factor = (m * n + 2 * n * n) * 4 / 2**20
        peak = peak_mb() - before
    limit = 1.2 * block + factor
    return {"peak_mb": peak, "block_mb": block, "factor_mb": factor, "limit_mb": limit, "of_limit": peak / limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "datamodels.json")
    parser.add_argument("--only-klom", action="store_true", help="measure KLoM again and keep the rest of the results")
    parser.add_argument("--only-memory", action="store_true", help="the same of peak memory")
    arguments = parser.parse_args()
    out: Path = arguments.out
    again = (arguments.only_klom or arguments.only_memory) and out.exists()
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if again else {}

    def alone(name: str, work: Any, *arguments: Any) -> dict[str, float]:
        with mp.get_context("spawn").Pool(1) as pool:
            report[name] = pool.apply(work, arguments)
        numbers = ", ".join(f"{k} {v:,.4g}" for k, v in report[name].items())
        print(f"{name}: {numbers}", flush=True)
        return report[name]

    if not arguments.only_memory:
        alone("KLoM of 100 x 60,000 margins", klom)
    if not arguments.only_klom:
        for use in ("whole", "ridge", "own weights"):
            alone(f"memory, n = 2,000, M = 4,000, {use}", memory, use)
    if arguments.only_klom or arguments.only_memory:
        out.write_text(json.dumps(report, indent=1), encoding="utf-8")
        return
    for n, m in ((2_000, 4_000), (10_000, 2_000)):
        solve = alone(f"effects, n = {n:,}, by a solve", effects, n, m, "solve")
        every = alone(f"effects, n = {n:,}, every weight materialised", effects, n, m, "materialise")
        print(f"  memory: {every['peak_mb'] / solve['peak_mb']:.1f} x less; set-up {every['fit_seconds']:.1f} s "
              f"against {solve['fit_seconds']:.1f} s")  # fmt: skip
        alone(f"preview, n = {n:,}", preview, n, m)
    for m in (4_000, 20_000):
        alone(f"fit, M = {m:,}", fit, m)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"saved: {out}")


if __name__ == "__main__":
    main()
