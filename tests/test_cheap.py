"""The study of cheap attribution: its parts against explicit formulas, and its measurements against the study's own."""

import copy
import importlib.util
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal

from dmmlib import metrics, presets
from dmmlib.analysis import tables
from dmmlib.analysis.intervals import mean_over
from dmmlib.analysis.looks import SPLITS
from dmmlib.analysis.side_by_side import FLOOR, best, over_sets, side_by_side, tuned_ridge, wide
from dmmlib.attribution import Context
from dmmlib.attributors import bayesian
from dmmlib.attributors.bayesian import RHOS, covariance
from dmmlib.attributors.linearised import LinearisedResponse, linearised_response
from dmmlib.attributors.margins import Linear
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.datamodels import lds as lds_of
from dmmlib.errors import DataError, PresetError
from dmmlib.files import home
from dmmlib.metrics import Estimate
from dmmlib.progress import silent
from dmmlib.studies.cheap import ablation, experiments
from dmmlib.studies.cheap.ablation import antithetic_masks, clustered_masks, posterior
from dmmlib.studies.cheap.evaluator import Evaluator, leaving_out
from dmmlib.studies.cheap.settings import CheapSettings
from dmmlib.study import Study
from dmmlib.trainer import ModelSet
from tests.conftest import TINY
from tests.test_attribution import FACTORIES, problem

CHEAP = {
    "sizes": [10, 30, 60],
    "n_draws": 2,
    "n_kernel": 3,
    "n_ablation": 2,
    "linearised": [1],
    "n_clusters": 5,
    "penalties": [0.1],
    "fractions": [0.5],
    "ranks": [20],
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


def prior(w0):
    """A linear prior mean that is free of noise."""
    return Linear(w0).change


def test_the_posterior_taken_apart_is_the_bayesian_datamodels():
    context = problem(FACTORIES["mlp"], m=30)
    w0 = np.random.default_rng(0).normal(size=(10, 14)).astype(np.float32)
    model = bayesian.fit(context, w0, 0.3)
    predict = posterior(context, prior(w0), covariance(w0, 0.3))
    for forget in ([0], [2, 5, 7]):
        effect = metrics.right_logits(model.effect(forget), context.labels)
        np.testing.assert_allclose(leaving_out(predict, 10)([forget])[0], effect, rtol=1e-3, atol=1e-4)


def parts_of_a_regression(seed=0, n=8, m=25, n_points=11):
    rng = np.random.default_rng(seed)
    masks = np.stack([np.isin(np.arange(n), rng.permutation(n)[:5]) for _ in range(m)])
    w0 = rng.normal(size=(n, n_points))
    y = (masks - masks.mean(0)) @ (w0 + 0.3 * rng.normal(size=w0.shape)) + 0.2 * rng.normal(size=(m, n_points))
    return masks, y, w0, covariance(w0, 0.5)


def of_margins(masks, y):
    """A context of one class, whose logits are margins."""
    n_points = y.shape[1]
    return Context(torch.zeros(n_points, 1), torch.zeros(n_points, dtype=torch.long), masks, y[:, :, None])


def weights_of(predict, n=8):
    """What each training point adds (n, n_points)."""
    return predict(np.eye(n)) - predict(np.zeros((1, n)))


def log_evidence(a, y, c, rho):
    """Of one margin, its variance profiled out; the mean is projected out of everything."""
    m = len(a)
    basis = np.linalg.svd(np.eye(m) - 1 / m)[0][:, : m - 1]
    z, r = basis.T @ y, basis.T @ (rho * a @ c @ a.T + np.eye(m)) @ basis
    sigma2 = z @ np.linalg.solve(r, z) / len(z)
    return multivariate_normal.logpdf(z, cov=sigma2 * r)


@pytest.mark.parametrize("each", [False, True])
def test_without_mean_and_own_weights_it_is_gaussian_process_regression_at_the_best_evidence(each):
    masks, y, w0, c = parts_of_a_regression()
    found = weights_of(posterior(of_margins(masks, y), prior(w0), c, mean=False, own=False, each=each))
    a, centred = masks - masks.mean(0), y - y.mean(0)
    scores = np.array([[log_evidence(a, column, c, rho) for column in centred.T] for rho in RHOS])
    rhos = RHOS[scores.argmax(0)] if each else np.full(y.shape[1], RHOS[scores.sum(1).argmax()])
    for k, rho in enumerate(rhos):
        explicit = rho * c @ a.T @ np.linalg.solve(rho * a @ c @ a.T + np.eye(len(a)), centred[:, k])
        np.testing.assert_allclose(found[:, k], explicit, rtol=1e-5, atol=1e-7)


def test_a_true_prior_mean_is_found_and_helps():
    masks, y, w0, c = parts_of_a_regression(m=12)
    with_mean, without = (weights_of(posterior(of_margins(masks, y), prior(w0), c, mean=on)) for on in (True, False))
    assert np.abs(with_mean - w0).mean() < np.abs(without - w0).mean()


def test_antithetic_masks_come_with_their_complements():
    masks = np.random.default_rng(0).random((6, 20)) < 0.5
    pairs = antithetic_masks(masks)
    assert pairs.shape == masks.shape
    np.testing.assert_array_equal(pairs[::2], masks[:3])
    np.testing.assert_array_equal(pairs[1::2], ~masks[:3])


def test_clustered_masks_hold_what_is_alike_together_and_are_of_exact_size():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(4), 10)
    alike = np.eye(4)[cluster] @ rng.normal(size=(4, 30)) + 0.01 * rng.normal(size=(40, 30))
    masks = clustered_masks(alike, 300, 0.75, 4, seed=1)
    assert (masks.sum(1) == 30).all()
    r = np.corrcoef(masks.T.astype(float))
    same = cluster[:, None] == cluster
    np.fill_diagonal(r, np.nan)
    assert np.nanmean(r[same]) > np.nanmean(r[~same]) + 0.2
    with pytest.raises(DataError, match=r"n_clusters=41 .* 40"):
        clustered_masks(alike, 3, 0.75, 41, 0)


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
    assert cache("draw 0", context, 2) is two
    assert cache("draw 0", context, 99).models == three.models, "there are no more"
    direct = linearised_response(context, n_models=3)
    np.testing.assert_allclose(three.change(context.masks)[0], direct.change(context.masks)[0], atol=1e-3)


def test_a_remembered_response_predicts_the_same_masks_once(study, cache, monkeypatch):
    context = experiments.pool(study, 0, 30)
    remembered = cache("draw 0", context, 1)
    first = remembered.change(context.masks)
    again = LinearisedResponse(remembered.models).change(~context.masks)
    for found, expected in zip(remembered.change(~context.masks), again, strict=True):
        np.testing.assert_array_equal(found, expected)
    monkeypatch.setattr(LinearisedResponse, "change", None)
    assert remembered.change(context.masks) is first


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


def test_ridge_has_the_setting_of_the_lowest_score_on_the_tuning_sets(study):
    masks, outputs = study.subsets()
    tuning, reported = Evaluator.tuning(study), Evaluator.reported(study)

    def effects(setting):
        model = RidgeDatamodel.fit(masks, outputs, **setting)  # of all logits, where the study's is of margins alone
        return lambda sets: metrics.right_logits(model.effects(sets), study.data.y)

    best = min(study.preset.datamodels.grid, key=lambda setting: tuning.score(effects(setting)))
    *klom, lds = experiments.ridge(study, 100, reported)
    expected = [row["value"] for row in reported.klom(effects(best))]
    np.testing.assert_allclose([row["value"] for row in klom], expected, rtol=1e-3)
    assert lds["statistic"] == "lds"
    assert lds["low"] < lds["value"] < lds["high"]


def test_the_ablation_tries_each_change_in_every_draw(study, cache):
    table = ablation.ablate(study, cache)
    variants = ablation.variants(study)
    assert len(table) == len(variants) * 2 * 4
    against = ablation.against_default(table)
    default = against[against["group"] == "default"].set_index("split")
    assert (default.loc[list(SPLITS), "ratio"] == 1).all()
    assert default.loc["lds", "ratio"] == 0
    no_mean = against.query("name == 'covariance only: no mean' and split == 'lds'")
    rows = table.query("split == 'lds'").pivot(index="draw", columns="name", values="value")
    gap = rows["covariance only: no mean"] - rows[variants[0].name]
    assert no_mean["ratio"].iloc[0] == pytest.approx(gap.mean())


def test_gauges_end_in_the_same_margins_where_effects_vanish(study):
    table = ablation.gauges(study)
    assert set(table["gauge"]) == {"raw logits", "margin gauge"}
    assert np.isfinite(table["value"]).all()
    assert len(table) == 2 * 2 * len(study.tuning_sets()) * 3


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


def test_fine_tuned_methods_are_measured_as_the_study_does(study):
    table = experiments.fine_tuned(study, ["dmm"])
    f = study.forget_sets()["pc1"]
    rows = pd.DataFrame(study.evaluate("dmm", f))
    mine = table[table["forget_set"] == "pc1"].set_index("split")["value"]
    theirs = rows[rows["statistic"] == "klom_p95"].set_index("split")["value"]
    for split in SPLITS:
        assert mine[split] == pytest.approx(theirs[split], rel=1e-5)
    assert mine["all"] == rows[rows["statistic"] == "cost"]["value"].iloc[0]


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


def test_ratio_over_sets_takes_the_mean_of_draws_first():
    rows = [
        ("a", 1, d, f, "forget", "klom_p95", v) for f, vs in (("x", (1, 3)), ("y", (4, 4))) for d, v in enumerate(vs)
    ]
    rows += [("b", 2, 0, f, "forget", "klom_p95", 2.0) for f in "xy"]
    table = pd.DataFrame(rows, columns=["attributor", "n_models", "draw", "forget_set", "split", "statistic", "value"])
    e = experiments.ratio_over_sets(table, ("a", 1), ("b", 2), ["x", "y"], "forget")
    assert isinstance(e, Estimate)
    assert e.value == 1.5
    assert (e.low, e.high) == (1, 2)


def test_replication_goes_on_where_its_table_ends(study, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("replicate_script", home() / "scripts" / "replicate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = []
    monkeypatch.setattr(script, "Study", lambda preset, overrides: asked.append(overrides) or study)
    script.main([0], ["digits, mlp"], tmp_path)
    script.main([0, 1], ["digits, mlp"], tmp_path)
    assert [o["seed"] for o in asked] == [0, 1]
    main = pd.read_csv(tmp_path / "04_replication.csv")
    assert len(main) == 2 * len(study.forget_sets()) * len(study.preset.unlearning.methods) * 3
    (tmp_path / "04_replication.csv").unlink()
    script.main([1], ["digits, mlp"], tmp_path)
    assert [o["seed"] for o in asked] == [0, 1, 1], "each table goes on for itself"
    rows = pd.read_csv(tmp_path / "07_replication.csv")
    assert set(rows["attributor"]) == {"do nothing", "bayesian", "ridge"}
    assert len(rows) == 2 * (3 * 2 * 3 + 2)
    ratios = experiments.over_seeds(experiments.ratios(rows))
    assert set(ratios["kind"]) == {"random", "group", "every"}


def test_ridge_may_have_more_models_than_the_preset(study):
    section = study.preset.datamodels
    size, m = section.n_subsets + 20, section.n_subsets
    table = experiments.more_ridge(study, size)
    assert (table["n_models"] == size).all()
    masks = study.random_masks("masks:more", 20, section.fraction)
    assert not any((masks[:, None] == study.subsets()[0][None]).all(2).ravel())
    logits = np.concatenate([study.subsets(raw=True)[1], study.outputs(ModelSet("subsets:more", masks), raw=True)])
    reported = Evaluator.reported(study)
    possible = []
    for lam in section.lambdas:
        model = RidgeDatamodel.fit(np.concatenate([study.subsets()[0], masks]), logits, lam)
        assert len(logits) == m + 20
        moved = {
            name: metrics.margins(study.original_logits() + model.effect(f.indices), study.data.y)
            for name, f in study.forget_sets().items()
        }
        possible.append([row["value"] for row in reported.rows(moved.__getitem__)])
    assert any(np.allclose(table["value"], values, rtol=1e-3) for values in possible)


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
    [{"size": [3]}, {"sizes": []}, {"sizes": [2]}, {"n_draws": 1}, {"fractions": [1.0]}, {"penalties": [0]},
     {"ranks": [0]}, {"linearised": [0]}, {"n_kernel": 0}],
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
    assert "between 0 and 1" in missing["lasso"]
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
        return tuning.score(lambda sets: metrics.right_logits(model.effects(sets), study.data.y))

    scores = {tuple(setting.values()): score(setting) for setting in study.preset.datamodels.grid}
    assert len(set(scores.values())) > 1
    tuned = tuned_ridge(study, context)
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
