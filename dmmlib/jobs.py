"""Which models a preset asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dmmlib.presets import Preset

REWOUND = 0.75  # share of the originals' training at which their weights are kept, for methods that rewind to it


@dataclass(frozen=True)
class Job:
    """Models of one kind."""

    what: str  # which models, in words
    size: int  # how many points each is trained on
    sets: Mapping[str, int]  # name of each model set -> how many models it has; an oracle set's goes on with a hash
    weights: bool = True  # whether weights are kept, too
    until: float = 1.0  # the share of their training after which they are kept

    @property
    def n_models(self) -> int:
        return sum(self.sets.values())


def jobs(preset: Preset, n_train: int, n_classes: int) -> Iterator[Job]:
    """All models that a preset's main story trains, on data of that size."""
    from dmmlib import unlearn  # and with it torch, which a list of sizes does without

    n, d, t, a = preset.ensembles.n_models, preset.datamodels, preset.tuning, preset.attribution
    yield Job("originals", n_train, {"originals": n})
    if any(unlearn.get(method).rewinds for method in preset.unlearning.methods):
        yield Job("originals, to rewind to", n_train, {"originals": n}, until=REWOUND)
    yield Job("subset models", round(d.fraction * n_train), {"subsets": d.n_subsets + d.n_held_out}, False)
    yield Job("attribution models", round(a.fraction * n_train), {"attribution": a.n_subsets})
    for parts, n_floor, kind in ((preset.forget_sets, n, ""), (t.forget_sets, t.n_models, "tuning: ")):
        for f in parts:
            size = n_train - (f.size or round(f.share * n_train / n_classes))
            sets = {f"oracles:{f.name}": n, f"floor:{f.name}": n_floor}
            yield Job(f"{kind}oracles and floor, {f.name}", size, sets, False)
