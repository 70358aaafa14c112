"""Every notebook runs from start to end on the smoke preset under nbval, its own assertions included, and shows no
warning; and the committed ones are executed, whole and clean."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from tests.conftest import DEVICE, TINY

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ids = [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="session")
def place(tmp_path_factory, smoke_store):
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "runs").mkdir()
    (folder / "runs" / "store").symlink_to(smoke_store)
    return folder


RED = """
import io, sys

class Red(io.StringIO):
    def write(self, text):
        raise AssertionError(f"a reader would see red: {text}")

sys.stderr = Red()
"""


def under_nbval(notebook, place):
    """What nbval makes of a notebook, in a run of its own; what it writes in red is an error."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(RED))
    nbformat.write(notebook, place / "prepared.ipynb")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=900",
         "--nbval-kernel-startup-timeout=300", "-p", "no:cacheprovider",
         "-c", os.devnull, "--rootdir", str(place), "prepared.ipynb"],
        cwd=place,
        env={**os.environ, "DMM_RUNS": str(place / "runs"), "DMM_FIGURES": str(place / "figures")},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)  # on a busy machine; nobody waits longer than it takes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_runs_under_nbval_on_smoke(path, place):
    parameters = {"preset": "smoke", "overrides": {"device": DEVICE}}
    prepared = papermill.execute_notebook(str(path), None, parameters, prepare_only=True, progress_bar=False)
    result = under_nbval(prepared, place)
    assert result.returncode == 0, result.stdout[-3000:]
    assert list((place / "figures" / "smoke").glob(f"{path.name[:2]}_*.png")), "a notebook saves its figures"


@pytest.mark.slow
def test_what_is_red_fails_under_nbval(place):
    red = "import warnings; warnings.warn('old')", "import logging; logging.error('old')"
    result = under_nbval(nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, red))), place)
    assert "2 failed, 1 passed" in result.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_is_committed_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith(f"# {path.name[:2]} · ")
    assert "**Question" in notebook.cells[0].source
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0].source.startswith('preset = "laptop"')
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert "check_parameters()" in code[1].source
    folded = [c.metadata.get("jupyter", {}).get("source_hidden", False) for c in code]
    assert folded[1], "set-up is collapsed"
    assert folded.count(False) <= 12, "what a reader must see; collapse what formats, says or asserts"
    assert folded == ["hide-input" in c.metadata.get("tags", []) for c in code], "in Lab as in the book"
    assert any("assert" in c.source for c in code), "a notebook asserts its claims"
    assert all(c.execution_count is not None for c in code), "run `make publish`"
    for cell in code:
        assert "def " not in cell.source or len(cell.source.splitlines()) < 12
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")
    assert path.stat().st_size < 3e6


def kind(data):
    """What an output is: a take-away, a figure, or neither, as a widget's still."""
    if data.get("text/markdown", "").startswith("> **Take-away.** "):
        return "take-away"
    widget = "application/vnd.jupyter.widget-view+json" in data or "children=(" in data.get("text/plain", "")
    return "figure" if "image/png" in data and not widget else ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_a_section_with_a_figure_ends_with_one_take_away(path):
    sections = [[]]
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and "\n## " in f"\n{cell.source}":
            sections.append([])
        sections[-1] += [kind(o.data) for o in cell.get("outputs", []) if "data" in o]
    ends = [(shown[-1], shown.count("take-away")) for shown in sections if "figure" in shown]
    assert ends == [("take-away", 1)] * len(ends)


def test_a_model_of_ones_own_takes_twenty_lines():
    cells = nbformat.read(NOTEBOOKS[10], as_version=4).cells
    first, after = (next(i for i, c in enumerate(cells) if c.source.startswith(f"## {n} ")) for n in (1, 2))
    yours = [
        c.source for c in cells[first:after] if c.cell_type == "code" and "hide-input" not in c.metadata.get("tags", [])
    ]
    lines = [line for source in yours for line in source.splitlines() if line.strip()]
    assert 0 < len(lines) <= 20
    assert "class Net" in yours[0]
    assert "def train" in yours[1]
    assert "load_data" in yours[2]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[:2] in ("01", "03", "05")], ids=lambda p: p.stem)
def test_a_widget_is_a_picture_where_there_is_no_kernel(path):
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", []) if "data" in o]
    widgets = [o for o in outputs if "children=(" in o.data.get("text/plain", "")]
    assert widgets
    for widget in widgets:
        assert len(widget.data["image/png"]) > 20_000
        assert len(widget.metadata["image/png"]["alt"]) > 20


def execute(notebook, place, preset, **parameters):
    """Executes a notebook, or the path of one, on a preset, in a run of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMM_RUNS", str(place / "runs"))
        patch.setenv("DMM_FIGURES", str(place / "figures"))
        return papermill.execute_notebook(
            notebook, None, {"preset": preset} | parameters, kernel_name="python3", progress_bar=False
        )


def one_after_the_other(*stages):
    """A notebook of the cells of several: a kernel takes longer to start than small ones take to run."""
    first, *others = (nbformat.read(path, as_version=4) for path in NOTEBOOKS if path.stem[:2] in stages)
    for cell in (cell for other in others for cell in other.cells):
        place = 0 if "parameters" in cell.metadata.pop("tags", []) else len(first.cells)  # what is given comes later
        first.cells.insert(place, cell)
    for i, cell in enumerate(first.cells):
        cell.id = f"cell-{i}"
    return first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS[:2], ids=ids[:2])
def test_a_misspelt_parameter_is_refused_in_the_first_cells(path, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="has no parameter 'presett'") as error:
        execute(path, tmp_path, TINY, presett="smoke")
    assert error.value.cell_index <= 4
    assert not (tmp_path / "runs").exists()
