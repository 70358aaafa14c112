"""What the README shows is true: its table is the run's, its example runs, its files exist."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dmmlib import unlearn
from dmmlib.analysis import tables
from dmmlib.analysis.claims import is_baseline
from dmmlib.registry import REGISTRIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())


def test_the_tables_are_those_of_the_published_run():
    results = pd.read_csv(ROOT / "figures" / "laptop" / "results.csv")
    block = re.search(r"<!-- results[^>]*-->\n(.*)\n<!-- /results -->", README, re.DOTALL)[1]
    assert block == tables.readme(results)
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == tables.by_sets(results)
    assert len(README.splitlines()) <= 120
    assert set(results["method"]) >= {"do_nothing", "retrain", "gd", "ga", "ga_gd", "scrub", "dm_direct", "dmm"}
    assert results["forget_set"].nunique() == 10


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture
def registries():
    """What a test registers is forgotten after it."""
    before = {kind: set(registry) for kind, registry in REGISTRIES.items()}
    yield
    for kind, registry in REGISTRIES.items():
        for name in set(registry) - before[kind]:
            registry.remove(name)


@pytest.mark.slow
def test_every_python_block_runs_in_order(tmp_path, monkeypatch, registries):
    """In one namespace, as a reader would who pastes them one after the other."""
    monkeypatch.setenv("DMM_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for page in (ROOT / "README.md", ROOT / "docs" / "your_own.md"):
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], page.name, "exec"), namespace)  # errors name the page's line
    assert set(namespace["table"]["method"]) == {"do_nothing", "retrain", "dmm", "dmm@means", "last_layer"}
    assert {"last_layer"} <= set(unlearn.names())
    assert {path.name for path in (tmp_path / "unlearned").iterdir()} == {"model.safetensors", "record.json"}


def test_what_the_limitations_say_in_words_is_in_the_table():
    results = pd.read_csv(ROOT / "figures" / "laptop" / "results.csv")
    ends = results.pivot_table(["value", "low", "high"], "forget_set", ["statistic", "split", "method"])
    gap, p95 = ends["value"]["mean_gap"], ends["value"]["klom_p95"]
    said = "mean gap and KLoM come as near to retraining as retraining itself on forgotten points, for .03 of its cost"
    assert f"{said} (medians); the attacker still tells them apart" in WORDS
    told = ends["low"]["u_lira"]["forget"]["oracle_matching"] > ends["high"]["u_lira"]["forget"]["retrain"]
    assert told.sum() > 5
    low, high = (ends[end]["u_lira"]["retain"]["retrain"] for end in ("low", "high"))
    hold = ((low <= 0.5) & (high >= 0.5)).sum()
    assert f"those of retraining itself hold the true .5 on only {hold} of {len(low)} sets." in WORDS
    cost = ends["value"]["cost"]["all"]["oracle_matching"].median()
    for values in (gap, p95):
        middle = values["forget"].median()
        assert middle["oracle_matching"] < 1.1 * middle["retrain"]
    assert cost == pytest.approx(0.03, abs=0.005)
    assert "below every baseline on most sets, intervals apart, and is told from retraining on all ten" in WORDS
    baselines = [method for method in p95["forget"] if is_baseline(method)]
    low, high = (ends[end]["mean_gap"]["forget"] for end in ("low", "high"))
    assert (low[baselines].min(axis=1) > high["dmm"]).sum() > 5
    assert tables.at_the_floor(results)["dmm"] == 0
    assert "most where many points of a class or two leave together" in WORDS
    assert set(gap["forget"]["dmm"].nlargest(3).index) == {"pc2_top_50", "pc2_both_50", "half_of_class_0"}
    assert "A likelihood-ratio attacker still beats chance against DMM" in WORDS
    assert ends["low"]["u_lira"]["forget"]["dmm"].median() > 0.5
    assert "Of the baselines one Gauss-Newton step (`newton`), which needs no predictions, is the best here" in WORDS
    assert gap["forget"][baselines].median().idxmin() == "newton"
    (n, k, all_of_them), (m, few, of_requests) = (
        (*others.shape, others.idxmin(axis=1).value_counts())
        for others in (fresh(run)[0] for run in ("confirm", "confirm_requests"))
    )
    assert list(all_of_them.index[:2]) == ["ga_gd", "short_retrain"]
    assert (of_requests.index[0], few) == ("short_retrain", 8)
    assert all_of_them.max() < n / 3, "none stands out"
    first, second = all_of_them.iloc[:2]
    said = f"of all {k} `ga_gd` is best on {first} of {n} pairs and short retraining on {second}, of eight on requests"
    assert f"{said} short retraining on {of_requests.iloc[0]} of {m}." in WORDS
    assert k == len(baselines)


def test_intervals_hold_the_draw_of_subset_models_fixed():
    results = pd.read_csv(ROOT / "figures" / "laptop" / "results.csv").set_index(["method", "statistic", "split"])
    one = results.loc[("dm_direct", "klom_p95", "forget"), "value"].median()
    notebook = (ROOT / "notebooks" / "07_cheap_attribution.ipynb").read_text(encoding="utf-8")
    five = re.search(r"100 models(?: leave|:) p95 KLoM (\d\.\d\d)", notebook)[1]
    assert re.search(r"mean over independent draws of subset models \([^)]*\b5 of 100\b", notebook)
    assert f"DM-direct's forget KLoM of {one:.2f} is of one draw; over five it is {five} (" in WORDS


def fresh(run):
    """Of a confirmatory run, mean gaps on forgotten points of baselines and of DMM, and accuracies on the trigger."""
    results = pd.read_csv(ROOT / "figures" / run / "results.csv")
    wide = results.pivot_table("value", ["statistic", "split", "forget_set", "seed"], "method")
    gap = wide.loc["mean_gap", "forget"]
    return gap[[m for m in gap if is_baseline(m)]], gap, wide.loc["accuracy", "trigger", "trigger"]


def test_what_it_says_of_requests_is_what_fresh_seeds_showed():
    others, gap, trigger = fresh("confirm_requests")
    best = others.min(axis=1)
    ahead = (gap["dmm"] < best).groupby(level="forget_set").sum()
    assert (
        "answers wrong labels, copies and outliers better than each of eight baselines (on outliers of one seed not "
        "with intervals apart, as was claimed), one person's images on two of" in WORDS
    )
    assert others.shape[1] == 8
    assert ahead[["mislabelled_60", "copied", "outliers", "person"]].tolist() == [3, 3, 3, 2]
    assert "half of a class about as well as rewinding, and a backdoor worst of all" in WORDS
    assert (gap["dmm"] / gap["rewind"])["half_of_class_1"].between(0.6, 1.2).all()
    assert (gap["dmm"] / best).groupby(level="forget_set").mean().idxmax() == "trigger"
    _, earlier, earlier_trigger = fresh("confirm")
    works, obeyed = (pd.concat([trigger, earlier_trigger])[method] for method in ("dmm", "retrain"))
    said = (
        f"on six seeds its trigger still works on {works.min():.0%} to {works.max():.0%} of images, in retrained models"
    )
    assert f"{said} on {obeyed.min():.0%} to {obeyed.max():.0%}, and short retraining comes nearer" in WORDS
    assert len(works) == 6
    for found in (gap, earlier):
        assert (found.loc["trigger", "short_retrain"] < found.loc["trigger", "dmm"]).all()
    claims = pd.read_csv(ROOT / "figures" / "confirm_requests" / "confirm.csv").set_index("id")
    assert claims.loc["ahead-outliers", "verdict"] == "refuted"
    judged = claims["verdict"].value_counts()
    assert "Of the 12 claims on them 7 are shown and 4 refuted" in WORDS
    assert (judged.sum(), judged["shown"], judged["refuted"]) == (12, 7, 4)


def test_what_the_docs_say_of_requests_in_sequence_is_measured():
    words = " ".join((ROOT / "docs" / "your_own.md").read_text(encoding="utf-8").split())
    table = pd.read_json(ROOT / "benchmarks" / "results" / "sequence.json")
    means = table.groupby(["kind", "requests", "way", "split"])[["gap", "cost"]].mean().unstack("way")
    gap = means["gap"].xs("forget", level="split")
    assert "comes as near to retraining on forgotten points as one joint request does" in words
    assert (gap["in sequence"] < 1.15 * gap["at once"]).all()
    last = gap.xs(100, level="requests")
    assert "about half of what doing nothing leaves" in words
    assert (last["in sequence"] / last["do nothing"]).between(0.4, 0.65).all()
    assert "and on retained points that of matching, too" in words
    kept = means["gap"].xs("retain", level="split").xs(100, level="requests")
    assert (kept["in sequence"] > 1.1 * kept["predicted"]).all()
    said = "gaps of {:.2f} on fashion-mnist and {:.2f} on digits where doing nothing leaves {:.2f} and {:.2f}"
    order = kept.loc[["fashion-mnist", "digits"], ["in sequence", "do nothing", "predicted"]].to_numpy().T.ravel()
    assert f"{said} (by prediction {{:.2f}} and {{:.2f}})".format(*order) in words
    assert "A hundred requests cost three retrainings in all" in words
    assert means["cost"]["in sequence"].xs(100, level="requests").round(1).eq(3).all()


def test_what_the_docs_say_limits_predictions_is_measured():
    words = " ".join((ROOT / "docs" / "claims.md").read_text(encoding="utf-8").split())
    table = pd.read_json(ROOT / "benchmarks" / "results" / "limits.json")
    assert table.groupby("kind")["seed"].nunique().eq(2).all()
    assert table.groupby("kind")["set"].nunique().eq(6).all()
    over = np.exp(np.log(table["klom"]).groupby([table["split"], table["way"], table["kind"]]).mean()).unstack()
    said = {"DM-direct": "DM-direct leaves {} times the floor's p95 KLoM on fashion-mnist and {} on digits",
            "best size": "it would leave {} and {}", "true features": "whose answers are to be predicted, {} and {}",
            "both": "told both, {} and {}, and 1.3 on retained and on validation points"}  # fmt: skip
    for way, sentence in said.items():
        forget = over.loc["forget", way]
        assert sentence.format(*(f"{forget[kind]:.1f}" for kind in ("fashion-mnist", "digits"))) in words
        assert forget.min() > 1.5
    assert (over.xs("both", level="way").loc[["retain", "validation"]].round(1) == 1.3).all(axis=None)


def test_what_the_docs_say_of_recipes_is_measured():
    claims, speed = (
        " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split()) for name in ("claims.md", "speed.md")
    )
    every, key = pd.read_json(ROOT / "benchmarks" / "results" / "recipe.json"), ["kind", "epochs", "rate", "models"]
    assert every.groupby(key)["seed"].nunique().eq(3).all()
    ratios = [column for column in every if column.startswith("klom")]
    every[ratios] = np.log(every[ratios])
    table = every.groupby(key).mean().drop(columns="seed")
    table[ratios] = np.exp(table[ratios])

    def two(epochs, rate, models, column):
        found = (table.loc[(kind, epochs, rate, models), column] for kind in ("fashion-mnist", "digits"))
        return "{:.2f} and {:.2f}".format(*found).replace("0.", ".")

    usual, smooth = (20, 0.2, 100), (20, 0.05, 25)
    lds = two(*usual, "lds").replace(" and", " on fashion-mnist and")
    assert f"The LDS of a hundred models, for which .75 was the goal, is {lds} on digits" in claims
    assert table["lds"].xs(100, level="models").sub(table["lds"].xs(25, level="models")).abs().max() < 0.02
    assert f"true means {two(*usual, 'ceiling')}; against the mean of three models of each subset it is" in claims
    assert f"each subset it is {two(*usual, 'of means')}. Linearised networks" in claims
    assert f"in question give {two(*usual, 'own features')}, so" in claims
    assert f"the LDS of 25 is {two(*smooth, 'lds')}" in claims
    assert f"standard deviations: {two(20, 0.05, 100, 'gap')} instead of {two(*usual, 'gap')}" in claims
    accuracy = table["accuracy"].xs(100, level="models").unstack("kind").dropna()
    assert (accuracy.loc[(20, 0.05)] >= accuracy.loc[(20, 0.2)]).all()
    half, whole = (table["klom forget"]["fashion-mnist", n, 0.2] for n in (10, 20))
    from_all, from_50 = (f"{half[n]:.2f} instead of {whole[n]:.2f}" for n in (100, 50))
    assert f"DM-direct leaves {from_all} times the floor, and from 50 models {from_50} (" in claims
    rest = table.loc[("fashion-mnist", 10, 0.2, 50), ["klom retain", "klom validation"]]
    assert "({:.2f} on retained, {:.2f} on validation points)".format(*rest) in claims
    of = table.loc["fashion-mnist"].xs(100, level="models")
    half, whole = of.loc[(10, 0.2)], of.loc[(20, 0.2)]
    assert f"as accurate ({half['accuracy']:.1f} instead of {whole['accuracy']:.1f} %), its LDS is" in speed
    said = f"its LDS is {half['lds']:.3f} instead of {whole['lds']:.3f}, and DM-direct leaves {half['klom forget']:.2f}"
    assert said.replace(" 0.", " .") in speed
    assert f"on forgotten points instead of {whole['klom forget']:.2f} (" in speed
    seeds = every.query("kind == 'fashion-mnist' and models == 100 and rate == 0.2").set_index(["epochs", "seed"])
    less = seeds["klom forget"][10] < seeds["klom forget"][20]
    assert f"three development seeds, less on {['none', 'one', 'two', 'all'][less.sum()]} of them" in speed
    lost = whole["accuracy"] - of.loc[[(10, 0.4), (5, 0.4)], "accuracy"]
    assert "or a quarter, loses {:.1f} and {:.1f} % of accuracy".format(*lost) in speed
    assert (of.loc[[(10, 0.4), (5, 0.4)], "lds"] < whole["lds"] * 2 / 3).all()


def test_what_the_docs_say_of_leads_is_measured():
    words = " ".join((ROOT / "docs" / "claims.md").read_text(encoding="utf-8").split())
    table = pd.read_json(ROOT / "benchmarks" / "results" / "leads.json").query("split == 'forget'")
    assert table.groupby("kind")["seed"].nunique().eq(3).all()
    assert table.groupby(["kind", "seed"])["set"].nunique().eq(6).all()
    over = np.exp(np.log(table["klom"]).groupby([table["way"], table["kind"]]).mean()).unstack()

    def two(way, joint=" and "):
        return joint.join(f"{over.loc[way, kind]:.2f}" for kind in ("fashion-mnist", "digits"))

    (a, b), (c, d) = (two(way, " ").split() for way in ("mixed shares", "DM-direct"))
    assert f"mixed shares leave {a} instead of {c} times the floor on fashion-mnist, but {b} instead of {d} on" in words
    assert f"random effects of pairs of points {two('pairs')}; the mean with ridge" in words
    assert f"on a thousand models {two('mean with ridge')}; margins spread" in words
    assert f"lack the point {two('DM-direct, its spread')}. True means leave {two('true means')}." in words


def test_what_the_docs_say_of_matching_is_measured():
    words = " ".join((ROOT / "docs" / "claims.md").read_text(encoding="utf-8").split())
    table = pd.read_json(ROOT / "benchmarks" / "results" / "matching.json").set_index(["kind", "set", "seed", "way"])
    splits = table[["forget", "retain"]]
    ratios = np.log(splits / splits.xs("floor", level="way").reindex(splits.index.droplevel("way")).to_numpy())
    over = np.exp(ratios.groupby(["way", "kind", "set"]).mean()).round(2)
    assert (ratios.groupby(["way", "kind", "set"]).count() == 3).all(axis=None)
    given = over.loc["perfect, cost 0.02", "forget"].drop(("convnet", "hardest"))
    assert len(given) == 11
    assert f"within {given.drop('convnet').max()} times the floor on forgotten points with an mlp" in words
    assert f"and within {given['convnet'].max()} with a convnet" in words
    assert f"true targets themselves leave {over.loc[('perfect targets', 'convnet', 'hardest'), 'forget']}" in words
    mlp, convnet = (
        over.loc[("perfect, cost 0.05", kind, "half_class"), "retain"] for kind in ("fashion-mnist", "convnet")
    )
    assert f"at {mlp} times the floor with the mlp, but at {convnet} with the convnet" in words
    assert f"and at {over.loc[('perfect, cost 0.1', 'convnet', 'half_class'), 'retain']} at .10" in words
    worst = (over.loc[(f"perfect, cost {cost}", "digits", "mislabelled"), "retain"] for cost in (0.03, 0.05, 0.1))
    assert "digits, at {:.1f} for .03, {:.1f} for .05 and {:.1f} for .10".format(*worst) in words
    wide = np.log(table[["forget", "retain", "validation"]])
    met = (wide.xs("predicted, cost 0.03", level="way") - wide.xs("DM-direct", level="way")).groupby(["kind", "set"])
    met = np.exp(met.mean())
    assert len(met) == 12
    assert f"(within {met['forget'].max():.2f} times DM-direct in each of twelve kinds of set)" in words
    assert f"validation points (median {met['validation'].median():.2f})" in words
    said = (
        f"median {met['retain'].median():.2f} times DM-direct, {met['retain'].max():.2f} at most, on mislabelled digits"
    )
    assert said in words
    assert met["retain"].idxmax() == ("digits", "mislabelled")
    table = pd.read_json(ROOT / "benchmarks" / "results" / "growing.json")
    table = table[table["kind"] == "digits"].set_index(["way", "cost", "seed", "set"])
    assert table.groupby(["way", "cost"]).size().eq(12).all()
    left = np.exp(np.log(table["retain"]).groupby(["way", "cost"]).mean()).unstack().loc[:, [0.03, 0.05]]
    took = table["seconds"].groupby(["way", "cost"]).median().unstack()
    grows = "3 steps, growing 2 times"
    said = [f"{v:.2f}" for way in (grows, f"{grows}, remembering") for v in left.loc[way] / left.loc["4 steps, equal"]]
    assert (
        "leave {} and {} times as much on digits' retained points at .03 and .05, and {} and {}".format(*said) in words
    )
    assert (took.loc[f"{grows}, remembering"] > 2 * took.loc["4 steps, equal"]).all()
