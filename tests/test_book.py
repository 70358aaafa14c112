"""What the book shows is the published run, and can be read."""

import base64
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "figures" / "laptop"


@pytest.fixture(scope="module")
def explored():
    return json.loads((PUBLISHED / "explore.json").read_text(encoding="utf-8"))


def test_forgotten_points_have_the_published_klom(explored):
    table = pd.read_csv(PUBLISHED / "results.csv")
    p95 = table[(table["statistic"] == "klom_p95") & (table["split"] == "forget")].set_index(["forget_set", "method"])
    assert [part["name"] for part in explored["sets"]] == list(table["forget_set"].unique())
    for part in explored["sets"]:
        for method, at in (("do_nothing", 0), ("dmm", explored["first"]), ("dm_direct", explored["predicted"])):
            found = np.percentile(part["kloms"][at][: part["splits"][0]], 95)
            assert found == pytest.approx(p95.loc[(part["name"], method), "value"], abs=0.051)


def test_every_point_has_its_margins_and_its_image(explored):
    for part in explored["sets"]:
        n = len(part["points"])
        assert n == sum(part["splits"]) == len(part["low"]) == len(part["high"])
        assert set(part["points"]) <= set(explored["shown"])
        size = n * (len(explored["methods"]) + 1) * explored["n_quantiles"]
        assert len(base64.b64decode(part["margins"])) == size


def test_formulas_are_drawn_whole_and_no_line_on_progress_is_published():
    convert = pytest.importorskip("latex2mathml.converter").convert
    pages = [nbformat.read(path, 4).cells for path in sorted((ROOT / "notebooks").glob("[01]*.ipynb"))]
    texts = [c.source for cells in pages for c in cells if c.cell_type == "markdown"]
    texts += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    formulas = [
        one for text in texts for one in re.findall(r"\$\$(.+?)\$\$|(?<!\$)\$([^$\n]+)\$(?!\$)", text, re.DOTALL)
    ]
    assert len(formulas) > 50
    left = [(formula, found) for formula in map("".join, formulas) if (found := re.search(r"\\\w+", convert(formula)))]
    assert not left
    outputs = [o for cells in pages for c in cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "display_data" and set(o.data) == {"text/plain"}]
