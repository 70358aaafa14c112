"""Train the models that a preset asks for, and keep their outputs: all that a worker needs.

Outputs of trained models lie in zarr stores under `runs/store/`, under the hash of exactly what they depend on, so
training resumes where it was, a changed number trains only what it touches, and runs share what they have in common.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from dmmlib import data as datasets
from dmmlib import ensemble, execution, fingerprint, keys, loops, models, presets, stacking
from dmmlib.errors import DamageError, ModelError, StoreError
from dmmlib.execution import Execution
from dmmlib.files import check_folder, config_hash, place, read_json, short
from dmmlib.jobs import Job, jobs
from dmmlib.metrics import margin_gauge
from dmmlib.progress import Progress, Reporter
from dmmlib.registry import Registry, check_call, versions
from dmmlib.store import Outputs, Store, reaching

T = TypeVar("T")
MANY_STEPS = 200_000  # model-steps from which on processes and compilation can pay


def once(method: Callable[[Any], T]) -> Callable[[Any], T]:
    """Make a method compute its answer once; further calls return the same."""
    name = f"_once_{method.__name__}"

    @wraps(method)
    def kept(self: Any) -> T:
        if name not in self.__dict__:
            self.__dict__[name] = method(self)
        return self.__dict__[name]

    return kept


@dataclass(frozen=True)
class ModelSet:
    """Models to train: the name determines their seeds, and with the masks their place on disk."""

    name: str  # e.g. "originals", or "oracles:<forget set>:<hash>"
    masks: np.ndarray  # which training points each model sees, bool (n_models, n_train)
    keep_models: bool = False  # keep the weights as well as the outputs
    until: float = 1.0  # the share of their training after which they are kept

    @cached_property
    def digest(self) -> str:
        """Hash of the masks; made once, as every block of outputs that is read asks for it."""
        return short(np.packbits(self.masks).tobytes())


class Workers(Protocol):
    """Train shards of models, in whatever order they are done."""

    def map(self, arguments: Callable[[T], tuple[Any, ...]], tasks: Sequence[T]) -> Iterator[tuple[T, Any]]:
        """Pairs of a task and what `Trainer.train_shard` returns for its arguments."""
        ...


WORKERS: Registry[Callable[[Trainer], Workers]] = Registry("scheduler", "dmmlib.app.cluster")


class Given:
    """What a preset asks for, on this machine: data, model and device. Trains nothing.

    Args:
        preset: a name in presets/, a path, or a mapping.
        overrides: dotted key -> value; see `presets.load`.
        runs: directory for everything computed; $DMM_RUNS, or `runs/`, if None.
        progress: hook that is told of progress.

    Raises:
        PresetError, DataError, MethodError, DeviceError, ModelError: one line each, before any training.
    """

    def __init__(
        self,
        preset: str | Path | Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        *,
        runs: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.preset = presets.load(preset, overrides)
        self.device = models.resolve_device(self.preset.device)
        if self.preset.threads:
            torch.set_num_threads(self.preset.threads)
        if re.match(r"\w{2,}:/", str(runs)):  # of which Path keeps one slash
            raise StoreError(f"runs is {str(runs)!r}; give a folder on this machine, and the address as `store`.")
        self.runs = Path(runs or place("runs")).absolute()  # wherever who asks goes next
        self.progress = progress or Reporter()
        self._spec, self._ours = models.get(self.preset.model.name), models.MODELS.ours(self.preset.model.name)
        with reaching(self.root):
            files, where = url_to_fs(self.root)
        for folder in (self.runs, *([Path(where)] if "file" in files.protocol else [])):
            check_folder(folder)
        check_call(f"model {self.preset.model.name!r}", self._spec.factory, 0, 0, **self.preset.model.options)
        section = self.preset.data
        options = section.options | ({"path": section.path} if section.path else {})
        self.data = datasets.load(section.name, section.n_train, section.n_val, section.seed, **options)
        stacking.check(self.module, self._few, self.data.n_classes, name=f"Model {self.preset.model.name!r}")

    # --- data and model --------------------------------------------------------------------------------

    @cached_property
    def x(self) -> Tensor:
        """Points (n_train + n_val, ...) as models take them, training points first, on the device: prepared, but for
        images that a model of the library takes normalised, which stay bytes on a GPU, a quarter of the memory.
        """
        return self._prepared(self.data.x)

    @cached_property
    def _few(self) -> Tensor:
        """The first points, without preparing all where each is prepared on its own."""
        own = not self._spec.prepare.__module__.startswith("dmmlib.")
        return self.x[:4] if own else self._prepared(np.array(self.data.x_train[:4]))  # of what may be read only

    def _prepared(self, x: np.ndarray) -> Tensor:
        if self._bytes:
            return torch.from_numpy(x).to(self.device).permute(0, 3, 1, 2)
        try:
            points = self._spec.prepare(self.data, x)
            if isinstance(points, Tensor) and points.shape[:1] == (len(x),):
                layout = torch.channels_last if points.ndim == 4 else torch.contiguous_format  # for fast convolutions
                return points.contiguous(memory_format=layout).to(self.device)
        except Exception as error:
            if isinstance(error, MemoryError) or "allocate" in str(error):
                raise ModelError(f"Memory is too small for {len(x)} prepared points; give fewer or smaller.") from error
            raise ModelError(f"What prepares points fails ({type(error).__name__}: {error}); mend it.") from error
        given = tuple(points.shape) if isinstance(points, Tensor) else f"a {type(points).__name__}"
        raise ModelError(f"What prepares points gives {given} for {len(x)}; let it give a tensor ({len(x)}, ...).")

    @cached_property
    def _bytes(self) -> bool:
        images = self._spec.prepare is models.normalise and self.data.x_train.dtype == np.uint8
        return images and self._ours and self.device.type == "cuda"

    @property
    def features(self) -> np.ndarray:
        """Prepared points, flattened: float32 (n_train + n_val, n_features)."""
        return self._spec.prepare(self.data, self.data.x).flatten(1).numpy()

    @cached_property
    def y(self) -> Tensor:
        """Labels (n_train + n_val,) on the device."""
        return torch.from_numpy(self.data.y).to(self.device)

    @cached_property
    def module(self) -> Callable[[], torch.nn.Module]:
        """Makes a fresh model."""
        shape = tuple(self._few.shape[1:])
        make = partial(self._spec.factory, shape, self.data.n_classes, **self.preset.model.options)
        return partial(models.normalising, make, self.data, self.device) if self._bytes else make

    @property
    def training(self) -> ensemble.Training:
        """How models are trained."""
        return ensemble.Training(**self.preset.training.model_dump())

    @property
    def root(self) -> str:
        """Where stores lie: a directory or fsspec address."""
        return (self.preset.store or (self.runs / "store").as_posix()).rstrip("/")


class Trainer(Given):
    """The models that are trained of what a preset gives; arguments as of `Given`."""

    # --- execution -------------------------------------------------------------------------------------

    @once
    def execution(self) -> Execution:
        """How training is carried out here: measured once for each machine and model, unless the preset says."""
        return self._fastest(many=self.planned >= MANY_STEPS)

    @once
    def fine_tuning(self) -> Execution:
        """How unlearning is carried out here: without processes, and not compiled unless the preset says so.

        Each loss would be compiled anew for a few hundred steps, which take less time than that.
        """
        return self._fastest(many=False)

    def side_by_side(self) -> Execution:
        """How to do several things at a time that are each too small for all cores: one in each worker process."""
        return execution.one_per_core(self.device) if self.planned >= MANY_STEPS else Execution()

    @property
    def planned(self) -> int:
        """Steps of one model that the main story's training takes."""
        return sum(job.n_models * self.training.steps(job.size) for job in self.jobs())

    def rates(self) -> dict[Execution, float]:
        """Model-steps per second that were measured for training here before; none where that never was needed."""
        try:
            rows = read_json(execution.place_of_rates(*self._ways(self.planned >= MANY_STEPS), self.runs / "store"))
        except StoreError:
            return {}
        return {Execution(**row): rate for row in rows if (rate := row.pop("model_steps_per_second"))}

    def _ways(self, many: bool) -> tuple[tuple[Execution, ...], torch.device, dict[str, Any]]:
        """Ways to train or, with few steps, to unlearn here, and what their rates depend on."""
        section, training = self.preset.ensembles, self.training
        chunk = None if section.chunk == "auto" else section.chunk
        allowed = (None if many else False) if section.compile == "auto" else section.compile
        options = execution.candidates(self.device, chunk, allowed, many)
        config = {
            "versions": versions("engine", f"model {self.preset.model.name}"),
            "model": self.preset.model.model_dump(),
            "shape": list(self.x.shape[1:]),
            "batch": training.batch_size,
            "precision": training.precision,
            "planned": len(str(self.planned)),  # more training deserves more measuring
        }
        return options, self.device, config

    def _fastest(self, many: bool) -> Execution:
        (options, device, config), x = self._ways(many), self.x[: self.data.n_train]

        def steps(way: Execution, n: int) -> None:
            masks, training = np.zeros((way.chunk * way.workers, len(x)), bool), replace(self.training, epochs=n)
            masks[:, : training.batch_size] = True  # one batch per epoch
            ensemble.train_and(lambda models: {}, self.module, x, self.y, masks, range(len(masks)), training, way)
            if x.device.type == "cuda":
                torch.cuda.synchronize()

        return execution.fastest(options, device, steps, config, self.runs / "store", self.progress, self.planned)

    # --- seeds and masks -------------------------------------------------------------------------------

    def seeds(self, name: str, n: int) -> list[int]:
        """n seeds for a name; those of different names are independent, and a longer list begins with a shorter one."""
        return np.random.SeedSequence([self.preset.seed, zlib.crc32(name.encode())]).generate_state(n).tolist()

    def random_masks(self, name: str, n: int, fraction: float) -> np.ndarray:
        """n random subsets of S of that share, bool (n, n_train)."""
        masks = np.zeros((n, self.data.n_train), bool)
        size = round(fraction * self.data.n_train)
        for mask, seed in zip(masks, self.seeds(name, n), strict=True):
            mask[np.random.default_rng(seed).permutation(self.data.n_train)[:size]] = True
        return masks

    # --- training --------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every trained model depends on besides its mask and seed."""
        answers: dict[str, Any] = {} if self._ours else {"answers": models.fingerprint(self.module, self._few)}
        if self._spec.loop is not None:
            answers["loop"] = fingerprint.of_own(self._spec.loop)
        if seen := fingerprint.of_own(self._spec.prepare):
            answers["prepare"] = seen
        if (dtype := torch.get_default_dtype()) != torch.float32:
            answers["weights"] = str(dtype)
        return {**keys.trained(self.preset, self.data), **answers, "seed": self.preset.seed}

    def _place(self, model_set: ModelSet) -> tuple[str, dict[str, Any]]:
        """Where a model set's store is, and the configuration that it belongs to."""
        until = {"until": model_set.until} if model_set.until < 1 else {}
        config = {**self.identity, "set": model_set.name, "masks": model_set.digest, **until}
        return f"{self.root}/{model_set.name.split(':')[0]}-{config_hash(config)}.zarr", config

    def store(self, model_set: ModelSet) -> Store:
        """The store of a model set, made where there is none."""
        place, config = self._place(model_set)
        arrays: dict[str, tuple[Sequence[int], str]] = {
            "logits": ((len(self.x), self.data.n_classes), "float32"),
            "masks": ((self.data.n_train,), "bool"),
        }
        if model_set.keep_models:
            state = ensemble.initialise(self.module, [0]).state()
            arrays |= {name: (array.shape[1:], str(array.dtype)) for name, array in state.items()}
        return Store.open(place, config, len(model_set.masks), arrays, self.preset.ensembles.shard)

    def left(self, model_set: ModelSet) -> int:
        """Count the models of a set that are yet to be trained; makes no store."""
        with reaching(self.root):
            files, path = url_to_fs(self._place(model_set)[0])
            if not files.exists(path):
                return len(model_set.masks)
            store = self.store(model_set)
            return store.count(store.missing())

    def train(self, *model_sets: ModelSet, start: int = 0, stop: int | None = None) -> list[Store]:
        """Train models `start` to `stop` of some sets, unless that is done; outputs go to a store for each set.

        Shards of all sets are sent to the workers of the preset's scheduler, or trained here one by one.

        Raises:
            StoreError: if models diverge, or their outputs cannot be written.
        """
        stores = [self.store(model_set) for model_set in model_sets]
        asked = [store.shards(start, stop) for store in stores]
        tasks = [(i, shard) for i, store in enumerate(stores) for shard in store.missing() if shard in asked[i]]
        if not tasks:
            return stores
        seeds = [self.seeds(model_set.name, len(model_set.masks)) for model_set in model_sets]
        names = sorted({model_sets[i].name.split(":")[0] for i, _ in tasks})
        task = f"train {model_sets[0].name if len(model_sets) == 1 else ' and '.join(names)}"
        total = sum(store.count(shards) for store, shards in zip(stores, asked, strict=True))
        done = total - sum(len(stores[i].models(shard)) for i, shard in tasks)
        self.progress(task, done, total)

        def arguments(task: tuple[int, int]) -> tuple[np.ndarray, list[int], bool, float]:
            of, rows = model_sets[task[0]], stores[task[0]].models(task[1])
            return of.masks[rows], seeds[task[0]][rows.start : rows.stop], of.keep_models, of.until

        for (i, shard), arrays in self.trained(arguments, tasks):
            if not np.isfinite(arrays["logits"]).all():
                raise StoreError(
                    f"Models of {model_sets[i].name!r} diverged (NaN logits in shard {shard}); lower training.lr. "
                    "Finished shards are kept."
                )
            stores[i].write(shard, arrays)
            done += len(stores[i].models(shard))
            self.progress(task, done, total)
        return stores

    def trained(self, arguments: Callable[[T], tuple[Any, ...]], tasks: Sequence[T]) -> Iterator[tuple[T, Any]]:
        """Train shards, here one by one or on workers: pairs of a task and what `train_shard` returns for it."""
        if self.preset.scheduler != "local":
            return self._workers.map(arguments, tasks)
        if self._spec.loop is None:
            return ((task, self.train_shard(*arguments(task))) for task in tasks)
        work = partial(loops.train_shard, self._spec.loop, self.module, self.x, self.y)
        done = execution.one_per_core(self.device).run(work, [arguments(task) for task in tasks])
        return zip(tasks, done, strict=True)

    @cached_property
    def _workers(self) -> Workers:
        return WORKERS["dask"](self)

    def train_shard(
        self, masks: np.ndarray, seeds: Sequence[int], keep_models: bool, until: float = 1.0
    ) -> dict[str, np.ndarray]:
        """Train models with these masks and seeds: what a store keeps of them, logits, masks, perhaps weights."""
        x, n = self.x, self.data.n_train
        if self._spec.loop is not None:
            return loops.train_shard(self._spec.loop, self.module, x, self.y, (masks, seeds, keep_models, until))

        def keep(trained: ensemble.Ensemble) -> dict[str, np.ndarray]:
            return {"logits": trained.logits(x).numpy(), **(trained.state() if keep_models else {})}

        how = self.training, self.execution()
        kept = ensemble.train_and(keep, self.module, x[:n], self.y[:n], masks, seeds, *how, until=until)
        return {**kept, "masks": masks}

    def read(self, model_set: ModelSet, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of an array of a model set's store; what is missing or damaged is trained first."""
        (store,) = self.train(model_set, start=start, stop=stop)
        try:
            return store.read(name, start, stop)
        except DamageError as error:
            warnings.warn(str(error), stacklevel=2)
            for shard in error.shards:
                store.drop(shard)
            return self.train(model_set, start=start, stop=stop)[0].read(name, start, stop)

    def outputs(self, model_set: ModelSet, start: int = 0, stop: int | None = None, raw: bool = False) -> Outputs:
        """Logits (n_models, n_points, n_classes) of a set's models, in the margin gauge unless `raw`, yet unread."""
        stop = len(model_set.masks) if stop is None else stop
        (store,) = self.train(model_set, start=start, stop=stop)  # opened once: blocks are many

        def read(first: int, last: int) -> np.ndarray:
            try:
                logits = store.read("logits", start + first, start + last)
            except StoreError:  # which `self.read` mends
                logits = self.read(model_set, "logits", start + first, start + last)
            for i in () if raw else range(0, len(logits), 10):  # in place, a few models at a time
                logits[i : i + 10] = margin_gauge(logits[i : i + 10], self.data.y)
            return logits

        return Outputs(read, (stop - start, len(self.data.y), self.data.n_classes), self.preset.ensembles.shard)

    def models(self, model_set: ModelSet, start: int = 0, stop: int | None = None) -> ensemble.Ensemble:
        """The models of a set that keeps them."""
        module = self.module()
        names = ensemble.initialise(lambda: module, [0]).state()
        state = {name: self.read(model_set, name, start, stop) for name in names}
        return ensemble.Ensemble.from_state(module, state, self.device)

    def jobs(self) -> list[Job]:
        """All models that the preset's main story trains."""
        return list(jobs(self.preset, self.data.n_train, self.data.n_classes))
