"""The golden table: what the library computes on inputs so small that all of it takes seconds.

`tests/golden.csv` records some four hundred numbers. Its rows are in the order of dependence: those of a component come
from components above only, so the first number that moves names the component that was changed, whose `version` must
then be raised: results that anyone has on disk are no longer what the library computes.

    python -m tests.golden            # which numbers moved
    python -m tests.golden --update   # record them, where a version was raised for it

The library's modules are named in the imports only, and what a study's members are called in the first part below.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from dmmlib import attribution, data, datamodels, ensemble, forget_sets, metrics, models, unlearn
from dmmlib.attributors import gradients, kernel, margins
from dmmlib.baselines import whitening
from dmmlib.execution import one_thread
from dmmlib.matching import match as matching
from dmmlib.matching.gauss_newton import Jacobian
from dmmlib.optim import SGD, Adam
from dmmlib.progress import silent
from dmmlib.registry import versions
from dmmlib.study import Study

TABLE = Path(__file__).with_name("golden.csv")
COLUMNS = ["component", "version", "quantity", "value"]

# --- the library ---------------------------------------------------------------------------------------


def version(component: str) -> int:
    """The version of a component: raised whenever its numbers change."""
    return versions(component)[component]


def dataset(name: str, n_train: int, n_val: int) -> data.Dataset:
    return data.load(name, n_train, n_val)


def points_of(model: str, dataset: data.Dataset) -> torch.Tensor:
    """All points as a model takes them."""
    return models.get(model).prepare(dataset, dataset.x)


def architecture(name: str, shape: Iterable[int], **options: Any) -> Callable[[], torch.nn.Module]:
    """Makes a model of ten classes, without setting a seed."""
    return partial(models.build, name, tuple(shape), 10, **options)


def fresh(factory: Callable[[], torch.nn.Module], n: int) -> ensemble.Ensemble:
    """n untrained models."""
    return ensemble.initialise(factory, range(n))


def recipe(**options: Any) -> ensemble.Training:
    return ensemble.Training(**{"epochs": 8, "batch_size": 15, "lr": 0.2} | options)


def trained(
    factory: Callable[[], torch.nn.Module],
    x: torch.Tensor,
    y: np.ndarray,
    masks: np.ndarray,
    first_seed: int = 0,
    **options: Any,
) -> ensemble.Ensemble:
    """A model a mask, of the points that it holds."""
    n, seeds = masks.shape[1], range(first_seed, first_seed + len(masks))
    return ensemble.train(factory, x[:n], torch.from_numpy(y[:n]), masks, seeds, recipe(**options))


def study(folder: Path) -> Study:
    return Study(PRESET, runs=folder / "runs", figures=folder / "figures", progress=silent)


def stream_seeds(study: Study, stream: str, n: int) -> list[int]:
    return study.seeds(stream, n)


def random_masks(study: Study, stream: str, n: int, fraction: float) -> np.ndarray:
    return study.random_masks(stream, n, fraction)


def problem(models: ensemble.Ensemble, x: torch.Tensor, y: np.ndarray, forget: np.ndarray, **more: Any) -> Any:
    """The unlearning of some points from some models."""
    logits, n_train = models.logits(x).numpy(), more.pop("n_train")
    return unlearn.Problem(models, logits, x, torch.from_numpy(y), n_train, forget, recipe(), **more)


def search(study: Study, method: str) -> Any:
    """Settings tried of a method, best first; of the ridge datamodel for "ridge"."""
    return study.search_datamodel() if method == "ridge" else study.search(method)


def results(study: Study) -> Any:
    return study.results()


def trajectories(study: Study) -> Any:
    return study.trajectories()


# --- inputs --------------------------------------------------------------------------------------------

N, N_VAL, FORGET = 60, 20, np.array([2, 11, 23, 24, 40, 57])
RETAIN = np.setdiff1d(np.arange(N), FORGET)

PRESET: dict[str, Any] = {
    "name": "golden",
    "seed": 3,
    "device": "cpu",
    "data": {"name": "digits", "n_train": N, "n_val": N_VAL},
    "model": {"name": "linear"},
    "training": {"epochs": 8, "batch_size": 15, "lr": 0.2},
    "ensembles": {"n_models": 16, "chunk": 16, "compile": False, "shard": 20},
    "datamodels": {"n_subsets": 24, "n_held_out": 8, "lambdas": [0.1, 0.5], "own_shares": [1.0, 0.3], "sizes": [24]},
    "attribution": {"n_subsets": 16},
    "forget_sets": [{"name": "random", "kind": "random", "size": 6}, {"name": "pc", "kind": "pc", "size": 6}],
    "tuning": {"forget_sets": [{"name": "tune", "kind": "random", "size": 6}], "n_models": 16, "budget": 2},
    "unlearning": {"methods": ["do_nothing", "retrain", "gd", "dm_direct", "dmm"], "checkpoints": 2},
}


def fixed(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers, always the same."""
    return np.random.default_rng(seed).normal(size=shape)


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(fixed(*shape, seed=seed)).float()


def in_order(values: Any) -> float:
    """A sum that depends on the order, each number times its place."""
    flat = np.asarray(values, np.float64).ravel()
    return float(flat @ np.arange(1, len(flat) + 1))


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return float(np.sqrt(sum(float(t.double().square().sum()) for t in tensors.values())))


class Inputs:
    """What several components start from, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def digits(self) -> data.Dataset:
        return dataset("digits", N, N_VAL)

    @cached_property
    def pictures(self) -> data.Dataset:
        """As large as those of Fashion-MNIST, of noise."""
        pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 1), dtype=np.uint8)
        return data.from_arrays(pixels, np.arange(12), pixels[:5], np.arange(5), mean=(0.4,), std=(0.3,))

    @cached_property
    def study(self) -> Study:
        return study(self.folder)

    @cached_property
    def x(self) -> torch.Tensor:
        return points_of("mlp", self.digits)

    @property
    def y(self) -> np.ndarray:
        return self.digits.y

    @cached_property
    def images(self) -> torch.Tensor:
        return points_of("convnet", self.digits)

    @cached_property
    def mlp(self) -> Callable[[], torch.nn.Module]:
        return architecture("mlp", self.x.shape[1:], hidden=16)

    @cached_property
    def originals(self) -> ensemble.Ensemble:
        return trained(self.mlp, self.x, self.y, np.ones((4, N), bool))

    @cached_property
    def oracle_logits(self) -> np.ndarray:
        masks = np.ones((4, N), bool)
        masks[:, FORGET] = False
        return trained(self.mlp, self.x, self.y, masks, first_seed=50).logits(self.x).numpy()

    @cached_property
    def problem(self) -> Any:
        more = {"oracle_logits": self.oracle_logits, "checkpoints": 3, "seed": 1}
        return problem(self.originals, self.x, self.y, FORGET, n_train=N, **more)

    @cached_property
    def before(self) -> np.ndarray:
        """Margins of the originals."""
        return metrics.margins(self.problem.original_logits, self.y)

    @cached_property
    def subset_masks(self) -> np.ndarray:
        return np.stack([np.random.default_rng(i).permutation(N) < 45 for i in range(16)])

    @cached_property
    def context(self) -> attribution.Context:
        """Of trained subset models."""
        subset_models = trained(self.mlp, self.x, self.y, self.subset_masks, first_seed=100)
        outputs = metrics.margin_gauge(subset_models.logits(self.x).numpy(), self.y)
        y, logits = torch.from_numpy(self.y), self.problem.original_logits
        return attribution.Context(self.x, y, self.subset_masks, outputs, subset_models, self.originals, logits, seed=5)

    @cached_property
    def bayesian(self) -> Any:
        return attribution.fit("bayesian", self.context)

    @cached_property
    def linear_world(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks (40, 24), outputs (40, 30, 3) that are nearly linear in them, and labels (30,)."""
        masks = np.stack([np.random.default_rng(i).permutation(24) < 12 for i in range(40)])
        effects = fixed(24, 30, 3, seed=1) * (fixed(24, 30, 3, seed=2) > 1)
        effects[np.arange(24), np.arange(24)] += 2
        outputs = np.tensordot(masks, effects, 1) + fixed(40, 30, 3, seed=3) + fixed(30, 3, seed=4)
        return masks, outputs.astype(np.float32), np.arange(30) % 3


# --- components ----------------------------------------------------------------------------------------

Values = Iterator[tuple[str, Any]]
"""Quantities in plain words, and their values."""


class Component(NamedTuple):
    """A part of the library that has a version."""

    measure: Callable[[Inputs], Values]
    needs: tuple[str, ...]  # components above that its numbers come from


COMPONENTS: dict[str, Component] = {}


def component(name: str, *needs: str) -> Callable[[Callable[[Inputs], Values]], Callable[[Inputs], Values]]:
    """Add a component to the table."""
    unknown = [need for need in needs if need not in COMPONENTS]
    assert not unknown, f"{name} is above {', '.join(unknown)}, which it needs"

    def add(measure: Callable[[Inputs], Values]) -> Callable[[Inputs], Values]:
        COMPONENTS[name] = Component(measure, needs)
        return measure

    return add


def above(name: str) -> set[str]:
    """All components that the numbers of one come from, itself among them."""
    return {name}.union(*(above(need) for need in COMPONENTS[name].needs))


# data


def _data(name: str, inputs: Inputs) -> Values:
    found = inputs.digits if name == "digits" else dataset(name, 300, 100)
    for part, x, y in (("training", found.x_train, found.y_train), ("validation", found.x_val, found.y_val)):
        yield f"{part} points", len(x)
        yield f"bytes of a {part} point", x[0].nbytes
        yield f"{part} labels, in order", in_order(y)
        yield f"{part} pixels, sum over points in order", in_order(x.reshape(len(x), -1).sum(1, dtype=np.int64))
    yield "mean and deviation that pixels are normalised by", found.mean[0] + 10 * found.std[0]


for _name in ("digits", "fashion-mnist"):
    component(f"data set {_name}")(partial(_data, _name))


@component("seeds", "data set digits")
def _(inputs: Inputs) -> Values:
    for stream in ("originals", "subsets", "oracles:random:0123abcd", "forget:random"):
        yield f"seeds of the stream {stream}, in order", in_order(stream_seeds(inputs.study, stream, 4))
    for stream, share in (("masks", 0.5), ("attribution masks", 0.75)):
        masks = random_masks(inputs.study, stream, 5, share)
        yield f"random masks of the stream {stream}, places of what they hold", in_order(masks)
    blank = fresh(lambda: torch.nn.Linear(1, 2), 3)
    blank_problem = problem(blank, torch.zeros(3, 1), np.zeros(3, int), np.array([1]), n_train=2, seed=7)
    for stream in (None, 1, 2):
        drawn = [rng.integers(2**20, size=3) for rng in blank_problem.rngs(stream)]
        yield f"what a problem's generators draw, stream {stream or 'of batches'}", in_order(drawn)


# models


def _model(name: str, options: dict[str, Any], inputs: Inputs) -> Values:
    if name.startswith("resnet"):
        x = tensor(6, 3, 32, 32)
    else:
        every = points_of(name, inputs.digits)
        yield "root mean square of prepared digits", rms(every)
        x = every[:6]
    if name in ("linear", "convnet"):  # the two ways of preparing points
        prepared = points_of(name, inputs.pictures)
        yield "size of a prepared picture of 28 x 28", prepared[0].numel()
        yield "root mean square of prepared pictures", rms(prepared)
    found = fresh(architecture(name, x.shape[1:], **options), 2)
    yield "number of weights", sum(p[0].numel() for p in found.params.values())
    yield "sum of the initial weights", sum(float(p.double().sum()) for p in found.params.values())
    yield "norm of the initial weights", norm(found.params)
    logits = found.logits(x).numpy()
    yield "sum of tanh of logits", np.tanh(logits).sum()
    yield "root mean square of logits", rms(logits)


for _name, _options in {
    "linear": {},
    "mlp": {"hidden": 16},
    "convnet": {"width": 4},
    "resnet9": {"width": 4},
    "resnet18": {"width": 2},
}.items():
    component(f"model {_name}", "data set digits")(partial(_model, _name, _options))


# training


@component("batches", "seeds")
def _(inputs: Inputs) -> Values:
    rngs = [np.random.default_rng(i) for i in range(2)]
    batches = list(ensemble.epoch_batches([np.arange(10), np.arange(20, 30)], 4, 2, rngs))
    yield "batches of two epochs", len(batches)
    yield "points of two epochs, in order", in_order(np.concatenate(batches, 1))
    untrained = fresh(lambda: torch.nn.Linear(1, 2), 3)
    some = problem(untrained, torch.zeros(30, 1), np.zeros(30, int), np.array([1, 4]), n_train=25, seed=7)
    passes = unlearn.passes(some, some.retain, 1.5, 8)
    yield "batches of one and a half passes", len(passes)
    yield "points of one and a half passes, in order", in_order(np.concatenate(passes, 1))
    yield "points of a stream through a small pool, in order", in_order(unlearn.draw_batches(some, some.forget, 5, 3))


@component("schedule")
def _(inputs: Inputs) -> Values:
    for progress in (0.05, 0.15, 0.5, 0.95):
        yield f"rate after {progress:.0%} of the steps", recipe(lr=0.3, warmup=0.2).rate(progress)
    yield "rate after 5% of the steps, without warming up", recipe(lr=0.3, warmup=0.0).rate(0.05)
    yield "steps of a training", recipe(epochs=3, batch_size=7).steps(30)


def _steps(optimizer: Any, n: int, plain: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters before and after n steps on fixed gradients of many sizes."""
    start = {"matrix": tensor(4, 5, seed=1), "vector": tensor(6, seed=2)}
    if plain:  # memory that the fused kernels cannot walk through
        start = {name: torch.stack([p, p], -1)[..., 0] for name, p in start.items()}
        assert not any(p.is_contiguous() for p in start.values())
    params = {name: p.clone(memory_format=torch.preserve_format) for name, p in start.items()}
    if plain:
        params = {name: torch.stack([p, p], -1)[..., 0] for name, p in params.items()}
    state = optimizer.start(params)
    for step in range(n):
        sizes = {name: torch.logspace(0, -9, p.numel()).reshape(p.shape) for name, p in params.items()}
        slopes = {name: size * tensor(*size.shape, seed=10 + step) for name, size in sizes.items()}
        optimizer.update(params, slopes, state, torch.tensor(0.1 / (1 + step)))
    return start, params


def _optimizer(made: dict[str, Callable[[], Any]], inputs: Inputs) -> Values:
    for words, make in made.items():
        for way in ("fused", "plain"):
            for n in (1, 3):
                start, end = _steps(make(), n, way == "plain")
                moves = {name: (end[name] - start[name]).contiguous() for name in start}
                yield f"{words}, {way}, after {n} steps: length of the way", norm(moves)
                yield f"{words}, {way}, after {n} steps: sum of the ways", sum(float(m.sum()) for m in moves.values())


for _name, _made in {
    "sgd": {
        "Nesterov momentum, decay": lambda: SGD(0.1, 0.9, 0.02, nesterov=True),
        "momentum": lambda: SGD(0.1),
    },
    "adam": {"by default": lambda: Adam(0.1)},
}.items():
    component(f"optimizer {_name}")(partial(_optimizer, _made))


_MODELS = [f"model {_name}" for _name in ("linear", "mlp", "convnet", "resnet9")]


@component("engine", "data set digits", *_MODELS, "batches", "schedule", "optimizer sgd")
def _(inputs: Inputs) -> Values:
    masks = np.ones((3, N), bool)
    masks[1, :20] = False  # trains apart from the others
    at = np.arange(N + N_VAL)
    for name, x, options in (
        ("linear", inputs.x, {}),
        ("mlp", inputs.x, {"hidden": 16}),
        ("convnet", inputs.images, {"width": 4}),
    ):
        made = trained(architecture(name, x.shape[1:], **options), x, inputs.y, masks, epochs=2)
        logits = made.logits(x).numpy()
        for i in (0, 1):
            yield f"{name}, model {i + 1}: mean logit of the label", logits[i, at, inputs.y].mean()
            yield f"{name}, model {i + 1}: standard deviation of logits", logits[i].std()
        yield f"{name}: norm of all weights", norm(made.params)
    noise = tensor(12, 3, 32, 32)
    normed = trained(
        architecture("resnet9", noise.shape[1:], width=2), noise, np.arange(12) % 10, np.ones((1, 12), bool),
        epochs=1, batch_size=6, lr=0.05,
    )  # fmt: skip
    yield "batch norm: norm of running statistics", norm({k: v.float() for k, v in normed.buffers.items()})
    y, logits = torch.arange(6).reshape(2, 3), tensor(2, 3, 10)
    yield "cross-entropy of fixed logits", ensemble.cross_entropy(logits, y).sum()


# metrics


@component("metric margin")
def _(inputs: Inputs) -> Values:
    logits, y = fixed(4, 30, 5).astype(np.float32) * 3, np.arange(30) % 5
    yield "mean margin", metrics.margins(logits, y).mean()
    yield "root mean square of margins", rms(metrics.margins(logits, y))
    gauged = metrics.margin_gauge(logits, y)
    yield "root mean square of logits in the margin gauge", rms(gauged)
    yield "sum of tanh of logits in the margin gauge", np.tanh(gauged).sum()
    yield "share of right answers", metrics.correct(logits, y).mean()


def _two_ensembles() -> tuple[np.ndarray, np.ndarray]:
    """Margins (40, 60) and (50, 60), from alike on the first points to apart on the last."""
    return fixed(40, 60, seed=1) + np.linspace(0, 4, 60), 1.2 * fixed(50, 60, seed=2)


SPLITS = {"first": np.arange(20), "last": np.arange(20, 60)}


@component("metric klom")
def _(inputs: Inputs) -> Values:
    u, o = _two_ensembles()
    hard = {
        "apart everywhere": (u + 50, o),
        "beyond the clip": (60 * u, 60 * o),
        "with ties on edges": (np.round(2 * u), np.round(2 * o)),
        "of a single value": (np.ones((5, 3)), np.ones((6, 3))),
        "in a narrow range": (1e-4 * u + 90, 1e-4 * o + 90),
    }
    for convention in ("closed", "easydub"):
        yield f"{convention}: mean", metrics.klom(u, o, convention).mean()
        yield f"{convention}: root mean square", rms(metrics.klom(u, o, convention))
        for words, (some, others) in hard.items():
            yield f"{convention}: mean {words}", metrics.klom(some, others, convention).mean()
    yield "mean in single precision", metrics.klom(u.astype(np.float32), o.astype(np.float32)).mean()
    yield "mean of 7 bins", metrics.klom(u, o, n_bins=7).mean()
    for split, found in metrics.klom_summary(u, o, SPLITS).items():
        for name, estimate in found.items():
            yield f"{name} over the {split} points", estimate.value
            yield f"{name} over the {split} points: half of its interval", (estimate.high - estimate.value)


@component("metric u_lira")
def _(inputs: Inputs) -> Values:
    u, o = _two_ensembles()
    yield "mean", metrics.u_lira(u, o).mean()
    yield "mean of 9 and 7 models that differ little", metrics.u_lira(u[:9] / 3, o[:7]).mean()
    yield "mean of nearly constant margins", metrics.u_lira(1e-6 * u, 1e-6 * o[:, ::-1]).mean()


@component("metric ks")
def _(inputs: Inputs) -> Values:
    u, o = _two_ensembles()
    yield "mean", metrics.ks(u, o).mean()
    yield "mean with ties", metrics.ks(np.round(u), np.round(o)).mean()
    yield "mean p-value", metrics.ks_p_values(u, o).mean()
    for split, found in metrics.gap_summary(u, o, SPLITS).items():
        for name in ("ks_share", "ks_fdr"):
            yield f"{name} over the {split} points", found[name].value
            yield f"{name} over the {split} points: half of its interval", found[name].high - found[name].value


@component("metric mean_gap")
def _(inputs: Inputs) -> Values:
    u, o = _two_ensembles()
    yield "root mean square", rms(metrics.gaps(u, o))
    for split, found in metrics.gap_summary(u, o, SPLITS).items():
        yield f"mean over the {split} points", found["mean_gap"].value
        yield f"mean over the {split} points: half of its interval", found["mean_gap"].high - found["mean_gap"].value


@component("metric accuracy_gap")
def _(inputs: Inputs) -> Values:
    u, o = _two_ensembles()
    for split, estimate in metrics.accuracy_gap(u > 1, o > 1, SPLITS).items():
        yield f"{split} points", estimate.value
        yield f"{split} points: half of its interval", estimate.high - estimate.value


@component("metric lds")
def _(inputs: Inputs) -> Values:
    actual, noise = fixed(20, 30, seed=1), fixed(20, 30, seed=2)
    yield "mean", datamodels.lds(actual + noise, actual).mean()
    yield "mean with ties", datamodels.lds(np.round(actual + noise), np.round(actual)).mean()
    estimate = datamodels.lds_estimate(actual + noise, actual, n_bootstrap=20)
    yield "half of its interval", estimate.high - estimate.value


# datamodels and forget sets


@component("ridge", "metric margin", "metric lds")
def _(inputs: Inputs) -> Values:
    masks, outputs, labels = inputs.linear_world
    forget = np.array([1, 5, 6])
    for words, m in (("many subsets", 40), ("few subsets", 15)):
        for share in (1.0, 0.3):
            model = datamodels.RidgeDatamodel.fit(masks[:m], outputs[:m], 0.05, own_share=share)
            effect = model.effect(forget)
            head = f"{words}, share {share} on own weights:"
            yield f"{head} mean effect on margins of F", metrics.right_logits(effect, labels)[forget].mean()
            yield f"{head} root mean square effect", rms(effect)
            yield f"{head} root mean square prediction", rms(model.predict(masks[15:20]))
    best, scores = datamodels.choose_lambda(masks[:30], outputs[:30], masks[30:], outputs[30:], labels, (0.01, 0.3))
    yield "penalty chosen by the LDS", best
    yield "LDS of the chosen penalty", scores[best]
    model = datamodels.RidgeDatamodel.fit(masks, outputs, 0.05)
    gauged = datamodels.Gauged(model, fixed(5, 30, 3, seed=6).astype(np.float32), labels)
    yield "raw logits: root mean square effect in the margin gauge", rms(gauged.effect(forget))
    yield "raw logits: root mean square prediction", rms(gauged.retrained(gauged.logits, forget, gauged.labels))


@component("predicted oracle", "metric margin")
def _(inputs: Inputs) -> Values:
    labels, effect = np.arange(30) % 3, 2 * fixed(30, 3, seed=1)
    after = datamodels.retrained(fixed(4, 30, 3).astype(np.float32), effect, labels)
    yield "mean margin", metrics.margins(after, labels).mean()
    yield "root mean square of logits", rms(after)


@component("forget sets", "data set digits")
def _(inputs: Inputs) -> Values:
    scores, taken = fixed(N), np.arange(10)
    pixels = inputs.digits.x_train.reshape(N, -1).astype(float)
    for words, indices in {
        "random": forget_sets.random(inputs.digits, 8, np.random.default_rng(1)),
        "random outside of some points": forget_sets.random(inputs.digits, 8, np.random.default_rng(1), taken),
        "highest loadings": forget_sets.highest(scores, 8),
        "highest loadings outside of some points": forget_sets.highest(scores, 8, taken),
        "both ends of loadings": forget_sets.both_ends(scores, 7, taken),
        "nearest to a point": forget_sets.nearest(pixels, 7, 8),
        "half of a class": forget_sets.class_share(inputs.digits, 3, 0.5, np.random.default_rng(1)),
    }.items():
        yield f"{words}: points, in order", in_order(indices)


# fine-tuning


def _change(inputs: Inputs, result: Any, words: str = "") -> Values:
    """How far margins moved."""
    moved = result.margins - inputs.before
    head = f"{words}: " if words else ""
    yield f"{head}mean change of margins on F", moved[:, FORGET].mean()
    yield f"{head}root mean square change of margins on R", rms(moved[:, RETAIN])


@component("finetune", "engine", "optimizer adam", "metric margin")
def _(inputs: Inputs) -> Values:
    rng = np.random.default_rng(0)
    batches = [np.stack([rng.permutation(RETAIN)[:12] for _ in range(4)]) for _ in range(6)]
    forget = [np.tile(FORGET, (4, 1))] * 2
    loss = ensemble.classification(torch.from_numpy(inputs.y))
    ascent = ensemble.classification(torch.from_numpy(inputs.y), sign=-1.0)
    phase, last = unlearn.Phase(batches, loss), list(inputs.originals.params)[-2:]
    half = {k: (tensor(*v.shape) > 0).float() for k, v in inputs.originals.params.items()}

    result = unlearn.finetune(inputs.problem, [phase], SGD(0.03))
    yield from _change(inputs, result, "SGD")
    yield "SGD: share of right answers", result.correct.mean()
    yield "SGD: cost", result.cost
    yield "SGD: cost at the first checkpoint", result.costs[0]
    yield "SGD: mean margin at the first checkpoint", result.trajectory[0].mean()
    for words, phases, optimizer, options in (
        ("Adam", [phase], Adam(0.003), {}),
        ("last layer only", [phase], SGD(0.03), {"only": last}),
        ("masked gradients", [phase], SGD(0.03), {"masks": half}),
        ("falling rate", [phase], SGD(0.03), {"rate": lambda share: 0.06 * (1 - share)}),
        ("ascent on F before", [unlearn.Phase(forget, ascent), phase], SGD(0.03), {"spent": 10}),
    ):
        result = unlearn.finetune(inputs.problem, phases, optimizer, **options)
        yield from _change(inputs, result, words)
        yield f"{words}: cost", result.cost


@component("whitening", "engine")
def _(inputs: Inputs) -> Values:
    rng = np.random.default_rng(0)
    points = np.stack([rng.permutation(N)[:30] for _ in range(2)])
    convolutions = fresh(architecture("convnet", inputs.images.shape[1:], width=4), 2)
    for words, models_, x in (("mlp", inputs.originals[:2], inputs.x), ("convnet", convolutions, inputs.images)):
        coordinates = whitening.Whitening(x, points, 0.05, models_.module)
        white = coordinates.enter(models_, np.arange(2))
        whiteners = {k: v for k, v in white.params.items() if k.endswith(whitening.WHITENER)}
        yield f"{words}: norm of the whiteners", norm(whiteners)
        yield f"{words}: norm of the weights", norm({k: v for k, v in white.params.items() if k not in whiteners})
        yield f"{words}: root mean square of logits", rms(white.logits(x))
        back = coordinates.leave(white)
        yield f"{words}: norm of the weights turned back", norm(back.params)


# attribution


@component("attribution gradients", "engine")
def _(inputs: Inputs) -> Values:
    y = torch.from_numpy(inputs.y)
    convolutions = fresh(architecture("convnet", inputs.images.shape[1:], width=4), 1)
    for words, some, x in (("mlp", inputs.originals, inputs.x), ("convnet", convolutions, inputs.images)):
        k = kernel.gram(some, 0, x, y).double()
        yield f"{words}: mean of the diagonal", k.diagonal().mean()
        yield f"{words}: sum of products", k.sum()
        yield f"{words}: norm of products", k.norm()


@component("loadings gradients", "engine")
def _(inputs: Inputs) -> Values:
    loadings = gradients.principal_loadings(
        inputs.originals, inputs.x[:N], torch.from_numpy(inputs.y[:N]), np.linspace(0, 1, N), 2
    )
    yield "on the first component, in order", in_order(loadings[:, 0])
    yield "on the second component, in order", in_order(loadings[:, 1])


def _linear_context(inputs: Inputs) -> attribution.Context:
    masks, outputs, labels = inputs.linear_world
    return attribution.Context(torch.zeros(30, 1), torch.from_numpy(labels), masks, outputs)


@component("calibration")
def _(inputs: Inputs) -> Values:
    yield "slope with much noise", margins.slope(2.0, 3.0, 2.5)
    yield "slope with little noise", margins.slope(2.0, 3.0, 0.5)
    weights = fixed(24, 30, seed=8).astype(np.float32)
    weights[np.arange(24), np.arange(24)] += 3
    fitted = margins.calibrated(_linear_context(inputs), weights)
    yield "scale", fitted.scale
    yield "root mean square of the offset", rms(fitted.offset)
    yield "root mean square effect", rms(fitted.effect([1, 5]))


def _attributor(inputs: Inputs, fitted: Any, words: str = "") -> Values:
    effect, labels = fitted.effect(FORGET), inputs.y
    head = f"{words}: " if words else ""
    change = metrics.right_logits(effect, labels)
    yield f"{head}mean effect on margins of F", change[FORGET].mean()
    yield f"{head}root mean square effect on margins of others", rms(np.delete(change, FORGET))


TRAINED = ("engine", "metric margin")


@component("attributor linearised", *TRAINED, "attribution gradients", "calibration")
def _(inputs: Inputs) -> Values:
    fitted = attribution.fit("linearised", inputs.context)
    yield from _attributor(inputs, fitted)
    yield "scale", fitted.scale
    yield "root mean square of what is answered with all points", rms(fitted.offset)
    yield "root mean square effect of single points, unscaled", rms(fitted.response.weights)
    yield "leverage of F", fitted.leverage(FORGET)
    yield from _attributor(inputs, attribution.fit("linearised", inputs.context, n_models=3, rank=30), "rank 30")
    yield from _attributor(inputs, attribution.fit("linearised", inputs.context, n_logits=1), "linear margins")


@component("attributor bayesian", *TRAINED, "attributor linearised")
def _(inputs: Inputs) -> Values:
    fitted = inputs.bayesian
    yield from _attributor(inputs, fitted)
    yield "scale", fitted.scale
    yield "rho", fitted.rho
    yield "mean own weight", metrics.right_logits(fitted.own, inputs.y[:N]).mean()
    sd = fitted.sd(FORGET)
    yield "mean standard deviation on F", sd[FORGET].mean()
    yield "mean standard deviation on others", np.delete(sd, FORGET).mean()
    yield "root mean square prediction", rms(fitted.predict(inputs.subset_masks[:3]))
    correlated = attribution.fit("bayesian", inputs.context, delta=0.5)
    yield from _attributor(inputs, correlated, "correlated errors")
    yield "correlated errors: mean standard deviation on F", correlated.sd(FORGET)[FORGET].mean()


@component("attributor kernel", *TRAINED, "attribution gradients", "calibration")
def _(inputs: Inputs) -> Values:
    fitted = attribution.fit("kernel", inputs.context)
    yield from _attributor(inputs, fitted)
    yield "scale", fitted.scale
    yield "leverage of F", fitted.leverage(FORGET)


@component("attributor lasso")
def _(inputs: Inputs) -> Values:
    for words, options in (("one penalty", {"shares": (0.25,)}), ("penalty chosen", {})):
        fitted = attribution.fit("lasso", _linear_context(inputs), tol=1e-5, **options)
        yield f"{words}: sum of effects", fitted.effect([1, 5, 6]).sum()
        yield f"{words}: root mean square prediction", rms(fitted.predict(inputs.linear_world[0][:3]))


@component("attributor ridge", "ridge")
def _(inputs: Inputs) -> Values:
    yield "root mean square effect", rms(attribution.fit("ridge", _linear_context(inputs)).effect([1, 5, 6]))


# unlearning methods


@component("gauss-newton", "engine", "attribution gradients")
def _(inputs: Inputs) -> Values:
    y = torch.from_numpy(inputs.y)
    convolutions = fresh(architecture("convnet", inputs.images.shape[1:], width=4), 1)
    for words, some, x in (("mlp", inputs.originals, inputs.x), ("convnet", convolutions, inputs.images)):
        seen = Jacobian(some.module.eval(), *some.state_of(0), x[:20], y[:20], 15)
        yield f"{words}: mean of the kernel's diagonal", seen.kernel.diagonal().mean()
        yield f"{words}: norm of the kernel", seen.kernel.double().norm()
        yield f"{words}: norm of a step", norm(seen.solve(torch.linspace(-1, 1, 20), torch.full((20,), 0.1)))


@component("matching", "seeds", "batches", "gauss-newton", "metric margin")
def _(inputs: Inputs) -> Values:
    targets = metrics.margins(inputs.oracle_logits, inputs.y)
    for words, options in (("two steps", {"steps": 2, "farthest": 4.0}), ("far", {"farthest": 100.0})):
        result = matching.match(inputs.problem, targets, cost=0.4, **options)
        yield from _change(inputs, result, words)
    yield "cost", result.cost
    yield "margins at the first checkpoint", result.trajectory[0].mean()


class Run(NamedTuple):
    """A method with a setting; what it needs beyond what all do."""

    setting: dict[str, Any]
    needs: tuple[str, ...] = ()


TUNED = ("seeds", "batches", "finetune")
METHODS = {
    "do_nothing": Run({}),
    "retrain": Run({}),
    "gd": Run({"epochs": 1.0, "lr": 3e-2}, TUNED),
    "ga": Run({"epochs": 3.0, "lr": 1e-2}, TUNED),
    "ga_gd": Run({"ascent_epochs": 3.0, "descent_epochs": 1.0, "lr": 1e-2}, TUNED),
    "neggrad_plus": Run({"epochs": 1.0, "lr": 3e-2, "beta": 0.9}, TUNED),
    "ga_gd_turns": Run({"epochs": 2, "ascent_epochs": 1, "lr": 1e-2, "whitened": True}, (*TUNED, "whitening")),
    "scrub": Run({"epochs": 3, "max_epochs": 2, "lr": 3e-2, "alpha": 0.1}, TUNED),
    "random_labels": Run({"epochs": 1, "lr": 3e-2}, TUNED),
    "salun": Run({"epochs": 3, "lr": 1e-2, "share": 0.3}, TUNED),
    "bad_teacher": Run({"epochs": 1.0, "lr": 1e-3, "retain_share": 0.3, "temperature": 4.0}, TUNED),
    "l1_sparse": Run({"epochs": 1.0, "lr": 3e-2, "gamma": 3e-4}, TUNED),
    "cf_k": Run({"epochs": 1.0, "lr": 1e-1, "k": 1}, TUNED),
    "eu_k": Run({"epochs": 3.0, "lr": 1e-1, "k": 1}, (*TUNED, "method cf_k")),
    "msg": Run({"epochs": 2.0, "lr": 3e-2, "share": 0.3}, TUNED),
    "ct": Run({"epochs": 2.0, "lr": 3e-2}, TUNED),
    "short_retrain": Run({"epochs": 2.0, "scale": 1.0}, (*TUNED, "schedule")),
    "rewind": Run({"scale": 1.0}, (*TUNED, "schedule")),
    "ssd": Run({"alpha": 5.0, "strength": 1.0}),
    "newton": Run({"damping": 1e-2, "iterations": 5, "cost": 0.25}, ("seeds",)),
    "oracle_matching": Run({"cost": 0.1}, ("matching",)),
    "dm_direct": Run({}, ("predicted oracle", "attributor bayesian")),
    "dmm": Run({"cost": 0.1}, ("matching", "method dm_direct")),
    "oracle_matching_adam": Run({"lr": 1e-3, "n_oracles": 3}, (*TUNED, "optimizer adam")),
    "dmm_adam": Run({"lr": 1e-3, "ratio": "5:20"}, (*TUNED, "optimizer adam", "method dm_direct")),
}


def _method(name: str, setting: dict[str, Any], inputs: Inputs) -> Values:
    asked = inputs.problem
    if "attributor bayesian" in above(f"method {name}"):
        asked = unlearn.Problem(**{**vars(asked), "attributor": inputs.bayesian})
    if name == "rewind":
        asked = unlearn.Problem(**{**vars(asked), "earlier": (0.75, inputs.originals)})
    if name == "ct":
        convnets = fresh(architecture("convnet", inputs.images.shape[1:], width=4), 4)
        asked = problem(convnets, inputs.images, inputs.y, FORGET, n_train=N)
    result = unlearn.get(name)(asked, **setting)
    yield "mean margin on F", result.margins[:, FORGET].mean()
    yield "standard deviation of margins on R", result.margins[:, RETAIN].std()
    if name not in ("do_nothing", "ct"):
        yield from _change(inputs, result)
    yield "cost", result.cost


for _name in unlearn.names():  # of one that is new, as it is by default
    METHODS.setdefault(_name, Run({}, TUNED))
for _name, _run in METHODS.items():
    component(f"method {_name}", "engine", "metric margin", *_run.needs)(partial(_method, _name, _run.setting))


# studies


@component(
    "search",
    "seeds",
    "metric klom",
    "ridge",
    "forget sets",
    "loadings gradients",
    "method gd",
    "method dm_direct",
    "method dmm",
)
def _(inputs: Inputs) -> Values:
    for words in ("gd", "dmm", "ridge"):
        tried = search(inputs.study, words)
        yield f"{words}: settings tried", len(tried)
        yield f"{words}: score of the best setting", tried["mean_score"].iloc[0]
        yield f"{words}: score of the worst setting", tried["mean_score"].iloc[-1]


@component("results", "search", "metric u_lira", "metric accuracy_gap", "method do_nothing", "method retrain")
def _(inputs: Inputs) -> Values:
    table = results(inputs.study).set_index(["forget_set", "method", "split", "statistic"])
    values, highs = table["value"].to_dict(), table["high"].to_dict()
    yield "rows of the table", len(table)
    for forget_set in ("random", "pc"):
        for method in PRESET["unlearning"]["methods"]:
            head, at = f"{forget_set}, {method}:", (forget_set, method)
            yield f"{head} mean KLoM on F", values[*at, "forget", "klom_mean"]
            yield f"{head} mean KLoM on R", values[*at, "retain", "klom_mean"]
            yield f"{head} mean KLoM on R, upper end of its interval", highs[*at, "retain", "klom_mean"]
            yield f"{head} mean U-LiRA on V", values[*at, "validation", "u_lira"]
            yield f"{head} accuracy gap on V", values[*at, "validation", "accuracy_gap"]
    way = trajectories(inputs.study)
    yield "trajectories on F: mean cost", way["cost"].mean()
    yield "trajectories on F: mean 95th percentile of KLoM", way["p95"].mean()
    yield "trajectories on F: mean share that is not forgotten enough", way["under"].mean()


# --- the table -----------------------------------------------------------------------------------------

RTOL, ATOL = 2e-3, 1e-6
NARROW, WIDE = 1e-9, 2e-2
TOLERANCES = {  # relative, by the first word of a component's name, where it is another
    "data": NARROW,
    "seeds": NARROW,
    "batches": NARROW,
    "schedule": NARROW,
    "optimizer": 1e-5,
    "forget": NARROW,
    "metric": 1e-5,
    "search": WIDE,  # histograms jump
    "results": WIDE,
}


class Row(NamedTuple):
    component: str
    quantity: str
    value: float


class Recorded(NamedTuple):
    version: int
    value: float


class Difference(NamedTuple):
    """A row that is not as recorded."""

    row: Row
    recorded: Recorded | None

    def __str__(self) -> str:
        before = "not in the table" if self.recorded is None else f"{self.recorded.value:.10g} in the table"
        return f"{self.row.component}: {self.row.quantity} is {self.row.value:.10g}, {before}"


Table = dict[tuple[str, str], Recorded]


def rows() -> Iterator[Row]:
    """All numbers, in the order of dependence, each computed when it is asked for."""
    with TemporaryDirectory() as folder, one_thread():
        inputs = Inputs(Path(folder))
        for name, found in COMPONENTS.items():
            for quantity, value in found.measure(inputs):
                yield Row(name, quantity, float(value))


def read(path: Path = TABLE) -> Table:
    """What is recorded."""
    with open(path, encoding="utf-8", newline="") as file:
        return {
            (row["component"], row["quantity"]): Recorded(int(row["version"]), float(row["value"]))
            for row in csv.DictReader(file)
        }


def agrees(row: Row, recorded: Recorded) -> bool:
    """Whether a value is the recorded one, but for rounding."""
    rtol = TOLERANCES.get(row.component.split()[0], RTOL)
    return abs(row.value - recorded.value) <= ATOL + rtol * abs(recorded.value)


def differences(found: Iterable[Row], table: Table) -> Iterator[Difference]:
    """Rows that are not as recorded, the first of which names the component that was changed."""
    for row in found:
        recorded = table.get(row[:2])
        if recorded is None or not agrees(row, recorded):
            yield Difference(row, recorded)


def update(path: Path = TABLE) -> str:
    """Record today's numbers, and say what was done.

    Where one moved, the version of its component must have been raised, or that of a component that it comes from. One
    that did not move stays as it is recorded, so that many small moves cannot add up.

    Raises:
        SystemExit: where no version was raised; the table is then left as it is.
    """
    table = read(path) if path.exists() else {}
    before = {name: recorded.version for (name, _), recorded in table.items()}
    lines, n_moved = dict[tuple[str, str], list[str]](), 0
    for row in rows():
        recorded, now = table.get(row[:2]), version(row.component)
        moved = recorded is not None and not agrees(row, recorded)
        if moved and not any(version(name) > before.get(name, version(name)) for name in above(row.component)):
            raise SystemExit(
                f"{Difference(row, recorded)}. The version of {row.component!r} is {now}, as recorded: raise it, or "
                "undo what moved the number. Nothing was recorded."
            )
        value = row.value if recorded is None or moved or recorded.version != now else recorded.value
        lines[row[:2]] = [row.component, str(now), row.quantity, f"{value:.10g}"]
        n_moved += moved
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *lines.values()])
    n_new, n_gone = len(lines.keys() - table.keys()), len(table.keys() - lines.keys())
    return f"{len(lines)} numbers recorded: {n_moved} moved, {n_new} new, {n_gone} gone."


def main(arguments: list[str] | None = None) -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="The golden table.")
    parser.add_argument("--update", action="store_true", help="record today's numbers")
    parser.add_argument("--table", type=Path, default=TABLE, help="another table than tests/golden.csv")
    options = parser.parse_args(arguments)
    if options.update:
        print(update(options.table))
        return
    found = [str(difference) for difference in differences(rows(), read(options.table))]
    raise SystemExit("\n".join(found) or None)


if __name__ == "__main__":
    main()
