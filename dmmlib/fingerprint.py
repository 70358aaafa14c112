"""Fingerprints of functions that users register: an edited function must not be given the results of the old one.

A fingerprint holds what a function computes with: bytecode, constants, names, defaults, closures and globals, of the
function and, in turn, of every function and class that it reaches in modules of the user's own. Plain values count,
arrays included; source does not, so a comment changes nothing. Not seen are edits of installed packages, of files, of
what objects of others' classes do not say of themselves (`repr`), and of what is only looked up by name while it runs
(`getattr`). Another Python has other bytecode, and computes anew.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dmmlib.files import short

NOISE = ("__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__")  # of classes


def of_own(function: Callable[..., Any]) -> dict[str, str]:
    """What a key holds of a registered function besides its version: nothing for the library's, else its hash."""
    library = module_of(function).startswith("dmmlib.")
    return {} if library else {"code": short(repr(_Seen(function).of(function)).encode())}


def module_of(value: Any) -> str:
    """The module of a function or class; of a function where it was written, not whose place it takes (`wraps`)."""
    return str(getattr(value, "__globals__", {}).get("__name__") or getattr(value, "__module__", ""))


class _Seen:
    """Looks at values, each once, as one can lead back to itself."""

    def __init__(self, root: Any) -> None:
        self._root = module_of(root).partition(".")[0]
        self._known: dict[int, tuple[int, Any]] = {}  # holds them, or another could get their id

    def of(self, value: Any) -> Any:
        if value is None or value is ... or isinstance(value, (bool, int, float, complex, str, bytes)):
            return repr(value)
        if isinstance(value, tuple):
            return "tuple", [self.of(v) for v in value]
        if isinstance(value, frozenset):
            return "set", sorted(repr(self.of(v)) for v in value)
        if isinstance(value, types.CodeType):
            names = value.co_names, value.co_varnames, value.co_freevars, value.co_argcount, value.co_kwonlyargcount
            constants = [self.of(constant) for constant in value.co_consts]
            return value.co_code, names, value.co_flags, value.co_exceptiontable, constants
        if id(value) in self._known:
            return "again", self._known[id(value)][0]
        self._known[id(value)] = len(self._known), value
        return type(value).__qualname__, self._inside(value)

    def _inside(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, types.FunctionType):
            return self._function(value) if self._is_own(module_of(value)) else (module_of(value), value.__qualname__)
        if isinstance(value, type):
            inside = {k: v for k, v in vars(value).items() if k not in NOISE} if self._is_own(value.__module__) else {}
            return value.__module__, value.__qualname__, self.of(value.__bases__), self._mapping(inside)
        if isinstance(value, types.MethodType):
            return self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, functools.partial):
            return self.of(value.func), self.of(value.args), self._mapping(value.keywords)
        if isinstance(value, property):
            return [self.of(f) for f in (value.fget, value.fset)]
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, (list, set)):
            return self.of((tuple if isinstance(value, list) else frozenset)(value))
        if hasattr(value, "__wrapped__"):  # static methods, caches
            return self.of(value.__wrapped__)
        if hasattr(value, "detach"):  # a tensor, of types that arrays may lack
            import torch

            return str(value.dtype), self.of(value.detach().cpu().reshape(-1).view(torch.uint8).numpy()), value.shape
        if hasattr(value, "__array__"):
            array = value.__array__()
            return array.dtype.str, array.shape, self.of(array.tolist()) if array.dtype == object else array.tobytes()
        if not self._is_own(type(value).__module__):  # of it counts what it says of itself, and weights
            said = str(getattr(value, "__name__", "")) if " at 0x" in repr(value) else repr(value)
            state = value.state_dict() if hasattr(value, "state_dict") else {}
            return self.of(type(value)), said, self._mapping(state)
        return self.of(type(value)), self._mapping(getattr(value, "__dict__", {}) | _slots(value))

    def _mapping(self, values: Mapping[Any, Any]) -> list[Any]:
        return [(self.of(key), self.of(value)) for key, value in values.items()]

    def _function(self, function: types.FunctionType) -> Any:
        found = [self.of(v) for v in (function.__code__, function.__defaults__, function.__kwdefaults__)]
        for cell in function.__closure__ or ():
            try:
                found.append(self.of(cell.cell_contents))
            except ValueError:  # nothing is in it yet
                found.append("")
        for name in sorted(_names(function.__code__) & function.__globals__.keys()):
            value = function.__globals__[name]
            found.append((name, self.of(value)))
            if isinstance(value, types.ModuleType) and self._is_own(value.__name__):
                used = sorted(_names(function.__code__, everything=True) & vars(value).keys())
                found += [(name, part, self.of(vars(value)[part])) for part in used]
        return found

    def _is_own(self, module: Any) -> bool:
        """Whether a module is a user's: of the package that is looked at, or neither installed nor the library's."""
        top, file = str(module).partition(".")[0], getattr(sys.modules.get(str(module)), "__file__", None) or ""
        installed = {"site-packages", "dist-packages"}.intersection(Path(file).parts)
        return top == self._root or not (installed or top == "dmmlib" or top in sys.stdlib_module_names)


def _slots(value: Any) -> dict[str, Any]:
    """What an object holds in slots of its classes, by class and name; what was never set is left out."""
    found = {}
    for of in (c for c in type(value).__mro__ if "__slots__" in vars(c)):
        for name, slot in vars(of).items():
            if inspect.ismemberdescriptor(slot):
                with suppress(AttributeError):
                    found[f"{of.__qualname__}.{name}"] = slot.__get__(value)
    return found


def _names(code: types.CodeType, everything: bool = False) -> set[str]:
    """Names that code, nested code included, looks up among globals; with `everything` those of attributes, too."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    found |= set(code.co_names) if everything else set()
    return found.union(*(_names(c, everything) for c in code.co_consts if isinstance(c, types.CodeType)))
