"""Presets are validated, and mistakes named."""

import copy
import json
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dmmlib import presets
from dmmlib.app import plan
from dmmlib.errors import DmmError, PresetError
from dmmlib.studies.cheap import experiments as _registers_the_studies  # noqa: F401
from tests.conftest import TINY


@pytest.mark.parametrize(
    "name", ["smoke", "laptop", "cifar10", "cifar10-images", "digits", "living17", "mllmu", "gpu", "quick", "smooth"]
)
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
        ({"datamodels.sizes": [100, 401]}, "sizes asks for 401 of 400 subset models; set both"),
        ({"datamodels.n_subsets": 300}, "sizes asks for 400 of 300 subset models"),
        ({"unlearning.methods": []}, "at least 1 item"),
        ({"forget_sets": []}, r"'forget_sets': input should have at least 1 item, given \[\]"),
        ({"training": 3}, "'training': input should be a mapping of keys to values, given 3"),
        (
            {"forget_sets": [{"name": "../up", "kind": "random", "size": 2}]},
            "key 'forget_sets.0.name': '../up' is no name",
        ),
        ({"studies": [1]}, "key 'studies'"),
        ({"studies": {"nothing": {}}}, "key 'studies'.*nothing"),
        ({"studies": None}, "key 'studies'.*None"),
        ({"studies.exact.n_permutations": 0}, "studies.exact.n_permutations.*greater than 0"),
        ({"studies.meta.fraction": 7}, "studies.meta.fraction.*less than 1"),
        ({"studies.convex.log2_steps": 99}, "less than or equal to 24"),
        ({"studies.exact.side": 1000}, "less than or equal to 64"),
        ({"studies.multimodal.lams": []}, "at least 1 item"),
        ({"ensembles.n_models": 10**30}, "n_models is 1e[+]30; give at most 1e[+]09"),
        ({"training.lr": 1e308}, "lr is 1e[+]308; give at most"),
        ({"seed": 2**32}, "give at most 4.29497e[+]09"),
        ({"threads": 10**6}, "less than or equal to 1024"),
        ({"ensembles.n_models": True}, "n_models is True, which is no number"),
        ({"datamodels.lambdas": [True]}, "which is no number"),
        ({"store": " "}, "key 'store': give a path"),
        ({"store": "a\0b"}, "key 'store': embedded null"),
        ({"data.name": "x" * 2000}, "give some text in one line"),
        ({"scheduler": "nonsense"}, "key 'scheduler'.*local-cluster.*given 'nonsense'"),
        ({"model.options": {"hidden": float("nan")}}, "finite numbers"),
        ({"model.options": {"a": {1: 2}}}, "lists and mappings"),
        ({"model.options": {"a": [[[[1]]]]}}, "lists and mappings"),
        ({"model.options": {"a": b"bytes"}}, "lists and mappings"),
        ({"forget_sets": [{"name": "a", "kind": "pc"}]}, "size is None for kind 'pc'.*other kinds a size"),
        (
            {"forget_sets": [{"name": "a", "kind": "class", "size": 2}]},
            "size is 2 for kind 'class'",
        ),
        ({"forget_sets": [{"name": "a" * 101, "kind": "random", "size": 2}]}, "no name for a file"),
        ({"nothing.here": 1}, "unknown key 'nothing'"),
        ({"name.first": 1}, "'name' holds no keys"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(PresetError, match=message) as error:
        presets.load("smoke", overrides)
    assert "\n" not in str(error.value)


def test_overrides_are_part_of_the_name_but_the_device_is_not():
    assert presets.load("smoke", {"ensembles.n_models": 30}).name == "smoke+ensembles.n_models-30"
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


@pytest.mark.parametrize(("n", "sizes"), [(20_000, (250, 500, 1000, 2000, 4000)), (600, (250, 500)), (100, (100,))])
def test_the_curve_has_sizes_that_there_are(n, sizes):
    assert presets.DatamodelsSection(n_subsets=n).sizes == sizes


def test_unknown_and_broken_files(tmp_path):
    with pytest.raises(PresetError, match=r"Unknown preset 'labtop'.*Did you mean 'laptop'\?"):
        presets.load("labtop")
    with pytest.raises(PresetError, match="Unknown preset"):
        presets.load(str(tmp_path / "none.yaml"))
    (tmp_path / "a.yaml").write_text("preset: [1, 2")
    with pytest.raises(PresetError, match="cannot be read as YAML"):
        presets.load(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("name: x")
    beside = tmp_path / "beside.yaml"
    beside.write_text("preset: {name: a}\ntraining: {lr: 9}\n")
    with pytest.raises(PresetError, match=r"beside\.yaml has 'training' beside the key 'preset'.* put it below that"):
        presets.load(beside)
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
    stores = {a: presets.load("smoke", {"store": a}).store for a in ("here", "s3://a/b", "zip::c")}
    assert stores == {"here": str(tmp_path / "here"), "s3://a/b": "s3://a/b", "zip::c": "zip::c"}
    assert presets.load("smoke").data.name == "fashion-mnist"


def _numbers(schema, where=""):
    """Every kind of number in a JSON schema, with its place."""
    if isinstance(schema, list):
        for i, part in enumerate(schema):
            yield from _numbers(part, f"{where}.{i}")
    elif isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield where, schema
        for key, part in schema.items():
            if key not in ("default", "const", "enum"):
                yield from _numbers(part, f"{where}.{key}")


@pytest.mark.parametrize("of", [presets.Preset, *(presets.STUDIES[name] for name in presets.STUDIES)])
def test_every_number_is_bounded(of):
    numbers = dict(_numbers(of.model_json_schema()))
    assert len(numbers) >= 4
    assert not [where for where, found in numbers.items() if not {"minimum", "exclusiveMinimum"} & set(found)]


WHOLE = presets.load(TINY | {"device": "cpu"}).model_dump(mode="json")


def _places(value, before=()):
    yield before
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(part, (*before, key))


ODD = st.one_of(
    st.sampled_from([None, True, False, 0, 1, 2, 3, 7, 2**63, 10**30, 0.5, 1e-3, 1e308, float("nan"), float("inf")]),
    st.integers(-9, 9),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["1e-3", "..", "../up", "auto", "s3://a/b", "no://where", "a:b", "\0", "x" * 999, "own.npz", b"x"]),
    st.sampled_from([[], {}, [0], [1, 1], [[1]], {"a": 1}, {1: 2}, [None], {"hidden": "1e1"}, [{"name": "a"}]]),
)


def tried(make, *given):
    """What it makes, or None and what it says of its own."""
    try:
        return make(*given), ""
    except DmmError as error:
        return None, str(error)


@settings(max_examples=500)
@given(place=st.sampled_from([place for place in _places(WHOLE) if place]), odd=ODD)
def test_whatever_stands_in_a_preset_is_refused_in_one_line_or_makes_sense(place, odd, tmp_path_factory):
    content = at = copy.deepcopy(WHOLE)
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = odd
    preset, said = tried(presets.load, content)
    assert "\n" not in said
    if preset is None:
        return
    dumped = preset.model_dump(mode="json")
    json.dumps(dumped, allow_nan=False)
    assert presets.load(dumped) == preset
    if place[0] != "studies" or "cheap" in place:  # the others are not planned
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(plan, "measure", lambda *a, **k: plan.Rate(1000.0, 2, 8, "cpu"))
            planned, said = tried(plan.plan, preset, tmp_path_factory.mktemp("runs"))
        assert "\n" not in said
        if planned is None:
            return
        assert 0 < planned.hours < float("inf")
        assert (planned.models[["planned", "missing"]] > 0).all(axis=None)
        assert min(planned.disk.values()) >= 0


BOMB = "&a [x]" + "".join(f", &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{{hidden: [{BOMB}]}}", "aliases .*are not followed"),
        ("&a {hidden: *a}", "aliases .*are not followed"),
        (f"{{hidden: {'[' * 100_000}}}", "deep nesting"),
        ("{hidden: 2001-01-01}", "2001-01-01 can be read in two ways"),
        ("{hidden: 1:30}", "1:30 can be read in two ways; write true or false, or a decimal number, or text in quotes"),
        ("{hidden: 010}", "010 can be read in two ways"),
        ("{hidden: 0o17, on: 1}", "on can be read in two ways"),
        ("{hidden: 1_0}", "1_0 can be read in two ways"),
        ("{hidden: -1_0.5_0}", "-1_0.5_0 can be read in two ways"),
        ("{hidden: 1.0_5e+3}", r"1.0_5e\+3 can be read in two ways"),
        ("{hidden: 0x10}", "0x10 can be read in two ways"),
        ("{hidden: [1, No]}", "No can be read in two ways"),
        ("{<<: {hidden: 32}}", "<< can be read in two ways"),
        ("{hidden: !!python/object/apply:os.getcwd []}", "cannot be read as YAML"),
        ("{hidden: 32, hidden: 64}", "key 'hidden' is given twice"),
        ("{hidden: 32}, name: linear", "key 'name' is given twice"),
    ],
)
def test_yaml_that_is_more_than_it_seems_ends_at_once(tmp_path, options, message):
    path, start = tmp_path / "a.yaml", time.perf_counter()
    text = (presets.PRESETS_DIR / "smoke.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("options: {hidden: 32}", f"options: {options}"), encoding="utf-8")
    with pytest.raises(PresetError, match=message) as error:
        presets.load(str(path))
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5


def test_what_can_be_read_in_one_way_is_read_so():
    text = """{a: "no", b: '010', c: 10, d: 1_000, e: 0.5, f: true, n: 1, y: -3, g: 01:30:00, h: null, i: "1:30"}"""
    assert presets.parse(text) == {
        "a": "no", "b": "010", "c": 10, "d": 1000, "e": 0.5, "f": True, "n": 1, "y": -3, "g": "01:30:00", "h": None,
        "i": "1:30",
    }  # fmt: skip


def test_numbers_that_yaml_leaves_as_text_are_numbers():
    options = {"hidden": "3.2e1", "lr": "1e-3", "rates": ["1E-2", "a1e5"], "text": "1e-3x"}
    read = presets.load("smoke", {"model.options": options, "training.lr": "1e-3"})
    assert read.model.options == {"hidden": 32, "lr": 0.001, "rates": [0.01, "a1e5"], "text": "1e-3x"}
    assert isinstance(read.model.options["hidden"], int)
    assert read.training.lr == 0.001


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"seed": 10**400}, "seed is over 1e308; give at most"),
        ({"training.epochs": 10**400}, "epochs is over 1e308"),
        ({"training.lr": 10**400}, "key 'training.lr'"),
        ({"data.options": {"seed": 1}}, "options hold 'seed', which is a key of data itself; set data.seed"),
    ],
)
def test_what_has_no_room_is_said(overrides, said):
    with pytest.raises(PresetError) as error:
        presets.load("smoke", overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", [["a"], {3: 1}, "seed=1"])
def test_overrides_that_are_no_mapping_of_keys_are_refused(overrides):
    with pytest.raises(PresetError, match=r"overrides are .*by dotted keys"):
        presets.load("smoke", overrides)
