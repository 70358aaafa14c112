"""The widget without a browser: what is chosen, what is predicted, what is saved, and what is said of mistakes."""

import dataclasses
import datetime
import html
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.formatters import MimeBundleFormatter
from typer.testing import CliRunner

from dmmlib import forget_sets, metrics, presets
from dmmlib.analysis import plots, verdict
from dmmlib.analysis.one_image import single_effects
from dmmlib.app import cli, plan
from dmmlib.attributors.kernel import KernelResponse, gradient_kernel
from dmmlib.attributors.margins import MarginDatamodel
from dmmlib.datamodels import Attributor
from dmmlib.errors import DmmError, ForgetSetError
from dmmlib.files import write_json
from dmmlib.progress import silent
from dmmlib.studies.adversary.subspace import gradients
from dmmlib.study import Study
from dmmlib.widgets import Chooser, Results, views
from dmmlib.widgets import preview as previews
from dmmlib.widgets.batch import Trial
from dmmlib.widgets.measures import distances, loadings, memorisation
from dmmlib.widgets.preview import Previewer
from dmmlib.widgets.selection import Selection, shown
from dmmlib.widgets.views import Message, Scatter
from tests.conftest import TINY

PATIENCE = 300  # seconds that a process may take on a busy machine
EVIL = "<img src=x onerror=alert(1)>"


def own(study, folder):
    """A study that saves its sets in a directory of its own, on everything that is trained already."""
    runs = folder / "runs"
    runs.mkdir()
    (study.runs / "store").mkdir(parents=True, exist_ok=True)
    (runs / "store").symlink_to(study.runs / "store")
    return Study(TINY, runs=runs, figures=folder / "figures", progress=silent)


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory):
    study = own(tiny, tmp_path_factory.mktemp("widgets"))
    study.forget_sets()
    return study


@pytest.fixture
def chooser(shared):
    """A chooser on what is fitted already; what a test saves goes with it."""
    folder = shared.directory / "forget_sets"
    kept = set(folder.iterdir())
    yield Chooser(shared, trust=False)
    for path in set(folder.iterdir()) - kept:
        path.unlink()


def parts(widget):
    """A widget and all that it is made of."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def html_of(widget):
    """All the markup that a widget shows."""
    return "".join(part.value for part in parts(widget) if isinstance(part, ipywidgets.HTML))


def said(chooser):
    """The error that is shown, wherever that is; there is never more than one."""
    values = [part.value for part in parts(chooser) if isinstance(part, Message) and part.value]
    assert len(values) <= 1
    return "".join(values)


# --- selection -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "replace", "toggle", "clear"]),
                          st.lists(st.integers(0, 19), min_size=1, max_size=6)), max_size=12))  # fmt: skip
def test_undo_takes_back_every_change_one_by_one(steps):
    selection = Selection(20, [3, 4])
    seen = [set(selection.indices.tolist())]
    for verb, indices in steps:
        before = set(selection.indices.tolist())
        if verb == "clear":
            selection.clear()
            expected = set()
        elif verb == "toggle":
            selection.toggle(indices[0])
            expected = before ^ {indices[0]}
        else:
            getattr(selection, verb)(indices)
            expected = {"add": before | set(indices), "remove": before - set(indices), "replace": set(indices)}[verb]
        assert set(selection.indices.tolist()) == expected
        if expected != before:
            seen.append(expected)
    for expected in reversed(seen):
        assert set(selection.indices.tolist()) == expected
        selection.undo()
    assert not selection.past
    for expected in seen:
        assert set(selection.indices.tolist()) == expected
        selection.redo()
    assert not selection.future
    selection.undo()
    selection.toggle(7)
    assert not selection.future, "another change ends what could be made again"


def test_a_selection_tells_of_changes_and_only_of_them():
    heard = []
    selection = Selection(10)
    selection.on_change.append(lambda: heard.append(len(selection)))
    selection.add([1, 2])
    selection.add([2])
    selection.undo()
    selection.undo()
    assert heard == [2, 0]


def test_filters_show_what_passes_in_the_order_asked_for():
    labels = np.array([0, 1, 0, 1, 0, 1])
    chosen = np.array([True, False, False, True])  # four training points, two validation points
    known = {"margin": np.array([0.3, 0.1, 0.9, 0.5, 0.2, 0.8]), "memorisation": np.array([1, 0, 0, 1, np.nan, np.nan])}

    def order(*args, **kwargs):
        return shown(known, labels, chosen, *args, **kwargs).tolist()

    assert order() == [0, 1, 2, 3]
    assert order("chosen") == [0, 3]
    assert order("validation", sort="margin", descending=True) == [5, 4]
    assert order(label=0, sort="margin", descending=True) == [2, 0]
    assert order(ranges={"margin": (0.2, 0.6)}) == [0, 3]
    assert order("validation", ranges={"memorisation": (0.5, 1)}) == [4, 5], "unknown values do not filter"


def test_memorisation_is_what_seeing_a_point_adds(monkeypatch):
    masks = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    correct = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    outputs = np.stack([1 - correct, correct], 2)[:, [0, 1, 2, 3, 3]]  # and one validation point
    monkeypatch.setattr("dmmlib.widgets.measures.BLOCK", 3)
    assert memorisation(masks, outputs, np.ones(4, int)).tolist() == [1.0, 0.0, 0.0, 0.5]


def test_a_selection_refuses_what_is_no_whole_number():
    with pytest.raises(ForgetSetError, match="float64; give whole numbers"):
        Selection(10).add([1.5])


# --- preview ---------------------------------------------------------------------------------------------


class Known(Attributor):
    """An attributor that is told what happens."""

    def __init__(self, effect):
        self.change = effect

    def effects(self, forget_sets):
        return np.stack([self.change] * len(forget_sets))

    def predict(self, masks):
        raise NotImplementedError


def test_a_preview_compares_the_originals_with_what_the_attributor_expects():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 9, 3)).astype(np.float32)
    labels = rng.integers(0, 3, 9)
    change = np.zeros((9, 3), np.float32)
    change[2, labels[2]] = -50  # point 2 will surely be answered wrongly
    seen = Previewer(Known(change), logits, labels, n_train=6).preview([2])
    before, after = metrics.margins(logits, labels), metrics.margins(logits + change, labels)
    assert seen.size == 1
    assert seen.before.margin["forget"] == pytest.approx(before[:, 2].mean(), abs=1e-5)
    assert seen.after.margin["forget"] == pytest.approx(after[:, 2].mean(), abs=1e-4)
    assert seen.after.accuracy["forget"] == 0
    pd.testing.assert_series_equal(seen.after.loc["retain"], seen.before.loc["retain"])
    assert seen.after.accuracy["validation"] == pytest.approx((logits[:, 6:].argmax(2) == labels[6:]).mean())
    first, second, _ = seen.most_changed(3, np.arange(9))
    assert first == 2
    assert seen.new[2] != labels[2]
    assert seen.distance[second] < 1e-6
    assert 2 not in seen.most_changed(3, np.array([0, 1, 7]))


class Alike(Attributor):
    """An attributor in which every point raises all logits of one class a little; points 0 to 4 act together."""

    def effects(self, forget_sets):
        effects = np.zeros((len(forget_sets), 60, 3), np.float32)
        for row, forget in zip(effects, forget_sets, strict=True):
            row[:, 0] = sum(1.0 if i < 5 else 0.02 * (-1) ** i for i in np.asarray(forget).tolist())
        return effects

    def predict(self, masks):
        raise NotImplementedError


def test_a_request_that_acts_together_stands_out_against_random_ones():
    rng = np.random.default_rng(0)
    previewer = Previewer(Alike(), rng.normal(size=(4, 60, 3)).astype(np.float32), rng.integers(0, 3, 60), n_train=50)
    usual = previewer.usual(shares=(0.04, 0.1, 0.2), n_sets=12)
    assert usual.index.tolist() == [2, 5, 10]
    assert usual["validation", "mean"].is_monotonic_increasing
    together, ordinary = previewer.preview(range(5)), previewer.preview(range(20, 25))
    assert "it stands out" in previews.beyond_usual(usual, together)
    assert "does not stand out" in previews.beyond_usual(usual, ordinary)
    assert f"{together.reach['validation']:.1%} of validation answers" in previews.beyond_usual(usual, together)
    assert previews.beyond_usual(None, together) == "", "nothing measured, nothing claimed"
    assert "leverage" not in together.reach
    assert "knows no gradients, so leverage does not count" in previews.beyond_usual(usual, together)


def test_leverage_is_the_length_of_the_displacement_in_the_models_own_metric(tiny):
    models, n, lam = tiny.originals()[:1], tiny.data.n_train, 0.1
    h, r = (np.random.default_rng(i).uniform(0.2, 2, n).astype(np.float32) for i in (0, 1))
    found = KernelResponse(gradient_kernel(models, tiny.x, tiny.y, n, lam, h), r)
    phi = gradients(models, 0, tiny.x[:n], tiny.y[:n]).cpu().double().numpy()
    mu = lam * (phi**2).sum(1).mean()
    metric = phi.T @ (h[:, None] * phi) + mu * np.eye(phi.shape[1])

    def length(forget):
        moved = np.linalg.solve(metric, phi[forget].T @ (h * r)[forget])
        return np.sqrt(moved @ metric @ moved)

    attributor = MarginDatamodel(found, 1.0, tiny.data.y, np.zeros((len(tiny.x), 10), np.float32))
    forgets = [np.arange(3), np.arange(20, 40), np.array([7])]
    ratios = [attributor.leverage(f) / length(f) for f in forgets]
    np.testing.assert_allclose(ratios, ratios[0], rtol=0.02)


def test_the_studys_attributor_gives_a_preview_all_three_parts_of_the_score(tiny):
    previewer = Previewer(tiny.attributor(), tiny.original_logits(), tiny.data.y, tiny.data.n_train)
    usual = previewer.usual(shares=(0.05, 0.2), n_sets=8)
    assert set(usual.columns.get_level_values(0)) == {"retain", "validation", "leverage"}
    assert (usual["leverage", "std"] > 0).all()
    rng = np.random.default_rng(1)
    random = previewer.preview(rng.choice(120, 6, replace=False))

    def together(forget):
        """Length of the displacement over what it would be if the points pulled in unrelated directions."""
        alone = [tiny.attributor().leverage(np.array([i])) for i in forget]
        return tiny.attributor().leverage(forget) / np.linalg.norm(alone)

    alike = [together(np.flatnonzero(tiny.data.y_train == c)[:6]) for c in range(10)]
    unlike = [together(rng.choice(120, 6, replace=False)) for _ in range(20)]
    assert np.mean(alike) > np.mean(unlike) + 0.03, "images of one class move the parameters together"
    assert "leverage on the parameters" in previews.beyond_usual(usual, random)
    assert "does not count" not in previews.beyond_usual(usual, random)
    assert Known(np.zeros((160, 10))).leverage(np.arange(3)) is None, "not known, not claimed"


def test_a_preview_says_where_it_cannot_tell():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    attributor = Alike()
    previewer = Previewer(attributor, rng.normal(size=(4, 60, 3)).astype(np.float32), labels, n_train=50)
    assert previews.uncertainty(previewer.preview([0, 1])) == "", "no uncertainty known, none claimed"
    attributor.sd = lambda forget: np.where(np.arange(60) < 50, 0.5, 5.0)  # margins of class 0 change by 2
    seen = previewer.preview([0, 1])
    assert seen.told["forget"] == pytest.approx((labels[:2] == 0).mean())
    assert seen.told["retain"] == pytest.approx((labels[2:50] == 0).mean())
    assert seen.told["validation"] == 0
    assert "0% of validation images; for the others it can't tell" in previews.uncertainty(seen)


@pytest.mark.parametrize("forget", [[], list(range(6)), [7]])
def test_no_preview_of_what_is_no_forget_set(forget):
    with pytest.raises(ForgetSetError):
        Previewer(Known(np.zeros((9, 3))), np.zeros((2, 9, 3)), np.zeros(9, int), 6).preview(forget)


def test_trust_ends_where_predictions_were_measured_to_fail():
    measured = pd.DataFrame({"|F|": [10, 100, 100, 1000], "ratio": [0.2, 0.4, 0.6, 0.9]})
    assert previews.warning(measured, 10) == previews.warning(measured, 100) == ""
    assert "off by 70%" in previews.warning(measured, 316)
    assert "more than in any set" in previews.warning(measured, 1001)
    assert previews.warning(None, 5000) == "", "nothing measured, nothing claimed"


def test_the_error_is_measured_against_retrained_models(tiny):
    (tuning,) = tiny.tuning_sets().values()
    tiny.oracles(tuning)
    measured = previews.measure(tiny, shares=(0.05, 0.5), n_oracles=8)
    assert measured["|F|"].is_monotonic_increasing
    assert {"random 6", "random 60", "tune"} <= set(measured["set"])
    half = measured.set_index("set").loc["random 60"]
    assert half["true change"] > 0.5, "half of the data gone is felt"
    assert 0 < half["ratio"] < 1.5


# --- chooser ---------------------------------------------------------------------------------------------


def say(chooser, **message):
    chooser.look.gallery.receive(None, message, [])


def test_what_is_known_of_points_follows_from_the_originals(chooser):
    logits, labels = chooser.study.original_logits(), chooser.study.data.y
    p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(2, keepdims=True)
    correct = np.take_along_axis(p, labels[None, :, None], 2)[..., 0]
    np.testing.assert_allclose(chooser.known["confidence"], correct.mean(0), rtol=1e-4)
    np.testing.assert_allclose(chooser.known["loss"], -np.log(correct).mean(0), rtol=1e-3, atol=1e-6)
    assert np.isnan(chooser.known["memorisation"][120:]).all()


def test_clicks_lasso_and_undo_of_the_browser(chooser):
    say(chooser, kind="toggle", index=5)
    say(chooser, kind="lasso", indices=[7, 8, 9], remove=False)
    say(chooser, kind="lasso", indices=[8], remove=True)
    assert chooser.selection.indices.tolist() == [5, 7, 9]
    assert "<b>3</b> of 120" in chooser.status.value
    assert chooser.preview is None, "predicted when the user pauses, not at every click"
    say(chooser, kind="settled")
    assert chooser.preview.size == 3
    assert "<table" in chooser.consequences.outcome.value
    say(chooser, kind="undo")
    assert chooser.selection.indices.tolist() == [5, 7, 8, 9]
    chooser.look.lasso.value = "lasso −"
    say(chooser, kind="lasso", indices=[7, 8], remove=False)
    assert chooser.selection.indices.tolist() == [5, 9]
    assert np.frombuffer(chooser.look.gallery.chosen, np.uint8).nonzero()[0].tolist() == [5, 9]


def test_consequences_of_an_earlier_choice_are_marked_until_they_are_predicted(chooser):
    told = []
    chooser.look.gallery.observe(lambda change: told.append(change["new"]), "outdated")
    chooser.status.observe(lambda _: told.append("count"), "value")
    say(chooser, kind="toggle", index=5)
    assert told == [True, "count"], "marked before the count can be seen"
    say(chooser, kind="settled")
    assert told == [True, "count", False]
    chooser.selection.add([6])
    assert chooser.picture()
    assert chooser.preview.size == 2, "a still is of what is chosen"
    chooser.selection.clear()
    assert "Choose images" in chooser.consequences.outcome.value, "nothing to predict is said at once"
    assert not chooser.look.gallery.outdated


def test_a_set_too_large_to_be_trusted_is_warned_about(chooser):
    chooser.consequences.measured = pd.DataFrame({"|F|": [12], "ratio": [0.3]})
    chooser.selection.add(range(12))
    chooser.refresh()
    assert 'role="note"' not in chooser.consequences.outcome.value
    chooser.selection.add([12])
    chooser.refresh()
    assert 'role="note">13 images are more than in any set' in chooser.consequences.outcome.value


def test_only_thumbnails_that_are_asked_for_are_sent(chooser, monkeypatch):
    sent = []
    monkeypatch.setattr(
        type(chooser.look.gallery), "send", lambda self, content, buffers: sent.append((content, buffers))
    )
    say(chooser, kind="thumbnails", indices=[4, 130])
    content, buffers = sent[0]
    data = chooser.study.data
    assert content["indices"] == [4, 130]
    assert content["titles"] == [data.class_names[data.y[i]] for i in (4, 130)]
    assert "#130" in content["details"][1]
    assert buffers[0] == data.x[[4, 130]].tobytes()
    assert sum(len(v) for v in chooser.look.gallery.get_state().values() if isinstance(v, bytes)) < 8 * len(data.x)


def test_filters_reach_gallery_and_scatter(chooser):
    chooser.look.label.value = 3
    order = np.frombuffer(chooser.look.gallery.order, np.int32)
    data = chooser.study.data
    assert (data.y[order] == 3).all()
    known = chooser.known["memorisation"][order]
    assert (np.diff(known) <= 0).all(), "most memorised first"
    assert np.frombuffer(chooser.look.scatter.shown, np.uint8).sum() == len(order)
    chooser.look.take_shown.click()
    assert chooser.selection.indices.tolist() == sorted(order.tolist())


def test_images_that_hold_the_current_image_up(chooser):
    picks = chooser.look.picks
    picks["most helpful"].click()
    assert "No image is current" in said(chooser)
    chooser.look.gallery.focus = 3
    assert chooser.look.scatter.focus == 3
    chooser.look.k.value = 4
    picks["most helpful"].click()
    scores = chooser.effects[:, 3]
    helpful = set(chooser.selection.indices.tolist())
    assert len(helpful) == 4
    assert 3 not in helpful
    rest = np.setdiff1d(np.arange(120), [*helpful, 3])
    assert scores[list(helpful)].min() >= scores[rest].max()
    chooser.selection.clear()
    picks["most harmful"].click()
    assert scores[chooser.selection.indices].max() < 0
    chooser.selection.clear()
    picks["nearest"].click()
    assert 3 in chooser.selection.indices
    picks["random"].click()
    assert len(chooser.selection) == 8


def test_what_each_point_does_is_its_effect_alone(tiny, chooser):
    effects = single_effects(tiny)
    assert effects.shape == (120, 160)
    alone = metrics.right_logits(tiny.attributor().effect([7]), tiny.data.y)
    np.testing.assert_allclose(effects[7], -alone, atol=1e-5)
    matrix = effects[:, :120].T.astype(float)  # row j: how all points act on the margin of point j
    first = np.linalg.svd(matrix - matrix.mean(0))[2][0]
    assert abs(first @ loadings(effects[:, :120])[:, 0]) == pytest.approx(1, abs=1e-4)
    np.testing.assert_array_equal(chooser.known["PC 1"][:120], loadings(effects[:, :120])[:, 0])


def test_finds_start_with_what_is_odd(tiny):
    features = np.array([[0.0], [0.1], [5.0], [5.0], [90.0], [5.2]])
    nearest, apart = distances(features, 5)
    assert nearest.argsort(kind="stable")[:2].tolist() == [2, 3], "duplicates"
    assert nearest[5] == pytest.approx(0.2), "a validation point, to the nearest training point"
    assert apart[:5].argmax() == 4, "an outlier"


def test_a_wrong_label_is_found_from_models_that_have_not_seen_it(tiny, tmp_path):
    y = tiny.data.y_train.copy()
    wrong = np.array([3, 30, 77])
    y[wrong] = (y[wrong] + 5) % 10
    path = tmp_path / "wrong.npz"
    np.savez(path, x_train=tiny.data.x_train, y_train=y, x_val=tiny.data.x_val, y_val=tiny.data.y_val)
    found = Chooser(
        Study(
            TINY | {"data": {"name": str(path), "n_train": 120, "n_val": 40}}, runs=tmp_path / "runs", progress=silent
        ),
        trust=False,
    )
    found.look.sort.label = "likely mislabelled first"
    assert set(np.frombuffer(found.look.gallery.order, np.int32)[:6]) >= set(wrong)


def test_a_chooser_asks_for_no_thousands_of_subset_models(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the subset models of ridge were asked for")

    for name in ("subsets", "held_out", "loadings", "forget_sets", "tuning_sets"):
        monkeypatch.setattr(Study, name, never)
    made = Chooser(Study(TINY, runs=tmp_path / "runs", progress=silent))
    made.selection.add([1, 2])
    made.refresh()
    assert made.preview.size == 2
    assert len(made.measured) == 4


def test_saved_sets_are_those_of_code(chooser):
    chooser.selection.replace([3, 14, 15])
    chooser.saving.name.value = "by_eye"
    assert chooser.saving.save()
    loaded = forget_sets.load(chooser.saving.saved, chooser.study.data)
    assert loaded.indices.tolist() == [3, 14, 15]
    assert loaded.made_by == {"kind": "chosen", "preset": "tiny"}
    assert "--stage 04 --forget-set" in chooser.saving.command.value
    again = Study(chooser.study.directory / "preset.yaml", forget_set=chooser.saving.saved, runs=chooser.study.runs)
    assert list(again.forget_sets()) == ["by_eye"], "the command's preset is the study's"
    assert again.preset == chooser.study.preset


def test_the_command_works_wherever_it_is_pasted(chooser, tmp_path, monkeypatch):
    chooser.selection.replace([3, 14, 15])
    chooser.saving.name.value = "pasted"
    chooser.saving.save()
    command = html.unescape(re.search("<code>(.*?)</code>", chooser.saving.command.value)[1])
    program, *arguments = shlex.split(command)
    assert shutil.which(program), "a program that the shell finds"
    given = []
    monkeypatch.setattr("dmmlib.app.batch.run", lambda notebooks, out, parameters, *_, **__: given.append(parameters))
    monkeypatch.chdir(tmp_path)
    arguments = arguments[arguments.index("run") :]
    told = CliRunner().invoke(cli.app, arguments)
    assert told.exit_code == 0, told.output
    assert Path(given[0]["forget_set"]) == chooser.saving.saved.resolve()
    assert str(chooser.study.runs) in told.output
    assert not list(tmp_path.glob("runs")), "nothing is begun in the folder where it was pasted"


def saved(chooser):
    return forget_sets.load(chooser.saving.saved, chooser.study.data).indices.tolist()


def test_another_set_is_overwritten_only_when_told_to(chooser):
    chooser.selection.replace([1, 2])
    chooser.saving.name.value = "mine"
    assert chooser.saving.save() == chooser.saving.save(), "the same set again is no question"
    chooser.selection.replace([5])
    chooser.saving.button.click()
    assert "another forget set &#x27;mine&#x27; already; overwrite it?" in said(chooser)
    assert chooser.saving.confirm.layout.display == ""
    chooser.saving.keep.click()
    assert said(chooser) == ""
    assert saved(chooser) == [1, 2]
    with pytest.raises(ForgetSetError, match="overwrite it"):
        chooser.saving.save()
    chooser.saving.overwrite.click()
    assert saved(chooser) == [5]
    assert chooser.saving.confirm.layout.display == "none"
    assert "Saved 1 images" in chooser.saving.command.value
    chooser.selection.replace([6])
    assert chooser.saving.command.value == "", "which was said of another choice"
    chooser.saving.button.click()
    chooser.saving.name.value = "yours"
    assert chooser.saving.confirm.layout.display == "none", "the question was of another name"


@pytest.mark.parametrize(
    ("name", "indices", "message"),
    [
        ("mine", [], "The forget set is empty"),
        ("mine", range(120), "all 120 training points"),
        ("random_6", [1], "a forget set of the preset itself"),
        ("tune", [1], "a forget set of the preset itself"),
        *(
            (name, [1], "is no name for a forget set")
            for name in ("../../evil", "..", "", "a/b", "a\\b", "x" * 51, EVIL)
        ),
    ],
)
def test_what_cannot_be_saved_is_said_and_stays_chosen(chooser, name, indices, message):
    chooser.selection.replace(list(indices))
    chooser.saving.name.value = name
    chooser.saving.button.click()
    assert message in said(chooser)
    assert chooser.saving.saved is None
    assert len(chooser.selection) == len(indices)


def upload(button, contents):
    now = datetime.datetime.now(tz=datetime.UTC)
    button.value = [
        {"name": name, "content": memoryview(content.encode()), "type": "", "size": 1, "last_modified": now}
        for name, content in contents.items()
    ]


def test_paste_and_upload(chooser):
    chooser.look.paste.value = "3, 14, 15"
    chooser.look.include.click()
    assert chooser.selection.indices.tolist() == [3, 14, 15]
    saved = {"name": "x", "indices": [1, 2], "data_sha256": chooser.study.data.sha256}
    upload(chooser.look.upload, {"x.json": json.dumps(saved)})
    assert chooser.selection.indices.tolist() == [1, 2, 3, 14, 15]
    upload(chooser.look.exchange, {"mine.csv": "id,label\n8,1\n9,0\n", "other.txt": "7"})
    assert chooser.selection.indices.tolist() == [7, 8, 9], "as the person says, all files together"
    chooser.look.paste.value = "8, 9"
    chooser.look.replace.click()
    assert chooser.selection.indices.tolist() == [8, 9]
    upload(chooser.look.exchange, {})
    for _ in range(2):
        upload(chooser.look.exchange, {"other.txt": "7"})
        assert chooser.selection.indices.tolist() == [7], "the same file again is heard again"
        chooser.selection.undo()
    say(chooser, kind="dropped", name="dropped", text='{"ids": ["a.png"]}')
    assert "dropped, place 1: &#x27;a.png&#x27; is no training point" in said(chooser)
    assert chooser.selection.indices.tolist() == [8, 9]


def test_all_that_is_shown_and_a_class_of_the_legend(chooser):
    say(chooser, kind="legend", group=3)
    assert chooser.look.label.value == chooser.look.scatter.only == 3
    order = np.frombuffer(chooser.look.gallery.order, np.int32).tolist()
    say(chooser, kind="take", indices=order)
    assert chooser.selection.indices.tolist() == sorted(order)
    say(chooser, kind="undo")
    say(chooser, kind="redo")
    assert len(chooser.selection) == len(order)
    say(chooser, kind="legend", group=3)
    assert chooser.look.label.value == -1
    chooser.look.part.value = "chosen"
    assert np.frombuffer(chooser.look.scatter.shown, np.uint8).nonzero()[0].tolist() == sorted(order)


def test_the_colour_of_what_is_chosen_is_no_classs(chooser):
    styles = Path(views.__file__).with_name("widgets.css").read_text()
    (chosen,) = re.findall(r"--dmm-chosen: var\(--jp-ui-font-color1, (#\w+)\)", styles)
    assert chosen not in chooser.look.scatter.colours


def test_bad_indices_and_foreign_sets_are_said_in_the_widget(chooser):
    chooser.selection.replace([1])
    chooser.look.paste.value = "5, 4000"
    chooser.look.include.click()
    assert "4000&#x27; is no training point" in said(chooser)
    say(chooser, kind="toggle", index=130)
    assert "130 is no training image" in said(chooser)
    path = chooser.study.directory / "forget_sets" / "foreign.json"
    forget_sets.ForgetSet("foreign", np.array([1]), {}, "0" * 64).save(path)
    upload(chooser.look.upload, {"foreign.json": path.read_text()})
    assert "foreign.json was made for data 000000000000" in said(chooser)
    upload(chooser.look.upload, {EVIL: '{"indices": [[1], [2, 3]]}'})
    assert "[1] among its indices" in said(chooser)
    assert EVIL not in said(chooser)
    assert chooser.selection.indices.tolist() == [1]
    chooser.saving.name.value = "foreign"
    with pytest.raises(ForgetSetError, match="overwrite it"):
        chooser.saving.save()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ForgetSetError, match="overwrite it"):
        chooser.saving.save()


def test_two_widgets_at_once_do_not_mix(chooser):
    other = Chooser(chooser.study, trust=False)
    say(chooser, kind="toggle", index=1)
    say(other, kind="toggle", index=2)
    assert chooser.selection.indices.tolist() == [1]
    assert other.selection.indices.tolist() == [2]
    assert chooser.saving.save()
    with pytest.raises(ForgetSetError, match="another forget set"):  # what the other has saved meanwhile
        other.saving.save()
    assert saved(chooser) == [1]


def test_a_directory_that_cannot_be_written_is_said(chooser, monkeypatch):
    chooser.selection.replace([1, 2])
    kept = chooser.saving.save().read_bytes()

    def read_only(*args, **kwargs):  # as root, who may write anywhere, no mode would do
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", read_only)
    chooser.selection.replace([3])
    chooser.saving.button.click()
    chooser.saving.overwrite.click()
    assert "cannot be written (Permission denied)" in said(chooser)
    assert chooser.saving.saved.read_bytes() == kept
    assert chooser.selection.indices.tolist() == [3]


# --- what comes from data --------------------------------------------------------------------------------


def test_no_text_from_data_becomes_markup(tiny, shared, monkeypatch):
    for study in (tiny, shared):
        data = dataclasses.replace(study.data, class_names=(EVIL, *study.data.class_names[1:]))
        monkeypatch.setattr(study, "data", data)
    of_class = int(np.flatnonzero(data.y_train == 0)[0])
    chooser = Chooser(shared, forget_sets.make("start", [of_class], data), trust=False)
    chooser.look.gallery.focus = of_class
    shown = [html_of(chooser)]
    chooser.look.paste.value = EVIL
    chooser.look.include.click()
    shown.append(html_of(chooser))
    chooser.saving.name.value = EVIL
    chooser.saving.button.click()
    shown.append(html_of(chooser))
    monkeypatch.setattr(plots, "label", lambda method: EVIL)
    shown.append(html_of(Results(tiny, tiny.forget_sets()["random_6"])))
    for markup in shown:
        assert "&lt;img src=x onerror=alert(1)&gt;" in markup
        assert EVIL not in markup


def test_every_class_of_three_hundred_has_a_colour_of_its_own(tiny):
    names = tuple(f"class {c}" for c in range(300))
    labels = np.arange(600) % 300
    data = dataclasses.replace(tiny.data, x_train=np.zeros((600, 8, 8, 1), np.uint8), y_train=labels, class_names=names)
    scatter = Scatter(data, lambda point: ("", ""))
    assert np.frombuffer(scatter.groups, np.int32).tolist() == labels.tolist()
    assert len(scatter.names) == len(set(scatter.colours)) == 300
    source = Path(views.__file__).with_name("widgets.js").read_text()
    assert 'typed(model.get("groups"), Int32Array)' in source, "and the browser reads them as they are sent"


def test_predicted_and_actual_stand_side_by_side(tiny, chooser):
    f = tiny.forget_sets()["random_6"]
    oracles, right = tiny.reference(f)
    chooser.selection.replace(f.indices)
    chooser.refresh()
    shown = chooser.consequences.outcome.value
    assert "retrained" in shown
    assert f"<td>{right[:, f.indices].mean():.1%}</td>" in shown
    assert f"<td>{oracles[:, f.indices].mean():.2f}</td>" in shown
    chooser.selection.toggle(int(f.indices[0]))
    chooser.refresh()
    assert "retrained" not in chooser.consequences.outcome.value


def test_a_still_picture_stands_in_for_the_widget(chooser):
    chooser.selection.replace([1, 2, 3])
    bundle, _ = MimeBundleFormatter()(chooser)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["image/png"].startswith("iVBOR")
    assert len(bundle["image/png"]) > 20_000
    assert chooser.preview.size == 3, "of what is chosen now"


def test_results_lead_from_a_number_to_its_image(tiny):
    f = tiny.forget_sets()["random_6"]
    tiny.results()
    results = Results(tiny, f)
    expected = metrics.klom(tiny.unlearned("dmm", f).margins, tiny.reference(f)[0])
    assert results.ranked().tolist() == f.indices[np.argsort(-expected[f.indices], kind="stable")].tolist()
    assert results.gallery.focus == results.ranked()[0]
    sent = np.split(np.frombuffer(results.histograms.values, np.float32), np.cumsum(results.histograms.counts)[:-1])
    point = results.gallery.focus
    np.testing.assert_allclose(sent[0], tiny.reference(f)[0][:, point], rtol=1e-6)
    dmm = 1 + results.histograms.names.index("DMM")
    np.testing.assert_allclose(sent[dmm], tiny.unlearned("dmm", f).margins[:, point], rtol=1e-6)
    order = ["do nothing", *(plots.label(m) for m in tiny.preset.unlearning.methods[2:])]
    assert results.histograms.names == order, "in the preset's order, wherever one clicks"
    assert [name for name, _ in results.histograms.way] == ["original", "retrained", "predicted", "DMM"]
    assert [k for _, k in results.histograms.way] == [1, 0, 1 + order.index("DM-direct"), dmm]
    results.split.value = "validation"
    assert np.frombuffer(results.gallery.order, np.int32).min() >= 120
    assert results.histograms.names == order
    assert results.gallery.focus != point
    assert f"#{results.gallery.focus} " in results.title.value
    assert "DMM" in results.histograms.label


# --- from eye to batch -----------------------------------------------------------------------------------


def test_a_users_own_set_gets_its_oracles_once_alone_and_beside(chooser, monkeypatch):
    chooser.selection.replace([2, 7, 11, 13])
    chooser.saving.name.value = "mine"
    places = {"forget_set": chooser.saving.save(), "runs": chooser.study.runs, "progress": silent}
    alone = Study(TINY, **places)
    first = alone.reference(alone.forget_sets()["mine"])[0]

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("dmmlib.ensemble.train_and", never)
    beside = Study(TINY, beside=True, **places)
    assert list(beside.forget_sets()) == ["random_6", "pc1", "mine"]
    np.testing.assert_array_equal(beside.reference(beside.forget_sets()["mine"])[0], first)
    assert alone.output != beside.output != beside.directory, "neither writes over the preset's own tables"
    chooser.refresh()
    assert "retrained" in chooser.consequences.outcome.value, "and the widget shows them"


def test_beside_needs_a_name_of_its_own(tiny, tmp_path):
    path = tmp_path / "random_6.json"
    forget_sets.make("random_6", [1, 2], tiny.data).save(path)
    with pytest.raises(ForgetSetError, match="save yours under another name"):
        Study(TINY, forget_set=path, beside=True, runs=tmp_path / "runs")


def wait(trial, until=lambda: False):
    deadline = time.monotonic() + PATIENCE
    while trial.button.disabled and not until() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put a shell script in the place of the command, which would train."""

    def replace(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(path))

    return replace


def test_a_run_that_fails_says_why(shared, tmp_path, command):
    command('echo reading; echo "<b> cannot be read: $8"; exit 2')
    message, ended = Message(), []
    trial = Trial(shared, message, lambda: tmp_path / "missing.json", lambda: ended.append(True))
    trial.run()
    wait(trial)
    assert re.search(r"The run failed: &lt;b&gt; cannot be read: .*missing\.json", message.value)
    assert not ended
    assert not trial.button.disabled


def test_a_trial_says_its_price_before_it_runs(tiny, tmp_path):
    study = own(tiny, tmp_path)
    smoke = presets.load("smoke", {f"data.{key}": value for key, value in TINY["data"].items()})

    def price():
        return Trial(study, Message(), lambda: tmp_path / "mine.json", lambda: None).price.value

    assert "Trains 40 small models, the first time 80 more: 189,000 sample gradients in all" in price()
    asked = presets.load(smoke.model_dump(), {"unlearning.methods": cli.REQUEST})
    mine = [forget_sets.make("mine", [1, 2, 3], study.data)]
    jobs = [job for job, _ in plan._asked(asked, study.data, mine, False, {"04"})]
    assert sum(job.n_models for job in jobs) == 120
    assert sum(15 * job.n_models * job.size for job in jobs) == pytest.approx(189_000, rel=0.02), "as a dry run counts"
    record = study.runs / smoke.name / "forget_set-mine" / "notebooks" / ".04_dmm_versus_baselines.json"
    write_json(record, {"seconds": 26.2})
    assert "Trains 40 small models and unlearns with them: about 26 s, as before" in price()
    record.write_text("{")
    assert "sample gradients" in price(), "a record that cannot be read tells nothing"


@pytest.mark.slow
def test_a_run_on_the_smoke_preset_can_be_cancelled(chooser):
    trial = chooser.trial
    chooser.selection.replace([1, 2, 3])
    trial.run()
    assert trial.progress.layout.display == ""
    wait(trial, until=lambda: ": " in trial.line.value)
    assert ": " in trial.line.value, f"progress is shown: {said(chooser)}"
    with pytest.raises(DmmError, match="run is under way"):
        trial.run()
    trial.cancel.click()
    wait(trial)
    assert not trial.button.disabled
    assert "Cancelled" in trial.outcome.value
    assert trial.progress.layout.display == "none"
    assert chooser.saving.saved.exists()


def test_a_run_that_ends_well_shows_every_method(tiny, tmp_path, command):
    study = own(tiny, tmp_path)
    command("exit 0")
    name = presets.load("smoke", {f"data.{key}": value for key, value in TINY["data"].items()}).name
    path = study.runs / name / "forget_set-mine" / "results.csv"
    path.parent.mkdir(parents=True)
    mine = forget_sets.make("mine", tiny.forget_sets()["random_6"].indices, tiny.data)
    mine.save(tmp_path / "mine.json")
    results = tiny.results().query("forget_set == 'random_6'").assign(forget_set="mine")
    results.to_csv(path, index=False)
    heard, message = [], Message()
    trial = Trial(study, message, lambda: tmp_path / "mine.json", lambda: heard.append("ended"))
    trial.run()
    assert trial.price.value == "", "progress stands in its place"
    wait(trial)
    assert "Trains 40 small models" in trial.price.value
    assert message.value == ""
    assert heard == ["ended"]
    shown = html.unescape(trial.outcome.value)
    assert shown.index(verdict.judge(results, "mine").headline) < shown.index("<table"), "a verdict, then numbers"
    assert "N = 8 small models" in shown
    assert np.frombuffer(trial.images.order, np.int32).tolist() == mine.indices.tolist()
    rows = re.findall("<th>(.*?)</th>\n      <td>([0-9.]+)", shown)
    assert {name for name, _ in rows} == {plots.label(m) for m in study.methods}
    values = [float(value) for _, value in rows]
    assert values == sorted(values), "best first"
