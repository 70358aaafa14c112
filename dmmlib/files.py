"""Where files lie, and how they are written: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import json
import os
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


def _root() -> Path:
    here = Path.cwd()
    otherwise = here if OWN == SHARE else OWN
    return next((folder for folder in (here, *here.parents) if _is_laid_out(folder)), otherwise)


ROOT = _root()
"""The folder to work in: the nearest one around the current folder that is a clone or that `dmm init` laid out; else
the clone that the library is imported from, or, for an installed library, the current folder."""


def resource(name: str) -> Path:
    """A folder that comes with the library (presets, notebooks, data), or the copy that `dmm init` made of it."""
    own = ROOT / name
    return own if name in LAID_OUT and _is_laid_out(ROOT) and own.is_dir() else OWN / name


def place(name: str) -> Path:
    """Where everything computed goes, "runs" or "figures": $DMM_RUNS or $DMM_FIGURES, or a folder of `ROOT`."""
    return Path(os.environ.get(f"DMM_{name.upper()}") or ROOT / name)


def home() -> Path:
    """Where `runs/` and `figures/` are by default: the clone that holds the library, or the current folder."""
    clone = Path(__file__).parents[1]
    return clone if (clone / "pyproject.toml").exists() else Path.cwd()


def short(content: bytes) -> str:
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of a JSON-serialisable configuration."""
    return short(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    Raises:
        StoreError: if it cannot be written (disk full, read-only); `path` is then what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
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
    """Read JSON.

    Raises:
        StoreError: if the file is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as JSON ({error}); restore or delete it.") from error
