"""Originals, oracles and subset models of a preset, and what is fitted to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np
from scipy.special import expit

from dmmlib import attribution, datamodels, metrics
from dmmlib.ensemble import Ensemble
from dmmlib.files import short
from dmmlib.forget_sets import ForgetSet, checked
from dmmlib.jobs import REWOUND
from dmmlib.store import Outputs
from dmmlib.trainer import ModelSet, Trainer, once

N_LOADINGS = 5  # originals whose gradients forget sets are chosen by
N_GAUGE = 20  # originals that a ridge datamodel's change of logits is turned into one of margins at


class Models(Trainer):
    """The models of a preset; each is trained when it is first asked for."""

    # --- originals and oracles -------------------------------------------------------------------------

    @cached_property
    def _original_set(self) -> ModelSet:
        masks = np.ones((self.preset.ensembles.n_models, self.data.n_train), bool)
        return ModelSet("originals", masks, keep_models=True)

    @once
    def originals(self) -> Ensemble:
        """N models trained on S."""
        return self.models(self._original_set)

    @once
    def earlier(self) -> tuple[float, Ensemble]:
        """A share of the originals' training, and the same models as they were then: trained once more, until there."""
        return REWOUND, self.models(dataclasses.replace(self._original_set, until=REWOUND))

    @once
    def original_logits(self) -> np.ndarray:
        """Their logits (N, n_points, n_classes), training points first."""
        return self.read(self._original_set, "logits")

    def oracle_set(self, forget_set: ForgetSet, floor: bool = False, n: int | None = None) -> ModelSet:
        """The models that are trained without a forget set; for its other arguments see `oracles`."""
        content = short(checked(forget_set, self.data).indices.tobytes())[:8]
        name = f"{'floor' if floor else 'oracles'}:{forget_set.name}:{content}"
        return ModelSet(name, np.tile(forget_set.mask(self.data.n_train), (n or self.preset.ensembles.n_models, 1)))

    def oracles(self, forget_set: ForgetSet, floor: bool = False, n: int | None = None) -> np.ndarray:
        """Logits (n, n_points, n_classes) of models trained on R.

        Args:
            forget_set: what is left out.
            floor: the second, independent set (the retrain floor, and oracle matching's targets).
            n: how many, N by default.
        """
        return self.read(self.oracle_set(forget_set, floor, n), "logits")

    def untrained_oracles(self, forget_set: ForgetSet) -> int:
        """How many of a forget set's oracles, those of the floor included, are not trained."""
        return sum(self.left(self.oracle_set(forget_set, floor)) for floor in (False, True))

    def has_oracles(self, forget_set: ForgetSet) -> bool:
        """Whether the oracles that a forget set's results are measured against are all trained."""
        return self.left(self.oracle_set(forget_set)) == 0

    def reference(self, forget_set: ForgetSet) -> tuple[np.ndarray, np.ndarray]:
        """Margins and correctness (N, n_points) of the oracles that every method is measured against."""
        logits = self.oracles(forget_set)
        return metrics.margins(logits, self.data.y), metrics.correct(logits, self.data.y)

    def splits(self, forget_set: ForgetSet, probes: bool = True) -> dict[str, np.ndarray]:
        """Positions of forget, retain and validation points; then, by name, if asked, of the data's probes."""
        splits = checked(forget_set, self.data).splits(self.data.n_train, self.data.n_val)
        apart = {name: self.data.n_train + positions for name, positions in self.data.probes.items()}
        splits["validation"] = np.setdiff1d(splits["validation"], np.concatenate([[-1], *apart.values()]))
        return splits | (apart if probes else {})

    # --- ridge datamodels ------------------------------------------------------------------------------

    @cached_property
    def _subset_set(self) -> ModelSet:
        section = self.preset.datamodels
        return ModelSet("subsets", self.random_masks("masks", section.n_subsets + section.n_held_out, section.fraction))

    def subsets(self, raw: bool = False) -> tuple[np.ndarray, Outputs]:
        """Masks (M, n_train) and outputs (M, n_points, n_classes) of the subset models of `datamodels`.

        Outputs are logits in the margin gauge, or as they came if `raw`; they are read as they are needed.
        """
        m = self.preset.datamodels.n_subsets
        return self._subset_set.masks[:m], self.outputs(self._subset_set, 0, m, raw)

    @once
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks and outputs of the further subset models: the first half chooses lambda, the second reports."""
        m = self.preset.datamodels.n_subsets
        return self._subset_set.masks[m:], self.outputs(self._subset_set, m)[:]

    def datamodel_of(self, n_subsets: int) -> tuple[datamodels.RidgeDatamodel, dict[float, float]]:
        """A ridge datamodel on the first `n_subsets` subset models, and the LDS of each lambda tried."""
        masks, outputs = self.subsets()
        few, half = (masks[:n_subsets], outputs.first(n_subsets)), self.preset.datamodels.n_held_out // 2
        held_out, truth = (a[:half] for a in self.held_out())
        lambdas = self.preset.datamodels.lambdas
        lam, scores = datamodels.choose_lambda(*few, held_out, truth, self.data.y, lambdas, self.device)
        return datamodels.RidgeDatamodel.fit(*few, lam, self.device), scores

    def ridge(
        self, settings: Sequence[tuple[float, float]], forget_sets: Sequence[datamodels.Indices] = ()
    ) -> Callable[[float, float], datamodels.Gauged]:
        """The paper's kind of datamodel, of raw logits and added to them, for any of some settings (lam, own_share).

        As many of these as fit into memory are fitted in one pass over the outputs; in another they predict
        `forget_sets`.
        """
        groups = datamodels.together(settings, self.preset.datamodels.n_subsets, self.data.n_train)

        @lru_cache(1)
        def fitted(group: tuple[tuple[float, float], ...]) -> list[datamodels.Gauged]:
            models = datamodels.RidgeDatamodel.fit_all(*self.subsets(raw=True), group, self.device)
            known, logits = [dict[tuple[int, ...], np.ndarray]() for _ in models], self.original_logits()[:N_GAUGE]
            if forget_sets:
                effects = datamodels.effects_of(models, forget_sets)
                known = [dict(zip(map(tuple, forget_sets), found, strict=True)) for found in effects]
            return [datamodels.Gauged(m, logits, self.data.y, k) for m, k in zip(models, known, strict=True)]

        def one(lam: float, own_share: float) -> datamodels.Gauged:
            group = next(group for group in groups if (lam, own_share) in group)
            return fitted(tuple(group))[group.index((lam, own_share))]

        return one

    def lds(self, model: datamodels.Attributor) -> np.ndarray:
        """Predicted and actual margins (2, n_held_out / 2, n_points) on subsets that chose nothing."""
        masks, outputs = (a[self.preset.datamodels.n_held_out // 2 :] for a in self.held_out())
        return np.stack([metrics.right_logits(z, self.data.y) for z in (model.predict(masks), outputs)])

    # --- attribution -----------------------------------------------------------------------------------

    @once
    def context(self) -> attribution.Context:
        """What attributors are fitted to: the subset models of the preset's attribution, and the originals."""
        section = self.preset.attribution
        masks = self.random_masks("attribution masks", section.n_subsets, section.fraction)
        return self.context_of(ModelSet("attribution", masks, keep_models=True))

    def context_of(self, model_set: ModelSet, start: int = 0, stop: int | None = None) -> attribution.Context:
        """The same of other subset models: some rows of a set that keeps its models."""
        return attribution.Context(
            self.x,
            self.y,
            model_set.masks[start:stop],
            self.outputs(model_set, start, stop)[:],
            self.models(model_set, start, stop),
            self.originals(),
            self.original_logits(),
            self.preset.seed,
        )

    @once
    def loadings(self) -> np.ndarray:
        """Loadings (n_train, k) on the principal components of training points' gradients, at a few originals.

        Weighted by how often held-out subset models that have not seen a point answer it wrongly. No attributor is
        fitted to these, so that sets which are chosen by loadings favour none.
        """
        every = (*self.preset.forget_sets, *self.preset.tuning.forget_sets)
        wanted = max((p.component for p in every if p.kind in ("pc", "pc_both")), default=2)
        n, few = self.data.n_train, self.originals()[:N_LOADINGS]
        masks, outputs = self.held_out()
        wrong = expit(-metrics.right_logits(outputs[:, :n], self.data.y[:n]))
        hardness = (wrong * ~masks).sum(0) / np.maximum((~masks).sum(0), 1)
        return attribution.LOADINGS["gradients"](few, self.x[:n], self.y[:n], hardness, max(wanted, 2))

    def n_subsets_of(self, name: str) -> int:
        """How many subset models an attributor is fitted to."""
        return (self.preset.datamodels if name == "ridge" else self.preset.attribution).n_subsets
