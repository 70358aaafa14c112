"""Where the keys of stores are made: names, settings, the data's hash, and versions of all that moves a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dmmlib import attribution, fingerprint, unlearn
from dmmlib.data import Dataset
from dmmlib.forget_sets import ForgetSet
from dmmlib.presets import Preset
from dmmlib.registry import versions

TRAINING = ("seeds", "batches", "schedule", "optimizer sgd", "engine")
UNLEARNING = "optimizer adam", "finetune", "whitening", "gauss-newton", "matching", "predicted oracle", "metric margin"
ATTRIBUTION = ("attribution gradients", "calibration", "attributor linearised", "predicted oracle", "metric margin")


def trained(preset: Preset, data: Dataset) -> dict[str, Any]:
    """What every trained model depends on besides its mask and seed."""
    return {
        "versions": versions(*TRAINING, f"model {preset.model.name}"),
        "data": data.sha256,
        **({} if data.n_classes == data.y_train.max() + 1 else {"classes": data.n_classes}),
        "normalised by": [list(data.mean), list(data.std)],
        "model": preset.model.model_dump(),
        "training": preset.training.model_dump(),
    }


def ridge(preset: Preset) -> dict[str, Any]:
    """What a ridge datamodel depends on besides its subset models."""
    return preset.datamodels.model_dump(exclude={"sizes"}) | versions("ridge", "metric margin")


def attributed(preset: Preset, method: str, tuning_sets: Callable[[], Mapping[str, ForgetSet]]) -> dict[str, Any]:
    """What a method's result depends on through its attributor; nothing for a method that takes none.

    Only ridge depends on the tuning sets, so they are made for it alone.
    """
    if not unlearn.get(method).attributed:
        return {}
    name = method.partition("@")[2] or preset.attribution.name
    if name == "ridge":
        tuned = {"tuning sets": _indices(tuning_sets()), "tuned at": preset.tuning.n_models}
        return {"datamodels": ridge(preset), **tuned, **versions("search", "metric klom")}
    return fitted(preset, name)


def fitted(preset: Preset, name: str) -> dict[str, Any]:
    """What an attributor, other than ridge, depends on besides the models."""
    section = preset.attribution.model_dump(mode="json") | {"name": name}
    if name != preset.attribution.name:
        section["options"] = {}
    own = fingerprint.of_own(attribution.get(name))
    return {"attribution": section, "versions of attributor": versions(*ATTRIBUTION, f"attributor {name}") | own}


def method(name: str) -> dict[str, Any]:
    """What a method's result depends on through its code."""
    own = fingerprint.of_own(unlearn.get(name).run)
    return {"method": name, "versions of method": versions(*UNLEARNING, f"method {name.partition('@')[0]}") | own}


def apart(data: Dataset) -> dict[str, Any]:
    """Positions of validation points that do not count as such, where data have any: what a score depends on."""
    return {"probes": sorted({int(i) for positions in data.probes.values() for i in positions})} if data.probes else {}


def searched(
    preset: Preset,
    models: Mapping[str, Any],
    settings: list[dict[str, Any]],
    tuning_sets: Mapping[str, ForgetSet],
    n_oracles: int,
) -> dict[str, Any]:
    """What a search depends on besides the method and its attributor; `models` is what its models depend on."""
    return {
        **models,
        "settings": settings,
        "tuning": preset.tuning.model_dump(),
        "oracles": n_oracles,
        "sets": _indices(tuning_sets),
        "search": versions("search", "metric klom"),
    }


def unlearned(
    preset: Preset, models: Mapping[str, Any], name: str, setting: dict[str, Any], forget_set: ForgetSet
) -> dict[str, Any]:
    """What the result of a method with a setting on a forget set depends on besides its attributor."""
    return {
        **models,
        **method(name),
        "setting": setting,
        "forget": forget_set.indices.tolist(),
        "name": forget_set.name,
        "n_models": preset.ensembles.n_models,
        "checkpoints of the forget set": preset.unlearning.checkpoints,
    }


def _indices(sets: Mapping[str, ForgetSet]) -> dict[str, list[int]]:
    return {name: f.indices.tolist() for name, f in sets.items()}
