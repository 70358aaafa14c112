"""A run of the study: what a preset asks for, computed once, kept on disk, and handed to the notebooks.

Everything is lazy and resumable. Trained models' outputs lie in zarr stores and unlearned results in .npz
files under `runs/store/`, under the hash of exactly what they depend on, so any notebook runs on its own, a
changed number recomputes only what it touches, and runs share what they have in common.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import pandas as pd
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from dmmlib import attribution, datamodels, ensemble, execution, forget_sets, metrics, models, presets, unlearn
from dmmlib import data as datasets
from dmmlib.app import cluster
from dmmlib.errors import DamageError, DeviceError, ForgetSetError, MethodError, PresetError, StoreError
from dmmlib.execution import Execution
from dmmlib.files import read_json, replacing, write_json
from dmmlib.forget_sets import ForgetSet
from dmmlib.hashing import config_hash, short
from dmmlib.progress import Progress, Reporter
from dmmlib.registry import versions
from dmmlib.resnet18 import resnet18  # noqa: F401 (registers itself)
from dmmlib.store import Store
from dmmlib.unlearn import Problem, Unlearned

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
T = TypeVar("T")
N_GAUGE = 20  # originals that a ridge datamodel's change of logits is turned into one of margins at
MANY_STEPS = 200_000  # model-steps from which on processes and compilation can pay


def once(method: Callable[[Any], T]) -> Callable[[Any], T]:
    """A verb whose answer is kept: called again, it gives what it gave."""
    name = f"_once_{method.__name__}"

    @wraps(method)
    def kept(self: Any) -> T:
        if name not in self.__dict__:
            self.__dict__[name] = method(self)
        return self.__dict__[name]

    return kept


@dataclass(frozen=True)
class ModelSet:
    """Models to train: their name determines the seeds, and with the masks their place on disk.

    Attributes:
        name: e.g. "originals", or "oracles:<forget set>:<hash>".
        masks: which training points each model sees, bool (n_models, n_train).
        keep_models: keep the weights as well.
    """

    name: str
    masks: np.ndarray
    keep_models: bool = False


class Predictor(Protocol):
    """A datamodel that predicts outputs for masks."""

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Outputs (k, n_points, n_classes) of models trained on the masks (k, n_train)."""
        ...


@dataclass(frozen=True)
class _Job:
    stream: ModelSet
    seeds: list[int]
    store: Store


def _arguments(task: tuple[_Job, int]) -> tuple[np.ndarray, list[int], bool]:
    """What `train_shard` needs to know of a shard."""
    job, shard = task
    rows = job.store.models(shard)
    part = slice(rows.start, rows.stop)
    return job.stream.masks[part], job.seeds[part], job.stream.keep_models


class Study:
    """A validated preset and all that follows from it.

    Args:
        preset: a name in presets/, a path, or a mapping.
        overrides: dotted key -> value; see `presets.load`.
        forget_set: a JSON file of a forget set to study instead of the preset's.
        beside: study that set beside the preset's, not instead of them.
        runs: directory for everything computed; `runs/` of the repository, or $DMM_RUNS.
        figures: directory for figures; `figures/` of the repository, or $DMM_FIGURES.
        progress: hook that is told of progress.

    Raises:
        PresetError, DataError, ForgetSetError, MethodError, DeviceError: one line each, before any training.
    """

    def __init__(
        self,
        preset: str | Path | Mapping[str, Any] = "laptop",
        overrides: Mapping[str, Any] | None = None,
        *,
        forget_set: str | Path | None = None,
        beside: bool = False,
        runs: str | Path | None = None,
        figures: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.preset = presets.load(preset, overrides)
        for method in self.preset.unlearning.methods:
            unlearn.get(method)
            attribution.get(method.partition("@")[2] or self.preset.attribution.name)
        self.device = models.resolve_device(self.preset.device)
        if self.preset.threads:
            torch.set_num_threads(self.preset.threads)
        self.runs = Path(runs or os.environ.get("DMM_RUNS") or ROOT / "runs")
        self.figures = Path(figures or os.environ.get("DMM_FIGURES") or ROOT / "figures")
        self.progress = progress or Reporter()
        self._spec = models.get(self.preset.model.name)
        section = self.preset.data
        options = section.options | ({"path": section.path} if section.path else {})
        self.data = datasets.load(section.name, section.n_train, section.n_val, section.seed, **options)
        self._check_preset()
        self._own = forget_sets.load(Path(forget_set), self.data) if forget_set else None
        self._beside = beside
        taken = [part.name for part in (*self.preset.forget_sets, *self.preset.tuning.forget_sets)]
        if beside and self._own is not None and self._own.name in taken:
            raise ForgetSetError(
                f"The preset has a forget set {self._own.name!r} already; save yours under another name to study it "
                "beside."
            )

    def _check_preset(self) -> None:
        for part in (*self.preset.forget_sets, *self.preset.tuning.forget_sets):
            if part.size is not None and part.size >= self.data.n_train:
                raise ForgetSetError(
                    f"Forget set {part.name!r} asks for {part.size} of {self.data.n_train} training points; "
                    "leave some to retain."
                )
        names = [part.name for part in (*self.preset.forget_sets, *self.preset.tuning.forget_sets)]
        if len(set(names)) < len(names):
            raise PresetError(f"Preset {self.preset.name!r} names two forget sets alike: {', '.join(names)}.")

        if self.preset.tuning.n_models > self.preset.ensembles.n_models:
            raise PresetError(
                f"tuning.n_models={self.preset.tuning.n_models} is more than ensembles.n_models="
                f"{self.preset.ensembles.n_models}; lower it."
            )

    # --- places ----------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """Where this preset's forget sets lie."""
        return self.runs / self.preset.name

    @property
    def output(self) -> Path:
        """Where this run's notebooks and tables lie; with a forget set of one's own apart from the preset's."""
        if self._own is None:
            return self.directory
        return self.directory / f"forget_set-{self._own.name}{'-beside' if self._beside else ''}"

    def save_figure(self, figure: Figure, name: str) -> Path:
        """Write a figure to figures/<preset>/<name>.png; see `output` for a forget set of one's own."""
        path = self.figures / self.output.relative_to(self.runs) / f"{name}.png"
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        return path

    def show(self, figure: Figure, name: str) -> Image:
        """Save a figure and return it as the image that was saved, for a notebook to display."""
        import matplotlib.pyplot as plt
        from IPython.display import Image

        path = self.save_figure(figure, name)
        plt.close(figure)
        return Image(data=path.read_bytes())

    # --- data and models -------------------------------------------------------------------------------

    @cached_property
    def x(self) -> Tensor:
        """Points (n_train + n_val, ...) as models take them, training points first, on the device.

        Prepared; but images that would only be normalised stay bytes on a GPU, a quarter of the memory.
        """
        if self._bytes:
            return torch.from_numpy(self.data.x).to(self.device).permute(0, 3, 1, 2)
        x = self._spec.prepare(self.data, self.data.x)
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format  # convolutions are faster with it
        return x.contiguous(memory_format=layout).to(self.device)

    @cached_property
    def _bytes(self) -> bool:
        images = self.data.x_train.dtype == np.uint8 and self._spec.prepare is models.normalise
        return images and self.device.type == "cuda"

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
        shape = tuple(self.x.shape[1:])
        make = partial(self._spec.factory, shape, self.data.n_classes, **self.preset.model.options)
        if not self._bytes:
            return make
        mean, std = (torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (self.data.mean, self.data.std))
        return partial(_normalising, make, mean, std)

    @property
    def training(self) -> ensemble.Training:
        return self.preset.training.training()

    @once
    def execution(self) -> Execution:
        """How training is carried out here: measured once a machine and model, and kept, unless the preset says.

        Processes and compiling take some seconds to start, so they are tried only where many steps are planned.
        """
        return self._fastest(many=self.trains_much)

    @property
    def trains_much(self) -> bool:
        """Whether so many steps are planned that processes and compiling pay, which take time to start."""
        return self._planned_steps() >= MANY_STEPS

    @once
    def fine_tuning(self) -> Execution:
        """How unlearning is carried out here: without processes, and not compiled unless the preset says so.

        Each loss would be compiled anew for a few hundred steps, which take less time than that.
        """
        return self._fastest(many=False)

    def _fastest(self, many: bool) -> Execution:
        section = self.preset.ensembles
        chunk = None if section.chunk == "auto" else section.chunk
        allowed = (None if many else False) if section.compile == "auto" else section.compile
        options = execution.candidates(self.device, chunk, allowed, many)
        if all(o.compile for o in options) and not execution.can_compile(self.device):
            raise DeviceError(
                "ensembles.compile is true, but torch.compile does not work here (it needs a C++ compiler, on a GPU "
                "Triton); install it, or set it to auto or false."
            )
        if len(options) == 1:
            return options[0]
        config = {
            "machine": execution.machine(self.device),
            "model": self.preset.model.model_dump(),
            "version": versions("engine", f"model {self.preset.model.name}"),
            "shape": list(self.x.shape[1:]),
            "batch": self.preset.training.batch_size,
            "precision": self.preset.training.precision,
            "options": [dataclasses.asdict(o) for o in options],
        }
        path = self.runs / "store" / f"execution-{config_hash(config)}.json"
        if not path.exists():
            self.progress("measure how to train fastest", 0, 1)
            options = tuple(o for o in options if not o.compile or execution.can_compile(self.device))
            rates = execution.measure(options, self._steps)
            table = [dataclasses.asdict(o) | {"model_steps_per_second": round(r, 1)} for o, r in rates.items()]
            write_json(path, table)
            self.progress("measure how to train fastest", 1, 1)
        best = max(read_json(path), key=lambda row: row.pop("model_steps_per_second"))
        return Execution(**best)

    def _planned_steps(self) -> int:
        """Model-steps of all the training that the preset asks for."""
        p, n = self.preset, self.data.n_train
        subsets = p.datamodels.n_subsets + p.datamodels.n_held_out
        others = p.ensembles.n_models * (1 + 2 * len(p.forget_sets))
        steps = subsets * self.training.steps(round(p.datamodels.fraction * n)) + others * self.training.steps(n)
        return steps + p.attribution.n_subsets * self.training.steps(round(p.attribution.fraction * n))

    def _steps(self, execution: Execution, n: int) -> None:
        """Take n training steps of `execution.chunk` models in each of its workers, to be timed."""
        module, x, training, device = self.module, self.x[: self.data.n_train], self.training, self.device
        loss = ensemble.classification(self.y)

        def take(worker: int) -> None:
            rng = np.random.default_rng(worker)
            size = (execution.chunk, training.batch_size)
            models = ensemble.initialise(module, range(execution.chunk), device)
            batches = (rng.integers(0, len(x), size) for _ in range(n))
            start = training.optimizer.start(models.params)
            compile, precision = execution.compile, training.precision
            ensemble.descend(models, x, batches, loss, training.optimizer, start, precision=precision, compile=compile)

        list(execution.run(take, range(execution.workers)))
        if device.type == "cuda":
            torch.cuda.synchronize()

    def _identity(self) -> dict[str, Any]:
        """What every trained model depends on besides its mask and seed."""
        return {
            "versions": versions("engine", "seeds", f"model {self.preset.model.name}"),
            "data": self.data.sha256,
            "model": self.preset.model.model_dump(),
            "training": self.preset.training.model_dump(),
        }

    def seeds(self, stream: str, n: int) -> list[int]:
        """n seeds of a named stream; streams are independent, and a longer one begins with a shorter one."""
        sequence = np.random.SeedSequence([self.preset.seed, zlib.crc32(stream.encode())])
        return sequence.generate_state(n).tolist()

    def train(self, *streams: ModelSet) -> list[Store]:
        """Train the models of some streams, unless that is done; their outputs go to a store each.

        Shards of all streams are sent to the workers of the preset's scheduler, or trained here one by one.
        """
        jobs = [_Job(stream, self.seeds(stream.name, len(stream.masks)), self._store(stream)) for stream in streams]
        tasks = [(job, shard) for job in jobs for shard in job.store.missing()]
        if not tasks:
            return [job.store for job in jobs]
        names = {job.stream.name.split(":")[0] for job, _ in tasks}
        task = f"train {tasks[0][0].stream.name if len(jobs) == 1 else ' and '.join(sorted(names))}"
        total = sum(len(job.stream.masks) for job in jobs)
        done = total - sum(len(job.store.models(shard)) for job, shard in tasks)
        self.progress(task, done, total)
        for (job, shard), arrays in self._workers.map(_arguments, tasks):
            if not np.isfinite(arrays["logits"]).all():
                raise StoreError(
                    f"Models of {job.stream.name!r} diverged (NaN logits in shard {shard}); lower training.lr. "
                    "Finished shards are kept."
                )
            job.store.write(shard, arrays)
            done += len(job.store.models(shard))
            self.progress(task, done, total)
        return [job.store for job in jobs]

    def status(self) -> pd.DataFrame:
        """What is trained of everything that the preset asks for; nothing is trained or changed.

        Returns:
            A row a stream: models planned, done, missing and damaged. Forget sets chosen by the datamodel are
            known only once the subset models are trained; until then their oracles stand in one row.
        """
        rows = []

        def look(stream: ModelSet) -> bool:
            planned = len(stream.masks)
            done = damaged = 0
            if self._exists(stream):
                store = self._store(stream)
                bad = store.damaged()
                damaged = sum(len(store.models(s)) for s in bad)
                done = planned - damaged - sum(len(store.models(s)) for s in store.missing())
            missing = planned - done - damaged
            name = ":".join(stream.name.split(":")[:2])
            rows.append({"models": name, "planned": planned, "done": done, "missing": missing, "damaged": damaged})
            return done == planned

        known = look(self._subset_stream)
        look(self._attribution_stream)
        look(self._original_stream)
        n, n_tuning = self.preset.ensembles.n_models, self.preset.tuning.n_models
        if known:
            for forget_set in self.forget_sets().values():
                look(self._oracle_stream(forget_set))
                look(self._oracle_stream(forget_set, floor=True))
            for forget_set in self.tuning_sets().values():
                look(self._oracle_stream(forget_set))
                look(self._oracle_stream(forget_set, floor=True, n=n_tuning))
        else:
            planned = 2 * n * len(self.preset.forget_sets) + (n + n_tuning) * len(self.preset.tuning.forget_sets)
            name = "oracles of forget sets not chosen yet"
            rows.append({"models": name, "planned": planned, "done": 0, "missing": planned, "damaged": 0})
        return pd.DataFrame(rows)

    def _exists(self, stream: ModelSet) -> bool:
        files, path = url_to_fs(self._place(stream)[0])
        return bool(files.exists(path))

    @cached_property
    def _workers(self) -> cluster.Workers:
        return cluster.connect(self)

    def train_shard(self, masks: np.ndarray, seeds: Sequence[int], keep_models: bool) -> dict[str, np.ndarray]:
        """What a store keeps of models trained with these masks and seeds: logits, masks, perhaps weights."""
        x, n = self.x, self.data.n_train

        def keep(models: ensemble.Ensemble) -> dict[str, np.ndarray]:
            return {"logits": models.logits(x).numpy(), **(models.state() if keep_models else {})}

        kept = ensemble.train_and(keep, self.module, x[:n], self.y[:n], masks, seeds, self.training, self.execution())
        return {**kept, "masks": masks}

    def _place(self, stream: ModelSet) -> tuple[str, dict[str, Any]]:
        """Where a stream's store is, and the configuration that it belongs to."""
        config = {
            **self._identity(),
            "stream": stream.name,
            "seed": self.preset.seed,
            "masks": short(np.packbits(stream.masks).tobytes()),
        }
        root = self.preset.store or (self.runs / "store").as_posix()
        return f"{root.rstrip('/')}/{stream.name.split(':')[0]}-{config_hash(config)}.zarr", config

    def _store(self, stream: ModelSet) -> Store:
        place, config = self._place(stream)
        arrays: dict[str, tuple[Sequence[int], str]] = {
            "logits": ((len(self.x), self.data.n_classes), "float32"),
            "masks": ((self.data.n_train,), "bool"),
        }
        if stream.keep_models:
            state = ensemble.initialise(self.module, [0]).state()
            arrays |= {name: (array.shape[1:], str(array.dtype)) for name, array in state.items()}
        return Store.open(place, config, len(stream.masks), arrays, self.preset.ensembles.shard)

    def _read(self, stream: ModelSet, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of an array of a stream; what is missing or damaged is trained first."""
        (store,) = self.train(stream)
        try:
            return store.read(name, start, stop)
        except DamageError as error:
            for shard in error.shards:
                store.drop(shard)
            return self.train(stream)[0].read(name, start, stop)

    @cached_property
    def _original_stream(self) -> ModelSet:
        masks = np.ones((self.preset.ensembles.n_models, self.data.n_train), bool)
        return ModelSet("originals", masks, keep_models=True)

    def _models(self, stream: ModelSet, start: int = 0, stop: int | None = None) -> ensemble.Ensemble:
        """The models of a stream that keeps them."""
        module = self.module()
        names = ensemble.initialise(lambda: module, [0]).state()
        state = {name: self._read(stream, name, start, stop) for name in names}
        return ensemble.Ensemble.from_state(module, state, self.device)

    @once
    def originals(self) -> ensemble.Ensemble:
        """N models trained on S."""
        return self._models(self._original_stream)

    @once
    def original_logits(self) -> np.ndarray:
        """Their logits (N, n_points, n_classes), training points first."""
        return self._read(self._original_stream, "logits")

    def _oracle_stream(self, forget_set: ForgetSet, floor: bool = False, n: int | None = None) -> ModelSet:
        content = short(forget_set.indices.tobytes())[:8]
        name = f"{'floor' if floor else 'oracles'}:{forget_set.name}:{content}"
        n = n or self.preset.ensembles.n_models
        return ModelSet(name, np.tile(forget_set.mask(self.data.n_train), (n, 1)))

    def oracles(self, forget_set: ForgetSet, floor: bool = False, n: int | None = None) -> np.ndarray:
        """Logits (n, n_points, n_classes) of models trained on R.

        Args:
            forget_set: what is left out.
            floor: the second, independent set (the floor, and oracle matching's teachers).
            n: how many, N by default.
        """
        return self._read(self._oracle_stream(forget_set, floor, n), "logits")

    def train_oracles(self) -> None:
        """Train the oracles of all forget sets, at once where there are workers for it."""
        self.train(*(self._oracle_stream(f, floor) for f in self.forget_sets().values() for floor in (False, True)))

    def has_oracles(self, forget_set: ForgetSet) -> bool:
        """Whether the oracles that a forget set's results are measured against are all trained."""
        stream = self._oracle_stream(forget_set)
        return self._exists(stream) and not self._store(stream).missing()

    # --- datamodels ------------------------------------------------------------------------------------

    def subset_masks(self) -> np.ndarray:
        """Which points each subset model is trained on: bool (n_subsets + n_held_out, n_train)."""
        section = self.preset.datamodels
        return self.random_masks("masks", section.n_subsets + section.n_held_out, section.fraction)

    def random_masks(self, stream: str, n: int, fraction: float) -> np.ndarray:
        """n random subsets of S of that share, bool (n, n_train)."""
        masks = np.zeros((n, self.data.n_train), bool)
        size = round(fraction * self.data.n_train)
        for mask, seed in zip(masks, self.seeds(stream, n), strict=True):
            mask[np.random.default_rng(seed).permutation(self.data.n_train)[:size]] = True
        return masks

    def _outputs(self, stream: ModelSet, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Logits of a stream's models in the margin gauge."""
        return metrics.margin_gauge(self._read(stream, "logits", start, stop), self.data.y)

    @cached_property
    def _subset_stream(self) -> ModelSet:
        return ModelSet("subsets", self.subset_masks())

    @once
    def subsets(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks (M, n_train) and outputs of the many subset models.

        Outputs are logits in the margin gauge (M, n_points, n_classes); `raw_subset_logits` has them as they came.
        """
        m = self.preset.datamodels.n_subsets
        return self._subset_stream.masks[:m], self._outputs(self._subset_stream, 0, m)

    def raw_subset_logits(self) -> np.ndarray:
        """Logits (M, n_points, n_classes) of the same models as they came, in no gauge."""
        return self.logits_of(self._subset_stream, 0, self.preset.datamodels.n_subsets)

    def logits_of(self, stream: ModelSet, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Logits (n_models, n_points, n_classes) of a stream's models as they came."""
        return self._read(stream, "logits", start, stop)

    @once
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks and outputs of the further subset models: the first half chooses lambda, the second reports."""
        m = self.preset.datamodels.n_subsets
        return self._subset_stream.masks[m:], self._outputs(self._subset_stream, m)

    def datamodel_of(self, n_subsets: int) -> tuple[datamodels.RidgeDatamodel, dict[float, float]]:
        """A ridge datamodel on the first `n_subsets` subset models, and the LDS of each lambda tried."""
        masks, logits = (a[:n_subsets] for a in self.subsets())
        half = self.preset.datamodels.n_held_out // 2
        lam, scores = datamodels.choose_lambda(
            masks,
            logits,
            self.held_out()[0][:half],
            self.held_out()[1][:half],
            self.data.y,
            self.preset.datamodels.lambdas,
            self.device,
        )
        return datamodels.RidgeDatamodel.fit(masks, logits, lam, self.device), scores

    @cached_property
    def _plain_datamodel(self) -> datamodels.RidgeDatamodel:
        """Plain ridge on all M subset models, lambda chosen by LDS: what forget sets are selected with."""
        return self.datamodel_of(self.preset.datamodels.n_subsets)[0]

    def search_datamodel(self) -> pd.DataFrame:
        """Every ridge penalty and share of it on own weights, scored on the tuning sets; kept on disk.

        The LDS is a rank correlation and blind to scale; what matters here is whether predicted oracles lie
        on true ones. So the score is that of `search`, of DM-direct.
        """
        section = self.preset.datamodels
        settings = section.grid
        logits = self.raw_subset_logits()

        def dm_direct(problem: Problem, **setting: float) -> Unlearned:
            fitted = self._ridge(logits, **setting)
            return unlearn.get("dm_direct")(dataclasses.replace(problem, attributor=fitted))

        # Ridge keeps the coarser measure that its replications were chosen by; the sharper one likes ridge less.
        config, n = {"datamodels": self._datamodel_config()}, self.preset.tuning.n_models
        return self._search("datamodel", dm_direct, settings, versions("ridge"), config, problem_of="", n=n)

    def _ridge(self, logits: np.ndarray, lam: float, own_share: float) -> datamodels.Gauged:
        """The paper's kind of datamodel: of raw logits, and added to them."""
        model = datamodels.RidgeDatamodel.fit(self.subset_masks()[: len(logits)], logits, lam, self.device, own_share)
        return datamodels.Gauged(model, self.original_logits()[:N_GAUGE], self.data.y)

    @once
    def datamodel(self) -> datamodels.Gauged:
        """Ridge on the raw logits of all M subset models, with the setting that did best on the tuning sets."""
        best = self.search_datamodel().iloc[0]
        return self._ridge(self.raw_subset_logits(), float(best["lam"]), float(best["own_share"]))

    def lds(self, model: Predictor) -> np.ndarray:
        """Predicted and actual margins (2, n_held_out / 2, n_points) on subsets that chose nothing."""
        half = self.preset.datamodels.n_held_out // 2
        masks, outputs = (a[half:] for a in self.held_out())
        return np.stack([metrics.right_logits(z, self.data.y) for z in (model.predict(masks), outputs)])

    # --- attribution -----------------------------------------------------------------------------------

    @cached_property
    def _attribution_stream(self) -> ModelSet:
        section = self.preset.attribution
        masks = self.random_masks("attribution masks", section.n_subsets, section.fraction)
        return ModelSet("attribution", masks, keep_models=True)

    @once
    def context(self) -> attribution.Context:
        """What attributors are fitted to: the subset models of the preset's attribution, and the originals."""
        return self.context_of(self._attribution_stream)

    def context_of(self, stream: ModelSet, start: int = 0, stop: int | None = None) -> attribution.Context:
        """The same of other subset models: some rows of a stream that keeps its models."""
        return attribution.Context(
            self.x,
            self.y,
            stream.masks[start:stop],
            self._outputs(stream, start, stop),
            self._models(stream, start, stop),
            self.originals(),
            self.original_logits(),
            self.preset.seed,
        )

    def attributor(self, name: str = "") -> datamodels.Attributor:
        """An attributor, fitted once; the preset's own, which DM-direct, DMM and the widget predict with, by default.

        Ridge has the many subset models of `datamodels`, others `context`.
        """
        name = name or self.preset.attribution.name
        if name == "ridge":
            return self.datamodel()
        if name not in self._attributors:
            own = name == self.preset.attribution.name
            self.progress(f"fit the attributor {name}", 0, 1)
            options = self.preset.attribution.options if own else {}
            self._attributors[name] = attribution.fit(name, self.context(), **options)
            self.progress(f"fit the attributor {name}", 1, 1)
        return self._attributors[name]

    @cached_property
    def _attributors(self) -> dict[str, datamodels.Attributor]:
        return {}

    def n_subsets_of(self, name: str) -> int:
        """How many subset models an attributor is fitted to."""
        return (self.preset.datamodels if name == "ridge" else self.preset.attribution).n_subsets

    def _attribution_config(self, method: str) -> dict[str, Any]:
        """What a method's result depends on through its attributor; nothing for a method that takes none."""
        if not unlearn.registered(method).attributed:
            return {}
        name = method.partition("@")[2] or self.preset.attribution.name
        if name == "ridge":
            tuning = {name: f.indices.tolist() for name, f in self.tuning_sets().items()}
            return {
                "datamodels": self._datamodel_config(),
                "tuning sets": tuning,
                "tuned at": self.preset.tuning.n_models,
            }
        section = self.preset.attribution.model_dump(mode="json") | {"name": name}
        if name != self.preset.attribution.name:
            section["options"] = {}
        return {"attribution": section, "attributor": versions(f"attributor {name}", "gradients")}

    # --- forget sets -----------------------------------------------------------------------------------

    @once
    def loadings(self) -> np.ndarray:
        """Loadings (n_train, k) on the principal components of the train x train datamodel matrix."""
        every = (*self.preset.forget_sets, *self.preset.tuning.forget_sets)
        wanted = max((p.component for p in every if p.kind in ("pc", "pc_both")), default=2)
        n = self.data.n_train
        train_margins = metrics.margins(self.subsets()[1][:, :n], self.data.y_train)
        return datamodels.principal_loadings(self._plain_datamodel, train_margins, max(wanted, 2))

    def influences(self, point: int) -> np.ndarray:
        """How every training point acts on the margin of one point: its row (n_train,) of the datamodel matrix."""
        margins = metrics.margins(self.subsets()[1][:, [point]], self.data.y[[point]])
        return self._plain_datamodel.adjoint(margins.T)[0]

    @once
    def forget_sets(self) -> dict[str, ForgetSet]:
        """The reported forget sets by name; also saved as JSON in the run's directory."""
        own = {} if self._own is None else {self._own.name: self._own}
        if own and not self._beside:
            return own
        return self._make_forget_sets(self.preset.forget_sets, exclude=None) | own

    @once
    def tuning_sets(self) -> dict[str, ForgetSet]:
        """Forget sets for the search of hyperparameters: they share no point with the reported ones."""
        reported = np.unique(np.concatenate([f.indices for f in self.forget_sets().values()]))
        return self._make_forget_sets(self.preset.tuning.forget_sets, exclude=reported)

    def _make_forget_sets(
        self, sections: Iterable[presets.ForgetSetSection], exclude: np.ndarray | None
    ) -> dict[str, ForgetSet]:
        made = {}
        for part in sections:
            rng = np.random.default_rng(self.seeds(f"forget:{part.name}", 1)[0])
            size = part.size or 1
            if part.kind == "random":
                indices = forget_sets.random(self.data, size, rng, exclude)
            elif part.kind == "nearest":
                indices = forget_sets.nearest(self.features[: self.data.n_train], part.point, size)
            elif part.kind == "class":
                indices = forget_sets.class_share(self.data, part.label, part.share, rng)
            else:
                choose = forget_sets.highest if part.kind == "pc" else forget_sets.both_ends
                indices = choose(self.loadings()[:, part.component - 1], size, exclude)
            made[part.name] = forget_sets.make(
                part.name, indices, self.data, preset=self.preset.name, **part.model_dump(exclude={"name"})
            )
            made[part.name].save(self.directory / "forget_sets" / f"{part.name}.json")
        return made

    # --- unlearning ------------------------------------------------------------------------------------

    def problem(self, forget_set: ForgetSet, method: str = "", tuning: bool = False) -> Problem:
        """The unlearning problem of a forget set, with fewer models and no trajectory for tuning.

        It has an attributor where the method takes one: that which its name says after @, or the preset's.
        """
        attributed = method and unlearn.registered(method).attributed
        name = method.partition("@")[2] or self.preset.attribution.name
        n = self.preset.tuning.n_models if tuning else self.preset.ensembles.n_models
        return Problem(
            originals=self.originals()[:n],
            original_logits=self.original_logits()[:n],
            x=self.x,
            y=self.y,
            n_train=self.data.n_train,
            forget=forget_set.indices,
            training=self.training,
            attributor=self.attributor(name) if attributed else None,
            oracle_logits=self.oracles(forget_set, floor=True, n=n),
            checkpoints=0 if tuning else self.preset.unlearning.checkpoints,
            seed=self.seeds(f"unlearn:{forget_set.name}", 1)[0],
            execution=self.fine_tuning(),
        )

    def _datamodel_config(self) -> dict[str, Any]:
        return self.preset.datamodels.model_dump(exclude={"sizes"}) | {"regressed": "raw logits", "added to": "logits"}

    def search(self, method: str) -> pd.DataFrame:
        """Every setting tried of a method on the tuning sets, best first; kept on disk.

        The score is KLoM's 95th percentile against oracles, averaged over forget, retain and validation
        points and over the tuning sets.
        """
        settings = unlearn.configurations(method, self.preset.tuning.budget, self.preset.seed)
        known = unlearn.registered(method)
        config, n = self._attribution_config(method), self.preset.ensembles.n_models
        return self._search(method, known.run, settings, self._versions(method), config, problem_of=method, n=n)

    def _search(
        self,
        name: str,
        method: unlearn.Method,
        settings: list[dict[str, Any]],
        source: dict[str, int],
        more: dict[str, Any],
        *,
        problem_of: str,
        n: int,
    ) -> pd.DataFrame:
        """Settings of a method, measured against n oracles on the tuning sets, best first.

        Its problems are those of the registered method `problem_of`, attributor included; with none if "".
        """
        section = self.preset.tuning
        config = {
            **self._identity(),
            "method": name,
            "code": source,
            "settings": settings,
            "tuning": section.model_dump(),
            "oracles": n,
            "sets": {tuning: f.indices.tolist() for tuning, f in self.tuning_sets().items()},
            "seed": self.preset.seed,
            **more,
        }
        path = self.runs / "store" / f"search-{name}-{config_hash(config)}.json"
        if path.exists():
            return pd.DataFrame(read_json(path))
        rows = []
        for tuning, forget_set in self.tuning_sets().items():
            problem = self.problem(forget_set, problem_of, tuning=True)
            reference = metrics.margins(self.oracles(forget_set)[:n], self.data.y)
            splits = forget_set.splits(self.data.n_train, self.data.n_val)
            task = f"search {name} on {tuning}"
            for i, setting in enumerate(settings):
                self.progress(task, i, len(settings))
                result = method(problem, **setting)
                row = {"setting": i, "forget_set": tuning, "cost": result.cost, **setting}
                for split, indices in splits.items():
                    values = _klom_or_worst(result.margins[:, indices], reference[:, indices])
                    row[split] = float(np.percentile(values, 95))
                row["score"] = float(np.mean([row[split] for split in splits]))
                rows.append(row)
            self.progress(task, len(settings), len(settings))
        table = pd.DataFrame(rows)
        table["mean_score"] = table.groupby("setting")["score"].transform("mean")
        table = table.sort_values(["mean_score", "setting", "forget_set"], ignore_index=True)
        write_json(path, table.to_dict("records"))
        return table

    def tuned(self, method: str) -> dict[str, Any]:
        """The best setting of a method on the tuning sets ({} if it has none to choose)."""
        settings = unlearn.configurations(method, self.preset.tuning.budget, self.preset.seed)
        if len(settings) == 1:
            return settings[0]
        return settings[int(self.search(method)["setting"].iloc[0])]

    def _versions(self, method: str) -> dict[str, int]:
        return versions("finetune", "whitening", "matching", f"method {method.partition('@')[0]}")

    def unlearning_identity(self, method: str, setting: dict[str, Any], forget_set: ForgetSet) -> dict[str, Any]:
        """All that the result of a method with a setting on a forget set depends on."""
        return {
            **self._identity(),
            "method": method,
            "code": self._versions(method),
            "setting": setting,
            "forget": forget_set.indices.tolist(),
            "name": forget_set.name,
            "n_models": self.preset.ensembles.n_models,
            "checkpoints": self.preset.unlearning.checkpoints,
            "seed": self.preset.seed,
            **self._attribution_config(method),
        }

    def unlearned(self, method: str, forget_set: ForgetSet) -> Unlearned:
        """The result of a method, tuned, on a forget set; kept on disk."""
        setting = self.tuned(method)
        config = self.unlearning_identity(method, setting, forget_set)
        path = self.runs / "store" / f"unlearned-{method}-{config_hash(config)}.npz"
        if path.exists():
            return _read_unlearned(path)
        result = unlearn.get(method)(self.problem(forget_set, method), **setting)
        if not np.isfinite(result.margins).all():
            raise MethodError(
                f"{method} with {setting} gave NaN margins on {forget_set.name!r}; lower its learning rate."
            )
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{k: getattr(result, k) for k in Unlearned.__dataclass_fields__})
        return result

    def reference(self, forget_set: ForgetSet) -> tuple[np.ndarray, np.ndarray]:
        """Margins and correctness (N, n_points) of the oracles that every method is measured against."""
        logits = self.oracles(forget_set)
        return metrics.margins(logits, self.data.y), metrics.correct(logits, self.data.y)

    # --- results ---------------------------------------------------------------------------------------

    def evaluate(self, method: str, forget_set: ForgetSet) -> list[dict[str, Any]]:
        """Rows of the tidy table: a statistic of a method on a split of a forget set, with its interval."""
        result = self.unlearned(method, forget_set)
        margins, right = self.reference(forget_set)
        splits = forget_set.splits(self.data.n_train, self.data.n_val)
        head = {"forget_set": forget_set.name, "size": len(forget_set), "method": method}
        rows = []

        def add(split: str, statistic: str, e: metrics.Estimate) -> None:
            numbers = {"value": e.value, "low": e.low, "high": e.high, "n_models": len(margins)}
            rows.append({**head, "split": split, "statistic": statistic, **numbers})

        for split, statistics in metrics.klom_summary(result.margins, margins, splits).items():
            for name, estimate in statistics.items():
                add(split, f"klom_{name}", estimate)
        for split, estimate in metrics.accuracy_gap(result.correct, right, splits).items():
            add(split, "accuracy_gap", estimate)
        for split, indices in splits.items():
            accuracy = metrics.u_lira(result.margins[:, indices], margins[:, indices])
            error = 1.96 * float(accuracy.std(ddof=1) / np.sqrt(len(accuracy)))
            value = float(accuracy.mean())
            add(split, "u_lira", metrics.Estimate(value, value - error, value + error))
        add("all", "cost", metrics.Estimate(result.cost, result.cost, result.cost))
        return rows

    def results(self) -> pd.DataFrame:
        """All methods on all forget sets, tidy: a row a forget set, method, split and statistic."""
        self.train_oracles()
        rows: list[dict[str, Any]] = []
        pairs = [(f, m) for f in self.forget_sets().values() for m in self.preset.unlearning.methods]
        for i, (forget_set, method) in enumerate(pairs):
            self.progress("unlearn and measure", i, len(pairs))
            rows += self.evaluate(method, forget_set)
        self.progress("unlearn and measure", len(pairs), len(pairs))
        return pd.DataFrame(rows)

    def trajectories(self) -> pd.DataFrame:
        """What happens along the way, a row a forget set, method, moment and split.

        Columns: forget_set, method, split, cost, p95 (KLoM's 95th percentile), and under and over: the share of
        points whose mean margin is more than one of the oracles' standard deviations above, or below, theirs.
        """
        rows = []
        for forget_set in self.forget_sets().values():
            margins, _ = self.reference(forget_set)
            sd = margins.std(0)
            splits = forget_set.splits(self.data.n_train, self.data.n_val)
            for method in self.preset.unlearning.methods:
                result = self.unlearned(method, forget_set)
                for cost, at in zip(result.costs, result.trajectory, strict=True):
                    values = metrics.klom(at, margins)
                    gaps = at.mean(0) - margins.mean(0)
                    for split, indices in splits.items():
                        p95 = float(np.percentile(values[indices], 95))
                        under, over = ((sign * gaps > sd)[indices].mean() for sign in (1, -1))
                        rows.append((forget_set.name, method, split, float(cost), p95, under, over))
        return pd.DataFrame(rows, columns=["forget_set", "method", "split", "cost", "p95", "under", "over"])

    def save_table(self, table: pd.DataFrame, name: str) -> Path:
        """Write a table to the run's directory as CSV, atomically."""
        path = self.output / name
        with replacing(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
        return path


def _normalising(make: Callable[[], torch.nn.Module], mean: Tensor, std: Tensor) -> torch.nn.Module:
    """A model that takes bytes: `models.normalise` as its first step, which adds no parameter or name to it."""
    model = make()
    model.register_forward_pre_hook(lambda _, inputs: ((inputs[0].float() / 255 - mean) / std,))
    return model


def _klom_or_worst(unlearned: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """KLoM, or its maximum everywhere if a setting made the models diverge."""
    if not np.isfinite(unlearned).all():
        return np.full(unlearned.shape[1], -np.log(metrics.FLOOR))
    return metrics.klom(unlearned, oracle)


def _read_unlearned(path: Path) -> Unlearned:
    try:
        with np.load(path, allow_pickle=False) as archive:
            values = {k: archive[k] for k in Unlearned.__dataclass_fields__}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} is damaged ({error}); delete it to compute it again.") from error
    return Unlearned(**{**values, "cost": float(values["cost"])})
