"""Images in a directory tree, a folder for each class, as arrays: decoded once, kept as .npy, mapped from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from platformdirs import user_cache_dir

from dmmlib.data import Dataset, from_arrays, register
from dmmlib.errors import DamageError, DataError
from dmmlib.files import check_name, config_hash, kept, load_json, read_json, replacing, write_json

CROP = 0.875  # of the shorter side is kept
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


def image_folder(
    root: str | Path,
    classes: Mapping[str, Sequence[str]] | None = None,
    side: int = 160,
    *,
    name: str = "images",
    cache: str | Path | None = None,
) -> Dataset:
    """Load a data set in the layout of ImageNet: `root/train/<folder>/*.JPEG` and `root/val/<folder>/*.JPEG`.

    Each image is cropped to its central square of 7/8 of the shorter side and scaled to `side` pixels. The arrays are
    written once to the cache (3 side^2 bytes for each image; the user's cache directory if None), checked, and mapped
    from there. They are found by names, sizes and times of change, so a changed tree is decoded anew. Their ids are
    their files, from `root`.

    Args:
        root: the directory that holds `train` and `val`.
        classes: class name -> the folders that it is made of; each folder of both is a class if None.

    Raises DataError for a directory of another layout, a folder that is missing or empty, or a damaged image.
    """
    root, parts = Path(root).expanduser(), ("train", "val")
    if missing := [part for part in parts if not (root / part).is_dir()]:
        raise DataError(f"{root} holds no directory {missing[0]!r}; give one with train/ and val/, a folder per class.")
    if classes is None:
        classes = {f: [f] for f in sorted({p.name for part in parts for p in (root / part).iterdir() if p.is_dir()})}
    if len(classes) < 2:
        raise DataError(f"{root} gives {len(classes)} classes; at least two are needed.")
    lists = list(classes.values()) if isinstance(classes, Mapping) else [None]
    folders = [str(folder) for of_class in lists if isinstance(of_class, (list, tuple)) for folder in of_class]
    if not all(lists) or any(Path(f).name != f for f in folders) or not len(lists) <= len({*folders}) == len(folders):
        raise DataError(f"classes are {classes!r:.200}; give each class a list of folders, each folder once.")
    if type(side) is not int or not 1 <= side <= 4096:
        raise DataError(f"side={side!r} was asked for; use 1 to 4096 pixels.")
    check_name(name, DataError)
    arrays, ids = [], list[list[str]]()  # of the training images, and of the others
    for part, files in [(part, _files(root / part, classes)) for part in parts]:
        # a file replaced by one of its size and time of modification, as `cp -p` does, has another time of its entry
        changed = [(at.st_size, at.st_mtime_ns, at.st_ctime_ns) for at in (path.stat() for path, _ in files)]
        listing = [(p.relative_to(root).as_posix(), *c, label) for (p, label), c in zip(files, changed, strict=True)]
        ids.append([p for p, *_ in listing])
        key = config_hash({"files": listing, "side": side, "crop": CROP})
        path = Path(cache or Path(user_cache_dir("dmmlib")) / "images") / f"{name}-{part}-{side}-{key}.npy"
        arrays += [_decoded([path for path, _ in files], side, path), np.array([label for _, label in files])]
    return from_arrays(*arrays, name=name, class_names=tuple(classes), mean=MEAN, std=STD, ids=ids[0], val_ids=ids[1])


def _files(root: Path, classes: Mapping[str, Sequence[str]]) -> list[tuple[Path, int]]:
    files = []
    for label, (name, folders) in enumerate(classes.items()):
        for folder in map(str, folders):
            here = [path for path in sorted((root / folder).glob("*")) if path.suffix.lower() in SUFFIXES]
            if not here:
                raise DataError(f"{root / folder}, of class {name!r}, holds no images; add some or mend the classes.")
            if odd := [path for path in here if not path.is_file()]:
                raise DataError(f"{odd[0]} is no file, but a folder, a pipe or a broken link; remove it.")
            files += [(path, label) for path in here]
    return files


def _decoded(files: Sequence[Path], side: int, target: Path) -> np.ndarray:
    """Images as bytes (n, side, side, 3), mapped from `target`; decoded first if it is not there, or is damaged."""
    hashed = target.with_suffix(".json")

    def decode() -> Iterator[np.ndarray]:
        return (_image(path, side) for path in files)

    def write(path: Path, images: Iterable[np.ndarray]) -> None:
        with replacing(path) as temporary:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), side, side, 3)}
            with open(temporary, "wb") as out:  # not mapped: there a full disk ends the process
                np.lib.format.write_array_header_1_0(out, header)
                out.writelines(image.tobytes() for image in images)
            write_json(hashed, _digest(temporary))

    def read(path: Path) -> np.ndarray:
        if not hashed.exists() or read_json(hashed) != _digest(path):
            raise DamageError(f"{path} is damaged (it is not what its hash promises); a run decodes the images anew.")
        return np.load(path, mmap_mode="r", allow_pickle=False)

    return kept(target, decode, read, write)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _image(path: Path, side: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # which would be cut off at 255
                raise ValueError(f"its pixels have more than 8 bits, mode {image.mode}")
            edge = CROP * min(image.size)
            left, top = ((length - edge) / 2 for length in image.size)
            box = (left, top, left + edge, top + edge)
            return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=box))
    except Exception as error:  # a damaged file makes decoders raise a dozen kinds; a bomb has one of its own
        raise DataError(f"{path} cannot be decoded ({error}); fetch it again or remove it.") from error


@register("images")
def images(path: str | Path, side: int = 32) -> Dataset:
    """Load `image_folder` of a path, whose ids are the files' names below it."""
    return image_folder(path, side=side)


@register("living17")
def living17(path: str | None = None, side: int = 160, classes: str | None = None) -> Dataset:
    """Load ImageNet Living-17 (Santurkar et al., "BREEDS", 2020): 17 classes of animals, each of 4 ImageNet classes.

    Args:
        path: ImageNet's directory, with `train/<wnid>` and `val/<wnid>`.
        side: pixels.
        classes: JSON file of superclass -> wnids, `path`/living17.json if None. The authors' package prints it:
            `make_living17(info_dir, split=None)` of `robustness.tools.breeds_helpers`.
    """
    if path is None:
        raise DataError("living17 needs ImageNet's directory; set data.path to the one that holds train/ and val/.")
    if not isinstance(path, (str, Path)) or not isinstance(classes, (str, Path, type(None))):
        raise DataError(f"path={path!r} and classes={classes!r} were given; give a directory and a file.")
    mapping = Path(classes or Path(path) / "living17.json").expanduser()
    if not mapping.is_file():
        raise DataError(
            f"{mapping} does not exist; write Living-17's superclasses there as JSON, name -> list of wnids, or name "
            "the file in data.options.classes."
        )
    content = load_json(mapping)
    valid = isinstance(content, dict) and all(isinstance(wnids, list) and wnids for wnids in content.values())
    if not valid or len(content) != 17:
        raise DataError(f"{mapping} is no mapping of 17 superclasses to lists of wnids; see dmmlib/app/images.py.")
    return image_folder(path, content, side, name="living17")
