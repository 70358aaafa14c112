"""What the book's page "Explore" shows is the published run."""

import base64
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

PUBLISHED = Path(__file__).parents[1] / "figures" / "laptop"


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
