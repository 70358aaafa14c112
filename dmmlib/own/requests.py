"""Read which points a request names: numbers, ids, a file of them, a folder of files, a class."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmmlib.data import Dataset
from dmmlib.errors import ForgetSetError, StoreError
from dmmlib.files import load_json
from dmmlib.forget_sets import check_forget_indices
from dmmlib.registry import did_you_mean

COLUMNS = ("id", "ids", "index", "indices", "name", "file", "filename", "path")  # that hold the points of a table
SHOWN = 5  # faults that are named
Named = list[tuple[str, Any]]  # where it stands, such as "line 3", and what stands there


def resolve(request: Any, data: Dataset) -> tuple[np.ndarray, str]:
    """Find the training points (n,), sorted, that a request names, and what the request is called.

    A request is a list of numbers or ids; an id; the name of a class, for all its points; a folder, for the files in
    it; or the path of a .csv (a column `id`, or the first), .json (a list, or an object with `ids` or `indices`), or
    text file with one on each line. A file's id also goes by its name without folders, where that is unique.

    Raises ForgetSetError that names unknown points and duplicates with their line, or StoreError for a file.
    """
    name, named = "request", Named()
    if isinstance(request, (str, Path)):
        path = Path(request)
        if path.is_dir():
            named, name = [(f"file {p.name}", p.name) for p in sorted(path.rglob("*")) if p.is_file()], path.name
        elif path.is_file():
            named, name = _read(path)
        elif str(request) in data.class_names:
            at = np.flatnonzero(data.y_train == data.class_names.index(str(request)))
            return check_forget_indices(at, data.n_train), str(request)
        else:
            known = [*data.class_names, *_ids(data)[:10_000]]
            if str(request) not in _ids(data):
                raise ForgetSetError(
                    f"{str(request)!r} is no file, folder, class or id.{did_you_mean(str(request), known)}"
                )
            named = [("it", request)]
    elif isinstance(request, Sequence) or hasattr(request, "tolist"):
        values = request.tolist() if hasattr(request, "tolist") else list(request)
        named = [(f"place {i}", value) for i, value in enumerate(values if isinstance(values, list) else [values], 1)]
    else:
        raise ForgetSetError(f"The request is a {type(request).__name__}; give ids, indices, a path or a class.")
    return np.sort(check_forget_indices(_found(named, data), data.n_train)), name


def _ids(data: Dataset) -> list[str]:
    return [] if data.ids is None else data.ids.tolist()


def _read(path: Path) -> tuple[Named, str]:
    if path.suffix.lower() == ".json":
        content = load_json(path)
        keys = [key for key in ("ids", "indices") if isinstance(content, dict) and key in content]
        listed = content[keys[0]] if keys else content
        if not isinstance(listed, list):
            raise ForgetSetError(f"{path} holds no list; give one, or an object with `ids` or `indices`.")
        called = content.get("name") if isinstance(content, dict) else None
        name = called if isinstance(called, str) else path.stem
        return [(f"{path}, place {i}", value) for i, value in enumerate(listed, 1)], name
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read as text ({error}); give UTF-8.") from error
    rows = csv.reader(io.StringIO(text)) if path.suffix.lower() == ".csv" else ([line] for line in text.splitlines())
    return list(_column(path, rows)), path.stem


def _column(path: Path, rows: Iterator[list[str]] | Any) -> Iterator[tuple[str, str]]:
    column = 0
    for number, row in enumerate(rows, 1):
        cells = [cell.strip() for cell in row]
        if number == 1 and (known := [i for i, cell in enumerate(cells) if cell.lower() in COLUMNS]):
            column = known[0]
        elif any(cells):
            yield f"{path}, line {number}", cells[column] if column < len(cells) else ""


def _found(named: Named, data: Dataset) -> list[int]:
    """Indices of what is named; raises ForgetSetError for what is unknown, or named twice."""
    places = {name: i for i, name in enumerate(_ids(data))}
    short: dict[str, int] = {}
    for name, at in places.items():
        last = name.replace("\\", "/").rpartition("/")[2]
        short[last] = -1 if last in short else at  # not unique
    found, faults = dict[int, str](), list[str]()
    for where, value in named:
        if (i := _index(value, places, short, data.n_train)) is None:
            faults.append(f"{where}: {str(value)[:80]!r} is no training point")
        elif i in found:
            faults.append(f"{where}: {str(value)[:80]!r} stands at {found[i].rpartition(', ')[2]} already")
        else:
            found[i] = where
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        form = f"ids such as {ids[0]!r}" if (ids := _ids(data)) else f"numbers from 0 to {data.n_train - 1}"
        raise ForgetSetError(f"{'; '.join(faults[:SHOWN])}{more}. Name each point once, by {form}.")
    return list(found)


def _index(value: Any, places: dict[str, int], short: dict[str, int], n: int) -> int | None:
    if isinstance(value, str) and places:
        at = places.get(value, short.get(value.replace("\\", "/").rpartition("/")[2], -1))
        return None if at < 0 else at
    try:
        i = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return i if 0 <= i < n and (isinstance(value, str) or i == value) and not isinstance(value, bool) else None
