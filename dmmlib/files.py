"""Folders that come with the library, files that are written whole or not at all, and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dmmlib.errors import StoreError

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


def check_name(name: object, error: type[Exception]) -> str:
    """A name that can be a file's: letters, digits, spaces and _ + - . but not only dots; raises `error` for others."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w+. -]+", name) or not name.strip(". "):
        raise error(
            f"{name!r} is no name for a file; use letters, digits, spaces and _ + - . only, and more than dots."
        )
    return name


def short(content: bytes) -> str:
    """Return 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash a JSON-serialisable configuration."""
    return short(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; raises StoreError if the file is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as JSON ({error}); restore or delete it.") from error
