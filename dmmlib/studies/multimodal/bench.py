"""Read and check MLLMU-Bench as it is published, and take it apart into single questions.

Liu et al., "Protecting Privacy in Multimodal Large Language Models with MLLMU-Bench", NAACL 2025. A split is a folder
of parquet files (or a configuration on the hub) with one row per person: ID, image (a list `images` in the Test set),
biography, question and answer about it, Classification_Task, Generation_Task and Mask_Task. `ft_Data` has instead of
tasks `metadata`, JSON of question-answer pairs; models here are taught the questions of all tasks, not those pairs.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from dmmlib.errors import DataError
from dmmlib.files import short
from dmmlib.studies.multimodal.extra import require
from dmmlib.studies.multimodal.people import IMAGE, TEXT, Row, Splits

TASKS = ("classification", "generation", "cloze")


@dataclass(frozen=True)
class Question:
    """One question about one person."""

    person: str  # ID
    split: str  # "train" (Full_Set), "test" (Test_Set) or "public" (Retain_Set)
    task: str  # one of TASKS
    modality: str  # IMAGE: asked with the portrait; TEXT: text alone
    prompt: str
    answer: str  # the correct one
    options: tuple[str, ...] = ()  # of classification
    label: int = -1  # index of the correct option
    image: int = -1  # index of the portrait in the list that `questions` extends


def names(percents: Sequence[int]) -> tuple[str, ...]:
    """Return the splits of a benchmark with these forget sets."""
    pairs = [name for p in percents for name in (f"forget_{p}", f"retain_{100 - p}")]
    return ("Full_Set", "ft_Data", "Test_Set", "Retain_Set", *pairs)


def read(place: str | Path, percents: Sequence[int]) -> Splits:
    """Read the splits from a directory with a folder of parquet files for each, or from a data set on the hub.

    Raises DataError for a missing split or an unreadable file, and ExtraError without the extra's packages.
    """
    return {name: _read(place, name) for name in names(percents)}


def _read(place: str | Path, name: str) -> list[Row]:
    here = Path(place).is_dir()
    package = require("pyarrow.parquet" if here else "datasets")
    try:
        if here:
            return package.read_table(Path(place) / name).to_pylist()
        return package.load_dataset(str(place), name, split="train").data.table.to_pylist()
    except Exception as error:  # whatever the hub's client raises, the reader needs one line
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"Split {name!r} of {str(place)!r}{'' if here else ', which is no folder here,'} cannot be read ({first}); "
            "give a folder with a folder of parquet files for each split, or other forget sets."
        ) from error


def _picture(row: Row) -> bytes:
    """The image of a row as it is stored, the first where there are several."""
    return (row.get("image") or row["images"][0])["bytes"]


def _opened(row: Row, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(_picture(row))).convert("RGB")
    except (IndexError, OSError, KeyError, TypeError, SyntaxError) as error:
        raise DataError(f"{where} has an image that cannot be read ({error}); replace it.") from error


def _asked(row: Row, where: str) -> list[tuple[str, str, Row]]:
    """Every question of a row, as it is stored and once it is checked, after its task and modality."""
    choice = row.get("Classification_Task") or {}
    keys = ((IMAGE, "Image_Textual_Questions"), (TEXT, "Pure_Text_Questions"))
    found = [("classification", modality, q) for modality, key in keys for q in choice.get(key) or []]
    try:
        for task, key in (("generation", "Generation_Task"), ("cloze", "Mask_Task")):
            found += [(task, TEXT if str(q["Type"]).startswith("Pure") else IMAGE, q) for q in row.get(key) or []]
        for task, _, q in found:
            if not q["Question"]:
                raise DataError(f"{where} has an empty {task} question; fill it in or drop it.")
            if task != "classification" and not q["Ground_Truth"]:
                raise DataError(f"{where}, {q['Question']!r}: the answer is empty; fill it in.")
            if task == "classification" and not (q["Options"] or {}).get(q["Correct_Answer"]):
                raise DataError(
                    f"{where}, {q['Question']!r}: the answer {q['Correct_Answer']!r} is not among the options "
                    f"{', '.join(q['Options'] or {}) or 'none'}; correct it."
                )
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} has a question that lacks {error}; see the published schema.") from error
    return found


def validate(splits: Splits, percents: Sequence[int]) -> pd.DataFrame:
    """Check a benchmark, and count for each split its people, questions of each task and modality, and pairs.

    Raises:
        DataError: with the split and row, for a missing split or key, two profiles of one ID, an answer outside its
            options, an empty question, an unreadable image, or leakage: people in both a forget and its retain set,
            public figures among the private, a Test question that is a training question with the same image.
    """
    for name in names(percents):
        if not splits.get(name):
            raise DataError(f"The benchmark lacks the split {name!r}, or it is empty; it has {', '.join(splits)}.")
    opened: set[int] = set()
    columns = [f"{task}, {modality}" for task in TASKS for modality in (IMAGE, TEXT)]
    tasks, counted = ("Classification_Task", "Generation_Task", "Mask_Task"), []
    for name, rows in splits.items():
        keys = ("ID", *(("image", "metadata") if name == "ft_Data" else tasks))
        counts, pairs, seen = Counter[str](), 0, dict[str, int]()
        for number, row in enumerate(rows):
            where = f"Row {number} of {name!r}"
            if missing := [key for key in keys if key not in row]:
                raise DataError(f"{where} lacks {', '.join(missing)}; the published schema has {', '.join(keys)}.")
            if row["ID"] in seen:
                raise DataError(f"{where} has the ID {row['ID']!r} of row {seen[row['ID']]}; give everybody their own.")
            seen[row["ID"]] = number
            where += f" (ID {row['ID']})"
            if id(row) not in opened:  # splits of a generated benchmark share their rows
                _opened(row, where)
                opened.add(id(row))
            pairs += _count_pairs(row, where)
            counts.update(f"{task}, {modality}" for task, modality, _ in _asked(row, where))
        counted.append({"split": name, "people": len(rows), **{c: counts[c] for c in columns}, "pairs": pairs})
    _check_leakage(splits, percents)
    return pd.DataFrame(counted)


def _count_pairs(row: Row, where: str) -> int:
    """The number of pairs to fine-tune on; the files call a question and an answer by more than one name."""
    try:
        pairs = json.loads(row.get("metadata") or "[]")
        whole = [all(p.get(k) or p.get(f"Additional_{k.lower()}") for k in ("Question", "Answer")) for p in pairs]
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{where} has metadata that are no JSON list of questions and answers ({error}).") from error
    if not all(whole):
        raise DataError(f"{where} has an empty question or answer in its metadata; fill it in or drop the pair.")
    return len(pairs)


def _check_leakage(splits: Splits, percents: Sequence[int]) -> None:
    ids = {name: {row["ID"] for row in rows} for name, rows in splits.items()}
    full, public, test = ids["Full_Set"], ids["Retain_Set"], ids["Test_Set"]
    taught = {key for row in splits["Full_Set"] for key in _as_asked(row)}
    again = {row["ID"] for row in splits["Test_Set"] if taught.intersection(_as_asked(row))}
    wrong = []
    for forget, retain in ((f"forget_{p}", f"retain_{100 - p}") for p in percents):
        wrong.append((ids[forget] & ids[retain], f"people are both in {forget!r} and in {retain!r}"))
        wrong.append(((ids[forget] | ids[retain]) ^ full, f"{forget!r} and {retain!r} together are not 'Full_Set'"))
    wrong += [
        (full & public, "public figures of 'Retain_Set' are in 'Full_Set' too"),
        (ids["ft_Data"] ^ full, "'ft_Data' and 'Full_Set' are not of the same people"),
        (test - full, "'Test_Set' has people that 'Full_Set' lacks"),
        (again, "'Test_Set' asks training questions, word for word with the same image, of people"),
    ]
    for shared, text in wrong:
        if shared:
            raise DataError(f"Leakage: {text} ({', '.join(sorted(shared)[:3])}{', ...' if len(shared) > 3 else ''}).")


def _as_asked(row: Row) -> list[tuple[str, ...]]:
    """What makes the questions of a row the same as another's: person, task, words, and the image if it is shown."""
    image = short(_picture(row))
    return [(row["ID"], task, q["Question"], image if how == IMAGE else "") for task, how, q in _asked(row, "")]


def questions(rows: Sequence[Row], split: str, images: list[Image.Image], letters: bool = False) -> list[Question]:
    """Take rows apart into questions; their portraits are appended to `images`.

    With `letters` the prompt of classification lists the options, and the answer is the letter.
    """
    found = []
    for number, row in enumerate(rows):
        where = f"Row {number} of the {split} questions (ID {row['ID']})"
        images.append(_opened(row, where))
        for task, modality, q in _asked(row, where):
            head = (str(row["ID"]), split, task, modality)
            image = len(images) - 1 if modality == IMAGE else -1
            if task != "classification":
                found.append(Question(*head, q["Question"], q["Ground_Truth"], image=image))
                continue
            texts = {key: text for key, text in q["Options"].items() if text}
            options, label = tuple(texts if letters else texts.values()), list(texts).index(q["Correct_Answer"])
            listed = "".join(f"\n{key}. {text}" for key, text in texts.items()) if letters else ""
            found.append(Question(*head, q["Question"] + listed, options[label], options, label, image))
    return found


def pixels(images: Sequence[Image.Image], side: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Scale and normalise images as CLIP's are, without torchvision: (n, 3, side, side), float32."""
    scaled = [np.asarray(i.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255 for i in images]
    centred = np.stack(scaled) - np.asarray(mean, np.float32)
    return (centred / np.asarray(std, np.float32)).transpose(0, 3, 1, 2)
