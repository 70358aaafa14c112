"""`dmm prepare`, `dmm forget` and `dmm audit`, in an empty folder with a recipe of one's own."""

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dmmlib import forget_sets, progress
from dmmlib.app import cli
from dmmlib.own.forget import forget
from dmmlib.own.recipe import load
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
RECIPE = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import dmmlib

rng = np.random.default_rng(0)
y = np.arange(130) % 3
x = (rng.normal(size=(3, 8))[y] + rng.normal(size=(130, 8))).astype(np.float32)
data = {"x_train": x[:90], "y_train": y[:90], "x_val": x[90:], "y_val": y[90:]}
data |= {"ids": [f"person{i}" for i in range(90)], "class_names": ("u", "v", "w")}


def train(model, x, y, seed):
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    for _ in range(15):
        for batch in torch.randperm(len(x)).split(30):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def net():
    return nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))


recipe = dmmlib.Recipe(model=net, data=data, train=train)
"""


def dmm(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    lay_out(place)
    return place


def lay_out(place):
    """Write a recipe, a model that was trained by it, and ids to forget."""
    (place / "recipe.py").write_text(RECIPE)
    recipe = load(place / "recipe.py")
    torch.manual_seed(9)
    data = recipe.dataset
    model = recipe.train(recipe.model(), torch.from_numpy(data.x_train), torch.from_numpy(data.y_train), 9)
    save_file(model.state_dict(), place / "model.safetensors")
    (place / "ids.csv").write_text("id\n" + "".join(f"person{i}\n" for i in range(0, 24, 2)))


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_a_dry_run_says_the_price_and_trains_nothing(here):
    said = dmm(
        "forget", "model.safetensors", "--recipe", "recipe.py", "--forget", "ids.csv", "--models", 20, "--dry-run"
    )
    assert said.exit_code == 0, said.output
    assert re.search(r"20 models to train on 68 points each \(0 are there\), .* to fit the attributor; ", said.output)
    assert "request 'ids': 12 of 90 training points (person" in said.output
    assert not list(here.glob("prepared/store/attribution*"))
    assert not (here / "unlearned").exists()


def test_a_slow_recipe_is_not_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.3)
    monkeypatch.chdir(tmp_path)
    slow = RECIPE.replace("    return model\n", "    time.sleep(1.5)\n    return model\n")
    (tmp_path / "slow.py").write_text(f"import time\n\ntime.sleep(1.5)\n{slow}")
    said = dmm("prepare", "slow.py", "--models", 10, "--dry-run")
    assert said.exit_code == 0, said.output
    assert "reading slow.py\n" in said.stderr
    assert "try the recipe on few points: 0 / 3" in said.stderr
    assert said.stdout.startswith("10 models to train"), "and only that"


def test_prepare_forget_and_audit(here):
    prepared = dmm("prepare", "recipe.py", "--models", 20)
    assert prepared.exit_code == 0, prepared.output
    assert "dmm forget MODEL --recipe recipe.py --forget IDS --models 20`" in prepared.output
    said = dmm("forget", "model.safetensors", "--recipe", "recipe.py", "--forget", "ids.csv", "--models", 20)
    assert said.exit_code == 0, said.output
    assert "all 20 models are trained and the attributor is fitted" in said.output
    assert "attack on F (LiRA): AUC" in said.output
    after, before = (load_file(here / name) for name in ("unlearned/model.safetensors", "model.safetensors"))
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[k], before[k]) for k in after)
    assert "<h1>Request “ids”" in (here / "unlearned" / "report.html").read_text(encoding="utf-8")
    record = json.loads((here / "unlearned" / "record.json").read_text(encoding="utf-8"))
    jsonschema.validate(record, json.loads((ROOT / "docs" / "record.schema.json").read_text(encoding="utf-8")))
    assert record["request"]["points"] == list(range(0, 24, 2))
    assert "person" not in json.dumps(record), "names of points are data, too"
    assert record["model"]["before"] != record["model"]["after"]
    asked = ("--recipe", "recipe.py", "--forget", "ids.csv", "--models", 20)
    untouched = dmm("audit", "model.safetensors", "--original", "model.safetensors", *asked)
    says = {"NOT forgotten": 1, "cannot be told": 3}  # of 12 points and 20 models either may be
    assert untouched.exit_code == says[untouched.output.rpartition(" is left")[0].splitlines()[-1].rpartition(":")[0]]
    again = dmm(
        "audit", "unlearned/model.safetensors", "--original", "model.safetensors", *asked, "--out", "audit.html"
    )
    assert again.exit_code == {True: 0, False: 1, None: 3}[record["audit"]["forgotten"]]
    assert f"{record['audit']['left']:.2f} is left" in again.output
    assert (here / "audit.html").exists()
    recipe, left = load(here / "recipe.py"), np.setdiff1d(np.arange(90), np.arange(0, 24, 2))
    x, y = (torch.from_numpy(part[left]) for part in (recipe.dataset.x_train, recipe.dataset.y_train))
    given = []
    for seed in range(13):
        torch.manual_seed(seed)
        save_file(recipe.train(recipe.model(), x, y, seed).state_dict(), here / f"retrained{seed}.safetensors")
        given += ["--retrained", f"retrained{seed}.safetensors"]
        if seed < 10:
            wrapped = {f"module._orig_mod.{k}": v for k, v in load_file(here / given[-1]).items()}
            (here / "retrained").mkdir(exist_ok=True)
            torch.save(wrapped, here / "retrained" / f"{seed}.pt")
    given, others = given[:20], given[21::2]
    by_them = dmm("audit", "unlearned/model.safetensors", "--original", "model.safetensors", *asked, *given)
    assert "0 as retrained models, which" in by_them.output
    assert "against retrained models, forget: klom" in by_them.output
    folder = ("--retrained", "retrained")
    of_folder = dmm("audit", "unlearned/model.safetensors", "--original", "model.safetensors", *asked, *folder)
    assert of_folder.stdout == by_them.stdout, "a folder, of weights as DataParallel and torch.compile name them"
    said = [dmm("audit", one, "--original", "model.safetensors", *asked, *given).exit_code for one in others]
    assert sum(code in (0, 3) for code in said) >= 2, "a retrained model has forgotten, or it cannot be told"
    flattered = dmm("audit", others[0], "--original", "model.safetensors", *asked, *given[2:], "--retrained", others[0])
    assert flattered.exit_code == 2
    assert "A retrained model is the original, or the one to be judged" in flattered.output


def test_where_results_go_is_checked_before_any_work_and_a_second_request_knows_of_the_first(here, tmp_path):
    lay_out(tmp_path)
    asked = ("--recipe", "recipe.py", "--models", 20, "--forget")
    (here / "taken").write_text("")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text("mine")
    for out, said in (
        (tmp_path, "holds model.safetensors of something else"),
        (tmp_path / "page", "holds report.html of something else"),
        (here / "taken", "is a file"),
    ):
        found = dmm("forget", "model.safetensors", *asked, "ids.csv", "--out", out, "--prepared", tmp_path / "none")
        assert found.exit_code == 2, found.output
        assert said in found.output
        assert not list(tmp_path.glob("none/store/attribution*"))
    for out, said in (("page", "ends in .html"), ("taken/page.html", "taken")):
        found = dmm("audit", "model.safetensors", "--original", "model.safetensors", *asked, "ids.csv", "--out", out)
        assert found.exit_code == 2, found.output
        assert said in found.output
    costly = ("--set", "cost=0.1", "--set", "steps=3")
    first = dmm("forget", "model.safetensors", *asked, "ids.csv", "--out", tmp_path / "1", *costly)
    assert first.exit_code == 0, first.output
    made = json.loads((tmp_path / "1" / "record.json").read_text(encoding="utf-8"))["method"]
    assert made["options"] == {"cost": 0.1, "steps": 3}
    assert made["cost"] == pytest.approx(0.1, rel=0.1)
    again = dmm("forget", tmp_path / "1" / "model.safetensors", *asked, "person2", "--out", tmp_path / "2", "--dry-run")
    assert again.exit_code == 2
    assert "Point person2 was forgotten by an earlier request" in again.output
    other = dmm("forget", tmp_path / "1" / "model.safetensors", *asked, "person1", "--out", tmp_path / "2", "--dry-run")
    assert "1 of 90 training points (person1), 12 more forgotten before" in other.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"forget": "person0"}, ""),
        ({"forget": "persona"}, "no file, folder, class or id. Did you mean 'person"),
        ({"forget": "bad.csv"}, "line 3: 'nobody' is no training point; "),
        ({"model": "none.safetensors"}, "does not exist; give a .safetensors or .pt"),
        ({"recipe": "none.py"}, "none.py is no file; give a Python file"),
        ({"recipe": "exits.py"}, "exits.py fails (SystemExit: 0)"),
        ({"recipe": "missing.py"}, "missing.py fails (FileNotFoundError"),
        ({"recipe": "model_exits.py"}, "model_exits.py ends the program (SystemExit: 0)"),
        ({"recipe": "train_exits.py"}, "The train function fails on 45 points (SystemExit: 0)"),
        ({"forget": ""}, "The request is empty"),
        ({"recipe": "empty.py"}, "defines no `recipe`"),
        ({"recipe": "broken.py"}, "fails (NameError"),
        ({"recipe": "nothing"}, "A recipe is a Python file"),
        ({"method": "dmn"}, "Unknown method 'dmn'"),
        ({"method": "dmm@ridge"}, "dmm@ridge names an attributor; a recipe has its own: give dmm."),
        ({"set": "cost=0.1"}, ""),
        ({"set": "cost=-1"}, "Option cost=-1 of method 'dmm' was given; it should be greater than 0"),
        ({"set": "rate=0.1"}, "use its own: cost, steps, farthest"),
        ({"set": "cost"}, "--set got 'cost'; give key=value"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_trained(here, change, said):
    (here / "bad.csv").write_text("id\nperson1\nnobody\nperson1\n")
    (here / "empty.py").write_text("")
    (here / "broken.py").write_text("recipe = nothing")
    (here / "exits.py").write_text("raise SystemExit(0)")
    (here / "missing.py").write_text("open('nowhere.npz')")
    exiting = "import sys\n" + RECIPE
    (here / "model_exits.py").write_text(
        exiting.replace("return nn.Sequential", "sys.exit(0)\n    return nn.Sequential")
    )
    (here / "train_exits.py").write_text(exiting.replace("optimizer.step()", "sys.exit(0)"))
    given = {"recipe": "recipe.py", "forget": "ids.csv"} | change
    model = given.pop("model", "model.safetensors")
    asked = [word for key in given for word in (f"--{key}", given[key])]
    options = (*asked, "--prepared", "other", "--out", "none", "--dry-run")
    found = dmm("forget", model, *options)
    assert found.exit_code == (2 if said else 0), found.output
    assert said in found.output
    assert not list(here.glob("other/store/attribution*"))


@pytest.mark.parametrize("models", [9, 10**9])
def test_how_many_models_is_checked(here, models):
    found = dmm("prepare", "recipe.py", "--models", models, "--dry-run")
    assert found.exit_code == 2
    assert f"models is {models}; give a whole number from 10 to 100,000" in found.output


def test_retrained_models_that_are_one_are_refused_before_anything_is_trained(here, tmp_path):
    asked = ("--original", "model.safetensors", "--recipe", "recipe.py", "--forget", "ids.csv", "--prepared", tmp_path)
    found = dmm("audit", "model.safetensors", *asked, *(10 * ("--retrained", "model.safetensors")))
    assert found.exit_code == 2
    assert "Retrained model 2 is one of those before it" in found.output
    assert not list(tmp_path.rglob("attribution*"))


def test_a_studys_original_gives_its_row(tiny, tmp_path, monkeypatch):
    """In Python and on the command line, with the weights of the study's first original."""
    f = tiny.forget_sets()["random_6"]
    params, buffers = tiny.originals().state_of(0)
    row = tiny.unlearned("dmm", f).margins[0]
    result = forget(params | buffers, f.indices, tiny, name=f.name)
    np.testing.assert_allclose(result.margins(), row, atol=1e-4)
    models = tiny.unlearned("dmm", f, models=True).models
    np.testing.assert_allclose(models.logits(tiny.x)[0].numpy(), result.after, atol=1e-4)
    assert tiny.unlearned("dmm", f).models is None
    save_file({k: v.clone() for k, v in (params | buffers).items()}, tmp_path / "original.safetensors")
    forget_sets.make(f.name, f.indices, tiny.data).save(tmp_path / "asked.json")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"preset": TINY}))
    monkeypatch.setenv("DMM_RUNS", str(tiny.runs))
    asked = ("--recipe", tmp_path / "tiny.yaml", "--forget", tmp_path / "asked.json", "--out", tmp_path / "out")
    said = dmm("forget", tmp_path / "original.safetensors", *asked)
    assert said.exit_code == 0, said.output
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in models.state_of(0)[0].items():
        np.testing.assert_allclose(after[name], weight, atol=1e-4)


@pytest.mark.parametrize("command", ["prepare", "forget", "audit"])
def test_a_preset_from_elsewhere_that_names_a_scheduler_is_asked_about(tmp_path, monkeypatch, command):
    used = []
    monkeypatch.setattr("dmmlib.study.Study.attributor", lambda *_: used.append(1))
    monkeypatch.setenv("DMM_RUNS", str(tmp_path / "runs"))
    sent = tmp_path / "sent.yaml"
    sent.write_text(yaml.safe_dump({"preset": TINY | {"scheduler": "tcp://192.0.2.1:8786"}}))
    asked = ("none.pt", "--recipe", sent, "--forget", "3") + ("--original", "none.pt") * (command == "audit")
    asked = [sent] if command == "prepare" else asked
    said = dmm(command, *asked)
    assert said.exit_code == 2
    assert "sent.yaml names a cluster (tcp://192.0.2.1:8786" in said.output
    assert not used
    assert "names a cluster" not in dmm(command, *asked, "--trust-preset").output
    assert bool(used) == (command == "prepare"), "the others lack their weights"


@pytest.mark.parametrize("more", [("--models", 12), ("--prepared", "elsewhere"), ("--dry-run",)])
def test_a_preset_takes_no_numbers_of_a_recipe(tmp_path, monkeypatch, more):
    monkeypatch.setattr("dmmlib.study.Study.attributor", lambda *_: None)
    monkeypatch.setenv("DMM_RUNS", str(tmp_path / "runs"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"preset": TINY}))
    asked = ("forget", "none.pt", "--recipe", tmp_path / "tiny.yaml", "--forget", "3")
    for arguments in (("prepare", tmp_path / "tiny.yaml"), asked):
        said = dmm(*arguments, *more)
        assert said.exit_code == 2, said.output
        assert f"tiny.yaml is a preset, which says itself how many models there are and takes no {more[0]}" in (
            said.output.replace("--models, --prepared or --dry-run", more[0])
        )
    assert f"prepared in {tmp_path / 'runs'}: answer" in dmm("prepare", tmp_path / "tiny.yaml").output
