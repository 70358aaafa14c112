"""Claims follow from the tables alone; a page shows them and loads nothing; two runs are told apart honestly."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from dmmlib import files, forget_sets
from dmmlib.analysis import claims, evidence, plots, verdict
from dmmlib.app import report
from dmmlib.errors import PresetError, StoreError
from dmmlib.files import write_json
from dmmlib.progress import silent
from dmmlib.study import Study
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
SETS = ["one", "two", "three", "four"]


def results(klom, u_lira=None, cost=0.1, half=0.1, sets=SETS):
    """A tidy table: the same forget p95 of each method on every set (or a number a set)."""
    rows = []
    for method, values in klom.items():
        for forget_set, value in zip(sets, np.broadcast_to(values, len(sets)), strict=True):
            head = {"forget_set": forget_set, "size": 5, "method": method, "n_models": 20}
            for split in ("forget", "retain", "validation"):
                for statistic in ("klom_p95", "klom_mean", "accuracy_gap"):
                    row = {"split": split, "statistic": statistic, "value": value, "low": value - half}
                    rows.append(head | row | {"high": value + half})
                lira = (u_lira or {}).get(method, 0.5)
                rows.append(head | {"split": split, "statistic": "u_lira", "value": lira, "low": lira, "high": lira})
            rows.append(head | {"split": "all", "statistic": "cost", "value": cost, "low": cost, "high": cost})
    return pd.DataFrame(rows)


GOOD = {"do_nothing": 10, "retrain": 0.7, "gd": 8, "scrub": 9, "oracle_matching": 0.8, "dm_direct": 0.9, "dmm": 1.0}


def verdicts(**tables):
    return {c.number: c.verdict for c in claims.judge(tables)}


def test_claims_that_hold_everywhere_are_shown():
    found = verdicts(results=results(GOOD))
    assert [found[n] for n in (1, 2, 4, 5, 8)] == ["shown"] * 5


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (1, {"gd": 0.7}),  # a baseline that reaches the floor
        (2, {"oracle_matching": 3.0}),
        (4, {"dm_direct": 2.0}),
        (5, {"dmm": 8.0}),
        (5, {"dmm": 9.5}),
    ],
)
def test_claims_that_fail_everywhere_are_refuted(number, change):
    assert verdicts(results=results(GOOD | change))[number] == "refuted"


def test_a_claim_that_holds_on_some_sets_is_shown_in_part_from_half_on():
    assert verdicts(results=results(GOOD | {"dm_direct": [0.8, 0.8, 5, 5]}))[4] == "in part"
    assert verdicts(results=results(GOOD | {"dm_direct": [0.8, 5, 5, 5]}))[4] == "refuted"


def test_an_interval_that_touches_is_not_ahead():
    close = GOOD | {"dmm": 7.9}
    assert verdicts(results=results(close, half=0.04))[5] == "in part", "ahead, though not near oracle matching"
    assert verdicts(results=results(close, half=0.06))[5] == "refuted"


def test_cost_counts_and_the_attacker_counts():
    dear = claims.judge({"results": results(GOOD, cost=0.6)})[4]
    assert dear.verdict == "in part"
    assert "a median 0.60 of a retraining" in dear.finding
    assert verdicts(results=results(GOOD, {"dmm": 0.7}))[8] == "refuted"


def test_a_moment_on_the_way_counts_for_stopping_times():
    path = pd.DataFrame(
        [(s, "gd", "forget", c, p, 0.25, 0.5) for s in SETS for c, p in ((0.1, 5.0), (0.2, 0.7))],
        columns=["forget_set", "method", "split", "cost", "p95", "under", "over"],
    )
    found = claims.judge({"results": results(GOOD), "trajectories": path})[0]
    assert found.verdict == "refuted"
    assert "25% of F under- and 50% over-unlearned" in found.finding


def datamodel_table(correlation=0.8, few=6.0, many=1.0):
    rows = []
    for s in SETS:
        rows += [(400, s, "forget", k, v, v - 0.1, v + 0.1) for k, v in (("correlation", correlation), ("slope", 0.9))]
        rows += [(m, s, "forget", "klom_p95", v, v - 0.5, v + 0.5) for m, v in ((100, few), (400, many))]
    rows += [(m, "every", "train", "lds", v, v, v) for m, v in ((100, 0.2), (400, 0.5))]
    return pd.DataFrame(rows, columns=evidence.COLUMNS)


def test_prediction_and_attribution():
    assert [verdicts(datamodels=datamodel_table())[n] for n in (3, 6)] == ["shown", "shown"]
    bad = datamodel_table(correlation=0.3, many=5.5)
    assert [verdicts(datamodels=bad)[n] for n in (3, 6)] == ["refuted", "refuted"]


def convex_table(random_growth):
    """F in weak directions, where matching on F costs the same, and F drawn like R, where it never arrives."""
    costs = {
        ("F weak", 10): {"OM on F": 5, "OM on S": 50, "GD on R": 100},
        ("F weak", 1000): {"OM on F": 6, "OM on S": 4000, "GD on R": 9000},
        ("F random", 10): {"OM on F": np.inf, "OM on S": 10, "GD on R": 11},
        ("F random", 1000): {"OM on F": np.inf, "OM on S": 10 * random_growth, "GD on R": 11 * random_growth},
    }
    rows = [(problem, c, m, x) for (problem, c), row in costs.items() for m, x in row.items()]
    return pd.DataFrame(rows, columns=["problem", "condition", "method", "cost"])


def test_the_linear_setting_depends_on_where_f_lies():
    assert verdicts(convex=convex_table(1.5))[7] == "shown"
    assert verdicts(convex=convex_table(90))[7] == "in part"


def test_what_a_run_lacks_is_not_run_and_said():
    found = claims.judge({})
    assert [c.verdict for c in found] == ["not run"] * 8
    assert found[2].finding == "Not run: the run has no datamodels.csv."
    few = results({k: v for k, v in GOOD.items() if k not in ("dmm", "gd", "scrub")})
    said = claims.judge({"results": few})
    assert said[0].finding == "Not run: the run has no gradient baseline."
    assert said[7].finding == "Not run: the run has no DMM."
    broken = claims.judge({"results": results(GOOD).drop(columns="low")})
    assert "lacks the column 'low'" in broken[0].finding


def test_the_published_run_is_judged():
    table = pd.read_csv(ROOT / "figures" / "laptop" / "results.csv")
    judged = claims.judge({"results": table})
    assert judged[0].verdict in ("shown", "in part")  # on some of its sets there is little to forget
    assert f"of {table['forget_set'].nunique()} forget sets" in judged[4].finding


def test_agreement_is_one_for_a_perfect_prediction():
    rng = np.random.default_rng(0)
    level = rng.normal(size=30) * 3
    originals = 5 + rng.normal(size=(40, 30)) * 0.1
    oracles = 5 + level + rng.normal(size=(40, 30)) * 0.1
    found = evidence.agreement(originals, originals + 0.5 * level, oracles)
    assert found["correlation"].value > 0.99
    assert found["slope"].low < 2 < found["slope"].high, "true on predicted: the effect is understated by half"
    assert found["correlation"].high - found["correlation"].low < 0.05
    unrelated = evidence.agreement(originals, originals + rng.permutation(level), oracles)
    assert unrelated["correlation"].value < 0.6


def test_evidence_of_a_study_is_tidy_and_feeds_the_claims(tiny):
    fitted = {m: tiny.datamodel_of(m)[0] for m in (50, 100)}
    table = evidence.predictions(tiny, fitted, n_bootstrap=20)
    assert not table.duplicated(["n_subsets", "forget_set", "split", "statistic"]).any()
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert len(table) == 2 * (2 + len(tiny.forget_sets())) + 2 * len(tiny.forget_sets())
    assert all(v != "not run" for n, v in verdicts(datamodels=table).items() if n in (3, 6))


# --- runs on disk ----------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DMM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("DMM_FIGURES", str(tmp_path / "figures"))

    def make(name, table, record=None):
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        table.to_csv(directory / "results.csv", index=False)
        if record is not None:
            write_json(directory / "run.json", record)
        return report.open_run(name)

    return make


class Page(HTMLParser):
    """What a page refers to, its text, and whether its tags close."""

    def __init__(self, page):
        super().__init__()
        self.links, self.text, self.stack = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.links += [value for key, value in attributes if key in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "link", "br", "input"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_is_whole_and_loads_nothing(tiny, tmp_path):
    table = tiny.results()
    tiny.save_table(table, "results.csv")
    tiny.save_table(tiny.trajectories(), "trajectories.csv")
    report.record(tiny, tiny.directory)
    run = report.open_run(tiny.directory)
    page = report.html(run)
    parsed = Page(page)
    assert parsed.stack == []
    assert all(link.startswith(("data:image/webp;base64,", "#")) for link in parsed.links)
    assert not re.search(r"https?://|@import|url\(", page)
    text = " ".join(parsed.text)
    assert tiny.data.sha256 in text
    for claim in claims.judge(run.tables):
        assert claim.finding in text
    assert "datamodels.n_subsets" in text
    best = table[(table["method"] == "dmm") & (table["statistic"] == "klom_p95") & (table["split"] == "forget")]
    assert all(f"{v:.2f} [" in text for v in best["value"])


@pytest.mark.parametrize(
    ("klom", "answer", "words"),
    [
        ({"dmm": 0.75}, "yes", "Yes, as far as N = 20 models of each kind can tell: DMM can't be told"),
        ({"dmm": 2.0}, "mostly", "Mostly: DMM went 86% of the way"),
        ({"dmm": 5.0}, "in part", "In part: DMM went 54% of the way"),
        ({"dmm": 9.0}, "no", "No: DMM went 11% of the way"),
        ({"dmm": 11.0}, "no", "DMM came no nearer"),
        ({"do_nothing": 0.75, "dmm": 0.75}, "nothing to forget", "There was nothing to forget"),
    ],
)
def test_the_answer_follows_from_the_table(klom, answer, words):
    table = results(GOOD | klom)
    found = verdict.judge(table, "one")
    assert found.answer == answer
    assert words in found.headline
    assert f"is {(GOOD | klom)['dmm']:.2f} [" in found.forgotten
    assert "0.70 for retraining against itself" in found.forgotten
    assert "10% of a retraining" in found.price
    assert ("were disturbed" in found.paid) == (answer not in ("yes", "nothing to forget"))


def test_an_attacker_who_can_tell_counts():
    table = results(GOOD | {"dmm": 0.7}, {"dmm": 0.7})
    assert verdict.judge(table, "one").answer == "mostly"
    assert verdict.method_of(results({"do_nothing": 1, "retrain": 1, "oracle_matching": 1, "gd": 1})) == "gd"


def test_a_set_of_ones_own_is_answered_first(tiny, tmp_path):
    path = tmp_path / "mine.json"
    forget_sets.make("mine", [2, 7, 11, 13, 40], tiny.data).save(path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "store").symlink_to(tiny.runs / "store")
    study = Study(TINY, forget_set=path, runs=tmp_path / "runs", figures=tmp_path / "figures", progress=silent)
    results = study.results()
    study.save_table(results, "results.csv")
    plain = plots.titled(Figure(), "Nine of ten forgot", "Points of a set")
    study.save_figure(plain, "04_what")
    report.record(study, study.output)
    folder = tmp_path / "figures" / study.output.relative_to(study.runs)
    run = report.open_run(study.output)
    page = report.html(dataclasses.replace(run, figures=sorted(folder.glob("*.png"))))
    text = " ".join(Page(page).text)
    found = verdict.judge(results, "mine")
    for sentence in (found.headline, found.forgotten, found.paid, found.price):
        assert sentence in text
    assert text.index(found.headline) < text.index("Medians over forget sets")
    assert "What the paper claims" not in text
    assert "✗ refuted" not in text
    counts = np.bincount(tiny.data.y_train[[2, 7, 11, 13, 40]], minlength=10)
    assert f'alt="The images to be forgotten: {counts.max()} {counts.argmax()}' in page
    assert 'alt="Nine of ten forgot. Points of a set"' in page


def test_a_page_stays_small_and_shows_no_interval_of_no_width(tiny, tmp_path):
    rng = np.random.default_rng(0)
    noise = tmp_path / "04_noise.png"
    image.imsave(noise, rng.random((1500, 2000, 3)))
    table = pd.DataFrame(rng.normal(size=(5000, 6)))
    run = report.Run("large", tmp_path, {"results": results(GOOD, half=0), "many": table}, {}, [noise])
    page = report.html(run)
    assert len(page) < 1_500_000
    assert "The first 150 of 5,000 rows" in page
    assert not re.search(r"(\d+\.\d+) \[\1, \1\]", page)


def test_trajectories_share_points_out(tiny):
    path = tiny.trajectories()
    assert not path.duplicated(["forget_set", "method", "split", "cost"]).any()
    assert path[["under", "over"]].min().min() >= 0
    assert (path["under"] + path["over"]).max() <= 1
    assert path["under"].max() > 0


def test_what_a_file_says_is_escaped(place):
    hostile = "<script>alert(1)</script>"
    run = place("hostile", results({hostile: 1.0, "do_nothing": 2.0}, sets=[hostile, "b", "c", "d"]))
    for page in (report.html(run), report.comparison_html(run, run)):
        assert hostile not in page
        assert "&lt;script&gt;" in page


def test_a_run_without_a_record_says_so(place):
    run = place("plain", results(GOOD))
    assert "This run recorded none" in report.html(run)
    assert "recorded no settings" in report.comparison_text(run, run)


def test_runs_are_found_or_missed_clearly(place, tmp_path):
    place("plain", results(GOOD))
    with pytest.raises(PresetError, match=r"No run 'plane' .*\(there are plain\); use `dmm run plane` first"):
        report.open_run("plane")
    (tmp_path / "runs" / "plain" / "run.json").write_text("{")
    with pytest.raises(StoreError, match=r"run\.json is damaged"):
        report.open_run("plain")
    (tmp_path / "runs" / "plain" / "results.csv").write_bytes(b"")
    with pytest.raises(StoreError, match=r"results\.csv is damaged"):
        report.open_run("plain")
    (tmp_path / "runs" / "plain" / "run.json").unlink()
    (tmp_path / "runs" / "plain" / "results.csv").write_text("a,b\n1,2\n")
    other = report.open_run("plain")
    for use in (report.html, lambda run: report.compare(run, run)):
        with pytest.raises(PresetError, match=r"results\.csv has no column 'forget_set'; give the folder of a run"):
            use(other)


def test_figures_of_a_request_are_those_of_its_run(place, tmp_path):
    for name in ("plain", "plain/forget_set-mine"):
        place(name, results(GOOD))
        (tmp_path / "figures" / name).mkdir(parents=True)
        (tmp_path / "figures" / name / "04.png").write_bytes(b"")
        assert report.open_run(name).figures == [tmp_path / "figures" / name / "04.png"]


def test_figures_go_with_the_runs_that_are_given(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(files, "home", Path.cwd)
    monkeypatch.delenv("DMM_FIGURES", raising=False)
    (tmp_path / "home" / "figures" / "tiny").mkdir(parents=True)
    (tmp_path / "home" / "figures" / "tiny" / "04_of_another.png").touch()
    drawn = plots.titled(Figure(), "Nine of ten forgot", "Points of a set")
    for runs in (tmp_path / "a", tmp_path / "b"):
        study = Study(TINY, runs=runs, progress=silent)
        path = study.save_figure(drawn, "04_what")
        study.save_table(results(GOOD), "results.csv")
        assert path.is_relative_to(runs)
        for run in (report.open_run("tiny", runs), report.open_run(study.directory)):
            assert run.figures == [path]
    assert Study(TINY, progress=silent).figures == tmp_path / "home" / "figures"
    assert Study(TINY, runs=runs, figures="mine", progress=silent).figures == tmp_path / "home" / "mine"
    monkeypatch.setenv("DMM_FIGURES", str(tmp_path / "c"))
    assert Study(TINY, runs=runs, progress=silent).figures == tmp_path / "c"


def test_differences_carry_the_interval_of_both(place):
    a, b = place("a", results(GOOD, half=0.3)), place("b", results(GOOD | {"dmm": 1.45, "gd": 9}, half=0.4))
    table = report.compare(a, b)
    here = table[(table["statistic"] == "klom_p95") & (table["split"] == "forget")].set_index(["forget_set", "method"])
    dmm, gd = here.loc[("one", "dmm")], here.loc[("one", "gd")]
    assert dmm["difference"] == pytest.approx(0.45)
    assert (dmm["low"], dmm["high"]) == pytest.approx((-0.05, 0.95))
    assert not dmm["clear"]
    assert gd["clear"]
    text = report.comparison_text(a, b)
    assert "+0.45 [-0.05, +0.95]" in text
    assert "clear differences: forget 4 of 28" in text
    with pytest.raises(PresetError, match="Unknown statistic 'klom'; these runs share klom_p95"):
        report.comparison_text(a, b, "klom")
    with pytest.raises(PresetError, match="share no forget set"):
        report.compare(a, place("c", results(GOOD, sets=["w", "x", "y", "z"])))


def test_mean_gaps_of_other_oracles_differ_by_their_unit_too(place):
    table = results(GOOD, half=0.3)
    gaps = table[table["statistic"] == "klom_p95"].assign(statistic="mean_gap")
    record = {"preset": {"ensembles": {"n_models": 51}}}
    doubled = gaps.assign(value=2 * gaps["value"], high=2 * gaps["value"] + 0.3)
    row = report.compare(place("a", gaps, record), place("b", doubled, record)).iloc[0]
    unit = 1.96 / 10 * np.hypot(row["a"], row["b"])
    assert row["high"] - row["difference"] == pytest.approx(np.hypot(np.hypot(0.3, 0.3), unit))


def test_sets_of_other_points_are_said_to_be(place, tiny):
    a, b = place("a", results(GOOD)), place("b", results(GOOD))
    for run, indices in ((a, [1, 2]), (b, [1, 3])):
        (run.directory / "forget_sets").mkdir()
        forget_sets.make("one", indices, tiny.data).save(run.directory / "forget_sets" / "one.json")
        forget_sets.make("two", [5], tiny.data).save(run.directory / "forget_sets" / "two.json")
    assert "not the same points in both: one\n" in report.comparison_text(a, b)


def test_settings_that_differ_are_named(place):
    def record(n, sha):
        preset = {"name": str(n), "ensembles": {"n_models": n}, "forget_sets": [{"name": "one", "size": n}]}
        return {"preset": preset, "data": {"sha256": sha}, "device": "cpu", "versions": {"torch": "2"}}

    a, b = place("a", results(GOOD), record(5, "x")), place("b", results(GOOD), record(6, "y"))
    table = report.differing(a, b).set_index("what")
    assert table.to_dict("index") == {
        "ensembles.n_models": {"a": "5", "b": "6"},
        "forget_sets.one.size": {"a": "5", "b": "6"},
        "data.sha256": {"a": "x", "b": "y"},
    }
    assert "ensembles.n_models" in report.comparison_text(a, b)
