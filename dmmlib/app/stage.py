"""Execute one notebook in a process of its own: `batch` begins it, and it leaves its outcome in a file.

It is in a session of its own, so that Ctrl-C in a terminal reaches only `batch`; and it ends its kernel and itself when
its input ends, which is when `batch` says so or is no more.
"""

from __future__ import annotations

import _thread
import ast
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from dmmlib.errors import PresetError
from dmmlib.files import write_bytes
from dmmlib.progress import PULSE

KNOWN = ("preset", "overrides", "forget_set", "beside")  # what `batch` gives every notebook, whether it has it or not
GRACE = 10.0  # seconds that an interrupted stage has to end its kernel
KILLED = "was killed, perhaps for want of memory; free some and run again."


class Execution:
    """A notebook that is being executed into `part`; what its process prints goes to a log beside `outcome`."""

    def __init__(
        self, notebook: Path, part: Path, parameters: Mapping[str, Any], environment: Mapping[str, str], outcome: Path
    ) -> None:
        self._outcome, self._log = outcome, outcome.with_suffix(".log")
        task = {"notebook": str(notebook), "part": str(part), "parameters": parameters, "outcome": str(outcome)}
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same for Windows
            )
        self._input: IO[bytes] = self._process.stdin  # type: ignore[assignment]
        with suppress(OSError):  # where it has ended already
            self._input.write(json.dumps(task).encode() + b"\n")
            self._input.flush()

    def running(self) -> bool:
        return self._process.poll() is None

    def error(self) -> str:
        """Say in one sentence what went wrong, once it has ended; nothing if all went well."""
        if self._outcome.exists():
            return self._outcome.read_text(encoding="utf-8")
        if self._process.returncode < 0:
            return f"Its process {KILLED}"
        said = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return _line(f"Its process ended: {next((line for line in reversed(said) if line.strip()), '')}")

    def interrupt(self) -> None:
        """Tell it to end, with its kernel."""
        with suppress(OSError):
            self._input.close()

    def end(self) -> None:
        """Wait for its end, but not for long."""
        try:
            self._process.wait(GRACE + 2)
        except subprocess.TimeoutExpired:
            self._process.kill()


def check_parameters() -> None:
    """Refuse what papermill gave a notebook that it has no parameter for; to be called in its first cells.

    Raises PresetError, or does nothing where papermill gave nothing.
    """
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell else []
    given = max((i for i, cell in enumerate(cells) if cell.startswith("# Parameters\n")), default=0)
    known = {*KNOWN, *(name for cell in cells[:given] for name in _assigned(cell))}
    if unknown := sorted(set(_assigned(cells[given])) - known) if given else []:
        raise PresetError(f"The notebook has no parameter {unknown[0]!r}; it has {', '.join(sorted(known))}.")


def _assigned(cell: str) -> list[str]:
    targets = [t for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Assign) for t in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def main() -> None:
    """Execute the notebook that the first line of the input names."""

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # being told twice must not disturb the end of the kernel
        raise KeyboardInterrupt

    def end_with_input() -> None:
        sys.stdin.buffer.read()
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            _thread.interrupt_main()
        time.sleep(GRACE)
        os._exit(1)  # a kernel ends once the process that started it is gone

    signal.signal(signal.SIGINT, interrupt)
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_input, daemon=True).start()
    try:
        error = _execute(Path(task["notebook"]), Path(task["part"]), task["parameters"])
    except KeyboardInterrupt:
        os._exit(130)
    write_bytes(Path(task["outcome"]), error.encode())
    os._exit(0)  # nothing is left to do, and a thread waits for more input


def _execute(notebook: Path, part: Path, parameters: Mapping[str, Any]) -> str:
    """Execute a notebook; what went wrong, in one line, or nothing."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        papermill.execute_notebook(
            str(notebook),
            str(part),
            dict(parameters),
            kernel_name="python3",
            progress_bar=False,
            start_timeout=300,  # a kernel is slow to come on a busy machine
            cwd=str(notebook.parent),
            extra_arguments=["--IPKernelApp.log_level=50"],  # its chatter is not for the terminal
        )
        _scrub(part)
    except papermill.PapermillExecutionError as error:
        return _line(f"{error.ename}: {error.evalue}")
    except DeadKernelError:
        return f"Its kernel {KILLED}"
    except OSError as error:
        return _line(f"{str(error.strerror or error).rstrip('.')} ({error.filename or part.parent})")
    except Exception as error:  # whatever papermill, a kernel or a notebook that is none can raise
        return _line(f"{type(error).__name__}: {error}")
    return ""


def _line(text: str) -> str:
    text = " ".join(text.split())[:1000].removesuffix(":")
    return text if text.endswith(".") else f"{text}."


def _scrub(path: Path) -> None:
    """Drop what says when and where a notebook was executed, so that the same run gives the same file."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        folded = {"injected-parameters", "hide-input"} & set(cell.metadata.get("tags", []))
        for name in ("papermill", "execution", *(() if folded else ("collapsed", "jupyter"))):
            cell.metadata.pop(name, None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not output.get("metadata", {}).get(PULSE)]
    nbformat.write(notebook, path)
