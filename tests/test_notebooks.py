"""Every notebook runs from start to end on the smoke preset under nbval, its own assertions included; and the
committed ones are executed, whole and clean."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from tests.conftest import DEVICE

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ids = [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # on a busy machine; nobody waits longer than it takes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_runs_under_nbval_on_smoke(path, place):
    prepared = place / path.name
    parameters = {"preset": "smoke", "overrides": {"device": DEVICE}}
    papermill.execute_notebook(str(path), str(prepared), parameters, prepare_only=True, progress_bar=False)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=900",
         "--nbval-kernel-startup-timeout=300", "-p", "no:cacheprovider",
         "-c", os.devnull, "--rootdir", str(place), prepared.name],
        cwd=place,
        env={**os.environ, "DMM_RUNS": str(place / "runs"), "DMM_FIGURES": str(place / "figures")},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert list((place / "figures" / "smoke").glob(f"{path.name[:2]}_*.png")), "a notebook saves its figures"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_is_committed_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith(f"# {path.name[:2]} · ")
    assert "**Question" in notebook.cells[0].source
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0].source.startswith('preset = "laptop"')
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert any("assert" in c.source for c in code), "a notebook asserts its claims"
    assert all(c.execution_count is not None for c in code), "run `make publish`"
    for cell in code:
        assert "def " not in cell.source or len(cell.source.splitlines()) < 12
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")
    assert path.stat().st_size < 3e6


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[:2] in ("03", "05")], ids=lambda p: p.stem)
def test_a_widget_is_a_picture_where_there_is_no_kernel(path):
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", []) if "data" in o]
    widgets = [o.data for o in outputs if "children=(" in o.data.get("text/plain", "")]
    assert widgets
    for data in widgets:
        assert len(data["image/png"]) > 20_000
