"""What a run would do, without doing it: stages, models to train, hours, disk (`dmm run PRESET --dry-run`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fsspec.core import url_to_fs
from platformdirs import user_cache_dir

from dmmlib import data as datasets
from dmmlib import ensemble, models, unlearn
from dmmlib.errors import DataError
from dmmlib.execution import one_thread
from dmmlib.files import short
from dmmlib.presets import DataSection, Preset
from dmmlib.store import Store
from dmmlib.studies.cheap import experiments
from dmmlib.studies.cheap.ablation import antithetic_masks
from dmmlib.study import Study

# Published sizes of data sets that need not be on this machine: point, classes, training and validation points.
PUBLISHED: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "cifar10": ((32, 32, 3), 10, 50_000, 10_000),
    "living17": ((160, 160, 3), 17, 88_400, 3_400),
}


@dataclass(frozen=True)
class Size:
    """Of a data set: shape of a point, classes, training and validation points."""

    shape: tuple[int, ...]
    n_classes: int
    n_train: int
    n_val: int
    present: bool = True

    @property
    def n_points(self) -> int:
        return self.n_train + self.n_val


@dataclass(frozen=True)
class Job:
    """Models of one kind.

    Attributes:
        what: which models.
        n_models: how many the preset asks for.
        done: how many of them lie in a store of the same configuration.
        gradients: sample gradients of one.
        weights: whether their weights are kept as well.
    """

    what: str
    n_models: int
    done: int
    gradients: float
    weights: bool = False

    @property
    def missing(self) -> float:
        """Sample gradients still to compute."""
        return (self.n_models - self.done) * self.gradients


@dataclass(frozen=True)
class Rate:
    """Sample gradients a second, just measured here.

    Attributes:
        per_second: over all models trained together.
        n_models, batch: how many models, and examples a model, took a step together in the measurement.
        device: where.
    """

    per_second: float
    n_models: int
    batch: int
    device: str


@dataclass(frozen=True)
class Plan:
    """See `plan`.

    Attributes:
        jobs: models to train.
        unlearning: sample gradients of the search and of unlearning, about (see `_unlearning`).
        bytes: name -> what it takes on disk when complete.
    """

    preset: Preset
    size: Size
    n_parameters: int
    jobs: tuple[Job, ...]
    unlearning: float
    bytes: Mapping[str, float]
    rate: Rate

    @property
    def total(self) -> Job:
        """All models, with the mean of what is missing over those that are."""
        asked, done = sum(j.n_models for j in self.jobs), sum(j.done for j in self.jobs)
        return Job("all", asked, done, sum(j.missing for j in self.jobs) / max(1, asked - done))

    @property
    def hours(self) -> float:
        """Training of what is missing, at the measured rate."""
        return self.total.missing / self.rate.per_second / 3600

    @property
    def unlearning_hours(self) -> float:
        return self.unlearning / self.rate.per_second / 3600

    def __str__(self) -> str:
        p, s, r = self.preset, self.size, self.rate
        width = max(len(job.what) for job in self.jobs)
        where = "" if s.present else "; its data are not on this machine, so published sizes and random images stand in"
        lines = [
            f"{p.name}: {p.data.name}, {s.n_train:,} training and {s.n_val:,} validation points, "
            f"{p.model.name} with {self.n_parameters:,} parameters{where}",
            f"  {'models':{width}}  {'asked for':>9}  {'in stores':>9}  {'to train':>9}  {'sample gradients':>16}",
            *(
                f"  {job.what:{width}}  {job.n_models:>9,}  {job.done:>9,}  {job.n_models - job.done:>9,}  "
                f"{job.missing:>16.2e}"
                for job in (*self.jobs, self.total)
            ),
            f"  rate: {r.per_second:,.0f} sample gradients/s, measured just now on this machine ({r.device}; "
            f"{r.n_models} model{'s' * (r.n_models > 1)} with {r.batch} examples a plain step)",
            f"  time: {_duration(self.hours)} to train what is missing, about {_duration(self.unlearning_hours)} more "
            "to search hyperparameters and to unlearn",
            "  disk: " + ", ".join(f"{name} {_size(n)}" for name, n in self.bytes.items() if n)
            + f"; {_size(sum(self.bytes.values()))} when complete",
            "  not counted: fitting datamodels, KLoM, and the small models of stages 01 and 06 (minutes).",
        ]  # fmt: skip
        return "\n".join(lines)


def plan(preset: Preset, runs: Path | None = None) -> Plan:
    """What running a preset would train, take and leave, given what is in the stores. Trains and writes nothing.

    Raises:
        DataError, MethodError, DeviceError: as a run of the preset would; DataError also where a data set is absent
            whose size is not known.
    """
    for method in preset.unlearning.methods:
        unlearn.get(method)
    device = models.resolve_device(preset.device)
    present = _on_disk(preset.data)
    study = Study(preset.model_dump(), runs=runs) if present else None
    size = _size_of(preset.data, study)
    spec = models.get(preset.model.name)
    # Two points of the right shape tell the shape of a prepared one.
    zeros = np.zeros((2, *size.shape), np.uint8 if len(size.shape) == 3 else np.float32)
    names = tuple(map(str, range(size.n_classes)))
    tiny = datasets.from_arrays(zeros, np.arange(2), zeros, np.arange(2), class_names=names)
    shape = tuple(spec.prepare(tiny if study is None else replace(study.data, x_train=zeros), zeros).shape[1:])

    def module() -> torch.nn.Module:
        return spec.factory(shape, size.n_classes, **preset.model.options)

    jobs = tuple(_jobs(preset, size, study))
    built = module()
    n_parameters = sum(p.numel() for p in built.parameters())
    weights = 4 * (n_parameters + sum(b.numel() for b in built.buffers()))
    n = preset.ensembles.n_models
    record = (1 + preset.unlearning.checkpoints) * 4 + 1  # margins at each moment, and whether the answer is right
    written = {
        "outputs of models": sum(j.n_models for j in jobs) * (4 * size.n_points * size.n_classes + size.n_train),
        "weights": sum(j.n_models for j in jobs if j.weights) * weights,
        "unlearned margins": len(preset.forget_sets) * len(preset.unlearning.methods) * n * size.n_points * record,
    }
    rate = measure(module, shape, size.n_classes, preset, device)
    return Plan(preset, size, n_parameters, jobs, _unlearning(preset, size), written, rate)


def _on_disk(section: DataSection) -> bool:
    if section.path:
        return Path(section.path).expanduser().exists()
    if section.name == "cifar10":
        return (Path(user_cache_dir("dmmlib")) / "cifar-10-python.tar.gz").exists()
    return section.name != "living17"


def _size_of(section: DataSection, study: Study | None) -> Size:
    if study is not None:
        d = study.data
        return Size(tuple(d.x_train.shape[1:]), d.n_classes, d.n_train, d.n_val)
    if section.path or section.name not in PUBLISHED:
        raise DataError(f"{section.path} does not exist; correct data.path.")
    shape, n_classes, n_train, n_val = PUBLISHED[section.name]
    if "side" in section.options:
        shape = (section.options["side"], section.options["side"], 3)
    return Size(shape, n_classes, section.n_train or n_train, section.n_val or n_val, present=False)


def _jobs(preset: Preset, size: Size, study: Study | None) -> Iterator[Job]:
    stores = list(_stores(study)) if study is not None else []
    epochs, n = preset.training.epochs, preset.ensembles.n_models
    d, t, a = preset.datamodels, preset.tuning, preset.attribution

    def done(stream: str, n_models: int, masks: np.ndarray | None = None) -> int:
        return max((n_models - _missing(store) for store in _of(stores, stream, n_models, masks)), default=0)

    full = np.ones((n, size.n_train), bool) if study else None
    yield Job("originals", n, done("originals", n, full), epochs * size.n_train, True)
    m = d.n_subsets + d.n_held_out
    masks = study.subset_masks() if study and any(s.config["stream"] == "subsets" for s in stores) else None
    yield Job("subset models", m, done("subsets", m, masks), epochs * round(d.fraction * size.n_train))
    masks = study.random_masks("attribution masks", a.n_subsets, a.fraction) if study else None
    gradients = epochs * round(a.fraction * size.n_train)
    yield Job("attribution models", a.n_subsets, done("attribution", a.n_subsets, masks), gradients, True)
    for section, n_floor, kind in ((preset.forget_sets, n, ""), (t.forget_sets, t.n_models, "tuning: ")):
        for part in section:
            forget = part.size or round(part.share * size.n_train / size.n_classes)
            here = done(f"oracles:{part.name}", n) + done(f"floor:{part.name}", n_floor)
            yield Job(f"{kind}oracles and floor, {part.name}", n + n_floor, here, epochs * (size.n_train - forget))
    for what, count, fraction, streams in _more(preset, study):
        here = sum(done(name, count, masks) for name, masks in streams.items())
        yield Job(what, count * len(streams), here, epochs * round(fraction * size.n_train), True)


def _more(preset: Preset, study: Study | None) -> Iterator[tuple[str, int, float, dict[str, np.ndarray | None]]]:
    """Subset models that notebook 07 trains: what they are, how many a stream, share of S, and streams with masks.

    Masks are None where they are not known: without the data, and where they are made from effects.
    """
    m, fraction = preset.attribution.n_subsets, preset.attribution.fraction
    every, draws = max(experiments.sizes(preset)), range(len(experiments.draws(preset, m)))

    def masks(stream: str, n: int, share: float) -> np.ndarray | None:
        return study.random_masks(stream, n, share) if study else None

    if every > m:
        drawn = masks("attribution masks", every, fraction)
        streams = {"attribution:more": drawn if drawn is None else drawn[m:]}
        yield "stage 07: more of attribution", every - m, fraction, streams
    for f in preset.studies["cheap"].fractions:
        streams = {f"attribution:{f:g}:{draw}": masks(f"masks:{f:g}:{draw}", m, f) for draw in draws}
        yield f"stage 07: ablation, {f:g}", m, f, streams
    halves = [masks(f"masks:pairs:{draw}", m, 0.5) for draw in draws]
    pairs = [half if half is None else antithetic_masks(half) for half in halves]
    streams = {f"attribution:antithetic:{draw}": pairs[draw] for draw in draws}
    yield "stage 07: ablation, antithetic", m // 2 * 2, 0.5, streams
    halves = [masks(f"masks:twice:{draw}", -(-m // 2), fraction) for draw in draws]
    twice = [half if half is None else np.repeat(half, 2, 0)[:m] for half in halves]
    yield "stage 07: ablation, twice", m, fraction, {f"attribution:twice:{draw}": twice[draw] for draw in draws}
    yield "stage 07: ablation, clustered", m, fraction, {f"attribution:clustered:{draw}": None for draw in draws}


def status(study: Study) -> pd.DataFrame:
    """`Study.status`, and the subset models that notebook 07 trains besides, by the names of a plan."""
    stores, rows = list(_stores(study)), []
    for what, count, _, streams in _more(study.preset, study):
        done = damaged = 0
        for name, masks in streams.items():
            fullest = min(_of(stores, name, count, masks), key=_missing, default=None)
            if fullest is not None:
                bad = sum(len(fullest.models(shard)) for shard in fullest.damaged())
                damaged += bad
                done += count - _missing(fullest) - bad
        planned = count * len(streams)
        missing = planned - done - damaged
        rows.append({"models": what, "planned": planned, "done": done, "missing": missing, "damaged": damaged})
    return pd.concat([study.status(), pd.DataFrame(rows)], ignore_index=True)


def _stores(study: Study) -> Iterator[Store]:
    """The stores of this configuration."""
    identity = study._identity() | {"seed": study.preset.seed}
    files, root = url_to_fs(study.preset.store or str(study.runs / "store"))
    for path in sorted(files.glob(f"{root}/*.zarr")):
        store = Store.existing(files.unstrip_protocol(path))  # a run would say what is wrong with one that is no store
        if store is not None and all(store.config.get(k) == v for k, v in identity.items()):
            yield store


def _of(stores: Sequence[Store], stream: str, n_models: int, masks: np.ndarray | None) -> Iterator[Store]:
    """Stores of a stream, whose name may go on with a hash or a draw; masks are compared where they are known."""
    drawn = None if masks is None else short(np.packbits(masks).tobytes())
    for store in stores:
        name = store.config["stream"]
        same = name == stream or (":" in stream and name.rpartition(":")[0] == stream)
        if same and store.n_models == n_models and drawn in (None, store.config["masks"]):
            yield store


def _missing(store: Store) -> int:
    return sum(len(store.models(shard)) for shard in store.missing())


def _unlearning(preset: Preset, size: Size) -> float:
    """Sample gradients of search and unlearning, about: an epoch of a method counts as a pass over S.

    An epoch over F alone is far less, so this errs on the high side. A matching method names its cost itself.
    """

    def cost(setting: Mapping[str, Any]) -> float:
        epochs = sum(v for k, v in setting.items() if k.endswith("epochs") and not k.startswith("max_"))
        return setting.get("cost", epochs / preset.training.epochs)

    total = 0.0
    for method in preset.unlearning.methods:
        costs = [cost(s) for s in unlearn.configurations(method, preset.tuning.budget, preset.seed)]
        if len(costs) > 1:
            total += sum(costs) * preset.tuning.n_models * len(preset.tuning.forget_sets)
        total += float(np.mean(costs)) * preset.ensembles.n_models * len(preset.forget_sets)
    return total * preset.training.epochs * size.n_train


def measure(
    module: Callable[[], torch.nn.Module],
    shape: tuple[int, ...],
    n_classes: int,
    preset: Preset,
    device: torch.device,
    budget: float = 3.0,
) -> Rate:
    """Time plain training steps on random points, of as many models and examples as fit the budget in seconds.

    It starts with one model and few examples and grows towards the preset's batch and 32 models at a time; what would
    take longer than the budget is not tried. So it errs on the slow side: larger steps, cores and compilation gain.
    It takes one thread, as a worker does: of several that wait for one another the rate is what else the machine does.
    """
    batch, chunk = preset.training.batch_size, preset.ensembles.chunk
    most = min(chunk, 32) if isinstance(chunk, int) else 32
    sizes = [(1, min(batch, 8)), (1, batch), *((k, batch) for k in (4, 16, 32) if k < most), (most, batch)]
    best, spent = Rate(0.0, 1, 1, device.type), 0.0
    with one_thread():
        for n_models, examples in dict.fromkeys(sizes):
            expected = 5 * n_models * examples / best.per_second if best.per_second else 0.0
            if expected > budget - spent:
                break
            start = time.perf_counter()
            seconds = _step(module, shape, n_classes, preset, n_models, examples, device)
            spent += time.perf_counter() - start
            best = Rate(n_models * examples / seconds, n_models, examples, device.type)
    return best


def _step(
    module: Callable[[], torch.nn.Module],
    shape: tuple[int, ...],
    n_classes: int,
    preset: Preset,
    n_models: int,
    examples: int,
    device: torch.device,
) -> float:
    """Seconds of a training step: what three take more than one, which pays for starting; the first run warms up."""
    x = torch.randn(examples, *shape, device=device)
    y = torch.arange(examples, device=device) % n_classes
    masks = np.ones((n_models, examples), bool)
    seconds = []
    for epochs in (1, 1, 3):
        training = replace(preset.training.training(), epochs=epochs, batch_size=examples, lr=1e-3)
        start = time.perf_counter()
        models = ensemble.train(module, x, y, masks, range(n_models), training)
        next(iter(models.params.values())).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return max((seconds[2] - seconds[1]) / 2, seconds[2] / 6)  # a disturbed clock must not make it free


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return "less than a minute"
    if hours < 1.5:
        return f"{math.ceil(60 * hours)} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:,.0f} days)"


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
