"""Claims are judged by rules that were fixed before the run, and the run refuses to go on where they changed."""

import fnmatch
import hashlib
import re
import runpy
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dmmlib.analysis import confirm
from dmmlib.app import report
from dmmlib.errors import PresetError
from dmmlib.files import read_json, read_table
from dmmlib.presets import load
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims.yaml"
PAGE, REQUESTS = CLAIMS.with_suffix(".md"), CLAIMS.with_stem("claims_requests")
RUNS = [("confirm", CLAIMS, ROOT / "README.md", "docs/claims.md"), ("requests", REQUESTS, PAGE, REQUESTS.name)]
runs = pytest.mark.parametrize(("preset", "path", "page", "link"), RUNS, ids=["confirm", "requests"])


def results(ratios, baseline=20.0, width=0.1):
    """Of one statistic, on sets of two seeds: retraining at 2, dmm at `ratios` times that."""
    rows = []
    for i, ratio in enumerate(ratios):
        for method, value in (("retrain", 2.0), ("dmm", 2 * ratio), ("ga", baseline)):
            rows.append((i % 2, f"set_{i}", method, "forget", "mean_gap", value, value - width, value + width))
    return pd.DataFrame(rows, columns=["seed", "forget_set", "method", "split", "statistic", "value", "low", "high"])


def plan(**claim):
    whole = {"id": "a", "text": "a", "statistic": "mean_gap", "split": "forget", "method": "dmm", "to": "retrain"}
    return confirm.Plan.model_validate({"seeds": [1], "level": 0.05, "claims": [whole | {"form": "ratio"} | claim]})


def judged(table, **claim):
    return confirm.judge(plan(**claim), table).iloc[0]


def test_a_mean_ratio_is_geometric_and_judged_by_its_interval():
    table = results([1.0, 1.21] * 10)
    found = judged(table, over="mean", at_most=1.2)
    assert found["value"] == pytest.approx(1.1)
    assert (found["n"], found["verdict"]) == (20, "shown")
    error = 2.093 * np.log(1.21) / 2 * np.sqrt(20 / 19) / np.sqrt(20)  # Student's, of 19 degrees of freedom
    assert np.log(found["high"] / 1.1) == pytest.approx(error, rel=1e-3)
    assert judged(table, over="mean", at_most=1.12)["verdict"] == "open"
    assert judged(table, over="mean", at_most=1.02)["verdict"] == "refuted"


def test_the_level_is_shared_by_all_claims():
    one = plan(over="mean", at_most=1.2)
    many = one.model_copy(update={"claims": one.claims * 10})
    widths = [np.diff(confirm.judge(p, results([1.0, 1.21] * 10)).loc[0, ["low", "high"]])[0] for p in (one, many)]
    assert widths[1] > 1.4 * widths[0]


def test_every_pair_a_difference_and_baselines():
    table = results([1.0, 1.3, 1.5])
    assert judged(table, at_most=1.6)["verdict"] == "shown"
    found = judged(table, at_most=1.4)
    assert (found["value"], found["verdict"]) == (pytest.approx(2 / 3), "refuted")
    assert judged(table, at_most=1.4, sets="set_[01]")["verdict"] == "shown"
    assert judged(table, form="difference", over="mean", at_most=5)["value"] == pytest.approx(1.6 / 3)
    assert judged(table, form="ahead", to="baselines")["verdict"] == "shown"
    assert judged(results([1.0], baseline=2.1), form="ahead", to="baselines")["verdict"] == "refuted"  # intervals touch
    assert judged(table[table["method"] != "ga"], form="ahead", to="baselines")["verdict"] == "not run"
    assert judged(table, statistic="klom_p95")["verdict"] == "not run"


def test_claims_that_are_none_are_refused(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(CLAIMS.read_text("utf-8").replace("form: ahead", "form: ahead\n    over: mean"), "utf-8")
    with pytest.raises(PresetError, match=r"(?s)holds no claims.*is over .mean. pairs"):
        confirm.load(path)
    with pytest.raises(PresetError, match="no claims"):
        confirm.load(tmp_path / "absent.yaml")


@runs
def test_the_page_lists_the_claims_and_their_methods_and_sets_are_run(preset, path, page, link):
    claims, preset = confirm.load(path), load(preset)
    assert confirm.written(claims) in PAGE.read_text("utf-8")
    assert len({c.id for c in claims.claims}) == len(claims.claims)
    assert all(fnmatch.filter([f.name for f in preset.forget_sets], claim.sets) for claim in claims.claims)
    for claim in claims.claims:
        assert {claim.method, claim.to} <= {*preset.unlearning.methods, "baselines"}
    assert len(claims.seeds) >= 3


def test_verdicts_are_told_with_their_intervals():
    table = pd.concat([confirm.judge(plan(**c), results([1.0, 1.21] * 10)) for c in (
        {"over": "mean", "at_most": 1.2, "text": "near"}, {"at_most": 1.1, "text": "always"})])  # fmt: skip
    said = confirm.verdicts(table)
    assert said.startswith("1 shown, 1 refuted, of 2 [claims](docs/claims.md), on seeds")
    assert "| near | 1.10 [1.05, 1.15] | 20 | shown |" in said
    assert "| always | holds on 50% | 20 | refuted |" in said


@runs
def test_a_page_and_the_report_show_the_confirmatory_run(preset, path, page, link):
    folder = ROOT / "figures" / ("confirm" if preset == "confirm" else f"confirm_{preset}")
    if not (folder / "confirm.csv").exists():
        pytest.skip("the confirmatory run was not made")
    judged = read_table(folder / "confirm.csv")
    assert confirm.verdicts(judged, link) in page.read_text("utf-8")
    recorded = read_json(folder / "plan.json")
    assert recorded["claims"] == hashlib.sha256(path.read_bytes()).hexdigest(), "claims changed after their run"
    again = confirm.judge(confirm.load(path), read_table(folder / "results.csv"))
    pd.testing.assert_frame_equal(again, judged, check_dtype=False, rtol=1e-3)
    page = report.html(report.open_run(folder))
    assert "Claims, judged on seeds" in page
    assert judged["claim"][0] in unescape(page)


def mean_by(pairs, level, over):
    """Low and high of the mean of pairs: `over` kinds of set, as if they were drawn, or "within" them."""
    means, k = pairs.groupby("forget_set").mean(), pairs.index.get_level_values("forget_set").nunique()
    residual = (pairs - pairs.groupby("forget_set").transform("mean")).to_numpy()
    freedom, error = {
        "kinds": (k - 1, means.std() / k**0.5),
        "within": (len(pairs) - k, ((residual**2).sum() / (len(pairs) - k) / len(pairs)) ** 0.5),
    }[over]
    half = stats.t.ppf(1 - level / 2, freedom) * error
    return means.mean() - half, means.mean() + half


def test_the_page_says_which_verdicts_hang_on_how_pairs_are_taken():
    changed = {"kinds": {}, "within": {}}
    for preset, path, *_ in RUNS:
        plan, folder = (
            confirm.load(path),
            ROOT / "figures" / ("confirm" if preset == "confirm" else f"confirm_{preset}"),
        )
        table, judged = read_table(folder / "results.csv"), read_table(folder / "confirm.csv").set_index("id")
        for claim in (c for c in plan.claims if c.over == "mean"):
            here = table[(table["statistic"] == claim.statistic) & (table["split"] == claim.split)]
            value = here.pivot_table("value", ["seed", "forget_set"], "method")
            own, other, log = value[claim.method], value[claim.to], claim.form == "ratio"
            pairs = np.log(own / other) if log else own - other
            bound = np.log(claim.at_most) if log else claim.at_most
            for over, verdicts in changed.items():
                low, high = mean_by(pairs, plan.level / len(plan.claims), over)
                verdict = "shown" if high <= bound else "refuted" if low > bound else "open"
                if verdict != judged["verdict"][claim.id]:
                    verdicts[claim.id] = verdict
    page = PAGE.read_text("utf-8").replace("\n", " ")
    assert set(changed["kinds"].values()) == {"open"}
    assert set(changed["within"].values()) == {"shown"}
    for over, after in (("kinds", "these verdicts would be open: "), ("within", "these would be shown: ")):
        assert set(re.findall("`([a-z-]+)`", page.partition(after)[2].partition(".")[0])) == set(changed[over])


@pytest.mark.slow
def test_a_run_resumes_and_refuses_what_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("DMM_RUNS", str(tmp_path / "runs"))
    script = runpy.run_path(str(ROOT / "scripts" / "confirm.py"))
    claims, folder = tmp_path / "claims.yaml", tmp_path / "confirm"
    text = CLAIMS.read_text("utf-8").replace("[2001, 2002, 2003]", "[1, 2]")
    claims.write_text(text, "utf-8")
    few = {"points": 60, "validation": 20, "mislabelled": 4, "triggers": 3, "copies": 3, "outliers": 3}
    data = {"name": "requests", "n_train": None, "n_val": None, "options": few}
    preset = TINY | {"data": data, "unlearning": {"methods": ["do_nothing", "gd"]}}
    verdicts = script["main"](preset, claims, folder)
    table = pd.read_csv(folder / "results.csv")
    assert set(table["seed"]) == {1, 2}
    assert set(verdicts["verdict"]) == {"not run"}
    page = report.html(report.open_run(folder))
    assert "Claims, judged on seeds" in page
    assert "random_6, seed 1" in page
    assert verdicts["claim"][0] in page
    before = (folder / "results.csv").stat().st_mtime_ns
    script["main"](preset, claims, folder)
    assert (folder / "results.csv").stat().st_mtime_ns == before
    claims.write_text(text + "# one more word\n", "utf-8")
    with pytest.raises(PresetError, match=r"claims changed since.*seeds"):
        script["main"](preset, claims, folder)
