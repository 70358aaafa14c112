"""MLLMU-Bench as it is published: read, written, checked, and taken apart into single questions.

Liu et al., "Protecting Privacy in Multimodal Large Language Models with MLLMU-Bench", NAACL 2025. A split is a folder
of parquet files (or a configuration on the hub) with a row a person: ID, image (a list `images` in the Test set),
biography, question and answer about it, Classification_Task, Generation_Task and Mask_Task. `ft_Data` has instead of
tasks `metadata`, JSON of question-answer pairs; models here are taught the questions of all tasks, not those pairs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from dmmlib.errors import DataError
from dmmlib.files import replacing, short
from dmmlib.studies.multimodal.extra import require
from dmmlib.studies.multimodal.people import IMAGE, TEXT, Row, Splits

TASKS = ("classification", "generation", "cloze")
MODALITIES = (IMAGE, TEXT)
ALWAYS = ("Full_Set", "ft_Data", "Test_Set", "Retain_Set")


@dataclass(frozen=True)
class Question:
    """One question about one person.

    Attributes:
        person: ID.
        split: "train" (Full_Set), "test" (Test_Set) or "public" (Retain_Set).
        task: one of TASKS.
        modality: with the portrait (IMAGE), or text alone (TEXT).
        prompt, answer: what is asked, and the right answer.
        options: of classification, the right one at `label`; else empty.
        label: index into `options`, -1 without.
        image: index of the portrait in the list that `questions` gives, -1 without.
    """

    person: str
    split: str
    task: str
    modality: str
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    label: int = -1
    image: int = -1


def names(percents: Sequence[int]) -> tuple[str, ...]:
    """The splits of a benchmark with these forget sets."""
    pairs = [name for p in percents for name in (f"forget_{p}", f"retain_{100 - p}")]
    return (*ALWAYS, *pairs)


def read(place: str | Path, percents: Sequence[int] = (5, 10, 15)) -> Splits:
    """The splits of a directory with a folder of parquet files each, or of a data set on the hub.

    Raises:
        DataError: for a missing split or an unreadable file.
        ExtraError: without the extra's packages.
    """
    folder = Path(place)
    if not folder.is_dir():
        return {name: _from_hub(str(place), name) for name in names(percents)}
    parquet = require("pyarrow.parquet")
    splits: Splits = {}
    for name in names(percents):
        files = sorted((folder / name).glob("*.parquet"))
        if not files:
            there = sorted(p.name for p in folder.iterdir() if p.is_dir())
            raise DataError(
                f"{folder} lacks the split {name!r} (a folder of .parquet files; it has {', '.join(there) or 'none'}); "
                "add it, or ask for other forget sets."
            )
        try:
            splits[name] = [row for file in files for row in parquet.read_table(file).to_pylist()]
        except (OSError, ValueError) as error:
            raise DataError(f"Split {name!r} of {folder} cannot be read ({error}); restore its files.") from error
    return splits


def _from_hub(place: str, name: str) -> list[Row]:
    datasets = require("datasets")
    try:
        return datasets.load_dataset(place, name, split="train").data.table.to_pylist()
    except Exception as error:  # whatever the hub's client raises, the reader needs one line
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{place!r} is no directory here, and split {name!r} of it cannot be had from the hub ({first}); give a "
            "directory with a folder of parquet files a split."
        ) from error


def write(splits: Splits, folder: Path) -> None:
    """The splits as parquet files that `read` and `datasets` read."""
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    for name, rows in splits.items():
        with replacing(Path(folder) / name / "train-00000-of-00001.parquet") as temporary:
            parquet.write_table(arrow.Table.from_pylist(rows), temporary)


# --- checks --------------------------------------------------------------------------------------------


def picture(row: Row) -> dict[str, Any] | None:
    """The image of a row, the first where it has several, as stored."""
    if row.get("image") is not None:
        return row["image"]
    return (row.get("images") or [None])[0]


def opened(stored: dict[str, Any] | None, where: str) -> Image.Image:
    """A stored image, RGB.

    Raises:
        DataError: naming the row, if it is missing or cannot be decoded.
    """
    try:
        return Image.open(io.BytesIO((stored or {})["bytes"])).convert("RGB")
    except (OSError, KeyError, TypeError, SyntaxError) as error:
        raise DataError(f"{where} has an image that cannot be read ({error}); replace it.") from error


def asked(row: Row) -> list[tuple[str, str, Row]]:
    """Every question of a row, as stored, with its task and modality."""
    choice = row.get("Classification_Task") or {}
    found = [
        ("classification", modality, q)
        for modality, key in ((IMAGE, "Image_Textual_Questions"), (TEXT, "Pure_Text_Questions"))
        for q in choice.get(key) or []
    ]
    for task, key in (("generation", "Generation_Task"), ("cloze", "Mask_Task")):
        found += [(task, TEXT if str(q["Type"]).startswith("Pure") else IMAGE, q) for q in row.get(key) or []]
    return found


def validate(splits: Splits, percents: Sequence[int] = (5, 10, 15)) -> pd.DataFrame:
    """Check a benchmark; count its questions.

    Returns:
        A row a split: people, questions a task and modality, and pairs to fine-tune on.

    Raises:
        DataError: with the split and row, for a missing split or key, two profiles of one ID, an answer outside its
            options, an empty question, an unreadable image, or leakage: people in both a forget and its retain set,
            public figures among the private, a Test question that is a training question with the same image.
    """
    for name in names(percents):
        if not splits.get(name):
            raise DataError(f"The benchmark lacks the split {name!r}, or it is empty; it has {', '.join(splits)}.")
    checked: set[int] = set()
    rows = []
    for name, people in splits.items():
        seen: dict[str, int] = {}
        pairs = 0
        counts = {(task, modality): 0 for task in TASKS for modality in MODALITIES}
        for number, row in enumerate(people):
            where = f"Row {number} of {name!r}"
            _check_keys(row, where, _TOLD if name == "ft_Data" else _ASKED)
            if row["ID"] in seen:
                raise DataError(f"{where} has the ID {row['ID']!r} of row {seen[row['ID']]}; give everybody their own.")
            seen[row["ID"]] = number
            where += f" (ID {row['ID']})"
            if id(row) not in checked:  # splits of a generated benchmark share their rows
                _check_row(row, where)
                checked.add(id(row))
            pairs += len(_pairs(row, where))
            for task, modality, _ in asked(row):
                counts[task, modality] += 1
        asked_of = {f"{t}, {m}": n for (t, m), n in counts.items()}
        rows.append({"split": name, "people": len(people)} | asked_of | {"pairs": pairs})
    _check_leakage(splits, percents)
    return pd.DataFrame(rows)


_ASKED = ("ID", "Classification_Task", "Generation_Task", "Mask_Task")
_TOLD = ("ID", "image", "metadata")


def _check_keys(row: Row, where: str, keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in row]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; the published schema has {', '.join(keys)}.")


def _pairs(row: Row, where: str) -> list[Row]:
    """Pairs to fine-tune on, of a row that has them; questions and answers go by more than one name."""
    try:
        pairs = json.loads(row.get("metadata") or "[]")
        whole = all(
            any(p.get(k) for k in (f, f"Additional_{f.lower()}")) for p in pairs for f in ("Question", "Answer")
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{where} has metadata that are no JSON list of questions and answers ({error}).") from error
    if not whole:
        raise DataError(f"{where} has an empty question or answer in its metadata; fill it in or drop the pair.")
    return pairs


def _check_row(row: Row, where: str) -> None:
    opened(picture(row), where)
    try:
        for task, _, question in asked(row):
            if not question["Question"]:
                raise DataError(f"{where} has an empty {task} question; fill it in or drop it.")
            if task != "classification":
                if not question["Ground_Truth"]:
                    raise DataError(f"{where}, {question['Question']!r}: the answer is empty; fill it in.")
            elif not (question["Options"] or {}).get(question["Correct_Answer"]):
                raise DataError(
                    f"{where}, {question['Question']!r}: the answer {question['Correct_Answer']!r} is not among the "
                    f"options {', '.join(question['Options'] or {}) or 'none'}; correct it."
                )
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} has a question that lacks {error}; see the published schema.") from error


def _check_leakage(splits: Splits, percents: Sequence[int]) -> None:
    ids = {name: {row["ID"] for row in rows} for name, rows in splits.items()}

    def refuse(shared: set[str], text: str) -> None:
        if shared:
            raise DataError(f"Leakage: {text} ({', '.join(sorted(shared)[:3])}{', ...' if len(shared) > 3 else ''}).")

    for p in percents:
        forget, retain = ids[f"forget_{p}"], ids[f"retain_{100 - p}"]
        refuse(forget & retain, f"people are both in 'forget_{p}' and in 'retain_{100 - p}'")
        refuse((forget | retain) ^ ids["Full_Set"], f"'forget_{p}' and 'retain_{100 - p}' together are not 'Full_Set'")
    refuse(ids["Full_Set"] & ids["Retain_Set"], "public figures of 'Retain_Set' are in 'Full_Set' too")
    refuse(ids["ft_Data"] ^ ids["Full_Set"], "'ft_Data' and 'Full_Set' are not of the same people")
    refuse(ids["Test_Set"] - ids["Full_Set"], "'Test_Set' has people that 'Full_Set' lacks")
    taught = {_same(row, q) for row in splits["Full_Set"] for q in asked(row)}
    again = {row["ID"] for row in splits["Test_Set"] for q in asked(row) if _same(row, q) in taught}
    refuse(again, "'Test_Set' asks training questions, word for word with the same image, of people")


def _same(row: Row, question: tuple[str, str, Row]) -> tuple[str, ...]:
    task, modality, q = question
    image = short((picture(row) or {})["bytes"]) if modality == IMAGE else ""
    return row["ID"], task, q["Question"], image


# --- questions -----------------------------------------------------------------------------------------


def questions(rows: Sequence[Row], split: str, images: list[Image.Image], letters: bool = False) -> list[Question]:
    """The questions of some rows; their portraits are appended to `images`.

    Args:
        letters: list the options in the prompt of classification, and have the answer be the letter.
    """
    found = []
    for number, row in enumerate(rows):
        images.append(opened(picture(row), f"Row {number} of the {split} questions (ID {row['ID']})"))
        for task, modality, q in asked(row):
            image = len(images) - 1 if modality == IMAGE else -1
            if task != "classification":
                head = (str(row["ID"]), split, task, modality, q["Question"], q["Ground_Truth"])
                found.append(Question(*head, image=image))
                continue
            keys = [key for key, text in q["Options"].items() if text]
            label = keys.index(q["Correct_Answer"])
            options = tuple(keys if letters else (q["Options"][key] for key in keys))
            listed = "".join(f"\n{key}. {q['Options'][key]}" for key in keys) if letters else ""
            head = (str(row["ID"]), split, task, modality, q["Question"] + listed, options[label])
            found.append(Question(*head, options, label, image))
    return found


def pixels(images: Sequence[Image.Image], side: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Images (n, 3, side, side), float32, scaled and normalised as CLIP's are (own code: no torchvision)."""
    scaled = [np.asarray(i.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255 for i in images]
    centred = np.stack(scaled) - np.asarray(mean, np.float32)
    return (centred / np.asarray(std, np.float32)).transpose(0, 3, 1, 2)
