"""The data sets of the study; each registers its loader."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from platformdirs import user_cache_dir
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveInt

from dmmlib.data import Dataset, from_arrays, register
from dmmlib.errors import ChecksumError, DataError
from dmmlib.files import resource

EMBEDDED_FASHION_MNIST = resource("data") / "fashion_mnist_12k.npz"
FASHION_MNIST_SHA256 = "5842fe826a288fad272026e5787b76d182bd1474bec6f4fca925d0dabbfafff0"
BOMB = 2**30  # bytes up to which an archive may unpack to whatever many times its size
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
    return npz(
        EMBEDDED_FASHION_MNIST,
        name="fashion-mnist",
        class_names=FASHION_MNIST_CLASSES,
        mean=(0.286,),
        std=(0.353,),
    )


@register("npz")
def npz(
    path: str | Path,
    name: str = "",
    class_names: tuple[str, ...] | None = None,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.25,),
) -> Dataset:
    """A data set from an .npz file; see `data.load`, which takes its path as a name."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the path of an .npz file.")
    try:
        with zipfile.ZipFile(path) as members:
            packed, unpacked = (sum(getattr(i, k) for i in members.infolist()) for k in ("compress_size", "file_size"))
        if unpacked > max(BOMB, 200 * packed):
            raise ValueError(f"its {packed:,} bytes would unpack to {unpacked:,}")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # a damaged file makes numpy, zipfile and zlib raise a dozen kinds
        raise DataError(f"{path} cannot be read as an .npz file ({error}); fetch or build it again.") from error
    val = "val" if "x_val" in arrays else "test"
    keys = ("x_train", "y_train", f"x_{val}", f"y_{val}")
    if missing := [key for key in keys if key not in arrays]:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; an .npz data set holds x_train, y_train and x_val, y_val "
            "(or x_test, y_test)."
        )
    if class_names is None and "class_names" in arrays:
        class_names = tuple(str(c) for c in arrays["class_names"].ravel())
    points, ids = (arrays[key] for key in keys), arrays.get("ids")
    return from_arrays(*points, name=name or path.stem, class_names=class_names, mean=mean, std=std, ids=ids)


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
            return npz(archive, **constants)
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


@register("shapes")
def shapes(side: PositiveInt = 16, noise: NonNegativeFloat = 0.1, draw: NonNegativeInt = 0) -> Dataset:
    """Draw 8,000 RGB images of a disc, a ring, a square or a cross: any size, place and two colours, under noise."""
    names, n_train, n = ("disc", "ring", "square", "cross"), 6000, 8000
    rng = np.random.default_rng(draw)
    y = rng.integers(0, len(names), n)
    radius, row, column = (rng.uniform(low, high, (n, 1, 1)) * side for low, high in ((0.2, 0.35), *2 * [(0.35, 0.65)]))
    v, h = (np.abs(np.arange(side)[at] - place) for at, place in ((np.s_[:, None], row), (np.s_[None], column)))
    far, wide, line = np.hypot(v, h), np.maximum(v, h), side / 12
    drawn = np.stack(
        [far < radius, np.abs(far - radius) < line, wide < radius, (np.minimum(v, h) < line) & (wide < radius)]
    )
    inside = drawn[y, np.arange(n)][..., None]
    colours = rng.uniform(0, 1, (2, n, 1, 1, 3))
    images = np.where(inside, *colours) + noise * rng.standard_normal((n, side, side, 3))
    x = (255 * images.clip(0, 1)).astype(np.uint8)
    return from_arrays(x[:n_train], y[:n_train], x[n_train:], y[n_train:], name="shapes", class_names=names)
