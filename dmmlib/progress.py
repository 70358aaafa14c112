"""The one hook through which the library reports progress; nobody waits long without a line."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

PROGRESS_FILE = "DMM_PROGRESS_FILE"  # where a notebook kernel tells the command line how far it is
PULSE = "dmm_pulse"  # marks a notebook's outputs that only say that there is work
FIRST, EVERY = 3.0, 19.0  # seconds of work without a line before the first one, and between two
STEP = 0.5  # seconds between two lines of one task that goes on

Progress = Callable[[str, int, int], None]
"""Called as work advances: what is being done, how many units are done, and of how many."""


def silent(task: str, done: int, total: int) -> None:
    """The default hook: nothing is shown."""


def describe(task: str, done: int, total: int, seconds: float, since: int = 0) -> str:
    """Say in one line what is done, how far, how fast, and how long still; the units since `since` took `seconds`."""
    if done >= total:
        return f"{task}: {total:,} in {duration(seconds)}"
    if done <= since or seconds <= 0:
        return f"{task}: {done:,} / {total:,}" + (f" · {duration(seconds)} so far" if seconds >= 1 else "")
    rate = (done - since) / seconds
    return f"{task}: {done:,} / {total:,} · {rate:.3g}/s · {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """Write a number of seconds as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Pulse:
    """Says, in a thread beside the work, what is being done whenever there was no line for long.

    Args:
        doing: says it; "" where nothing is done, so that nothing is said.
        say: told the line; by default it goes to the standard error stream.
    """

    def __init__(self, doing: Callable[[], str], say: Callable[[str], None] | None = None) -> None:
        self._doing, self._say, self._over = doing, say or _log, threading.Event()
        self._due = time.monotonic() + FIRST
        threading.Thread(target=self._beat, daemon=True).start()

    def said(self) -> None:
        """Take note that a line was just said."""
        self._due = time.monotonic() + EVERY

    def late(self) -> bool:
        """Whether a line is due."""
        return time.monotonic() >= self._due

    def end(self, *_: object) -> None:
        """Say nothing more."""
        self._over.set()

    def __enter__(self) -> Pulse:
        return self

    __exit__ = end

    def _beat(self) -> None:
        while not self._over.wait(0.5):
            if not (line := self._doing()):
                self._due = time.monotonic() + FIRST
            elif self.late():
                self._say(line)
                self.said()


class Reporter:
    """Shows progress where it is read: in a notebook or terminal a line that updates itself, in a log one now and then.

    For `dmm run` it goes to a file, too. Tasks that were already done when first heard of are not mentioned. Work that
    tells of no task is named by the function of the library that is at it.
    """

    def __init__(self) -> None:
        self._task, self._start, self._shown, self._at = "", (0.0, 0), 0.0, (0, 0)
        self._handle: Any = None
        self._began: tuple[str, float] = ("", 0.0)  # a function that was found at work, and when
        this = weakref.ref(self, lambda _: self_pulse.end())

        def doing() -> str:
            return "" if (reporter := this()) is None else reporter._doing()

        self._pulse = self_pulse = Pulse(doing, lambda line: getattr(this(), "_tell", print)(line))

    def __reduce__(self) -> Any:
        return Reporter, ()

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if task != self._task:
            self._task, self._start, self._shown, self._handle = task, (now, done), 0.0, None
        self._at, self._began = (done, total), ("", 0.0)
        if done < total and now - self._shown < STEP:
            return
        self._shown = now
        self._tell(describe(task, done, total, now - self._start[0], self._start[1]), ends=done >= total)

    def _doing(self) -> str:
        """The task, or the function of the library that the main thread is in; "" if it is in none."""
        frame, found = sys._current_frames().get(threading.main_thread().ident or 0), ""
        while frame is not None:
            if (module := str(frame.f_globals.get("__name__", ""))).startswith("dmmlib."):
                found = f"{module.removeprefix('dmmlib.')}.{frame.f_code.co_name}"
            frame = frame.f_back
        now, (done, total) = time.monotonic(), self._at
        if found and done < total:
            return describe(self._task, done, total, now - self._start[0], self._start[1])
        if not found:  # what was said to be done has ended, perhaps by an exception
            self._task, self._at = "", (0, 0)
        if found != self._began[0]:
            self._began, self._handle = (found, now), None
        return found and f"{found}: {duration(now - self._began[1])} so far"

    def _tell(self, line: str, ends: bool = False) -> None:
        if path := os.environ.get(PROGRESS_FILE):
            done, total = self._at
            told = {"task": self._task, "done": done, "total": total, "line": line}
            with suppress(OSError):  # the work is worth more
                Path(path).write_text(json.dumps(told), encoding="utf-8")
        if _in_notebook():
            self._display(line, {PULSE: True} if self._began[0] else {})
        elif sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="\n" if ends else "", file=sys.stderr, flush=True)
        elif self._pulse.late() or (ends and time.monotonic() - self._start[0] >= FIRST):
            _log(line)
        else:
            return
        self._pulse.said()

    def _display(self, line: str, metadata: dict[str, Any]) -> None:
        from IPython.display import display

        show = partial(display, display_id=True) if self._handle is None else self._handle.update
        self._handle = show({"text/plain": line}, raw=True, metadata=metadata) or self._handle


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython.core.getipython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config
