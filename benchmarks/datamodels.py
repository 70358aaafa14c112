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
from functools import partial
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


def scale(n: int = 50_000, m: int = 20_000, n_points: int = 20_000) -> dict[str, float]:
    """The fit and effects at the paper's size, from a generated store of float16 on disk, of a third of its points.

    A fit does not look at outputs; effects take one pass over them, so that their time is proportional to the points.
    """
    rng, shape = np.random.default_rng(0), (n_points, 10)
    masks = np.unpackbits(np.frombuffer(rng.bytes(m * n // 8), np.uint8)).reshape(m, n).view(bool)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"{folder}/subsets.zarr", {}, m, {"logits": (shape, "float16")}, 100)
        noise = rng.standard_normal((101, *shape), np.float32).astype(np.float16)
        for shard in range(store.n_shards):  # shards differ by where their noise starts
            store.write(shard, {"logits": np.roll(noise, shard, axis=0)[:100]})
        on_disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        start, before = time.perf_counter(), peak_mb()
        model = RidgeDatamodel.fit(masks, Outputs(partial(store.read, "logits"), (m, *shape), 100), 0.1)
        result = {"n_train": n, "n_subsets": m, "n_points": n_points, "disk_gb": on_disk / 1e9}
        result |= {"fit_seconds": time.perf_counter() - start, "fit_peak_mb": peak_mb() - before}
        for k in (1, 100):
            forget = [np.sort(rng.permutation(n)[:500]) for _ in range(k)]
            result[f"seconds_{k}"] = median_time(lambda forget=forget: model.effects(forget), 1)
            result[f"seconds_{k}_of_60,000"] = result[f"seconds_{k}"] * 60_000 / n_points
    return result | {"peak_mb": peak_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "datamodels.json")
    parser.add_argument(
        "--only",
        choices=["klom", "memory", "scale"],
        help="measure this again and keep the rest of the results; scale is n = 50,000, M = 20,000 and 8 GB of disk",
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    only: str | None = arguments.only
    again = only and out.exists()
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if again else {}

    def alone(name: str, work: Any, *arguments: Any) -> dict[str, float]:
        with mp.get_context("spawn").Pool(1) as pool:
            report[name] = pool.apply(work, arguments)
        numbers = ", ".join(f"{k} {v:,.4g}" for k, v in report[name].items())
        print(f"{name}: {numbers}", flush=True)
        return report[name]

    if only in (None, "scale"):
        alone("scale, n = 50,000, M = 20,000", scale)
    if only in (None, "klom"):
        alone("KLoM of 100 x 60,000 margins", klom)
    if only in (None, "memory"):
        for use in ("whole", "ridge", "own weights"):
            alone(f"memory, n = 2,000, M = 4,000, {use}", memory, use)
    if only:
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
