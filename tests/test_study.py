"""A study computes once, resumes, keeps what is done, and refuses what makes no sense."""

import functools
import json
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from dmmlib import (
    attribution,
    data,
    datamodels,
    execution,
    forget_sets,
    keys,
    models,
    presets,
    progress,
    registry,
    unlearn,
)
from dmmlib.app.status import trained
from dmmlib.errors import (
    DataError,
    DeviceError,
    DmmError,
    ForgetSetError,
    MethodError,
    OptionError,
    PresetError,
    StoreError,
)
from dmmlib.files import read_arrays, read_json, write_arrays
from dmmlib.progress import Reporter, describe, silent
from dmmlib.study import Study
from dmmlib.trainer import Trainer
from dmmlib.zoo import architectures
from tests.conftest import TINY, damages


def study(tmp_path, overrides=None, **kwargs):
    return Study(TINY, overrides, runs=tmp_path / "runs", figures=tmp_path / "figures", progress=silent, **kwargs)


def test_results_are_complete_and_tidy(tiny):
    table = tiny.results()
    methods, sets = set(tiny.preset.unlearning.methods), {"random_6", "pc1"}
    assert set(table["method"]) == methods
    assert set(table["forget_set"]) == sets
    per_pair = 3 * (2 + 3 + 2 + 1) + 1  # splits x (KLoM, gap and KS, accuracy and its gap, U-LiRA), and the cost
    assert len(table) == len(methods) * len(sets) * per_pair
    assert not table.duplicated(["forget_set", "method", "split", "statistic"]).any()
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    cost = table[table["statistic"] == "cost"].groupby("method")["value"].mean()
    assert cost["do_nothing"] == 0
    assert cost["retrain"] == 1


def test_everything_is_computed_once(tiny, monkeypatch):
    first = tiny.results()

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("dmmlib.ensemble.train_and", never)
    again = Study(TINY, runs=tiny.runs, figures=tiny.figures, progress=silent)
    assert again.results().equals(first)


def test_tuning_sets_share_no_point_with_reported_ones(tiny):
    reported = np.concatenate([f.indices for f in tiny.forget_sets().values()])
    for tuning in tiny.tuning_sets().values():
        assert len(np.intersect1d(tuning.indices, reported)) == 0


def test_hyperparameters_are_searched_with_one_budget_and_kept(tiny):
    for method in ("gd", "ga", "ga_gd", "scrub"):
        table = tiny.search(method)
        assert table["setting"].nunique() == tiny.preset.tuning.budget
        best, stop = table.groupby(["setting", "stop"])["score"].mean().idxmin()
        assert {"stop": 1.0} | tiny.tuned(method) == unlearn.configurations(method, 2, 0)[best] | {"stop": stop}


def test_settings_that_a_preset_gives_are_not_searched(tmp_path):
    given = {"gd": {"epochs": 1.0, "lr": 0.05}, "dmm": {"cost": 0.2}}
    own = study(tmp_path, {"unlearning.settings": given})
    assert [own.tuned(method) for method in given] == list(given.values())
    assert not list((tmp_path / "runs" / "store").glob("search-*"))
    for wrong in ({"gd": {"rate": 1}}, {"dmm": {"lr": 1}}):
        with pytest.raises(OptionError, match=r"use its own: (epochs, lr|cost, steps, farthest)"):
            study(tmp_path, {"unlearning.settings": wrong})


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("bayesian", "n_models", "many", "a valid integer"),
        ("bayesian", "n_models", 0, "greater than 0"),
        ("bayesian", "n_models", True, "a valid integer"),
        ("bayesian", "delta", 2.0, "less than or equal to 1"),
        ("linearised", "lam", "1", "a valid number"),
        ("kernel", "project", 0.5, "a valid integer"),
        ("trak", "regularization", -1, "greater than or equal to 0"),
        ("lasso", "shares", "half", "not allowed as a Sequence"),
    ],
)
def test_options_of_attributors_are_of_their_kind(tmp_path, name, option, value, expected):
    with pytest.raises(OptionError, match=rf"Option {option}=.* of attributor '{name}' was given; .*{expected}"):
        study(tmp_path, {"attribution.name": name, "attribution.options": {option: value}})


def test_what_is_no_forget_set_of_these_data_is_refused_before_training(tmp_path):
    own = study(tmp_path)
    other = forget_sets.ForgetSet("other", np.array([1]), data_sha256="0" * 64)
    outside = forget_sets.ForgetSet("outside", np.array([own.data.n_train]))
    for wrong, message in (
        ([1, 2], "is no forget set; make one by forget_sets.make"),
        (None, "is no forget set; make one by forget_sets.make"),
        (other, "was made for data 0000"),
    ):
        for ask in (own.problem, own.oracles, own.reference, own.splits, own.untrained_oracles):
            with pytest.raises(ForgetSetError, match=message):
                ask(wrong)
        for ask in (own.unlearned, own.evaluate):
            with pytest.raises(ForgetSetError, match=message):
                ask("gd", wrong)
    with pytest.raises(ForgetSetError, match="outside the training set"):
        own.oracles(outside)
    assert not list((tmp_path / "runs").rglob("*.npz"))


def test_a_set_of_ones_own_that_settings_are_chosen_on_is_told(tmp_path):
    first = next(iter(study(tmp_path).tuning_sets().values()))
    forget_sets.make("mine", first.indices, study(tmp_path).data).save(tmp_path / "mine.json")
    own = study(tmp_path, forget_set=tmp_path / "mine.json")
    with pytest.warns(UserWarning, match=f"'mine' holds 100% of '{first.name}', on which hyperparameters are chosen"):
        own.tuning_sets()


def test_what_is_kept_stays_where_it_was_when_the_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Study(TINY, runs="runs", figures="figures", progress=silent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert own.save_table(pd.DataFrame({"a": [1]}), "a.csv") == tmp_path / "runs" / own.preset.name / "a.csv"
    assert own.root == (tmp_path / "runs" / "store").as_posix()
    assert own.figures == tmp_path / "figures"
    with pytest.raises(StoreError, match="address as `store`"):
        Study(TINY, runs="memory://runs")


def test_tables_and_figures_stay_in_their_folder(tiny):
    for name in ("../evil", "/evil", "a/../../evil"):
        with pytest.raises(StoreError, match=r"leads out of .* name of a file in it"):
            tiny.save_table(pd.DataFrame({"a": [1]}), name)
        with pytest.raises(StoreError, match="leads out of"):
            tiny.save_figure(None, name)


def test_beside_needs_a_forget_set(tmp_path):
    with pytest.raises(ForgetSetError, match="without a forget set to study; give its file as forget_set"):
        study(tmp_path, beside=True)


@pytest.mark.parametrize(
    ("method", "wrong", "words"),
    [
        *(("gd", {"whitened": value}, "a valid boolean") for value in ("no", 1)),
        *(("gd", {"lr": lr}, "greater than 0") for lr in (-1, 0)),
        *(("gd", {"lr": lr}, "a valid number") for lr in (True, [0.1], "x", None)),
        ("gd", {"lr": float("inf")}, "a finite number"),
        *(("gd", {"epochs": n}, "greater than 0") for n in (-1, 0)),
        *(("gd", {"epochs": n}, "less than or equal to 1000") for n in (1e12, 1001)),
        ("gd", {"epochs": 10**400}, "a valid number"),
        *(("gd", {"batch_size": n}, "greater than 0") for n in (0, -1)),
        *(("gd", {"batch_size": n}, "a valid integer") for n in (2.5, True)),
        *(("dmm", {"cost": cost}, "greater than 0|less than or equal to 1000") for cost in (0, -1, 1e9)),
        *(("dmm", {"cost": cost}, "a valid number") for cost in ("x", None)),
        ("scrub", {"max_epochs": 2.5}, "a valid integer"),
        ("bad_teacher", {"retain_share": 1.5}, "less than or equal to 1"),
        ("newton", {"iterations": 10**9}, "less than or equal to 1000"),
        ("dmm_adam", {"ratio": "1:4"}, "'1:3' or '5:20'"),
        ("oracle_matching", {"targets": "moved"}, "'shifted' or 'oracle'"),
        ("oracle_matching", {"n_oracles": 0}, "greater than 0"),
    ],
)
def test_options_that_a_method_cannot_take_are_refused_before_training(method, wrong, words):
    with pytest.raises(OptionError, match=f"Option {next(iter(wrong))}=.* of method '{method}' was given; .*({words})"):
        unlearn.check_setting(method, wrong)


def test_every_setting_of_a_grid_of_a_preset_and_of_a_users_method_is_allowed():
    for method in unlearn.names():
        for setting in unlearn.configurations(method):
            unlearn.check_setting(method, setting)
    for preset in presets.names():
        for method, setting in presets.load(preset).unlearning.settings.items():
            unlearn.check_setting(method, setting)
    unlearn.check_setting("oracle_matching", {"n_oracles": None, "targets": "oracle"})

    @unlearn.register("own kinds", {"rate": [0.1, 1]})
    def own(problem, *, rate, layers=1, shift=0.0, kind="a", sizes=(1, 2), log=False):
        raise NotImplementedError

    try:
        other = {"rate": "auto", "layers": [1, 2], "shift": -1, "kind": "b", "sizes": {"a": 1}, "log": True}
        unlearn.check_setting("own kinds", other)
        with pytest.raises(OptionError, match=r"log='no' .*a valid boolean"):
            unlearn.check_setting("own kinds", {"rate": 1, "log": "no"})
    finally:
        unlearn.METHODS.remove("own kinds")


def test_models_that_diverge_on_a_reported_set_count_as_answering_all_alike(tmp_path):
    often = list[str]()

    @unlearn.register("wild", {"lr": [0.1, 0.2]})
    def wild(problem, *, lr):
        logits = problem.original_logits.copy()
        logits[1:2] = np.nan if often else logits[1:2]
        return unlearn.Unlearned.from_logits(logits, np.asarray(problem.y), 0.1)

    try:
        own = study(tmp_path, {"unlearning.methods": ["do_nothing", "wild"]})
        assert own.tuned("wild") in ({"lr": 0.1}, {"lr": 0.2})
        often.append("on reported sets")
        f = own.forget_sets()["random_6"]
        for _ in ("made", "read"):
            with pytest.warns(UserWarning, match=r"1 of 8 models diverged by wild with .* answering all classes alike"):
                found = own.unlearned("wild", f)
        assert not found.correct[1].any()
        np.testing.assert_allclose(found.margins[1], -np.log(own.data.n_classes - 1))
        np.testing.assert_array_equal(found.margins[2:], own.unlearned("do_nothing", f).margins[2:])
        given = study(tmp_path / "given", {"unlearning.settings": {"wild": {"lr": 0.1}}})
        with pytest.raises(MethodError, match="gave NaN margins on 'random_6'; lower its rate"):
            given.unlearned("wild", f)
    finally:
        unlearn.METHODS.remove("wild")


def test_matching_has_nothing_to_search(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "search", lambda method: pytest.fail("searched"))
    assert tiny.tuned("dmm") == tiny.tuned("oracle_matching") == {"cost": 0.03}


def test_what_compiles_nothing_does_not_import_the_compiler(tmp_path):
    """Its import is a quarter of the time in which a process has a study (docs/speed.md)."""
    settings = {"device": "cpu", "unlearning.methods": list(presets.load("quick").unlearning.methods)}
    script = (
        "import sys\nfrom dmmlib.study import Study\nfrom dmmlib.progress import silent\n"
        f"Study({TINY}, {settings}, runs={str(tmp_path)!r}, progress=silent).results()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.stdout == "False\n", said.stderr


def test_originals_oracles_and_floor_are_independent(tiny):
    f = tiny.forget_sets()["random_6"]
    outputs = [tiny.original_logits(), tiny.oracles(f), tiny.oracles(f, floor=True), tiny.subsets()[1][:8]]
    for i in range(4):
        for j in range(i):
            assert np.abs(outputs[i] - outputs[j]).max() > 1e-2
    streams = ["originals", "oracles:a:1", "floor:a:1", "subsets"]
    assert len({tuple(tiny.seeds(s, 3)) for s in streams}) == 4
    assert tiny.seeds("originals", 5)[:3] == tiny.seeds("originals", 3)


def test_interrupted_training_goes_on_where_it_was(tmp_path, monkeypatch, tiny):
    other, expected = study(tmp_path), tiny.subsets()[1][:]
    train, calls = models_train(monkeypatch)

    def dies_at_the_third(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr("dmmlib.ensemble.train_and", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        _ = other.subsets()
    monkeypatch.setattr("dmmlib.ensemble.train_and", train)
    again = study(tmp_path)
    np.testing.assert_allclose(again.subsets()[1], expected, atol=1e-5)
    assert len(calls) == 5, "five shards of twenty, none twice"


def test_how_to_train_is_measured_once_and_kept(tmp_path, monkeypatch):
    one = study(tmp_path, {"ensembles.chunk": "auto"})
    assert one.execution() in execution.candidates(one.device, compile=False), "too few steps for compilation to pay"
    (kept,) = (tmp_path / "runs" / "store").glob("execution-*.json")
    rates = {row["chunk"]: row["model_steps_per_second"] for row in read_json(kept)}
    assert one.execution().chunk == max(rates, key=rates.get)

    def never(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(execution, "measure", never)
    assert study(tmp_path, {"ensembles.chunk": "auto"}).execution() == one.execution()
    assert study(tmp_path, {"ensembles.chunk": 3}).execution().chunk == 3


def test_one_class_more_that_no_point_has_is_another_model():
    d, preset = data.load("digits", 40, 10), presets.load("smoke")
    few = np.flatnonzero(d.y_train < 3)

    def key(*names):
        named = data.from_arrays(d.x_train[few], d.y_train[few], d.x_train[few], d.y_train[few], class_names=names)
        return keys.trained(preset, named)

    assert key("a", "b", "c") == key("x", "y", "z") != key("a", "b", "c", "d")


def test_images_as_bytes_give_the_same_models(tmp_path, monkeypatch):
    """As on a GPU, where they are normalised in the step."""
    answers = []
    for as_bytes in (False, True):
        monkeypatch.setattr(Trainer, "_bytes", as_bytes)
        one = study(tmp_path / str(as_bytes), {"model.name": "convnet"})
        assert str(one.x.dtype) == ("torch.uint8" if as_bytes else "torch.float32")
        gd = unlearn.get("gd")(one.problem(one.tuning_sets()["tune"], "gd", tuning=True))
        answers += [(one.original_logits(), gd.margins)]
    for prepared, from_bytes in zip(*answers, strict=True):
        np.testing.assert_allclose(from_bytes, prepared, atol=1e-4)


def test_processes_train_the_same_study(tmp_path, tiny):
    one = study(tmp_path)
    one.__dict__["_once_execution"] = execution.Execution(4, 2, processes=True)
    np.testing.assert_allclose(one.subsets()[1], tiny.subsets()[1], atol=1e-5)
    for method in ("gd", "scrub", "dmm"):
        results = [unlearn.get(method)(s.problem(s.forget_sets()["random_6"], method)) for s in (one, tiny)]
        np.testing.assert_allclose(results[0].margins, results[1].margins, atol=1e-4)
        np.testing.assert_allclose(results[0].trajectory, results[1].trajectory, atol=1e-4)


def test_compilation_that_cannot_be_had_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "can_compile", lambda device: False)
    with pytest.raises(DeviceError, match=r"torch.compile does not work here .* set it to auto or false"):
        _ = study(tmp_path, {"ensembles.compile": True}).execution()
    many = study(tmp_path, {"ensembles.chunk": "auto", "training.epochs": 20_000})
    assert not many.execution().compile, "auto does without"


def models_train(monkeypatch):
    from dmmlib import ensemble

    original, calls = ensemble.train_and, []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    return counted, calls


def test_a_damaged_shard_is_trained_again_and_equals_the_old(tmp_path, tiny):
    one = study(tmp_path)
    before = one.subsets()[1]
    (folder,) = (tmp_path / "runs" / "store").glob("subsets-*.zarr")
    chunk = folder / "logits" / "c" / "2" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"damaged in shards \[2\]"):
        np.testing.assert_allclose(study(tmp_path).subsets()[1], before, atol=1e-5)


def test_a_damaged_result_is_named_and_made_anew(tmp_path, tiny):
    tiny.unlearned("do_nothing", tiny.forget_sets()["random_6"])
    path = next((tiny.runs / "store").glob("unlearned-do_nothing-*.npz"))
    raw = path.read_bytes()
    path.write_bytes(raw[:100])
    with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
        _ = [tiny.unlearned("do_nothing", f) for f in tiny.forget_sets().values()]
    assert path.read_bytes() == raw


def test_a_users_own_forget_set(tmp_path, tiny):
    path = tmp_path / "mine.json"
    forget_sets.make("mine", [1, 2, 3], tiny.data).save(path)
    own = Study(TINY, runs=tiny.runs, figures=tiny.figures, progress=silent, forget_set=path)
    assert list(own.forget_sets()) == ["mine"]
    assert set(own.results()["forget_set"]) == {"mine"}
    with pytest.raises(ForgetSetError, match="was made for data"):
        study(tmp_path, {"data.n_train": 100}, forget_set=path)


def test_a_users_own_method_enters_the_table(tmp_path, tiny):
    @unlearn.register("shrink")
    def shrink(problem):
        return unlearn.Unlearned.from_logits(0.9 * problem.original_logits, problem.labels, cost=0.0)

    try:
        own = Study(TINY, {"unlearning.methods": ["do_nothing", "shrink"]}, runs=tiny.runs, progress=silent)
        assert set(own.results()["method"]) == {"do_nothing", "retrain", "shrink"}, "both ends are always measured"
    finally:
        unlearn.base.METHODS.remove("shrink")


def test_settings_side_by_side_give_the_same_numbers(tmp_path, monkeypatch):
    """In worker processes, one core for each; a method registered here goes along, and what it raises comes back."""

    @unlearn.register("shrink", space={"by": [0.9, 0.8, 0.7]})
    def shrink(problem, *, by=0.9):
        if problem.n_models < least:
            raise MethodError(f"shrink got {problem.n_models} models; give more.")
        return unlearn.Unlearned.from_logits(by * problem.original_logits, problem.labels, cost=0.0)

    least = 1
    try:
        alone = study(tmp_path / "alone")
        expected = [alone.search(method) for method in ("ga_gd", "shrink")]
        monkeypatch.setattr(Study, "side_by_side", lambda self: execution.Execution(1, 2, processes=True))
        for method, table in zip(("ga_gd", "shrink"), expected, strict=True):
            pd.testing.assert_frame_equal(study(tmp_path / "together").search(method), table)
        least = 100
        with pytest.raises(MethodError, match=r"shrink got \d models; give more"):
            study(tmp_path / "failing").search("shrink")
    finally:
        unlearn.base.METHODS.remove("shrink")


def test_what_a_study_lends_is_as_it_was(tmp_path):
    """An attributor and a method that write into what they are given change nothing for the others, or are told."""
    plain = study(tmp_path / "plain", {"unlearning.methods": ["dmm"]}).results()

    @attribution.register("greedy one")
    def greedy(context):
        context.masks[:] = True

    @unlearn.register("greedy two")
    def zero(problem):
        problem.x[:] = 0
        return unlearn.Unlearned.from_logits(problem.original_logits, problem.labels, cost=0.0)

    try:
        own = study(tmp_path / "own", {"unlearning.methods": ["dmm"]})
        own.attributor("greedy one")
        pd.testing.assert_frame_equal(own.results(), plain)
        with pytest.raises(MethodError, match="greedy two changed the points it was given"):
            own.unlearned("greedy two", own.forget_sets()["random_6"])
    finally:
        attribution.ATTRIBUTORS.remove("greedy one")
        unlearn.base.METHODS.remove("greedy two")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"unlearning.methods": ["dmm@"]}, MethodError, "Unknown attributor ''"),
        ({"unlearning.methods": ["forgetmenot"]}, MethodError, "Unknown method 'forgetmenot'"),
        ({"model.name": "vgg"}, MethodError, "Unknown model 'vgg'"),
        ({"data.name": "imagenet"}, MethodError, "Unknown data set 'imagenet'"),
        ({"data.n_train": 5000}, DataError, "n_train=5000 was asked of 'digits', which has 1297"),
        ({"forget_sets": [{"name": "all", "kind": "random", "size": 120}]}, ForgetSetError, "120 of 120"),
        (
            {"forget_sets": [{"name": name, "kind": "random", "size": 58} for name in "ab"]},
            ForgetSetError,
            "share no point, but ask for 122 of 120 points",
        ),
        ({"forget_sets": [{"name": "tune", "kind": "random", "size": 2}]}, PresetError, "two forget sets alike"),
        ({"forget_sets": [{"name": "Tune", "kind": "random", "size": 2}]}, PresetError, "two forget sets alike"),
        ({"tuning.n_models": 9}, PresetError, "tuning.n_models=9 is more than ensembles.n_models=8"),
    ],
)
def test_mistakes_are_said_before_any_training(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        study(tmp_path, overrides)
    assert not (tmp_path / "runs").exists()


def test_forget_sets_can_take_all_points_between_them(tmp_path):
    halves = [{"name": name, "kind": "random", "size": 57} for name in "ab"]  # and 6 for tuning
    tiny = study(tmp_path, {"forget_sets": halves})
    every = [i for sets in (tiny.forget_sets(), tiny.tuning_sets()) for f in sets.values() for i in f.indices]
    assert sorted(every) == list(range(120))


def test_diverging_training_is_said_and_leaves_earlier_work(tmp_path):
    with pytest.raises(StoreError, match=r"diverged .*lower training\.lr"):
        _ = study(tmp_path, {"training.lr": 1e30}).original_logits()


def test_figures_and_tables_go_where_they_should(tmp_path, tiny):
    from matplotlib import pyplot as plt

    figure = plt.figure()
    image = tiny.show(figure, "empty")
    assert (tiny.figures / "tiny" / "empty.png").read_bytes() == image.data
    assert not plt.fignum_exists(figure.number)


def test_progress_reports():
    assert describe("train", 0, 10, 0.0) == "train: 0 / 10"
    assert describe("train", 5, 10, 10.0) == "train: 5 / 10 · 0.5/s · 10 s left"
    assert describe("train", 5, 10, 4.0, since=3) == "train: 5 / 10 · 0.5/s · 10 s left"
    assert describe("train", 4200, 4200, 240.0) == "train: 4,200 in 4 min"


def test_work_is_told_of_and_idleness_is_not(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.3)
    monkeypatch.setattr(progress, "EVERY", 0.7)
    library = {"__name__": "dmmlib.a_study", "time": time}
    exec("def measure(): time.sleep(2.5)", library)
    reporter, begun = Reporter(), time.monotonic()
    reporter("train", 0, 9)
    library["measure"]()
    reporter("train", 9, 9)
    half = time.monotonic()
    library["measure"]()
    first, second = half - begun, time.monotonic() - half  # 2.5 s each, or more on a busy machine
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= int(re.fullmatch(r"train: 0 / 9 · (\d+) s so far", lines[1])[1]) <= first + 0.5
    (done,) = (line for line in lines if line.startswith("train: 9 in"))
    assert int(re.fullmatch(r"train: 9 in (\d+) s", done)[1]) == pytest.approx(first, abs=1)
    assert 1 <= int(re.fullmatch(r"a_study.measure: (\d+) s so far", lines[-1])[1]) <= second + 0.5
    assert 5 <= len(lines) <= 4 + first + second
    time.sleep(1.5)
    assert capsys.readouterr().err == "", "nothing of the library is at work"


def test_progress_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DMM_PROGRESS_FILE", str(tmp_path / "p.json"))
    Reporter()("train", 3, 3)
    assert '"done": 3' in (tmp_path / "p.json").read_text()
    monkeypatch.setenv("DMM_PROGRESS_FILE", str(tmp_path / "gone" / "p.json"))
    Reporter()("train", 3, 3)  # it works on, untold


def test_a_task_that_ended_by_an_exception_is_not_told_of_again(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.3)
    library = {"__name__": "dmmlib.a_study", "time": time}
    exec("def fail(report): report('train', 5, 9); 1 / 0\ndef measure(): time.sleep(2)", library)
    reporter = Reporter()
    with pytest.raises(ZeroDivisionError):
        library["fail"](reporter)
    time.sleep(1.2)  # whoever called it thinks
    capsys.readouterr()
    library["measure"]()
    told = capsys.readouterr().err
    assert "a_study.measure" in told
    assert "train" not in told


def test_names_are_listed():
    assert set(models.MODELS) >= {"linear", "mlp", "convnet", "resnet9"}
    assert set(presets.names()) >= {"smoke", "laptop", "cifar10"}


def public_properties(cls):
    return sorted(
        name
        for name in dir(cls)
        if not name.startswith("_") and isinstance(getattr(cls, name), (property, functools.cached_property))
    )


def test_properties_only_read(tmp_path, monkeypatch):
    """Neither a property of a fresh study nor its status trains, fits or writes anything."""

    def never(*args, **kwargs):
        raise AssertionError("trained, fitted or written")

    fresh = study(tmp_path)
    for target in ("ensemble.train_and", "store.Store.open", "attribution.fit", "datamodels.RidgeDatamodel.fit"):
        monkeypatch.setattr(f"dmmlib.{target}", never)
    names = public_properties(Study)
    assert {"x", "y", "features", "module", "training", "output"} <= set(names)
    for name in names:
        getattr(fresh, name)
    table = trained(fresh, fresh.jobs())
    assert (table["done"] == 0).all()
    assert not list(tmp_path.rglob("*"))


def test_status_counts_what_is_trained_and_what_is_damaged(tmp_path):
    one = study(tmp_path)
    f = one.forget_sets()["random_6"]
    one.oracles(f)
    table = trained(one, one.jobs()).set_index("models")
    assert table.loc["oracles and floor, random_6", ["planned", "done"]].tolist() == [16, 8]
    assert table.loc["subset models", "done"] == 20, "pc1 was weighed by the held-out ones; no datamodel chooses a set"
    assert table.loc["originals", "done"] == 8, "pc1 was chosen by them"
    chunk = next(path for path in (tmp_path / "runs" / "store").glob("oracles-*/logits/c/**/*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-9])
    table = trained(study(tmp_path), one.jobs()).set_index("models")
    assert table.loc["oracles and floor, random_6", ["done", "missing", "damaged"]].tolist() == [0, 8, 8]


def test_a_model_of_ones_own_that_changes_is_trained_anew(tmp_path):
    """It has no version: its structure and what it answers are in the key; edited code behind the factory counts."""

    class Net(torch.nn.Linear):
        scale = 1.0

        def forward(self, x):
            return self.scale * super().forward(x)

    models.register("edited", prepare=models.pooled)(lambda shape, n_classes: Net(shape[0], n_classes))
    try:
        first = study(tmp_path, {"model": {"name": "edited"}}).original_logits()
        again = study(tmp_path, {"model": {"name": "edited"}}).original_logits()
        np.testing.assert_array_equal(first, again)
        assert len(list(tmp_path.glob("runs/store/originals-*.zarr"))) == 1
        Net.scale = 2.0
        edited = study(tmp_path, {"model": {"name": "edited"}}).original_logits()
        assert np.abs(edited - first).max() > 0.1
        assert len(list(tmp_path.glob("runs/store/originals-*.zarr"))) == 2
    finally:
        models.MODELS.remove("edited")


@pytest.mark.parametrize(
    "wrap", [lambda factory: factory, lambda factory: functools.wraps(factory)(lambda *a: factory(*a))]
)
def test_models_of_the_library_under_a_name_of_ones_own_do_not_share_a_store(tmp_path, wrap):
    try:
        for factory in (architectures.linear, architectures.mlp):
            models.register("mine", prepare=models.pooled)(wrap(factory))
            study(tmp_path, {"model": {"name": "mine"}}).original_logits()
    finally:
        models.MODELS.remove("mine")
    assert len(list(tmp_path.glob("runs/store/originals-*.zarr"))) == 2
    names = {"linear", "mlp", "convnet", "resnet9", "resnet18", "digits", "fashion-mnist", "cifar10", "npz", "shapes"}
    for known in (models.MODELS, data.DATASETS):
        assert all(map(known.ours, names.intersection(known))), "a version tells how each of the library's computes"


def test_constants_of_normalisation_are_part_of_the_key(tmp_path):
    digits = data.load("digits")
    arrays = digits.x_train, digits.y_train, digits.x_val, digits.y_val
    logits = []
    try:
        for mean, std in ((0.5, 0.25), (0.1, 5.0)):
            data.register("own")(lambda mean=mean, std=std: data.from_arrays(*arrays, mean=(mean,), std=(std,)))
            logits.append(study(tmp_path, {"data.name": "own"}).original_logits())
    finally:
        data.DATASETS.remove("own")
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_what_a_request_needs_is_kept(tiny, tmp_path, monkeypatch):
    """Neither tuning sets nor the attributor depend on what is asked to be forgotten."""
    tuned = tiny.tuning_sets()["tune"].indices
    forget_sets.make("asked", tuned[:3], tiny.data).save(tmp_path / "asked.json")
    first = {name: tiny.attributor(name).effect(tuned) for name in ("bayesian", "linearised", "kernel")}
    monkeypatch.setattr(attribution, "fit", lambda *a, **k: pytest.fail("fitted again"))
    asked = Study(TINY, runs=tiny.runs, forget_set=tmp_path / "asked.json", progress=silent)
    assert list(asked.forget_sets()) == ["asked"]
    assert np.array_equal(asked.tuning_sets()["tune"].indices, tuned)
    for name, effect in first.items():  # where it lies in memory moves the last bits of what is computed
        kept = asked.attributor(name)
        np.testing.assert_allclose(kept.effect(tuned), effect, atol=1e-3 * np.abs(effect).max())
        assert kept.leverage(tuned) == pytest.approx(tiny.attributor(name).leverage(tuned), rel=1e-3)
    np.testing.assert_allclose(asked.attributor().sd(tuned), tiny.attributor().sd(tuned), rtol=1e-3)


def test_a_damaged_attributor_is_fitted_again(tiny, tmp_path):
    own, effect = study(tmp_path), tiny.attributor("kernel").effect([1])
    size = float(np.abs(effect).max())  # where it lies in memory moves the last bits of what is fitted
    np.testing.assert_allclose(own.attributor("kernel").effect([1]), effect, atol=1e-3 * size)
    (path,) = (tmp_path / "runs" / "store").glob("attributor-kernel-*.npz")
    for _ in damages(path, np.random.default_rng(0), 5):
        again = study(tmp_path)
        np.testing.assert_allclose(again.attributor("kernel").effect([1]), effect, atol=1e-3 * size)
    made = dict(read_arrays(path))
    for of in ("os:system", "dmmlib.attributors.bayesian:fit", "dmmlib.attributors..os:getcwd"):
        write_arrays(path, made | {"tree": np.array(json.dumps({"of": of, "parts": {}}))})
        with pytest.raises((DataError, ImportError)):
            attribution.load(path, own.device)


def test_a_users_attributor_that_cannot_be_kept_is_fitted_anew(tmp_path):
    class Constant(datamodels.Attributor):
        def effects(self, sets):
            return np.ones((len(sets), 160, 10), np.float32)

        def predict(self, masks):
            return np.ones((len(masks), 160, 10), np.float32)

    try:
        attribution.register("constant")(lambda context: Constant())
        assert study(tmp_path).attributor("constant").effect([1]).mean() == 1
        assert not list((tmp_path / "runs" / "store").glob("attributor-*"))
    finally:
        attribution.ATTRIBUTORS.remove("constant")


def test_tuning_sets_of_a_class_share_no_point_with_reported_ones(tmp_path):
    halves = {"kind": "class", "label": 3, "share": 0.4}
    sets = {"forget_sets": [halves | {"name": "reported"}], "tuning.forget_sets": [halves | {"name": "tuning"}]}
    one = study(tmp_path, sets)
    reported, tuning = one.forget_sets()["reported"].indices, one.tuning_sets()["tuning"].indices
    assert len(reported)
    assert len(tuning)
    assert not np.intersect1d(reported, tuning).size
    assert (one.data.y_train[tuning] == 3).all()


def test_ridges_search_is_made_anew_when_what_predicts_oracles_changed(tmp_path, monkeypatch):
    study(tmp_path).search_datamodel()
    monkeypatch.setitem(registry.VERSIONS, "predicted oracle", 99)
    study(tmp_path).search_datamodel()
    assert len(list(tmp_path.glob("runs/store/search-datamodel-*.json"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"forget_sets": [{"name": "a", "kind": "pc", "size": 2, "component": 120}]},
            "component 120; give at most 119",
        ),
        ({"forget_sets": [{"name": "a", "kind": "nearest", "size": 2, "point": 120}]}, "point 120; give at most"),
        ({"forget_sets": [{"name": "a", "kind": "class", "label": 10}]}, "label 10; give at most 9"),
        ({"data.n_train": 5, "forget_sets": [{"name": "a", "kind": "class", "label": 9}]}, "none .*of class 9"),
        ({"datamodels.fraction": 0.001}, "datamodels.fraction=0.001.*none or all"),
        ({"attribution.fraction": 0.999}, "attribution.fraction=0.999.*none or all"),
        ({"attribution.options": {"nothing": 1}}, "Options of attributor 'bayesian'.*nothing"),
        ({"model.options": {"nothing": 1}}, "Options of model 'linear'.*its own: none"),
        ({"data.options": {"nothing": 1}}, "Options of data set 'digits'"),
        ({"unlearning.methods": ["gd", "gd"]}, "names two methods alike"),
        ({"store": "no://where"}, "no://where cannot be reached"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(tmp_path, changes, message):
    fewer = {"tuning.forget_sets": [{"name": "t", "kind": "random", "size": 1}]}
    with pytest.raises(DmmError, match=message):
        Study(TINY, fewer | changes, runs=tmp_path, progress=silent)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path):
    (tmp_path / "plain").touch()
    for places in ({"runs": tmp_path / "plain"}, {"overrides": {"store": str(tmp_path / "plain" / "in" / "it")}}):
        with pytest.raises(StoreError, match=r"cannot be a folder, as .*plain is a file; choose another place"):
            Study(TINY, progress=silent, **{"runs": tmp_path} | places)
    (tmp_path / "Tiny").mkdir()
    with pytest.raises(PresetError, match="the same as Tiny, which is there"):
        Study(TINY, runs=tmp_path, progress=silent)


def test_a_forget_set_of_one_point_has_intervals(tmp_path):
    one = {"forget_sets": [{"name": "one", "kind": "random", "size": 1}], "unlearning.methods": ["do_nothing", "gd"]}
    table = Study(TINY, one, runs=tmp_path, progress=silent).results()
    assert not table[["value", "low", "high"]].isna().any(axis=None)
    attack = table[(table["split"] == "forget") & (table["statistic"] == "u_lira")]
    assert set(attack["low"]) == {0.0}
    assert set(attack["high"]) == {1.0}


def test_probes_are_listed_apart_from_validation_points(tmp_path):
    """And sets are chosen by ids, of which the preset says how they begin."""
    base = data.load("digits", 60, 30)
    ids = [f"{'odd' if label % 2 else 'even'}/{i}" for i, label in enumerate(base.y_train)]
    data.register("probed")(
        lambda: data.from_arrays(
            *(base.x_train, base.y_train, base.x_val, base.y_val), class_names=base.class_names, ids=ids,
            probes={"last ten": np.arange(20, 30)},
        )
    )  # fmt: skip
    try:
        given = {"data": {"name": "probed", "n_train": None, "n_val": None}, "unlearning.methods": ["do_nothing"]}
        sets = [{"name": "odd", "kind": "ids", "ids": "odd/", "size": 5}]
        one = study(tmp_path, given | {"forget_sets": sets})
        made = one.forget_sets()["odd"]
        assert len(made) == 5
        assert (base.y_train[made.indices] % 2 == 1).all()
        splits = one.splits(made)
        assert splits["validation"].tolist() == list(range(60, 80))
        assert splits["last ten"].tolist() == list(range(80, 90))
        table = one.results().set_index(["method", "split", "statistic"])["value"]
        correct = one.unlearned("do_nothing", made).correct
        assert table["do_nothing", "last ten", "accuracy"] == pytest.approx(correct[:, 80:].mean())
        assert table["do_nothing", "validation", "accuracy"] == pytest.approx(correct[:, 60:80].mean())
        with pytest.raises(ForgetSetError, match="begins with 'red/'"):
            study(tmp_path, given | {"forget_sets": [{"name": "red", "kind": "ids", "ids": "red/"}]})
    finally:
        data.DATASETS.remove("probed")
    with pytest.raises(PresetError, match="ids is None"):
        study(tmp_path, {"forget_sets": [{"name": "red", "kind": "ids"}]})
