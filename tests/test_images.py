"""Images in folders become arrays once; Living-17 and ResNet-18 are wired to them."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dmmlib import data, metrics, models, presets
from dmmlib.app import images
from dmmlib.errors import DataError
from dmmlib.progress import silent
from dmmlib.study import Study
from dmmlib.zoo.architectures import resnet18
from tests.conftest import SHARED

CIFAR = SHARED / "data" / "cifar10_jpeg_12k.npz"


def draw(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def tree(tmp_path):
    """ImageNet's layout, 34 folders, a colour a folder."""
    for k in range(34):
        for part, n in (("train", 3), ("val", 1)):
            for i in range(n):
                draw(tmp_path / "imagenet" / part / f"n{k:08d}" / f"{i}.JPEG", (7 * k, 100, 200 - 5 * k))
    return tmp_path / "imagenet"


def test_each_image_lies_under_its_label(tree, tmp_path):
    classes = {"first": ["n00000000", "n00000001"], "last": ["n00000033"]}
    d = images.image_folder(tree, classes, side=16, cache=tmp_path / "cache")
    assert all(name.startswith("train/") for name in d.ids)
    assert len(d.ids) == d.n_train
    assert (d.x_train.shape, d.x_val.shape) == ((9, 16, 16, 3), (3, 16, 16, 3))
    assert d.y_train.tolist() == [0] * 6 + [1] * 3
    assert d.class_names == ("first", "last")
    assert np.abs(d.x_train[-1].astype(int) - [7 * 33, 100, 200 - 5 * 33]).max() <= 3
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_the_file_grows_with_what_is_decoded(tree, tmp_path, monkeypatch):
    """So that a full disk is an error of a write; what is mapped beyond it ends the process by a signal."""
    decode, seen = images._image, []

    def noted(path, side):
        seen.append(sum(p.stat().st_size for p in (tmp_path / "cache").glob(".n-train*.tmp")))
        return decode(path, side)

    monkeypatch.setattr(images, "_image", noted)
    d = images.image_folder(tree, side=64, name="n", cache=tmp_path / "cache")
    whole = d.x_train.nbytes
    assert seen[0] < whole / 10
    assert whole / 2 < seen[d.n_train - 1] < whole
    plain = np.stack([decode(tree / name, 64) for name in d.ids])
    assert np.array_equal(d.x_train, plain)


def test_arrays_are_decoded_once_and_mapped(tree, tmp_path, monkeypatch):
    first = images.image_folder(tree, side=8, cache=tmp_path / "cache")
    monkeypatch.setattr(Image, "open", lambda *a: pytest.fail("decoded again"))
    again = images.image_folder(tree, side=8, cache=tmp_path / "cache")
    assert again.sha256 == first.sha256
    assert again.n_classes == 34
    assert isinstance(again.x_train.base, np.memmap), "images stay on disk until they are used"
    monkeypatch.undo()
    draw(tree / "train" / "n00000000" / "new.png", (0, 0, 0))
    assert images.image_folder(tree, side=8, cache=tmp_path / "cache").n_train == first.n_train + 1


def test_an_image_replaced_by_one_of_its_size_and_time_is_decoded_anew(tree, tmp_path):
    first = images.image_folder(tree, side=8, cache=tmp_path / "cache")
    path = tree / "train" / "n00000000" / "0.JPEG"
    before = path.stat()
    draw(tmp_path / "other.JPEG", (255, 255, 255))
    path.write_bytes((tmp_path / "other.JPEG").read_bytes().ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = images.image_folder(tree, side=8, cache=tmp_path / "cache")
    assert again.x_train[0].min() > 250
    np.testing.assert_array_equal(again.x_train[1:], first.x_train[1:])


@pytest.mark.parametrize("place", [0, 60, -1])
@pytest.mark.parametrize("kind", ["*train*.npy", "*train*.json"])
def test_a_cache_that_is_damaged_is_named_and_decoded_anew(tree, tmp_path, kind, place):
    first = images.image_folder(tree, side=8, cache=tmp_path / "cache")
    expected = first.x_train.copy()
    (path,) = (tmp_path / "cache").glob(kind)
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=f"{path.stem}.* is damaged"):
        again = images.image_folder(tree, side=8, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again.x_train, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"side": 0}, "side=0"),
        ({"side": "8"}, "side='8'"),
        ({"side": 10**9}, "1 to 4096"),
        ({"name": "../up"}, "no name for a file"),
        ({"classes": ["n00000000", "n00000001"]}, "a list of folders"),
        ({"classes": {"a": ["n00000000"], "b": []}}, "a list of folders"),
        ({"classes": {"a": ["n00000000"], "b": [None]}}, "holds no images"),
        ({"classes": {"a": ["n00000000"], "b": ["n00000000"]}}, "each folder once"),
        ({"classes": {"a": ["n00000000"], "b": ["../val/n00000001"]}}, "a list of folders"),
    ],
)
def test_what_is_asked_of_a_tree_is_checked(tree, tmp_path, given, message):
    with pytest.raises(DataError, match=message):
        images.image_folder(tree, **({"side": 8, "cache": tmp_path / "cache"} | given))
    assert not (tmp_path / "cache").exists()


def _png(side, pixels, *chunks):
    """A PNG of one-bit pixels, whatever it says of its size."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), *chunks, (b"IDAT", zlib.compress(pixels))]
    made = [
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in (*parts, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_png(20_000, bytes(2501 * 20_000)), "decompression bomb"),
        (_png(8, bytes(16), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "too large"),
        (b"no image", "cannot identify"),
        (b"", "cannot identify"),
    ],
    ids=["pixels", "text", "other", "empty"],
)
def test_bombs_and_other_files_are_named(tree, tmp_path, content, message):
    (tree / "train" / "n00000003" / "9.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"9.png cannot be decoded .*{message}"):
        images.image_folder(tree, side=8, cache=tmp_path / "cache")


def test_a_class_of_validation_alone_is_not_left_out(tree, tmp_path):
    draw(tree / "val" / "n99" / "0.png", (0, 0, 0))
    with pytest.raises(DataError, match="of class 'n99', holds no images"):
        images.image_folder(tree, side=8, cache=tmp_path / "cache")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere.png", path)])
def test_what_is_named_as_an_image_and_is_no_file_is_said(tree, tmp_path, make):
    make(tree / "train" / "n00000003" / "9.png")
    with pytest.raises(DataError, match=r"9\.png is no file"):
        images.image_folder(tree, side=8, cache=tmp_path / "cache")


def test_more_than_eight_bits_are_refused(tree, tmp_path):
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tree / "train" / "n00000003" / "9.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        images.image_folder(tree, side=8, cache=tmp_path / "cache")


def test_the_crop_is_central(tmp_path):
    wide = np.zeros((16, 60, 3), np.uint8)
    wide[1:15, 23:37] = 255  # 7/8 of the shorter side
    for part in ("train", "val"):
        for name in ("a", "b"):
            path = tmp_path / part / name / "x.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(wide).save(path)
    d = images.image_folder(tmp_path, side=14, cache=tmp_path / "cache")
    assert (d.x_train == 255).all()


def test_what_is_wrong_is_named(tree, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="holds no directory 'train'"):
        images.image_folder(tmp_path / "nowhere", cache=cache)
    with pytest.raises(DataError, match="of class 'x', holds no images"):
        images.image_folder(tree, {"x": ["n99"], "y": ["n00000001"]}, cache=cache)
    with pytest.raises(DataError, match="gives 1 classes"):
        images.image_folder(tree, {"x": ["n00000001"]}, cache=cache)
    (tree / "val" / "n00000001" / "0.JPEG").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.JPEG cannot be decoded"):
        images.image_folder(tree, cache=cache)
    assert not list(cache.glob("*-val-*")), "a cache that was not finished is not left behind"


def test_living17_reads_its_classes_from_the_users_file(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "user_cache_dir", lambda _: str(tmp_path / "user"))
    with pytest.raises(DataError, match=r"set data\.path"):
        data.load("living17")
    with pytest.raises(DataError, match=r"living17\.json does not exist; write Living-17's superclasses"):
        data.load("living17", path=str(tree))
    (tree / "living17.json").write_text(json.dumps({"one": ["n00000000"]}))
    with pytest.raises(DataError, match="no mapping of 17 superclasses"):
        data.load("living17", path=str(tree))
    mapping = {f"class {k}": [f"n{2 * k:08d}", f"n{2 * k + 1:08d}"] for k in range(17)}
    (tree / "living17.json").write_text(json.dumps(mapping))
    d = data.load("living17", path=str(tree), side=12)
    assert (d.n_train, d.n_val, d.n_classes) == (102, 34, 17)
    assert np.bincount(d.y_train).tolist() == [6] * 17


def test_resnet18_is_the_published_size_and_trains_as_an_ensemble():
    published = resnet18((3, 224, 224), 1000)
    assert sum(p.numel() for p in published.parameters()) == 11_689_512
    from dmmlib import ensemble

    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    training = ensemble.Training(epochs=4, batch_size=8, lr=0.05, warmup=0.0)
    trained = ensemble.train(lambda: models.build("resnet18", (3, 32, 32), 2, width=4), x, y,
                             np.ones((2, 8), bool), [0, 1], training)  # fmt: skip
    logits = trained.logits(x)
    assert logits.shape == (2, 8, 2)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.skipif(not CIFAR.exists(), reason="shared/data is not beside this checkout")
def test_the_main_table_on_colour_images_with_a_narrow_resnet9(tmp_path):
    overrides = {
        "data.path": str(CIFAR), "data.n_train": 80, "data.n_val": 20, "training.epochs": 1,
        "ensembles.n_models": 4, "ensembles.chunk": 4, "ensembles.compile": False, "tuning.n_models": 4,
        "tuning.budget": 1, "model.options.width": 4,
        "datamodels.n_subsets": 20, "datamodels.n_held_out": 8, "datamodels.sizes": [20],
        "attribution.n_subsets": 12, "unlearning.checkpoints": 0,
        "forget_sets": [{"name": "random_10", "kind": "random", "size": 10}],
        "tuning.forget_sets": [{"name": "tune", "kind": "random", "size": 10}],
    }  # fmt: skip
    study = Study("cifar10-images", overrides, runs=tmp_path, progress=silent)
    assert study.data.x_train.shape == (80, 32, 32, 3)
    assert study.original_logits().shape == (4, 100, 10)
    table = study.results()
    table = table[table["statistic"] == "klom_p95"]
    assert set(table["method"]) == set(study.preset.unlearning.methods)
    assert table.groupby("method")["split"].agg(set).map(len).eq(3).all()
    assert table["value"].between(0, -np.log(metrics.FLOOR)).all()


def test_living17_is_the_papers_setting():
    p = presets.load("living17")
    assert (p.model.name, p.data.name) == ("resnet18", "living17")
    assert [f.size for f in p.forget_sets] == [500, 200, 200]
