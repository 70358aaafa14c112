"""What someone means by a text: indices, ids, file names, folders, classes; as words, CSV or JSON; see test_own."""

import json

import numpy as np
import pytest

from dmmlib import data, forget_sets
from dmmlib.errors import DataError, ForgetSetError
from dmmlib.own import requests

FILES = ["train/bag/0001.png", "train/bag/0002.png", "train/ankle boot/0001.png", "train/ankle boot/77.png"]


@pytest.fixture(scope="module")
def arrays():
    x = np.zeros((12, 2, 2, 1), np.uint8)
    return data.from_arrays(x, np.arange(12) % 3, x[:3], np.arange(3), class_names=("bag", "ankle boot", "coat"))


@pytest.fixture(scope="module")
def files():
    x = np.zeros((4, 2, 2, 1), np.uint8)
    y = np.array([0, 0, 1, 1])
    return data.from_arrays(x, y, x, y, class_names=("bag", "ankle boot"), ids=FILES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3, 10 5", [3, 10, 5]),
        ("[1,2]\n3", [1, 2, 3]),
        ("7;8;7", [7, 8]),
        ("\ufeff4\r\n5\r\n", [4, 5]),
        ("bag", [0, 3, 6, 9]),
        ("Ankle Boot, 3", [1, 4, 7, 10, 3]),
        ("id,label\n3,1\n10,0\n", [3, 10]),
        ("label;id\r\n1;3\r\n0;10\r\n", [3, 10]),
        ("index\tid\n1\t900\n2\t901", [1, 2]),
        ('"file","id"\n"a, b",4\n', [4]),
        ("index\n5\n6", [5, 6]),
        ("class\ncoat\nbag", [2, 5, 8, 11, 0, 3, 6, 9]),
        ("label\n2", [2, 5, 8, 11]),
        ('["coat", 3]', [2, 5, 8, 11, 3]),
        ('{"ids": [3, 4]}', [3, 4]),
    ],
)
def test_points_are_found_however_they_are_given(arrays, text, expected):
    assert requests.read(text, arrays).tolist() == expected


def test_a_class_that_has_a_number_for_its_name_is_that_class():
    x, y = np.zeros((6, 2, 2, 1), np.uint8), np.array([0, 1, 2, 0, 1, 2])
    numbered = data.from_arrays(x, y, x, y, class_names=("1", "10", "2"))
    for text, label in (("class\n2", 2), ("label\n10", 1), ("class\n1", 0)):
        assert requests.read(text, numbered).tolist() == [label, label + 3]
    assert requests.resolve("10", numbered)[0].tolist() == [1, 4]
    with pytest.raises(ForgetSetError, match="'0' is no training point"):
        requests.read("class\n0", numbered)
    cased = data.from_arrays(x, y, x, y, class_names=("A", "a", "b"))
    assert [requests.read(f"class\n{name}", cased)[0] for name in "AaB"] == [0, 1, 2]


def test_ids_are_found_by_their_whole_names_whatever_parts_them():
    x, y = np.zeros((2, 2, 2, 1), np.uint8), np.array([0, 1])
    windows = data.from_arrays(x, y, x, y, ids=["train\\cat\\1.png", "train\\dog\\1.png"])
    for name in ("train\\dog\\1.png", "train/dog/1.png"):
        assert requests.read(name, windows).tolist() == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train/bag/0002.png", [1]),
        ("bag/0002.png\n77.png", [1, 3]),
        ("77.png", [3]),
        ("ankle boot/0001.png, 0", [2, 0]),
        ("./train\\bag\\0001.png", [0]),
        ("train/ankle boot/", [2, 3]),
        ("file,label\ntrain/bag/0001.png,bag\nankle boot/77.png,boot", [0, 3]),
        ('{"ids": ["train/bag/0001.png"]}', [0]),
    ],
)
def test_file_names_and_folders_are_found_by_the_end_of_their_paths(files, text, expected):
    assert requests.read(text, files).tolist() == expected


def test_a_number_in_a_column_of_ids_is_an_id_where_the_data_has_ids():
    x = np.zeros((3, 2, 2, 1), np.uint8)
    numbered = data.from_arrays(x, np.array([0, 1, 0]), x, np.array([0, 1, 0]), ids=[902, 900, 1])
    assert requests.read("id\n900\n1", numbered).tolist() == [1, 2]
    assert requests.read("index\n1", numbered).tolist() == requests.resolve([1], numbered)[0].tolist() == [1]
    with pytest.raises(ForgetSetError, match=r"'1' is the id of one point and the index of another; .* id, or index"):
        requests.read("1", numbered)
    with pytest.raises(ForgetSetError, match=r"'0' is no id, but an index; .* id, or index"):
        requests.read("0", numbered)
    with pytest.raises(ForgetSetError, match="line 2: '0' is no training point"):
        requests.read("id\n0", numbered)


@pytest.mark.parametrize(
    ("text", "source", "message"),
    [
        ("3, four", "The text", "line 1: 'four' is no training point. Give indices from 0 to 11, or classes"),
        ("a.png b.png 3", "The text", r"'a.png' is no .*'b.png' is no"),
        ("3.5", "The text", "'3.5'"),
        ("  ", "The text", "is empty"),
        ("id,label\n", "x.csv", "x.csv is empty"),
        ("3,1\n4,0", "mine.csv", "mine.csv begins with '3,1'; name its columns"),
        ("customer,label\n3,1", "mine.csv", "mine.csv begins with 'customer,label'; name its columns"),
        ("customer,label\n3,1", "The text", "'customer' is no training point"),
        ("cust-3,1", "mine.csv", "mine.csv begins with 'cust-3,1'; name its columns"),
        ("5, 120", "The text", "'120' is no training point"),
        ("-1", "The text", "'-1' is no training point"),
        ("{bad", "x.json", "x.json is no JSON"),
        ('["a", {}]', "x.json", "holds {}; give one flat list"),
        ('{"name": "x"}', "x.json", "lacks data_sha256, indices"),
        ("label\n9", "The text", "line 2: '9' is no training point"),
        ("file\n" + "x" * 140_000, "The text", "no CSV .*field larger"),
    ],
)
def test_what_names_nothing_is_said(arrays, text, source, message):
    with pytest.raises(ForgetSetError, match=message):
        requests.read(text, arrays, source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "x"}', "lacks data_sha256, indices"),
        ('{"class": "1"}', r"has the keys \['class'\]; give a list, or 'ids' or 'indices'"),
        ('{"indices": [[1, 2], [3]]}', r"\[1, 2\] among its indices; .* flat list"),
        ('{"indices": [1, 2.5]}', "2.5 among its indices; give whole numbers"),
        ('{"indices": [true]}', "True among its indices"),
        ('{"indices": 3}', "indices = 3; give a list"),
        ('{"indices": [3], "made_by": "me"}', "made_by = 'me'; give a mapping"),
        ('{"indices": [3], "data_sha256": 5}', "data_sha256 = 5; give text"),
        ('{"indices": [3], "data_sha256": "beef", "name": "x"}', "made for data beef"),
    ],
)
def test_a_saved_set_that_cannot_be_read_is_said(files, text, message):
    with pytest.raises(ForgetSetError, match=message):
        requests.read(text, files)


def test_a_name_that_two_files_have_is_not_guessed(files):
    with pytest.raises(ForgetSetError, match=r"'0001.png' is no .* such as train/bag/0001.png"):
        requests.read("0001.png", files)


def test_a_saved_set_is_read_and_anothers_refused(arrays, files):
    made_by = {"name": "y", "data": 1}  # which does not get in the way
    content = vars(forget_sets.make("x", [2, 1], arrays)) | {"indices": [1, 2], "made_by": made_by}
    assert requests.read(json.dumps(content), arrays).tolist() == [1, 2]
    with pytest.raises(ForgetSetError, match="made for data"):
        requests.read(json.dumps(content), files)


def test_ids_stay_with_their_points(files, tmp_path):
    arrays = {"x_train": files.x_train, "y_train": files.y_train, "x_val": files.x_val, "y_val": files.y_val}
    np.savez(tmp_path / "d.npz", **arrays, ids=np.array(FILES))
    assert data.load(tmp_path / "d.npz").ids.tolist() == FILES
    few = data.load(tmp_path / "d.npz", n_train=3)
    assert len(few.ids) == 3
    assert set(few.ids) < set(FILES)
    assert data.load("digits").ids is None
    with pytest.raises(DataError, match="4 ids were given, 3 of them different"):
        data.from_arrays(files.x_train, files.y_train, files.x_val, files.y_val, ids=["a", "a", "b", "c"])
