"""The book, and notebooks in JupyterLab, driven as a user does: headless Chromium, mouse and keyboard; once Firefox.

What the kernel answers comes when it comes: every assertion about it waits, and none depends on the machine's speed.
Screenshots stay in `screenshots/`. Without a browser its tests are skipped; with DMM_REQUIRE_BROWSER set they fail.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import websocket
from playwright.sync_api import expect

from tests.browsing import (
    CHOOSE,
    MARKS,
    NOTEBOOKS,
    PATIENCE,
    ROOT,
    SCREENSHOTS,
    UNLEARN,
    assert_clean,
    browser,
    expect_chosen,
    expect_drawn,
    many_tones,
    n_cells,
    narrow,
    page,
    place,
    program,
    required,
    run_all,
    screenshot,
    shut_down,
    url,
)

pytestmark = MARKS


DRAW = """async ([source, state]) => {
    const script = URL.createObjectURL(new Blob([source], {type: 'text/javascript'}));
    const {default: widget} = await import(script);
    const view = (array) => new DataView(array.buffer);
    const values = {...state, xy: view(new Float32Array([0.5, 0.5])), groups: view(new Int32Array([state.label])),
                    shown: view(new Uint8Array([1])), chosen: view(new Uint8Array([0]))};
    const model = {get: (name) => values[name], on() {}, off() {}, send() {}};
    widget.render({model, el: document.body.appendChild(document.createElement('div'))});
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    const canvas = document.querySelector('.dmm-plane');
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const pixels = [...Array(data.length / 4).keys()].map((k) => [...data.slice(4 * k, 4 * k + 4)]);
    return pixels.filter(([red, green, blue, alpha]) => alpha > 150 && new Set([red, green, blue]).size > 1);
}"""


def test_a_class_beyond_256_has_its_colour_and_a_name_stays_text(page):
    colours = ["#000000"] * 257 + ["#dc143c"] + ["#000000"] * 42
    names = ["<img src=x onerror='document.title = 1'>"] * 300
    state = {"kind": "scatter", "label": 257, "colours": colours, "names": names, "axes": ["a", "b"], "focus": -1}
    source = (ROOT / "dmmlib" / "widgets" / "widgets.js").read_text()
    coloured = np.array(page.evaluate(DRAW, [source, state]))
    assert len(coloured) > 5, "a dot, where all other classes are black"
    np.testing.assert_allclose(np.median(coloured[:, :3], 0), [0xDC, 0x14, 0x3C], atol=3)
    expect(page.locator(".dmm-legend > button")).to_have_count(300)
    assert page.locator("img").count() == 0
    assert names[0] in page.locator(".dmm-legend").inner_text()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    if importlib.util.find_spec("sphinx") is None:
        required("Sphinx is not installed; `pip install -e '.[dev]'` for the book's tests.")
    folder = tmp_path_factory.mktemp("book") / "book"
    command = [sys.executable, str(ROOT / "scripts" / "book.py"), str(folder)]
    built = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    assert built.returncode == 0, built.stderr  # no page is missing, no link broken: a warning is an error
    return folder


def test_the_book_is_read_and_explored_without_a_kernel(page, book):
    SCREENSHOTS.mkdir(exist_ok=True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.goto((book / "index.html").as_uri())
    expect(page.get_by_role("heading", level=1)).to_contain_text("Can a trained model forget?")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt)")
    page.get_by_role("link", name="04 · DMM versus baselines").first.click()
    expect(page.get_by_role("heading", name="Finding")).to_be_visible()
    assert page.locator("math").count() > 5, "formulas"
    assert page.locator("img").count() > 3, "outputs"
    assert page.locator("details.hide").count() > 10, "code is folded"
    page.screenshot(path=SCREENSHOTS / "book_04.png")

    page.get_by_role("link", name="Explore the laptop run").first.click()
    explored = json.loads((ROOT / "figures" / "laptop" / "explore.json").read_text())
    here = explored["sets"][1]
    page.get_by_role("combobox", name="Forget set").select_option(here["name"])
    tiles, drawn = page.get_by_role("listbox").get_by_role("option"), page.locator(".dmm-histograms")
    expect(tiles.first.locator(".dmm-title")).not_to_be_empty()
    worst = max(here["kloms"][explored["first"]][: here["splits"][0]])
    expect(tiles.first.locator(".dmm-detail")).to_contain_text(f"· {worst:.1f}")
    expect(drawn.locator(".dmm-panels > div")).to_have_count(len(explored["methods"]))
    before = drawn.get_attribute("aria-label")
    tiles.nth(2).click()
    expect(drawn).not_to_have_attribute("aria-label", before)
    page.get_by_role("combobox", name="KLoM of").select_option("GA on F")
    worst = max(here["kloms"][explored["methods"].index("GA on F")][: here["splits"][0]])
    expect(tiles.first.locator(".dmm-detail")).to_contain_text(f"· {worst:.1f}")
    page.get_by_role("combobox", name="Points").select_option("validation")
    expect(page.get_by_role("listbox")).to_have_attribute("aria-label", re.compile("^30 validation images"))
    expect_drawn(page)
    page.screenshot(path=SCREENSHOTS / "book_explore.png")
    page.set_viewport_size({"width": 900, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth <= 900")
    page.screenshot(path=SCREENSHOTS / "book_explore_900.png")
    assert all(url.startswith(("file:", "data:")) for url in asked), "nothing comes from elsewhere"


class Firefox:
    """As it comes, which Playwright cannot drive: what is needed of WebDriver BiDi."""

    def __init__(self, profile):
        flags = ["--headless", "--no-remote", "--remote-debugging-port=0", "--profile", str(profile)]
        self.process = subprocess.Popen(
            [program("firefox-esr", "firefox"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.asked, told = 0, None
        while told is None:
            assert self.process.poll() is None, "Firefox does not start"
            time.sleep(0.2)
            try:  # it takes a port that is free, and writes down which
                told = json.loads((profile / "WebDriverBiDiServer.json").read_text())
            except (OSError, ValueError):
                continue
        address = f"ws://{told['ws_host']}:{told['ws_port']}/session"
        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=PATIENCE)
        self.ask("session.new", capabilities={})
        self.context = self.ask("browsingContext.create", type="window")["context"]  # the first never has the focus
        self.ask("browsingContext.setViewport", context=self.context, viewport={"width": 1440, "height": 1000})

    def ask(self, method, **params):
        self.asked += 1
        self.socket.send(json.dumps({"id": self.asked, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.asked:
            continue
        assert answer["type"] == "success", answer
        return answer["result"]

    def go(self, address):
        self.ask("browsingContext.navigate", context=self.context, url=address, wait="complete")

    def evaluate(self, script):
        return self.ask("script.evaluate", expression=script, target={"context": self.context}, awaitPromise=True)

    def until(self, script):
        """What a script comes to, once that is neither an error nor nothing."""
        started = time.monotonic()
        while not (found := self.evaluate(f"({script}) || ''").get("result", {}).get("value")):
            assert time.monotonic() < started + PATIENCE, f"{script} comes to nothing"
            time.sleep(0.2)
        return found

    def click(self, one):
        """Once it stays in sight: while cells run, JupyterLab scrolls by itself."""
        top = "e.getBoundingClientRect().top"
        stays = f"at = {top}; await new Promise(done => setTimeout(done, 300)); return at === {top}"
        assert self.until(f"(async e => {{e.scrollIntoView({{block: 'center'}}); const {stays}}})({one})")
        at = self.evaluate(one)["result"]["sharedId"]
        move = {"type": "pointerMove", "x": 0, "y": 0, "origin": {"type": "element", "element": {"sharedId": at}}}
        steps = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "actions": steps}
        self.ask("input.performActions", context=self.context, actions=[mouse])

    def screenshot(self, name):
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        path.write_bytes(base64.b64decode(self.ask("browsingContext.captureScreenshot", context=self.context)["data"]))
        return many_tones(path)


@pytest.fixture
def firefox(tmp_path):
    started = Firefox(tmp_path)
    yield started
    started.ask("browser.close")
    started.process.wait(PATIENCE)


TITLES = "[...document.querySelectorAll('.dmm-tile .dmm-title')].filter(title => title.textContent).length > 5"


def test_firefox_shows_the_book_and_the_widget(firefox, book, url):
    firefox.go((book / "docs" / "explore.html").as_uri())
    assert firefox.until(TITLES)
    label = "document.querySelector('.dmm-histograms').getAttribute('aria-label')"
    before = firefox.until(label)
    firefox.click("document.querySelectorAll('.dmm-tile')[2]")
    assert firefox.until(f"{label} !== {json.dumps(before)}")
    firefox.screenshot("book_firefox")

    firefox.go(url(CHOOSE))
    assert firefox.until("(n => n?.context?.isReady && n.sessionContext?.isReady)(jupyterapp.shell.currentWidget)")
    firefox.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    assert firefox.until(TITLES)
    chosen = "document.querySelector('.dmm-widget .dmm-header b').textContent"
    assert firefox.until(f"{chosen} === '5'")
    firefox.click("document.querySelectorAll('.dmm-tile')[2]")
    assert firefox.until(f"{chosen} === '6'")
    assert firefox.until("document.querySelector('.dmm-consequences').getAttribute('aria-busy') === 'false'")
    firefox.screenshot("03_firefox")
    firefox.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")


TEN_THOUSAND = """
import numpy as np
from dmmlib import data
from dmmlib.widgets.views import Gallery

images = data.load("fashion-mnist").x_train
gallery = Gallery(images, lambda i: ("image", f"#{i}"), label="all")
gallery.set_chosen(np.zeros(len(images), bool))
gallery.set_order(np.arange(len(images)))
gallery
"""


def write_cell(source, target):
    """A notebook of one cell."""
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    target.write_text(json.dumps(content))


def test_ten_thousand_images_scroll_smoothly(page, url, place):
    write_cell(TEN_THOUSAND, place / "notebooks" / "many.ipynb")
    assert_clean(run_all(page, url("many.ipynb")))
    expect(page.locator(".dmm-tile").first).to_be_visible()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # the page's own CPU time, not the wall's

    def spent():
        return next(
            m["value"] for m in session.send("Performance.getMetrics")["metrics"] if m["name"] == "TaskDuration"
        )

    before, n_frames = spent(), 120
    most = page.evaluate(
        """async n => {
        const viewport = document.querySelector('.dmm-viewport');
        let most = 0;
        for (let k = 0; k < n; k++) {  // steady scrolling, 150 pixels a frame
            viewport.scrollTop += 150;
            await new Promise(requestAnimationFrame);
            most = Math.max(most, document.querySelectorAll('.dmm-tile').length);
        }
        viewport.scrollTop = viewport.scrollHeight;
        return most;
    }""",
        n_frames,
    )
    frame = 1000 * (spent() - before) / n_frames
    expect(page.locator(".dmm-viewport")).to_contain_text("#9999")
    expect(page.locator(".dmm-loading")).to_have_count(0)
    assert most < 200, "of 10,000 images only those in sight are drawn"
    print(f"{frame:.1f} ms of work a frame")
    assert frame < 100, (
        "ten frames a second on a slow core; measured as work, since a busy machine makes any frame wait"
    )
    shut_down(page)


OWN_CNN = """
import numpy as np
from torch import nn
from dmmlib import data, models
from dmmlib.study import Study
from dmmlib.widgets import Chooser

COLOURS = "red", "green", "blue"

@data.register("squares")
def squares():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 80, (360, 16, 20, 3)).astype(np.uint8), np.arange(360) % 3
    for image, colour, row, column in zip(x, y, rng.integers(0, 9, 360), rng.integers(0, 13, 360)):
        image[row : row + 7, column : column + 7, colour] += 160
    y[::20] = (y[::20] + 1) % 3  # some are called by another's name
    return data.from_arrays(x[:300], y[:300], x[300:], y[300:], name="squares", class_names=COLOURS)

@models.register("own_cnn")
def own_cnn(shape, n_classes):
    convolution = nn.Conv2d(shape[0], 8, 5, stride=3)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, n_classes))

own = {"data.name": "squares", "data.n_train": 300, "data.n_val": 60, "model": {"name": "own_cnn"}}
study = Study("smoke", {**own, "training.epochs": 5, "attribution.n_subsets": 30})
Chooser(study, trust=False)
"""


def test_an_own_network_on_colour_images(page, url, place):
    write_cell(OWN_CNN, place / "notebooks" / "own.ipynb")
    assert_clean(run_all(page, url("own.ipynb")))
    widget = page.locator(".dmm-widget")
    expect(widget.get_by_role("listbox", name="300 training images")).to_be_visible()
    tiles = widget.get_by_role("listbox", name=re.compile("training images")).get_by_role("option")
    expect(tiles.first.locator(".dmm-title")).to_have_text(re.compile("red|green|blue"))
    widget.get_by_label("Class").select_option("blue")
    widget.get_by_label("Sort").select_option("margin, high to low")
    expect(tiles.first.locator(".dmm-title")).to_have_text("blue")
    pixels = "e => [e.width, e.height, ...e.getContext('2d').getImageData(0, 0, e.width, e.height).data]"
    expect(tiles.first.locator("canvas")).to_have_attribute("width", "20")  # once its image has come
    width, height, *values = tiles.first.locator("canvas").evaluate(pixels)
    red, green, blue = np.reshape(values, (height, width, 4))[..., :3].transpose(2, 0, 1).astype(int)
    assert (width, height) == (20, 16)
    assert (blue - np.maximum(red, green) > 80).sum() == 49, "in its colours, the right way up"
    expect(widget.locator(".dmm-grey")).to_have_count(0)
    outcome = widget.locator(".dmm-consequences .dmm-outcome")
    tiles.first.click()
    expect_chosen(widget, 1)
    expect(outcome.locator("table")).to_be_visible()
    widget.get_by_role("button", name="most helpful").click()
    expect_chosen(widget, 11)
    widget.get_by_role("button", name="Save").click()
    alone = "Unlearn them by a Study in this process, which alone knows data 'squares', model 'own_cnn'"
    expect(widget.get_by_text(f"Saved 11 images. {alone}")).to_be_visible()
    expect_drawn(page)
    screenshot(page, widget, "03_own_network")
    expect(widget.get_by_text("Not with data 'squares', which only this process knows")).to_be_visible()
    shut_down(page)


def test_the_main_results_run_in_jupyterlab_without_a_warning(page, url):
    """As nbval sees of every notebook (`test_notebooks.py`); those with widgets follow, and in `test_chooser.py`."""
    assert_clean(run_all(page, url(UNLEARN)))
    shut_down(page)


def test_sliders_of_notebook_01_move_curves(page, url):
    assert_clean(run_all(page, url(NOTEBOOKS[0].name)))
    widget = page.locator(".dmm-widget")
    view, condition = widget.locator(".dmm-curves"), widget.get_by_role("slider", name="condition number")
    expect(view).to_have_attribute("aria-label", re.compile("^Distance to the oracle .* OM on F within 1 % by step"))
    expect(view.locator(".dmm-axes > svg")).to_have_count(3)
    expect(view.locator(".dmm-axes > svg > svg > path")).to_have_count(18)
    cells, before = n_cells(page), view.get_attribute("aria-label")
    drawn = view.locator(".dmm-axes").inner_html()
    condition.focus()
    page.keyboard.press("ArrowLeft")
    expect(view).not_to_have_attribute("aria-label", before)
    assert view.locator(".dmm-axes").inner_html() != drawn
    for key in [*["ArrowLeft"] * 15, *["ArrowRight"] * 15]:  # faster than the kernel answers: the last one counts
        page.keyboard.press(key)
    page.keyboard.press("End")
    expect(view).to_contain_text("condition number 1,000,000,")

    step = widget.get_by_role("slider", name="step, in 1 / L")
    step.focus()
    page.keyboard.press("End")
    expect(widget.get_by_role("alert")).to_contain_text("diverges beyond 2 / L")
    expect(view).to_contain_text("step 1 / L")
    page.keyboard.press("ArrowLeft")
    expect(widget.get_by_role("alert")).to_have_count(0)
    expect(view).to_contain_text("step 2 / L")
    assert n_cells(page) == cells

    light = screenshot(page, widget, "01_light")
    page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    assert light - screenshot(page, widget, "01_dark") > 0.4
    page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    narrow(page, widget, "01_narrow")
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    expect(widget.get_by_role("alert")).to_have_text("The kernel behind this widget has stopped; run its cell again.")
    shut_down(page)
