"""JupyterLab and browsers as a user drives them, for the tests beside this file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "screenshots"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
CHOOSE, UNLEARN, ANALYSE = (next(p.name for p in NOTEBOOKS if p.name[:2] == n) for n in ("03", "04", "05"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

CONTROLS = tuple(f"- {role}" for role in ("button", "combobox", "textbox", "spinbutton", "slider", "listbox", "option"))
PATIENCE = 180  # seconds that anything may take on a busy machine; waiting ends as soon as it is there

MARKS = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1500)]
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
def place(tmp_path_factory, smoke_store):
    """Copies of the notebooks, not yet run, on the smoke preset."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    (folder / "runs").mkdir()
    (folder / "runs" / "store").symlink_to(smoke_store)
    for path in NOTEBOOKS:
        write_on_smoke(path, folder / "notebooks" / path.name)
    return folder


def write_on_smoke(source, target):
    notebook = json.loads(source.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = [*cell["source"], '\npreset = "smoke"']
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
