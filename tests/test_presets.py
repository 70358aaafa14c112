"""Presets are validated, and mistakes named."""

import pytest
import yaml

from dmmlib import presets
from dmmlib.errors import PresetError


@pytest.mark.parametrize("name", ["smoke", "laptop", "cifar10", "cifar10-images", "digits", "living17", "mllmu"])
def test_committed_presets_are_valid_and_complete(name):
    preset = presets.load(name)
    assert preset.name == name
    assert "dmm" in preset.unlearning.methods
    assert max(preset.datamodels.sizes) == preset.datamodels.n_subsets


def test_laptop_is_the_protocol():
    p = presets.load("laptop")
    assert (p.data.n_train, p.data.n_val, p.datamodels.n_subsets, p.ensembles.n_models) == (2000, 500, 4000, 100)
    assert len(p.forget_sets) == 10


def test_cifar10_is_the_papers_setting():
    p = presets.load("cifar10")
    assert (p.data.n_train, p.model.name, p.datamodels.n_subsets, p.ensembles.n_models) == (
        50_000,
        "resnet9",
        20_000,
        200,
    )
    assert [f.size for f in p.forget_sets] == [10, 100, 500, 10, 100, 500, 10, 100, 500, 100]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"datamodels.n_subset": 5}, r"unknown key 'datamodels.n_subset' \(did you mean 'n_subsets'\?\)"),
        ({"ensembles.n_models": "many"}, "key 'ensembles.n_models': input should be a valid integer.*given 'many'"),
        ({"ensembles.n_models": 1}, "greater than or equal to 4, given 1"),
        ({"training.momentum": 1.5}, "less than 1, given 1.5"),
        ({"device": "tpu"}, "'auto', 'cpu' or 'cuda', given 'tpu'"),
        ({"seed": -1}, "greater than or equal to 0, given -1"),
        ({"data.seed": -1}, "key 'data.seed'"),
        ({"training.lr": float("nan")}, "finite number"),
        ({"training.weight_decay": float("inf")}, "finite number"),
        ({"training.weight_decay": -1}, "greater than or equal to 0"),
        ({"datamodels.lambdas": []}, "at least 1 item"),
        ({"datamodels.sizes": [0]}, "key 'datamodels.sizes.0'"),
        ({"unlearning.methods": []}, "at least 1 item"),
        ({"forget_sets": []}, "at least 1 item"),
        (
            {"forget_sets": [{"name": "../up", "kind": "random", "size": 2}]},
            "key 'forget_sets.0.name': '../up' is no name",
        ),
        ({"studies": [1]}, "key 'studies'"),
        ({"studies": {"nothing": {}}}, "key 'studies'.*nothing"),
        ({"nothing.here": 1}, "unknown key 'nothing'"),
        ({"name.first": 1}, "'name' holds no keys"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(PresetError, match=message) as error:
        presets.load("smoke", overrides)
    assert "\n" not in str(error.value)


def test_overrides_are_part_of_the_name_but_the_device_is_not():
    assert presets.load("smoke", {"datamodels.n_subsets": 300}).name == "smoke+datamodels.n_subsets-300"
    names = [
        presets.load("smoke", changed).name
        for changed in (
            {"seed": 1}, {"data.seed": 1}, {"model.options": {"hidden": 8}}, {"model.options": {"hidden": 9}},
            {"training.lr": 0.1, "training.momentum": 0.5, "training.warmup": 0.1, "training.weight_decay": 0.1},
            {"training.lr": 0.1, "training.momentum": 0.5, "training.warmup": 0.1, "training.weight_decay": 0.2},
        )
    ]  # fmt: skip
    assert len(set(names)) == len(names), "no run takes another's place"
    assert max(map(len, names)) <= 80
    assert presets.load("smoke", {"device": "cpu"}).name == "smoke"


def test_unknown_and_broken_files(tmp_path):
    with pytest.raises(PresetError, match=r"Unknown preset 'labtop'.*Did you mean 'laptop'\?"):
        presets.load("labtop")
    with pytest.raises(PresetError, match="Unknown preset"):
        presets.load(str(tmp_path / "none.yaml"))
    (tmp_path / "a.yaml").write_text("preset: [1, 2")
    with pytest.raises(PresetError, match="cannot be read as YAML"):
        presets.load(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("name: x")
    with pytest.raises(PresetError, match="lacks the top-level key 'preset'"):
        presets.load(str(tmp_path / "a.yaml"))


def test_a_users_own_file_and_mapping(tmp_path):
    content = yaml.safe_load((presets.PRESETS_DIR / "smoke.yaml").read_text())
    content["preset"]["name"] = "mine"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert presets.load(str(tmp_path / "mine.yaml")) == presets.load(content["preset"])
    dumped = presets.load("smoke").model_dump(mode="json")
    assert presets.load(dumped) == presets.load("smoke"), "what the command line hands to papermill is the same preset"


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "a b", ""])
def test_a_presets_name_is_a_folders(name):
    content = presets.load("smoke").model_dump(mode="json") | {"name": name}
    with pytest.raises(PresetError, match="key 'name'"):
        presets.load(content)


def test_files_are_the_same_from_another_folder(tmp_path, monkeypatch):
    """A notebook's kernel works in another folder than the command."""
    monkeypatch.chdir(tmp_path)
    data = presets.load("smoke", {"data.name": "own.npz", "data.path": "images"}).data
    assert data.name == str(tmp_path / "own.npz")
    assert data.path == str(tmp_path / "images")
    assert presets.load("smoke").data.name == "fashion-mnist"
