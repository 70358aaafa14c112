"""Exact unlearning: exact in law and caught when it is not, below its bound, safe on disk, clear on bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, kstest, norm

from dmmlib import data, ensemble, presets
from dmmlib.errors import DataError, ForgetSetError, PresetError, StoreError
from dmmlib.studies.exact import compare, experiments
from dmmlib.studies.exact.chains import SGD, delete, insert, learn, recomputation_bound, reflection, tv_bound
from dmmlib.studies.exact.evidence import BROKEN
from dmmlib.studies.exact.problem import Problem, from_images, optimum, project
from dmmlib.studies.exact.settings import ExactSettings
from dmmlib.studies.exact.state import Request, load, save, serve

SETTINGS = ExactSettings(n_runs=2000, n_permutations=199)
LEVEL = 0.01


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", n_train=200, n_val=60)


@pytest.fixture(scope="module")
def found(digits: data.Dataset) -> experiments.Exactness:
    return experiments.exactness(digits, SETTINGS)


@pytest.fixture(scope="module")
def few(digits: data.Dataset) -> Problem:
    return from_images(digits, 3, SETTINGS.positive)[0].part(np.arange(30))


def sgd(**changes: Any) -> SGD:
    return replace(SGD(n_steps=12, batch_size=5, lr=1.0, radius=5.0, noise=0.2), **changes)


NOISELESS = {"noise": 0.0}


# --- exactness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["retrained again", "deleted", "inserted", "after 5 requests", "deleted, subsample"])
def test_right_ways_are_distributed_as_retraining(found: experiments.Exactness, way: str) -> None:
    assert found.p_values.loc[way, "both"] > LEVEL
    assert 0.2 < found.recomputed < 0.8, "a test that never refuses, or always, shows little"


@pytest.mark.parametrize("way", list(BROKEN))
def test_wrong_couplings_are_caught(found: experiments.Exactness, way: str) -> None:
    assert found.p_values.loc[way, "both"] < LEVEL


def test_many_runs_still_find_no_difference(digits: data.Dataset) -> None:
    points, chain, point = experiments.small(digits, SETTINGS)
    rng = np.random.default_rng(5)
    without = np.ones((50_000, points.n), bool)
    gone = [point, (point + 1) % points.n]  # in one walk
    without[:, gone] = False
    unlearned, _ = delete(points, learn(points, chain, 50_000, rng), gone, rng)
    again = learn(points, chain, without, rng)
    p = ks_2samp(unlearned.iterates[:, 1:], again.iterates[:, 1:], axis=0, method="asymp").pvalue
    assert p.size * p.min() > LEVEL
    shares = np.bincount(unlearned.batches.ravel(), minlength=points.n) / unlearned.batches.size
    np.testing.assert_allclose(np.delete(shares, gone), 1 / (points.n - 2), atol=2e-3)
    assert (shares[gone] == 0).all()


@settings(max_examples=10)
@given(shift=st.floats(0.05, 3), noise=st.floats(0.1, 2), seed=st.integers(0, 2**16))
def test_reflection_is_the_maximal_coupling(shift: float, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = np.zeros((20_000, 2)), np.full((20_000, 2), shift)
    step, refused = reflection(old + noise * rng.standard_normal(old.shape), old, new, noise, rng)
    for j in range(2):
        assert kstest((step[:, j] - shift) / noise, "norm").pvalue > 1e-5
    tv = 2 * norm.cdf(shift * np.sqrt(2) / (2 * noise)) - 1
    assert abs(refused.mean() - tv) < 5 * np.sqrt(0.25 / 20_000)


def test_a_state_after_requests_is_one_of_training(few: Problem) -> None:
    rng = np.random.default_rng(0)
    state = learn(few, sgd(), 50, rng)
    kept = deepcopy(state)
    first = state
    for change, points in ((delete, [3, 4]), (insert, 4), (delete, rng.integers(10, 30, (50, 1)))):
        state, receipt = change(few, state, points, rng)
        runs = np.repeat(np.arange(50), 12)
        means = few.mean_gradient(state.iterates[:, :-1].reshape(600, -1), state.batches.reshape(600, -1))
        np.testing.assert_allclose(state.means.reshape(600, -1), means, atol=1e-12)
        moved = project(state.iterates[:, :-1] - state.sgd.lr * state.steps, state.sgd.radius)
        np.testing.assert_allclose(state.iterates[:, 1:], moved, atol=1e-12)
        assert state.present[runs[:, None], state.batches.reshape(600, -1)].all()
        assert (receipt.recomputed == (receipt.since < 12)).all()
    assert all((getattr(kept, k) == getattr(first, k)).all() for k in ("present", "batches", "means", "steps"))


def test_without_noise_recomputes_exactly_where_a_batch_held_the_point(few: Problem) -> None:
    rng = np.random.default_rng(0)
    state = learn(few, sgd(**NOISELESS), 200, rng)
    after, receipt = delete(few, state, 7, rng)
    held = (state.batches == 7).any(2)
    first = np.where(held.any(1), held.argmax(1), 12)
    np.testing.assert_array_equal(receipt.since, first)
    np.testing.assert_array_equal(receipt.cost > 0, held.any(1))
    for run in range(200):
        np.testing.assert_array_equal(after.iterates[run, : first[run] + 1], state.iterates[run, : first[run] + 1])
    assert (receipt.cost <= 2 * sgd().work).all()


# --- the price -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"noise": 0.05}, {"batch_size": 1}, {"n_steps": 40}, NOISELESS])
def test_price_is_below_its_bound(few: Problem, changes: dict[str, Any]) -> None:
    rng, chain = np.random.default_rng(2), sgd(**changes)
    _, receipt = delete(few, learn(few, chain, 3000, rng), rng.integers(0, 30, (3000, 1)), rng)
    bound = recomputation_bound(chain, few.n)
    assert tv_bound(chain, few.n) <= bound
    error = 4 * np.sqrt(bound * (1 - bound) / 3000)
    assert receipt.recomputed.mean() <= bound + error
    if not chain.noise:
        assert receipt.recomputed.mean() >= bound - error


def opposite(n: int) -> Problem:
    """One point of the other label in the same place: gradients differ by exactly 1 wherever w is, so L = 1/2."""
    return Problem(np.ones((n, 1)), np.r_[-1.0, np.ones(n - 1)])


def test_bound_is_attained_where_gradients_are_as_far_apart_as_they_can_be() -> None:
    chain, rng = SGD(20, 4, 0.1, 5.0, 0.7), np.random.default_rng(0)
    _, receipt = delete(opposite(10), learn(opposite(10), chain, 20_000, rng), 0, rng)
    assert abs(receipt.recomputed.mean() - recomputation_bound(chain, 10, 0.5)) < 0.015


def test_tv_bound_is_above_the_distance_of_last_iterates() -> None:
    points, chain, rng = opposite(100), SGD(10, 50, 0.1, 1e6, 0.25), np.random.default_rng(0)
    a, b = (learn(p, chain, 20_000, rng).iterates[:, -1, 0] for p in (points, points.part(np.arange(1, 100))))
    assert 0.02 < ks_2samp(a, b).statistic <= tv_bound(chain, 100, 0.5) < 0.5


# --- on disk -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(few: Problem, tmp_path: Path) -> Path:
    path = tmp_path / "state.npz"
    save(path, few, learn(few, sgd(), 3, np.random.default_rng(0)))
    return path


def asked(path: Path, points: Problem, *requests: Request) -> list[Any]:
    return list(serve(path, points, sgd(), requests, np.random.default_rng(1)))


def test_stream_is_kept_and_repeats_are_refused(few: Problem, saved: Path) -> None:
    assert len(asked(saved, few, Request("delete", 4), Request("delete", [1, 2]), Request("insert", 4))) == 3
    assert np.flatnonzero(~load(saved, few, sgd()).present[0]).tolist() == [1, 2]
    with pytest.raises(ForgetSetError, match=r"Point 2 .* deleted before"):
        asked(saved, few, Request("delete", 9), Request("delete", 2))
    assert np.flatnonzero(~load(saved, few, sgd()).present[0]).tolist() == [1, 2, 9]
    with pytest.raises(ForgetSetError, match="'forget'"):
        asked(saved, few, Request("forget", 3))  # type: ignore[arg-type]


def test_deleted_points_may_be_erased_from_the_data(few: Problem, saved: Path) -> None:
    asked(saved, few, Request("delete", 4))
    x = few.x.copy()
    x[4] = 0
    load(saved, Problem(x, few.y), sgd())
    x[5] = 0
    with pytest.raises(StoreError, match="the training data"):
        load(saved, Problem(x, few.y), sgd())


def test_failed_write_leaves_the_old_state(few: Problem, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StoreError, match="No space left"):
        asked(saved, few, Request("delete", 4))
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


KILLED = """
import sys, numpy as np
from pathlib import Path
from dmmlib.studies.exact.chains import SGD, learn
from dmmlib.studies.exact.problem import Problem
from dmmlib.studies.exact.state import Request, save, serve
points = Problem(np.eye(40), np.resize([-1.0, 1.0], 40))
chain = SGD(400, 5, 1.0, 5.0, 0.2)
rng = np.random.default_rng()
path = Path(sys.argv[1])
save(path, points, learn(points, chain, 20, rng))
print("ready", flush=True)
for _ in range(10000):
    for kind in ("delete", "insert"):
        list(serve(path, points, chain, [Request(kind, 3)], rng))
"""


def test_kill_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    points = Problem(np.eye(40), np.resize([-1.0, 1.0], 40))
    path = tmp_path / "state.npz"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.4)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    state = load(path, points, SGD(400, 5, 1.0, 5.0, 0.2))
    assert state.present.sum(1).tolist() in ([40] * 20, [39] * 20)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_state_is_refused(few: Problem, saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(StoreError, match="cannot be read"):
        load(saved, few, sgd())


def test_damaged_foreign_and_missing_states_are_refused(few: Problem, saved: Path) -> None:
    for changes in ({"noise": 0.3}, {"batch_size": 6}, {"lr": 0.5}, NOISELESS):
        with pytest.raises(StoreError, match="the sgd"):
            load(saved, few, sgd(**changes))
    with pytest.raises(StoreError, match="number of points 30, expected 20"):
        load(saved, few.part(np.arange(20)), sgd())
    with pytest.raises(StoreError, match="does not exist"):
        load(saved.with_name("none"), few, sgd())
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        load(saved, few, sgd())


def test_state_that_contradicts_itself_is_refused(few: Problem, saved: Path) -> None:
    state = deepcopy(load(saved, few, sgd()))
    state.steps[0, 3] += 0.1
    save(saved, few, state)
    with pytest.raises(StoreError, match="contradicts itself"):
        load(saved, few, sgd())


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (30, "30 is outside"),
        (-1, "-1 is outside"),
        ([2, 2], "2 is given 2 times"),
        ([], "is empty"),
        (1.5, "give integers"),
        (list(range(30)), "leave some"),
        (np.zeros((7, 1), int), "one row of points"),
    ],
)
def test_bad_requests(few: Problem, points: Any, message: str) -> None:
    state = learn(few, sgd(), 2, np.random.default_rng(0))
    with pytest.raises(ForgetSetError, match=message):
        delete(few, state, points, np.random.default_rng(1))


def test_points_are_deleted_and_inserted_once(few: Problem) -> None:
    rng = np.random.default_rng(0)
    state, _ = delete(few, learn(few, sgd(), 2, rng), 3, rng)
    with pytest.raises(ForgetSetError, match=r"Point 3 .* never inserted"):
        delete(few, state, 3, rng)
    with pytest.raises(ForgetSetError, match=r"Point 5 .* already"):
        insert(few, state, 5, rng)
    with pytest.raises(ForgetSetError, match="the last one"):
        delete(few, state, np.delete(np.arange(30), 3), rng)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": -0.1}, "noise=-0.1"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_steps": 2.5}, "whole number"),
    ],
)
def test_bad_training(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        sgd(**changes)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (2 * np.eye(2), np.ones(2), "norm 2"),
        (np.eye(2), np.zeros(2), "-1 and 1"),
        (np.eye(2), np.ones(3), "shape"),
    ],
)
def test_bad_points(x: np.ndarray, y: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Problem(x, y)


def test_runs_need_points(few: Problem) -> None:
    nobody = np.zeros((2, few.n), bool)
    with pytest.raises(DataError, match="empty"):
        learn(few, sgd(), nobody, np.random.default_rng(0))
    with pytest.raises(DataError, match="shape"):
        learn(few, sgd(), nobody[:, :5], np.random.default_rng(0))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"lr": 5.0}, "less than 4"),
        ({"noises": [0.5, 0.1]}, "noises that grow"),
        ({"shards": []}, "at least 1"),
        ({"small_n": 2}, "greater than or equal to 3"),
        ({"dmm_costs": [1.5]}, "less than or equal to 1"),
    ],
)
def test_bad_settings_are_refused_by_the_preset(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(PresetError, match=words):
        presets.load("laptop", {f"studies.exact.{key}": value for key, value in bad.items()})


# --- what it is compared with --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(digits: data.Dataset) -> compare.Task:
    train, val = from_images(digits, 3, SETTINGS.positive)
    return compare.Task(train, val, np.arange(5), 30)


def test_optimum_has_no_gradient_and_the_least_risk(few: Problem) -> None:
    best = optimum(few, 10.0)
    gradient = few.mean_gradient(best, np.arange(few.n)[None])[0]
    assert np.linalg.norm(best) == pytest.approx(10.0) or np.linalg.norm(gradient) < 1e-6
    np.testing.assert_allclose(project(best - gradient, 10.0), best, atol=1e-4)
    assert few.risk(best) <= few.risk(0.99 * best) + 1e-9


def test_newton_step_leaves_less_gradient_than_it_certifies(task: compare.Task) -> None:
    b = np.random.default_rng(0).standard_normal((30, task.train.dim))
    rest = task.train.part(np.flatnonzero(task.retained[0]))
    original, oracle = (compare.fit(p, 0.01, b) for p in (task.train, rest))
    unlearned, beta = compare.newton_step(rest, 0.01, b, original)
    left = np.linalg.norm(compare.gradient(rest, 0.01, b, unlearned), axis=1)
    assert (left <= beta).all()
    assert (left > 0).all()
    assert (np.linalg.norm(unlearned - oracle, axis=1) < 0.1 * np.linalg.norm(original - oracle, axis=1)).all()


def test_rows_have_costs_and_guarantees(task: compare.Task) -> None:
    rng, chain = np.random.default_rng(0), SGD(40, 10, 1.0, 5.0)
    sharded = compare.sisa(task, chain, 4, rng)
    stable = compare.tv_stable(task, replace(chain, noise=0.3), rng)
    assert sharded["cost of one point"] == pytest.approx(0.25)
    assert sharded["cost of one point"] < sharded["cost"] <= 1
    assert stable["cost of one point"] < stable["cost"] <= 1.1
    assert {sharded["guarantee"], stable["guarantee"]} == {"exact"}
    assert all(row[part] >= 0 for row in (sharded, stable) for part in ("forget", "retain", "validation", "floor"))
    assert all(row["forget low"] <= row["forget"] and row["floor"] <= row["floor high"] for row in (sharded, stable))
    small, large = (compare.certified_newton(task, v, 0.1, 1e-4, 400, rng) for v in (0.1, 1.0))
    assert float(large["guarantee"][1:].split(",")[0]) < float(small["guarantee"][1:].split(",")[0])


def test_matching_spends_what_it_is_given(task: compare.Task) -> None:
    training = ensemble.Training(3, 20, 2.0, momentum=0.0, weight_decay=0.0)
    rows = pd.DataFrame(compare.dmm(task, training, 200, 0.05, (0.1, 0.4), 0))
    np.testing.assert_allclose(rows["cost"], [0.1, 0.4], rtol=0.2)
    assert (rows[["forget", "retain", "validation", "accuracy"]] >= 0).all(axis=None)
    assert (rows["guarantee"] == "none").all()
