"""Plain controls, and the line that says what went wrong."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets as w

from dmmlib.errors import DmmError


class Message(w.HTML):
    """A line that says what went wrong on purpose; nothing is lost by it."""

    def guarded(self, do: Callable[..., Any]) -> Callable[..., None]:
        """Return `do` with its errors said here instead of raised."""

        def guarded(*arguments: Any) -> None:
            try:
                self.value = ""
                do(*arguments)
            except DmmError as error:
                self.value = text("notice", str(error), role="alert")

        return guarded

    def button(self, name: str, do: Callable[[], Any], tip: str, **options: Any) -> w.Button:
        """Make a button whose errors are said here."""
        made = w.Button(description=name, tooltip=tip, **options)
        made.on_click(self.guarded(lambda _: do()))
        return made


def text(kind: str, words: str, tag: str = "div", **attributes: str) -> str:
    """Turn words into HTML, so that nothing in them counts as markup; `kind` is a class of widgets.css."""
    named = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return f'<{tag} class="dmm-{kind}"{named}>{html.escape(words)}</{tag}>'


def labelled(kind: Callable[..., Any], name: str, **options: Any) -> Any:
    """Make a control with its name in front, as wide as the words."""
    return kind(description=name, style={"description_width": "initial"}, **options)


def row(*children: w.Widget, kind: str = "row") -> w.Box:
    """Put controls side by side; `kind` is a class of widgets.css."""
    box = w.Box(children)
    box.add_class(f"dmm-{kind}")
    return box


def show(box: w.Widget, visible: bool = True) -> None:
    """Show a control, or take it off the screen."""
    box.layout.display = "" if visible else "none"
