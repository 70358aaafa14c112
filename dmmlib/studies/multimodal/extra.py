"""The packages of the extra `multimodal`, imported when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from dmmlib.errors import ExtraError


def require(name: str) -> ModuleType:
    """Import the module of that name; raises ExtraError if its package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExtraError(
            f"Notebook 09 needs the package of {name!r}, which is not installed ({error}); install the extra: "
            "pip install 'dmmlib[multimodal]'."
        ) from error
