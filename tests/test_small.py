"""What a study and its notebooks do with data that are small or no square images, and with few methods."""

import numpy as np
import pytest

from dmmlib import data, models
from dmmlib.analysis import looks, plots
from dmmlib.analysis.evidence import expect
from dmmlib.errors import DataError
from dmmlib.progress import silent
from dmmlib.studies.adversary.settings import AdversarySettings
from dmmlib.studies.adversary.world import mlp
from dmmlib.studies.exact.problem import from_images
from dmmlib.study import Study
from tests.conftest import TINY
from tests.test_notebooks import execute, one_after_the_other


@pytest.mark.parametrize(
    ("shape", "features"),
    [((1, 64, 1), 64), ((64, 1, 1), 64), ((19, 40, 1), 760), ((20, 40, 2), 400), ((28, 28, 1), 196)],
)
def test_images_are_pooled_where_both_sides_are_long_enough(shape, features):
    x = np.random.default_rng(0).integers(0, 256, (6, *shape)).astype(np.uint8)
    y = np.arange(6) % 2
    d = data.from_arrays(x, y, x, y, mean=(0.5,) * shape[2], std=(0.25,) * shape[2])
    assert models.pooled(d, x).shape == (6, features)


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ((30,), (6, 6)),
        ((1,), (1, 1)),
        ((5, 4, 1), (5, 4)),
        ((5, 4, 3), (5, 4, 3)),
        ((5, 4, 2), (5, 4)),
        ((1, 64, 1), (1, 64)),
    ],
)
def test_any_point_has_a_picture(shape, shown):
    x = np.arange(20 * np.prod(shape)).reshape(20, *shape)
    x = x.astype(np.float32) if len(shape) == 1 else (x % 256).astype(np.uint8)
    picture = looks.picture(x[1])
    assert picture.shape == shown
    assert np.nansum(picture) == pytest.approx(x[1].sum() if shape[-1] in (1, 3, 30) else x[1].mean(-1).sum())
    d = data.from_arrays(x, np.arange(20) % 2, x, np.arange(20) % 2)
    figure = plots.thumbnails(d, {"one": np.array([1]), "more": np.arange(16)}, "title", "caption")
    assert sum(bool(axis.images) for axis in figure.axes) == 1 + 14


def test_both_ends_of_the_scale_are_always_measured(tmp_path):
    one = Study(TINY, {"unlearning.methods": ["ga"]}, runs=tmp_path, progress=silent)
    assert one.methods == ["do_nothing", "retrain", "ga"]
    assert list(one.results()["method"].unique()) == one.methods
    ordered = Study(TINY, {"unlearning.methods": ["retrain", "ga", "do_nothing"]}, runs=tmp_path, progress=silent)
    assert ordered.methods == ["retrain", "ga", "do_nothing"]


def test_a_finding_is_asserted_on_the_librarys_presets_and_said_elsewhere(tmp_path, capsys):
    smoke, own = Study("smoke", runs=tmp_path, progress=silent), Study(TINY, runs=tmp_path, progress=silent)
    expect(smoke, True, "all is well")
    expect(own, True, "all is well")
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="All is well; smoke does not show it"):
        expect(smoke, False, "all is well")
    expect(own, False, "all is well")
    assert "Not seen on these data" in capsys.readouterr().out


def test_studies_say_which_data_they_cannot_take():
    x, y = np.random.default_rng(0).normal(size=(9, 5)), np.arange(9) % 3
    features = data.from_arrays(x, y, x, y)
    with pytest.raises(DataError, match="give uint8 images"):
        mlp(features, AdversarySettings())
    with pytest.raises(DataError, match=r"positive names class 5, .* has 3 classes"):
        from_images(features, 2, [0, 5])


SMALL = {
    "features, neither end of the scale": {
        "data": {"name": "features.npz"},
        "unlearning": {"methods": ["ga", "dmm"], "checkpoints": 2},
    },
    "strips, one method": {"data": {"name": "strips.npz"}, "unlearning": {"methods": ["retrain"]}},
    "four models, few points": {
        "ensembles": TINY["ensembles"] | {"n_models": 4},
        "tuning": TINY["tuning"] | {"n_models": 4},
        "data": {"name": "digits", "n_train": 80, "n_val": 40},
    },
}


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """Data that are no square images: features, and images of one row."""
    place, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    y = np.arange(180) % 3
    features = (rng.normal(size=(3, 30))[y] + rng.normal(size=(180, 30))).astype(np.float32)
    strips = (60 * rng.random((180, 1, 64, 1)) + 60 * y[:, None, None, None]).astype(np.uint8)
    for name, x in (("features", features), ("strips", strips)):
        np.savez(place / f"{name}.npz", x_train=x[:140], y_train=y[:140], x_val=x[140:], y_val=y[140:])
    return place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("small", SMALL)
def test_small_data_and_few_methods_run_through(small, own, tmp_path):
    preset = TINY | {"device": "cpu"} | SMALL[small]
    if preset["data"]["name"].endswith(".npz"):
        preset["data"] = {"name": str(own / preset["data"]["name"]), "n_train": None, "n_val": None}
    stages = ("03", "04", "05")
    execute(one_after_the_other(*stages), tmp_path, preset)
    for stage in stages:
        assert list((tmp_path / "figures").glob(f"*/{stage}_*.png")), "a notebook saves its figures"
