"""How good predicted changes of margins are: KLoM of DM-direct, which needs no fine-tuning, and LDS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dmmlib import metrics
from dmmlib.datamodels import Attributor, lds_estimate
from dmmlib.forget_sets import ForgetSet
from dmmlib.study import Study

Rows = list[dict[str, Any]]
Effects = Callable[[Sequence[np.ndarray]], np.ndarray]
"""From the indices of each forget set to the predicted change of margins (n_points,) for each."""


@dataclass(frozen=True)
class Evaluator:
    """Compares answers to forget sets with oracles."""

    study: Study
    sets: Mapping[str, ForgetSet]  # by name
    before: np.ndarray  # margins of the originals (n, n_points)
    oracles: Mapping[str, np.ndarray]  # name -> margins (n, n_points) of models retrained without that forget set

    @classmethod
    def of(cls, study: Study, sets: Mapping[str, ForgetSet], n: int) -> Evaluator:
        """Make an evaluator with n originals, and n oracles for each forget set; trains those that are missing."""
        y = study.data.y
        oracles = {name: metrics.margins(study.oracles(f)[:n], y) for name, f in sets.items()}
        return cls(study, sets, metrics.margins(study.original_logits()[:n], y), oracles)

    @classmethod
    def reported(cls, study: Study) -> Evaluator:
        """Make one on the reported forget sets, with all models."""
        return cls.of(study, study.forget_sets(), study.preset.ensembles.n_models)

    @classmethod
    def tuning(cls, study: Study) -> Evaluator:
        """Make one on the tuning sets, with as many models as tuning takes."""
        return cls.of(study, study.tuning_sets(), study.preset.tuning.n_models)

    def rows(self, answers: Callable[[str], np.ndarray]) -> Rows:
        """Compute p95 KLoM on each split of each forget set, of the margins (n, n_points) that answer its name."""
        found = []
        for name, f in self.sets.items():
            klom = metrics.klom(answers(name), self.oracles[name])
            for split, at in self.study.splits(f, probes=False).items():
                value = float(np.percentile(klom[at], 95))
                found.append({"forget_set": name, "split": split, "statistic": "klom_p95", "value": value})
        return found

    def klom(self, effects: Effects) -> Rows:
        """Compute `rows` of DM-direct: every original moves by the predicted change of margins."""
        changes = dict(zip(self.sets, effects([f.indices for f in self.sets.values()]), strict=True))
        return self.rows(lambda name: self.before + changes[name])

    def lds(self, model: Attributor) -> dict[str, Any]:
        """Compute the LDS of predicted margins on held-out subsets that chose nothing, as a row like those of KLoM."""
        masks, actual = held_out_margins(self.study)
        e = lds_estimate(label_logits(self.study, model.predict(masks)), actual)
        return {"forget_set": "every", "split": "all", "statistic": "lds"} | asdict(e)

    def gauged(self, model: Attributor) -> Effects:
        """Predict changes by a datamodel of logits in the margin gauge, or by one of margins alone."""
        return lambda sets: label_logits(self.study, model.effects(sets))

    def judged(self, model: Attributor, ranker: Attributor | None = None) -> Rows:
        """Compute `klom` of a model that `gauged` takes, and its `lds`, or that of another."""
        return [*self.klom(self.gauged(model)), self.lds(ranker or model)]


def label_logits(study: Study, logits: np.ndarray) -> np.ndarray:
    """Return the margins (..., n_points) in margin-gauge logits (..., n_points, n_classes); of one class, these."""
    return logits[..., 0] if logits.shape[-1] == 1 else metrics.right_logits(logits, study.data.y)


def held_out_margins(study: Study, chosen: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return masks and margins of held-out subset models: those that may choose something, or those that report."""
    half = study.preset.datamodels.n_held_out // 2
    rows = slice(None, half) if chosen else slice(half, None)
    masks, outputs = study.held_out()
    return masks[rows], label_logits(study, outputs[rows])
