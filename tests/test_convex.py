"""The convex setting: closed forms against retraining, theory against runs, and one clear line for bad input."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmmlib import data
from dmmlib.errors import DataError, ForgetSetError, PresetError
from dmmlib.studies import convex
from dmmlib.studies.convex.explorer import Explorer


def small(span: convex.Span = "random", condition: float = 100.0, **options: Any) -> convex.Synthetic:
    return convex.synthetic(120, 10, condition, 8, span=span, **options)


@pytest.fixture(scope="module")
def images() -> tuple[convex.Ridge, convex.Logistic]:
    digits = data.load("digits", n_train=300, n_val=50)
    return convex.image_problems(digits, 300, 4, ridge=1.0)


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
    problem = convex.Ridge(rng.normal(size=(80, 5)), rng.normal(size=(80, outputs)), 10**log_ridge)
    forget = rng.permutation(80)[:size]
    retrained = problem.without(forget).theta
    np.testing.assert_allclose(convex.oracle(problem, forget), retrained, rtol=1e-8, atol=1e-10)


def test_solutions_agree_with_scikit_learn(images: tuple[convex.Ridge, convex.Logistic]) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.linear_model import Ridge as Reference

    ridge, logistic = images
    reference = Reference(alpha=ridge.ridge, fit_intercept=False).fit(ridge.x, ridge.y).coef_.T
    np.testing.assert_allclose(ridge.theta, reference, atol=1e-8)
    model = LogisticRegression(C=1 / logistic.ridge, fit_intercept=False, tol=1e-8, max_iter=5000)
    np.testing.assert_allclose(logistic.theta, model.fit(logistic.x, logistic.y).coef_.T, atol=1e-4)


def test_one_point_is_forgotten_exactly_by_leaving_it_out() -> None:
    case = small()
    found = convex.effects(case.problem, case.forget[:1])
    np.testing.assert_allclose(found.leave_one_out, found.exact, rtol=1e-10)


@pytest.mark.parametrize("span", ["weak", "strong", "random"])
def test_leverage_bounds_the_first_order_error(span: convex.Span) -> None:
    case = small(span)
    errors = convex.group_errors(case.problem, case.forget, (1, 3, 6))
    assert errors.bound is not None
    assert (errors.errors["first-order influence"] <= errors.bound * (1 + 1e-9)).all()


def test_logistic_effects(images: tuple[convex.Ridge, convex.Logistic]) -> None:
    _, problem = images
    one = convex.logistic_effects(problem, [7])
    np.testing.assert_allclose(one.leave_one_out, one.exact, atol=1e-6)
    many = convex.logistic_effects(problem, np.arange(30))
    metric = problem.hessian(problem.theta)
    error = [convex.relative_error(e, many.exact, metric) for e in (many.newton, many.first_order)]
    assert error[0] < error[1] < 1


def test_logistic_gradient_and_hessian_are_derivatives(images: tuple[convex.Ridge, convex.Logistic]) -> None:
    _, problem = images
    rng = np.random.default_rng(0)
    theta, direction = rng.normal(size=(2, *problem.theta.shape)) / 10
    step = 1e-5
    ahead, behind = theta + step * direction, theta - step * direction
    slope = (problem.loss(ahead) - problem.loss(behind)) / (2 * step)
    assert slope == pytest.approx(np.sum(problem.gradient(theta) * direction), rel=1e-6)
    change = (problem.gradient(ahead) - problem.gradient(behind)) / (2 * step)
    np.testing.assert_allclose(change.ravel(), problem.hessian(theta) @ direction.ravel(), rtol=1e-4, atol=1e-4)


def test_half_size_datamodels_need_rescaling() -> None:
    case = convex.synthetic(200, 5, 10.0, 10)
    exact = convex.effects(case.problem, case.forget).exact
    raw = convex.subset_datamodel(case.problem, case.forget, 1500, np.random.default_rng(0))
    error = [convex.relative_error(scale * raw, exact, case.problem.hessian) for scale in (1.0, 0.5)]
    assert error[1] < 0.3
    assert error[0] > 2 * error[1]


# --- synthetic problems --------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", ["geometric", "power"])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_the_retain_set_has_the_condition_asked_for(spectrum: convex.Spectrum, condition: float) -> None:
    case = convex.synthetic(100, 6, condition, 5, spectrum=spectrum)
    np.testing.assert_allclose(np.linalg.eigvalsh(case.retain.hessian)[::-1], case.curvature, rtol=1e-8)
    assert case.curvature[0] / case.curvature[-1] == pytest.approx(condition)


# --- theory against runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("relative_step", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("span", ["weak", "strong", "random"])
def test_closed_form_is_the_run(span: convex.Span, relative_step: float) -> None:
    case = small(span)
    methods = [*convex.baselines(case, relative_step), *convex.matchers(case)]
    steps = np.array([0, 1, 2, 3, 10, 101, 300])
    for method in methods:
        run = convex.iterate(method, case.problem.theta, steps)
        theory = convex.closed_form(method, case.problem.theta, steps)
        scale = np.abs(run).max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(theory / scale, run / scale, atol=1e-9, err_msg=method.name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("span", ["weak", "strong", "random"])
def test_measured_rates_are_the_predicted_ones_to_5_percent(span: convex.Span, seed: int) -> None:
    case = small(span, seed=seed)
    start = case.problem.theta
    wrong = start + convex.effects(case.problem, case.forget).first_order
    methods = [*convex.baselines(case), *convex.matchers(case), *convex.matchers(case, wrong, "DMM")]
    for method in methods:
        measured, predicted = convex.measured_rates(method, start, 13)
        followed = np.isfinite(measured)
        assert followed.any(), method.name
        np.testing.assert_allclose(
            np.log(measured[followed]), np.log(predicted[followed]), rtol=0.05, err_msg=method.name
        )


def test_the_distance_finally_shrinks_at_the_predicted_rate() -> None:
    case = small()
    method = convex.gd(case)
    run = convex.iterate(method, case.problem.theta, np.array([0, 1500, 2000]))
    d = convex.distance(run, case.oracle)
    predicted = convex.rate(method, case.delta)
    assert np.log(d[2] / d[1]) / 500 == pytest.approx(np.log(predicted), rel=0.05)


def test_steps_to_is_where_the_run_arrives() -> None:
    case = small()
    for method in (convex.gd(case), convex.matchers(case)[1]):
        t = convex.steps_to(method, case)
        run = convex.iterate(method, case.problem.theta, np.array([0, int(t) - 1, int(t)]))
        d = convex.distance(run, case.oracle)
        assert d[2] <= 0.01 < d[1]


def test_conjugate_gradients_reach_the_oracle() -> None:
    case = small(condition=1e4)
    products = convex.conjugate_gradients(case)
    assert 1 <= products <= 3 * case.problem.x.shape[1]


@pytest.mark.parametrize("relax", [1.0, 0.3])
def test_stochastic_runs_follow_the_exact_moments(relax: float) -> None:
    case = small("random", 10.0)
    truth, start = case.oracle[:, 0], case.problem.theta[:, 0]
    for method in (convex.sgd(case, relax), convex.match_sgd(case, relax)):
        runs = convex.simulate(method, start, convex.checkpoints(7), 4000, np.random.default_rng(0))
        measured = np.sqrt(np.mean(np.sum((runs - truth) ** 2, 2), 1))
        expected = convex.Moments(method, case).expected(7)
        np.testing.assert_allclose(measured / measured[0], expected, rtol=0.05, err_msg=method.name)


def test_matching_has_no_noise_floor_and_obeys_its_bound() -> None:
    case = small("random", 10.0)
    noisy = convex.Moments(convex.sgd(case), case)
    assert noisy.floor() > 1
    assert noisy.steps_to() == np.inf
    assert 1e4 < convex.sgd_cost(case) < np.inf
    method = convex.match_sgd(case)
    matching = convex.Moments(method, case)
    assert matching.floor() < 1e-12
    expected = matching.expected(9) ** 2
    bound = method.contraction ** convex.checkpoints(9)
    assert (expected <= bound * (1 + 1e-9) + 1e-25).all()


# --- the claim on matching -----------------------------------------------------------------------------


def test_matching_on_aligned_points_ignores_the_retain_spectrum() -> None:
    def steps(condition: float) -> tuple[float, float]:
        case = convex.synthetic(120, 10, condition, 8, span="weak")
        return convex.steps_to(convex.gd(case), case), convex.steps_to(convex.matchers(case)[0], case)

    easy, hard = steps(1e2), steps(1e5)
    assert hard[0] > 300 * easy[0]
    assert hard[1] <= 1.5 * easy[1]


def test_matching_on_f_stops_where_its_span_ends() -> None:
    case = small("random")
    share = convex.unreachable(case.x_forget, case.delta)
    assert 0.01 < share < 1
    assert convex.steps_to(convex.matchers(case)[0], case) == np.inf


@pytest.mark.parametrize("span", ["weak", "random"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_leverage_bounds_speed_up_and_error(span: convex.Span, factor: float) -> None:
    h, speed_up, error = convex.trade_off(convex.scaled_forget(small(span), factor))
    assert 0 < h < 1
    assert speed_up <= (1 + 1e-9) / (1 - h)
    assert error <= h * (1 + 1e-9)


# --- logistic runs -------------------------------------------------------------------------------------


def test_logistic_methods_move_and_matching_arrives(images: tuple[convex.Ridge, convex.Logistic]) -> None:
    _, problem = images
    forget = np.arange(10)
    truth = problem.theta + convex.logistic_effects(problem, forget).exact
    traces = convex.logistic_traces(problem, forget, 8, np.random.default_rng(0))
    end = {name: convex.distance(trace.path, truth, problem.x)[-1] for name, trace in traces.items()}
    assert all(np.abs(t.path[-1] - problem.theta).max() > 0 for t in traces.values())
    assert end["OM on S"] < end["GD on R"] < 1
    assert end["Newton steps"] < 0.01
    assert end["GD on R, linearised"] == pytest.approx(end["GD on R"], rel=0.05)


# --- sliders -------------------------------------------------------------------------------------------


def test_explorer_redraws_and_leaves_a_picture() -> None:
    explorer = Explorer(convex.ConvexSettings(n=100, dim=6, forget_size=5))
    bundle = explorer._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    (condition, _), (step, _) = (row.children for row in explorer.children[:2])
    message, picture = explorer.children[2:]
    before = picture.value
    condition.value = 1e2
    assert picture.value != before
    step.value = 2.1  # beyond stability: said in a line, and the picture stays
    before = picture.value
    assert "diverges beyond 2 / L" in message.value
    step.value = 1.5
    assert picture.value != before
    assert message.value == ""


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [[], list(range(120)), [0, 0], [-1], [120], [0.5], [[1]]])
def test_bad_forget_sets(forget: list[int]) -> None:
    with pytest.raises(ForgetSetError):
        convex.effects(small().problem, forget)


@pytest.mark.parametrize("ridge", [0.0, -1.0, np.nan, np.inf])
def test_bad_ridge(ridge: float) -> None:
    with pytest.raises(DataError, match="positive"):
        convex.Ridge(np.ones((3, 1)), np.ones((3, 1)), ridge)


def test_bad_arrays() -> None:
    x, y = np.ones((3, 2)), np.ones((3, 1))
    with pytest.raises(DataError, match="NaN"):
        convex.Ridge(np.where(x > 0, np.nan, x), y, 1.0)
    with pytest.raises(DataError, match="shape"):
        convex.Ridge(x, y[:2], 1.0)
    with pytest.raises(DataError, match="outputs"):
        convex.Ridge(x, y[:, 0], 1.0)
    with pytest.raises(DataError, match="singular"):
        _ = convex.Ridge(1e12 * x, y, 1e-12).theta
    with pytest.raises(DataError, match="classes"):
        convex.Logistic(x, np.array([0, 1, 2]), 1.0, 2)
    with pytest.raises(DataError, match="images"):
        convex.image_problems(data.load("digits", n_train=20, n_val=5), 21, 4, 1.0)


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
def test_bad_settings(bad: dict) -> None:
    with pytest.raises(PresetError):
        convex.synthetic(**{"n": 120, "dim": 8, "condition": 10.0, "forget_size": 6} | bad)


@pytest.mark.parametrize("relative_step", [0.0, -1.0, 2.1, np.nan])
def test_bad_steps(relative_step: float) -> None:
    case = small()
    with pytest.raises(PresetError, match="step"):
        convex.gd(case, relative_step)
    with pytest.raises(PresetError, match="step"):
        convex.sgd(case, relative_step)
