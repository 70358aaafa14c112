"""Figures can be read: colours that one can tell apart, few of them in one plot, legends beside it."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.cbook import is_math_text

from dmmlib import metrics
from dmmlib.analysis import intervals, looks, one_image, plots, stopping, tables

METHODS = [*looks.METHODS, "dm_direct@ridge", "dmm@ridge"]


def luminance(colour):
    linear = np.where(
        np.array(colour) <= 0.04045, np.array(colour) / 12.92, ((np.array(colour) + 0.055) / 1.055) ** 2.4
    )
    return float(linear @ [0.2126, 0.7152, 0.0722])


def as_deuteranope(colour):
    """Machado et al., 2009, at full severity."""
    return np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]) @ np.array(colour)


def test_methods_differ_in_colour_and_none_is_pale():
    tints = {method: looks.colour(method) for method in looks.METHODS}
    assert max(luminance(tint) for tint in tints.values()) < 0.45
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(tints.values(), 2)) > 0.1


@pytest.mark.parametrize(
    "family",
    [
        ("cf_k", "eu_k"),
        ("random_labels", "salun"),
        ("gd", "ga", "ga_gd", "neggrad_plus"),
        ("dm_direct", "dmm", "dmm@ridge"),
    ],
)
def test_families_are_told_apart_by_a_deuteranope(family):
    for one, two in itertools.combinations(family, 2):
        seen = [as_deuteranope(looks.colour(method)) for method in (one, two)]
        assert np.linalg.norm(seen[0] - seen[1]) > 0.18, (one, two)


def test_prominent_are_references_matching_and_the_best_baseline():
    scores = pd.Series(
        {"gd": 9, "retrain": 1, "newton": 7, "dmm@ridge": 4, "dmm": 3, "do_nothing": 10, "ga": 8, "x": 11}
    )
    assert looks.prominent(scores) == ["do_nothing", "retrain", "dmm", "newton", "dmm@ridge", "ga", "gd"]
    assert looks.prominent(scores[["gd"]]) == ["gd"]


def crowded():
    rng = np.random.default_rng(0)
    kloms = {method: rng.exponential(1 + i, 30) for i, method in enumerate(METHODS)}
    every = itertools.product(METHODS, "ab", looks.SPLITS, looks.HEADLINE)
    rows = [(m, s, split, statistic, 5.0, 4.0, 6.0) for m, s, split, statistic in every]
    rows += [(m, s, "all", "cost", 0.1, 0.1, 0.1) for m in METHODS for s in "ab"]
    results = pd.DataFrame(rows, columns=["method", "forget_set", "split", "statistic", "value", "low", "high"])
    track = [(m, s, "forget", c, 7.0) for m in METHODS[2:] for s in "ab" for c in (0.05, 0.1)]
    track = pd.DataFrame(track, columns=["method", "forget_set", "split", "cost", "gap"])
    sizes = [(m, n, 5.0, 4.0, 6.0, 3.0, 0.9, 0.8, 1.0) for m in METHODS for n in (10, 20)]
    columns = ["method", "n_models", "median", "low", "high", "threshold", "power", "power_low", "power_high"]
    yield plots.klom_distribution(kloms, "A finding in some words " * 4, "n")
    yield plots.gap_against_cost(results, track, "A finding in some words " * 9, "n")
    yield plots.power(pd.DataFrame(sizes, columns=columns), "A finding in some words " * 9, "n", ["dmm", "retrain"])


def test_seven_methods_are_in_colour_and_the_legend_is_beside_plot_and_title():
    for figure in crowded():
        figure.canvas.draw()
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert len(names) == 8
        assert plots.OTHER[1] in names
        box = legend.get_window_extent()
        assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
        assert not any(box.overlaps(text.get_window_extent()) for text in figure.texts)
        plt.close(figure)


def test_at_the_floor_is_said_by_the_sharpest_measure():
    """Of two sets: `near` is told by nothing; `klom` by KLoM on one set; `shifted` by KS alone, on points that stay."""
    rows = []
    for method, forget_set, split, statistic in itertools.product(
        ("retrain", "near", "klom", "shifted"), "ab", looks.SPLITS, (*looks.HEADLINE, "u_lira", "accuracy_gap")
    ):
        told = (method == "klom" and statistic == "klom_p95" and forget_set == "a" and split == "forget") or (
            method == "shifted" and statistic == "ks_share" and split == "retain"
        )
        rows.append((forget_set, method, split, statistic, 0.9 if told else 0.3, 0.7 if told else 0.1, 0.5))
    rows += [(s, m, "all", "cost", 0.1, 0.1, 0.1) for m in ("retrain", "near", "klom", "shifted") for s in "ab"]
    results = pd.DataFrame(rows, columns=["forget_set", "method", "split", "statistic", "value", "low", "high"])
    assert tables.at_the_floor(results).to_dict() == {"retrain": 2, "near": 2, "klom": 1, "shifted": 0}
    assert tables.medians(results)["at the floor"].tolist() == ["2 of 2", "2 of 2", "1 of 2", "0 of 2"]
    old = results[~results["statistic"].isin(["ks_share", "mean_gap"])]
    assert tables.at_the_floor(old)["shifted"] == 2  # a run of an earlier version has no KS test


def test_the_power_of_a_ks_test():
    assert intervals.ks_power(100, 0.0) == pytest.approx(0.037, abs=0.01)  # its level at this N, as margins are finite
    assert intervals.ks_power(20, 0.5) < 0.3 < 0.75 < intervals.ks_power(100, 0.5)
    assert tables.powers(100) == "a shift of 0.25 sd in 28%, of 0.5 sd in 83%, of 1 sd in 100% of cases"


def test_areas_of_sets_with_moments_of_their_own_are_interpolated():
    """One set is at half from start to end, one falls to 0 in the first half: no zigzag between their moments."""
    rows = [("a", "ga", m, m, 0.5, 0.0) for m in (0, 0.3, 1)] + [
        ("b", "ga", m, m, u, 0.0) for m, u in ((0, 1), (0.5, 0), (1, 0))
    ]
    shares = pd.DataFrame(rows, columns=["forget_set", "method", "moment", "cost", "under", "over"])
    area = plots.under_and_over(shares, "t", "c").axes[0].collections[0].get_paths()[0].vertices
    upper = {round(float(x), 6): y for x, y in area if y > 0}
    assert upper == pytest.approx({0.0: 0.75, 0.3: 0.45, 0.5: 0.25, 1.0: 0.25})


def test_moments_are_shares_of_the_cost(tiny):
    shares = stopping.shares(tiny)
    for _, track in shares.groupby(["method", "forget_set"]):
        np.testing.assert_allclose(track["moment"], track["cost"] / track["cost"].iloc[-1])


def test_bars_find_ends_that_are_named_after_their_value():
    table = pd.DataFrame({"change": [2.0], "change low": [1.0], "change high": [5.0], "value": [0.0], "low": [-1.0]})
    assert looks.bars(table, "change").tolist() == [[1.0], [3.0]]
    assert looks.bars(table.assign(high=2.0)).tolist() == [[1.0], [2.0]]


def test_rows_are_named_from_the_top_and_lined():
    figure, axes = plt.subplots(1, 2, sharey=True)
    looks.rows(axes, ["first", "second"])
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["first", "second"]
    assert axes[0].yaxis_inverted()
    assert all(line.get_visible() for axis in axes for line in axis.get_xgridlines())
    plt.close(figure)


def test_dollars_and_underscores_of_users_are_text():
    names, rng = ("a $x^2$ b", "_cat", "\\$5", "x_$"), np.random.default_rng(0)
    figure = plots.components(rng.normal(size=(40, 2)), np.arange(40) % 4, names, "of $a_b$", "with $\\frac$")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    shown = [*(t.get_text() for t in legend.get_texts()), figure.get_suptitle(), figure.texts[-1].get_text()]
    assert not any(map(is_math_text, shown))
    text = [words.replace(r"\$", "$") for words in shown]  # as matplotlib does with what is no formula
    assert text == ["a $x^2$ b", " _cat", r"\$5", "x_$", "of $a_b$", r"with $\frac$"]
    counts = pd.DataFrame([[1, 2]], index=["set"], columns=["$a$", "_b"])
    plots.class_counts(counts, "", "").draw_without_rendering()
    panels = [("#1 $\\x$ class", {"retrain": rng.normal(size=9), "dmm": rng.normal(size=9)})]
    plots.margin_histograms(panels, "", "").draw_without_rendering()
    plt.close("all")


def test_one_image_is_of_the_second_set_and_shown_with_what_it_rests_on(tiny):
    forget_set, point = one_image.followed(tiny)
    assert forget_set.name == list(tiny.forget_sets())[1]
    change = metrics.right_logits(tiny.attributor().effect(forget_set.indices), tiny.data.y)
    assert change[point] == change[forget_set.indices].min()
    effects = one_image.single_effects(tiny)[:, point]
    figure = one_image.held_up(tiny.data, point, effects, "title", "caption", n=3)
    own, *rest = (axis.get_title().split("\n")[-1] for axis in figure.axes)
    others = np.sort(np.delete(effects, point))
    assert own == f"itself {effects[point]:+.2f}"
    assert rest == [f"{value:+.2f}" for value in (*others[::-1][:3], *others[:3])]


def test_the_image_s_margins_have_a_row_per_method_with_a_dot_at_the_mean(tiny):
    ways = {"do_nothing": np.array([1.0, 3.0]), "retrain": np.array([-1.0, 0.0])}
    right = one_image.margins_of(tiny.data, 0, ways, "title", "caption").axes[1]
    assert [label.get_text() for label in right.get_yticklabels()] == ["do nothing", "retrain (floor)"]
    assert [float(line.get_xdata()[0]) for line in right.lines[1:4:2]] == [2.0, -0.5]
