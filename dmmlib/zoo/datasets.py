"""The data sets of the study; each registers its loader."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from platformdirs import user_cache_dir

from dmmlib.data import Dataset, from_arrays, from_npz, register
from dmmlib.errors import ChecksumError, DataError
from dmmlib.files import resource

EMBEDDED_FASHION_MNIST = resource("data") / "fashion_mnist_12k.npz"
FASHION_MNIST_SHA256 = "5842fe826a288fad272026e5787b76d182bd1474bec6f4fca925d0dabbfafff0"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"

FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@register("fashion-mnist")
def fashion_mnist() -> Dataset:
    """The embedded subset: 10,000 training and 2,000 test images (data/README.md)."""
    check_sha256(EMBEDDED_FASHION_MNIST, FASHION_MNIST_SHA256)
    return from_npz(
        EMBEDDED_FASHION_MNIST,
        name="fashion-mnist",
        class_names=FASHION_MNIST_CLASSES,
        mean=(0.286,),
        std=(0.353,),
    )


@register("digits")
def digits() -> Dataset:
    """scikit-learn's 8 x 8 digits: 1,297 to train on and 500 to validate, in a fixed random order."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = np.round(images[order].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    y = labels[order]
    return from_arrays(x[:1297], y[:1297], x[1297:], y[1297:], name="digits", mean=(0.305,), std=(0.376,))


@register("cifar10")
def cifar10(path: str | Path | None = None) -> Dataset:
    """CIFAR-10 from its standard python archive, or from an .npz of the same images.

    Args:
        path: an .npz file, the archive, or a directory that holds `cifar-10-python.tar.gz`; None downloads
            the archive once into the user's cache.
    """
    constants: dict[str, Any] = {
        "name": "cifar10",
        "class_names": CIFAR10_CLASSES,
        "mean": (0.491, 0.482, 0.447),
        "std": (0.247, 0.243, 0.262),
    }
    if path is None:
        known, place = f"sha256:{CIFAR10_SHA256}", user_cache_dir("dmmlib")
        try:
            archive = Path(pooch.retrieve(CIFAR10_URL, known, "cifar-10-python.tar.gz", place))
        except (OSError, ValueError) as error:  # no network, a full disk, another file than the one known
            raise DataError(
                f"{CIFAR10_URL} cannot be fetched to {place} ({error}); fetch it, and set data.path."
            ) from error
    else:
        archive = Path(path).expanduser()
        if archive.suffix == ".npz":
            return from_npz(archive, **constants)
        if archive.is_dir():
            archive = archive / "cifar-10-python.tar.gz"
    check_sha256(archive, CIFAR10_SHA256)  # before anything is unpickled
    batches: dict[str, dict[bytes, Any]] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar.getmembers():
            if "_batch" in Path(member.name).name and (file := tar.extractfile(member)) is not None:
                batches[Path(member.name).name] = pickle.load(io.BytesIO(file.read()), encoding="bytes")

    def stack(keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
        x = np.concatenate([np.asarray(batches[k][b"data"], np.uint8) for k in keys])
        y = np.concatenate([np.asarray(batches[k][b"labels"], np.int64) for k in keys])
        return x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), y

    train = sorted(k for k in batches if k.startswith("data_batch"))
    return from_arrays(*stack(train), *stack(["test_batch"]), **constants)


def check_sha256(path: Path, expected: str) -> None:
    """Raise DataError if the file is absent, ChecksumError if its content is another."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; restore the file or name the directory that holds it.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ChecksumError(f"{path} has SHA-256 {found}, expected {expected}; fetch or restore the file.")
