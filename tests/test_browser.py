"""The widget in JupyterLab, driven as a user does: headless Chromium, mouse and keyboard, both themes.

Screenshots stay in `screenshots/`. Without Chromium these tests are skipped; with DMM_REQUIRE_BROWSER set they fail.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from dmmlib import forget_sets
from dmmlib.study import Study

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "screenshots"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
CHOOSE, UNLEARN, ANALYSE = (next(p.name for p in NOTEBOOKS if p.name[:2] == n) for n in ("03", "04", "05"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing = (
            "Chromium is not on this machine; install it (Debian: apt-get install chromium) for the browser tests."
        )
        (pytest.fail if os.environ.get("DMM_REQUIRE_BROWSER") else pytest.skip)(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Copies of the notebooks, not yet run, on the smoke preset."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    for path in NOTEBOOKS:
        write_parameters(path, folder / "notebooks" / path.name)
    return folder


def write_parameters(source, target, **values):
    notebook = json.loads(source.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        if "parameters" in cell["metadata"].get("tags", []):
            lines = [*cell["source"], '\npreset = "smoke"', *(f"\n{k} = {v!r}" for k, v in values.items())]
            cell["source"] = lines
    target.write_text(json.dumps(notebook))


@pytest.fixture(scope="module")
def url(place):
    """JupyterLab on loopback, with a token, with nothing of the user's configuration."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    settings = place / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTERLAB_SETTINGS_DIR": "settings",
               "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "DMM_RUNS": "runs", "DMM_FIGURES": "figures"}  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(place / v) for k, v in folders.items()}}
    with open(place / "lab.log", "wb") as log:
        root = place / "notebooks"
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
             "--LabApp.expose_app_in_browser=True"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{base}/api?token={token}", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (place / "lab.log").read_text()[-2000:]
                time.sleep(0.5)
        yield lambda name: f"{base}/lab/tree/{name}?token={token}&reset"
    finally:
        server.terminate()  # and with it every kernel
        server.wait(30)


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1280, "height": 1400})
    opened.set_default_timeout(60_000)
    crashes = []
    opened.on("pageerror", lambda error: crashes.append(error))
    yield opened
    opened.close()
    assert not crashes, crashes


def run_all(page, address):
    """Open a notebook, run every cell, and return what its code cells show."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext?.isReady")
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    cells = page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON().cells")
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def assert_clean(outputs):
    assert outputs
    for output in outputs:
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", output["text"]


def shut_down(page):
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def theme(page, name):
    page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name}'}})")
    page.wait_for_function(f"document.body.dataset.jpThemeName === 'JupyterLab {name}'")
    page.wait_for_timeout(1000)  # its style sheet is loaded, and the canvas drawn again


def screenshot(page, widget, name):
    """Kept as an artefact, and looked at: a picture with many tones, not a blank page. Its mean grey."""
    SCREENSHOTS.mkdir(exist_ok=True)
    widget.evaluate("element => element.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(400)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path)
    grey = image.imread(path)[..., :3].mean(2)
    assert grey.std() > 0.05, f"{path} is blank"
    assert len(np.unique((grey * 255).astype(int))) > 50, f"{path} is nearly blank"
    return float(grey.mean())


def drawn(page):
    """Share of the scatter's pixels that hold ink."""
    return page.evaluate("""() => {
        const canvas = document.querySelector('.dmm-plane');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return data.filter((value, k) => k % 4 === 3 && value > 0).length / (data.length / 4);
    }""")


def chosen(widget):
    return int(widget.locator(".dmm-header b").inner_text())


def expect_chosen(page, widget, n):
    page.wait_for_function(
        "([element, n]) => element.querySelector('.dmm-header b').textContent === n",
        arg=[widget.element_handle(), str(n)],
    )


def test_choose_by_eye_preview_save_and_unlearn(page, url, place):
    outputs = run_all(page, url(CHOOSE))
    assert_clean(outputs)
    assert any("image/png" in o["data"] and "application/vnd.jupyter.widget-view+json" in o["data"] for o in outputs
               if "data" in o), "a still for where there is no kernel"  # fmt: skip
    widget = page.locator(".dmm-widget")
    gallery = widget.get_by_role("listbox", name="400 training images")
    tiles = gallery.get_by_role("option")
    tiles.first.wait_for()
    page.wait_for_function("document.querySelector('.dmm-tile .dmm-title').textContent !== ''")
    assert tiles.count() < 60, "of 400 images only those in sight are drawn"
    expect_chosen(page, widget, 5)
    before = widget.locator(".dmm-outcome table").inner_text()

    tiles.nth(2).click()
    expect_chosen(page, widget, 6)
    assert tiles.nth(2).get_attribute("aria-selected") == "true"
    page.wait_for_function("t => document.querySelector('.dmm-outcome table').innerText !== t", arg=before)

    # keyboard: to the right, include, one more, and back; JupyterLab's own shortcuts stay out of it
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    gallery.focus()
    for key in ("Home", "ArrowRight", "Space"):
        page.keyboard.press(key)
    expect_chosen(page, widget, 7)
    assert tiles.nth(1).get_attribute("aria-selected") == "true"
    for key in ("ArrowDown", "Enter", "d", "d", "x"):
        page.keyboard.press(key)
    expect_chosen(page, widget, 8)
    page.keyboard.press("Control+z")
    expect_chosen(page, widget, 7)
    widget.get_by_role("button", name="Undo").click()
    expect_chosen(page, widget, 6)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells, "typing in the widget deletes no cell"

    # filter, then a lasso around everything: only what passes the filter is taken
    widget.get_by_label("Class").select_option("shirt")
    take = widget.get_by_role("button", name="Include all")
    page.wait_for_function("b => b.textContent !== 'Include all 400 shown'", arg=take.element_handle())
    shirts = int(take.inner_text().split()[2])
    assert 10 < shirts < 100
    widget.get_by_role("button", name="Clear").click()
    expect_chosen(page, widget, 0)
    assert "Choose images" in widget.inner_text()
    box = widget.locator(".dmm-plane").bounding_box()
    corners = [(0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99)]
    x, y = (box["x"] + 0.01 * box["width"], box["y"] + 0.01 * box["height"])
    page.mouse.move(x, y)
    page.mouse.down()
    for across, down in corners[1:]:
        page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"], steps=8)
    page.mouse.up()
    expect_chosen(page, widget, shirts)
    widget.get_by_label("Class").select_option("all classes")

    # what is wrong is said; what is right is previewed and saved
    widget.get_by_label("Indices").fill("3, 4000")
    widget.get_by_role("button", name="Include", exact=True).click()
    assert "4000 is no training image" in widget.get_by_role("alert").inner_text()
    widget.get_by_role("button", name="Clear").click()
    widget.get_by_label("Indices").fill("3, 14, 15, 92")
    widget.get_by_role("button", name="Include", exact=True).click()
    expect_chosen(page, widget, 4)
    tiles.nth(5).click()
    widget.get_by_role("button", name="most helpful").click()
    expect_chosen(page, widget, 15)
    widget.get_by_label("Name").fill("by_eye")
    widget.get_by_role("button", name="Save").click()
    widget.get_by_text("dmm run smoke --stage 04 --forget-set").wait_for()
    path = place / "runs" / "smoke" / "forget_sets" / "by_eye.json"
    saved = forget_sets.load(path, Study("smoke", runs=place / "runs").data)
    assert len(saved) == 15
    assert {3, 14, 15, 92} <= set(saved.indices.tolist())

    light = screenshot(page, widget, "03_light")
    assert drawn(page) > 0.01
    theme(page, "Dark")
    dark = screenshot(page, widget, "03_dark")
    assert drawn(page) > 0.01, "the scatter is drawn again in the other theme"
    assert light - dark > 0.4
    theme(page, "Light")

    # another set of that name is asked about
    widget.get_by_role("button", name="Undo").click()
    expect_chosen(page, widget, 5)
    widget.get_by_role("button", name="Save").click()
    widget.get_by_role("button", name="Keep the other").click()
    assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=1) + "\n"
    assert len(forget_sets.load(path, Study("smoke", runs=place / "runs").data)) == 15

    # a trial run in the background, then what retraining gave stands beside the prediction
    widget.get_by_label("Name").fill("by_eye_too")
    widget.get_by_role("button", name="Try on smoke preset").click()
    widget.get_by_role("button", name="Cancel").wait_for()
    widget.get_by_text("Smoke run done").wait_for(timeout=180_000)
    widget.get_by_text("retrained").first.wait_for()
    screenshot(page, widget, "03_after_trial")

    # the kernel goes: a sentence, and nothing saved is lost
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    notice = widget.get_by_text("The kernel behind this widget has stopped")
    notice.first.wait_for()
    assert "3, 14, 15" in notice.first.inner_text()
    screenshot(page, widget, "03_kernel_gone")
    assert len(forget_sets.load(path, Study("smoke", runs=place / "runs").data)) == 15
    shut_down(page)


def test_notebook_04_unlearns_the_saved_set(page, url, place):
    path = place / "runs" / "smoke" / "forget_sets" / "by_eye.json"
    if not path.exists():
        pytest.skip("the test before saves the set")
    write_parameters(ROOT / "notebooks" / UNLEARN, place / "notebooks" / "04_mine.ipynb", forget_set=str(path))
    outputs = run_all(page, url("04_mine.ipynb"))
    assert_clean(outputs)
    assert "by_eye" in json.dumps(outputs)
    shut_down(page)


def test_notebook_05_leads_to_the_image_behind_a_number(page, url):
    assert_clean(run_all(page, url(ANALYSE)))
    widget = page.locator(".dmm-widget")
    options = widget.get_by_role("listbox").get_by_role("option")
    options.first.wait_for()
    figure = widget.locator("img.dmm-figure")
    first = figure.get_attribute("src")
    options.nth(3).click()
    page.wait_for_function("s => document.querySelector('img.dmm-figure').src !== s", arg=first)
    assert "DMM" in figure.get_attribute("alt")
    screenshot(page, widget, "05_results")
    shut_down(page)


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


def test_ten_thousand_images_scroll_smoothly(page, url, place):
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "source": TEN_THOUSAND,
        "outputs": [],
        "execution_count": None,
    }
    content = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content["metadata"] = {"kernelspec": kernel}
    (place / "notebooks" / "many.ipynb").write_text(json.dumps(content))
    assert_clean(run_all(page, url("many.ipynb")))
    page.locator(".dmm-tile").first.wait_for()
    frames = page.evaluate("""async () => {
        const viewport = document.querySelector('.dmm-viewport');
        const times = [];
        let last = performance.now();
        for (let k = 0; k < 120; k++) {  // two seconds of steady scrolling, 150 pixels a frame
            viewport.scrollTop += 150;
            await new Promise(requestAnimationFrame);
            times.push(performance.now() - last);
            last = performance.now();
        }
        viewport.scrollTop = viewport.scrollHeight;
        return times;
    }""")
    page.wait_for_function("document.querySelector('.dmm-viewport').innerText.includes('#9999')")
    page.wait_for_function("!document.querySelector('.dmm-loading')")
    assert page.locator(".dmm-tile").count() < 200
    print(f"frame: median {np.median(frames):.0f} ms, longest {max(frames):.0f} ms")
    assert np.median(frames) < 100, "ten frames a second on one busy core, sixty on a free one"
    shut_down(page)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name not in (CHOOSE, ANALYSE)], ids=lambda p: p.stem)
def test_first_run_in_jupyterlab_shows_no_warning_and_no_red(page, url, path):
    assert_clean(run_all(page, url(path.name)))
    shut_down(page)
