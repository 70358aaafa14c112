"""Loading: what is embedded, generated or beside the checkout, and what is refused."""

import contextlib
import dataclasses
import hashlib
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from dmmlib import data, models
from dmmlib.errors import ChecksumError, DataError, MethodError, OptionError
from dmmlib.zoo import datasets
from tests.conftest import SHARED, damages


def test_embedded_fashion_mnist_is_whole_and_balanced():
    d = data.load("fashion-mnist")
    assert (d.n_train, d.n_val, d.n_classes) == (10_000, 2_000, 10)
    assert d.x_train.shape[1:] == (28, 28, 1)
    assert d.x_train.dtype == np.uint8
    assert (np.bincount(d.y_train) == 1000).all()
    assert (np.bincount(d.y_val) == 200).all()


def test_a_subset_depends_on_its_seed_only():
    a, b, c = (data.load("fashion-mnist", 50, 20, seed) for seed in (0, 0, 1))
    assert a.sha256 == b.sha256 != c.sha256
    assert a.x.shape == (70, 28, 28, 1)


def test_damage_is_noticed(tmp_path, monkeypatch):
    copy = tmp_path / "f.npz"
    raw = bytearray(datasets.EMBEDDED_FASHION_MNIST.read_bytes())
    raw[1000] ^= 1
    copy.write_bytes(raw)
    monkeypatch.setattr(datasets, "EMBEDDED_FASHION_MNIST", copy)
    with pytest.raises(ChecksumError, match="expected 5842fe"):
        data.load("fashion-mnist")


def test_unknown_names_and_sizes():
    with pytest.raises(MethodError, match="Unknown data set 'mnits'; use one of cifar10, digits, fashion-mnist"):
        data.load("mnits")
    with pytest.raises(DataError, match=r"n_train=20000.*ask for 1 to 10000"):
        data.load("fashion-mnist", 20_000)


def test_npz_round_trip_and_missing_arrays(tmp_path):
    d = data.load("digits", 30, 10)
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=d.x_train, y_train=d.y_train, x_val=d.x_val, y_val=d.y_val)
    assert data.load(str(path)).sha256 == d.sha256
    np.savez(path, x_train=d.x_train)
    with pytest.raises(DataError, match="lacks y_train, x_test, y_test"):
        data.load(str(path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read as an"):
        data.load(str(path))


def arrays(n=6, **changes):
    rng = np.random.default_rng(0)
    kwargs = {
        "x_train": rng.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8),
        "y_train": np.arange(n) % 3,
        "x_val": rng.integers(0, 256, (3, 8, 8, 1)).astype(np.uint8),
        "y_val": np.arange(3),
    }
    return kwargs | changes


def test_a_data_set_does_not_change_with_the_arrays_it_was_made_of(tmp_path):
    given = arrays()
    made = data.from_arrays(**given)
    before = made.x.copy(), made.y.copy()
    for array in given.values():
        array[:] = 0
    np.testing.assert_array_equal(made.x, before[0])
    np.testing.assert_array_equal(made.y, before[1])
    np.save(tmp_path / "x.npy", before[0][:6])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    again = data.from_arrays(**arrays(x_train=mapped))
    assert np.shares_memory(again.x_train, mapped), "arrays on disk stay there"


def test_tensors_are_taken_as_arrays_are():
    x, y = np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 4).round(1), np.arange(6) % 3
    expected = data.from_arrays(x, y, x, y)
    given = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)
    assert data.from_arrays(*given, *given).sha256 == expected.sha256
    half = torch.ones(6, 4, dtype=torch.bfloat16)
    assert data.from_arrays(half, y, half, y).x_train.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.arange(5)}, r"y_train has shape \(5,\)"),
        ({"x_train": np.full((6, 4), np.nan, np.float32), "x_val": np.zeros((3, 4), np.float32)}, "24 NaN or infinite"),
        ({"y_val": np.array([0, 1, 7])}, "labels from 0 to 7, but there are 3 classes"),
        ({"y_val": np.array([0, 1, -1])}, "labels from -1"),
        ({"x_train": np.zeros((6, 8, 8, 1), np.int32)}, "int32; give uint8"),
        ({"x_train": np.zeros((6, 64), np.uint8)}, "height, width, channels"),
        ({"y_train": np.zeros(6)}, "integer class labels"),
        ({"x_val": np.zeros((3, 9, 9, 1), np.uint8)}, "give both the same shape"),
        ({"x_val": np.zeros((3, 8, 8, 1))}, "float32 points.*same shape and type"),
        ({"x_train": np.uint8(3)}, r"x_train has shape \(\)"),
        ({"y_train": np.int64(1)}, r"y_train has shape \(\)"),
        ({"x_train": [[1.0], [1.0, 2.0]]}, "lists of the same length"),
        ({"x_train": np.zeros(6, np.float32)}, "at least one value"),
        ({"x_train": np.zeros((6, 0, 8, 1), np.uint8)}, "at least one value"),
        ({"x_train": np.full((6, 4), 1e300)}, "24 NaN or infinite values in float32"),
        ({"y_train": np.full(6, 10**12)}, "labels from 1000000000000"),
        ({"y_train": np.full(6, 2**63 - 1)}, "labels from 9223372036854775807"),
        ({"y_train": np.full(6, 2**63, np.uint64)}, "y_train holds the label 9223372036854775808"),
        ({"y_train": [0, 1, 2, 0, 1, 2**63]}, "y_train holds the label 9223372036854775808"),
        ({"y_train": [0, 1, 2, 0, 1, -(2**64)]}, "y_train holds the label -18446744073709551616"),
        ({"y_train": np.zeros(6, int), "y_val": np.zeros(3, int)}, "at least two, each with a name"),
        ({"class_names": ("a", "a", "b")}, "each with a name of its own"),
        ({"class_names": "abc"}, "each with a name of its own"),
        ({"std": (0.0,)}, r"std is \(0.0,\); give one number"),
        ({"std": (1e-300,)}, "std is"),
        ({"std": (float("nan"),)}, "std is"),
        ({"mean": (0.1, 0.2, 0.3)}, "mean is .*for each of 1 channels"),
        ({"mean": (127.0,)}, "on a scale where 255 is 1"),
        ({"mean": ()}, "mean is"),
        ({"mean": "abc"}, "mean is 'abc'"),
        ({"mean": None}, "mean is None"),
        ({"x_train": np.ma.masked_greater(np.ones((6, 4)), 0)}, "24 NaN or infinite"),
        ({"y_train": np.ma.masked_equal(np.arange(6) % 3, 0)}, "no array .*fill"),
    ],
)
def test_arrays_that_cannot_be_used(changes, message):
    with pytest.raises(DataError, match=message):
        data.from_arrays(**arrays(**changes))


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, torch.tensor, np.array])
def test_constants_of_any_precision_are_the_same(kind):
    x = arrays()["x_train"]
    d = data.from_arrays(**arrays(mean=(kind(0.5),), std=kind(0.25)))
    assert d == dataclasses.replace(d, mean=(0.5,), std=(0.25,))
    assert {type(c) for c in (*d.mean, *d.std)} == {float}
    of_pixels = data.from_arrays(**arrays(mean=tuple(x.mean((0, 1, 2)) / 255)))
    assert models.normalise(of_pixels, x).dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"seed": -1}, DataError, "seed=-1"),
        ({"seed": 0.5}, DataError, "whole number"),
        ({"n_train": 10.0}, DataError, "n_train=10.0"),
        ({"n_val": "9"}, DataError, "n_val='9'"),
        ({"nothing": 1}, OptionError, "nothing.*its own: none"),
        ({"name": "no-loader"}, DataError, "returned int; return"),
    ],
)
def test_what_is_asked_of_a_loader_is_checked(given, error, message):
    data.register("no-loader")(lambda: 3)
    try:
        with pytest.raises(error, match=message):
            data.load(**({"name": "digits"} | given))
    finally:
        data.DATASETS.remove("no-loader")


def test_archives_that_are_more_or_less_than_they_seem(tmp_path):
    path, rng = tmp_path / "a.npz", np.random.default_rng(0)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
        bomb.open("x_train.npy", "w") as member,
    ):
        for _ in range(1100):
            member.write(bytes(2**20))
    with pytest.raises(DataError, match="would unpack to 1,153,433,600"):
        data.load(path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)})
    with zipfile.ZipFile(path, "w") as huge:
        huge.writestr("x_train.npy", header.getvalue())
    with pytest.raises(DataError, match="cannot be read as an"):
        data.load(path)
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(DataError, match="not a zip file"):
        data.load((tmp_path / "b.npy").rename(tmp_path / "b.npz"))
    np.savez_compressed(path, **arrays())
    for _ in damages(path, rng):
        with contextlib.suppress(DataError):
            data.load(path)


def cifar_archive(path, pixels, labels):
    """An archive of the standard layout."""
    with tarfile.open(path, "w:gz") as tar:
        for name in ["data_batch_1", "data_batch_2", "test_batch"]:
            raw = pickle.dumps({b"data": pixels, b"labels": labels})
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def test_cifar10_archive_is_read_only_after_its_checksum(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072)).astype(np.uint8)
    archive = tmp_path / "cifar-10-python.tar.gz"
    cifar_archive(archive, pixels, list(range(10)) * 2)
    with pytest.raises(ChecksumError, match="expected 6d958be0"):
        data.load("cifar10", path=tmp_path)
    monkeypatch.setattr(datasets, "CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    d = data.load("cifar10", path=tmp_path)
    assert (d.n_train, d.n_val) == (40, 20)
    np.testing.assert_array_equal(d.x_train[0, :, :, 1].ravel(), pixels[0, 1024:2048])
    with pytest.raises(DataError, match="does not exist"):
        data.load("cifar10", path=tmp_path / "elsewhere")


def test_cifar10_images_from_npz():
    path = SHARED / "data" / "cifar10_jpeg_12k.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    d = data.load("cifar10", 100, 50, path=path)
    assert d.x_train.shape == (100, 32, 32, 3)
    assert d.class_names[0] == "airplane"


def test_a_users_own_loader():
    @data.register("three-points")
    def load():
        return data.from_arrays(**arrays(3))

    try:
        assert data.load("three-points").n_train == 3
    finally:
        data.DATASETS.remove("three-points")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("hash of downloaded file")])
def test_a_download_that_fails_is_one_sentence(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("pooch.retrieve", fails)
    with pytest.raises(DataError, match=r"cannot be fetched to .* set data\.path"):
        data.load("cifar10")


def test_requests_are_in_the_data_and_known_by_id():
    d, again = (data.load("requests") for _ in range(2))
    assert d.sha256 == again.sha256
    kinds = np.array([name.partition("/")[0] for name in d.ids])
    assert dict(zip(*np.unique(kinds, return_counts=True), strict=True)) == {
        "copied": 50, "copy": 50, "mislabelled": 200, "outlier": 60, "plain": 1580, "trigger": 60,
    }  # fmt: skip
    x = {kind: d.x_train[kinds == kind] for kind in np.unique(kinds)}
    np.testing.assert_array_equal(x["copy"], np.roll(x["copied"], 1, axis=2))
    assert (x["trigger"][:, -4:, -4:] == 255).all()
    assert (d.y_train[kinds == "trigger"] == 0).all()
    true, trigger, copies = (d.probes[name] for name in ("true label", "trigger", "copies"))
    np.testing.assert_array_equal(d.x_val[true], x["mislabelled"])
    assert (d.y_val[true] != d.y_train[kinds == "mislabelled"]).all()
    assert (d.y_val[trigger] == 0).all()
    assert (d.x_val[trigger][:, -4:, -4:] == 255).all()
    np.testing.assert_array_equal(d.x_val[copies], x["copy"])
    assert min(map(min, d.probes.values())) == 500
    assert "person" not in d.probes


def test_images_of_one_person_leave_all_others_as_they_are():
    d, person = data.load("requests"), data.load("requests", person=40)
    theirs = np.array([name.startswith("person/") for name in person.ids])
    assert theirs.sum() == 40
    np.testing.assert_array_equal(person.x_train[~theirs], d.x_train[~theirs])
    np.testing.assert_array_equal(person.x_train[theirs], d.x_train[theirs][:, ::-1] // 2)
    np.testing.assert_array_equal(person.y_train, d.y_train)
    assert (np.array(d.ids)[theirs] == [f"plain/{name.partition('/')[2]}" for name in person.ids[theirs]]).all()
    asked = person.probes["person"]
    assert len(asked) == 80
    np.testing.assert_array_equal(person.x_val[asked], person.x_val[:80, ::-1] // 2)
    np.testing.assert_array_equal(person.y_val[asked], person.y_val[:80])


def test_requests_of_a_base_that_is_too_small():
    with pytest.raises(DataError, match=r"2000 training images with 370 to delete.*'digits'.*1297 and 500"):
        data.load("requests", base="digits")
    for name, options in (
        ("requests", {"mislabelled": -5}), ("requests", {"draw": -1}), ("requests", {"copies": -3}),
        ("requests", {"triggers": -1}), ("shapes", {"draw": -1}), ("shapes", {"noise": -0.1}), ("shapes", {"side": 0}),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=f"Option {next(iter(options))}="):
            data.load(name, **options)
    few = [data.load("shapes", 20, 5, side=4, draw=draw) for draw in (0, 1)]
    assert few[0].sha256 != few[1].sha256


def test_probes_follow_a_draw_and_must_be_validation_points():
    x, y = np.zeros((10, 2, 2, 1), np.uint8), np.arange(10) % 2
    for wrong in ({"odd": np.array([10])}, {"odd": [[1, 2]]}, {"odd": 3}, {"odd": ["x"]}, [1, 2], np.array([1, 2])):
        with pytest.raises(DataError, match=r"probes are .*by name .*0 to 9"):
            data.from_arrays(x, y, x, y, probes=wrong)
    for taken in ("forget", "retain", "validation", "all"):
        with pytest.raises(DataError, match=f"named '{taken}'.*another name"):
            data.from_arrays(x, y, x, y, probes={taken: [1, 2]})
    data.register("probed")(
        lambda: data.from_arrays(x, y, x, np.arange(10), class_names=tuple("abcdefghij"), probes={"last": [8, 9]})
    )
    try:
        drawn = data.load("probed", n_val=8, seed=3)
    finally:
        data.DATASETS.remove("probed")
    assert set(drawn.y_val[drawn.probes["last"]]) == {8, 9} & set(drawn.y_val)
    assert len(drawn.probes["last"]) > 0
