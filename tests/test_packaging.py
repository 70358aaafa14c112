"""One list of dependencies; nothing in the repository that does not belong there."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY
from tests.test_own_cli import lay_out

ROOT = Path(__file__).parents[1]
REQUIRED = {"jupyterlab", "torch", "numpy", "matplotlib", "seaborn", "ipywidgets", "papermill", "nbval"}


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement):
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    pins = {k.replace("_", "-"): v for k, v in pinned().items()}
    for text in project()["dependencies"] + project()["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[name_of(text)]), text
    assert pins["torch"] == "2.13.0"
    assert set(map(name_of, project()["dependencies"])) >= REQUIRED
    assert project()["requires-python"] == ">=3.11"


def test_the_lowest_versions_are_those_that_are_declared():
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()[1:]
    pins = {name_of(line): Version(line.partition("==")[2]) for line in lines}
    for text in project()["dependencies"]:
        lowest = min(Version(s.version) for s in Requirement(text).specifier if s.operator == ">=")
        assert pins[name_of(text)] == lowest or name_of(text) == "torch", text
    assert len(pins) == len(project()["dependencies"])


def test_conda_users_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d for d in environment["dependencies"] if isinstance(d, dict))["pip"]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    assert f"python{project()['requires-python']}" in environment["dependencies"]


def tracked():
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def test_files_are_small():
    sizes = {path: path.stat().st_size for path in tracked()}
    assert max(sizes.values()) < 5e6
    assert sum(sizes.values()) < 30e6


def test_no_machines_own_paths():
    home = re.compile(rb"/(home|root|Users|opt|tmp|work)/[A-Za-z.]")
    for path in tracked():
        if path.suffix in {".npz", ".png"} or path == Path(__file__):
            continue
        found = home.search(path.read_bytes())
        assert not found, f"{path}: {found}"


def test_top_level_is_complete():
    folders = {"notebooks", "dmmlib", "data", "figures", "tests", "presets", ".ci"}
    files = {"environment.yml", "setup.py", "README.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md"}
    missing = {name for name in folders | files | {".pre-commit-config.yaml", ".ci/run"} if not (ROOT / name).exists()}
    assert not missing


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel in an environment of its own, which shares nothing with the checkout but the dependencies."""
    place = tmp_path_factory.mktemp("wheel")
    source, environment, folder = place / "source", place / "environment", place / "empty"
    folder.mkdir()
    for name in ("dmmlib", "notebooks", "presets", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "executed"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "-w", place, source]
    subprocess.run([*pip, "wheel", *options], check=True, env=os.environ | {"PYTHONPATH": ""})
    (wheel,) = place.glob("*.whl")
    assert wheel.stat().st_size < 10e6
    venv.create(environment)
    dependencies = sysconfig.get_path("purelib")
    (libraries,) = environment.glob("lib/python*/site-packages")
    (libraries / "dependencies.pth").write_text(dependencies)  # of this folder no .pth is read, an editable install's
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("DMM_", "PYTHONPATH"))}
    hidden["OMP_NUM_THREADS"] = "1"

    def dmm(*arguments, cwd=folder):
        said = subprocess.run(
            [environment / "bin" / "dmm", *map(str, arguments)], cwd=cwd, env=hidden, capture_output=True, text=True
        )
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout

    return folder, dmm


@pytest.mark.slow
def test_a_wheel_runs_a_stage_in_an_empty_folder(installed):
    folder, dmm = installed
    assert re.fullmatch(r"dmm \d+\.\d+\.\d+\n", dmm("--version"))
    assert "smoke" in dmm("list")
    assert "stage 10: meta stability" in dmm("list")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"preset": TINY}))
    said = dmm("run", "tiny.yaml", "--stage", "3")
    assert "03_forget_set_selection: done in" in said
    assert (folder / "figures" / "tiny" / "03_forget_sets.png").stat().st_size > 5000
    assert {path.name for path in folder.iterdir()} == {"figures", "runs", "tiny.yaml"}


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="a minute or two; continuous integration does it")
def test_a_wheel_runs_the_smoke_presets_main_table(installed, smoke_store, tmp_path):
    (tmp_path / "store").symlink_to(smoke_store)
    _, dmm = installed
    assert "04_dmm_versus_baselines: done in" in dmm("run", "smoke", "--stage", "04", "--runs", tmp_path)
    assert (tmp_path / "smoke" / "results.csv").stat().st_size > 5000


@pytest.mark.slow
def test_a_folder_is_laid_out_once_and_worked_in(installed):
    folder, dmm = installed
    assert re.fullmatch(r"work: \d+ files written\.\n", dmm("init", "work"))
    work = folder / "work"
    assert {path.name for path in work.iterdir()} == {"README.md", "notebooks", "presets"}
    assert len(list((work / "notebooks").glob("*.ipynb"))) == 11
    (work / "presets" / "smoke.yaml").write_text(yaml.safe_dump({"preset": TINY | {"name": "mine"}}))
    (work / "README.md").unlink()
    assert re.fullmatch(
        r"work: 1 file written; \d+ that were there already are kept as they are\.\n", dmm("init", "work")
    )
    said = dmm("status", "smoke", cwd=work / "notebooks")
    assert "originals        8" in said, "the preset that was changed here, not the library's"


@pytest.mark.slow
def test_a_wheel_forgets_from_a_model_of_ones_own(installed):
    folder, dmm = installed
    place = folder / "own"
    place.mkdir()
    lay_out(place)
    assert "10 models" in dmm("prepare", "recipe.py", "--models", 10, cwd=place)
    said = dmm(
        *("forget", "model.safetensors", "--recipe", "recipe.py", "--forget", "ids.csv", "--models", 10), cwd=place
    )
    assert "attack on F (LiRA): AUC" in said
    assert {path.name for path in (place / "unlearned").iterdir()} == {
        "model.safetensors",
        "record.json",
        "report.html",
    }
