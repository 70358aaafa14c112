"""Read which training points someone means: indices, ids, file names, folders or class names, as text, CSV or JSON."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from functools import lru_cache
from typing import Any

import numpy as np

from dmmlib import forget_sets
from dmmlib.data import Dataset
from dmmlib.errors import ForgetSetError
from dmmlib.files import parse_json

POSITIONS = ("index", "indices", "idx", "position")
NAMES = ("id", "ids", "file", "files", "filename", "file_name", "path", "name", "image", "image_id")
CLASSES = ("class", "class_name", "label")  # columns of classes, read only where no other column says more
EXPECTED = "give indices such as 3, 14, 15, ids, file names or a class"


def read(text: str, data: Dataset, source: str = "The text") -> np.ndarray:
    """Return the training points (n,), int64, in the order given and each once.

    A whole number is an index (0 is the first training point); in a column called id, or among JSON's "ids", it is an
    id where the data has ids. Any other word is an id, the end of one's path, a folder of them, or a class.

    Args:
        text: words in any separators; CSV with a header that names its columns, of which one called index, id, file
            or class is read; a JSON list; or a saved forget set.
        source: named where something is wrong, and a CSV by its ending.

    Raises:
        ForgetSetError: for anything that is none of this data's, or a set saved for other data.
    """
    text = text.lstrip("\ufeff").strip()
    if text.startswith("{") or re.match(r'\[\s*["{]', text):
        return _of_json(text, data, source)
    first, _, rest = text.partition("\n")
    delimiter = max(",;\t", key=first.count)
    header = [cell.strip(" \t\r\"'") for cell in first.split(delimiter)]
    column = _column(header, data)
    if column is not None:
        kind, cells = header[column].lower(), _cells(rest, delimiter, column, source)
        return _found(cells, data, f"{source}, column {kind!r},", of_ids=kind in NAMES, of_classes=kind in CLASSES)
    if source.lower().endswith((".csv", ".tsv")) and len(header) > 1 and rest:
        raise ForgetSetError(f"{source} begins with {first!r:.60}; name its columns there, one of them id or index.")
    whole = [part.strip(" \t\"'[]()") for part in re.split(r"[\n,;]+", text)]
    words = [w for part in whole if part for w in ([part] if _named(part, data) is not None else part.split())]
    return _found(words, data, source)


def _cells(rows: str, delimiter: str, column: int, source: str) -> list[str]:
    """What stands in a column, without rows that have nothing there."""
    try:
        table = list(csv.reader(rows.splitlines(), delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise ForgetSetError(f"{source} is no CSV ({error}); mend it, or give one column.") from error
    return [row[column].strip() for row in table if len(row) > column and row[column].strip()]


def _column(header: list[str], data: Dataset) -> int | None:
    """Which column to read: an index before an id before a class; None where the line is no header."""
    names = [cell.lower() for cell in header]
    if len(names) == 1 and _named(header[0], data) is not None:
        return None
    return next((names.index(name) for name in (*POSITIONS, *NAMES, *CLASSES) if name in names), None)


def _of_json(text: str, data: Dataset, source: str) -> np.ndarray:
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ForgetSetError(f"{source} is no JSON ({error}); give a saved forget set or numbers.") from error
    if isinstance(content, dict) and set(content) <= {"ids", "name"} and "ids" in content:
        content, of_ids = content["ids"], True
    else:
        of_ids = False
    if isinstance(content, list):
        if wrong := [item for item in content if type(item) not in (int, str)]:
            raise ForgetSetError(f"{source} holds {wrong[0]!r:.80}; give one flat list of numbers or names.")
        return _found([str(item) for item in content], data, source, of_ids=of_ids)
    _check_form(content, source)
    return forget_sets.parse(content | {"made_by": {}}, data, source).indices


def _check_form(saved: dict[str, Any], source: str) -> None:
    forms = {"indices": (list, "a list of whole numbers"), "data_sha256": (str, "text"), "made_by": (dict, "a mapping")}
    for key, (kind, expected) in forms.items():
        if not isinstance(saved.get(key, kind()), kind):
            raise ForgetSetError(f"{source} has {key} = {saved[key]!r:.80}; give {expected}, as ForgetSet.save does.")
    for index in saved.get("indices", ()):
        if type(index) is not int:
            raise ForgetSetError(f"{source} has {index!r:.80} among its indices; give whole numbers in one flat list.")


def _found(words: list[str], data: Dataset, source: str, of_ids: bool = False, of_classes: bool = False) -> np.ndarray:
    """The points that the words name, each once; raises ForgetSetError with the first that names none."""
    points, wrong = dict[int, None](), list[str]()
    for word in words:
        is_index = not of_classes and not (of_ids and data.ids is not None) and re.fullmatch(r"-?\d{1,18}", word)
        named = in_range([int(word)], data.n_train) if is_index else _named(word, data, of_classes)
        if named is None:
            wrong.append(word)
        else:
            points |= dict.fromkeys(named.tolist())
    if wrong or not words:
        given = f"holds {wrong[0]!r:.60}, which names nothing here" if wrong else "is empty"
        more = f" ({len(wrong)} of {len(words)} such)" if len(wrong) > 1 else ""
        known = f", such as {data.ids[0]!s:.60}" if wrong and data.ids is not None else ""
        raise ForgetSetError(f"{source} {given}{more}; {EXPECTED}{known}.")
    return np.fromiter(points, np.int64)


def _named(word: str, data: Dataset, classes_only: bool = False) -> np.ndarray | None:
    """The points that have this name, lie in this folder, or are of this class."""
    if not classes_only and data.ids is not None:
        found = _by_name(tuple(data.ids.tolist())).get(word.replace("\\", "/").strip("/").removeprefix("./"))
        if found is not None:
            return np.array(found, np.int64)
    classes = {name.lower(): label for label, name in enumerate(data.class_names) if not name.isdigit()}
    label = classes.get(word.lower(), int(word) if classes_only and word.isdigit() else None)
    members = np.empty(0, np.int64) if label is None else np.flatnonzero(data.y_train == label)
    return members if len(members) else None


@lru_cache(maxsize=4)
def _by_name(ids: tuple[str, ...]) -> dict[str, list[int]]:
    """Ids, their folders, and the ends of their paths where only one has it, with the points that they name."""
    exact, folders, ends = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list), {}
    for i, name in enumerate(ids):
        parts = name.replace("\\", "/").split("/")
        exact[name].append(i)
        for k in range(1, len(parts)):
            folders["/".join(parts[:k])].append(i)
            end = "/".join(parts[k:])
            ends[end] = None if end in ends else [i]
    return {end: at for end, at in ends.items() if at} | folders | exact


def in_range(indices: Any, n_train: int) -> np.ndarray:
    """Return the indices as int64; raises ForgetSetError for the first that is no training point's."""
    given = np.asarray(indices).reshape(-1)
    if len(given) and not np.issubdtype(given.dtype, np.integer):
        raise ForgetSetError(f"Indices were given as {given.dtype}; give whole numbers from 0 to {n_train - 1}.")
    outside = given[(given < 0) | (given >= n_train)]
    if len(outside):
        raise ForgetSetError(f"{outside[0]} is no training image; only those can be forgotten: use 0 to {n_train - 1}.")
    return given.astype(np.int64)
