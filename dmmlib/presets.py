"""Presets: every number of a run in one validated YAML file.

A preset file has one top-level key, `preset`, so that papermill can pass it to a notebook whole
(`papermill -f presets/laptop.yaml`), and a notebook takes a preset by name, by path, or as that mapping.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dmmlib.errors import MethodError, PresetError
from dmmlib.files import check_name, check_once, resource, short
from dmmlib.registry import Registry, did_you_mean

PRESETS_DIR = resource("presets")
METHODS = ("do_nothing", "retrain", "gd", "ga", "ga_gd", "scrub", "oracle_matching", "dm_direct", "dmm")

S = TypeVar("S", bound="Section")
T = TypeVar("T")

FileName = Annotated[str, AfterValidator(partial(check_name, error=PresetError))]
Some = Annotated[tuple[T, ...], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1, le=64)]  # of an image that is averaged over, in pixels
Fraction = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Several = Annotated[int, Field(ge=2)]  # as many as an interval takes
AMBIGUOUS = re.compile(
    r"(?i)yes|no|on|off|<<|=|\d{4}-\d\d?-\d\d?.*|(?![+-]?\d{1,3}(_\d{3})+$)[+-]?[\d.][\d.]*_[\d_.]*(e[+-]?\d+)?"
    r"|[+-]?(0[\d_]+|0[bx][\da-f_]+|[1-9][\d_]*(:[0-5]?\d)+|\d[\d_]*(:[0-5]?\d)+\.[\d_]*)"
)
"""What YAML 1.1 takes for truths, octal, sexagesimal or cut numbers, dates and merged keys, and people for others."""
MOST = {int: 1e9, float: 1e30}  # of any number in a preset


def _plain(value: Any, depth: int = 3) -> Any:
    """An option as JSON holds it, in few levels; text such as 1e-3, a number to all but YAML, as one."""
    if isinstance(value, str):
        number = float(value) if re.fullmatch(r"[+-]?\d+\.?\d*[eE][+-]?\d{1,2}", value) else math.nan
        return value if math.isnan(number) else int(number) if number.is_integer() else number
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if depth and isinstance(value, (list, tuple)):
        return [_plain(v, depth - 1) for v in value]
    if depth and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(v, depth - 1) for key, v in value.items()}
    raise ValueError("give text, finite numbers, true, false and null, or lists and mappings of them")


Options = Annotated[dict[str, Any], AfterValidator(lambda options: _plain(options))]


class Section(BaseModel):
    """Unknown keys are errors, numbers are bounded, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, Mapping) else ():
            field, parts = cls.model_fields.get(name), value if isinstance(value, (list, tuple)) else [value]
            if field and not re.search("bool|Any", str(field.annotation)) and any(isinstance(p, bool) for p in parts):
                raise ValueError(f"{name} is {value!r}, which is no number, text or section")
        return given

    @model_validator(mode="after")
    def _moderate(self: S) -> S:
        for name, value in self:
            for part in value if isinstance(value, tuple) else (value,):
                if type(part) in MOST and part > (most := 2**32 - 1 if name == "seed" else MOST[type(part)]):
                    shown = f"{part:g}" if part < 1.7e308 else "over 1e308"
                    raise ValueError(f"{name} is {shown}; give at most {most:g}")
                if isinstance(part, str) and (not part.strip() or len(part) > 1000 or not part.isprintable()):
                    raise ValueError(f"{name} is {part!r:.40}; give some text in one line")
        return self


def _absolute(path: str) -> str:
    """The same file for whoever reads the preset from another folder."""
    if not path.strip():
        raise ValueError("give a path")
    return str(Path(path).expanduser().resolve())


Address = Annotated[str, AfterValidator(lambda a: a if "://" in a or "::" in a else _absolute(a))]


class DataSection(Section):
    name: Annotated[str, AfterValidator(lambda n: _absolute(n) if n.endswith(".npz") else n)] = "fashion-mnist"
    n_train: PositiveInt | None = 2000
    n_val: PositiveInt | None = 500
    seed: NonNegativeInt = 0
    path: Annotated[str, AfterValidator(_absolute)] | None = None
    options: Options = {}  # of the loader

    @model_validator(mode="after")
    def _of_the_loader(self) -> DataSection:
        if taken := sorted({"name", "n_train", "n_val", "seed", "path"}.intersection(self.options)):
            raise ValueError(f"options hold {taken[0]!r}, which is a key of data itself; set data.{taken[0]}")
        return self


class ModelSection(Section):
    name: str = "mlp"
    options: Options = {}


class TrainingSection(Section):
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 50
    lr: PositiveFloat = 0.2
    momentum: BelowOne = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    warmup: BelowOne = 0.2
    precision: Literal["float32", "bfloat16"] = "float32"


class EnsemblesSection(Section):
    n_models: int = Field(default=100, ge=4)  # N: originals; oracles and floor oracles of each forget set
    chunk: PositiveInt | Literal["auto"] = "auto"  # models that share a training step; auto measures
    compile: bool | Literal["auto"] = "auto"  # run steps through torch.compile; auto measures where it can pay
    shard: PositiveInt = 100  # models committed to disk together


class DatamodelsSection(Section):
    n_subsets: int = Field(default=4000, ge=10)  # M
    fraction: Fraction = 0.5
    n_held_out: int = Field(default=200, ge=8)  # half to choose lambda, half to report the LDS
    lambdas: Some[PositiveFloat] = (0.02, 0.05, 0.1, 0.2, 0.5)
    own_shares: Some[Share] = (1.0, 0.3, 0.1)
    sizes: Some[PositiveInt] = (250, 500, 1000, 2000, 4000)  # of M, for the LDS curve; by default those that are there

    @model_validator(mode="after")
    def _of_what_is_there(self) -> DatamodelsSection:
        fitting = tuple(size for size in self.sizes if size <= self.n_subsets)
        if "sizes" not in self.model_fields_set:
            object.__setattr__(self, "sizes", fitting or (self.n_subsets,))
        elif len(fitting) < len(self.sizes):
            raise ValueError(f"sizes asks for {max(self.sizes)} of {self.n_subsets} subset models; set both")
        return self

    @property
    def grid(self) -> list[dict[str, float]]:
        """Settings of ridge to choose from: every penalty with every share of it on own weights."""
        return [{"lam": lam, "own_share": share} for lam in self.lambdas for share in self.own_shares]


class AttributionSection(Section):
    """The attributor that DM-direct, DMM and the widget use, and the subset models that it gets, weights included."""

    name: str = "bayesian"  # any that is registered; ridge takes the models of `datamodels` instead
    n_subsets: int = Field(default=100, ge=10)
    fraction: Fraction = 0.75  # of S in a subset: nearer to S than a half, as R is
    options: Options = {}


class ForgetSetSection(Section):
    name: FileName
    kind: Literal["random", "pc", "pc_both", "nearest", "class", "ids"]
    size: PositiveInt | None = None
    component: PositiveInt = 1
    point: NonNegativeInt = 0
    label: NonNegativeInt = 0
    share: float = Field(default=0.5, gt=0, le=1)
    ids: str | None = None  # how the ids of the points begin that kind "ids" takes, all or `size` of them

    @model_validator(mode="after")
    def _sized(self) -> ForgetSetSection:
        if (self.kind == "ids") != (self.ids is not None):
            raise ValueError(f"ids is {self.ids!r} for kind {self.kind!r}; kind 'ids' has them, and no other")
        if self.kind != "ids" and (self.size is None) != (self.kind == "class"):
            raise ValueError(f"size is {self.size} for kind {self.kind!r}; a class has a share, other kinds a size")
        return self


class ClusterSection(Section):
    """A Dask cluster to start, for `scheduler: cluster`."""

    type: str = "distributed.LocalCluster"  # or dask_jobqueue.SLURMCluster, dask_cuda.LocalCUDACluster, ...
    options: Options = {}  # of that class
    jobs: PositiveInt = 1  # how many workers to ask for


class TuningSection(Section):
    forget_sets: Some[ForgetSetSection]
    n_models: int = Field(default=50, ge=4)
    budget: PositiveInt | None = None  # settings tried of each method, drawn from its grid; null for all of them


class UnlearningSection(Section):
    methods: Some[str] = METHODS
    settings: dict[str, Options] = {}  # method -> its options; those of other methods are searched on the tuning sets
    checkpoints: NonNegativeInt = 8


class Preset(Section):
    """A validated preset; see presets/laptop.yaml for what each number means."""

    name: FileName = Field(pattern=r"^[A-Za-z0-9_+.-]+$")
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    scheduler: str = Field("local", pattern=r"^(local|local-cluster|cluster|\S+:\S+)$")  # the last: Dask's address
    cluster: ClusterSection = ClusterSection()
    store: Address | None = None  # where trained models' outputs go: a directory or fsspec address, runs/store if None
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    ensembles: EnsemblesSection = EnsemblesSection()
    datamodels: DatamodelsSection = DatamodelsSection()
    attribution: AttributionSection = AttributionSection()
    forget_sets: Some[ForgetSetSection]
    tuning: TuningSection
    unlearning: UnlearningSection = UnlearningSection()
    studies: dict[str, Any] = {}  # name -> the settings of that study; `load` fills in those that are not given


STUDIES: Registry[type[Section]] = Registry("study", "dmmlib.studies")
study = STUDIES.register  # of the settings of a study; a preset has them under `studies.<name>`

PLACES = ("device", "threads", "scheduler", "cluster", "store")  # where things run and lie, not what is computed


def names() -> tuple[str, ...]:
    """The presets in presets/."""
    return tuple(sorted(path.stem for path in PRESETS_DIR.glob("*.yaml")))


def load(preset: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Preset:
    """A preset by name, by path, or as a mapping, with some of its numbers replaced.

    Args:
        preset: a name in presets/, the path of a YAML file, or the content below its key `preset`.
        overrides: dotted key -> value, e.g. {"ensembles.n_models": 50}; the preset's name then gets
            these as a suffix, so that runs are kept apart.

    Raises:
        PresetError: for an unknown preset or key, or a value that is not allowed, one line each.
    """
    if overrides and not (isinstance(overrides, Mapping) and all(isinstance(key, str) for key in overrides)):
        raise PresetError(f"overrides are {overrides!r:.100}; give values by dotted keys, as {{'seed': 1}}.")
    content = dict(preset) if isinstance(preset, Mapping) else _read(str(preset))
    for key, value in (overrides or {}).items():
        _set(content, key, value)
    computed = [f"{k}-{v}" for k, v in sorted((overrides or {}).items()) if k.split(".")[0] not in PLACES]
    if computed:  # where it runs is not what it computes
        whole = "+".join([str(content.get("name", "preset")), *computed])
        kept = "".join(c if c.isalnum() or c in "_+.-" else "_" for c in whole)[:80]
        content["name"] = kept if kept == whole else f"{kept[:71]}-{short(whole.encode())[:8]}"  # never another's name
    name, given = content.get("name"), content.get("studies", {})
    if not isinstance(given, Mapping):
        raise PresetError(f"Preset {name!r}, key 'studies': it is {given!r}; give each study's settings by its name.")
    try:
        settings = {part: STUDIES[part] for part in dict.fromkeys([*STUDIES, *given])}
    except (MethodError, TypeError) as error:
        raise PresetError(f"Preset {name!r}, key 'studies': {error}") from error
    parts = {part: _validated(of, given.get(part, {}), name, "studies", part) for part, of in settings.items()}
    return _validated(Preset, {**content, "studies": parts}, name)


def _validated(model: type[S], content: Any, name: Any, *where: str) -> S:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        whole = [e for e in error.errors() if e["type"] != "too_short" or e["ctx"]["actual_length"] == len(e["input"])]
        raise PresetError("; ".join(_explain(model, e, name, where) for e in whole) + ".") from error


def _read(preset: str) -> dict[str, Any]:
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS_DIR / f"{preset:.100}.yaml"
    if not os.path.isfile(path):
        known, hint = ", ".join(names()), did_you_mean(preset, names())
        raise PresetError(f"Unknown preset {preset!r:.100}; use one of {known}, or a .yaml file.{hint}")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PresetError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct it.") from error
    if not isinstance(content, dict) or not isinstance(content.get("preset"), dict):
        raise PresetError(f"{path} lacks the top-level key 'preset'; see presets/laptop.yaml.")
    if beside := [key for key in content if key != "preset"]:
        raise PresetError(f"{path} has {beside[0]!r} beside the key 'preset', where nothing counts; put it below that.")
    return content["preset"]


def parse(text: str) -> Any:
    """Plain values from YAML; ValueError for aliases, a few lines of which can stand for more than memory holds.

    Raises PresetError for what is read in two ways (`AMBIGUOUS`) and not in quotes.
    """
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 20 or isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases and deep nesting are not followed: write plain values")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and AMBIGUOUS.fullmatch(event.value):
            raise PresetError(
                f"{event.value} can be read in two ways; write true or false, or a decimal number, or text in quotes"
            )
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Of two values of one key the second would count, without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        check_once([key.value for key, _ in node.value if isinstance(key.value, str)])
        return super().construct_mapping(node, deep)


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        nested = content.get(section) or {}
        if not isinstance(nested, Mapping):
            raise PresetError(f"Override {key!r}: {section!r} holds no keys; name an existing key of the preset.")
        content[section] = dict(nested)
        content = content[section]
    content[last] = value


def _explain(model: Any, error: Any, name: Any, before: tuple[str, ...]) -> str:
    where = ".".join(str(part) for part in (*before, *error["loc"]))
    if error["type"] == "extra_forbidden":
        for part in error["loc"][:-1]:
            field = getattr(model, "model_fields", {}).get(part)
            model = field.annotation if field is not None else None
        known = list(getattr(model, "model_fields", {}))
        hint = did_you_mean(str(error["loc"][-1]), known).strip() or f"Known keys: {', '.join(known) or 'see the docs'}"
        return f"Preset {name!r} has the unknown key {where!r} ({hint[0].lower()}{hint[1:]})"
    whole = error["type"] == "missing" or isinstance(error["input"], Mapping)  # what is wrong is named
    given = "" if whole else f", given {reprlib.repr(error['input'])}"
    message = re.sub(r"Value error, | after validation, not \d+| or instance of \w+|, unable to .*", "", error["msg"])
    message = message.replace("Tuple", "Input").replace("valid dictionary", "mapping of keys to values")
    return f"Preset {name!r}, key {where!r}: {message[0].lower()}{message[1:]}{given}".replace(", key ''", "")
