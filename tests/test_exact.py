"""Exact unlearning: exact in law and caught when it is not, below its bound, safe on disk, clear on bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmmlib import data
from dmmlib.errors import DataError, ForgetSetError, PresetError, StoreError
from dmmlib.studies import exact
from dmmlib.studies.exact import chains, compare, evidence, experiments, problem

SETTINGS = exact.ExactSettings(n_runs=2000, n_permutations=199)
LEVEL = 0.01
LINEAR = exact.Loss("linear", lambda s, y: -y * s, lambda s, y: -y, lambda s, y: 0 * s, lipschitz=1.0)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", n_train=200, n_val=60)


@pytest.fixture(scope="module")
def found(digits: data.Dataset) -> experiments.Exactness:
    return experiments.exactness(digits, SETTINGS)


@pytest.fixture(scope="module")
def few(digits: data.Dataset) -> problem.Problem:
    return problem.from_images(digits, 3, SETTINGS.positive)[0].part(np.arange(30))


def sgd(**changes: Any) -> exact.SGD:
    return replace(exact.SGD(n_steps=12, batch_size=5, lr=1.0, radius=5.0, noise=0.2), **changes)


NOISELESS = {"noise": 0.0, "variant": "subsample"}


# --- exactness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["retrained again", "deleted", "inserted", "after 5 requests", "deleted, subsample"])
def test_right_ways_are_distributed_as_retraining(found: experiments.Exactness, way: str) -> None:
    assert found.verdicts[way].p > LEVEL
    assert 0.2 < found.recomputed < 0.8, "a test that never refuses, or always, shows little"


@pytest.mark.parametrize("way", list(experiments.BROKEN))
def test_wrong_couplings_are_caught(found: experiments.Exactness, way: str) -> None:
    assert found.verdicts[way].p < LEVEL


def test_many_runs_still_find_no_difference(digits: data.Dataset) -> None:
    points, settings_, point = experiments.small(digits, SETTINGS)
    rng = np.random.default_rng(5)
    without = np.ones((50_000, points.n), bool)
    gone = [point, (point + 1) % points.n]  # in one walk
    without[:, gone] = False
    unlearned, _ = exact.delete(points, exact.learn(points, settings_, 50_000, rng), gone, rng)
    again = exact.learn(points, settings_, without, rng)
    p = evidence.ks(*(c.iterates[:, 1:].reshape(50_000, -1) for c in (unlearned, again)))
    assert evidence.holm(p) > LEVEL
    shares = np.bincount(unlearned.batches.ravel(), minlength=points.n) / unlearned.batches.size
    np.testing.assert_allclose(np.delete(shares, gone), 1 / (points.n - 2), atol=2e-3)
    assert (shares[gone] == 0).all()


@settings(max_examples=10)
@given(shift=st.floats(0.05, 3), noise=st.floats(0.1, 2), seed=st.integers(0, 2**16))
def test_reflection_is_the_maximal_coupling(shift: float, noise: float, seed: int) -> None:
    from scipy.stats import kstest, norm

    rng = np.random.default_rng(seed)
    old, new = np.zeros((20_000, 2)), np.full((20_000, 2), shift)
    step, refused = chains.reflection(old + noise * rng.standard_normal(old.shape), old, new, noise, rng)
    for j in range(2):
        assert kstest((step[:, j] - shift) / noise, "norm").pvalue > 1e-5
    tv = 2 * norm.cdf(shift * np.sqrt(2) / (2 * noise)) - 1
    assert abs(refused.mean() - tv) < 5 * np.sqrt(0.25 / 20_000)


def test_a_state_after_requests_is_one_of_training(few: problem.Problem) -> None:
    rng = np.random.default_rng(0)
    state = exact.learn(few, sgd(), 50, rng)
    kept = state.copy()
    for change, points in ((exact.delete, [3, 4]), (exact.insert, 4), (exact.delete, rng.integers(10, 30, (50, 1)))):
        state, receipt = change(few, state, points, rng)
        runs = np.repeat(np.arange(50), 12)
        means = few.mean_gradient(state.iterates[:, :-1].reshape(600, -1), state.batches.reshape(600, -1))
        np.testing.assert_allclose(state.means.reshape(600, -1), means, atol=1e-12)
        moved = problem.project(state.iterates[:, :-1] - state.sgd.lr * state.steps, state.sgd.radius)
        np.testing.assert_allclose(state.iterates[:, 1:], moved, atol=1e-12)
        assert state.present[runs[:, None], state.batches.reshape(600, -1)].all()
        assert (receipt.recomputed == (receipt.since < 12)).all()
    assert all((getattr(kept, k) == getattr(kept.copy(), k)).all() for k in ("steps", "batches"))


def test_without_noise_recomputes_exactly_where_a_batch_held_the_point(few: problem.Problem) -> None:
    rng = np.random.default_rng(0)
    state = exact.learn(few, sgd(**NOISELESS), 200, rng)
    after, receipt = exact.delete(few, state, 7, rng)
    held = (state.batches == 7).any(2)
    first = np.where(held.any(1), held.argmax(1), 12)
    np.testing.assert_array_equal(receipt.since, first)
    np.testing.assert_array_equal(receipt.cost > 0, held.any(1))
    for run in range(200):
        np.testing.assert_array_equal(after.iterates[run, : first[run] + 1], state.iterates[run, : first[run] + 1])
    assert (receipt.cost <= 2 * sgd().work).all()


# --- the price -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"noise": 0.05}, {"batch_size": 1}, {"n_steps": 40}, NOISELESS])
def test_price_is_below_its_bound(few: problem.Problem, changes: dict[str, Any]) -> None:
    rng, chain = np.random.default_rng(2), sgd(**changes)
    _, receipt = exact.delete(few, exact.learn(few, chain, 3000, rng), rng.integers(0, 30, (3000, 1)), rng)
    bound = exact.recomputation_bound(chain, few.n, few.lipschitz)
    assert exact.tv_bound(chain, few.n, few.lipschitz) <= bound
    error = 4 * np.sqrt(bound * (1 - bound) / 3000)
    assert receipt.recomputed.mean() <= bound + error
    if not chain.noise:
        assert receipt.recomputed.mean() >= bound - error


def test_bound_is_attained_where_gradients_are_as_far_apart_as_they_can_be() -> None:
    opposite = problem.Problem(np.ones((10, 1)), np.r_[-1.0, np.ones(9)], LINEAR)
    chain, rng = exact.SGD(20, 4, 0.1, 5.0, 0.7), np.random.default_rng(0)
    _, receipt = exact.delete(opposite, exact.learn(opposite, chain, 20_000, rng), 0, rng)
    assert abs(receipt.recomputed.mean() - exact.recomputation_bound(chain, 10, 1.0)) < 0.015


def test_tv_bound_holds_where_the_distance_is_known() -> None:
    opposite = problem.Problem(np.ones((100, 1)), np.r_[-1.0, np.ones(99)], LINEAR)
    chain, rng = exact.SGD(10, 50, 0.1, 1e6, 0.5), np.random.default_rng(0)
    a = exact.learn(opposite, chain, 20_000, rng).final[:, 0]
    b = exact.learn(opposite.part(np.arange(1, 100)), chain, 20_000, rng).final[:, 0]
    from scipy.stats import ks_2samp

    assert 0.02 < ks_2samp(a, b).statistic <= exact.tv_bound(chain, 100, 1.0) < 0.5


# --- on disk -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(few: problem.Problem, tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    exact.save(path, few, exact.learn(few, sgd(), 3, np.random.default_rng(0)))
    return path


def test_stream_is_kept_and_repeats_are_refused(few: problem.Problem, saved: Path) -> None:
    requests = [exact.Request("delete", 4), exact.Request("delete", [1, 2]), exact.Request("insert", 4)]
    assert len(list(exact.serve(saved, few, sgd(), requests, np.random.default_rng(1)))) == 3
    state = exact.load(saved, few, sgd())
    assert np.flatnonzero(~state.present[0]).tolist() == [1, 2]
    stream = exact.serve(
        saved, few, sgd(), [exact.Request("delete", 9), exact.Request("delete", 2)], np.random.default_rng(2)
    )
    next(stream)
    with pytest.raises(ForgetSetError, match=r"Point 2 .* deleted before"):
        next(stream)
    assert np.flatnonzero(~exact.load(saved, few, sgd()).present[0]).tolist() == [1, 2, 9]


def test_deleted_points_may_be_erased_from_the_data(few: problem.Problem, saved: Path) -> None:
    list(exact.serve(saved, few, sgd(), [exact.Request("delete", 4)], np.random.default_rng(1)))
    x = few.x.copy()
    x[4] = 0
    exact.load(saved, problem.Problem(x, few.y), sgd())
    x[5] = 0
    with pytest.raises(StoreError, match="another model: its training points"):
        exact.load(saved, problem.Problem(x, few.y), sgd())


def test_failed_write_leaves_the_old_state(few: problem.Problem, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StoreError, match="No space left"):
        list(exact.serve(saved, few, sgd(), [exact.Request("delete", 4)], np.random.default_rng(1)))
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


KILLED = """
import sys, numpy as np
from dmmlib.studies import exact
from dmmlib.studies.exact.problem import Problem
points = Problem(np.eye(40), np.resize([-1.0, 1.0], 40))
chain = exact.SGD(400, 5, 1.0, 5.0, 0.2)
rng = np.random.default_rng()
exact.save(sys.argv[1], points, exact.learn(points, chain, 20, rng))
print("ready", flush=True)
for _ in range(10000):
    for kind in ("delete", "insert"):
        list(exact.serve(sys.argv[1], points, chain, [exact.Request(kind, 3)], rng))
"""


def test_kill_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    points = problem.Problem(np.eye(40), np.resize([-1.0, 1.0], 40))
    path = tmp_path / "state.safetensors"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.4)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    state = exact.load(path, points, exact.SGD(400, 5, 1.0, 5.0, 0.2))
    assert state.present.sum(1).tolist() in ([40] * 20, [39] * 20)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_state_is_refused(few: problem.Problem, saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(StoreError, match="cannot be read as saved chains"):
        exact.load(saved, few, sgd())


def test_damaged_foreign_and_missing_states_are_refused(few: problem.Problem, saved: Path) -> None:
    for changes in ({"noise": 0.3}, {"batch_size": 6}, {"lr": 0.5}, NOISELESS):
        with pytest.raises(StoreError, match="another model: its sgd"):
            exact.load(saved, few, sgd(**changes))
    with pytest.raises(StoreError, match="of other data: 30 points, expected 20"):
        exact.load(saved, few.part(np.arange(20)), sgd())
    with pytest.raises(StoreError, match="cannot be read"):
        exact.load(saved.with_name("none"), few, sgd())
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        exact.load(saved, few, sgd())


def test_state_that_contradicts_itself_is_refused(few: problem.Problem, saved: Path) -> None:
    state = exact.load(saved, few, sgd()).copy()
    state.steps[0, 3] += 0.1
    exact.save(saved, few, state)
    with pytest.raises(StoreError, match="contradicts itself"):
        exact.load(saved, few, sgd())


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (30, "Point 30 was never in the data of 30 points"),
        (-1, "Point -1 was never"),
        ([2, 2], "Point 2 is named twice"),
        ([], "names 0 points"),
        (1.5, "give integers"),
        (list(range(30)), "the last one"),
        (np.zeros((7, 1), int), "one row of points"),
    ],
)
def test_bad_requests(few: problem.Problem, points: Any, message: str) -> None:
    state = exact.learn(few, sgd(), 2, np.random.default_rng(0))
    with pytest.raises(ForgetSetError, match=message):
        exact.delete(few, state, points, np.random.default_rng(1))


def test_points_are_deleted_and_inserted_once(few: problem.Problem) -> None:
    rng = np.random.default_rng(0)
    state, _ = exact.delete(few, exact.learn(few, sgd(), 2, rng), 3, rng)
    with pytest.raises(ForgetSetError, match=r"Point 3 .* deleted before, or never inserted"):
        exact.delete(few, state, 3, rng)
    with pytest.raises(ForgetSetError, match=r"Point 5 .* in the training set already"):
        exact.insert(few, state, 5, rng)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": 0.0}, "The noisy variant has noise=0.0; give a positive"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"variant": "subsample"}, "leave it at 0"),
        ({"variant": "quiet"}, "Unknown variant 'quiet'"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_steps": 2.5}, "n_steps=2.5; give a whole number"),
    ],
)
def test_bad_training(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        sgd(**changes)


def test_losses_must_give_a_lipschitz_constant_and_keep_it(few: problem.Problem) -> None:
    square = exact.Loss("square", lambda s, y: (s - y) ** 2, lambda s, y: 2 * (s - y), lambda s, y: 2 + 0 * s)
    with pytest.raises(DataError, match="'square' has the Lipschitz constant None"):
        problem.Problem(few.x, few.y, square)
    claimed = problem.Problem(few.x, few.y, replace(square, lipschitz=0.5))
    with pytest.raises(DataError, match=r"slope of 2, above its Lipschitz constant 0.5"):
        exact.learn(claimed, sgd(), 2, np.random.default_rng(0))
    with pytest.raises(DataError, match="has norm 2"):
        problem.Problem(2 * np.eye(2), np.ones(2))
    with pytest.raises(DataError, match="give -1 and 1"):
        problem.Problem(np.eye(2), np.zeros(2))


# --- what it is compared with --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(digits: data.Dataset) -> compare.Task:
    train, val = problem.from_images(digits, 3, SETTINGS.positive)
    return compare.Task(train, val, np.arange(5), 30)


def test_newton_step_leaves_less_gradient_than_it_certifies(task: compare.Task) -> None:
    b = np.random.default_rng(0).standard_normal((30, task.train.dim))
    rest = task.train.part(np.flatnonzero(task.retained[0]))
    original, oracle = (compare.fit(p, 0.01, b) for p in (task.train, rest))
    unlearned, beta = compare.newton_step(rest, 0.01, b, original)
    left = np.linalg.norm(compare._gradient(rest, 0.01, b, unlearned), axis=1)
    assert (left <= beta).all()
    assert (left > 0).all()
    assert (np.linalg.norm(unlearned - oracle, axis=1) < 0.1 * np.linalg.norm(original - oracle, axis=1)).all()


def test_outcomes_have_costs_and_guarantees(task: compare.Task) -> None:
    rng, chain = np.random.default_rng(0), exact.SGD(40, 10, 1.0, 5.0, variant="subsample")
    sharded = compare.sisa(task, chain, 4, rng).row(task)
    stable = compare.tv_stable(task, replace(chain, noise=0.3, variant="noisy"), rng).row(task)
    assert sharded["cost of one point"] == pytest.approx(0.25)
    assert sharded["cost of one point"] < sharded["cost"] <= 1
    assert stable["cost of one point"] < stable["cost"] <= 1.1
    assert {sharded["guarantee"], stable["guarantee"]} == {"exact"}
    small, large = (compare.certified_newton(task, v, 0.1, 1e-4, 400, rng) for v in (0.1, 1.0))
    assert float(large.guarantee[1:].split(",")[0]) < float(small.guarantee[1:].split(",")[0])


def test_settings_build_and_a_step_too_long_for_the_bound_is_refused(digits: data.Dataset) -> None:
    with pytest.raises(PresetError, match=r"exact.lr=5, but the bound on the risk needs a step below 4"):
        experiments.risk(digits, replace(SETTINGS, lr=5.0))
