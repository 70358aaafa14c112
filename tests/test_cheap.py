"""The study of cheap attribution: its parts against explicit formulas, and its measurements against the study's own."""

import copy
import importlib.util
import itertools
from dataclasses import astuple

import numpy as np
import pandas as pd
import pytest

from dmmlib import metrics, presets
from dmmlib.analysis import tables
from dmmlib.analysis.intervals import mean_over
from dmmlib.analysis.looks import SPLITS
from dmmlib.analysis.side_by_side import FLOOR, best, over_sets, side_by_side, tuned_ridge, wide
from dmmlib.attributors import bayesian
from dmmlib.attributors.linearised import linearised_response
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.datamodels import lds as lds_of
from dmmlib.errors import PresetError
from dmmlib.files import home
from dmmlib.progress import silent
from dmmlib.studies.cheap import ablation, experiments
from dmmlib.studies.cheap.evaluator import Evaluator
from dmmlib.studies.cheap.settings import CheapSettings
from dmmlib.study import Study
from tests.conftest import TINY
from tests.test_attribution import Nothing as _registered_as_nothing  # noqa: F401

CHEAP = {
    "sizes": [10, 30, 60],
    "n_draws": 2,
    "n_kernel": 3,
    "linearised": [1],
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cheap")
    unlearning = {"checkpoints": 0, "methods": ["do_nothing", "retrain", "dm_direct", "dmm"]}
    preset = copy.deepcopy(TINY) | {"studies": {"cheap": CHEAP}, "unlearning": unlearning}
    return Study(preset, runs=folder / "runs", figures=folder / "figures", progress=silent)


@pytest.fixture(scope="module")
def cache(study):
    return experiments.Cache(study)


def test_a_pool_goes_on_where_the_presets_models_end(study):
    own = study.context()
    whole, late = experiments.pool(study, 0, 60), experiments.pool(study, 35, 55)
    np.testing.assert_array_equal(whole.masks[:30], own.masks)
    np.testing.assert_array_equal(whole.masks, study.random_masks("attribution masks", 60, 0.75))
    np.testing.assert_array_equal(late.masks, whole.masks[35:55])
    np.testing.assert_array_equal(late.outputs, whole.outputs[35:55])
    assert late.models.n_models == CHEAP["n_kernel"]
    logits = metrics.margin_gauge(late.models.logits(study.x).cpu().numpy(), study.data.y)
    np.testing.assert_allclose(logits, late.outputs[:3], atol=1e-3)


@pytest.mark.parametrize("size", CHEAP["sizes"])
def test_draws_share_no_model(study, size):
    starts = experiments.draws(study.preset, size)
    assert len(starts) == (2 if size <= 30 else 1)
    assert all(b - a >= size for a, b in itertools.pairwise(starts))
    assert starts[-1] + size <= max(CHEAP["sizes"])


def test_models_are_linearised_once_for_every_number_of_them(study, cache):
    context = experiments.pool(study, 0, 30)
    two, three = cache("draw 0", context, 2), cache("draw 0", context, 3)
    assert three.models[:2] == two.models
    assert cache("draw 0", context, 2).models == two.models
    assert cache("draw 0", context, 99).models == three.models, "there are no more"
    direct = linearised_response(context, n_models=3)
    np.testing.assert_allclose(three.change(context.masks)[0], direct.change(context.masks)[0], atol=1e-3)


def test_the_curve_measures_what_the_study_does(study, cache):
    table = experiments.curve(study, cache)
    p95 = table[table["statistic"] == "klom_p95"].set_index(["attributor", "n_models", "draw", "forget_set", "split"])
    for name, f in study.forget_sets().items():
        for method, key in (("do_nothing", "do nothing"), ("retrain", "floor")):
            rows = pd.DataFrame(study.evaluate(method, f)).query("statistic == 'klom_p95'").set_index("split")
            for split in SPLITS:
                mine = p95.loc[(key, 0, 0, name, split), "value"]
                assert mine == pytest.approx(rows.loc[split, "value"], rel=1e-5), (method, split)
    model = bayesian.bayesian(study.context(), n_models=CHEAP["n_kernel"])
    before = metrics.margins(study.original_logits(), study.data.y)
    for name, f in study.forget_sets().items():
        answers = before + metrics.right_logits(model.effect(f.indices), study.data.y)
        klom = metrics.klom(answers, study.reference(f)[0])
        here = p95.loc[("bayesian", 30, 0, name, "forget"), "value"]
        assert here == pytest.approx(np.percentile(klom[f.indices], 95), abs=0.05)
    lds = table[(table["statistic"] == "lds") & (table["n_models"] == 30) & (table["draw"] == 0)]
    both = study.lds(model)
    assert lds["value"].iloc[0] == pytest.approx(lds_of(*both).mean(), abs=0.01)
    wide = experiments.summary(table).set_index(["attributor", "n_models", "split"])
    assert wide.loc[("bayesian", 30, "forget"), "n_draws"] == 2
    assert (wide["low"] <= wide["value"]).all()
    assert (wide["value"] <= wide["high"]).all()


def mean_klom(evaluator, effects):
    return np.mean([row["value"] for row in evaluator.klom(effects)])


def test_ridge_has_the_setting_of_the_lowest_score_on_the_tuning_sets(study):
    masks, outputs = study.subsets()
    tuning, reported = Evaluator.tuning(study), Evaluator.reported(study)

    def effects(setting):
        model = RidgeDatamodel.fit(masks, outputs, **setting)  # of all logits, where the study's is of margins alone
        return lambda sets: metrics.right_logits(model.effects(sets), study.data.y)

    best = min(study.preset.datamodels.grid, key=lambda setting: mean_klom(tuning, effects(setting)))
    *klom, lds = experiments.ridge(study, 100, reported)
    expected = [row["value"] for row in reported.klom(effects(best))]
    np.testing.assert_allclose([row["value"] for row in klom], expected, rtol=1e-3)
    assert lds["statistic"] == "lds"
    assert lds["low"] < lds["value"] < lds["high"]


def test_the_ablation_tries_each_change_in_every_draw(study, cache):
    table = ablation.ablate(study, cache)
    fitted = {name: model for _, name, model in ablation.variants(study, cache, 0)}
    assert len(table) == len(fitted) * 2 * 4
    against = ablation.against_default(table)
    default = against[against["group"] == "default"].set_index("split")
    assert (default.loc[list(SPLITS), "ratio"] == 1).all()
    assert default.loc["lds", "ratio"] == 0
    rows = table.query("split == 'lds'").pivot(index="draw", columns="name", values="value")
    gap = rows["subset models alone"] - rows[table["name"].iloc[0]]
    found = against.query("name == 'subset models alone' and split == 'lds'").iloc[0]
    assert found["ratio"] == pytest.approx(gap.mean())
    compared = 4 * (len(fitted) - 1)
    assert (found["low"], found["high"]) == pytest.approx(astuple(mean_over(gap.to_numpy(), level=0.05 / compared))[1:])
    assert not default["clear"].any()
    draws = pd.DataFrame(
        [
            (group, name, i, "forget", base * times)
            for i, base in enumerate([1.0, 2.0])
            for group, name, times in (
                ("default", "default", 1.0),
                ("parts", "twice", 2.0 + 1e-4 * i),
                ("parts", "unclear", 0.5 + i),
            )
        ],
        columns=["group", "name", "draw", "split", "value"],
    )
    assert ablation.against_default(draws).set_index("name")["clear"].to_dict() == {
        "default": False,
        "twice": True,
        "unclear": False,
    }


def test_variants_change_what_they_say(study, cache):
    fitted = {name: model for _, name, model in ablation.variants(study, cache, 0)}
    default, alone, added = (
        fitted[name] for name in (next(iter(fitted)), "subset models alone", "effects of points add up")
    )
    assert alone.scale == 0
    np.testing.assert_array_equal(alone.covariance, default.covariance)
    one, other, both = (added.prior.effects([f])[0] for f in ([2], [7], [2, 7]))
    np.testing.assert_allclose(one + other, both, atol=1e-5)
    starts = [
        fitted[f"all {start}"].prior.response.models for start in ("retrained from nothing", "from their own margins")
    ]
    assert [[model.pull.any().item() for model in models] for models in starts] == [[False, False], [True]]
    assert len(fitted["1 of them"].prior.response.models) == 1


def test_uncertainty_says_what_its_columns_say(study):
    table = experiments.uncertainty(study, study.attributor())
    assert len(table) == 2 * len(study.data.y)
    z = (table["true"] - table["predicted"]) / np.hypot(table["sd"], table["se"])
    np.testing.assert_allclose(table["z"], z, rtol=1e-6)
    np.testing.assert_array_equal(table["covered"], z.abs() <= 1.959964)
    sets = experiments.calibration(table).set_index(["forget_set", "split"])
    part = table.query("forget_set == 'pc1' and split == 'forget'")
    assert sets.loc[("pc1", "forget"), "coverage"] == part["covered"].mean()
    assert sets.loc[("pc1", "forget"), "kind"] == "group"
    slope = np.linalg.lstsq(part[["predicted"]], part["true"])[0][0]
    assert sets.loc[("pc1", "forget"), "slope"] == pytest.approx(slope)


def test_costs_break_even_where_the_totals_cross(study):
    table = experiments.costs(study, 0.2).set_index("way")
    assert table.loc["Bayesian, DMM", "once"] == 30 * 0.75
    assert table.loc["ridge, DMM", "once"] == 100 * 0.5
    for way, row in table.drop(index="retrain").iterrows():
        k = row["beats"]
        assert row["once"] + k * row["request"] < k, way
        assert row["once"] + (k - 1) * row["request"] >= k - 1, way


def test_ratios_are_geometric_means_over_sets_and_t_intervals_over_seeds():
    rows = [
        ("p", seed, attributor, name, "random", "forget", "klom_p95", value)
        for seed, factor in ((0, 1.0), (1, 1.5))
        for attributor, values in (("bayesian", (2 * factor, 1.0)), ("ridge", (1.0, 2.0)))
        for name, value in zip(("one", "other"), values, strict=True)
    ]
    rows += [
        ("p", s, a, "every", "every", "all", "lds", v) for s in (0, 1) for a, v in (("bayesian", 0.5), ("ridge", 0.4))
    ]
    names = ["pair", "seed", "attributor", "forget_set", "kind", "split", "statistic", "value"]
    ratios = experiments.ratios(pd.DataFrame(rows, columns=names))
    klom = ratios[ratios["split"] == "forget"]["value"].to_numpy()
    np.testing.assert_allclose(klom, [1, np.sqrt(1.5)])
    seeds = experiments.over_seeds(ratios).set_index("split")
    assert seeds.loc["forget", "value"] == pytest.approx(1.5**0.25)
    assert seeds.loc["all", "value"] == pytest.approx(0.1)
    assert seeds["n"].tolist() == [2, 2]


def test_replication_goes_on_where_its_table_ends(study, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("replicate_script", home() / "scripts" / "replicate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked, methods = [], study.methods
    monkeypatch.setattr(script, "Study", lambda preset, overrides: asked.append(overrides) or study)
    monkeypatch.setattr(script.presets, "load", lambda name: study.preset)
    script.main([0], ["digits, mlp"], tmp_path)
    script.main([0, 1], ["digits, mlp"], tmp_path)
    assert [o["seed"] for o in asked] == [0, 1]
    path = tmp_path / "04_replication.csv"
    main = pd.read_csv(path)
    assert len(main) == 2 * len(study.forget_sets()) * len(methods) * 3
    main[main["method"] != methods[-1]].to_csv(path, index=False)
    script.main([0, 1], ["digits, mlp"], tmp_path)
    assert [o["unlearning.methods"] for o in asked[2:]] == 2 * [(methods[-1],)], "only the method that is not there"
    again = pd.read_csv(path).sort_values(list(main), ignore_index=True)
    pd.testing.assert_frame_equal(again, main.sort_values(list(main), ignore_index=True))
    path.unlink()
    script.main([1], ["digits, mlp"], tmp_path)
    assert [o["seed"] for o in asked[4:]] == [1], "each table goes on for itself"
    rows = pd.read_csv(tmp_path / "07_replication.csv")
    assert set(rows["attributor"]) == {"do nothing", "bayesian", "ridge"}
    assert len(rows) == 2 * (3 * 2 * 3 + 2)
    ratios = experiments.over_seeds(experiments.ratios(rows))
    assert set(ratios["kind"]) == {"random", "group", "every"}


def test_the_main_table_over_seeds():
    values = {"do_nothing": 9.0, "gd": 5.0, "ga": 4.0, "dmm": 2.0, "retrain": 1.0}
    rows = [
        ("p", seed, f"set {k}", method, split, value + seed + (split == "retain") * (method == "ga") * 9)
        for seed in (0, 2)
        for k in range(3)
        for method, value in values.items()
        for split in SPLITS
    ]
    rows[-3:] = [(*row[:-1], 10.0) for row in rows[-3:]]  # retraining, once
    rows += [("p", 0, "set 0", "oracle_matching", split, 4.5) for split in SPLITS]
    table = tables.replications(
        pd.DataFrame(rows, columns=["pair", "seed", "forget_set", "method", "split", "value"])
    ).xs("p")
    assert list(table.columns) == [*SPLITS, "ahead"]
    assert table.loc["DMM", "forget"] == str(mean_over(np.array([2.0, 4.0]), log=True))
    assert table.loc["best baseline", "forget"] == str(mean_over(np.array([4.0, 6.0]), log=True))
    assert table.loc["best baseline", "retain"] == str(mean_over(np.array([5.0, 7.0]), log=True))
    assert table.loc["DMM", "ahead"] == "6 of 6"
    assert table.loc["do nothing", "ahead"] == "0 of 6"
    assert table.loc["oracle matching", "ahead"] == "0 of 1"
    assert table.loc["best baseline", "ahead"] == ""


def test_a_run_of_one_seed_has_no_interval(study):
    rows = experiments.replicate(study).assign(pair="digits, linear", seed=0)
    seeds = experiments.over_seeds(experiments.ratios(rows))
    assert set(seeds["pair"]) == {"digits, linear"}
    assert seeds["low"].isna().all()


@pytest.mark.parametrize("pair", experiments.PAIRS)
def test_replicated_pairs_are_presets(pair, tmp_path):
    study = Study("replicate", experiments.PAIRS[pair], runs=tmp_path)
    assert study.preset.datamodels.n_subsets == 2 * study.data.n_train


@pytest.mark.parametrize(
    "given",
    [{"size": [3]}, {"sizes": []}, {"sizes": [2]}, {"n_draws": 1},
     {"linearised": [0]}, {"n_kernel": 1}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        CheapSettings(**given)
    with pytest.raises(PresetError, match=next(iter(given))):
        presets.load(TINY | {"studies": {"cheap": given}})


def test_attributors_stand_side_by_side_a_users_own_and_those_that_cannot_be_fitted(study):
    settings = {"ridge": {}, "kernel": {"n_models": 2}, "nothing": {}, "lasso": {"shares": [2.0]}}
    table, missing = side_by_side(study, settings, study.forget_sets(), sizes=[100], n_models=6)
    assert list(missing) == ["lasso"]
    assert "shares=[2.0] of attributor 'lasso'" in missing["lasso"]
    spent = table.drop_duplicates("attributor").set_index("attributor")["n_models"].to_dict()
    assert spent == {"do nothing": 0, FLOOR: 0, "ridge": 30, "kernel": 30, "nothing": 30, "ridge, 100 models": 100}
    klom = table[table["statistic"] == "klom_p95"].set_index(["attributor", "method", "forget_set", "split"])["value"]
    for name, f in study.forget_sets().items():
        oracles, originals = study.reference(f)[0], metrics.margins(study.original_logits()[:6], study.data.y)
        expected = np.percentile(metrics.klom(originals, oracles)[f.indices], 95)
        assert klom["do nothing", "", name, "forget"] == pytest.approx(expected)
        assert klom["nothing", "dm_direct", name, "forget"] == pytest.approx(expected)  # it predicts no change
    assert set(table["method"]) == {"", "dm_direct", "dmm"}
    medians = over_sets(table)
    floor = medians[(medians["attributor"] == FLOOR) & (medians["split"] == "retain")].iloc[0]
    assert floor["value"] == pytest.approx(np.median([klom[FLOOR, "", name, "retain"] for name in study.forget_sets()]))
    lines = wide(medians)
    assert list(lines.index) == ["do nothing", FLOOR, *("ridge", "kernel", "nothing", "ridge, 100 models")]
    assert lines.loc["ridge, 100 models", "retrainings"] == "50"


def test_ridge_beside_others_has_the_setting_that_is_best_on_the_tuning_sets(study):
    context, tuning = study.context(), Evaluator.tuning(study)

    def score(setting):
        model = RidgeDatamodel.fit(context.masks, context.outputs, **setting)
        return mean_klom(tuning, lambda sets: metrics.right_logits(model.effects(sets), study.data.y))

    scores = {tuple(setting.values()): score(setting) for setting in study.preset.datamodels.grid}
    assert len(set(scores.values())) > 1
    tuned = tuned_ridge(study, context.masks, context.margins)
    assert scores[tuned["lam"], tuned["own_share"]] == pytest.approx(min(scores.values()))


def test_who_is_best_is_a_matter_of_intervals():
    rows = []
    for name, lds, kloms in (("a", 0.6, [1, 2, 1, 2, 1]), ("b", 0.58, [2, 1, 2, 1, 2]), ("c", 0.3, [5, 6, 5, 6, 5])):
        rows.append((name, "", "", "all", "lds", lds, lds - 0.03, lds + 0.03))
        rows += [(name, "dmm", str(i), "forget", "klom_p95", float(v), np.nan, np.nan) for i, v in enumerate(kloms)]
    columns = ["attributor", "method", "forget_set", "split", "statistic", "value", "low", "high"]
    table = pd.DataFrame(rows, columns=columns).assign(n_models=100)
    assert best(table, 100) == (["a", "b"], ["a", "b"])
    assert best(table[table["attributor"] != "b"], 100) == (["a"], ["a"])
