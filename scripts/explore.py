"""Write what the book's page "Explore" shows, from a run whose results are there: `python scripts/explore.py laptop`.

Every forgotten point of every forget set, and of the points that stay and of the validation points a cross-section:
every so many in the order of DMM's KLoM. Of each, the KLoM of every method, quantiles of its margins, and its image.
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dmmlib import metrics
from dmmlib.analysis.looks import SPLITS, colour, label
from dmmlib.files import write_bytes
from dmmlib.study import Study
from dmmlib.widgets.views import Scatter

ROOT = Path(__file__).parents[1]
N_OTHERS = 30  # retained points, and validation points, of each set
N_QUANTILES = 25  # that stand for the margins of N models
LEVELS = (np.arange(N_QUANTILES) + 0.5) / N_QUANTILES


def packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def of_set(study: Study, name: str, methods: list[str]) -> tuple[dict, np.ndarray]:
    """What the page shows of a forget set, and which points these are (n,)."""
    f = study.forget_sets()[name]
    oracles = study.reference(f)[0]
    margins = [study.unlearned(m, f).margins for m in methods]
    kloms = np.array([metrics.klom(m, oracles) for m in margins])
    chosen = {}
    for split, points in study.splits(f, probes=False).items():
        order = points[np.argsort(-kloms[methods.index("dmm")][points], kind="stable")]
        few = np.linspace(0, len(order) - 1, min(N_OTHERS, len(order))).astype(int)
        chosen[split] = order if split == "forget" else order[few]
    points = np.concatenate([chosen[split] for split in SPLITS])
    quantiles = np.array([np.quantile(m[:, points], LEVELS, axis=0).T for m in (oracles, *margins)])  # group, point
    low, high = quantiles.min((0, 2)), quantiles.max((0, 2))
    steps = (quantiles - low[:, None]) / np.maximum(high - low, 1e-6)[:, None] * 255
    return {
        "name": name,
        "points": points.tolist(),
        "splits": [len(chosen[split]) for split in SPLITS],
        "kloms": kloms[:, points].round(1).tolist(),
        "low": low.round(2).tolist(),
        "high": high.round(2).tolist(),
        "margins": packed(steps.round().astype(np.uint8).transpose(1, 0, 2)),  # point, group, quantile
    }, points


def main(preset: str, target: Path) -> None:
    """Write the page's data; what the run lacks is computed."""
    study = Study(preset)
    methods = ["do_nothing", *(m for m in study.preset.unlearning.methods if m not in ("do_nothing", "retrain"))]
    sets, points = zip(*(of_set(study, name, methods) for name in study.forget_sets()), strict=True)
    shown = np.unique(np.concatenate(points))
    images = study.data.x[shown]
    n, height, width, channels = images.shape
    strip = Image.fromarray(images.reshape(n * height, width, channels).squeeze())
    strip.save(buffer := io.BytesIO(), "PNG", optimize=True)
    content = {
        "preset": study.preset.name,
        "data": study.data.name,
        "n_models": study.preset.ensembles.n_models,
        "n_quantiles": N_QUANTILES,
        "shape": [height, width, channels],
        "classes": list(study.data.class_names),
        "methods": [label(m) for m in methods],
        "colours": ["#{:02x}{:02x}{:02x}".format(*(round(255 * c) for c in colour(m))) for m in methods],
        "palette": Scatter(study.data, lambda point: ("", "")).colours,
        "first": methods.index("dmm"),
        "predicted": methods.index("dm_direct"),
        "shown": shown.tolist(),
        "labels": study.data.y[shown].tolist(),
        "images": base64.b64encode(buffer.getvalue()).decode(),
        "sets": sets,
    }
    write_bytes(target, json.dumps(content, separators=(",", ":")).encode())


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "laptop"
    main(name, Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "figures" / name / "explore.json")
