"""Write files so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import importlib.resources
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dmmlib.errors import StoreError


def resource(name: str) -> Path:
    """A folder that comes with the library (presets, notebooks, data): beside the package, or in it from a wheel."""
    inside = Path(str(importlib.resources.files("dmmlib"))) / "share" / name
    return inside if inside.exists() else Path(__file__).parents[1] / name


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
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StoreError: if the file is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as JSON ({error}); restore or delete it.") from error
