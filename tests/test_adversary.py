"""Malicious deletion requests: geometry against theory, poison within its bounds, requests, refusals, the defence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmmlib import data, metrics, models, presets
from dmmlib.ensemble import Ensemble
from dmmlib.errors import DataError, ForgetSetError, OptionError, PresetError
from dmmlib.studies.adversary import crafting, defence, experiments, geometry, service, serving, sweep
from dmmlib.studies.adversary.settings import AdversarySettings
from dmmlib.studies.adversary.subspace import Metric, Subspace, gradients
from dmmlib.studies.adversary.world import World, mlp, retrain, sites

SMALL = AdversarySettings(
    n=120, share=0.1, hidden=8, epochs=5, n_targets=5, n_tuning=3, n_models=4, n_known=2, n_candidates=40, k=3,
    dampings=(0.3, 30.0), angles=(0.0,), craft_steps=3, shares=(0.1,), epsilons=(0,),
    ks=(2,), sizes=(4,), n_subsets=30, camouflage_subsets=6, n_compared=4, n_requests=2, n_honest=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", n_train=400, n_val=100)


@pytest.fixture(scope="module")
def world(digits: data.Dataset) -> World:
    return World.of(digits, SMALL, mlp(digits, SMALL))


@pytest.fixture(scope="module")
def subspace(world: World) -> Subspace:
    return world.subspace(SMALL.k)


@pytest.fixture(scope="module")
def poison(world: World, subspace: Subspace) -> crafting.Poison:
    return world.craft(subspace, dirty=True, angle=0.5)


@pytest.fixture(scope="module")
def prepared(world: World) -> experiments.Prepared:
    return experiments.prepare(world)


# --- simplex -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 8, 30])
def test_the_simplex_is_regular_inscribed_and_cancels(k: int) -> None:
    v = geometry.regular(k)
    assert v.shape == (k + 1, k)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1)
    np.testing.assert_allclose(v.sum(0), 0, atol=1e-9)
    edges = np.linalg.norm(v[:, None] - v[None], axis=2)[~np.eye(k + 1, dtype=bool)]
    np.testing.assert_allclose(edges, np.sqrt(2 * (k + 1) / k))


@given(st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_farthest_is_on_the_boundary_along_the_direction(k: int, seed: int) -> None:
    v = geometry.regular(k)
    direction = np.random.default_rng(seed).standard_normal(k)
    weights = geometry.farthest(v, direction)
    assert weights.min() == pytest.approx(0, abs=1e-9)
    assert weights.sum() == pytest.approx(1)
    point = weights @ v
    np.testing.assert_allclose(point / np.linalg.norm(point), direction / np.linalg.norm(direction), atol=1e-7)
    assert 1 / k - 1e-9 <= np.linalg.norm(point) <= 1 + 1e-9, "between the inscribed and the circumscribed ball"


@given(st.lists(st.integers(0, 6), min_size=2, max_size=6), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_apportion_takes_what_there_is(available: list[int], total: int, seed: int) -> None:
    shares = np.random.default_rng(seed).random(len(available)) + 0.01
    counts = geometry.apportion(shares, total, np.array(available))
    assert (counts <= available).all()
    assert (counts >= 0).all()
    assert counts.sum() == min(total, sum(available))


def test_apportion_asks_nothing_of_groups_without_a_share() -> None:
    counts = geometry.apportion(np.array([0.0, 0.5, 0.5]), 10, np.array([5, 4, 4]))
    np.testing.assert_array_equal(counts, [0, 4, 4])


def test_simplex_refuses_bad_input() -> None:
    with pytest.raises(OptionError, match="displacement is 0"):
        geometry.farthest(geometry.regular(2), np.zeros(2))


# --- subspace ------------------------------------------------------------------------------------------


def test_directions_are_orthonormal_in_the_metric(world: World, subspace: Subspace) -> None:
    known = world.known
    total = torch.zeros(SMALL.k, SMALL.k)
    for i in range(known.models.n_models):
        w = torch.cat([d[:, i].flatten(1) for d in subspace.directions.values()], 1)
        applied = (w @ known.phi[i].T) @ known.phi[i] + known.mu[i] * w
        total += w @ applied.T / known.models.n_models
    np.testing.assert_allclose(total, np.eye(SMALL.k), atol=1e-3)


def test_metric_solves_its_system(world: World) -> None:
    g = torch.randn(3, world.known.phi.shape[2], generator=torch.Generator().manual_seed(0))
    solved, phi = world.known.solve(0, g), world.known.phi[0]
    np.testing.assert_allclose((solved @ phi.T) @ phi + world.known.mu[0] * solved, g, atol=1e-3)


def test_coordinates_are_products_of_gradients_and_directions(world: World, subspace: Subspace) -> None:
    x, y = world.of_targets(world.targets[:3])
    expected = torch.zeros(3, SMALL.k)
    for i in range(subspace.models.n_models):
        w = torch.cat([d[:, i].flatten(1) for d in subspace.directions.values()], 1)
        expected += gradients(subspace.models, i, x, y) @ w.T / subspace.models.n_models
    np.testing.assert_allclose(subspace.of_margins(x, y), expected, rtol=1e-3, atol=1e-4)
    logits = subspace.models.logits(x).numpy()
    p = 1 / (1 + np.exp(metrics.margins(logits, y.numpy())))  # of the wrong classes, (K, 3)
    single = replace(
        subspace, models=subspace.models[:1], directions={k: d[:, :1] for k, d in subspace.directions.items()}
    )
    of_loss = single.of_losses(x)[torch.arange(3), y]
    np.testing.assert_allclose(of_loss, -p[0][:, None] * single.of_margins(x, y), rtol=1e-3, atol=1e-4)


def displaced(subspace: Subspace, z: np.ndarray) -> Ensemble:
    """The first model, displaced by each row of z (n, k)."""
    (params, buffers), moves = subspace.models.state_of(0), torch.from_numpy(z).float()
    params = {k: params[k] + torch.tensordot(moves, w[:, 0], dims=1) for k, w in subspace.directions.items()}
    return Ensemble(subspace.models.module, params, {k: b.expand(len(z), *b.shape) for k, b in buffers.items()})


def test_margins_move_by_the_product_of_coordinates(world: World, subspace: Subspace) -> None:
    x, y = world.of_targets(world.targets[:4])
    single = replace(
        subspace, models=subspace.models[:1], directions={k: d[:, :1] for k, d in subspace.directions.items()}
    )
    z = 1e-3 * np.eye(SMALL.k)
    moved = metrics.margins(displaced(single, z).logits(x).numpy(), y.numpy())
    still = metrics.margins(single.models.logits(x).numpy(), y.numpy())
    np.testing.assert_allclose((moved - still) / 1e-3, single.of_margins(x, y).T, rtol=0.05, atol=0.05)


def test_training_points_as_candidates_give_the_directions_of_highest_curvature(world: World) -> None:
    one = Metric.at(world.known.models[:1], world.known.x, world.known.y, 0.3)
    found = Subspace.of(one, one.x, one.y, 3)
    w = torch.cat([d[:, 0].flatten(1) for d in found.directions.values()], 1)
    w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
    sharpest = torch.linalg.svd(one.phi[0])[2][:3]
    np.testing.assert_allclose((w * sharpest).sum(1).abs(), 1, atol=1e-2)


@pytest.mark.parametrize("k", [0, 41])
def test_a_subspace_larger_than_its_candidates_is_refused(world: World, k: int) -> None:
    with pytest.raises(OptionError, match=f"k={k}"):
        world.subspace(k)


# --- crafting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("epsilon", [0, 16])
def test_poison_keeps_its_bounds_and_labels(world: World, subspace: Subspace, dirty: bool, epsilon: int) -> None:
    made = world.craft(subspace, dirty=dirty, angle=0.5, epsilon=epsilon)
    change = np.abs(made.images.astype(int) - made.bases.astype(int)).max()
    assert (change == 0) if epsilon == 0 else (0 < change <= epsilon)
    assert len(made) == round(SMALL.share * SMALL.n)
    np.testing.assert_array_equal(np.bincount(made.group), np.full(SMALL.k + 1, len(made) // (SMALL.k + 1)))
    pool_x, pool_y = world.pool
    flat = pool_x.reshape(len(pool_x), -1)
    source = [int(np.flatnonzero((flat == b.ravel()).all(1))[0]) for b in made.bases]
    if not dirty:
        np.testing.assert_array_equal(pool_y[source], made.labels)
    assert len(np.unique(made.bases.reshape(len(made), -1), axis=0)) == len(made), "an image is used once"


def test_crafting_pulls_harder_than_the_images_as_they_are(world: World, subspace: Subspace) -> None:
    still, made = (world.craft(subspace, dirty=True, angle=0.0, epsilon=e) for e in (0, 64))
    pull = [-(p.coordinates * p.vertices[p.group]).sum(1).mean() for p in (still, made)]
    assert pull[1] > pull[0] > 0


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])  # of 8 rows, left as they are, and of 28, pooled
def test_prepared_images_are_what_models_take(name: str) -> None:
    d = data.load(name, 20, 5)
    np.testing.assert_allclose(mlp(d, SMALL).points(d.x_val), models.pooled(d, d.x_val), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"share": 0.0}, "share"),
        ({"share": 0.51}, "share"),
        ({"shares": [0.6]}, "shares"),
        ({"epsilon": 300}, "epsilon"),
        ({"epsilons": [-1]}, "epsilons"),
        ({"n_models": 1}, "n_models"),
        ({"sizes": [25]}, "half is 25"),
        ({"sizes": []}, "sizes"),
        ({"ks": [301]}, "n_candidates"),
        ({"n_requests": 51}, "n_targets"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(PresetError, match=words):
        presets.load("laptop", {f"studies.adversary.{key}": value for key, value in given.items()})


def test_more_poison_than_there_are_images_is_refused(world: World, subspace: Subspace) -> None:
    with pytest.raises(OptionError, match="poisoned points"):
        world.craft(subspace, dirty=True, angle=0.0, share=4.0)


def test_too_few_points_are_refused(digits: data.Dataset, world: World) -> None:
    with pytest.raises(DataError, match="training points"):
        World.of(digits, SMALL.model_copy(update={"n": 390}), world.victim)


# --- requests ------------------------------------------------------------------------------------------


def ideal(k: int, size: int) -> crafting.Poison:
    """Poison whose points pull exactly along their vertices."""
    group = np.arange(size) % (k + 1)
    images = np.zeros((size, 2, 2, 1), np.uint8)
    return crafting.Poison(images, np.zeros(size, int), images, group, -geometry.regular(k)[group])


@given(st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_deleting_moves_against_the_target(k: int, seed: int) -> None:
    made, target = ideal(k, 20 * (k + 1)), np.random.default_rng(seed).standard_normal(k)
    assert made.coordinates.sum(0) == pytest.approx(0, abs=1e-9)
    moved = made.coordinates[crafting.delete_groups(made, target)].sum(0)
    cosine = moved @ target / np.linalg.norm(moved) / np.linalg.norm(target)
    assert cosine < -0.97, "up to rounding, against the gradient of the margin"


def test_a_fixed_target_deletes_one_whole_group() -> None:
    made = ideal(1, 10)
    for target in (1.0, -1.0):
        deleted = crafting.delete_groups(made, np.array([target]))
        assert len(deleted) == 5
        assert len(np.unique(made.group[deleted])) == 1
        assert (made.coordinates[deleted] * target < 0).all()


def test_most_harmful_deletes_what_holds_the_target_up() -> None:
    influence = np.array([0.5, -2.0, -1.0, 3.0, -4.0])
    np.testing.assert_array_equal(crafting.most_harmful(influence, 2, np.arange(5)), [1, 4])
    np.testing.assert_array_equal(crafting.most_harmful(influence, 2, np.arange(4)), [1, 2])


def test_influence_of_gradients_agrees_with_retraining(world: World) -> None:
    """Deleting what the gradients name lowers the targets' margins more than deleting at random."""
    influence = world.known.influence(*world.of_targets(world.targets))
    rng = np.random.default_rng(0)
    (site,) = sites(world, [world.nobody], 4)
    chosen = [crafting.most_harmful(row, 15, np.arange(SMALL.n)) for row in influence]
    random = [rng.choice(SMALL.n, 15, replace=False) for _ in chosen]
    after = []
    for requests in (chosen, random):
        z = retrain(world, site, requests, 6)
        at = SMALL.n + world.targets
        after.append(np.mean([metrics.margins(z[t][:, [at[t]]], site.data.y[[at[t]]]).mean() for t in range(len(at))]))
    assert after[0] < after[1] - 0.3


# --- the service ---------------------------------------------------------------------------------------


def test_a_service_finds_its_own_points_and_refuses_others(world: World, poison: crafting.Poison) -> None:
    (site,) = sites(world, [poison.points], 2)
    held = site.data
    np.testing.assert_array_equal(site.own, np.arange(SMALL.n - len(poison), SMALL.n))
    found = service.resolve(held, poison.images, poison.labels, site.own)
    np.testing.assert_array_equal(found, site.own)
    with pytest.raises(ForgetSetError, match="not the requester's"):
        service.resolve(held, held.x_train[:2], held.y_train[:2], site.own)
    burnt = poison.images.copy()
    burnt[0, 0, 0, 0] ^= 1
    with pytest.raises(ForgetSetError, match="never in the training set"):
        service.resolve(held, burnt, poison.labels)
    with pytest.raises(ForgetSetError, match="never in the training set"):
        service.resolve(held, poison.images, (poison.labels + 1) % 10)
    with pytest.raises(ForgetSetError, match="named more often"):
        service.resolve(held, poison.images[[0, 0]], poison.labels[[0, 0]])
    with pytest.raises(DataError, match="float"):
        service.resolve(held, poison.images / 255, poison.labels)


def test_area_of_known_scores() -> None:
    assert service.area(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 1
    assert service.area(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0.5
    assert service.area(np.array([1.0]), np.array([0.0])) == 0


def test_detection_at_false_alarms_counts_attacks_above_all_but_their_share() -> None:
    honest = np.arange(100.0)  # the threshold is 94: 5 of 100 are above it
    assert service.detected(honest, np.array([93.5, 94.5, 200.0, 0.0])) == 0.5
    rng = np.random.default_rng(0)
    found = service.resampled(service.area, honest, rng.normal(80, 10, 50))
    assert found.low < found.value < found.high
    exact = service.resampled(service.area, honest, honest + 1000)
    assert (exact.low, exact.value, exact.high) == (1, 1, 1)


def test_scores_of_random_requests_are_standard_and_of_alike_ones_high(
    world: World, prepared: experiments.Prepared
) -> None:
    site, monitor = prepared.places["honest"], prepared.monitors["honest"]
    rng = np.random.default_rng(1)
    random = monitor.scores([rng.choice(SMALL.n, 10, replace=False) for _ in range(60)])
    assert np.abs(random[:, :3].mean(0)).max() < 0.6
    assert ((random[:, :3].std(0) > 0.5) & (random[:, :3].std(0) < 1.6)).all()
    alike = monitor.scores([np.flatnonzero(site.data.y_train == c)[:10] for c in range(4)])
    assert alike[:, -1].mean() > 1, "a class that leaves together"
    energy = monitor.components([np.array([3]), np.array([5]), np.array([3, 5])])[:, 2]
    assert energy[2] <= energy[0] + energy[1] + 1e-6, "lengths obey the triangle inequality"


# --- experiments ---------------------------------------------------------------------------------------


def test_requests_are_what_each_attack_says(world: World, prepared: experiments.Prepared) -> None:
    assert list(prepared.asked) == [
        "ddpa_clean", "ddpa_dirty", "surrogate_clean", "surrogate_dirty", "random", "honest_datamodel",
        "honest_gradient", "camouflage", "never_trained",
    ]  # fmt: skip
    for name, asked in prepared.asked.items():
        for t, forget in enumerate(asked.requests):
            site = asked.site(t)
            assert len(forget) == SMALL.half
            if name in ("ddpa_clean", "ddpa_dirty", "surrogate_clean", "random", "camouflage"):
                assert np.isin(forget, site.own).all()
            if name == "never_trained":
                assert (forget >= SMALL.n).all()
    assert defence.burned(prepared) == (len(world.targets), len(world.targets))
    answers = defence.refusals(prepared)["answer"].str.startswith("served").to_list()
    assert answers == [True, False, False, False, False]


def test_sites_hold_their_own_poison_and_differ(world: World, prepared: experiments.Prepared) -> None:
    dirty = prepared.places["ddpa_dirty"]
    np.testing.assert_array_equal(dirty.data.x_train[dirty.own], prepared.crafted["ddpa_dirty"].poison.images)
    np.testing.assert_array_equal(dirty.data.x_train[: dirty.own[0]], world.data.x_train[: dirty.own[0]])
    alone = sites(world, [dirty.poison], 2)[0]
    np.testing.assert_allclose(alone.logits, dirty.logits[:2], atol=1e-3)


def test_served_tables_are_complete_and_their_summary_right(world: World, prepared: experiments.Prepared) -> None:
    options = {"do_nothing": {}, "retrain": {}, "ga": {"epochs": 1.0, "lr": 1e-3}, "dmm": {"cost": 0.1}}
    served = serving.serve(world, prepared.asked["ddpa_dirty"], options)
    assert len(served) == len(options) * SMALL.n_targets * SMALL.n_models
    nothing = served[served["method"] == "do_nothing"]
    np.testing.assert_array_equal(nothing["error"], nothing["error before"])
    np.testing.assert_array_equal(nothing["margin"], nothing["margin before"])
    table = serving.summary(served).set_index("method")
    retrained = served[served["method"] == "retrain"]
    assert table.loc["retrain", "success"] == pytest.approx(retrained["error"].mean())
    assert (table["success low"] <= table["success"]).all()
    assert (table["success"] <= table["success high"]).all()
    assert table.loc["do_nothing", "change"] == 0


def test_every_attack_is_served_by_every_method(world: World, prepared: experiments.Prepared) -> None:
    options = {name: grid[0] for name, grid in serving.OPTIONS.items()}
    few = [replace(asked, requests=asked.requests[:2]) for asked in prepared.asked.values()]
    served = pd.concat([serving.serve(world, asked, options) for asked in few])
    assert set(served["method"]) >= {
        "do_nothing", "retrain", "gd", "ga", "ga_gd", "scrub", "ssd", "oracle_matching", "dm_direct", "dmm",
    }  # fmt: skip
    counts = served.groupby(["attack", "method"]).size().unstack()
    assert (counts == 2 * SMALL.n_models).all(axis=None), "no cell of attacks x methods is empty"
    assert served.notna().all(axis=None)
    differ = served.pivot_table(index=["attack", "target", "model"], columns="method", values="margin")
    assert differ.loc["random"].std(axis=1).gt(0).all()


def test_never_trained_points_leave_datamodels_cold(world: World, prepared: experiments.Prepared) -> None:
    served = serving.serve(world, prepared.asked["never_trained"], {"dm_direct": {}})
    np.testing.assert_allclose(served["margin"], served["margin before"], atol=1e-4)


def test_the_defence_scores_every_attack_of_trained_points(world: World, prepared: experiments.Prepared) -> None:
    scores = defence.scores(world, prepared)
    malicious = scores[scores["malicious"]]
    assert set(malicious["request"]) == set(prepared.asked) - {"never_trained"}
    assert malicious.groupby("request").size().eq(len(world.targets)).all()
    assert (scores[~scores["malicious"]].groupby(["site", "request"]).size() >= SMALL.n_honest).all()
    found = defence.detection(scores)
    assert len(found) == 2 * (len(prepared.asked) - 1)
    for name in ("score", "detected at 5 %"):
        assert (found[f"{name} low"] <= found[name]).all()
        assert (found[name] <= found[f"{name} high"]).all()
        assert found[name].between(0, 1).all()


def test_an_album_is_of_one_class_and_honest(world: World) -> None:
    album = world.album(100, np.random.default_rng(0))
    assert len(np.unique(album)) == SMALL.half
    assert album.max() < 100
    assert len(np.unique(world.data.y_train[album])) == 1


def test_the_sweep_asks_every_target_of_every_case(world: World, prepared: experiments.Prepared) -> None:
    table = sweep.sweep(world, prepared)
    assert (table.groupby(["attack", "varies", "value"])["target"].nunique() == len(world.targets)).all()
    swept = serving.summary(table, ["attack", "varies", "value"]).set_index(["attack", "varies", "value"])
    assert set(swept.loc["ddpa_clean"].index.get_level_values(0)) == {"share", "bound", "k", "points deleted"}
    for attack in sweep.ATTACKS:
        assert swept.loc[(attack, "points deleted", 4), "size"] == 4
        assert swept.loc[(attack, "points deleted", SMALL.half), "size"] == SMALL.half
        after = prepared.asked[attack].retrained[np.arange(len(world.targets)), :, SMALL.n + world.targets]
        right = metrics.correct(after.swapaxes(0, 1), world.data.y_val[world.targets])
        assert swept.loc[(attack, "points deleted", SMALL.half), "success"] == pytest.approx(1 - right.mean())


def test_distances_are_measured_of_every_attack_by_every_method(world: World, prepared: experiments.Prepared) -> None:
    options = {"do_nothing": {}, "retrain": {}, "ga": {"epochs": 3.0, "lr": 1e-2}, "dm_direct": {}}
    table = serving.distances(world, prepared, options)
    assert set(table["attack"]) == {"album", *prepared.asked}
    assert len(table) == (len(prepared.asked) + 1) * len(options) * 3 * 2
    assert (table["n"] == SMALL.n_requests).all()
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    here = table[table["statistic"] == "mean_gap"]
    gaps = here.pivot_table(index="attack", columns=["method", "split"], values="value")
    cold = gaps.loc["never_trained"]
    np.testing.assert_allclose(cold["dm_direct"], cold["do_nothing"], rtol=1e-3, err_msg="it has no column for them")
    trained = gaps.drop(index="never_trained")
    assert (trained["do_nothing"]["forget"] > trained["retrain"]["forget"]).mean() > 0.5


def test_interval_covers_the_mean_of_its_table() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((40, 5))
    table = pd.DataFrame([{"target": t, "model": m, "error": values[t, m]} for t in range(40) for m in range(5)])
    e = serving.interval(table, "error", n_bootstrap=4000)
    assert e.value == pytest.approx(values.mean())
    assert e.low < e.value < e.high
    two_ways = np.sqrt(values.mean(1).var() / 40 + values.mean(0).var() / 5)
    assert two_ways < (e.high - e.low) / 2 / 1.96 < 2 * two_ways
    nobody = serving.interval(table.assign(error=False), "error")  # which is not certain, by 40 targets
    assert (nobody.low, nobody.value) == (0, 0)
    assert 0.05 < nobody.high < 0.1
