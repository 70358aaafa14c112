"""The study's notebooks in batch: through papermill, two at a time where that is faster.

A stage is not executed again while its executed notebook and the tables that it wrote are there and its key is the
same. The key is made of what stores are keyed by: parameters, the content of files that they name, and the version of
every component; and of the notebook's source. Source of the library is not in it: a comment executes nothing again,
and who changes what a component computes raises its version.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmmlib.app.stage import Execution
from dmmlib.errors import DmmError, StoreError
from dmmlib.files import config_hash, load_json, read_json, resource, short, write_json
from dmmlib.presets import PLACES
from dmmlib.progress import PROGRESS_FILE, Pulse, duration
from dmmlib.registry import all_versions

NOTEBOOKS = resource("notebooks")
NEEDS = {"03": ("02",), "04": ("02",), "05": ("04",), "07": ("04",)}
"""Whose work a stage takes up; the others stand alone."""
ORDER = {
    "02": 597, "04": 854, "07": 505, "09": 538, "08": 443, "11": 192, "10": 173, "05": 46, "03": 94, "06": 59, "01": 34,
}  # fmt: skip
"""What is begun first where several stages could be: the main results, then what takes long; and seconds that each took
of the laptop preset on two cores, which tell how much of a run is done until one has run here."""

RATE = 325_000  # plain sample gradients per second of the laptop preset's model on both of these cores
TRAINING = ("02", "04")  # stages that keep every core busy by themselves
STUDY = ("02", "03", "04", "05", "07")  # stages of the study's own models and forget sets; others train small ones
SPEED = {"chunk": "auto", "compile": "auto", "shard": 100}  # of ensembles: keys hold the defaults, whatever is set

Say = Callable[[str, bool], None]
"""Told a line about a stage, and whether something was done."""


def stages() -> dict[str, Path]:
    """Return the notebooks by their number: {"01": path, ...}."""
    return {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}


def key(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """Hash all that an executed notebook depends on: its source, without outputs, its parameters, versions and grids.

    Where things run (`presets.PLACES`) and how fast does not count, and of a file that is named its content does.
    """
    import dmmlib.study  # noqa: F401 (imports whatever registers components)
    from dmmlib.unlearn.base import METHODS

    preset = parameters.get("preset")
    if isinstance(preset, Mapping):
        counts = {k: v for k, v in preset.items() if k not in PLACES}
        parameters = {**parameters, "preset": counts | {"ensembles": {**preset.get("ensembles", {}), **SPEED}}}
    grids = {name: METHODS[name].space for name in METHODS}
    try:
        source = [cell["source"] for cell in load_json(notebook)["cells"]]
    except (LookupError, TypeError) as error:
        raise StoreError(f"{notebook} is no notebook; restore it.") from error
    made_of = {"notebook": source, "versions": all_versions(), "grids": grids}
    return config_hash({"parameters": _by_content(parameters)} | made_of)


def _by_content(value: Any, name: str = "") -> Any:
    """The same, with a hash of its content for the path of a file, and a list of its files for a folder of data."""
    if isinstance(value, Mapping):
        return {k: _by_content(v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_by_content(v) for v in value]
    if isinstance(value, str) and os.path.isabs(value) and os.path.isfile(value):
        with open(value, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if name == "path" and isinstance(value, str) and os.path.isdir(value):
        files = ((p.relative_to(value).as_posix(), p.stat()) for p in Path(value).rglob("*") if p.is_file())
        return sorted((name, found.st_size, found.st_mtime_ns) for name, found in files)
    return value


@dataclass(frozen=True)
class _Stage:
    """A notebook to be executed, and where it goes."""

    notebook: Path
    out: Path
    key: str
    part: Path  # where it is executed, alone, before it takes the place of what was there

    @property
    def record(self) -> Path:
        return self.out / f".{self.notebook.stem}.json"

    def done(self) -> bool:
        """Whether what was executed for the same key is still there and as it was written."""
        try:
            record = read_json(self.record)
            return record["key"] == self.key and all(self._hash(n) == h for n, h in record["files"].items())
        except (StoreError, OSError, LookupError, TypeError, AttributeError):
            return False

    def expected(self) -> tuple[float, bool]:
        """Seconds that it takes, and whether that is because it took them here."""
        try:
            return float(read_json(self.record)["seconds"]), True
        except (StoreError, OSError, LookupError, TypeError, ValueError):
            return float(ORDER.get(self.notebook.name[:2], 60)), False

    def keep(self, error: str, began: float, say: Say) -> None:
        """Put what was executed where it belongs, and say so; raises DmmError if there was an error."""
        failed = self.out / f"{self.notebook.stem}-failed.ipynb"
        try:
            if error:
                see = ""
                if self.part.exists():
                    os.replace(self.part, failed)
                    see = f"; see {failed}"
                raise DmmError(f"{self.notebook.stem} failed: {error} Everything trained is kept{see}.")
            os.replace(self.part, self.out / self.notebook.name)
            failed.unlink(missing_ok=True)
            seconds = time.time() - began
            named = self.notebook.read_text(encoding="utf-8")  # others may have written tables of theirs meanwhile
            tables = [p.name for p in self.out.parent.glob("*.csv") if p.stat().st_mtime > began and p.name in named]
            kept = {name: self._hash(name) for name in sorted([f"{self.out.name}/{self.notebook.name}", *tables])}
            write_json(self.record, {"key": self.key, "seconds": round(seconds, 1), "files": kept})
        except OSError as problem:
            reason = f"{problem.strerror} ({self.out})." if problem.strerror else str(problem)
            raise DmmError(f"{self.notebook.stem} failed: {error or reason} Everything trained is kept.") from problem
        say(f"{self.notebook.stem}: done in {seconds:.0f} s", True)

    def _hash(self, name: str) -> str:
        return short((self.out.parent / name).read_bytes())


def expected(numbers: Collection[str], out: Path, pace: float) -> tuple[float, bool]:
    """About how many seconds stages take on two cores, and whether that is because they took them here.

    Args:
        out: where their notebooks were executed, if they were.
        pace: by how much longer than `ORDER` says a stage takes that was not.
    """
    told = {n: _Stage(path, out, "", out).expected() for n, path in stages().items() if n in numbers}
    took = {n: seconds * (1 if here else pace) for n, (seconds, here) in told.items()}
    side_by_side = 2 if len(took) > 1 else 1
    return sum(s / (1 if n in TRAINING else side_by_side) for n, s in took.items()), all(h for _, h in told.values())


def run(
    notebooks: Iterable[Path],
    out: Path,
    parameters: Mapping[str, Any],
    say: Say,
    *,
    force: bool = False,
    threads: int = 1,
    wide: Collection[str] = (),
    environment: Mapping[str, str] | None = None,
    executed: Callable[[], object] = lambda: None,
) -> None:
    """Execute notebooks of stages, each in a process of its own; two at a time where there are threads for two.

    Args:
        out: where executed ones go; their tables go to the folder that it is in.
        force: execute also what is done.
        threads: shared by two notebooks; with 1, they run one after the other, with torch's own number of threads.
        wide: numbers of the stages that keep every core busy by themselves, and run alone.
        environment: variables that kernels are given besides this process's.
        executed: called when one was executed, whether or not it failed.

    Raises:
        DmmError: if one fails; what runs beside it is finished and kept, nothing else is begun.
        StoreError: if nothing can be written.
    """
    from tqdm import tqdm

    todo = {}
    for notebook in notebooks:
        part = out / f".{notebook.stem}.{uuid.uuid4().hex[:8]}.part"
        stage = _Stage(notebook, out, key(notebook, parameters), part)
        if stage.done() and not force:
            say(f"{notebook.stem}: already done", False)
        else:
            todo[notebook.name[:2]] = stage
    at_once = 2 if threads > 1 and len(todo) > 1 else 1
    waiting = sorted(todo, key=(*ORDER, *todo).index)
    running: dict[str, Execution] = {}
    failed: DmmError | None = None
    bar = tqdm(bar_format="{desc}", leave=False, disable=None)  # silent where it is no terminal
    share = _Share({number: stage.expected() for number, stage in todo.items()}, at_once, wide)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, bar, ExitStack() as stack:
            (told := Path(folder, "told")).mkdir()
            pulse = stack.enter_context(Pulse(lambda: f"{share} | {_said(told)}" if bar.disable else ""))
            while running or (waiting and failed is None):
                while failed is None and len(running) < at_once and (number := _next(waiting, running, wide)):
                    waiting.remove(number)
                    place = os.environ.get(PROGRESS_FILE, str(told / number))  # of whoever started this command
                    given = {**(environment or {}), PROGRESS_FILE: place}
                    if at_once > 1 and number not in wide:
                        given["OMP_NUM_THREADS"] = str(threads // 2)
                    stage, outcome = todo[number], Path(folder, number)
                    running[number] = Execution(stage.notebook, stage.part, parameters, given, outcome)
                    share.began[number] = time.time()
                time.sleep(0.2)
                bar.set_description_str(f"{share} | {_said(told)}")
                for number in [n for n, execution in running.items() if not execution.running()]:
                    (told / number).unlink(missing_ok=True)
                    problem = running.pop(number).error()
                    try:
                        executed()
                        todo[number].keep(problem, share.began[number], say)
                        share.took[number] = time.time() - share.began[number]
                        pulse.said()
                    except DmmError as error:
                        if failed:
                            say(str(error), False)
                        failed = failed or error
    except OSError as error:
        raise StoreError(
            f"Nothing can be executed into {out} ({error}); free space or choose another place."
        ) from error
    finally:
        with _undisturbed():
            for execution in running.values():
                execution.interrupt()
            for execution in running.values():
                execution.end()
            for stage in todo.values():
                with suppress(OSError):
                    stage.part.unlink()
    if failed is not None:
        raise failed


class _Share:
    """How much of all stages is done, by what each is expected to take, and how long the others will."""

    def __init__(self, expected: Mapping[str, tuple[float, bool]], at_once: int, wide: Collection[str]) -> None:
        self._expected, self._at_once, self._wide, self._said = expected, at_once, wide, 0.0
        self.began, self.took = dict[str, float](), dict[str, float]()  # of stages: when, and seconds once they ended

    def __str__(self) -> str:
        guessed = [n for n in self.took if not self._expected[n][1]]
        pace = sum(self.took[n] for n in guessed) / sum(self._expected[n][0] for n in guessed) if guessed else 1.0
        whole = left = alone = 0.0
        for number, (seconds, here) in self._expected.items():
            seconds *= 1 if here else pace
            spent = self.took.get(number, time.time() - self.began.get(number, time.time()))
            rest = 0.0 if number in self.took else max(seconds - spent, spent / 10)
            whole, left, alone = whole + spent + rest, left + rest, alone + rest * (number in self._wide)
        self._said = max(self._said, 1 - left / whole if whole else 1.0)  # what is overdue takes nothing back
        done = f"{self._said:.0%} of {len(self._expected)} stages" if whole else "all done"
        sure = guessed or any(here for _, here in self._expected.values())  # the table alone tells shares
        return done + (f", about {duration(alone + (left - alone) / self._at_once)} left" if sure else "")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no second Ctrl-C disturb what ends processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _next(waiting: Iterable[str], running: Iterable[str], wide: Collection[str]) -> str | None:
    """The stage that may start now beside those that run, if there is one."""
    first = next((n for n in waiting if not {*waiting, *running}.intersection(NEEDS.get(n, ()))), None)
    return None if running and {first, *running}.intersection(wide) else first


def _said(folder: Path) -> str:
    """How far each kernel says that it is, in its file."""
    lines = []
    for file in sorted(folder.iterdir()):
        with suppress(OSError, ValueError):  # caught half-written
            lines.append(f"{file.name}: {json.loads(file.read_text(encoding='utf-8'))['line']}")
    return " | ".join(lines) or "starting"
