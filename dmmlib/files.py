"""Folders that come with the library, files that are written whole or not at all and checked when read, and hashes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import unicodedata
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dmmlib.errors import DamageError, StoreError

if TYPE_CHECKING:  # imported where they are used: a command that computes nothing needs neither
    import numpy as np
    import pandas as pd

T = TypeVar("T")
FORMAT = 2  # of all that is kept on disk; raising it changes every key, so nothing older is misread

SHARE = Path(__file__).parent / "share"  # a wheel has the folders in it that a clone has beside the package
OWN = SHARE if SHARE.is_dir() else Path(__file__).parents[1]
LAID_OUT = ("notebooks", "presets")  # what `dmm init` copies, to be worked on


def _is_laid_out(folder: Path) -> bool:
    return (folder / "presets" / "smoke.yaml").is_file()


def home() -> Path:
    """The folder to work in: the nearest one around the current folder that is a clone or that `dmm init` laid out.

    If there is none, it is the clone that the library is imported from or, for a wheel, the current folder.
    """
    here = Path.cwd()
    otherwise = here if OWN == SHARE else OWN
    return next((folder for folder in (here, *here.parents) if _is_laid_out(folder)), otherwise)


def resource(name: str) -> Path:
    """A folder that comes with the library (presets, notebooks, data), or the copy that `dmm init` made of it."""
    own = home() / name
    return own if name in LAID_OUT and _is_laid_out(home()) and own.is_dir() else OWN / name


def place(name: str) -> Path:
    """Where everything computed goes, "runs" or "figures": $DMM_RUNS or $DMM_FIGURES, or a folder of `home()`."""
    return Path(os.environ.get(f"DMM_{name.upper()}") or home() / name)


def figures_of(runs: str | Path | None) -> Path:
    """Where figures go: $DMM_FIGURES, or beside the tables where a folder of runs is given, or a folder of `home()`."""
    return Path(runs) if runs and not os.environ.get("DMM_FIGURES") else place("figures")


def check_name(name: object, error: type[Exception]) -> str:
    """A name that can be a file's on any disk: of letters, digits, spaces and _ + - . ; raises `error` for others."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w+. -]{1,100}", name) or name.strip(" ").rstrip(".") != name:
        raise error(f"{name!r} is no name for a file; use letters, digits and _ + - . with spaces only between them.")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|(com|lpt)\d)(\..*)?", name):
        raise error(f"{name!r} is no name for a file, but of a device on Windows; choose another.")
    return name


def check_folder(path: Path) -> None:
    """Raise StoreError where a file stands in the place of a folder, or of one that it is in."""
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise StoreError(f"{path} cannot be a folder, as {there} is a file; choose another place.")


def inside(folder: Path, name: str) -> Path:
    """A file in a folder; raises StoreError for a name that leads out of it."""
    if not Path(os.path.abspath(folder / name)).is_relative_to(os.path.abspath(folder)):
        raise StoreError(f"{name!r} leads out of {folder}; give the name of a file in it.")
    return folder / name


def folded(name: str) -> str:
    """A name as disks see it that tell apart neither case nor ways to write an accent."""
    return unicodedata.normalize("NFC", name).casefold()


def check_alone(path: Path, error: type[Exception]) -> None:
    """Raise `error` where another's name differs by case alone: many disks take both for one."""
    others = os.listdir(path.parent) if path.parent.is_dir() else []
    if twins := [name for name in others if name != path.name and folded(name) == folded(path.name)]:
        raise error(f"{path} is on many disks the same as {twins[0]}, which is there; choose another name.")


def short(content: bytes) -> str:
    """Return 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash a JSON-serialisable configuration, for what is kept of it in the present format."""
    return short(json.dumps([FORMAT, config], sort_keys=True, separators=(",", ":")).encode())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place when the block ends well.

    Raises StoreError if it cannot be written (disk full, read-only); `path` is then what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror or error}); free space or choose another place. "
            "What was there before is unchanged."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def load_json(path: Path) -> Any:
    """Read JSON that people may have written; raises StoreError if the file is missing or no JSON."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read as JSON ({error}); mend it, or name another.") from error


def parse_json(text: str) -> Any:
    """JSON that people may have written; ValueError for a key given twice, whose first value would be lost."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check_once([key for key, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping)


def check_once(keys: list[str]) -> None:
    """Raise ValueError for a key that is given twice."""
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is given twice; keep one")


# --- what the library keeps for itself: with a hash of the content and of the file's name, checked when read ---


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, for `read_json`."""
    content = {"format": FORMAT, "sha256": _seal(path, json.dumps(value).encode()), "content": value}
    write_bytes(path, json.dumps(content, indent=1).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote there; raises DamageError if it is another, StoreError if it cannot be read."""
    with _checking(path):
        found = json.loads(path.read_bytes())
        _check(found["sha256"], path, json.dumps(found["content"]).encode())
        return found["content"]


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as .npz with the hash at its end, atomically, for `read_arrays`."""
    import numpy as np

    np.savez(packed := io.BytesIO(), **arrays)
    write_bytes(path, packed.getvalue() + f"sha256 {_seal(path, packed.getvalue())}".encode())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote there; raises as `read_json`."""
    import numpy as np

    with _checking(path):
        packed, _, seal = path.read_bytes().rpartition(b"sha256 ")
        _check(seal.decode(), path, packed)
        with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
            return dict(archive)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, atomically; its hash goes to a hidden file beside it, so that anything reads the table."""
    content = table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    write_json(hash_of(path), _seal(path, content))
    write_bytes(path, content)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV, checked if it has a hash; raises as `read_json`."""
    import pandas as pd

    seal = read_json(hash_of(path)) if hash_of(path).exists() else None
    with _checking(path):
        content = path.read_bytes()
        _check(seal or _seal(path, content), path, content)
        return pd.read_csv(io.BytesIO(content))


def hash_of(path: Path) -> Path:
    """Name the file that holds the hash of a table."""
    return path.with_name(f".{path.name}.json")


def kept(path: Path, make: Callable[[], Any], read: Callable[[Path], T], write: Callable[[Path, Any], None]) -> T:
    """Read what is kept at a path; where there is nothing, or it is damaged, it is made and written first.

    `write` may write nothing of what cannot be kept, which is then made each time.
    """
    if path.exists():
        try:
            return read(path)
        except DamageError as error:
            warnings.warn(str(error), stacklevel=2)
    write(path, made := make())
    return read(path) if path.exists() else made


@contextmanager
def _checking(path: Path) -> Iterator[None]:
    """Turn whatever reading a file raises into one sentence that names it."""
    try:
        yield
    except Exception as error:  # damage is raised as a dozen kinds, by zipfile alone as six
        if isinstance(error, OSError) and error.errno:
            raise StoreError(f"{path} cannot be read ({error.strerror}); restore or delete it.") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamageError(f"{path} is damaged, or of an older version ({reason:.200}); a run makes it anew.") from error


def _check(seal: str, path: Path, content: bytes) -> None:
    if seal != _seal(path, content):
        raise ValueError("it is not what its hash promises")


def _seal(path: Path, content: bytes) -> str:
    """Hash what a file holds, with its name: a file in the place of another is damage, too."""
    return short(f"{FORMAT} {path.name} ".encode() + content)
