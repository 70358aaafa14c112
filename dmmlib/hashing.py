"""Short hashes by which results on disk are found again."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def short(content: bytes) -> str:
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of a JSON-serialisable configuration."""
    return short(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())


def source_hash(function: Callable[..., Any]) -> str:
    """Hash of the file that a function is defined in, or of the function itself if that is a notebook.

    Taken when a function is registered, so that it is of the code that runs, whatever is edited later.
    """
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    if file and function.__module__ != "__main__":
        return short(Path(file).read_bytes())
    try:
        return short(inspect.getsource(function).encode())
    except (OSError, TypeError):
        return short(function.__qualname__.encode())
