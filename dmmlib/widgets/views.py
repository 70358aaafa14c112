"""What widgets are made of: plain controls, and the gallery, scatter, histograms and curves that a browser draws."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as w
import numpy as np
import seaborn as sns
import traitlets as t
from matplotlib.colors import to_hex

from dmmlib.analysis.looks import colour, label
from dmmlib.data import Dataset
from dmmlib.errors import DmmError

Caption = Callable[[int], tuple[str, str]]
Hear = Mapping[str, Callable[..., None]]


class Message(w.HTML):
    """Shows, in one line, an error that was raised on purpose; nothing is lost by it.

    Messages `beside` one another are emptied together, so that only the last error is shown.
    """

    def __init__(self) -> None:
        super().__init__()
        self._all: list[Message] = [self]

    def beside(self) -> Message:
        """Make another, for other buttons."""
        other = Message()
        self._all.append(other)
        other._all = self._all
        return other

    def say(self, markup: str) -> None:
        """Show it."""
        self.value = markup

    def guarded(self, do: Callable[..., Any]) -> Callable[..., None]:
        """Return `do` with its errors said here instead of raised."""

        def guarded(*arguments: Any, **named: Any) -> None:
            for message in self._all:
                message.say("")
            try:
                do(*arguments, **named)
            except (DmmError, OSError) as error:
                self.say(text("notice", str(error), role="alert"))

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


class View(anywidget.AnyWidget):
    """Sends the thumbnails that are asked for, with their captions, and passes on what else the browser says.

    Args:
        images: uint8 (n_points, height, width, channels); of anything else no pictures are shown.
        caption: title and detail of a point; drawn as text, never as markup.
        hear: answers to the browser's toggle(index), take(indices), lasso(indices, remove), undo(), redo(),
            legend(group), dropped(name, text) and, after a pause, settled().
    """

    _esm, _css = (Path(__file__).with_name(name) for name in ("widgets.js", "widgets.css"))
    label = t.Unicode().tag(sync=True)  # for screen readers
    shape = t.List(t.Int()).tag(sync=True)  # height, width, channels of an image
    chosen = t.Bytes().tag(sync=True)  # uint8 (n,)
    focus = t.Int(-1).tag(sync=True)  # the current point
    version = t.Int().tag(sync=True)  # of the captions

    def __init__(self, images: np.ndarray, caption: Caption, hear: Hear | None = None, **traits: Any) -> None:
        pictures = images.ndim == 4 and images.dtype == np.uint8
        self._images = images if pictures else np.zeros((len(images), 0, 0, 1), np.uint8)
        self._caption, self._hear = caption, hear or {}
        super().__init__(shape=list(self._images.shape[1:]), **traits)
        self.on_msg(self.receive)

    def receive(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        """Answer a message of the browser."""
        if message["kind"] == "thumbnails":
            indices = [i for i in message["indices"] if 0 <= i < len(self._images)]
            captions = [self._caption(i) for i in indices]
            titles, details = ([caption[k] for caption in captions] for k in (0, 1))
            answer = {"kind": "thumbnails", "indices": indices, "titles": titles, "details": details}
            self.send(answer, buffers=[self._images[indices].tobytes()])
        elif message["kind"] in self._hear:
            self._hear[message["kind"]](**{name: value for name, value in message.items() if name != "kind"})

    def set_chosen(self, mask: np.ndarray) -> None:
        """Mark points: bool (n,)."""
        self.chosen = mask.astype(np.uint8).tobytes()

    def recaption(self) -> None:
        """Ask the browser to take captions anew, since they say something else now."""
        self.version += 1


class Gallery(View):
    """Thumbnails of the points in `order`, of which only those in sight are sent."""

    kind = t.Unicode("gallery").tag(sync=True)
    order = t.Bytes().tag(sync=True)  # int32 (n_shown,)
    rows = t.Int(4).tag(sync=True)  # that fit without scrolling
    width = t.Int(76).tag(sync=True)  # of a tile at least, in pixels
    selectable = t.Bool(True).tag(sync=True)  # a click and the space bar include and exclude
    # What is shown of the choice's consequences is of an earlier choice. The browser says so from the first click on,
    # while this process may still be busy, until it hears False.
    outdated = t.Bool(False).tag(sync=True)
    empty = t.Unicode("No image passes these filters.").tag(sync=True)  # shown where there is no point to show

    def set_order(self, positions: np.ndarray) -> None:
        """Show these points (n_shown,), in this order."""
        self.order = positions.astype(np.int32).tobytes()


class Scatter(View):
    """Training points in a plane; a click toggles one, a lasso takes many (with Alt: leaves them out).

    The wheel zooms where the plane has the focus or with Ctrl, and dragging with Shift moves it.
    """

    kind = t.Unicode("scatter").tag(sync=True)
    xy = t.Bytes().tag(sync=True)  # float32 (n_train, 2), in [0, 1]
    groups = t.Bytes().tag(sync=True)  # int32 (n_train,): class of each
    shown = t.Bytes().tag(sync=True)  # uint8 (n_train,): passes the filters
    names = t.List(t.Unicode()).tag(sync=True)  # of the classes
    colours = t.List(t.Unicode()).tag(sync=True)  # of the classes
    only = t.Int(-1).tag(sync=True)  # the class that alone is shown
    axes = t.List(t.Unicode()).tag(sync=True)
    selectable = t.Bool(True).tag(sync=True)  # the legend counts what is chosen

    def __init__(self, data: Dataset, caption: Caption, hear: Hear | None = None) -> None:
        palette = "colorblind" if data.n_classes <= 10 else "husl"  # which has no end
        super().__init__(
            data.x_train, caption, hear, names=list(data.class_names), shown=bytes([1]) * data.n_train,
            groups=data.y_train.astype(np.int32).tobytes(),
            colours=sns.color_palette(palette, data.n_classes).as_hex(),
        )  # fmt: skip

    def set_columns(self, x: np.ndarray, y: np.ndarray, names: tuple[str, str]) -> None:
        """Place the points by two columns (n_train,); long tails are drawn in, so that the middle is seen."""
        keyboard = "Draw a lasso with the mouse; with the keyboard, use the filters and the gallery."
        with self.hold_sync():
            self.xy = np.stack([_spread(x), _spread(y)], 1).astype(np.float32).tobytes()
            self.axes = list(names)
            self.label = f"Scatter of {len(x)} training images by {names[0]} and {names[1]}. {keyboard}"


class Histograms(anywidget.AnyWidget):
    """Margins of one point over models: its way in rows, then a panel for each method against retraining."""

    _esm, _css = View._esm, View._css
    kind = t.Unicode("histograms").tag(sync=True)
    values = t.Bytes().tag(sync=True)  # float32: margins of oracles, then of each method, one after the other
    counts = t.List(t.Int()).tag(sync=True)  # how many of each
    names = t.List(t.Unicode()).tag(sync=True)  # of the methods
    colours = t.List(t.Unicode()).tag(sync=True)  # of the methods
    kloms = t.List(t.Float()).tag(sync=True)  # of the methods
    way = t.List(t.List()).tag(sync=True)  # name and group of each row; group 0 are the oracles
    label = t.Unicode().tag(sync=True)  # for screen readers

    def show(
        self,
        oracles: np.ndarray,
        margins: Mapping[str, np.ndarray],
        kloms: Mapping[str, float],
        way: Sequence[tuple[str, str]],
    ) -> None:
        """Show a point's margins (n_models,) over oracles and each method's models, and the methods' KLoM there.

        `way` holds the rows: a name, and "retrain" or a method.
        """
        groups, order = [oracles, *margins.values()], ["retrain", *margins]
        with self.hold_sync():
            self.counts = list(map(len, groups))
            self.names, self.colours = [label(m) for m in margins], [to_hex(colour(m)) for m in margins]
            self.kloms, self.way = [kloms[m] for m in margins], [[name, order.index(m)] for name, m in way]
            means = ", ".join(f"{name} {groups[order.index(m)].mean():.1f}" for name, m in way)
            said = ", ".join(f"{label(m)} {kloms[m]:.1f}" for m in margins)
            self.label = f"Mean margins: {means}. KLoM: {said}"
            self.values = np.concatenate(groups).astype(np.float32).tobytes()


class Curves(anywidget.AnyWidget):
    """Methods' lines, which begin at 1, on logarithmic axes: a panel for each measure, and where each line ends."""

    _esm, _css = View._esm, View._css
    kind = t.Unicode("curves").tag(sync=True)
    steps = t.Bytes().tag(sync=True)  # float32 (n_steps,), from 0 on
    values = t.Bytes().tag(sync=True)  # float32 (n_panels, n_methods, n_steps)
    about = t.Dict().tag(sync=True)  # title, caption, axes, panels; of methods name, colour, whether dashed, end
    label = t.Unicode().tag(sync=True)  # for screen readers

    def show(self, lines: Mapping[str, Mapping[str, np.ndarray]], styles: Mapping[str, Any], **words: Any) -> None:
        """Show lines (n_steps,) by panel and method, the first panel in words too; `words` are title, caption, axes."""
        panel, (x, y) = next(iter(lines)), words["axes"]
        ends = {method: self._end(line) for method, line in lines[panel].items()}
        methods = [[m, to_hex(styles[m]["color"]), "ls" in styles[m], end] for m, end in ends.items()]
        said = "; ".join(map(" ".join, ends.items()))
        with self.hold_sync():
            self.about = {**words, "panels": list(lines), "methods": methods}
            self.label = f"{' '.join(y.split()).capitalize()} against {x}. {words['title']}. In {panel}: {said}."
            values = np.array([[*of.values()] for of in lines.values()]).clip(1e-30, 1e30)
            self.values = values.astype(np.float32).tobytes()

    def _end(self, line: np.ndarray) -> str:
        if line[-1] <= 0.01:
            since = np.frombuffer(self.steps, np.float32)[np.flatnonzero(line > 0.01)[-1] + 1]
            return f"within 1 % by step {since:,.0f}"
        return f"ends at {line[-1]:.2g}" if line[-1] < 1000 else "ends beyond 1,000"


def _spread(values: np.ndarray) -> np.ndarray:
    """Values mapped to [0, 1] in their order: linear around the median, logarithmic beyond the quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    bent = np.arcsinh((values - middle) / max(high - low, 1e-12))
    return (bent - bent.min()) / max(float(np.ptp(bent)), 1e-12)
