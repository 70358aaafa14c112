"""The one hook through which the library reports progress; by itself it prints nothing."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

PROGRESS_FILE = "DMM_PROGRESS_FILE"  # where a notebook kernel tells the command line how far it is


class Progress(Protocol):
    """Called as work advances: what is being done, how many units are done, and of how many."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


def silent(task: str, done: int, total: int) -> None:
    """The default hook: nothing is shown."""


def describe(task: str, done: int, total: int, seconds: float, since: int = 0) -> str:
    """Say in one line what is done, how far, how fast, and how long still; the units since `since` took `seconds`."""
    if done >= total:
        return f"{task}: {total:,} in {_duration(seconds)}"
    if done <= since or seconds <= 0:
        return f"{task}: {done:,} / {total:,}"
    rate = (done - since) / seconds
    return f"{task}: {done:,} / {total:,} · {rate:.3g}/s · {_duration((total - done) / rate)} left"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Reporter:
    """Shows progress where it is read: a line that updates itself in a notebook, and for `dmm run` a file.

    Tasks that were already done when first heard of are not mentioned.
    """

    def __init__(self, every: float = 0.5) -> None:
        self._every = every
        self._task, self._start, self._shown = "", (0.0, 0), 0.0
        self._handle: Any = None

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if task != self._task:
            self._task, self._start, self._shown, self._handle = task, (now, done), 0.0, None
        if done < total and now - self._shown < self._every:
            return
        self._shown = now
        line = describe(task, done, total, now - self._start[0], self._start[1])
        if path := os.environ.get(PROGRESS_FILE):
            Path(path).write_text(
                json.dumps({"task": task, "done": done, "total": total, "line": line}), encoding="utf-8"
            )
        self._display(line)

    def _display(self, line: str) -> None:
        try:
            from IPython.core.getipython import get_ipython
            from IPython.display import display
        except ImportError:
            return
        shell = get_ipython()
        if shell is not None and "IPKernelApp" in shell.config:
            show = partial(display, display_id=True) if self._handle is None else self._handle.update
            self._handle = show({"text/plain": line}, raw=True) or self._handle
