"""What a run would do, without doing it: models to train, hours, memory, disk (`dmm run PRESET --dry-run`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from platformdirs import user_cache_dir
from tqdm import tqdm

from dmmlib import ensemble, models, tuning, unlearn
from dmmlib.app import batch, status
from dmmlib.data import Dataset
from dmmlib.datamodels import BLOCK
from dmmlib.errors import DataError, OptionError
from dmmlib.execution import one_thread
from dmmlib.forget_sets import ForgetSet
from dmmlib.jobs import Job, jobs
from dmmlib.presets import DataSection, Preset
from dmmlib.progress import silent
from dmmlib.registry import check_call
from dmmlib.studies.cheap import settings as cheap
from dmmlib.study import Study

PUBLISHED = {"cifar10": ((32, 32, 3), 10, 50_000, 10_000), "living17": ((160, 160, 3), 17, 88_400, 3_400)}
"""Data sets that need not be on this machine: shape of a point, classes, training and validation points."""
COLUMNS = ["models", "planned", "done", "missing", "gradients"]


class Rate(NamedTuple):
    """Sample gradients per second of some models that take steps together, each with `batch` examples."""

    per_second: float  # of one core's time, or of a GPU's
    n_models: int
    batch: int
    device: str
    cores: int = 1
    gain: float = 1.0  # of the fastest way to train here, as it was measured, over plain steps

    @property
    def in_all(self) -> float:
        """With all cores, in the fastest way to train."""
        return self.per_second * self.cores * self.gain


@dataclass(frozen=True)
class Plan:
    """What running a preset trains, takes and leaves."""

    preset: Preset
    data: Dataset  # where it is not on this machine, zeros of the published size
    present: bool  # whether it is
    n_parameters: int
    models: pd.DataFrame  # columns models (which), planned, done, missing, gradients (of samples, to train the missing)
    unlearning: float  # sample gradients of the search and of unlearning, about; taken by plain steps
    disk: Mapping[str, float]  # name -> bytes when complete
    memory: Mapping[str, float]  # what is done -> bytes at its peak, about; one is done after the other
    rate: Rate
    whole: tuple[float, bool] | None  # hours of all stages, and whether that is what they took here; None: not known

    @property
    def hours(self) -> float:
        """Training of what is missing, at the measured rate."""
        return float(self.models["gradients"].sum()) / self.rate.in_all / 3600

    def __str__(self) -> str:
        p, d, r = self.preset, self.data, self.rate
        where = "" if self.present else "; its data are not on this machine: published sizes and random images stand in"
        total = self.models.sum(numeric_only=True).to_frame().T.assign(models="all")
        table = pd.concat([self.models, total]).to_string(
            index=False,
            header=["models", "asked for", "in stores", "to train", "sample gradients"],
            formatters=dict.fromkeys(["planned", "done", "missing"], "{:,.0f}".format) | {"gradients": "{:.2e}".format},
        )
        return "\n".join(
            [
                f"{p.name}: {p.data.name}, {d.n_train:,} training and {d.n_val:,} validation points, "
                f"{p.model.name} with {self.n_parameters:,} parameters{where}",
                *(f"  {line}" for line in table.splitlines()),
                f"  rate: {r.in_all:,.0f} sample gradients/s: {r.per_second:,.0f} measured just now on this machine "
                f"({r.device} time; {r.n_models} model{'s' * (r.n_models > 1)} with {r.batch} examples a plain step), "
                f"times {r.cores} core{'s' * (r.cores > 1)}, times {r.gain:.2g} to train, as found here",
                f"  time: {_duration(self.hours)} to train what is missing, about "
                f"{_duration(self.unlearning * r.gain / r.in_all / 3600)} more to search and to unlearn",
                f"  memory: about {_bytes(max(self.memory.values()))} at the peak; {_sizes(self.memory)}",
                f"  disk: {_bytes(sum(self.disk.values()))} when complete; {_sizes(self.disk)}",
                f"  all in all: {self._whole()}",
            ]
        )

    def _whole(self) -> str:
        if self.whole is None:
            return "not known before a run; fitting, KLoM and the small models of other stages come on top of that time"
        hours, here = self.whole
        return f"about {_duration(hours)}, " + ("as when last executed here" if here else "with nothing trained yet")


def plan(
    preset: Preset,
    runs: Path | None = None,
    forget_set: Path | None = None,
    beside: bool = False,
    stages: Collection[str] = batch.STUDY,
) -> Plan:
    """Plan a run, given what is in the stores. Trains and writes nothing; raises what a run of the preset would.

    Raises DataError also where a data set is absent whose size is not known.

    Args:
        runs, forget_set, beside: see `Study`.
        stages: the numbers of those that are run.
    """
    for method in preset.unlearning.methods:
        unlearn.get(method)
    device = models.resolve_device(preset.device)
    here = _on_disk(preset.data) or forget_set is not None  # which names its data
    study = (
        Study(preset.model_dump(), forget_set=forget_set, beside=beside, runs=runs, progress=silent) if here else None
    )
    data = study.data if study else _stand_in(preset.data)
    spec = models.get(preset.model.name)
    check_call(f"model {preset.model.name!r}", spec.factory, 0, 0, **preset.model.options)
    shape = tuple(spec.prepare(data, np.array(data.x_train[:2])).shape[1:])
    module = partial(spec.factory, shape, data.n_classes, **preset.model.options)
    own = [study.own] if study and study.own else []
    parts = list(_asked(preset, data, own, beside, {*stages}))
    asked, most = [job for job, _ in parts], np.array([n for _, n in parts], int)
    known = pd.DataFrame([(job.what, job.n_models, 0, job.n_models) for job in asked], columns=COLUMNS[:-1])
    known = status.trained(study, asked)[COLUMNS[:-1]] if study else known
    known["planned"], known["done"] = most, np.minimum(known["done"].astype(int), most)
    known["missing"] = np.minimum(known["missing"].astype(int), most - known["done"])
    known["gradients"] = known["missing"] * [preset.training.epochs * job.size * job.until for job in asked]
    try:
        built = module()
    except Exception as error:  # whatever a factory objects to
        said = f"Model {preset.model.name!r} cannot be built with options {preset.model.options}"
        raise OptionError(f"{said} ({' '.join(str(error).split())}); correct model.options.") from error
    n_parameters = sum(p.numel() for p in built.parameters())
    weights = 4.0 * (n_parameters + sum(b.numel() for b in built.buffers()))
    n, n_points = preset.ensembles.n_models, data.n_train + data.n_val
    points, outputs = 4.0 * n_points * math.prod(shape), 4.0 * n_points * data.n_classes  # of one model
    rates = study.rates() if study else {}
    n_subsets = preset.datamodels.n_subsets
    factor = data.n_train * n_subsets + 2 * min(n_subsets, data.n_train) ** 2  # centred masks, Gram matrix and factor
    n_together = 32 if preset.ensembles.chunk == "auto" else preset.ensembles.chunk
    n_sets = (len(preset.forget_sets) * (beside or not own) + len(own)) * bool({"04", "05"}.intersection(stages))
    n_results = n * n_points * n_sets * len(preset.unlearning.methods)
    rate = measure(module, shape, data.n_classes, data.n_train, preset, device)
    plain = [r for way, r in rates.items() if not way.compile and not way.processes]
    gain = max(rates.values()) / max(plain) if plain else 1.0
    rate = rate._replace(cores=1 if device.type == "cuda" else torch.get_num_threads(), gain=gain)
    out, pace = (study.output if study else Path()) / "notebooks", batch.RATE * gain / rate.in_all
    seconds, took_here = batch.expected(stages, out, pace)
    timed = preset.name == "laptop" and device.type == "cpu" and not own  # other numbers give it another name
    return Plan(
        preset,
        data,
        study is not None,
        n_parameters,
        known,
        _unlearning(preset, data.n_train, n_sets) if n_sets else 0.0,
        disk={
            "outputs of models": float(most.sum()) * (outputs + data.n_train),
            "weights": sum(n for job, n in parts if job.weights) * weights,
            "unlearned margins": n_results * 5.0,  # a margin in 4 bytes, and whether it is right
        },
        memory={  # weights, gradients and momentum; activations come on top
            "training": points + 3 * weights * n_together + outputs * preset.ensembles.shard,
            "unlearning": points + (3 * weights + outputs) * n,
            "ridge": 1.2 * outputs * min(BLOCK, n_subsets) + 4.0 * factor,
        },
        rate=rate,
        whole=(seconds / 3600, took_here) if took_here or timed else None,
    )


def _asked(
    preset: Preset, data: Dataset, own: list[ForgetSet], beside: bool, stages: set[str]
) -> Iterator[tuple[Job, int]]:
    """What stages train, and how many of its models: in 03 to 05 only what is shown, or what methods need."""
    n, given, methods = preset.ensembles.n_models, preset.unlearning.settings, preset.unlearning.methods
    attributors = [m.partition("@")[2] or preset.attribution.name for m in methods]
    several = (m not in given and len(unlearn.configurations(m, preset.tuning.budget)) > 1 for m in methods)
    searched = any(several) or {"dmm", "oracle_matching"} <= {*methods}  # which stage 04 ablates
    told, reported = stages.intersection(batch.STUDY), beside or not own
    tuned = bool(told & ({"02", "04", "05", "07"} if searched else {"02", "07"}))
    made = preset.forget_sets * (reported or tuned) + preset.tuning.forget_sets * tuned
    held_out = preset.datamodels.n_held_out * ("03" in told or any(part.kind.startswith("pc") for part in made))
    for job in jobs(preset, data.n_train, data.n_classes) if told else ():
        kind, many = next(iter(job.sets)).partition(":")[0], job.n_models
        if kind == "subsets" and not told & {"02", "07"} and "ridge" not in attributors:
            many = held_out  # from which sets are chosen by components
        if kind == "oracles" and not (tuned if job.what.startswith("tuning") else reported and told - {"03"}):
            many = 0
        if many:
            yield job, many
    for forget in own if told - {"03"} else ():
        sets = {f"oracles:{forget.name}": n, f"floor:{forget.name}": n}
        yield Job(f"oracles and floor, {forget.name}", data.n_train - len(forget), sets, False), 2 * n
    if "07" in told:
        yield from ((job, job.n_models) for job in cheap.jobs(preset, data.n_train))


def _on_disk(section: DataSection) -> bool:
    if section.path:
        return Path(section.path).expanduser().exists()
    if section.name == "cifar10":
        return (Path(user_cache_dir("dmmlib")) / "cifar-10-python.tar.gz").exists()
    return section.name != "living17"


def _stand_in(section: DataSection) -> Dataset:
    """Zeros of a data set's published size, which take no memory."""
    if section.path or section.name not in PUBLISHED:
        raise DataError(f"{section.path} does not exist; correct data.path.")
    shape, n_classes, n_train, n_val = PUBLISHED[section.name]
    side = section.options.get("side", shape[0])

    def points(n: int) -> tuple[np.ndarray, np.ndarray]:
        return np.broadcast_to(np.uint8(0), (n, side, side, shape[2])), np.arange(n) % n_classes

    train, val = points(section.n_train or n_train), points(section.n_val or n_val)
    return Dataset(section.name, *train, *val, tuple(map(str, range(n_classes))), (0.5,) * shape[2], (0.25,) * shape[2])


def _unlearning(preset: Preset, n_train: int, n_sets: int) -> float:
    """Sample gradients of search and unlearning, at most: epochs count as passes over S, though many are over F."""

    def cost(setting: Mapping[str, Any]) -> float:
        epochs = sum(v for k, v in setting.items() if k.endswith("epochs") and not k.startswith("max_"))
        return setting.get("cost", epochs / preset.training.epochs)

    total = 0.0
    for method in preset.unlearning.methods:
        given = preset.unlearning.settings.get(method)
        tried = unlearn.configurations(method, preset.tuning.budget, preset.seed) if given is None else [given]
        costs = [cost(setting) for setting in tried]
        if len(costs) > 1:
            searched = sum(n * k for n, k in tuning.rungs(preset.tuning.n_models, len(costs)))
            total += float(np.mean(costs)) * searched * len(preset.tuning.forget_sets)
        total += float(np.mean(costs)) * preset.ensembles.n_models * n_sets
    return total * preset.training.epochs * n_train


def measure(
    module: Callable[[], torch.nn.Module],
    shape: tuple[int, ...],
    n_classes: int,
    n_train: int,
    preset: Preset,
    device: torch.device,
    budget: float = 3.0,
) -> Rate:
    """Time plain training steps on random points, of as many models and examples as fit the budget in seconds.

    It grows from one model and few examples towards the preset's batch and 64 models at a time; what would take longer
    than the budget is not tried. It takes one thread, as a worker does, and on a CPU its processor time, so that the
    machine's other work does not count.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    batch, chunk = min(preset.training.batch_size, n_train), preset.ensembles.chunk

    def train(n_models: int, examples: int, epochs: int) -> float:
        x, y = torch.randn(examples, *shape, device=device), torch.arange(examples, device=device) % n_classes
        section = preset.training.model_dump() | {"epochs": epochs, "batch_size": examples, "lr": 1e-3}
        masks, start = np.ones((n_models, examples), bool), clock()
        trained = ensemble.train(module, x, y, masks, range(n_models), ensemble.Training(**section))
        next(iter(trained.params.values())).sum().item()  # waits for the device
        return clock() - start

    most = 64 if chunk == "auto" else min(chunk, 64)
    sizes = [(1, min(batch, 8)), *((min(k, most), batch) for k in (1, 4, 16, 64))]
    best, start = Rate(0.0, 1, 1, device.type), clock()
    with one_thread():
        for n_models, examples in dict.fromkeys(sizes):
            step, left = n_models * examples / max(best.per_second, 1e-9), budget - (clock() - start)
            if best.per_second and 5 * step > left:
                break
            more = int(min(20, max(2, left / step / 5)))  # steps, of which two say little
            _, one, all_ = (train(n_models, examples, epochs) for epochs in (1, 1, 1 + more))  # the first warms up
            seconds = max((all_ - one) / more, all_ / (2 * more + 2))  # a disturbed clock must not make them free
            best = max(best, Rate(n_models * examples / seconds, n_models, examples, device.type))
    return best


def _duration(hours: float) -> str:
    if hours < 1.5:
        return f"{(minutes := math.ceil(60 * hours))} minute{'s' * (minutes != 1)}"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.0f} days)" if hours >= 48 else "")


def _bytes(n: float) -> str:
    return f"{tqdm.format_sizeof(n)}B"


def _sizes(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_bytes(n)}" for name, n in parts.items() if n)
