"""Files that come with the library, files that it writes whole or not at all, and hashes by which they are found."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dmmlib.errors import StoreError


def resource(name: str) -> Path:
    """A folder that comes with the library (presets, notebooks, data): beside the package, or in it from a wheel."""
    inside = Path(str(importlib.resources.files("dmmlib"))) / "share" / name
    return inside if inside.exists() else Path(__file__).parents[1] / name


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
