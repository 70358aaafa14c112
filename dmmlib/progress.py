"""The one hook through which the library reports progress; it prints nothing by itself."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work advances: what is being done, how many units are done, and of how many."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


def silent(task: str, done: int, total: int) -> None:
    """The default hook: nothing is shown."""
