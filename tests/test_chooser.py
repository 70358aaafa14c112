"""Choosing by eye in JupyterLab, saving, and what notebooks 04 and 05 make of it; as `test_browser.py` drives it."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import expect

from dmmlib import forget_sets
from dmmlib.study import Study
from tests.browsing import (
    ANALYSE,
    CHOOSE,
    CONTROLS,
    MARKS,
    PATIENCE,
    assert_clean,
    browser,
    expect_chosen,
    expect_drawn,
    n_cells,
    narrow,
    page,
    place,
    run_all,
    screenshot,
    shut_down,
    theme,
    url,
)
from tests.test_notebooks import execute, one_after_the_other

pytestmark = MARKS


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
    settled = "() => window.dmmSeen === (window.dmmSeen = document.querySelector('.dmm-plane').toDataURL())"
    page.wait_for_function(settled, polling=500)  # it is drawn after what is chosen is counted
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

    # a list of ids with labels, dropped on the images, adds; an upload takes the place of the choice
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File(["id,label\\n93,1\\n14,2\\n"], "request.csv"));
        const drop = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
        document.querySelector(".dmm-tile").dispatchEvent(drop);
    }""")
    expect_chosen(widget, 5)
    with page.expect_file_chooser() as asked:
        widget.get_by_role("button", name="Upload to replace").click()
    more = b"index,file\n3,a.png\n15,b.png\n14,c.png\n92,d.png\n"
    asked.value.set_files([{"name": "more.csv", "mimeType": "text/csv", "buffer": more}])
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


def test_the_saved_set_is_a_parameter_of_notebooks_04_and_05(place):
    path = place / "runs" / "smoke" / "forget_sets" / "by_eye.json"
    if not path.exists():
        pytest.skip("the test before saves the set")
    ran = execute(one_after_the_other("04", "05"), place, "smoke", forget_set=str(path))
    second = next(i for i, cell in enumerate(ran.cells) if cell.source.startswith("# 05"))
    for cells in (ran.cells[:second], ran.cells[second:]):
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert_clean(outputs)
        assert "by_eye" in json.dumps(outputs)


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
