"""The state of chains on disk: one file, bound to its model and its data, replaced as a whole or not at all.

The arrays of `Chains`, with what they belong to, as `files.write_arrays` keeps them. There is no seed among them: from
one, the draws that a deletion undid could be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dmmlib.errors import ForgetSetError, StoreError
from dmmlib.files import read_arrays, write_arrays
from dmmlib.studies.exact.chains import SGD, Chains, Points, Receipt, delete, insert
from dmmlib.studies.exact.problem import Problem, project

_DTYPES = {"present": "bool", "batches": "int32", "means": "float64", "steps": "float64", "iterates": "float64"}
_ACTIONS = {"delete": delete, "insert": insert}


class Request(NamedTuple):
    """To delete points, or to insert them."""

    kind: Literal["delete", "insert"]
    points: Points


def _identity(problem: Problem, sgd: SGD, present: np.ndarray) -> dict[str, Any]:
    """What a state belongs to; points that no run holds any more leave no trace in it."""
    held = np.flatnonzero(present.any(0))
    used = [held, *(values.take(held, axis=0, mode="clip") for values in (problem.x, problem.y))]
    content = b"".join(values.tobytes() for values in used)
    data = hashlib.sha256(content).hexdigest()
    return {"number of points": problem.n, "sgd": asdict(sgd), "training data": data}


def save(path: Path, problem: Problem, chains: Chains) -> None:
    """Write a state; readers see the old file or the new one, which StoreError leaves unchanged."""
    arrays = {name: getattr(chains, name) for name in _DTYPES}
    write_arrays(path, arrays | {"header": json.dumps(_identity(problem, chains.sgd, chains.present))})


def load(path: Path, problem: Problem, sgd: SGD) -> Chains:
    """Read a state, checked: complete, undamaged, of this model and data, and consistent in itself.

    Raises StoreError if it is missing, truncated, damaged, of another version, or of another model or data.
    """
    try:
        arrays = read_arrays(path)
        header = json.loads(str(arrays.pop("header")))
        identity = _identity(problem, sgd, arrays["present"])
    except (StoreError, KeyError, ValueError) as error:
        missing = "is damaged, or of another version" if path.exists() else "does not exist"
        raise StoreError(
            f"{path} cannot be read as saved chains: it {missing}; restore a copy, or train again."
        ) from error
    for key, value in identity.items():
        if header.get(key) != value:
            raise StoreError(
                f"{path} has the {key} {header.get(key)}, expected {value}; it is of another model or other data: open "
                "its own."
            )
    chains = Chains(sgd, **arrays)
    if not _consistent(problem, chains):
        raise StoreError(f"{path} contradicts itself: batches, steps and iterates do not belong together; train again.")
    return chains


def _consistent(problem: Problem, chains: Chains) -> bool:
    """Whether shapes fit, batches hold present points only, and the steps lead along the iterates."""
    t, m, r, d = chains.sgd.n_steps, chains.sgd.batch_size, len(chains.present), problem.dim
    shapes = [(r, problem.n), (r, t, m), (r, t, d), (r, t, d), (r, t + 1, d)]
    found = {name: getattr(chains, name) for name in _DTYPES}
    if [a.shape for a in found.values()] != shapes or {k: str(a.dtype) for k, a in found.items()} != _DTYPES:
        return False
    inside = (chains.batches >= 0) & (chains.batches < problem.n)
    used = np.take_along_axis(chains.present, np.where(inside, chains.batches, 0).reshape(r, -1), 1)
    replayed = project(chains.iterates[:, :-1] - chains.sgd.lr * chains.steps, chains.sgd.radius)
    return bool(inside.all() and used.all() and np.allclose(replayed, chains.iterates[:, 1:], rtol=0, atol=1e-9))


def serve(
    path: Path, problem: Problem, sgd: SGD, requests: Iterable[Request], rng: np.random.Generator
) -> Iterator[Receipt]:
    """Answer a sequence of requests over the state at `path`; each is on disk before its receipt is given.

    A crash leaves the state before a request or the one after it. Asking again is safe: a deletion that was
    done is refused as one of a point that is not there. `rng` must not start from the seed that made the state.

    Raises StoreError or ForgetSetError as `load`, `delete` and `insert` do; earlier requests stay answered.
    """
    chains = load(path, problem, sgd)
    for request in requests:
        if request.kind not in _ACTIONS:
            raise ForgetSetError(f"Unknown request {request.kind!r}; use 'delete' or 'insert'.")
        chains, receipt = _ACTIONS[request.kind](problem, chains, request.points, rng)
        save(path, problem, chains)
        yield receipt
