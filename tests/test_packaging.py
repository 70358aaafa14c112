"""One list of dependencies; nothing in the repository that does not belong there."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

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
    assert sum(sizes.values()) < 40e6


def test_no_machines_own_paths():
    home = re.compile(rb"/(home|root|Users|opt|tmp|work)/[A-Za-z.]")
    for path in tracked():
        if path.suffix in {".npz", ".png"} or path == Path(__file__):
            continue
        found = home.search(path.read_bytes())
        assert not found, f"{path}: {found}"


def test_top_level_is_complete():
    for name in ("notebooks", "dmmlib", "data", "figures", "tests", "environment.yml", "README.md", "LICENSE",
                 "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", ".pre-commit-config.yaml", ".ci/run"):  # fmt: skip
        assert (ROOT / name).exists(), name
