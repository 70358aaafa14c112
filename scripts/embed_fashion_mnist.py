"""Rebuild data/fashion_mnist_12k.npz from the Debian package `dataset-fashion-mnist`.

    apt-get install dataset-fashion-mnist && python scripts/embed_fashion_mnist.py

The first 1,000 training and 200 test images of each class, in the order of the original files,
then shuffled once with seed 0. The output is byte-for-byte reproducible.
"""

import gzip
import hashlib
import io
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).parents[1] / "data" / "fashion_mnist_12k.npz"


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file (magic number, sizes, bytes)."""
    raw = gzip.decompress(path.read_bytes())
    n_dims = raw[3]
    shape = struct.unpack(f">{n_dims}I", raw[4 : 4 + 4 * n_dims])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims).reshape(shape)


def subset(part: str, per_class: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x, y = (read_idx(SOURCE / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    keep = np.concatenate([np.flatnonzero(y == c)[:per_class] for c in range(10)])
    keep = rng.permutation(keep)
    return x[keep, :, :, None], y[keep]


def main() -> int:
    rng = np.random.default_rng(0)
    x_train, y_train = subset("train", 1000, rng)
    x_test, y_test = subset("t10k", 200, rng)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    with zipfile.ZipFile(TARGET, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_LZMA)
    digest = hashlib.sha256(TARGET.read_bytes()).hexdigest()
    sys.stdout.write(f"{digest}  {TARGET.name} ({TARGET.stat().st_size / 1e6:.1f} MB)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
