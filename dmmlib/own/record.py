"""What is left of a request: the unlearned weights, a record of what was done, a page to read. Never the data."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from torch import Tensor

from dmmlib.analysis import looks
from dmmlib.data import Dataset
from dmmlib.errors import DataError, StoreError
from dmmlib.files import check_folder, config_hash, load_json, replacing, write_bytes
from dmmlib.forget_sets import ForgetSet
from dmmlib.own.audit import Audit

if TYPE_CHECKING:
    from dmmlib.own.forget import Result

SCHEMA = 3  # docs/record.schema.json
WEIGHTS, RECORD = "model.safetensors", "record.json"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Request {{ name }}</title>
<style>body{font:16px/1.5 sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}
pre{white-space:pre-wrap;background:#f4f4f4;padding:1rem}img{max-width:100%}</style>
<h1>Request “{{ name }}”: {{ audit.says }}</h1>
<p>{{ n }} of {{ n_train }} points{% if total > n %} ({{ total }} with earlier requests){% endif %}, by {{ method }},
for {{ cost }} of a retraining.</p>
<p>{{ anew }}</p>
<pre>{{ audit }}</pre>
<img alt="{{ alt }}" src="data:image/png;base64,{{ png }}">
<h2>Record</h2><pre>{{ record }}</pre></html>
"""


def sha256(state: Mapping[str, Tensor]) -> str:
    """Hash a model's state: names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)} ".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def record(result: Result, audit: Audit | None = None) -> dict[str, Any]:
    """What was asked, when, of which data and model, by which method and versions, and how it went."""
    if not isinstance(audit, (Audit, NoneType)):
        raise DataError(f"audit is a {type(audit).__name__}; give what result.audit() returned, or none.")
    prepared = result.prepared
    return {
        "schema": SCHEMA,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": {
            "name": result.name,
            "points": result.forget.tolist(),
            "forgotten before": np.setdiff1d(result.forgotten, result.forget).tolist(),
        },
        "data": {"sha256": prepared.data.sha256, "training points": prepared.data.n_train},
        "recipe": config_hash(prepared.identity),
        "subset models": prepared.preset.attribution.n_subsets,
        "model": {"before": sha256(result.original.state_dict()), "after": sha256(result.model.state_dict())},
        "method": {
            "name": result.method,
            "options": {k: v if isinstance(v, (int, float, str)) else repr(v) for k, v in result.options.items()},
            "cost": result.cost,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("dmmlib", "torch", "numpy")},
        },
        "audit": None if audit is None else _finite(asdict(audit)),
    }


def _finite(value: Any) -> Any:
    """A tree of numbers with None for those that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def save(result: Result, folder: str | Path, audit: Audit | None = None) -> Path:
    """Write model.safetensors, the unlearned weights and the record, and record.json, each whole or not at all."""
    from safetensors.torch import save as packed

    folder, content = Path(folder), record(result, audit)
    text = json.dumps(content, indent=1, allow_nan=False)
    check_out(folder, result.forget, content["model"]["before"])
    state = {name: v.detach().cpu().contiguous().clone() for name, v in result.model.state_dict().items()}
    with replacing(folder / RECORD) as written, replacing(folder / WEIGHTS) as weights:
        weights.write_bytes(packed(state, {"record": text}))  # wherever they go, it says what is gone
        written.write_bytes(text.encode() + b"\n")
        (folder / RECORD).unlink(missing_ok=True)  # new weights never lie beside an old record
    return folder


def check_out(folder: Path, points: np.ndarray, before: str, *also: str) -> None:
    """Raise StoreError where a folder holds weights, a record or other files, but not of this request to this model."""
    check_folder(folder)
    there, old = [name for name in (WEIGHTS, RECORD, *also) if (folder / name).exists()], _found(folder)
    if there and (not old or (old["request"]["points"], old["model"]["before"]) != (points.tolist(), before)):
        raise StoreError(f"{folder} holds {' and '.join(there)} of something else; choose another folder.")


def earlier(weights: Path, state: Mapping[str, Tensor], data: Dataset) -> np.ndarray:
    """Points that a model was made to forget, as the record in or beside its weights says, if of them and the data."""
    old = _found(weights) or _found(weights.parent)
    known = old and (old["model"]["after"], old["data"]["sha256"]) == (sha256(state), data.sha256)
    return np.array(sorted(old["request"]["points"] + old["request"]["forgotten before"]) if known else [], np.int64)


def _found(path: Path) -> dict[str, Any]:
    """The record in a folder, or that weights carry; empty if there is none, or another program's."""
    from safetensors import SafetensorError, safe_open

    content = load_json(path / RECORD) if (path / RECORD).is_file() else {}
    with suppress(SafetensorError, OSError, ValueError), safe_open(path, "pt") as file:  # a .pt carries none
        content = json.loads((file.metadata() or {}).get("record", "{}"))
    known = isinstance(content, dict) and {"request", "model", "data", "subset models"} <= content.keys()
    return content if known else {}


def report(result: Result, path: str | Path, audit: Audit) -> Path:
    """Write a page to read, self-contained, with the audit, a figure and the record."""
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        name=result.name,
        audit=audit,
        anew=result.anew,
        n=len(result.forget),
        total=len(result.forgotten),
        n_train=f"{result.prepared.data.n_train:,}",
        method=looks.label(result.method),
        cost=f"{result.cost:.3f}",
        alt="Margins of the forgotten points before and after, against those predicted of a retrained model",
        png=base64.b64encode(looks.png(figure(result))).decode(),
        record=json.dumps(record(result, audit), indent=1, allow_nan=False),
    )
    write_bytes(Path(path), html.encode())
    return Path(path)


def figure(result: Result) -> Figure:
    """Draw margins before and after against predicted ones, for F and for validation points."""
    figure, axes = looks.grid(2, 2, (4.6, 3.6), "margin predicted of a retrained model", "margin of the model")
    splits = result.prepared.splits(ForgetSet(result.name, result.forgotten), probes=False)
    shown = {f"{name} points": splits[split] for name, split in (("forgotten", "forget"), ("validation",) * 2)}
    for axis, (what, points) in zip(axes[0], shown.items(), strict=True):
        target = result.predicted[points]
        for when, colour in (("before", "0.6"), ("after", looks.colour("dmm"))):
            axis.plot(target, result.margins(when)[points], "o", ms=4, alpha=0.6, color=colour, label=when)
        axis.axline((float(target.mean()),) * 2, slope=1, color="0.3", lw=1)
        axis.set_title(f"{len(points)} {what}")
    looks.legend(figure, *axes[0])
    plt.close(figure)
    return figure
