"""The widget in JupyterLab, driven as a user does: headless Chromium, mouse and keyboard, both themes; once Firefox.

What the kernel answers comes when it comes: every assertion about it waits, and none depends on the machine's speed.
Screenshots stay in `screenshots/`. Without a browser its tests are skipped; with DMM_REQUIRE_BROWSER set they fail.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import websocket
from matplotlib import image
from playwright.sync_api import expect, sync_playwright

from dmmlib import forget_sets
from dmmlib.study import Study

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "screenshots"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
CHOOSE, UNLEARN, ANALYSE = (next(p.name for p in NOTEBOOKS if p.name[:2] == n) for n in ("03", "04", "05"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

CONTROLS = tuple(f"- {role}" for role in ("button", "combobox", "textbox", "spinbutton", "slider", "listbox", "option"))
PATIENCE = 180  # seconds that anything may take on a busy machine; waiting ends as soon as it is there

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1500)]
expect.set_options(timeout=1000 * PATIENCE)


def required(missing):
    """Skip what this machine cannot do; where all shall be tested, fail."""
    (pytest.fail if os.environ.get("DMM_REQUIRE_BROWSER") else pytest.skip)(missing)


def program(*names):
    found = next(filter(None, map(shutil.which, names)), None)
    return found or required(f"{names[0]} is not on this machine; install it (Debian: apt-get install {names[0]}).")


@pytest.fixture(scope="module")
def browser():
    path = program("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=1000 * PATIENCE)
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
    token = secrets.token_hex(8)
    settings = place / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTERLAB_SETTINGS_DIR": "settings",
               "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_RUNTIME_DIR": "runtime", "DMM_RUNS": "runs",
               "DMM_FIGURES": "figures"}  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(place / v) for k, v in folders.items()}}
    with open(place / "lab.log", "wb") as log:
        root = place / "notebooks"
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
             f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
             "--LabApp.expose_app_in_browser=True"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        base = None
        started = time.monotonic()
        while base is None:
            assert server.poll() is None, (place / "lab.log").read_text()[-2000:]
            assert time.monotonic() < started + PATIENCE, "JupyterLab does not answer"
            time.sleep(0.2)
            try:  # it takes a port that is free, and writes down which
                told = json.loads((place / "runtime" / f"jpserver-{server.pid}.json").read_text())
                urllib.request.urlopen(f"{told['url']}api?token={token}", timeout=PATIENCE).close()
                base = told["url"]
            except (OSError, ValueError):
                continue
        yield lambda name: f"{base}lab/tree/{name}?token={token}&reset"
    finally:
        server.terminate()  # and with it every kernel
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1280, "height": 1400})
    opened.set_default_timeout(1000 * PATIENCE)
    crashes = []
    opened.on("pageerror", lambda error: crashes.append(error))
    yield opened
    opened.evaluate("0")  # whatever went wrong has been told by then; what breaks off as the page closes is no crash
    told = [str(error) for error in crashes if "Canceled future" not in str(error)]  # JupyterLab's own, on a reload
    opened.close()
    assert not told, told


def run_all(page, address):
    """Open a notebook, run every cell, and return what its code cells show."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("""() => {
        const notebook = window.jupyterapp?.shell?.currentWidget;
        return notebook?.context?.isReady && notebook.sessionContext?.isReady;
    }""")
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
    """Change it, and wait until the page and the scatter are drawn in it."""
    look = """() => [getComputedStyle(document.querySelector('.dmm-viewport')).backgroundColor,
                     document.querySelector('.dmm-plane').toDataURL()]"""
    before = page.evaluate(look)
    page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name}'}})")
    page.wait_for_function(f"before => ({look})().every((now, k) => now !== before[k])", arg=before)


def screenshot(page, widget, name):
    """Kept as an artefact, and looked at: a picture with many tones, not a blank page. Its mean grey."""
    SCREENSHOTS.mkdir(exist_ok=True)
    widget.evaluate("element => element.scrollIntoView({block: 'start'})")
    page.wait_for_function("!document.querySelector('.dmm-loading, .dmm-outdated')")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path)
    return many_tones(path)


def many_tones(path):
    """Hold that a picture is no blank page; its mean grey."""
    grey = image.imread(path)[..., :3].mean(2)
    assert grey.std() > 0.05, f"{path} is blank"
    assert len(np.unique((grey * 255).astype(int))) > 50, f"{path} is nearly blank"
    return float(grey.mean())


def narrow(page, widget, name):
    """The same at 900 pixels, where nothing is cut off."""
    size = page.viewport_size
    page.set_viewport_size({"width": 900, "height": 900})
    screenshot(page, widget, name)
    assert widget.evaluate("element => element.scrollWidth <= element.clientWidth")
    page.set_viewport_size(size)


def expect_drawn(page):
    """More than 1 % of the scatter's pixels hold ink."""
    page.wait_for_function("""() => {
        const canvas = document.querySelector('.dmm-plane');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return data.filter((value, k) => k % 4 === 3 && value > 0).length > 0.01 * data.length / 4;
    }""")


def n_cells(page):
    return page.evaluate("jupyterapp.shell.currentWidget.content.model.cells.length")


def expect_chosen(widget, n):
    expect(widget.locator(".dmm-header b")).to_have_text(str(n))


def test_choose_by_eye_preview_save_and_unlearn(page, url, place):
    outputs = run_all(page, url(CHOOSE))
    assert_clean(outputs)
    assert any("image/png" in o["data"] and "application/vnd.jupyter.widget-view+json" in o["data"] for o in outputs
               if "data" in o), "a still for where there is no kernel"  # fmt: skip
    widget = page.locator(".dmm-widget")
    gallery = widget.get_by_role("listbox", name="400 training images")
    tiles = gallery.get_by_role("option")
    expect(tiles.first.locator(".dmm-title")).not_to_be_empty()
    assert tiles.count() < 60, "of 400 images only those in sight are drawn"
    expect_chosen(widget, 5)
    outcome = widget.locator(".dmm-consequences .dmm-outcome")
    expect(outcome.locator("table")).to_be_visible()
    before = outcome.locator("table").inner_text()

    tiles.nth(2).click()
    expect_chosen(widget, 6)
    expect(tiles.nth(2)).to_have_attribute("aria-selected", "true")
    expect(outcome.locator("table")).not_to_have_text(before, use_inner_text=True)
    expect(widget.locator(".dmm-consequences")).to_have_attribute("aria-busy", "false")

    # for screen readers: whatever can be used has a name
    expect(widget.get_by_role("slider", name="Loss: highest")).to_be_visible()
    controls = [line for line in widget.aria_snapshot().splitlines() if line.strip().startswith(CONTROLS)]
    assert len(controls) > 30
    assert [line for line in controls if '"' not in line] == []

    # keyboard: to the right, include, one more, and back; JupyterLab's own shortcuts stay out of it
    cells = n_cells(page)
    gallery.focus()
    for key in ("Home", "ArrowRight", "Space"):
        page.keyboard.press(key)
    expect_chosen(widget, 7)
    expect(tiles.nth(1)).to_have_attribute("aria-selected", "true")
    for key in ("ArrowDown", "Enter", "d", "d", "x"):
        page.keyboard.press(key)
    expect_chosen(widget, 8)
    page.keyboard.press("Control+z")
    expect_chosen(widget, 7)
    widget.get_by_role("button", name="Undo").click()
    expect_chosen(widget, 6)
    assert n_cells(page) == cells, "typing in the widget deletes no cell"

    # a range, everything that is shown, and what was taken back made again
    tiles.nth(6).click()
    tiles.nth(9).click(modifiers=["Shift"])
    for position in (6, 7, 8, 9):
        expect(tiles.nth(position)).to_have_attribute("aria-selected", "true")
    gallery.focus()
    page.keyboard.press("Control+a")
    expect_chosen(widget, 400)
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+Shift+z")
    expect_chosen(widget, 400)
    page.keyboard.press("Control+z")
    expect(widget.locator(".dmm-header b")).not_to_have_text("400")

    # the plane: closer, moved, whole again; a class of the legend alone
    plane, seen = widget.locator(".dmm-plane"), "element => element.toDataURL()"
    whole = plane.evaluate(seen)
    plane.focus()
    for key in ("+", "ArrowLeft", "0"):
        page.keyboard.press(key)
        page.wait_for_function("([before, whole]) => (document.querySelector('.dmm-plane').toDataURL() === before)"
                               " === whole", arg=[whole, key == "0"])  # fmt: skip
    bags = widget.locator(".dmm-legend").get_by_role("button", name="bag")
    bags.click()
    expect(bags).to_have_attribute("aria-pressed", "true")
    expect(widget.get_by_role("button", name="Include all")).not_to_have_text("Include all 400 shown")
    bags.click()
    expect(widget.get_by_role("button", name="Include all")).to_have_text("Include all 400 shown")

    # filter, then a lasso around everything: only what passes the filter is taken
    widget.get_by_label("Class").select_option("shirt")
    take = widget.get_by_role("button", name="Include all")
    expect(take).not_to_have_text("Include all 400 shown")
    shirts = int(take.inner_text().split()[2])
    assert 10 < shirts < 100
    widget.get_by_role("button", name="Clear").click()
    expect_chosen(widget, 0)
    expect(outcome).to_have_text("Choose images to see what forgetting them would do.")
    widget.locator(".dmm-plane").scroll_into_view_if_needed()
    box = widget.locator(".dmm-plane").bounding_box()
    corners = [(0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99)]
    x, y = (box["x"] + 0.01 * box["width"], box["y"] + 0.01 * box["height"])
    page.mouse.move(x, y)
    page.mouse.down()
    for across, down in corners[1:]:
        page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"], steps=8)
    page.mouse.up()
    expect_chosen(widget, shirts)
    widget.get_by_label("Class").select_option("all classes")

    # nothing and everything are no forget sets
    expect(take).to_have_text("Include all 400 shown")
    take.click()
    expect_chosen(widget, 400)
    expect(outcome).to_contain_text("all 400 training points")
    widget.get_by_role("button", name="Save").click()
    expect(widget.get_by_role("alert")).to_contain_text("all 400 training points")

    # what is wrong is said; what is right is previewed and saved
    widget.get_by_label("List").fill("3, 4000")
    include = widget.get_by_role("button", name="Include", exact=True)
    include.click()
    alert = widget.get_by_role("alert")
    expect(alert).to_contain_text("'4000' is no training point")
    assert abs(alert.bounding_box()["y"] - include.bounding_box()["y"]) < 120, "beside its button"
    widget.get_by_role("button", name="Clear").click()
    expect_chosen(widget, 0)
    widget.get_by_label("List").fill("3, 14, 15, 92")
    widget.get_by_role("button", name="Include", exact=True).click()
    expect_chosen(widget, 4)

    # a list of ids with labels, dropped on the images, takes the place of the choice; an upload adds
    widget.get_by_role("button", name="replaces").click()
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File(["id,label\\n92,1\\n14,2\\n"], "request.csv"));
        const drop = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
        document.querySelector(".dmm-tile").dispatchEvent(drop);
    }""")
    expect_chosen(widget, 2)
    widget.get_by_role("button", name="adds").click()
    with page.expect_file_chooser() as asked:
        widget.get_by_role("button", name="Upload").click()
    asked.value.set_files([{"name": "more.csv", "mimeType": "text/csv", "buffer": b"index,file\n3,a.png\n15,b.png\n"}])
    expect_chosen(widget, 4)
    gallery.locator("[aria-selected=false]").nth(5).click()
    expect_chosen(widget, 5)
    widget.get_by_role("button", name="most helpful").click()
    expect_chosen(widget, 15)
    widget.get_by_label("Name").fill("by_eye")
    widget.get_by_role("button", name="Save").click()
    expect(widget.get_by_text("dmm run smoke --stage 04 --forget-set")).to_be_visible()
    path = place / "runs" / "smoke" / "forget_sets" / "by_eye.json"
    saved = forget_sets.load(path, Study("smoke", runs=place / "runs").data)
    assert len(saved) == 15
    assert {3, 14, 15, 92} <= set(saved.indices.tolist())

    expect_drawn(page)
    for width, height, least in ((1440, 900, 240), (900, 900, 120)):  # consequences beside the images, not below them
        page.set_viewport_size({"width": width, "height": height})
        screenshot(page, widget, f"03_{width}")
        sliders = [slider.bounding_box()["width"] for slider in widget.locator(".slider-container").all()]
        assert len(sliders) == 3
        assert min(sliders) > least, "long enough to be moved"
        table = outcome.locator("table").bounding_box()
        assert table["y"] + table["height"] < height
        assert abs(table["y"] - gallery.bounding_box()["y"]) < 300
        assert widget.evaluate("element => element.scrollWidth <= element.clientWidth")
    page.set_viewport_size({"width": 1280, "height": 1400})
    light = screenshot(page, widget, "03_light")
    theme(page, "Dark")
    expect_drawn(page)
    dark = screenshot(page, widget, "03_dark")
    assert light - dark > 0.4
    theme(page, "Light")

    # saved, and opened again on the running kernel: keys that are typed in a plain control delete no cell
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("!jupyterapp.shell.currentWidget.context.model.dirty")
    page.goto(page.url)
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.isReady")
    widget.evaluate("element => element.scrollIntoView()")  # out of sight nothing is drawn
    expect(tiles.first.locator(".dmm-title")).not_to_be_empty()
    expect_chosen(widget, 15)
    for control in ("Class", "Sort"):
        widget.get_by_label(control).focus()
        for key in "ddx":
            page.keyboard.press(key)
    assert n_cells(page) == cells
    widget.get_by_label("Class").select_option("all classes")
    widget.get_by_label("Sort").select_option("memorisation, high to low")

    # another set of that name is asked about
    widget.get_by_role("button", name="Undo").click()
    expect_chosen(widget, 5)
    widget.get_by_role("button", name="Save").click()
    keep = widget.get_by_role("button", name="Keep the other")
    keep.click()
    expect(keep).to_be_hidden()
    assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=1) + "\n"
    assert len(forget_sets.load(path, Study("smoke", runs=place / "runs").data)) == 15

    # a trial run in the background, then what retraining gave stands beside the prediction
    widget.get_by_label("Name").fill("by_eye_too")
    expect(widget.get_by_text("Trains 40 small models")).to_be_visible()
    widget.get_by_role("button", name="Try on smoke preset").click()
    expect(widget.get_by_role("button", name="Cancel")).to_be_visible()
    expect(widget.get_by_text("Smoke run done")).to_be_visible(timeout=3000 * PATIENCE)
    expect(outcome).to_contain_text("retrained")
    screenshot(page, widget, "03_after_trial")

    # the kernel goes: a sentence, and nothing saved is lost
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    expect(widget.get_by_text("The kernel behind this widget has stopped").first).to_contain_text("3, 14, 15")
    screenshot(page, widget, "03_kernel_gone")
    assert len(forget_sets.load(path, Study("smoke", runs=place / "runs").data)) == 15
    shut_down(page)


@pytest.mark.parametrize("notebook", [UNLEARN, ANALYSE])
def test_the_saved_set_is_a_parameter_of_notebooks_04_and_05(page, url, place, notebook):
    path = place / "runs" / "smoke" / "forget_sets" / "by_eye.json"
    if not path.exists():
        pytest.skip("the test before saves the set")
    write_parameters(ROOT / "notebooks" / notebook, place / "notebooks" / "mine.ipynb", forget_set=str(path))
    outputs = run_all(page, url("mine.ipynb"))
    assert_clean(outputs)
    assert "by_eye" in json.dumps(outputs)
    shut_down(page)


def test_notebook_05_leads_to_the_image_behind_a_number(page, url):
    assert_clean(run_all(page, url(ANALYSE)))
    widget = page.locator(".dmm-widget")
    options = widget.get_by_role("listbox").get_by_role("option")
    expect(options.first).to_be_visible()
    figure = widget.locator(".dmm-histograms")
    expect(figure).to_have_attribute("aria-label", re.compile("DMM"))
    first, names = figure.get_attribute("aria-label"), figure.locator(".dmm-panels").inner_text()
    options.nth(3).click()
    expect(figure).not_to_have_attribute("aria-label", first)
    expect(figure).to_have_attribute("aria-busy", "false")
    methods = [re.sub(r"[\d.]+", "", text) for text in (names, figure.locator(".dmm-panels").inner_text())]
    assert methods[0] == methods[1], "panels stay where they are"
    assert figure.locator(".dmm-way span").all_inner_texts()[::2] == ["original", "retrained", "predicted", "DMM"]
    screenshot(page, widget, "05_results")
    narrow(page, widget, "05_narrow")
    shut_down(page)


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
        at = self.evaluate(f"(e => (e.scrollIntoView({{block: 'center'}}), e))({one})")["result"]["sharedId"]
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
    expect(widget.get_by_text("Saved 11 images")).to_be_visible()
    expect_drawn(page)
    screenshot(page, widget, "03_own_network")
    expect(widget.get_by_text("Not with data 'squares', which only this process knows")).to_be_visible()
    shut_down(page)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS[1:] if p.name not in (CHOOSE, ANALYSE)], ids=lambda p: p.stem)
def test_first_run_in_jupyterlab_shows_no_warning_and_no_red(page, url, path):
    assert_clean(run_all(page, url(path.name)))
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
