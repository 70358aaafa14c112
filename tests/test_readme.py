"""What the README shows is true: its table is the run's, its example runs, its files exist."""

import re
from pathlib import Path

import pandas as pd
import pytest

from dmmlib import unlearn
from dmmlib.analysis import tables
from dmmlib.analysis.claims import is_baseline
from dmmlib.registry import REGISTRIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
    p95, groups = ends["value"]["klom_p95"], [name for name in ends.index if name.startswith("pc")]
    assert "matching comes near retraining for .03 of its cost" in README
    middle, cost = p95.median(), ends["value"]["cost"]["all"]["oracle_matching"].median()
    assert all(
        middle[split, "oracle_matching"] < 1.4 * middle[split, "retrain"]
        for split in ("forget", "retain", "validation")
    )
    assert cost == pytest.approx(0.03, abs=0.005)
    assert "far from retraining on groups of points that act together (the PC sets), on the points that stay" in README
    assert (p95["forget"]["dmm"] > 2 * p95["forget"]["retrain"])[groups].all()
    apart = ends["low"]["klom_p95"]["retain"]["dmm"] > ends["high"]["klom_p95"]["retain"]["retrain"]
    assert apart[groups].mean() > 0.5
    assert "A likelihood-ratio attacker still beats chance against it" in README
    assert ends["low"]["u_lira"]["forget"]["dmm"].median() > 0.5
    assert "(`newton`), which\nneeds no predictions, is the best baseline" in README
    baselines = [method for method in p95["forget"] if is_baseline(method)]
    assert p95["forget"][baselines].median().idxmin() == "newton"
