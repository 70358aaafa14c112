"""What a contributor is told works: the walk-through as it stands, the README's order, and what `make lab` opens."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^   ```(python|sh)\n(.*?)^   ```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_a_method_in_ten_minutes_as_it_stands(smoke_store, tmp_path):
    """In a copy: Python goes into the file that was named last before it, the rest into a shell."""
    for name in ("dmmlib", "presets", "data", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "api"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "store").symlink_to(smoke_store)
    places = {"DMM_RUNS": "runs", "DMM_FIGURES": "figures", "PYTHONPATH": "."}
    environment = os.environ | {name: str(tmp_path / folder) for name, folder in places.items()}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    golden, said = (tmp_path / "tests" / "golden.csv").read_text(), ""
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        words = re.sub("^   ", "", block[2], flags=re.MULTILINE)
        if block[1] == "python":
            path = tmp_path / re.findall(r"`([\w/]+\.py)`", text[: block.start()])[-1]
            assert not path.exists(), f"{path}: named for another block"
            path.write_text(words, encoding="utf-8")
            continue
        command = ["sh", "-e", "-c", words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}{done.stdout[-2000:]}{done.stderr[-2000:]}"
        said += done.stdout
    assert {block[1] for block in blocks} == {"python", "sh"}
    assert re.search(r"^few +do nothing .*\n +retrain \(floor\) .*\n +head ", said, re.MULTILINE), said
    assert "1 passed" in said
    now = (tmp_path / "tests" / "golden.csv").read_text()
    new = set(now.splitlines()) - set(golden.splitlines())
    assert new
    assert all(line.startswith("method head,") for line in new)
    assert set(golden.splitlines()) <= set(now.splitlines()), "no other line changed"


def test_the_readme_says_first_what_is_read_first():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    order = ["# Can a trained model forget?\n", "](figures/laptop/04_gap_against_cost.png)", "## Commands\n",
             "## Your own model\n", "## The notebooks\n", "## Our goals", "## Limitations\n"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on this machine")
def test_lab_opens_what_was_executed_last(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "notebooks").mkdir()
    jupyter = tmp_path / "bin" / "jupyter"
    jupyter.parent.mkdir()
    jupyter.write_text('#!/bin/sh\necho "$@"\n')
    jupyter.chmod(0o755)
    command = ["make", "lab", "BIN=bin", "-o", ".venv/.installed"]
    hidden = {name: value for name, value in os.environ.items() if name != "DMM_RUNS"}

    def lab(**more):
        return subprocess.run(
            command, cwd=tmp_path, env=hidden | more, capture_output=True, text=True, check=True
        ).stdout

    assert "--ServerApp.root_dir=." in lab()
    assert not (tmp_path / "notebooks" / "executed").is_symlink(), "nothing was executed"
    runs = [tmp_path / "runs" / "laptop", tmp_path / "runs" / "smoke" / "forget_set-mine", tmp_path / "else" / "quick"]
    for age, run in enumerate(runs):
        (run / "notebooks").mkdir(parents=True)
        (run / "notebooks" / f"{run.name}.ipynb").write_text(
            '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
        )
        os.utime(run / "notebooks", (age, age))
    for run, more in ((runs[1], {}), (runs[2], {"DMM_RUNS": str(tmp_path / "else")})):
        assert f"notebooks/executed: {run.relative_to(tmp_path) if not more else run}/notebooks" in lab(**more)
        seen = FileContentsManager(root_dir=str(tmp_path)).get("notebooks/executed")["content"]
        assert [(part["name"], part["type"]) for part in seen] == [(f"{run.name}.ipynb", "notebook")]
    ignored = subprocess.run(["git", "check-ignore", "-q", "notebooks/executed"], cwd=ROOT, check=False)
    assert ignored.returncode in (0, 128), "git takes no notice of it"  # 128: no git, as in an archive
