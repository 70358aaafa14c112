"""What presets call by name, and the versions of all that computes.

A store's key holds names, settings and versions, never source: whoever changes a component so that its numbers
change raises its version, and what was computed before is then computed anew. `tests/golden.csv` says when. Users need
not: of a method or attributor of theirs a key holds a `fingerprint`, too, of a model its answers.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args, get_type_hints

from pydantic import InstanceOf, PydanticUserError, TypeAdapter, ValidationError

from dmmlib.errors import MethodError, OptionError
from dmmlib.files import check_name
from dmmlib.fingerprint import module_of

F = TypeVar("F")
T = TypeVar("T")

VERSIONS = {
    "seeds": 1,  # trainer, unlearn.base: seeds and masks of model sets, generators of problems
    "batches": 1,  # ensemble, unlearn.base: which points a step sees
    "schedule": 1,  # ensemble: the learning rate of training
    "optimizer sgd": 1,
    "optimizer adam": 1,
    "engine": 1,  # ensemble: initial weights, loss, training step
    "metric margin": 1,  # metrics: margins and their gauge
    "metric klom": 1,
    "metric u_lira": 2,
    "metric ks": 1,
    "metric mean_gap": 1,
    "metric accuracy_gap": 1,
    "metric lds": 1,
    "ridge": 1,  # datamodels: ridge regression on masks
    "predicted oracle": 1,  # datamodels: a predicted change added to a model's own logits
    "forget sets": 2,  # how forget sets are chosen
    "finetune": 1,  # unlearn.base: the loop that all methods share
    "whitening": 1,  # baselines.whitening: coordinates that fine-tuning may step in
    "attribution gradients": 1,  # attributors.kernel: kernels of gradients
    "calibration": 1,  # attributors.margins: the scale of an attributor
    "gauss-newton": 1,  # matching.gauss_newton: the step of a model towards margins
    "matching": 2,  # matching.match: batches, targets, steps
    "search": 2,  # tuning: settings that are drawn, and their score
    "results": 3,  # evaluation: rows of the tables
}
"""Of the components that are not registered by name: raise one when the numbers of that component change."""

REGISTRIES: dict[str, Registry] = {}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that ends an error about an unknown name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """What is registered of one kind, e.g. "method", each entry under a name and with a version.

    The modules that register the built-in entries are imported when an entry is first looked for, so that the core
    can be imported without the rooms that stand on it.
    """

    def __init__(self, kind: str, *modules: str) -> None:
        self._kind, self._modules = kind, list(modules)
        self._entries: dict[str, tuple[T, int]] = {}
        REGISTRIES[kind] = self

    def add(self, name: str, entry: T, version: int = 1) -> None:
        """Register an entry; one of the same name is replaced. Raises MethodError for a name that is no file's."""
        self._entries[check_name(name, MethodError)] = entry, version

    def register(self, name: str, version: int = 1, entry_of: Callable[[Any], T] | None = None) -> Callable[[F], F]:
        """Register what is decorated, or the entry that is made of it; raise `version` when its results change."""

        def add(found: F) -> F:
            self.add(name, cast(T, found) if entry_of is None else entry_of(found), version)
            return found

        return add

    def remove(self, name: str) -> None:
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self._find(name)[0]

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __iter__(self) -> Iterator[str]:
        while self._modules:
            importlib.import_module(self._modules.pop(0))
        return iter(sorted(self._entries))

    def version(self, name: str) -> int:
        """The version of an entry; raises MethodError if there is none of that name."""
        return self._find(name)[1]

    def ours(self, name: str) -> bool:
        """Whether the library registered an entry, under its function's name: then a version says how it computes."""
        made: Any = getattr(self[name], "factory", self[name])
        return module_of(made).startswith("dmmlib.") and getattr(made, "__name__", "") == name.replace("-", "_")

    def _find(self, name: str) -> tuple[T, int]:
        if name not in self._entries and name not in tuple(self):
            raise MethodError(
                f"Unknown {self._kind} {name!r}; use one of {', '.join(self)}, or register your own."
                f"{did_you_mean(name, self._entries)}"
            )
        return self._entries[name]


def check_call(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Raise OptionError, before anything is computed, if a registered function does not take these options.

    Values are checked as pydantic reads the function's annotations, and true or false where that is the default.
    """
    signature = inspect.signature(function)
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # names that only a type checker imports, or a callable without any
        hints = {}
    kinds = {p.name: bool for p in signature.parameters.values() if isinstance(p.default, bool)} | hints
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        known = ", ".join([*signature.parameters][len(arguments) :]) or "none"
        raise OptionError(f"Options of {what} are {options} ({error}); use its own: {known}.") from None
    for name, value in options.items():
        if not isinstance(value, (bool, int, float)) and isinstance(value, Real):  # one of numpy's
            value = int(value) if isinstance(value, Integral) else float(value)
        kind = kinds.get(name, Any)
        try:
            own = is_dataclass(kind)  # to be an instance, not what pydantic would make one of
            adapter = TypeAdapter(
                InstanceOf[kind] if own else kind,  # type: ignore[valid-type]
                config=None if own else {"arbitrary_types_allowed": True},
            )
            adapter.validate_python(value, strict=Path not in (kind, *get_args(kind)))
        except ValidationError as error:
            expected = " or ".join(dict.fromkeys(e["msg"].replace("Input", "it") for e in error.errors()))
            given = " ".join(repr(value).split())
            raise OptionError(f"Option {name}={given:.60} of {what} was given; {expected}.") from None
        except PydanticUserError:  # an annotation that it does not know
            continue


def versions(*components: str) -> dict[str, int]:
    """Versions, as keys of stores hold them, of names in `VERSIONS` and of registered ones, e.g. "model mlp"."""

    def version(component: str) -> int:
        kind = next((kind for kind in REGISTRIES if component.startswith(f"{kind} ")), "")
        return VERSIONS[component] if component in VERSIONS else REGISTRIES[kind].version(component[len(kind) + 1 :])

    return {component: version(component) for component in components}


def all_versions() -> dict[str, int]:
    """Versions of every component that moves a number, also of all that is registered, e.g. "method dmm"."""
    return VERSIONS | {
        f"{kind} {name}": registry.version(name) for kind, registry in REGISTRIES.items() for name in registry
    }
