"""A `dmm run` in the background: started, watched and cancelled from a notebook that stays usable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dmmlib.errors import StoreError
from dmmlib.files import read_json
from dmmlib.progress import PROGRESS_FILE

PATIENCE = 5.0  # seconds that a cancelled run is given to end by itself


class Job:
    """One `dmm` command in a process of its own. It belongs to this process's group, so it ends with the kernel.

    Args:
        arguments: of `dmm`.
        environment: set for it, on top of this process's.
        on_progress: told a line, and the share that is done of the current task, whenever they change.
        on_end: told the exit code and what the command said.
        every: seconds between looks.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        on_progress: Callable[[str, float], None],
        on_end: Callable[[int, str], None],
        every: float = 0.3,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._progress, self._log = (Path(self._folder.name) / name for name in ("progress.json", "log.txt"))
        self._on_progress, self._on_end, self._every = on_progress, on_end, every
        self.cancelled = False
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dmmlib.app.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, PROGRESS_FILE: str(self._progress)},
            )
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def cancel(self) -> None:
        """End it; what it has trained so far is kept."""
        self.cancelled = True
        self._process.send_signal(signal.SIGINT)
        last_resort = threading.Timer(PATIENCE, self._process.kill)
        last_resort.daemon = True
        last_resort.start()

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended and `on_end` has been told."""
        self._thread.join(timeout)

    def _watch(self) -> None:
        shown: tuple[str, float] | None = None
        while True:
            try:
                self._process.wait(self._every)
            except subprocess.TimeoutExpired:
                pass
            else:
                break
            try:
                told = read_json(self._progress)
            except StoreError:
                continue  # nothing said yet, or caught half-written
            now = (told["line"], told["done"] / max(told["total"], 1))
            if now != shown:
                shown = now
                self._on_progress(*now)
        said = self._log.read_text(errors="replace").strip()
        self._folder.cleanup()
        self._on_end(self._process.returncode, said)
