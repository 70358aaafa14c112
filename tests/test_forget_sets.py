"""Forget sets: what is chosen, kept and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dmmlib import data, forget_sets
from dmmlib.errors import ForgetSetError, StoreError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", 100, 20)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "is empty"),
        ([1, 2, 2], "index 2 is given 2 times"),
        ([-1], "index -1 is outside the training set of 100 points; use 0 to 99"),
        ([100], "index 100 is outside"),
        ([1, 2**63], "index 9223372036854775808 is outside"),
        ([1, -(2**70)], "index -1180591620717411303424 is outside"),
        ([float("nan"), 1], "float64; give integers"),
        ([0.5], "float64; give integers"),
        (list(range(100)), "is all 100 training points"),
        ([[1, 2]], r"shape \(1, 2\); give one list"),
        ([[1, 2], [3]], "different lengths"),
        ("abc", r"shape \(\)"),
        ([None], "object; give integers"),
        ([True], "bool; give integers"),
    ],
)
def test_indices_that_cannot_be_forgotten(digits, indices, message):
    with pytest.raises(ForgetSetError, match=message):
        forget_sets.make("bad", indices, digits)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1.0, 2.0], "float64; give integers from 0"),
        ([True, False], "bool; give integers"),
        ([-1, 2], "index -1 is outside any training set; use 0 upwards"),
        ([1, 2, 2], "index 2 is given 2 times"),
        ({1, 2}, r"shape \(\); give one list"),
        (None, r"shape \(\); give one list"),
        ([], "is empty"),
    ],
)
def test_a_forget_set_of_such_indices_is_refused(indices, message):
    with pytest.raises(ForgetSetError, match=message):
        forget_sets.ForgetSet("bad", indices)


def test_a_forget_set_is_the_same_in_whatever_order_its_points_are_given():
    for given in ([3, 1, 2], (1, 2, 3), np.array([2, 3, 1], np.int32)):
        indices = forget_sets.ForgetSet("some", given).indices
        assert (indices.dtype, indices.tolist()) == (np.int64, [1, 2, 3])


def test_round_trip_and_other_data(digits, tmp_path):
    made = forget_sets.make("mine", [5, 3], digits, kind="hand")
    made.save(tmp_path / "f.json")
    loaded = forget_sets.load(tmp_path / "f.json", digits)
    assert loaded.indices.tolist() == [3, 5]
    assert loaded.made_by == {"kind": "hand"}
    with pytest.raises(ForgetSetError, match=r"was made for data .* but this is digits"):
        forget_sets.load(tmp_path / "f.json", data.load("digits", 99, 20))
    (tmp_path / "f.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read as JSON"):
        forget_sets.load(tmp_path / "f.json", digits)
    (tmp_path / "f.json").write_text('{"name": "a", "indices": [1], "made_by": {"x": 1, "x": 2}, "indices": [2]}')
    with pytest.raises(StoreError, match="the key 'x' is given twice; keep one"):
        forget_sets.load(tmp_path / "f.json", digits)
    (tmp_path / "f.json").write_text(
        f'{{"name": "a", "indices": [1], "data_sha256": "{digits.sha256}", "indices": [2]}}'
    )
    with pytest.raises(StoreError, match="the key 'indices' is given twice"):
        forget_sets.load(tmp_path / "f.json", digits)
    (tmp_path / "f.json").write_text(json.dumps([1, 2]))
    with pytest.raises(ForgetSetError, match="lacks data_sha256, indices, name"):
        forget_sets.load(tmp_path / "f.json", digits)


def test_splits_and_mask(digits):
    made = forget_sets.make("mine", [0, 7], digits)
    splits = made.splits(100, 20)
    assert splits["forget"].tolist() == [0, 7]
    assert len(splits["retain"]) == 98
    assert splits["validation"].tolist() == list(range(100, 120))
    assert made.mask(100).sum() == 98


def test_random_keeps_clear_of_excluded(digits):
    rng = np.random.default_rng(0)
    excluded = np.arange(90)
    assert set(forget_sets.random(digits, 10, rng, excluded)) == set(range(90, 100))
    with pytest.raises(ForgetSetError, match="11 points were asked for, but the pool has 10"):
        forget_sets.random(digits, 11, rng, excluded)


def test_a_class_of_which_no_point_was_drawn(digits):
    lacks = replace(digits, y_train=np.where(digits.y_train == 3, 4, digits.y_train))
    with pytest.raises(ForgetSetError, match=r"class 3, .*has none"):
        forget_sets.class_share(lacks, 3, 0.5, np.random.default_rng(0))


def test_highest_and_both_ends():
    scores = np.array([3.0, -5.0, 1.0, 4.0, -2.0])
    assert forget_sets.highest(scores, 2).tolist() == [3, 0]
    assert forget_sets.highest(scores, 2, exclude=np.array([3])).tolist() == [0, 2]
    assert sorted(forget_sets.both_ends(scores, 4).tolist()) == [0, 1, 3, 4]
    assert len(set(forget_sets.both_ends(scores, 5).tolist())) == 5


def test_nearest_and_class_share(digits):
    features = digits.x_train.reshape(100, -1).astype(float)
    near = forget_sets.nearest(features, 4, 5)
    distances = np.linalg.norm(features - features[4], axis=1)
    assert set(near) == set(np.argsort(distances)[:5])
    some = forget_sets.class_share(digits, 3, 0.5, np.random.default_rng(0))
    assert (digits.y_train[some] == 3).all()
    assert len(some) == round((digits.y_train == 3).sum() / 2)
    with pytest.raises(ForgetSetError, match="Class 10 is unknown"):
        forget_sets.class_share(digits, 10, 0.5, np.random.default_rng(0))
    with pytest.raises(ForgetSetError, match="share 0 of a class"):
        forget_sets.class_share(digits, 1, 0, np.random.default_rng(0))
    with pytest.raises(ForgetSetError, match="Point 100 is outside"):
        forget_sets.nearest(features, 100, 5)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a\\b", "a\n", "a:b", " ", "a.", "a ", " a", "NUL", "com1.x", 5, None]
)
def test_names_that_cannot_be_files(digits, name):
    with pytest.raises(ForgetSetError, match=r"is no name for a file") as error:
        forget_sets.make(name, [1], digits)
    assert "\n" not in str(error.value)


def test_a_file_takes_no_place_of_another_case(digits, tmp_path):
    """As many disks tell apart neither case nor the two ways to write an umlaut."""
    forget_sets.make("mine", [1], digits).save(tmp_path / "mine.json")
    forget_sets.make("mine", [2], digits).save(tmp_path / "mine.json")
    with pytest.raises(ForgetSetError, match=r"Mine.json is on many disks the same as mine.json"):
        forget_sets.make("Mine", [3], digits).save(tmp_path / "Mine.json")
    forget_sets.make("\u00e4", [1], digits).save(tmp_path / "\u00e4.json")
    with pytest.raises(ForgetSetError, match="the same as"):
        forget_sets.make("\u00e4", [1], digits).save(tmp_path / "a\u0308.json")
    assert forget_sets.load(tmp_path / "mine.json", digits).indices.tolist() == [2]


@pytest.mark.parametrize("name", ["a", "pc1_top-5", "5 of v1.0+more", "ä"])
def test_names_that_can(digits, name, tmp_path):
    forget_sets.make(name, [1], digits).save(tmp_path / f"{name}.json")
    assert forget_sets.load(tmp_path / f"{name}.json", digits).name == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"made_by": [1]}, r"has made_by \[1\]; give a mapping"),
        ({"made_by": "me"}, "has made_by 'me'; give a mapping"),
        ({"made_by": []}, r"has made_by \[\]; give a mapping"),
        ({"made_by": 0}, "has made_by 0; give a mapping"),
        ({"indices": [[], []]}, "one list"),
        ({"indices": [10**30]}, "index 1000000000000000000000000000000 is outside"),
        ({"name": "a" * 101}, "no name for a file"),
        ({"indices": [[1], [2, 3]]}, "different lengths"),
        ({"indices": [[1, 2]]}, "one list"),
        ({"indices": [1.0, 2.0]}, "float64; give integers"),
        ({"indices": None}, "one list"),
        ({"indices": {"1": 2}}, "one list"),
        ({"name": "../mine"}, "no name for a file"),
        ({"data_sha256": None}, "was made for data None"),
    ],
)
def test_a_file_of_ones_own_that_cannot_be_used(digits, tmp_path, changes, message):
    path, good = tmp_path / "f.json", {"name": "mine", "indices": [1, 2], "data_sha256": digits.sha256}
    path.write_text(json.dumps(good | changes))
    with pytest.raises(ForgetSetError, match=message) as error:
        forget_sets.load(path, digits)
    assert "\n" not in str(error.value)


def test_nesting_without_end_is_no_json(digits, tmp_path):
    (tmp_path / "f.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match="cannot be read as JSON"):
        forget_sets.load(tmp_path / "f.json", digits)


def test_what_a_file_says_of_its_making_is_kept(digits, tmp_path):
    how = {"name": "N", "indices": "by hand", "data": 3}
    content = {"name": "mine", "indices": [1, 2], "data_sha256": digits.sha256, "made_by": how}
    (tmp_path / "f.json").write_text(json.dumps(content))
    assert forget_sets.load(tmp_path / "f.json", digits).made_by == how


def test_points_by_how_their_ids_begin():
    x, y = np.zeros((5, 2), np.float32), np.arange(5) % 2
    named = data.from_arrays(x, y, x, y, ids=["ann/1", "bob/1", "ann/2", "ann/3", "anna/1"])
    rng = np.random.default_rng(0)
    assert forget_sets.of_ids(named, "ann/", None, rng).tolist() == [0, 2, 3]
    assert forget_sets.of_ids(named, "ann/", None, rng, np.array([2])).tolist() == [0, 3]
    assert set(forget_sets.of_ids(named, "ann/", 2, rng, np.array([2]))) == {0, 3}
    with pytest.raises(ForgetSetError, match=r"begins with 'cyd/'.*ids such as 'ann/1'"):
        forget_sets.of_ids(named, "cyd/", None, rng)
    with pytest.raises(ForgetSetError, match=r"begins with 'ann/'.*has no ids"):
        forget_sets.of_ids(data.from_arrays(x, y, x, y), "ann/", None, rng)
