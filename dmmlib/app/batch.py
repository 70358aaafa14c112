"""The study's notebooks in batch: through papermill, two at a time where that is faster.

A stage is not executed again while its executed notebook and the tables that it wrote are there and its key is the
same. The key is made of what stores are keyed by: parameters, the content of files that they name, and the version of
every component; and of the notebook's source. Source of the library is not in it: a comment executes nothing again,
and who changes what a component computes raises its version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dmmlib.errors import DmmError, StoreError
from dmmlib.files import config_hash, read_json, resource, write_json
from dmmlib.presets import PLACES
from dmmlib.progress import PROGRESS_FILE
from dmmlib.registry import REGISTRIES, VERSIONS

NOTEBOOKS = resource("notebooks")
NEEDS = {"03": ("02",), "04": ("02",), "05": ("04",), "07": ("04",)}
"""Whose work a stage takes up; the others stand alone."""
ORDER = ("02", "04", "07", "09", "08", "05", "03", "10", "06", "01")
"""What is begun first where several stages could be: the main results, then what takes long."""
GRACE = 10.0  # seconds that interrupted stages have to end their kernels
KILLED = (
    "A process that executes notebooks was killed, perhaps for want of memory; free some and run again. Everything "
    "trained is kept."
)

Say = Callable[[str, bool], None]
"""Told a line about a stage, and whether something was done."""


def stages() -> dict[str, Path]:
    """Return the notebooks by their number: {"01": path, ...}."""
    return {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}


def key(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """Hash all that an executed notebook depends on: its source, without its name and outputs, and its parameters.

    Where things run does not count (`presets.PLACES`), and the path of a file counts by the file's content.
    """
    import dmmlib.study  # noqa: F401 (imports whatever registers components)

    preset = parameters.get("preset")
    if isinstance(preset, Mapping):
        parameters = {**parameters, "preset": {k: v for k, v in preset.items() if k not in PLACES}}
    registered = {f"{kind} {name}": entries.version(name) for kind, entries in REGISTRIES.items() for name in entries}
    source = [cell["source"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    return config_hash({"parameters": _by_content(parameters), "notebook": source, "versions": VERSIONS | registered})


def _by_content(value: Any) -> Any:
    """The same, with a hash in the place of each path of a file."""
    if isinstance(value, Mapping):
        return {k: _by_content(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_by_content(v) for v in value]
    if isinstance(value, str) and os.path.isabs(value) and os.path.isfile(value):
        with open(value, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return value


@dataclass(frozen=True)
class _Stage:
    """A notebook to be executed, and where it goes."""

    notebook: Path
    out: Path
    key: str

    @property
    def part(self) -> Path:
        return self.out / f".{self.notebook.name}.part"

    @property
    def record(self) -> Path:
        return self.out / f".{self.notebook.stem}.json"

    def done(self) -> bool:
        """Return whether what was executed for the same key is still there and whole."""
        try:
            record = read_json(self.record)
            cells = read_json(self.out / self.notebook.name)["cells"]
            tables = [self.out.parent / name for name in record["tables"]]
            whole = any(cell.get("outputs") for cell in cells) and all(t.stat().st_size for t in tables)
            return whole and record["key"] == self.key
        except (StoreError, OSError, LookupError, TypeError, AttributeError):
            return False

    def keep(self, error: str, began: float, say: Say) -> None:
        """Put what was executed where it belongs, and say so; raises DmmError if there was an error."""
        failed = self.out / f"{self.notebook.stem}-failed.ipynb"
        if error:
            os.replace(self.part, failed)
            raise DmmError(f"{self.notebook.stem} failed: {error} Everything trained is kept; see {failed}.")
        os.replace(self.part, self.out / self.notebook.name)
        failed.unlink(missing_ok=True)
        seconds = time.time() - began
        tables = sorted(p.name for p in self.out.parent.glob("*.csv") if p.stat().st_mtime > began)
        write_json(self.record, {"key": self.key, "seconds": round(seconds, 1), "tables": tables})
        say(f"{self.notebook.stem}: done in {seconds:.0f} s", True)


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
) -> None:
    """Execute notebooks of stages, each in a process of its own; two at a time where there are threads for two.

    Args:
        out: where executed ones go; their tables go to the folder that it is in.
        force: execute also what is done.
        threads: shared by two notebooks; with 1, they run one after the other, with torch's own number of threads.
        wide: numbers of the stages that keep every core busy by themselves, and run alone.
        environment: variables that kernels are given besides this process's.

    Raises:
        DmmError: if one fails; what runs beside it is finished, nothing else is begun.
    """
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    todo = {}
    for notebook in notebooks:
        stage = _Stage(notebook, out, key(notebook, parameters))
        if stage.done() and not force:
            say(f"{notebook.stem}: already done", False)
        else:
            todo[notebook.name[:2]] = stage
    at_once = 2 if threads > 1 and len(todo) > 1 else 1
    waiting = sorted(todo, key=(*ORDER, *todo).index)
    running: dict[str, tuple[Future[str], float]] = {}
    failed: DmmError | None = None
    pool = ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    bar = tqdm(bar_format="{desc}", leave=False, disable=None)  # silent where it is no terminal
    with tempfile.TemporaryDirectory() as told, bar, pool:
        try:
            while running or (waiting and failed is None):
                while failed is None and len(running) < at_once and (number := _next(waiting, running, wide)):
                    waiting.remove(number)
                    place = os.environ.get(PROGRESS_FILE, f"{told}/{number}")  # of whoever started this command
                    given = {**(environment or {}), PROGRESS_FILE: place}
                    if at_once > 1 and number not in wide:
                        given["OMP_NUM_THREADS"] = str(threads // 2)
                    running[number] = pool.submit(_execute, todo[number], parameters, given), time.time()
                done, _ = wait([future for future, _ in running.values()], 0.5, FIRST_COMPLETED)
                bar.set_description_str(_said(Path(told)))
                for number in [n for n, (future, _) in running.items() if future in done]:
                    future, began = running.pop(number)
                    Path(told, number).unlink(missing_ok=True)
                    try:
                        todo[number].keep(future.result(), began, say)
                    except DmmError as error:
                        failed = failed or error
                    except BrokenProcessPool:
                        failed = failed or DmmError(KILLED)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child.pid:
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGINT)  # a terminal has told it, but nobody else has
                child.join(GRACE)
                child.terminate()
            raise
    if failed is not None:
        raise failed


def _next(waiting: Iterable[str], running: Iterable[str], wide: Collection[str]) -> str | None:
    """The stage that may start now beside those that run, if there is one."""
    first = next((n for n in waiting if not {*waiting, *running}.intersection(NEEDS.get(n, ()))), None)
    return None if running and {first, *running}.intersection(wide) else first


def _execute(stage: _Stage, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Run a notebook, in a process with nothing else to do; the last line of its error, or nothing."""
    import papermill

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # being told twice must not disturb the end of the kernel
        raise KeyboardInterrupt

    def end_with(parent: Any) -> NoReturn:
        parent.join()
        os._exit(1)  # a kernel ends once the process that started it is gone

    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ.update(environment)
    try:
        papermill.execute_notebook(
            str(stage.notebook),
            str(stage.part),
            dict(parameters),
            kernel_name="python3",
            progress_bar=False,
            start_timeout=300,  # a kernel is slow to come on a busy machine
            cwd=str(stage.notebook.parent),
            extra_arguments=["--IPKernelApp.log_level=50"],  # its chatter is not for the terminal
        )
    except papermill.PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    _scrub(stage.part)
    return ""


def _scrub(path: Path) -> None:
    """Drop what says when and where a notebook was executed, so that the same run gives the same file."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        injected = "injected-parameters" in cell.metadata.get("tags", [])
        for name in ("papermill", "execution", *(() if injected else ("collapsed", "jupyter"))):
            cell.metadata.pop(name, None)
    nbformat.write(notebook, path)


def _said(folder: Path) -> str:
    """How far each kernel says that it is, in its file."""
    lines = []
    for file in sorted(folder.iterdir()):
        with suppress(OSError, ValueError):  # caught half-written
            lines.append(f"{file.name}: {json.loads(file.read_text())['line']}")
    return " | ".join(lines)
