"""KLoM to its golden values and definition; the other evaluators by their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import ks_2samp

from dmmlib import metrics, tuning
from dmmlib.errors import DataError
from tests.conftest import SHARED

GOLDEN = SHARED / "golden" / "klom_reference.npz"


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not there: golden values lie beside the project's own checkout only")
    with np.load(GOLDEN) as archive:
        return dict(archive)


@pytest.mark.parametrize(("convention", "key"), [("closed", "klom_closed_last_bin"), ("easydub", "klom_open_last_bin")])
def test_klom_equals_golden_values(golden, convention, key):
    found = metrics.klom(golden["unlearned_margins"], golden["oracle_margins"], convention)
    np.testing.assert_allclose(found, golden[key], atol=1e-5)


def by_numpy(u, o, n_bins=20):
    """The definition, a point at a time, with numpy.histogram."""
    values = []
    for p, q in zip(*(np.clip(m.astype(float), -100, 100).T for m in (u, o)), strict=True):
        span = (min(p.min(), q.min()), max(p.max(), q.max()))
        p, q = (np.histogram(m, n_bins, span)[0] / len(m) for m in (p, q))
        q = np.maximum(q, 1e-5)
        values.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    return np.array(values)


@settings(max_examples=60)
@given(
    arrays(np.float64, (7, 5), elements=st.floats(-150, 150, width=16)),
    arrays(np.float64, (9, 5), elements=st.floats(-150, 150, width=16)),
)
def test_klom_is_its_definition(u, o):
    np.testing.assert_allclose(metrics.klom(u, o), by_numpy(u, o), atol=1e-9)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n_bins", [2, 20, 300])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1, 30])
@pytest.mark.parametrize("offset", [0, -3.3, 99])
def test_every_margin_is_in_numpys_bin(kind, n_bins, scale, offset):
    rng = np.random.default_rng(4)
    smooth, tied = rng.normal(size=(300, 12)), rng.integers(-9, 9, (300, 12))  # ties lie on edges
    constant = np.ones((300, 2))
    u, o = np.split((np.hstack([smooth, tied, constant]) * scale + offset).astype(kind), 2)
    np.testing.assert_allclose(metrics.klom(u, o, n_bins=n_bins), by_numpy(u, o, n_bins), atol=1e-9)


def test_klom_of_many_points_equals_klom_of_each(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)  # several blocks of points
    rng = np.random.default_rng(0)
    u, o = rng.normal(size=(50, 40)), rng.normal(1, 2, size=(60, 40))
    whole = metrics.klom(u, o)
    np.testing.assert_allclose(
        whole, np.concatenate([metrics.klom(u[:, i : i + 1], o[:, i : i + 1]) for i in range(40)])
    )
    assert (whole >= 0).all()
    assert whole.max() <= -np.log(1e-5) + 1e-9


def test_klom_tells_same_from_different():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 100, 300))
    assert metrics.klom(a, b).mean() < 1 < 10 < metrics.klom(a + 20, b).mean()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_klom_refuses_margins_that_are_not_finite(value):
    u = np.zeros((4, 3))
    u[0, 0] = value
    with pytest.raises(DataError, match=r"1 NaN or infinite.*lower its learning rate"):
        metrics.klom(u, np.zeros((4, 3)))


def test_klom_refuses_other_points_and_other_conventions():
    with pytest.raises(DataError, match="3 points and oracle margins 4"):
        metrics.klom(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(DataError, match="n_models >= 1"):
        metrics.klom(np.zeros((0, 3)), np.zeros((2, 3)))
    with pytest.raises(DataError, match="'closed' or 'easydub'"):
        metrics.klom(np.zeros((2, 3)), np.zeros((2, 3)), "open")


def test_margins_are_log_odds():
    rng = np.random.default_rng(2)
    z, y = rng.normal(size=(3, 6, 4)), rng.integers(0, 4, 6)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    right = np.take_along_axis(p, y[None, :, None], 2)[..., 0]
    np.testing.assert_allclose(metrics.margins(z, y), np.log(right / (1 - right)), rtol=1e-5)
    np.testing.assert_allclose(metrics.margins(z + 7, y), metrics.margins(z, y), atol=1e-5)


def test_margins_take_integers_and_let_nan_through():
    logits, labels = np.array([[[2, 0, 1], [0, 1, 5]]]), np.array([0, 1])
    np.testing.assert_array_equal(metrics.margins(logits, labels), metrics.margins(logits.astype(np.float32), labels))
    diverged = np.array([[[np.nan, 0.0], [0.0, 1.0]]])
    np.testing.assert_array_equal(metrics.margins(diverged, np.array([0, 1])), np.float32([[np.nan, 1]]))


def test_a_diverged_model_is_never_correct():
    logits = np.full((2, 3, 3), np.nan)
    logits[0] = np.eye(3)
    logits[1, 1] = [0, 1, np.nan]
    assert metrics.correct(logits, np.arange(3)).tolist() == [[True] * 3, [False] * 3]
    assert metrics.correct(logits, np.zeros(3, int)).tolist() == [[True, False, False], [False] * 3]


def test_margins_refuse_labels_outside_the_classes():
    with pytest.raises(DataError, match="Labels go from 0 to 4; logits have 4 classes"):
        metrics.margins(np.zeros((1, 2, 4)), np.array([0, 4]))


def test_summary_has_intervals_that_hold_the_estimate_and_shrink_with_models():
    rng = np.random.default_rng(3)
    splits = {"forget": np.arange(10), "retain": np.arange(10, 60)}
    widths = []
    for n in (20, 200):
        s = metrics.klom_summary(rng.normal(size=(n, 60)), rng.normal(size=(n, 60)), splits)
        for split in splits:
            for e in s[split].values():
                assert e.low <= e.value <= e.high
        widths.append(s["retain"]["mean"].high - s["retain"]["mean"].low)
    assert widths[1] < widths[0]


def test_summary_agrees_with_klom():
    rng = np.random.default_rng(4)
    u, o = rng.normal(size=(30, 12)), rng.normal(size=(30, 12))
    s = metrics.klom_summary(u, o, {"all": np.arange(12)})
    assert s["all"]["mean"].value == pytest.approx(metrics.klom(u, o).mean(), rel=1e-5)
    assert s["all"]["p95"].value == pytest.approx(np.percentile(metrics.klom(u, o), 95), rel=1e-5)


def test_u_lira_is_at_chance_on_equals_and_sure_of_opposites():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 200, 100))
    assert metrics.u_lira(a, b).mean() == pytest.approx(0.5, abs=0.02)
    assert metrics.u_lira(a + 10, b).mean() > 0.99


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e-3, 1, 1e200])
def test_u_lira_of_identical_and_of_disjoint_samples(scale):
    sample = np.random.default_rng(5).normal(1, 0.1, size=(8, 3)) * scale
    np.testing.assert_allclose(metrics.u_lira(sample, sample), 0.5)
    np.testing.assert_allclose(metrics.u_lira(sample, -sample), 1)
    np.testing.assert_allclose(metrics.u_lira(sample, 9 * sample), 1)
    constant = np.full((4, 3), scale)
    np.testing.assert_allclose(metrics.u_lira(constant, constant), 0.5)
    np.testing.assert_allclose(metrics.u_lira(constant, 2 * constant), 1)


def test_u_lira_depends_on_no_scale_or_offset():
    a, b = np.random.default_rng(6).normal(size=(2, 20, 30)) + np.array([[[0.0]], [[1.0]]])
    right = metrics.u_lira(a, b)
    assert 0.6 < right.mean() < 0.8
    for scale, offset in ((1e-5, 0.0), (1e-8, 1e-7), (1e-12, 0.0), (1e5, 3.0)):
        np.testing.assert_allclose(metrics.u_lira(a * scale + offset, b * scale + offset), right)


@pytest.mark.parametrize("n", [1, 0, -1, 2.5, None])
def test_an_interval_needs_two_draws(n):
    with pytest.raises(DataError, match=r"n_bootstrap=.*at least 2"):
        metrics.klom_summary(np.zeros((4, 2)), np.zeros((4, 2)), {"all": np.arange(2)}, n_bootstrap=n)


@pytest.mark.parametrize("at", [[], [2], [-1], [0.5], [[0]], [True]])
def test_splits_hold_positions_of_points(at):
    m, correct = np.zeros((4, 2)), np.ones((4, 2), bool)
    for measure in (
        lambda splits: metrics.klom_summary(m, m, splits),
        lambda splits: metrics.accuracy_gap(correct, correct, splits),
        lambda splits: tuning.score(m, m, splits),
    ):
        with pytest.raises(DataError, match=r"Split 'odd' .*positions of points, 0 to 1"):
            measure({"odd": np.array(at)})


def test_u_lira_needs_models_for_both_halves():
    with pytest.raises(DataError, match="n_models >= 4"):
        metrics.u_lira(np.zeros((3, 2)), np.zeros((4, 2)))


def test_ks_is_scipys():
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 5, (20, 8)), rng.integers(1, 6, (30, 8))
    np.testing.assert_allclose(metrics.ks(a, b), [ks_2samp(x, y).statistic for x, y in zip(a.T, b.T, strict=True)])
    a, b = rng.normal(size=(100, 40)), rng.normal(0.3, 1, size=(100, 40))
    exact = [ks_2samp(x, y, method="exact").pvalue for x, y in zip(a.T, b.T, strict=True)]
    np.testing.assert_allclose(metrics.ks_p_values(a, b), exact, atol=0.03)


def test_gaps_are_differences_of_means_in_the_oracles_sd():
    oracle = np.array([[0.0, 1.0], [2.0, 5.0]])
    np.testing.assert_allclose(metrics.gaps(oracle + 2 * 2**0.5, oracle), [2.0, 1.0])


def test_gap_and_ks_where_the_answer_is_known():
    """Alike on half of the points and 1 sd apart on the other: a share of .05 at most there, and nearly all here."""
    rng, halves = np.random.default_rng(7), {"alike": np.arange(500), "apart": np.arange(500, 1000)}
    u, o = rng.normal(size=(2, 100, 1000))
    u[:, 500:] += 1
    found = metrics.gap_summary(u, o, halves)
    alike, apart = found["alike"], found["apart"]
    assert alike["mean_gap"].value == pytest.approx(np.sqrt(2 / 100) * np.sqrt(2 / np.pi), rel=0.1)
    assert apart["mean_gap"].value == pytest.approx(1.0, abs=0.03)
    assert alike["ks_share"].value <= 0.06
    assert alike["ks_fdr"].value < 0.01
    assert apart["ks_share"].value > 0.98
    assert 0.98 < apart["ks_fdr"].value <= apart["ks_share"].value
    assert all(e.low <= e.value <= e.high for parts in found.values() for e in parts.values())
    far = metrics.gap_summary(u + 40, o, halves)["apart"]["mean_gap"].value
    assert far == pytest.approx(41, rel=0.02)  # where KLoM has long been at its end


def test_gaps_need_a_spread():
    with pytest.raises(DataError, match="n_models >= 2"):
        metrics.gap_summary(np.zeros((3, 2)), np.zeros((1, 2)), {"all": np.arange(2)})


def test_accuracy_gap():
    u, o = np.ones((10, 4), bool), np.zeros((10, 4), bool)
    o[:5, 0] = True
    gaps = metrics.accuracy_gap(u, o, {"first": np.array([0]), "rest": np.array([1, 2, 3])})
    assert gaps["first"].value == pytest.approx(0.5)
    assert gaps["rest"].value == pytest.approx(1.0)
    assert gaps["first"].low < 0.5 < gaps["first"].high


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.ones((2, 3, 2)), np.zeros(3), "Labels are float64; give integers"),
        (np.ones((2, 3, 2)), np.zeros(3, bool), "Labels are bool"),
        (np.ones((2, 3, 2)), np.zeros((3, 1), int), r"labels \(3, 1\)"),
        (np.ones((2, 3, 2), complex), np.zeros(3, int), "give numbers"),
        (np.full((2, 3, 2), "a"), np.zeros(3, int), "give numbers"),
        (1.0, np.zeros(3, int), r"shape \(\)"),
    ],
)
def test_logits_and_labels_of_other_types_are_refused(logits, labels, message):
    with pytest.raises(DataError, match=message):
        metrics.margins(logits, labels)


def test_tensors_with_a_gradient_or_of_half_precision_are_taken():
    logits, labels = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([0, 0])
    for values in (logits.requires_grad_(), logits.bfloat16(), logits.double()):
        np.testing.assert_array_equal(metrics.margins(values, labels), [[2, -1]])
        np.testing.assert_array_equal(metrics.correct(values, labels), [[True, False]])
    assert metrics.klom(logits[0].bfloat16(), logits[0]).tolist() == [0, 0]


def test_numbers_of_half_precision_are_not_reckoned_in_it():
    rng, splits = np.random.default_rng(0), {"all": np.arange(20)}
    u, o = (30 * rng.normal(size=(100, 20)) + shift for shift in (30, 0))
    half, double = (metrics.gap_summary(u.astype(k), o.astype(k), splits)["all"] for k in (np.float16, np.float64))
    assert half["mean_gap"].value == pytest.approx(double["mean_gap"].value, rel=1e-3)
    logits, labels = rng.normal(size=(3, 20, 5)).astype(np.float16) * 20, np.zeros(20, int)
    exact = metrics.margins(logits.astype(np.float64), labels)
    np.testing.assert_allclose(metrics.margins(logits, labels), exact, atol=1e-5)
    np.testing.assert_array_equal(metrics.margins(logits.astype(">f8"), labels), exact)


def test_the_gauge_of_large_logits_is_the_margin():
    logits, labels = np.array([[[1e9 + 1, 1e9], [1e9, 1e9 + 3]]]), np.array([0, 0])
    np.testing.assert_array_equal(metrics.margin_gauge(logits, labels), [[[1, 0], [-3, 0]]])


@pytest.mark.parametrize("labels", [np.array([0, 1, -1]), np.array([0, 1, 3]), np.array([0]), np.array([0.0, 1, 2])])
def test_labels_that_are_none_are_not_called_correct(labels):
    with pytest.raises(DataError, match="Labels"):
        metrics.correct(np.eye(3)[None], labels)


@pytest.mark.parametrize(
    ("unlearned", "oracle", "message"),
    [
        (np.ones((2, 5)), np.ones((2, 9)), "give both for the same points"),
        (np.ones((1, 5)), np.ones((2, 5)), "n_models >= 2"),
        (np.full((2, 5), np.nan), np.ones((2, 5)), "NaN"),
    ],
)
def test_gaps_that_would_mean_nothing_are_refused(unlearned, oracle, message):
    with pytest.raises(DataError, match=message):
        metrics.accuracy_gap(unlearned, oracle, {"all": np.arange(5)})


@pytest.mark.parametrize("odd", [np.full((4, 3), "a"), np.ones((4, 3), complex), np.float64(1), np.ones((4, 3), bool)])
def test_margins_that_are_no_numbers_are_refused(odd):
    with pytest.raises(DataError, match="margins have shape"):
        metrics.klom(odd, np.ones((4, 3)))


@pytest.mark.parametrize("n_bins", [1, 2.5, 10**9])
def test_bins_that_cannot_be_counted_are_refused(n_bins):
    with pytest.raises(DataError, match="use 2 to 10,000"):
        metrics.klom(np.zeros((4, 3)), np.ones((4, 3)), n_bins=n_bins)
