"""Prepare for requests, once: train the subset models of a recipe, and fit the attributor to them."""

from __future__ import annotations

import time
from collections.abc import Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmmlib import attribution, ensemble, execution, fingerprint, keys, loops, metrics, stacking
from dmmlib.attributors.kernel import measured_rise
from dmmlib.attributors.linearised import LOGITS, RANK
from dmmlib.datamodels import Attributor, Indices
from dmmlib.ensemble import Training
from dmmlib.errors import DataError, ModelError
from dmmlib.files import config_hash, kept, read_json, write_json
from dmmlib.jobs import Job
from dmmlib.own.recipe import Recipe
from dmmlib.own.requests import resolve
from dmmlib.own.weights import with_weights
from dmmlib.prediction import Models
from dmmlib.progress import Progress, duration
from dmmlib.registry import versions
from dmmlib.store import Store
from dmmlib.trainer import ModelSet, once

LEAST, MOST = 10, 100_000  # subset models
LINEARISED = 20  # models whose weights the attributor takes; of the others outputs are enough
TRIAL, FIT = 128, 512  # points that a loop, and points that the attributor's fit, is tried on
FLAT = 1e-3  # of the largest gradient of a parameter: what rounding leaves where there is none, as before batch norm
SEEN = 3.0  # standard errors by which answers to points that were trained on must differ from those to others


class Prepared(Models):
    """A recipe's subset models, and the attributor that is fitted to them; made by `prepare`.

    Args:
        recipe: how models are made.
        models: how many subset models, at least 10.
        folder: where all is kept.
        progress: hook that is told of progress.
    """

    def __init__(
        self, recipe: Recipe, models: int = 100, folder: str | Path = "prepared", *, progress: Progress | None = None
    ) -> None:
        if not isinstance(models, (int, np.integer)) or not LEAST <= models <= MOST:
            raise DataError(f"models is {models!r}; give a whole number from {LEAST} to {MOST:,}, best 100.")
        self.recipe = recipe
        super().__init__(recipe.preset(int(models)), runs=folder, progress=progress)

    # --- what is trained ---------------------------------------------------------------------------------

    @cached_property
    def sets(self) -> list[ModelSet]:
        """The subset models: some whose weights are kept, and the others."""
        section = self.preset.attribution
        masks = self.random_masks("attribution masks", section.n_subsets, section.fraction)
        named = (("attribution", masks[:LINEARISED], True), ("attribution_outputs", masks[LINEARISED:], False))
        return [ModelSet(name, some, keep) for name, some, keep in named if len(some)]

    def jobs(self) -> list[Job]:
        """All models that are trained."""
        section = self.preset.attribution
        return [Job("subset models", round(section.fraction * self.data.n_train), {"attribution": section.n_subsets})]

    @property
    def training(self) -> Training:
        """How models are trained; of a loop only how many epochs it takes, which costs are relative to."""
        return super().training if self.recipe.loop is None else Training(epochs=self.trial["epochs"], weight_decay=0.0)

    @cached_property
    def trial(self) -> dict[str, Any]:
        """What two models and a fit on few points show: epochs, and seconds for each point of both; kept on disk.

        Raises ModelError where a loop fails, returns no model, or answers the same whatever it is trained on.
        """
        path = self.runs / "store" / f"tried-{config_hash(self.identity)}.json"
        return kept(path, self._try, read_json, write_json)

    def _try(self) -> dict[str, Any]:
        n, epochs, models = min(TRIAL, self.data.n_train // 2), 0.0, list[ensemble.Ensemble]()
        order = np.random.default_rng(self.preset.seed).permutation(self.data.n_train)
        for k, half in enumerate((order[:n], order[n : 2 * n])):
            self.progress("try the recipe on few points", k, 3)
            points, start = torch.from_numpy(half).to(self.device), time.perf_counter()  # the first takes longer
            models.append(self._trained(self.x[points], self.y[points], self.preset.seed))
            epochs += sum(_SEEN) / (2 * n)
        seconds, answers = time.perf_counter() - start, [trained.logits(self.x[:FIT]) for trained in models]
        if (loop := self.recipe.loop) and fingerprint.of_own(loop) != self.identity["loop"]:
            raise ModelError(
                "The train function changes what its key is made of, such as a list outside of it, so that its models "
                "would be trained anew each time; let it keep what it notes in a file, or not at all."
            )
        if not all(z.isfinite().all() for z in answers):
            raise ModelError(f"Models trained on {n} points answer NaN or infinity; lower the learning rate.")
        if torch.equal(*answers):
            raise ModelError("The train function answers the same whatever it is given; train on its x and y alone.")
        if all((z.amax(1) - z.amin(1)).max() < 1e-5 for z in answers):
            raise ModelError("Trained models answer all points alike: scale the features, or train each longer.")
        if loop and (idle := self._idle(models[1], self.x[points], self.y[points])):
            raise ModelError(
                f"The train function leaves {idle[0]} as it was made, which would be moved to forget; let the recipe's "
                "model freeze it (requires_grad_(False)), too."
            )
        few, total = min(FIT, self.data.n_train), self.preset.attribution.n_subsets
        masks = np.add.outer(np.arange(total), np.arange(few)) % 4 > 0
        outputs = np.random.default_rng(0).normal(size=(total, few, self.data.n_classes)).astype(np.float32)
        self.progress("try the recipe on few points", 2, 3)
        context, start = attribution.Context(self.x[:few], self.y[:few], masks, outputs, models[0]), time.perf_counter()
        try:
            attribution.fit("bayesian", context, n_models=1)
        except np.linalg.LinAlgError as error:  # gradients that are all but infinite
            raise ModelError(f"What a model learnt cannot be attributed ({error}); scale the features.") from error
        fit = (time.perf_counter() - start) / few
        self.progress("try the recipe on few points", 3, 3)
        return {"epochs": max(1, round(epochs)), "seconds": seconds / n, "fit": fit}

    def _idle(self, trained: ensemble.Ensemble, x: Tensor, y: Tensor) -> list[str]:
        """Parameters that a loop leaves as they were made, though the loss depends on them."""
        with stacking.drawing(self.preset.seed, self.device):
            made, model = self.module().to(self.device), with_weights(self.module().to(self.device), trained)
            nn.functional.cross_entropy(model.train()(x.clone()), y).backward()
        slopes = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
        steep = [name for name, slope in slopes.items() if slope > FLAT * max(slopes.values())]
        return [name for name in steep if torch.equal(model.get_parameter(name), made.get_parameter(name))]

    def fresh(self, seed: int = 0, without: Any = ()) -> nn.Module:
        """Train a model as the recipe says, on all training points but some: an original, or one to compare with.

        These are named as in a request; ForgetSetError if they are not, or are all that there are, DataError for a seed
        that is none.
        """
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
            raise DataError(f"seed is {seed!r}; give a whole number from 0.")
        one = isinstance(without, str) or not isinstance(without, Sized) or getattr(without, "ndim", None) == 0
        gone = resolve(without, self.data)[0] if one or len(without) else np.empty(0, int)
        points = torch.from_numpy(np.setdiff1d(np.arange(self.data.n_train), gone)).to(self.device)
        return with_weights(self.module().to(self.device), self._trained(self.x[points], self.y[points], seed))

    def _trained(self, x: Tensor, y: Tensor, seed: int) -> ensemble.Ensemble:
        """A model trained on points; how many it sees at a time is noted in `_SEEN`, over all epochs."""
        _SEEN.clear()
        if (loop := self.recipe.loop) is None:
            _SEEN.append(self.training.epochs * len(x))
            return ensemble.train(self.module, x, y, np.ones((1, len(x)), bool), [seed], self.training)

        def make() -> nn.Module:
            model = self.module()
            model.register_forward_pre_hook(_count, with_kwargs=True)
            return model

        model = loops.trained(loop, make, x, y, seed)
        return ensemble.initialise(lambda: model, [0], self.device)

    def train(self, *model_sets: ModelSet, start: int = 0, stop: int | None = None) -> list[Store]:
        """As `Trainer.train`."""
        self.recipe.preset(self.preset.attribution.n_subsets)  # workers get what has this name last
        return super().train(*model_sets, start=start, stop=stop)

    def missing(self) -> int:
        """How many models are yet to be trained; makes no store."""
        return sum(map(self.left, self.sets))

    def price(self) -> str:
        """Say in a line what is to be trained, how long that takes at a rate measured on few points, and its disk."""
        n, size, workers = self.missing(), self.jobs()[0].size, execution.one_per_core(self.device).workers
        weights = sum(v.numel() for v in self.module().state_dict().values())
        numbers = self.preset.attribution.n_subsets * len(self.x) * self.data.n_classes + LINEARISED * weights
        numbers += LINEARISED * len(self.x) * LOGITS * RANK + 2 * self.data.n_train**2  # the attributor's
        done, seconds = self.preset.attribution.n_subsets - n, self.trial["seconds"] * size * n / workers
        fit = duration(self.trial["fit"] * LINEARISED * len(self.x))
        disk = f"{4e-6 * numbers:,.0f} MB on disk in {self.runs}"
        if not n and self._fitted.exists():
            return f"all {done} models are trained and the attributor is fitted; {disk}"
        return (
            f"{n} models to train on {size:,} points each ({done} are there), about {duration(seconds)} with {workers} "
            f"process{'es' * (workers > 1)}, then about {fit} to fit the attributor; {disk}"
        )

    # --- what is fitted ----------------------------------------------------------------------------------

    @once
    def context(self) -> attribution.Context:
        """What attributors are fitted to; trains what is missing."""
        _ = self.trial  # which finds what is wrong early
        self.train(*self.sets)
        masks = np.concatenate([part.masks for part in self.sets])
        outputs = np.concatenate([self.outputs(part)[:] for part in self.sets])
        gap, error = seen_gap(metrics.right_logits(outputs, self.data.y)[:, : self.data.n_train], masks)
        if gap < SEEN * error:
            blamed = "" if self.recipe.loop is None else ", unless the train function ignores its x and y"
            raise ModelError(
                f"Margins of points that models were trained on are {gap:.3f} +- {error:.3f} (standard error) above "
                f"those of points left out, less than {SEEN:g} standard errors, no more than chance: models memorise "
                f"too little, or {len(masks)} are too few; train each longer, or prepare more{blamed}."
            )
        return attribution.Context(self.x, self.y, masks, outputs, self.models(self.sets[0]), seed=self.preset.seed)

    @property
    def _fitted(self) -> Path:
        """Where the attributor is kept."""
        config = {**self.identity, "masks": [part.digest for part in self.sets], **versions(*keys.ATTRIBUTION)}
        config |= versions("attributor bayesian")
        return self.runs / "store" / f"attributor-bayesian-{config_hash(config)}.npz"

    @once
    def attributor(self) -> Attributor:
        """The attributor, fitted once and kept on disk."""

        def fit() -> Attributor:
            self.progress("fit the attributor", 0, 1)
            made = attribution.fit("bayesian", self.context())
            self.progress("fit the attributor", 1, 1)
            return made

        found = attribution.kept(self._fitted, self.device, fit)
        context, n = self.context(), self.data.n_train
        return Checked(found, falls(context.margins[:, :n], context.masks), self.data.y[:n])


_SEEN: list[int] = []  # here, as a loop may copy its model, or write it to a file and read it


def _count(part: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Note how many points a model in training is given, however it is called."""
    given = (len(v) for v in (*args, *named.values()) if isinstance(v, Tensor) and v.ndim)
    _SEEN.append(next(given, 0) if part.training else 0)


class Checked(Attributor):
    """Predictions; but where those of F's own margins fall by less than half of what subset models show, that instead.

    It shows how much lower the margin of each point is in models that lack it than in those that have it, alone.
    """

    def __init__(self, of: Attributor, falls: np.ndarray, labels: np.ndarray) -> None:
        self._of, self._falls, self._labels = of, falls, labels

    def effects(self, forget_sets: Sequence[Indices]) -> np.ndarray:
        found = self._of.effects(forget_sets)
        for effect, forget in zip(found, forget_sets, strict=True):
            own, seen = (forget, self._labels[forget]), self._falls[forget]
            if -effect[own].mean() < seen.mean() / 2:
                effect[own] = -seen
        return found

    def predict(self, masks: np.ndarray) -> np.ndarray:
        return self._of.predict(masks)

    def sd(self, forget: Indices) -> np.ndarray | None:
        return self._of.sd(forget)

    def left_out(self) -> np.ndarray | None:
        return self._of.left_out()

    def leverage(self, forget: Indices) -> float | None:
        return self._of.leverage(forget)


def falls(margins: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """How much lower margins (M, n_train) of points are in models whose masks lack them: (n_train,), at least 0."""
    return measured_rise(margins, masks).clip(0)


def seen_gap(answers: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    """By how much margins (M, n_train) of points in a model's mask exceed those of others, and its standard error."""
    centred = answers - answers.mean(0)
    gaps = (centred * masks).sum(1) / masks.sum(1) - (centred * ~masks).sum(1) / (~masks).sum(1)
    return float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(len(gaps)))


def prepare(
    recipe: Recipe, models: int = 100, folder: str | Path = "prepared", *, progress: Progress | None = None
) -> Prepared:
    """Train a recipe's subset models and fit the attributor; what is on disk already is taken up.

    >>> from tempfile import TemporaryDirectory
    >>> x, y = torch.randn(60, 40), torch.arange(60) % 2
    >>> recipe = Recipe(lambda: nn.Linear(40, 2), (x[:50], y[:50], x[50:], y[50:]), Training(lr=0.5))
    >>> with TemporaryDirectory() as folder:
    ...     prepared = prepare(recipe, models=10, folder=folder)
    >>> prepared.attributor().effect([3, 7]).shape
    (60, 2)

    Raises:
        DataError, ModelError: for data, a module or a train function that cannot be used, before much is trained.
        StoreError: where models diverge, or outputs cannot be written; finished models are kept.
    """
    prepared = Prepared(recipe, models, folder, progress=progress)
    prepared.attributor()
    return prepared
