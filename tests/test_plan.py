"""A plan counts what a run trains, finds what is there, and writes nothing."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from dmmlib import forget_sets, presets
from dmmlib.app import batch, plan, status
from dmmlib.errors import DataError, MethodError
from dmmlib.files import write_json
from dmmlib.jobs import jobs
from dmmlib.progress import silent
from dmmlib.studies.cheap import ablation, experiments
from dmmlib.study import Study
from tests.conftest import TINY


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(plan, "measure", lambda *a, **k: plan.Rate(1000.0, 2, 8, "cpu"))


def test_the_docs_say_what_the_main_story_computes():
    preset, root = presets.load("laptop"), Path(__file__).parents[1]
    n, epochs = preset.data.n_train, preset.training.epochs
    training = sum(job.n_models * job.size * epochs * job.until for job in jobs(preset, n, 10))
    results = pd.read_csv(root / "figures" / "laptop" / "results.csv")
    results = results.query("statistic == 'cost' and method != 'retrain'")
    unlearning = preset.ensembles.n_models * (results["value"] * (n - results["size"]) * epochs).sum()
    rates = json.loads((root / "benchmarks" / "results" / "engine.json").read_text(encoding="utf-8"))["models"]["mlp"]
    whole, half = (
        (training + unlearning) / (rates[way]["models_per_second"] * n / 2 * epochs) / 60
        for way in ("dmmlib", "dmmlib, bfloat16")
    )
    said = f"{training / 1e6:.0f} million sample gradients to train and {unlearning / 1e6:.0f} million to unlearn"
    docs = " ".join((root / "docs" / "speed.md").read_text(encoding="utf-8").split())
    assert f"{said}: {whole:.1f} minutes at the rate" in docs
    assert f"({half:.1f} in bfloat16)" in docs


def test_the_docs_say_what_people_wait_for():
    root = Path(__file__).parents[1]
    took = json.loads((root / "benchmarks" / "results" / "request.json").read_text(encoding="utf-8"))
    help_, status_ = (took[name]["processor seconds, after"] for name in ("help", "status"))
    docs = " ".join((root / "docs" / "speed.md").read_text(encoding="utf-8").split())
    assert f"`dmm --help` takes {help_:.1f} s of processor time" in docs
    assert f"store takes {took['request']['wall seconds, after']:.0f} s when its oracles are there" in docs
    assert f"`dmm status` takes {status_:.0f} s, {took['status']['processor ratio']:.2f} of before" in docs
    assert f"as the widget does {took['try']['wall seconds, after']:.0f} s" in docs
    study, attributor = (took[name]["processor seconds, after"] for name in ("study", "attributor"))
    assert f"has a study after {study:.1f} s, and its attributor, read from disk, {attributor - study:.1f} s" in docs
    assert f"compiled steps: {took['study']['processor ratio']:.2f} of the time" in docs


def test_how_long_all_takes_is_told_from_records_and_of_the_laptop_preset_before(tmp_path, quick):
    stages, n = {"01", "02", "03"}, batch.ORDER

    def hours(preset):
        return plan.plan(preset, tmp_path, stages=stages).whole

    cores = torch.get_num_threads()
    laptop, pace = presets.load("laptop", {"device": "cpu"}), batch.RATE / (1000 * cores)
    assert hours(laptop) == (pytest.approx(pace * (n["02"] + (n["01"] + n["03"]) / 2) / 3600), False)
    assert hours(presets.load("laptop", {"device": "cpu", "seed": 1})) is None, "of others nothing is known"
    for name, seconds in (("01_convex_setting", 30), ("02_datamodel_estimation", 700), ("03_forget_set_selection", 50)):
        write_json(tmp_path / "laptop" / "notebooks" / f".{name}.json", {"seconds": seconds})
    found = plan.plan(laptop, tmp_path, stages=stages)
    assert found.whole == (pytest.approx(740 / 3600), True)
    assert "all in all: about 13 minutes, as when last executed here" in str(found)


CHEAP = {"sizes": [10, 40], "n_draws": 2, "n_kernel": 2, "linearised": [1]}


def test_a_plan_counts_what_a_run_trains(tmp_path, quick, monkeypatch):
    tiny = TINY | {"attribution": {"n_subsets": 20}, "studies": {"cheap": CHEAP}}
    preset = presets.load(tiny)
    before = plan.plan(preset, tmp_path)
    assert not list(tmp_path.iterdir()), "a plan leaves nothing"
    assert before.models["done"].sum() == 0
    study = Study(tiny, runs=tmp_path, progress=silent)
    trained = {}
    original = Study.train

    def counted(self, *streams, **rows):
        for stream in streams:
            trained[stream.name] = int(stream.masks.sum()) * self.training.epochs
        return original(self, *streams, **rows)

    monkeypatch.setattr(Study, "train", counted)
    study.subsets(), study.results()
    ablation.ablate(study, experiments.Cache(study))
    experiments.pool(study, 0, 40)
    assert before.models["planned"].sum() == 8 + 120 + 20 + 2 * 2 * 8 + 2 * 8 + 20
    assert before.models["gradients"].sum() == sum(trained.values()), "to the sample gradient"
    after = plan.plan(preset, tmp_path)
    assert after.models["missing"].sum() == 0
    assert after.hours == 0
    found = status.trained(study).set_index("models")
    planned = after.models.set_index("models")["planned"]
    asked = planned[planned.index.str.startswith("stage 07")].to_dict()
    assert len(asked) == 1
    assert found.loc[list(asked), "done"].to_dict() == asked
    assert found["planned"].sum() == found["done"].sum() == planned.sum()
    stores = sum(f.stat().st_size for f in tmp_path.rglob("*.zarr/**/*") if f.is_file())
    assert before.disk["outputs of models"] + before.disk["weights"] == pytest.approx(stores, rel=0.3)


def test_status_shows_what_notebook_07_trains(tmp_path, quick):
    study = Study(
        TINY | {"attribution": {"n_subsets": 20}, "studies": {"cheap": CHEAP}}, runs=tmp_path, progress=silent
    )
    before = status.trained(study).set_index("models")
    assert before.loc["stage 07: more of attribution"].to_dict() == {
        "planned": 20, "done": 0, "missing": 20, "damaged": 0
    }  # fmt: skip
    assert not list(tmp_path.iterdir()), "a status leaves nothing"
    experiments.pool(study, 0, 40)
    more = [p.parent for p in tmp_path.glob("store/*.zarr/zarr.json") if '"attribution:more"' in p.read_text()]
    chunk = more[0] / "logits" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:50])
    after = status.trained(study).set_index("models")
    assert after.loc["stage 07: more of attribution", "damaged"] == 20
    assert after.loc["attribution models", "done"] == 20
    changed = presets.load(study.preset.model_dump(), {"attribution.fraction": 0.6})
    there = plan.plan(changed, tmp_path).models.set_index("models")["done"]
    assert there["attribution models"] == there["stage 07: more of attribution"] == 0, "other masks, other models"


def test_a_plan_of_some_stages_counts_what_they_train(tmp_path, quick):
    few = TINY | {"attribution": {"n_subsets": 20}, "studies": {"cheap": CHEAP}}
    few |= {"unlearning": {"methods": ["do_nothing", "retrain", "dm_direct", "dmm"]}}
    preset, study = presets.load(few), Study(few, runs=tmp_path, progress=silent)

    def planned(*stages, preset=preset):
        models = plan.plan(preset, tmp_path, stages=stages).models.set_index("models")
        return models["planned"].to_dict(), int(models["missing"].sum())

    main = {"originals": 8, "attribution models": 20, "subset models": 20}
    reported = {f"oracles and floor, {name}": 16 for name in ("random_6", "pc1")}
    assert planned("04") == (main | reported, 48 + 32), "of subset models those from which components are"
    assert planned("03")[0] == main
    ridge = presets.load(few, {"unlearning.methods": ["dm_direct@ridge"]})
    assert planned("04", preset=ridge)[0]["subset models"] == 120
    assert planned("02")[0] == main | reported | {"subset models": 120, "tuning: oracles and floor, tune": 16}
    assert planned("07")[0] == planned("02")[0] | {"stage 07: more of attribution": 20}
    assert planned("01", "11") == ({}, 0)
    assert "0 minutes to train" in str(plan.plan(preset, tmp_path, stages=["01"]))
    study.results()
    assert planned("04") == (main | reported, 0), "and nothing else is trained"
    assert not list(tmp_path.glob("store/*tun*"))


def test_a_plan_finds_stores_elsewhere(tmp_path, quick):
    for place in ("memory://planned/runs", (tmp_path / "elsewhere").as_uri()):
        study = Study(TINY, {"store": place}, runs=tmp_path, progress=silent)
        study.original_logits()
        assert plan.plan(study.preset, tmp_path).models["done"][0] == 8


def test_stores_of_another_configuration_do_not_count(tmp_path, quick):
    study = Study(TINY, runs=tmp_path, progress=silent)
    study.original_logits()
    assert plan.plan(presets.load(TINY), tmp_path).models["done"][0] == 8
    for change in ({"training.lr": 0.2}, {"seed": 1}, {"data.seed": 1}, {"ensembles.n_models": 9}):
        assert plan.plan(presets.load(TINY, change), tmp_path).models["done"].sum() == 0, change


def test_oracles_of_another_forget_set_of_that_name_do_not_count(tmp_path, quick):
    mine, data = tmp_path / "mine.json", Study(TINY, runs=tmp_path, progress=silent).data
    for points, done in (([3, 5], 16), ([7, 9], 0)):
        forget_sets.make("mine", points, data).save(mine)
        own = Study(TINY, forget_set=mine, runs=tmp_path, progress=silent)
        if done:
            own.train_oracles()
        found = plan.plan(own.preset, tmp_path, mine).models.set_index("models")
        assert found.loc["oracles and floor, mine", "done"] == done


@pytest.mark.parametrize(
    "name", ["cifar10", "living17", "digits", "cifar10-images", "laptop", "smoke", "mllmu", "gpu", "quick", "smooth"]
)
def test_every_preset_can_be_planned(name, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(plan, "user_cache_dir", lambda _: str(tmp_path))  # as if nothing was ever downloaded
    found = plan.plan(presets.load(name), tmp_path)
    text = str(found)
    assert f"{name}: " in text
    assert "at the peak" in text
    assert "measured just now on this machine" in text
    if name == "cifar10":
        assert found.n_parameters == 2_274_880
        assert found.models["planned"].sum() == 2 * 200 + 20_200 + 100 + 10 * 400 + 2 * (200 + 50) + 400
        assert "random images stand in" in text
        block, factor = 1000 * 60_000 * 10 * 4, 4 * (50_000 * 20_000 + 2 * 20_000**2)
        assert found.memory["ridge"] == pytest.approx(1.2 * block + factor), "one block of outputs and the factor"
    if name == "living17":
        assert (found.data.n_train, found.data.n_classes) == (88_400, 17)


def test_a_rate_is_measured_with_what_fits_the_budget():
    preset = presets.load("smoke")
    module = lambda: torch.nn.Linear(12, 3)  # noqa: E731
    quick = plan.measure(module, (12,), 3, 400, preset, torch.device("cpu"), budget=1e9)
    assert quick.n_models > 1, "many share a step at less cost"
    assert quick.batch == 50
    assert plan.measure(module, (12,), 3, 20, preset, torch.device("cpu"), budget=1e9).batch == 20, "all there are"
    assert quick.per_second > 0
    slow = plan.measure(module, (12,), 3, 400, preset, torch.device("cpu"), budget=1e-9)
    assert (slow.n_models, slow.batch) == (1, 8)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        plan.plan(presets.load("smoke", {"data.path": str(tmp_path / "nowhere.npz")}), tmp_path)
    with pytest.raises(MethodError, match="Unknown method"):
        plan.plan(presets.load("smoke", {"unlearning.methods": ["dmmm"]}), tmp_path)
