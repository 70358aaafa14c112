"""What the README shows is true: its table is the run's, its example runs, its files exist."""

import re
from pathlib import Path

import pandas as pd
import pytest

from dmmlib import data, models, tables, unlearn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_published_run():
    results = pd.read_csv(ROOT / "figures" / "laptop" / "results.csv")
    block = re.search(r"<!-- results[^>]*-->\n(.*)\n<!-- /results -->", README, re.DOTALL)[1]
    assert block == tables.readme(results)
    assert set(results["method"]) >= {"do_nothing", "retrain", "gd", "ga", "ga_gd", "scrub", "dm_direct", "dmm"}
    assert results["forget_set"].nunique() == 10


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_example_of_adding_your_own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DMM_RUNS", str(tmp_path))
    code = re.search(r"## Add your own\n+```python\n(.*?)```", README, re.DOTALL)[1]
    namespace = {"__name__": "readme"}
    try:
        exec(compile(code, "README.md", "exec"), namespace)
        assert set(namespace["table"]["method"]) == {"do_nothing", "retrain", "dmm", "last_layer"}
    finally:
        unlearn.base._METHODS.pop("last_layer", None)
        models._MODELS.pop("wide", None)
        data._LOADERS.pop("mine", None)
