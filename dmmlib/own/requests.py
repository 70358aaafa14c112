"""Read which training points someone means: indices, ids, file names, folders, classes; as a list, text, CSV, JSON."""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmmlib import forget_sets
from dmmlib.data import Dataset
from dmmlib.errors import ForgetSetError, StoreError
from dmmlib.files import parse_json
from dmmlib.registry import did_you_mean

POSITIONS = ("index", "indices", "idx", "position")  # columns of a table, by what stands in them
NAMES = ("id", "ids", "file", "files", "filename", "file_name", "path", "name", "image", "image_id")
CLASSES = ("class", "class_name", "label")  # read only where it is the only column
SHOWN = 5  # faults that are named
KEEP = "keep the one that says what is meant"
WORD, INDEX, NAME, CLASS, ID = "word", "index", "name", "class", "id"


class Named(NamedTuple):
    """A word that names points, and where it stands, such as "ids.csv, line 3"."""

    where: str
    word: str
    kind: str = WORD  # a WORD of digits is an INDEX; as a NAME, only where the data has no ids; as a CLASS, a label,
    # unless a class has a number for its name; as an ID, nothing but an id


Find = Callable[[str, str], "list[int] | None"]  # empty for a validation point


def resolve(request: Any, data: Dataset) -> tuple[np.ndarray, str]:
    """Find the training points (n,), sorted, that a request names once each, and what the request is called.

    A request is a list of numbers or names; one name; the name of a class, for all its points; a folder, for the files
    in it, by their paths there; or the path of a file that `read` reads.

    Raises ForgetSetError that names unknown points and duplicates with their line, or StoreError for a file.
    """
    find, name = _finder(data), "request"
    if isinstance(request, (str, Path)):
        path, word = Path(request), str(request)
        if not word.strip():
            raise ForgetSetError("The request is empty; give ids, indices, a path or a class.")
        if isinstance(request, str) and word in data.class_names and os.path.exists(word):
            raise ForgetSetError(f"{word!r} may be a class or a path; give ./{word}, or a file whose column is class.")
        if os.path.isdir(path):  # which is False, too, where a name is too long for a file's
            name, files = path.name, sorted(p for p in path.rglob("*") if p.is_file())
            nested = data.ids is not None and any(re.search(r"[/\\]", name) for name in data.ids)
            words = [(p.relative_to(path).as_posix() if nested else p.name, p.absolute().as_posix()) for p in files]
            named = [Named(f"file {w}", *((w, NAME) if find(at, ID) is None else (at, ID))) for w, at in words]
        elif os.path.isfile(path) and (whole := [w for w in (str(path.absolute()), word) if find(w, ID) is not None]):
            named = [Named("The request", whole[0], ID)]
        elif os.path.isfile(path):
            try:
                text = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise StoreError(f"{path} cannot be read as text ({error}); give UTF-8.") from error
            named, called = _parse(text, data, str(path), find)
            name = called or path.stem
        elif word in data.class_names:
            if any(find(word, kind) not in (None, find(word, CLASS)) for kind in (NAME, INDEX)):
                raise ForgetSetError(
                    f"{word!r} may be a class or a point; give a file of which the column is called class, or index."
                )
            named, name = [Named("The request", word, CLASS)], word
        elif find(word, NAME) is not None:
            named = [Named("The request", word, NAME)]
        else:
            classes = [name for name in data.class_names if not name.isdigit()]
            known = [*classes, *(() if data.ids is None else data.ids[:10_000].tolist())]
            hint = " Give several as a list, or in a file." if "," in word else did_you_mean(word, known)
            raise ForgetSetError(f"{word!r:.80} is no file, folder, class or id.{hint}")
    elif hasattr(request, "tolist") or (isinstance(request, Sequence) and not isinstance(request, (bytes, bytearray))):
        values = request.tolist() if hasattr(request, "tolist") else list(request)
        named = _listed(values if isinstance(values, list) else [values], "")
    else:
        raise ForgetSetError(f"The request is a {type(request).__name__}; give ids, indices, a path or a class.")
    return np.sort(forget_sets.check_forget_indices(_points(named, data, find, once=True), data.n_train)), name


def read(text: str, data: Dataset, source: str = "The text") -> np.ndarray:
    """Return the training points (n,), int64, that a text names, in the order given and each once.

    A whole number is an index (0 is the first training point); in a column called id, or as JSON's text, it is an id
    where the data has ids. Any other word is an id, the end of one's path, a folder of them, or a class.

    Args:
        text: words in any separators; CSV with a header that names its columns, of which one called index, id, file
            or class is read; a JSON list; or a saved forget set.
        source: named where something is wrong, and a CSV by its ending.

    Raises:
        ForgetSetError: for anything that is none of this data's, or a set saved for other data.
    """
    find = _finder(data)
    named, _ = _parse(text, data, source, find)
    if not named:
        raise ForgetSetError(f"{source} is empty; give indices such as 3, 14, 15, ids, file names or a class.")
    return np.array(_points(named, data, find), np.int64)


def _points(named: Iterable[Named], data: Dataset, find: Find, once: bool = False) -> list[int]:
    """Indices of what is named; raises ForgetSetError for what names nothing or, if `once`, a point again."""
    found, faults = dict[int, str](), list[str]()
    for where, word, kind in named:
        points = find(word, kind)
        if not points:
            unseen = word in data.class_names and not word.isdecimal()  # a number was looked up as an id
            empty = "is a class without training points" if unseen else "is no training point"
            why = empty if points is None else "validates, and was not trained on"
            faults.append(f"{where}: {word[-80:]!r} {why}")
        elif once and (again := [i for i in points if i in found]):
            faults.append(f"{where}: {word!r:.80} stands at {found[again[0]].rpartition(', ')[2]} already")
        found |= {i: where for i in points or () if i not in found}
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        known = "" if data.ids is None else f", ids such as {data.ids[0]!s:.60}"
        form = f"indices from 0 to {data.n_train - 1}{known}, or classes{', each point once' if once else ''}"
        raise ForgetSetError(f"{'; '.join(faults[:SHOWN])}{more}. Give {form}.")
    return list(found)


def _finder(data: Dataset) -> Find:
    """Look words up, of a kind as in `Named`: the points that they name, or None."""
    whole, names = _by_name(() if data.ids is None else data.ids.tolist(), data.val_ids)
    known = list(enumerate(data.class_names))
    classes = {name.lower(): label for label, name in known} | {name: label for label, name in known}
    counted = data.ids is not None and any(name.isdecimal() for name in data.ids)  # a number then is rather an id
    numbered = any(name.isdecimal() for name in data.class_names)  # a number then names a class, and is no label

    def find(word: str, kind: str) -> list[int] | None:
        if kind != CLASS:
            number = re.fullmatch(r"([0-9]{1,18})(\.0*)?", word)
            if number and kind != ID and (kind != NAME or data.ids is None):
                index = int(number[1])
                named = names.get(word, None if counted else [index]) if kind == WORD else [index]
                if index < data.n_train and named != [index]:
                    which = "no id, but an index" if named is None else "the id of one point and the index of another"
                    raise ForgetSetError(f"{word!r} is {which}; give a CSV whose column is called id, or index.")
                return [index] if index < data.n_train else names.get(word) if kind == WORD else None
            parts = word.replace("\\", "/").strip("/").removeprefix("./").split("/")
            ends = ("/".join(parts[k:]) for k in range(1, len(parts) - 1))  # of a path to a file of the data
            points = names.get("/".join(parts), next((whole[end] for end in ends if end in whole), None))
            if points is not None or kind == ID:
                return points
        if word.isdecimal():
            label = None if kind != CLASS else classes.get(word) if numbered else int(word)
        else:
            label = classes.get(word, classes.get(word.lower()))
        return np.flatnonzero(data.y_train == label).tolist() or None if label is not None else None

    return find


def _by_name(ids: Iterable[str], val_ids: Iterable[str]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Ids, with the points that they name, none if they validate; and with folders, and ends that only one has."""
    exact, folders, ends = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list), {}
    for i, name in enumerate(ids):
        parts = name.replace("\\", "/").split("/")
        exact["/".join(parts)].append(i)
        for k in range(1, len(parts)):
            folders["/".join(parts[:k])].append(i)
            end = "/".join(parts[k:])
            ends[end] = None if end in ends else [i]
    whole = {name.replace("\\", "/"): list[int]() for name in val_ids} | exact
    return whole, {end: at for end, at in ends.items() if at} | folders | whole


def _parse(text: str, data: Dataset, source: str, find: Find) -> tuple[list[Named], str]:
    """The words of a text, and what it is called where it says so."""
    text = text.lstrip("\ufeff").strip()
    if text.startswith("{") or re.match(r'\[\s*["{]|\[[^"\]]*\[', text):  # nested lists, too, which are refused
        return _of_json(text, data, source)
    if text.startswith("[") and text.count("[") != text.count("]"):
        raise ForgetSetError(f"{source} is a list whose end is missing; give the whole of it.")
    lines = text.splitlines()
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    header = [cell.strip(" \t\"'") for cell in first.split(delimiter)]
    columns = [cell.lower() for cell in header]
    known = (*POSITIONS, *NAMES, *(CLASSES if len(columns) == 1 else ()))
    column = next((columns.index(name) for name in known if name in columns), None)
    if column is not None and not (len(header) == 1 and find(header[0], WORD)):
        says = [name for name in columns if name in POSITIONS or (name in NAMES and data.ids is not None)]
        if len(says) > 1 and (set(says) & set(POSITIONS) or len(set(says)) < len(says)):
            raise ForgetSetError(f"{source} has columns {' and '.join(map(repr, says))}; {KEEP}.")
        kind = NAME if columns[column] in NAMES else CLASS if columns[column] in CLASSES else INDEX
        try:
            table = list(csv.reader(lines[1:], delimiter=delimiter, skipinitialspace=True))
        except csv.Error as error:
            raise ForgetSetError(f"{source} is no CSV ({error}); mend it, or give one column.") from error
        rows = [(i, [cell.strip() for cell in row]) for i, row in enumerate(table, 2)]
        if long := [i for i, row in rows if any(row[len(header) :])]:
            raise ForgetSetError(f"{source}, line {long[0]} has more cells than the first line; mend it.")
        if empty := [i for i, row in rows if any(row) and not any(row[column : column + 1])]:
            raise ForgetSetError(f"{source}, line {empty[0]} has no {header[column]}; give one, or drop the line.")
        return [Named(f"{source}, line {i}", row[column], kind) for i, row in rows if any(row)], ""
    alike = len(lines) == 1 and len({cell.isdigit() for cell in header}) == 1
    if source.lower().endswith((".csv", ".tsv")) and len(header) > 1 and not alike:
        raise ForgetSetError(f"{source} begins with {first!r:.60}; name its columns there, one of them id or index.")
    named = []
    for i, line in enumerate(lines, 1):
        parts = [part.strip(" \t\"'[]()") for part in re.split("[,;]", line)]
        words = [word for part in parts if part for word in ([part] if find(part, WORD) is not None else part.split())]
        named += [Named(f"{source}, line {i}", word) for word in words]
    return named, ""


def _of_json(text: str, data: Dataset, source: str) -> tuple[list[Named], str]:
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ForgetSetError(f"{source} is no JSON ({error}); give a saved forget set or numbers.") from error
    if isinstance(content, list):
        return _listed(content, f"{source}, "), ""
    called = content["name"] if isinstance(content.get("name"), str) else ""
    if not {"ids", "indices", "name", "data_sha256"} & set(content):
        raise ForgetSetError(f"{source} has the keys {list(content)!r:.80}; give a list, or 'ids' or 'indices'.")
    if {"ids", "indices"} <= set(content):
        raise ForgetSetError(f"{source} has 'ids' and 'indices'; {KEEP}.")
    if "ids" in content and isinstance(content["ids"], list):
        named = _listed(content["ids"], f"{source}, ")
        return [Named(where, word, NAME) for where, word, _ in named], called
    forms = {"indices": (list, "a list of whole numbers"), "data_sha256": (str, "text"), "made_by": (dict, "a mapping")}
    for key, (kind, expected) in forms.items():
        if not isinstance(content.get(key, kind()), kind):
            raise ForgetSetError(f"{source} has {key} = {content[key]!r:.80}; give {expected}, as ForgetSet.save does.")
    for index in content.get("indices", ()):
        if type(index) is not int:
            raise ForgetSetError(f"{source} has {index!r:.80} among its indices; give whole numbers in one flat list.")
    if set(content) <= {"indices", "name"} and content.get("indices"):
        return _listed(content["indices"], f"{source}, "), called
    saved = forget_sets.parse(content | {"made_by": {}}, data, source)
    return _listed(saved.indices.tolist(), f"{source}, "), called


def _listed(values: Sequence[Any], source: str) -> list[Named]:
    """Words of a list: what is no text is an index."""
    given = source.removesuffix(", ") or "The request"
    if wrong := [value for value in values if isinstance(value, (dict, list, tuple))]:
        raise ForgetSetError(f"{given} holds {wrong[0]!r:.80}; give one flat list of numbers or names.")
    if any(isinstance(value, bool) for value in values):
        raise ForgetSetError(f"{given} is a mask; give indices, np.flatnonzero(mask).")
    whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    return [Named(f"{source}place {i}", str(v), NAME if isinstance(v, str) else INDEX) for i, v in enumerate(whole, 1)]
