"""The study's notebooks in batch: through papermill, two at a time where that is faster."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmmlib.errors import DmmError
from dmmlib.files import config_hash, read_json, resource, short, write_json
from dmmlib.progress import PROGRESS_FILE

NOTEBOOKS = resource("notebooks")
NEEDS = {"03": ("02",), "04": ("02",), "05": ("04",), "07": ("04",)}
"""Whose work a stage takes up; the others stand alone."""
ORDER = ("02", "04", "07", "09", "08", "05", "03", "10", "06", "01")
"""What is begun first where several stages could be: the main results, then what takes long."""
GRACE = 10.0  # seconds that interrupted stages have to end their kernels

Say = Callable[[str, bool], None]
"""Told a line of a stage, and whether something was done."""


def stages() -> dict[str, Path]:
    """The notebooks by their number: {"01": path, ...}."""
    return {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}


def run(
    notebooks: Iterable[Path],
    out: Path,
    parameters: Mapping[str, Any],
    say: Say,
    *,
    force: bool = False,
    threads: int = 1,
    wide: Collection[str] = (),
) -> None:
    """Execute notebooks; side by side where there are threads for two.

    Args:
        notebooks: of stages, in order.
        out: where executed ones go.
        parameters: of every notebook.
        say: is told what was done.
        force: execute also what was done with the same parameters, notebook and library.
        threads: to be shared by two; with 1, one notebook runs after the other, with all that torch takes.
        wide: numbers of the stages that keep every core busy by themselves, and run alone.

    Raises:
        DmmError: if one fails; what runs beside it is finished, nothing else is begun.
    """
    out.mkdir(parents=True, exist_ok=True)
    todo, library = [], _library()
    for notebook in notebooks:
        key = config_hash({"parameters": parameters, "notebook": _source(notebook), "library": library})
        stage = _Stage(notebook, out, key)
        if stage.done and not force:
            say(f"{notebook.stem}: already done", False)
        else:
            todo.append(stage)
    with _shown() as folder:
        if threads < 2 or len(todo) < 2:
            for stage in todo:
                start, file = time.monotonic(), folder and folder / stage.number
                stage.keep(_execute(stage, parameters, file), start, say, file)
        else:
            _side_by_side(todo, parameters, say, folder, threads, frozenset(wide))


@dataclass(frozen=True)
class _Stage:
    """A notebook to be executed, and where it goes; the key names all that it depends on."""

    notebook: Path
    out: Path
    key: str

    @property
    def number(self) -> str:
        return self.notebook.name[:2]

    @property
    def target(self) -> Path:
        return self.out / self.notebook.name

    @property
    def part(self) -> Path:
        return self.out / f".{self.notebook.name}.part"

    @property
    def record(self) -> Path:
        return self.out / f".{self.notebook.stem}.json"

    @property
    def done(self) -> bool:
        return self.target.exists() and self.record.exists() and read_json(self.record).get("key") == self.key

    def keep(self, error: str, start: float, say: Say, progress: Path | None) -> None:
        """Put what was executed where it belongs, and say so.

        Raises:
            DmmError: if there was an error.
        """
        if progress is not None:
            progress.unlink(missing_ok=True)
        failed = self.out / f"{self.notebook.stem}-failed.ipynb"
        if error:
            os.replace(self.part, failed)
            raise DmmError(f"{self.notebook.stem} failed: {error} Everything trained is kept; see {failed}.")
        os.replace(self.part, self.target)
        failed.unlink(missing_ok=True)
        seconds = time.monotonic() - start
        write_json(self.record, {"key": self.key, "seconds": round(seconds, 1)})
        with tqdm.external_write_mode():  # not into the line that shows progress
            say(f"{self.notebook.stem}: done in {seconds:.0f} s", True)


def _side_by_side(
    todo: Iterable[_Stage],
    parameters: Mapping[str, Any],
    say: Say,
    folder: Path | None,
    threads: int,
    wide: frozenset[str],
) -> None:
    """Two at a time, each in a process of its own with half of the threads, once what they need is done."""
    by_number = {stage.number: stage for stage in todo}
    waiting = sorted(by_number, key=lambda number: ORDER.index(number) if number in ORDER else len(ORDER))
    running: dict[str, tuple[Future[str], float]] = {}
    failed: DmmError | None = None

    def may_start() -> str | None:
        ready = [n for n in waiting if not {*waiting, *running}.intersection(NEEDS.get(n, ()))]
        if failed is not None or not ready or (running and wide & {ready[0], *running}):
            return None
        return ready[0] if len(running) < 2 else None

    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        try:
            while running or (waiting and failed is None):
                while number := may_start():
                    waiting.remove(number)
                    share = None if number in wide else threads // 2
                    future = pool.submit(_execute, by_number[number], parameters, folder and folder / number, share)
                    running[number] = future, time.monotonic()
                done = wait([future for future, _ in running.values()], return_when=FIRST_COMPLETED).done
                for number in [n for n, (future, _) in running.items() if future in done]:
                    future, start = running.pop(number)
                    try:
                        by_number[number].keep(future.result(), start, say, folder and folder / number)
                    except DmmError as error:
                        failed = failed or error
                    except BrokenProcessPool:
                        failed = failed or DmmError(
                            "A process that executes notebooks was killed, perhaps for want of memory; free some and "
                            "run again. Everything trained is kept."
                        )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.join(GRACE)
                child.terminate()
            raise
    if failed is not None:
        raise failed


def _execute(stage: _Stage, parameters: Mapping[str, Any], progress: Path | None, threads: int | None = None) -> str:
    """Run a notebook; the error's last line, or nothing.

    Args:
        progress: where its kernel writes how far it is; as the environment says, if None.
        threads: that its kernel takes; as many as it likes if None.
    """
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    here = {} if progress is None else {PROGRESS_FILE: str(progress)}
    if threads is not None:
        here["OMP_NUM_THREADS"] = str(threads)
    with warnings.catch_warnings(), _environment(here):
        warnings.simplefilter("ignore")
        try:
            papermill.execute_notebook(
                str(stage.notebook),
                str(stage.part),
                dict(parameters),
                kernel_name="python3",
                progress_bar=False,
                start_timeout=300,  # a kernel is slow to come on a busy machine
                cwd=str(NOTEBOOKS),
                extra_arguments=["--IPKernelApp.log_level=50"],  # its chatter is not for the terminal
            )
        except papermill.PapermillExecutionError as error:
            return f"{error.ename}: {error.evalue}"
    _scrub(stage.part)
    return ""


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables for what is started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _scrub(path: Path) -> None:
    """Drop what says when and where a notebook was executed, so that the same run gives the same file."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        for key in ("collapsed", "jupyter"):
            if "injected-parameters" not in cell.metadata.get("tags", []):
                cell.metadata.pop(key, None)
    nbformat.write(notebook, path)


@contextmanager
def _shown() -> Iterator[Path | None]:
    """A folder into which kernels report, a file a stage, while the terminal shows it; None if another shows it."""
    if PROGRESS_FILE in os.environ:  # whoever started this command
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        folder, stop = Path(name), threading.Event()
        bar = tqdm(bar_format="{desc}", leave=False, disable=None)  # silent where it is no terminal

        def watch() -> None:
            while not stop.wait(0.5):
                lines = []
                for file in sorted(folder.iterdir()):
                    try:
                        lines.append(f"{file.name}: {json.loads(file.read_text())['line']}")
                    except (OSError, ValueError):
                        continue  # caught half-written
                bar.set_description_str(" | ".join(lines))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield folder
        finally:
            stop.set()
            thread.join()
            bar.close()


def _source(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return short(json.dumps([c["source"] for c in cells]).encode())


def _library() -> str:
    return short(b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))))
