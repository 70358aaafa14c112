"""Ridge datamodels equal their explicit solution and recover what is linear."""

import numpy as np
import pytest
import torch

from dmmlib import datamodels, metrics
from dmmlib.analysis import evidence
from dmmlib.datamodels import RidgeDatamodel
from dmmlib.errors import DataError, ForgetSetError


def subsets(m, n=12, points=4, classes=3, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((m, n), bool)
    for mask in masks:
        mask[rng.permutation(n)[: n // 2]] = True
    weights = np.random.default_rng([seed, 7]).normal(size=(n, points, classes))
    outputs = np.einsum("mn,npc->mpc", masks, weights) + 2 + noise * rng.normal(size=(m, points, classes))
    return masks, outputs.astype(np.float32), weights


def explicit(masks, outputs, lam):
    """W (n, points, classes) by the textbook formula."""
    a = masks - masks.mean(0)
    y = outputs.reshape(len(masks), -1)
    w = np.linalg.solve(a.T @ a / len(a) + lam * np.eye(a.shape[1]), a.T @ y / len(a))
    return w.reshape(-1, *outputs.shape[1:])


@pytest.mark.parametrize("m", [8, 40], ids=["fewer subsets than points", "more"])
@pytest.mark.parametrize("lam", [0.01, 0.3])
def test_effect_equals_the_explicit_solve(m, lam):
    masks, outputs, _ = subsets(m, noise=0.5)
    model = RidgeDatamodel.fit(masks, outputs, lam)
    w = explicit(masks, outputs, lam)
    sets = [[3], [0, 5, 7], list(range(11))]
    np.testing.assert_allclose(model.effects(sets), [-w[f].sum(0) for f in sets], atol=1e-4)
    np.testing.assert_allclose(model.effect([0, 5, 7]), -w[[0, 5, 7]].sum(0), atol=1e-4)
    new = subsets(6, seed=9)[0]
    predicted = outputs.mean(0) + np.einsum("mn,npc->mpc", new - masks.mean(0), w)
    np.testing.assert_allclose(model.predict(new), predicted, atol=1e-4)


def test_points_that_all_models_saw_have_no_effect_and_spoil_no_other():
    masks, outputs, _ = subsets(40, points=15)
    masks[:, [2, 5]] = True
    model = RidgeDatamodel.fit(masks, outputs, 0.2, own_share=0.0)
    assert not model.effect([2, 5]).any()
    np.testing.assert_allclose(model.effect([2, 3]), model.effect([3]), atol=1e-6)


@pytest.mark.parametrize("m", [8, 40], ids=["fewer subsets than points", "more"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_own_weights_may_be_penalised_less(m, share):
    masks, outputs, _ = subsets(m, points=15, noise=0.5)  # 12 training points, 3 more
    lam = 0.2
    model = RidgeDatamodel.fit(masks, outputs, lam, own_share=share)
    a, y = masks - masks.mean(0), outputs
    w = np.empty((12, 15, 3))
    for target in range(15):
        penalty = np.full(12, lam)
        if target < 12:
            penalty[target] = share * lam
        w[:, target] = np.linalg.solve(a.T @ a / m + np.diag(penalty), a.T @ y[:, target] / m)
    for f in ([3], [0, 5, 7]):
        np.testing.assert_allclose(model.effect(f), -w[f].sum(0), atol=1e-3)
    new = subsets(6, seed=9)[0]
    predicted = outputs.mean(0) + np.einsum("mn,npc->mpc", new - masks.mean(0), w)
    np.testing.assert_allclose(model.predict(new), predicted, atol=1e-3)


def test_outputs_may_be_streamed(monkeypatch):
    masks, outputs, _ = subsets(1200, noise=0.5)

    class OnDisk:
        shape = outputs.shape
        reads = 0

        def __getitem__(self, rows):
            OnDisk.reads += 1
            return outputs[rows]

    model = RidgeDatamodel.fit(masks, OnDisk(), 0.1)
    np.testing.assert_allclose(model.effect([1, 2]), RidgeDatamodel.fit(masks, outputs, 0.1).effect([1, 2]), atol=1e-5)
    assert OnDisk.reads == 2, "one pass, a block of models at a time"


def test_settings_that_are_fitted_together_are_as_if_alone(monkeypatch):
    rng = np.random.default_rng(0)
    masks, outputs = rng.random((40, 12)) < 0.5, rng.normal(size=(40, 15, 3)).astype(np.float32)
    settings = [(0.1, 1.0), (0.1, 0.3), (0.5, 0.0)]
    assert datamodels.together(settings, 40, 12) == [settings]
    monkeypatch.setattr(datamodels, "TOGETHER", 2 * 2 * 12**2)
    assert datamodels.together(settings, 40, 12) == [settings[:2], settings[2:]]
    models = RidgeDatamodel.fit_all(masks, outputs, settings)
    for setting, model, effects in zip(settings, models, datamodels.effects_of(models, [[1], [2, 3]]), strict=True):
        alone = RidgeDatamodel.fit(masks, outputs, setting[0], own_share=setting[1])
        np.testing.assert_allclose(effects, alone.effects([[1], [2, 3]]), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.predict(masks), alone.predict(masks), rtol=1e-4, atol=1e-5)


def test_what_is_linear_is_recovered():
    masks, outputs, weights = subsets(400)
    model = RidgeDatamodel.fit(masks, outputs, 1e-4)
    # With subsets of one size only differences of weights are identified: the mean over points is free.
    centred = weights - weights.mean(0)
    np.testing.assert_allclose(model.effect([2, 4]), -centred[[2, 4]].sum(0), atol=1e-2)


def test_raw_logits_become_a_change_of_margins():
    rng = np.random.default_rng(0)
    masks, outputs, _ = subsets(40, points=14)
    labels, originals = rng.integers(0, 3, 14), rng.normal(size=(5, 14, 3)).astype(np.float32)
    raw = RidgeDatamodel.fit(masks, outputs, 0.1)
    effect = datamodels.Gauged(raw, originals, labels).effect([1, 3])
    before, after = (metrics.margins(z, labels) for z in (originals, originals + raw.effect([1, 3])))
    np.testing.assert_allclose(metrics.right_logits(effect, labels), (after - before).mean(0), atol=1e-5)


def test_lambda_is_chosen_on_held_out_subsets():
    masks, outputs, _ = subsets(16, noise=4.0, seed=1)
    held, held_outputs, _ = subsets(40, noise=0.0, seed=1)
    labels = np.array([0, 1, 2, 0])
    best, scores = datamodels.choose_lambda(masks, outputs, held, held_outputs, labels, [1e-4, 0.1, 1e4])
    assert set(scores) == {1e-4, 0.1, 1e4}
    assert scores[best] == max(scores.values())
    assert best != 1e-4


def test_lds_is_a_mean_of_spearman_correlations():
    rng = np.random.default_rng(0)
    actual = rng.normal(size=(50, 6))
    np.testing.assert_allclose(datamodels.lds(np.exp(actual), actual), 1)
    np.testing.assert_allclose(datamodels.lds(-actual, actual), -1)
    assert abs(datamodels.lds(rng.normal(size=(50, 6)), actual).mean()) < 0.2
    assert (datamodels.lds(np.ones((50, 6)), actual) == 0).all()
    e = datamodels.lds_estimate(actual + rng.normal(size=actual.shape), actual)
    assert 0 < e.low < e.value < e.high < 1


def test_bad_input():
    masks, outputs, _ = subsets(20)
    with pytest.raises(DataError, match="20 masks but outputs of 19 models"):
        RidgeDatamodel.fit(masks, outputs[:19], 0.1)
    with pytest.raises(DataError, match=r"Masks have shape \(20, 12\) and outputs are a list; give arrays"):
        RidgeDatamodel.fit(masks, outputs.tolist(), 0.1)
    for penalty in (0, "0.1", np.nan):
        with pytest.raises(DataError, match=f"penalty is {penalty}; give a positive number"):
            RidgeDatamodel.fit(masks, outputs, penalty)
    with pytest.raises(DataError, match="hold NaN or infinity; train those models anew, or leave them out"):
        RidgeDatamodel.fit(masks, np.where(outputs == outputs[3, 0, 0], np.nan, outputs), 0.1).effect([1])
    with pytest.raises(DataError, match="own_share is 2; give a number from 0 to 1"):
        RidgeDatamodel.fit(masks, outputs, 0.1, own_share=2)
    model = RidgeDatamodel.fit(masks, outputs, 0.1)
    with pytest.raises(ForgetSetError, match="index 12 is outside the training set of 12"):
        model.effect([12])
    with pytest.raises(DataError, match=r"Masks have shape \(20, 4\); give \(k, 12\)"):
        model.predict(masks[:, :4])
    for a, b in (((4, 2), (4, 3)), ((4,), (4,)), ((4, 3, 2), (4, 3, 2)), ((2, 3), (2, 3))):
        with pytest.raises(DataError, match=r"give both as \(n_subsets >= 3, n_points\)"):
            datamodels.lds(np.zeros(a), np.zeros(b))
    tensor = torch.randn(5, 3)
    np.testing.assert_allclose(datamodels.lds(tensor, tensor.exp()), 1)
    diverged = np.zeros((4, 2))
    diverged[2, 1] = np.nan
    with pytest.raises(DataError, match="Actual margins of model 2 are NaN"):
        datamodels.lds(np.zeros((4, 2)), diverged)


def test_masks_that_are_all_alike_are_refused():
    with pytest.raises(DataError, match="alike"):
        RidgeDatamodel.fit(np.ones((5, 4), bool), np.zeros((5, 4, 2), np.float32), 0.1)


def test_the_ceiling_is_what_the_mean_of_a_training_set_reaches():
    """Means vary by 1, models within a set by 2: who knows the means correlates with models by sqrt(1 / 3)."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(300, 1, 20))
    margins = means + np.sqrt(2) * rng.normal(size=(300, 6, 20))
    reached = [np.corrcoef(means[:, 0, j], margins[:, 0, j])[0, 1] for j in range(20)]
    assert evidence.ceiling(margins).mean() == pytest.approx(np.sqrt(1 / 3), abs=0.02)
    assert np.mean(reached) == pytest.approx(np.sqrt(1 / 3), abs=0.03)
    assert (evidence.ceiling(rng.normal(size=(12, 8, 500))) < 0.5).mean() > 0.9  # masks that change nothing
