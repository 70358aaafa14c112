"""Loading: what is embedded, generated or beside the checkout, and what is refused."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest

from dmmlib import data
from dmmlib.errors import ChecksumError, DataError, MethodError
from dmmlib.zoo import datasets
from tests.conftest import SHARED


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
    ],
)
def test_arrays_that_cannot_be_used(changes, message):
    with pytest.raises(DataError, match=message):
        data.from_arrays(**arrays(**changes))


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
