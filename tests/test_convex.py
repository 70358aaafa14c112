"""The convex setting: closed forms against retraining, theory against runs, and one clear line for bad input."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmmlib import data, presets
from dmmlib.errors import DataError, ForgetSetError, PresetError
from dmmlib.studies.convex import compare, iterations, stochastic
from dmmlib.studies.convex.images import image_problems
from dmmlib.studies.convex.logistic import Logistic, logistic_traces
from dmmlib.studies.convex.ridge import Ridge, relative_error, subset_datamodel
from dmmlib.studies.convex.settings import ConvexSettings
from dmmlib.studies.convex.synthetic import Span, Spectrum, Synthetic, scaled_forget, synthetic_regression
from dmmlib.widgets.explorer import STEPS, Explorer


def small(span: Span = "random", condition: float = 100.0, **options: Any) -> Synthetic:
    return synthetic_regression(120, 10, condition, 8, span=span, **options)


@pytest.fixture(scope="module")
def images() -> tuple[Ridge, Logistic]:
    digits = data.load("digits", n_train=300, n_val=50)
    return image_problems(digits, 300, 4, ridge=1.0)


# --- closed forms --------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    size=st.integers(1, 60),
    outputs=st.integers(1, 3),
    log_ridge=st.floats(-4, 2),
    seed=st.integers(0, 2**16),
)
def test_woodbury_oracle_is_retraining(size: int, outputs: int, log_ridge: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = Ridge(rng.normal(size=(80, 5)), rng.normal(size=(80, outputs)), 10**log_ridge)
    forget = rng.permutation(80)[:size]
    oracle = problem.theta + problem.effects(forget)["exact"]
    np.testing.assert_allclose(oracle, problem.without(forget).theta, rtol=1e-8, atol=1e-10)


def test_solutions_agree_with_scikit_learn(images: tuple[Ridge, Logistic]) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.linear_model import Ridge as Reference

    ridge, logistic = images
    reference = Reference(alpha=ridge.ridge, fit_intercept=False).fit(ridge.x, ridge.y).coef_.T
    np.testing.assert_allclose(ridge.theta, reference, atol=1e-8)
    model = LogisticRegression(C=1 / logistic.ridge, fit_intercept=False, solver="newton-cholesky", tol=1e-10)
    np.testing.assert_allclose(logistic.theta, model.fit(logistic.x, logistic.y.argmax(1)).coef_.T, atol=1e-8)


def test_one_point_is_forgotten_exactly_by_leaving_it_out() -> None:
    case = small()
    found = case.problem.effects(case.forget[:1])
    np.testing.assert_allclose(found["sum of leave-one-out"], found["exact"], rtol=1e-10)


@pytest.mark.parametrize("span", ["weak", "strong", "random"])
def test_leverage_bounds_the_first_order_error(span: Span) -> None:
    case = small(span)
    errors = compare.group_errors(case.problem, case.forget, (1, 3, 6))
    assert (errors["first-order influence"] <= errors[compare.BOUND] * (1 + 1e-9)).all()


def test_logistic_effects(images: tuple[Ridge, Logistic]) -> None:
    _, problem = images
    one = problem.effects([7])
    np.testing.assert_allclose(one["sum of leave-one-out"], one["exact"], atol=1e-6)
    errors = compare.group_errors(problem, np.arange(30), (1, 30)).loc[30]
    assert errors["one Newton step on R"] < errors["first-order influence"] < 1
    assert compare.BOUND not in errors


def test_logistic_gradient_and_hessian_are_derivatives(images: tuple[Ridge, Logistic]) -> None:
    _, problem = images
    rng = np.random.default_rng(0)
    theta, direction = rng.normal(size=(2, *problem.theta.shape)) / 10
    step = 1e-5
    ahead, behind = theta + step * direction, theta - step * direction
    slope = (problem.loss(ahead) - problem.loss(behind)) / (2 * step)
    assert slope == pytest.approx(np.sum(problem.gradient(theta) * direction), rel=1e-6)
    change = (problem.gradient(ahead) - problem.gradient(behind)) / (2 * step)
    np.testing.assert_allclose(change.ravel(), problem.hessian_at(theta) @ direction.ravel(), rtol=1e-4, atol=1e-4)


def test_half_size_datamodels_need_rescaling() -> None:
    case = synthetic_regression(200, 5, 10.0, 10)
    exact = case.problem.effects(case.forget)["exact"]
    raw = subset_datamodel(case.problem, case.forget, 1500, np.random.default_rng(0))
    error = [relative_error(scale * raw, exact, case.problem.hessian) for scale in (1.0, 0.5)]
    assert error[1] < 0.3
    assert error[0] > 2 * error[1]


# --- synthetic problems --------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", ["geometric", "power"])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_the_retain_set_has_the_condition_asked_for(spectrum: Spectrum, condition: float) -> None:
    case = synthetic_regression(100, 6, condition, 5, spectrum=spectrum)
    np.testing.assert_allclose(np.linalg.eigvalsh(case.retain.hessian)[::-1], case.curvature, rtol=1e-8)
    assert case.curvature[0] / case.curvature[-1] == pytest.approx(condition)


# --- theory against runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("relative_step", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("span", ["weak", "strong", "random"])
def test_closed_form_is_the_run(span: Span, relative_step: float) -> None:
    case = small(span)
    steps = np.array([0, 1, 2, 3, 10, 101, 300])
    for name, method in iterations.descents(case, relative_step).items():
        run = iterations.iterate(method, case.problem.theta, steps)
        theory = iterations.closed_form(method, case.problem.theta, steps)
        scale = np.abs(run).max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(theory / scale, run / scale, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("span", ["weak", "strong", "random"])
def test_measured_rates_are_the_predicted_ones_to_5_percent(span: Span) -> None:
    case = small(span)
    problem, start = case.problem, case.problem.theta
    wrong = problem.x @ (start + problem.effects(case.forget)["first-order influence"])
    for method in [*iterations.descents(case).values(), iterations.match("DMM", problem.x, wrong)]:
        measured, predicted = iterations.measured_rates(method, start, 13)
        followed = np.isfinite(measured)
        assert followed.any(), method.name
        rates = np.log(measured[followed]), np.log(predicted[followed])
        np.testing.assert_allclose(*rates, rtol=0.05, err_msg=method.name)


def test_the_distance_finally_shrinks_at_the_predicted_rate() -> None:
    case = small()
    method = iterations.descents(case)["GD on R"]
    run = iterations.iterate(method, case.problem.theta, np.array([0, 1500, 2000]))
    d = iterations.distance(run, case.oracle)
    predicted = iterations.rate(method, case.delta)
    assert np.log(d[2] / d[1]) / 500 == pytest.approx(np.log(predicted), rel=0.05)


@pytest.mark.parametrize("name", ["GD on R", "OM on S"])
def test_steps_to_is_where_the_run_arrives(name: str) -> None:
    case = small()
    method = iterations.descents(case)[name]
    t = int(iterations.steps_to(method, case))
    d = iterations.distance(iterations.iterate(method, case.problem.theta, np.array([0, t - 1, t])), case.oracle)
    assert d[2] <= 0.01 < d[1]


def test_conjugate_gradients_reach_the_oracle() -> None:
    case = small(condition=1e4)
    assert 1 <= iterations.conjugate_gradients(case) <= 3 * case.problem.x.shape[1]
    assert iterations.conjugate_gradients(case, 0.5) < iterations.conjugate_gradients(case, 1e-4)


@pytest.mark.parametrize("relax", [1.0, 0.3])
def test_stochastic_runs_follow_the_exact_moments(relax: float) -> None:
    case = small("random", 10.0)
    for method in (stochastic.sgd(case, relax), stochastic.match_sgd(case, relax)):
        runs = method.simulate(iterations.checkpoints(7), 4000, np.random.default_rng(0))
        measured = np.sqrt(np.mean(np.sum(runs**2, 2), 1))
        np.testing.assert_allclose(measured / measured[0], method.expected(7), rtol=0.05, err_msg=method.name)


def test_matching_has_no_noise_floor_and_obeys_its_bound() -> None:
    case = small("random", 10.0)
    noisy = stochastic.sgd(case)
    assert noisy.floor() > 1
    assert noisy.steps_to() == np.inf
    assert 1e4 < stochastic.sgd_cost(case) < np.inf
    method = stochastic.match_sgd(case)
    assert method.floor() < 1e-12
    expected = method.expected(9) ** 2
    squares = np.linalg.svd(method.x, compute_uv=False) ** 2
    bound = (1 - squares[-1] / squares.sum()) ** iterations.checkpoints(9)  # Strohmer and Vershynin, theorem 2
    assert (expected <= bound * (1 + 1e-9) + 1e-25).all()


# --- the claim on matching -----------------------------------------------------------------------------


def test_matching_on_aligned_points_ignores_the_retain_spectrum() -> None:
    easy, hard = (compare.costs(small("weak", condition)) for condition in (1e2, 1e5))
    assert hard["GD on R"] > 300 * easy["GD on R"]
    assert hard["OM on F"] <= 1.5 * easy["OM on F"]


def test_matching_on_f_stops_where_its_span_ends() -> None:
    case = small("random")
    assert 0.01 < iterations.unreachable(case.x_forget, case.delta) < 1
    assert iterations.steps_to(iterations.descents(case)["OM on F"], case) == np.inf


@pytest.mark.parametrize("span", ["weak", "random"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_leverage_bounds_speed_up_and_error(span: Span, factor: float) -> None:
    h, speed_up, error = compare.trade_off(scaled_forget(small(span), factor))
    assert 0 < h < 1
    assert speed_up <= (1 + 1e-9) / (1 - h)
    assert error <= h * (1 + 1e-9)


# --- logistic runs -------------------------------------------------------------------------------------


def test_logistic_methods_move_and_matching_arrives(images: tuple[Ridge, Logistic]) -> None:
    _, problem = images
    forget = np.arange(10)
    truth = problem.theta + problem.effects(forget)["exact"]
    traces = logistic_traces(problem, forget, 8, np.random.default_rng(0))
    end = {name: iterations.distance(trace.path, truth, problem.x)[-1] for name, trace in traces.items()}
    assert all(np.abs(t.path[-1] - problem.theta).max() > 0 for t in traces.values())
    assert end["OM on S"] < end["GD on R"] < 1
    assert end["Newton steps"] < 0.01
    assert end["GD on R, linearised"] == pytest.approx(end["GD on R"], rel=0.05)


# --- sliders -------------------------------------------------------------------------------------------


@pytest.fixture
def explorer() -> Explorer:
    return Explorer(ConvexSettings(n=100, dim=6, forget_size=5, group_sizes=(1, 5)))


def sent(explorer: Explorer) -> np.ndarray:
    """What the browser draws (panels, methods, steps)."""
    panels, methods = explorer.view.about["panels"], explorer.view.about["methods"]
    return np.frombuffer(explorer.view.values, np.float32).reshape(len(panels), len(methods), -1)


def test_explorer_redraws_and_leaves_a_picture(explorer: Explorer) -> None:
    bundle, about = explorer._repr_mimebundle_()  # what a notebook asks for
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "oracle" in about["image/png"]["alt"]
    before = explorer.view.values, explorer.view.label
    explorer.controls["condition"].value = 1e2
    assert (explorer.view.values, explorer.view.label) != before
    before = explorer.view.values, explorer.view.label
    explorer.controls["relative_step"].value = 2.1  # beyond stability: said in a line, and the curves stay
    assert "diverges beyond 2 / L" in explorer.message.value
    assert (explorer.view.values, explorer.view.label) == before
    explorer.controls["relative_step"].value = 1.5
    assert explorer.view.values != before[0]
    assert explorer.message.value == ""


@pytest.mark.parametrize("span", ["weak", "random"])
def test_curves_that_are_sent_are_the_closed_form(explorer: Explorer, span: Span) -> None:
    explorer.controls["span"].value, explorer.controls["forget_size"].value = span, 9
    case = synthetic_regression(100, 6, explorer.controls["condition"].value, 9, span=span)
    methods, curves = iterations.descents(case), sent(explorer)
    assert [name for name, *_ in explorer.view.about["methods"]] == [*methods, "DMM, first order"]
    np.testing.assert_array_equal(np.frombuffer(explorer.view.steps, np.float32), STEPS)
    for k, (name, method) in enumerate(methods.items()):
        path = iterations.closed_form(method, case.problem.theta, STEPS)
        for panel, x in zip(curves, (None, case.x_forget, case.x_val), strict=True):
            expected = iterations.distance(path, case.oracle, x).clip(1e-30, 1e30)
            np.testing.assert_allclose(panel[k], expected, rtol=1e-6, err_msg=name)


def test_what_each_method_comes_to_is_said(explorer: Explorer) -> None:
    explorer.controls["span"].value = "random"
    words = {name: end for name, *_, end in explorer.view.about["methods"]}
    for (name, end), line in zip(words.items(), sent(explorer)[0], strict=True):
        assert f"{name} {end}" in explorer.view.label
        if not end.startswith("within 1 % by step "):
            assert not line[-1] <= 0.01
            assert end == (f"ends at {line[-1]:.2g}" if line[-1] < 1000 else "ends beyond 1,000")
            continue
        at = list(STEPS).index(int(end.split()[-1].replace(",", "")))
        assert line[at - 1] > 0.01
        assert (line[at:] <= 0.01).all()
    assert words["GA on F"] == "ends beyond 1,000"
    assert words["GD on R"].startswith("within")


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [[], list(range(120)), [0, 0], [-1], [120], [0.5], [[1]]])
def test_bad_forget_sets(forget: list[int]) -> None:
    with pytest.raises(ForgetSetError):
        small().problem.effects(forget)


@pytest.mark.parametrize("ridge", [0.0, -1.0, np.nan, np.inf])
def test_bad_ridge(ridge: float) -> None:
    with pytest.raises(DataError, match="positive"):
        Ridge(np.ones((3, 1)), np.ones((3, 1)), ridge)


def test_bad_arrays() -> None:
    x, y = np.ones((3, 2)), np.ones((3, 1))
    with pytest.raises(DataError, match="NaN"):
        Ridge(np.where(x > 0, np.nan, x), y, 1.0)
    with pytest.raises(DataError, match="shape"):
        Ridge(x, y[:2], 1.0)
    with pytest.raises(DataError, match="outputs"):
        Ridge(x, y[:, 0], 1.0)
    with pytest.raises(DataError, match="singular"):
        _ = Ridge(1e12 * x, y, 1e-12).theta
    with pytest.raises(DataError, match="one-hot"):
        Logistic(x, np.array([[0.0], [1.0], [2.0]]), 1.0)
    with pytest.raises(DataError, match="images"):
        image_problems(data.load("digits", n_train=20, n_val=5), 21, 4, 1.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"condition": 0.5},
        {"condition": np.nan},
        {"dim": 1},
        {"forget_size": 0},
        {"forget_size": 115},
        {"span": "sideways"},
        {"spectrum": "flat"},
        {"tilt": 2.0},
    ],
)
def test_bad_problems(bad: dict) -> None:
    with pytest.raises(PresetError):
        synthetic_regression(**{"n": 120, "dim": 8, "condition": 10.0, "forget_size": 6} | bad)


@pytest.mark.parametrize("relative_step", [0.0, -1.0, 2.1, np.nan])
def test_bad_steps(relative_step: float) -> None:
    case = small()
    with pytest.raises(PresetError, match="diverges beyond"):
        iterations.descents(case, relative_step)
    with pytest.raises(PresetError, match="relax"):
        stochastic.sgd(case, relative_step)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"dim": 1}, "greater than or equal to 2"),
        ({"conditions": [10]}, "at least 2"),
        ({"group_sizes": [5, 2]}, "sizes that grow"),
        ({"n": 210}, "too few"),
        ({"image_n": 150}, "more images"),
        ({"noise": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_by_the_preset(bad: dict, words: str) -> None:
    with pytest.raises(PresetError, match=words):
        presets.load("laptop", {f"studies.convex.{key}": value for key, value in bad.items()})
